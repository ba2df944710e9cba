"""The notebook runs from its first cell to its last, and holds no output."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, class_folders
from PIL import Image

NOTEBOOK = ROOT / "demo" / "pixmim_demo.ipynb"


def execute(parameters: dict[str, object]):
    """The notebook after its run, the values in its first code cell replaced."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in parameters.items():
        first.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", first.source, flags=re.MULTILINE)
        assert count == 1
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    return client.execute()


# Of jupyter_client and tornado, which the project does not use otherwise.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_the_notebook_goes_from_images_to_pictures_and_neighbours(tmp_path):
    class_folders(tmp_path / "images" / "train", {"ant": 12, "bee": 12}, seed=0)
    class_folders(tmp_path / "images" / "val", {"ant": 4, "bee": 4}, seed=1)
    for path in sorted((tmp_path / "images" / "train").rglob("*.*")):  # a batch of the recipe is 64 images
        for copy in range(2):
            (path.parent / f"{copy}-{path.name}").write_bytes(path.read_bytes())
    output = tmp_path / "output"
    notebook = execute({"IMAGES": str(tmp_path / "images"), "EPOCHS": 1, "OUTPUT": str(output)})
    names = {"masks", "filter", "curves", "reconstruction", "spectrum", "attention", "components"}
    assert {path.stem for path in output.glob("*.png")} == names
    for path in output.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 600
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(shown) == len(names)
    said = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    results = dict(re.findall(r"^(untrained|pre-trained): ({.*})$", said, re.MULTILINE))
    assert [json.loads(result)["n"] for result in results.values()] == [8, 8]


def test_no_output_is_kept():
    for cell in json.loads(Path(NOTEBOOK).read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
