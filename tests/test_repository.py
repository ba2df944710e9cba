"""Import rules, recipes, README and docs: what belongs to no single function."""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import parsers_of
from torch.distributed.run import get_args_parser as torchrun_parser

from util.args import resolve_defaults
from util.run import peak_lr

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in (ROOT / "util").rglob("__init__.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.args"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ------------------------------------------------------------------------------------------------------------- imports


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "util").rglob("*.py")])
SOURCES = {module_name(path): path.read_text() for path in FILES}


def imported_modules(text: str, modules: set[str]) -> set[str]:
    """Modules that a source text imports, at any depth; relative ones begin with a dot, computed names are "?"."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            names = {f"{parent}.{alias.name}" for alias in node.names}
            found |= names & modules
            found |= {parent} if names - modules else set()
            found |= {"?" for alias in node.names if alias.name == "import_module" and alias.asname}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.add(str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "?")
    return found


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_main(name: str) -> bool:
    return name.startswith("main_") or name in ("visualize", "debug_step")


def is_of_project(name: str) -> bool:
    return is_within(name, "util", "benchmarks", "demo", "tests") or (ROOT / f"{name}.py").exists()


def is_outside_model_files(name: str) -> bool:
    root = name.split(".")[0]
    return root not in sys.stdlib_module_names and root not in ("torch", "timm", "models_pixmim")


SEPARATE = ("util.formats", "util.data", "util.plots")
UTIL_LEVELS = (  # each imports from lines below; the rest of util is the lowest
    ("util.cache", "util.convert", "util.report", "util.plots.curves"),
    ("util.evaluate", "util.meters", "util.plots"),
    ("util.checkpoint", "util.data", "util.formats"),
)


def util_level(name: str) -> int:
    """0 = the highest."""
    return next((i for i, packages in enumerate(UTIL_LEVELS) if is_within(name, *packages)), len(UTIL_LEVELS))


IMPORT_RULES: dict[str, Callable[[str, str], bool]] = {  # rule -> whether (module, imported module) breaks it
    "imports are absolute": lambda _, other: other.startswith("."),
    "nobody imports a main": lambda _, other: is_main(other),
    "only debug_step and import_package compute the name of a module": lambda name, other: (
        other == "?" and name not in ("debug_step", "util.files")
    ),
    "util imports nothing of the project but util": lambda name, other: (
        is_within(name, "util") and is_of_project(other) and not is_within(other, "util")
    ),
    "model files import torch, timm, the standard library and models_pixmim": lambda name, other: (
        name.startswith("models_") and is_outside_model_files(other)
    ),
    "models imports model files alone": lambda name, other: (
        name == "models" and is_of_project(other) and not other.startswith("models_")
    ),
    "evaluate and plots do not import each other": lambda name, other: (
        {name.split(".")[1] for name in (name, other) if is_within(name, "util.evaluate", "util.plots")}
        == {"evaluate", "plots"}
    ),
    "reading checkpoints imports keys, unpickle and weights alone of formats": lambda name, other: (
        name == "util.formats.read"
        and is_within(other, "util.formats")
        and other.split(".")[-1] not in ("keys", "unpickle", "weights")
    ),
    "packages of util import from lower levels": lambda name, other: (
        is_within(name, "util") and is_within(other, "util") and util_level(other) < util_level(name)
    ),
    "formats, data and plots do not import each other": lambda name, other: (
        is_within(name, *SEPARATE) and is_within(other, *SEPARATE) and name.split(".")[1] != other.split(".")[1]
    ),
    "checkpoint imports formats.keys only of formats, and no data": lambda name, other: (
        is_within(name, "util.checkpoint")
        and is_within(other, "util.formats", "util.data")
        and other != "util.formats.keys"
    ),
    "the engine imports neither models nor evaluation, plots, formats and tools": lambda name, other: (
        name == "engine_pretrain"
        and (
            other.startswith("models")
            or is_within(other, "util.evaluate", "util.plots", "util.formats", *UTIL_LEVELS[0])
        )
    ),
}


def broken_import_rules(sources: dict[str, str]) -> list[str]:
    """One line for each import that breaks a rule, and for a cycle; `sources` maps module names to source texts."""
    graph = {name: imported_modules(text, set(sources)) for name, text in sources.items()}
    lines = [
        f"{name} imports {other}: {rule}"
        for name, others in graph.items()
        for other in sorted(others)
        for rule, breaks in IMPORT_RULES.items()
        if breaks(name, other)
    ]
    try:
        TopologicalSorter({name: others & set(graph) for name, others in graph.items()}).prepare()
    except CycleError as error:
        lines.append(f"import cycle: {' -> '.join(reversed(error.args[1]))}")
    return lines


def test_no_module_breaks_an_import_rule():
    assert broken_import_rules(SOURCES) == []


@pytest.mark.parametrize(
    ("planted", "line"),
    [
        ({"util.log": "from . import files"}, "util.log imports .: imports are absolute"),
        ({"visualize": "from main_knn import main"}, "visualize imports main_knn: nobody"),
        ({"main_knn": "def f():\n    import debug_step"}, "main_knn imports debug_step: nobody"),
        ({"engine_pretrain": "import main_pretrain"}, "engine_pretrain imports main_pretrain: nobody"),
        ({"util.log": "import importlib\nimportlib.import_module(name)"}, "util.log imports ?: only debug_step"),
        ({"util.log": "import_module('main_knn')"}, "util.log imports main_knn: nobody"),
        ({"util.log": "def f():\n    from models import ENCODERS"}, "util.log imports models: util imports"),
        ({"util.data.tars": "import engine_pretrain"}, "util.data.tars imports engine_pretrain: util imports"),
        ({"util.new": "import main_knn"}, "util.new imports main_knn: util imports"),
        ({"util.log": "from benchmarks import results"}, "util.log imports benchmarks: util imports"),
        ({"models_mff": "from util.log import Log"}, "models_mff imports util.log: model files"),
        ({"models_pixmim": "import numpy as np"}, "models_pixmim imports numpy: model files"),
        ({"models_convmae": "import models_mff"}, "models_convmae imports models_mff: model files"),
        ({"models": "from util import log"}, "models imports util.log: models imports"),
        ({"models": "import engine_pretrain"}, "models imports engine_pretrain: models imports"),
        ({"util.log": "from util.data import decode"}, "util.log imports util.data.decode: packages"),
        ({"util.run": "import util.checkpoint.stop"}, "util.run imports util.checkpoint.stop: packages"),
        ({"util.data.tars": "import util.evaluate.knn"}, "util.data.tars imports util.evaluate.knn: packages"),
        ({"util.formats.hub": "import util.convert"}, "util.formats.hub imports util.convert: packages"),
        ({"util.evaluate.knn": "import util.plots.grids"}, "util.evaluate.knn imports util.plots.grids: evaluate"),
        ({"util.data.tars": "from util.formats import keys"}, "util.data.tars imports util.formats.keys: formats"),
        ({"util.formats.read": "import util.plots.grids"}, "util.formats.read imports util.plots.grids: formats"),
        ({"util.plots.grids": "from util.data.decode import x"}, "util.plots.grids imports util.data.decode: formats"),
        (
            {"util.checkpoint.state": "from util.formats.read import read_weights"},
            "util.checkpoint.state imports util.formats.read: checkpoint",
        ),
        ({"util.checkpoint.stop": "import util.formats"}, "util.checkpoint.stop imports util.formats: checkpoint"),
        ({"engine_pretrain": "from util.evaluate import knn"}, "engine_pretrain imports util.evaluate.knn: the engine"),
        (
            {"util.checkpoint.resume": "import util.data.sources"},
            "util.checkpoint.resume imports util.data.sources: checkpoint",
        ),
        ({"engine_pretrain": "import models"}, "engine_pretrain imports models: the engine"),
        ({"engine_pretrain": "from util.convert import convert"}, "engine_pretrain imports util.convert: the engine"),
        (
            {"util.formats.read": "from util.formats import write"},
            "util.formats.read imports util.formats.write: reading",
        ),
        ({"util.plots.grids": "import util.evaluate.knn"}, "util.plots.grids imports util.evaluate.knn: evaluate"),
        ({"util.log": "from importlib import import_module as f"}, "util.log imports ?: only debug_step"),
        ({"util.log": "__import__('main_knn')"}, "util.log imports main_knn: nobody"),
        ({"engine_pretrain": "import util.plots.grids"}, "engine_pretrain imports util.plots.grids: the engine"),
        ({"util.a": "import util.b", "util.b": "from util import a"}, "import cycle: util."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_import_breaks_its_rule(planted, line):
    assert any(found.startswith(line) for found in broken_import_rules(SOURCES | planted))


# ------------------------------------------------------------------------------------------------------------ commands

OTHER_PROGRAMS = ("git", "cd", "pip", "source", "tensorboard")


def parse(module: str, words: list[str]):
    return importlib.import_module(module).get_parser().parse_args(words)


def check_command(command: str) -> None:
    """Parse a command as its script would. SystemExit, ValueError or AssertionError if the script would refuse it."""
    words = shlex.split(command.replace(".venv/bin/", ""), comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment variables
        del words[0]
    while words[0] == "srun" or words[0].startswith("--"):
        del words[0]
    if words[0] == "make":
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "torchrun":
        asked = torchrun_parser().parse_args(words[1:])
        check_script(asked.training_script, asked.training_script_args)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
    elif words[:2] == ["python", "-m"]:
        check_script(f"{words[2].replace('.', '/')}.py", words[3:])
    elif words[0] == "python":
        check_script(words[1], words[2:])
    else:
        assert words[0] in OTHER_PROGRAMS


def check_script(script: str, words: list[str]) -> None:
    """Parse the flags of a script of this project; a script without a parser takes no flags."""
    assert (ROOT / script).exists()
    module = script.removesuffix(".py").replace("/", ".")
    if hasattr(importlib.import_module(module), "get_parser"):
        parse(module, words)
    else:
        assert words == []


def commands_of(page: Path) -> list[str]:
    """Lines of the page's bash blocks; of whole scripts and of sh blocks only those that start a script of this project."""
    commands = []
    for language, block in re.findall(r"```(bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        lines = [line.strip().removesuffix(" &") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        own = r"\b(main_\w+|visualize|debug_step)\.py |python -m (util|benchmarks|demo|tests)\b"
        some = language == "sh" or block.startswith("#!")
        commands += [line for line in lines if not some or re.search(own, line)]
    return [command for command in commands if not command.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_readme_and_docs_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        print(command)  # pytest shows the last one if it fails
        check_command(command)


def wrong_scripts_in(text: str) -> list[str]:
    """Commands in running text that start no script of this project, or with a flag that it does not have."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    wrong = []
    for command in re.findall(
        r"`((?:[A-Z_]+=\S+ )*python (?:-m (?:util|benchmarks|demo|tests)\b[\w.]*|\w+\.py)[^`]*)`", prose
    ):
        module = re.search(r"python (?:-m )?([\w.]+)", command)[1].removesuffix(".py")
        flags = set(re.findall(r"(?<=\s)--\w+", command.partition(module)[2]))
        if not (ROOT / f"{module.replace('.', '/')}.py").exists() or flags - flags_of(module):
            wrong.append(command)
    return wrong


def flags_of(module: str) -> set[str]:
    """Flags of a script and of its commands; empty without a parser."""
    parsers = parsers_of(module) if hasattr(importlib.import_module(module), "get_parser") else {}
    return {flag for parser in parsers.values() for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", [*PAGES, *FILES], ids=lambda path: path.name)
def test_commands_in_running_text_have_a_script_and_its_flags(page):
    """Pages of documentation, and docstrings and messages of the sources."""
    assert wrong_scripts_in(page.read_text()) == []


SCRIPTS = [name for name, text in SOURCES.items() if "\nif __name__ ==" in text]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_docstring_of_a_script_begins_with_its_command(name):
    command = f"python {f'-m {name}' if name.startswith('util') else f'{name}.py'} "
    first = SOURCES[name].splitlines()[0].removeprefix('"""')
    assert first.startswith(command)
    assert wrong_scripts_in(f"`{first.partition(':')[0]}`") == []


@pytest.mark.parametrize(
    "command", ["python -m util.cache build --oout x", "python main_pretrain.py --helpp", "python main_x.py"]
)
def test_a_wrong_command_in_running_text_is_found(command):
    assert wrong_scripts_in(f"Call `{command}` once.") == [command]


def test_valid_commands_of_every_kind_pass(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        "python -m util.convert a b --to hf",
        "python util/convert.py a b",
        "python -m util.cache verify x",
        "python -m util.plots.curves output/pixmim --output x.png",
        "python -m benchmarks.throughput --amp bf16 --batch_size 16",
        "python -m benchmarks.loading",
        "python -m benchmarks.ranks",
        "python -m benchmarks.startup",
        "python -m benchmarks.steps '--amp bf16' '../old:--amp bf16'",
        "python -m tests.soak --data_path PHOTOS --kills 40",
        "python -m tests.soak_files --data_path PHOTOS --rounds 300 --seed 2",
        "python -m demo.digits",
        "FUZZ=300 .venv/bin/python -m pytest tests/test_fuzz.py",
        "torchrun --nproc_per_node=2 debug_step.py output/pixmim 1234  # on two ranks",
        "srun python main_pretrain.py --data_path x",
        "make demo test",
    ):
        print(command)
        check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m util.convert a b --too hf",
        "python -m util.convert a b --to tensorflow",
        "python -m benchmarks.throughput --ampp bf17",
        "python -m benchmarks.loading --image 3",
        "python -m util.cache built",
        "python -m util.plots.curves output/pixmim",
        "python -m util.curves output/pixmim --output x.png",
        "python -m tests.soak --data_path PHOTOS --killz 40",
        "python -m demo.digits --epochs 3",
        "python -m pytest tests/test_no_such.py",
        "python main_knn.py --kk 3",
        "python debug_step.py RUN zero",
        "python main_none.py",
        "torchrun --nproc=8 main_pretrain.py --data_path x",
        "torchrun --nproc_per_node=8 main_pretrain.py --data_path x --epoch 3",
        "srun python main_pretrain.py @recipes/no_such.args --data_path x",
        "make tests",
        "pythn main_knn.py",
    ],
)
def test_a_planted_invalid_command_fails(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, ValueError)) as refusal:
        check_command(command)
    assert getattr(refusal.value, "code", 1) != 0


