"""The promises that are no function's: who imports whom, what recipes set, that the README's commands exist."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from util.run import peak_lr

ROOT = Path(__file__).parent.parent
MAINS = ("main_pretrain", "main_knn", "main_features", "main_linprobe", "main_finetune", "visualize")
# Who may import whom, top down: a module imports from lower lines, or from its own if an arrow in the design says so.
LAYERS = (
    {*MAINS},
    {"pictures"},
    {"engine_pretrain", "health", "models"},
    {"spectrum"},
    {"models_convmae", "models_mff"},
    {"models_pixmim"},
    {"util.demo", "util.classify", "util.curves"},
    {"util.train"},
    {"util.checkpoint", "util.data", "util.replay"},
    {"util.cache", "util.tars"},
    {"util.run", "util.sources"},
    {"util.convert"},
    {"util.export"},
    {"util.log", "util.dist", "util.lr_sched", "util.crop", "util.rng", "util.names", "util.args", "util.draw"},
    {"util.files", "util.interrupt"},
)
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "util").glob("*.py")])
RECIPES = sorted((ROOT / "recipes").glob("*.args"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def project_imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names & {module_name(source) for source in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_only_point_down(path):
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    own = module_name(path)
    assert own in layer, f"{own} has no place in the design; give it one in LAYERS"
    assert [name for name in project_imports(path) if layer[name] <= layer[own]] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_util_imports_no_model_and_models_import_nothing(path):
    imported = project_imports(path)
    if path.parent.name == "util":
        assert all(name.startswith("util.") for name in imported)
    if path.stem.startswith("models_"):
        assert imported <= {"models_pixmim"}
        roots = {
            line.split()[1].split(".")[0] for line in path.read_text().splitlines() if re.match("(from|import) ", line)
        }
        assert roots - set(sys.stdlib_module_names) - {"models_pixmim"} <= {"torch", "timm"}


def parse(script: str, words: list[str]):
    return importlib.import_module(script).get_parser().parse_args(words)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_do_what_their_heads_say(recipe):
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    batch, lr, devices = re.search(
        r"Effective batch (\d+), peak learning rate ([\d.e-]+), on (\d) device", head
    ).groups()
    script = {"linprobe": "main_linprobe", "finetune": "main_finetune"}.get(recipe.stem.split("_")[0], "main_pretrain")
    script = "main_linprobe" if recipe.stem == "demo_probe" else script
    checkpoint = [] if script == "main_pretrain" else ["--checkpoint", "x.pth"]
    args = parse(script, [f"@{recipe}", "--data_path", "x", *checkpoint])
    effective = args.batch_size * args.accum_iter * int(devices)
    assert effective == int(batch)
    assert peak_lr(max(args.blr) if isinstance(args.blr, list) else args.blr, effective) == pytest.approx(float(lr))


def test_the_defaults_of_pretraining_are_the_papers_recipe():
    recipe = ROOT / "recipes" / "pretrain_pixmim_vit_base_300e.args"
    written, bare = (parse("main_pretrain", [*words, "--data_path", "x"]) for words in ([f"@{recipe}"], []))
    same = {"lowpass_radius": 40, "crop_interpolation": "bilinear"}  # what None stands for at 224 px
    assert vars(written) == vars(bare) | same


@pytest.mark.parametrize("name", ["linprobe_vit_base_90e", "finetune_vit_base_100e"])
def test_the_defaults_of_probing_and_finetuning_are_maes(name):
    script = f"main_{name.split('_')[0]}"
    words = ["--data_path", "x", "--checkpoint", "x"]
    written = parse(script, [f"@{ROOT / 'recipes' / name}.args", *words])
    assert vars(written) == vars(parse(script, words))


def readme_commands() -> list[str]:
    commands = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
            script = block.startswith("#!")  # of it only what it starts of ours
            commands += [line.removesuffix(" &") for line in lines if not script or ".py " in line]
    return [command for command in commands if not command.startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_and_docs_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace(".venv/bin/", ""), comments=True)
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in words[1:])
    elif words[0] in ("git", "cd", "tensorboard", "source"):
        return
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).exists()
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()
    else:
        assert words[0] in ("python", "torchrun", "srun"), command
        assert script is not None
        if Path(words[script]).stem in MAINS:
            parse(Path(words[script]).stem, words[script + 1 :])
        assert (ROOT / words[script]).exists()


def test_the_file_map_of_the_readme_names_every_source():
    readme = (ROOT / "README.md").read_text()
    assert [name for path in SOURCES if f"`{(name := str(path.relative_to(ROOT)))}`" not in readme] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_pages_have_no_gaps_and_their_links_lead_somewhere(page):
    text = page.read_text()
    assert re.findall(r"\b(?:TODO|TBD|[A-Z]+_(?:[UMP]|TABLE|VERSIONS|MINUTES|RESULT))\b", text) == []
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
