"""The notebook runs from its first cell to its last and is stored without output."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, class_folders
from PIL import Image

NOTEBOOK = ROOT / "demo" / "pixmim_demo.ipynb"


def execute(parameters: dict[str, object]):
    """The executed notebook, with these values in its first code cell."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in parameters.items():
        first.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", first.source, flags=re.MULTILINE)
        assert count == 1
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    return client.execute()


# Warnings of jupyter_client and tornado, which only this test uses.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_the_notebook_draws_all_pictures_and_prints_knn_accuracies(tmp_path):
    class_folders(tmp_path / "images" / "train", {"ant": 12, "bee": 12}, seed=0)
    class_folders(tmp_path / "images" / "val", {"ant": 4, "bee": 4}, seed=1)
    for path in sorted((tmp_path / "images" / "train").rglob("*.*")):  # a batch of the recipe is 64 images
        for copy in range(2):
            (path.parent / f"{copy}-{path.name}").write_bytes(path.read_bytes())
    output = tmp_path / "output"
    colour = "--in_chans 3 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    notebook = execute({"IMAGES": str(tmp_path / "images"), "EPOCHS": 1, "CHANNELS": colour, "OUTPUT": str(output)})
    names = {"masks", "filter", "curves", "reconstruction", "spectrum", "attention", "components"}
    assert {path.stem for path in output.glob("*.png")} == names
    for path in output.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 600
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(shown) == len(names)
    said = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    assert re.findall(r"^(.*) encoder$", said, re.MULTILINE) == ["untrained", "pre-trained"]
    # after and before the final norm
    assert [json.loads(line)["n"] for line in said.splitlines() if line.startswith("{")] == [8] * 4


def test_the_notebook_is_stored_without_output():
    for cell in json.loads(Path(NOTEBOOK).read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