# ------------------------------------------------------------------------------------------------------------- recipes


def head_of(recipe: Path) -> str:
    return "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))


def script_of(recipe: Path) -> str:
    script = re.search(r"\b(main_\w+)\.py", head_of(recipe))
    assert script
    return script[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_the_batch_and_learning_rate_of_their_heads(recipe):
    batch, lr, devices = re.search(
        r"Effective batch (\d+), peak learning rate ([\d.e-]+), on (\d) device", head_of(recipe)
    ).groups()
    script = script_of(recipe)
    checkpoint = [] if script == "main_pretrain" else ["--checkpoint", "x.pth"]
    args = parse(script, [f"@{recipe}", "--data_path", "x", *checkpoint])
    effective = args.batch_size * args.accum_iter * int(devices)
    assert effective == int(batch)
    scale = args.predict_ratio / args.mask_ratio if getattr(args, "lr_scale_by_prediction", False) else 1
    peak = peak_lr(max(args.blr) if isinstance(args.blr, list) else args.blr, effective)
    assert peak * scale == pytest.approx(float(lr))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_heads_begin_with_their_command_and_state_numbers_and_hours(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *lines = [line.removeprefix("# ") for line in head_of(recipe).splitlines()]
    check_command(command)
    assert f" @recipes/{recipe.name} " in command
    devices = re.search(r", on (\d) devices?\.", head_of(recipe))[1]
    assert command.startswith("python " if devices == "1" else f"torchrun --nproc_per_node={devices} ")
    assert [key for key in ("Numbers: ", "Expected: ") if not any(line.startswith(key) for line in lines)] == []
    assert max(map(len, recipe.read_text().splitlines())) <= 140


def test_the_defaults_of_pretraining_are_the_papers_recipe():
    recipe = ROOT / "recipes" / "pretrain_pixmim_vit_base_300e.args"
    written, bare = (parse("main_pretrain", [*words, "--data_path", "x"]) for words in ([f"@{recipe}"], []))
    assert resolve_defaults(written) == resolve_defaults(bare)


@pytest.mark.parametrize("name", ["linprobe_vit_base_90e", "finetune_vit_base_100e"])
def test_the_defaults_of_probing_and_fine_tuning_are_maes(name):
    script = f"main_{name.split('_')[0]}"
    words = ["--data_path", "x", "--checkpoint", "x"]
    written = parse(script, [f"@{ROOT / 'recipes' / name}.args", *words])
    assert vars(written) == vars(parse(script, words))


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_readme_has_at_most_160_lines_of_140_characters():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 140] == []


def test_the_readme_has_no_line_counts_dates_or_paths_of_a_machine():
    assert re.findall(r"\b\d+ lines\b|\brecently\b|/(?:work|tmp|home)/|\b20\d\d-\d\d-\d\d\b", README) == []


def test_the_contents_of_the_readme_are_the_sources():
    contents = README.split("## Contents\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+\.py)`", contents)) == {path.name for path in ROOT.glob("*.py")}
    rows: dict[str, set] = {}
    for name, row in re.findall(r"\| `(util/[\w/]*)` \| (.*) \|", contents):
        rows[name] = rows.get(name, set()) | set(re.findall(r"`(\w+)`", row))
    modules = {
        f"{package.relative_to(ROOT)}/": {path.stem for path in package.glob("*.py")} - {"__init__"}
        for package in PACKAGES
    }
    assert rows == modules


@pytest.mark.parametrize("package", PACKAGES, ids=module_name)
def test_the_docstring_of_a_package_lists_its_modules(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    modules = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    packages = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(re.findall(r"^(\w+/?) ", docstring.split("\n\n")[1], re.MULTILINE)) == sorted([*modules, *packages])


def test_util_itself_has_at_most_13_files():
    assert len(list((ROOT / "util").glob("*.py"))) <= 13


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_have_no_placeholders_and_no_dead_links(page):
    text = page.read_text()
    assert re.findall(r"\b(?:TODO|TBD|[A-Z]+_(?:[UMP]|TABLE|VERSIONS|MINUTES|RESULT))\b", text) == []
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_files_and_names_of_the_map_of_the_code_exist():
    page = (ROOT / "docs" / "code.md").read_text()
    rows = [line.strip("| ").rpartition(" | ")[2] for line in page.splitlines() if line.startswith("| ")]
    named = 0
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", "\n".join(rows)):
        source = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:    )?(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), (file, name)
            named += 1
    assert named > 40
