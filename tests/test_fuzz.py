"""Nobody's command line and nobody's broken file makes a traceback, a hang or a wrong load. FUZZ=1000 tries harder."""

import contextlib
import importlib
import io
import os
import random
import resource
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import DEVICE, PRETRAIN, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from util.args import run_main
from util.checkpoint.state import read_checkpoint, write_checkpoint
from util.files import content_hash
from util.formats.read import read_weights
from util.formats.unpickle import load_content

TRIES = int(os.environ.get("FUZZ", 40))  # commands; and 25 times as many broken files
SETTINGS = {"deadline": None, "database": None, "derandomize": TRIES == 40, "suppress_health_check": list(HealthCheck)}

# ------------------------------------------------------------------------------------------------------- broken files


def damaged(content: bytes, how: tuple[str, int, int, int]) -> bytes:
    """What a disk, a network or a hand makes of a file."""
    kind, seed, where, length = how
    where, rng = where % len(content), random.Random(seed)
    end = min(len(content), where + length)
    if kind == "cut":
        return content[:where]
    if kind == "zeroed tail":
        return content[:where] + bytes(len(content) - where)
    if kind == "bits":
        changed = bytearray(content)
        for _ in range(1 + length % 8):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    filling = {"noise": rng.randbytes(end - where), "removed": b"", "twice": content[where:end] * 2}[kind]
    return content[:where] + filling + content[end:]


DAMAGE = st.tuples(
    st.sampled_from(["cut", "zeroed tail", "bits", "noise", "removed", "twice"]),
    st.integers(0, 2**32),
    st.integers(0, 2**32),
    st.integers(1, 4096),
)


def content_of(read, path):
    """What a reader makes of a file; None where it refuses it in a line that names it."""
    try:
        return read(path)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said
    return None


@pytest.fixture(scope="module")
def whole(pretrained, place):
    """A checkpoint of ours with all that is in one, but small enough to be read a thousand times a minute."""
    content = torch.load(pretrained / "last.pth", weights_only=True)
    del content["sha256"]
    small = {name: value.flatten()[:5].clone() for name, value in content["model"].items()}
    return write_checkpoint(place / "whole.pth", {**content, "model": small, "optimizer": {"state": small}})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=25 * TRIES, **SETTINGS)
@given(how=DAMAGE)
def test_a_broken_checkpoint_is_refused_or_loads_as_it_was(how, whole, place):
    broken = place / "broken.pth"
    broken.write_bytes(damaged(whole.read_bytes(), how))
    for read in (read_checkpoint, load_content):
        content = content_of(read, broken)
        assert content is None or content_hash(content) == content_hash(read_checkpoint(whole))


@pytest.fixture(scope="module")
def theirs(pretrained, place):
    """The same weights in each kind of file that others write; the last two have no checksums."""
    decoder = {name: x for name, x in read_weights(pretrained / "last.pth").state.items() if "decoder" in name}
    torch.save({"model": decoder}, place / "theirs.pth")
    torch.save({"model": decoder}, place / "theirs.old", _use_new_zipfile_serialization=False)
    save_file(decoder, place / "theirs.safetensors")
    return place / "theirs"


@settings(max_examples=5 * TRIES, **SETTINGS)
@given(how=DAMAGE, suffix=st.sampled_from([".pth", ".old", ".safetensors"]))
def test_a_broken_file_of_somebody_else_is_read_or_refused(how, suffix, theirs):
    broken = theirs.with_name(f"broken{suffix}")
    broken.write_bytes(damaged(theirs.with_suffix(suffix).read_bytes(), how))
    content = content_of(load_content, broken)
    if suffix == ".pth" and content is not None:
        assert_same(content, torch.load(theirs.with_suffix(suffix), weights_only=True))


# ------------------------------------------------------------------------------------------------------- command lines

WORDS = ["", "-1", "0", "1", "2", "3", "7", "17", "0.5", "1e-9", "1e9", "nan", "inf", "-inf", "99999999999999999999"]
WORDS += [
    *["none", "auto", "x", "--", "/dev/null", "nowhere/x", "@x", "fp16", "cuda:9", "meta", "rrc", "vit_base"],
    "é x",
]
UNTRIED = {"-h", "--help", "--compile", "--push_to_hub"}  # minutes; an account


def flags_of(name: str) -> list[str]:
    parser = importlib.import_module(name).get_parser()
    return sorted({flag for action in parser._actions for flag in action.option_strings} - UNTRIED)


def lines(name: str):
    """Up to four flags of a main; each with as many values as it takes, mostly, of those it lists or of any."""
    flags = []
    for action in importlib.import_module(name).get_parser()._actions:
        value = st.sampled_from([*map(str, action.choices or []), *WORDS])
        counts = {0: st.just(0), None: st.just(1)}.get(action.nargs, st.integers(0, 3))
        values = st.one_of(counts, counts, st.integers(0, 2)).flatmap(
            lambda n, value=value: st.lists(value, min_size=n, max_size=n)
        )
        flags += [st.tuples(st.just(flag), values) for flag in action.option_strings if flag not in UNTRIED]
    return st.lists(st.one_of(flags), min_size=1, max_size=4)


MAINS = ["main_pretrain", "main_linprobe", "main_finetune", "main_knn", "main_features", "visualize", "util.convert"]


@pytest.fixture
def _bounded(monkeypatch, tmp_path):
    """What asks for more memory than a laptop has gets none; what is written without a folder lands in a temporary one."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, before[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("util.args.exit_after_save", lambda: sys.exit(1))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(name: str, words: list[str]) -> tuple[object, str]:
    """(exit status or message, what was printed as an error) of a main in this process."""
    errors, status = io.StringIO(), 0
    with (
        patch.object(sys, "argv", [f"{name}.py", *words]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run_main(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code
    return status, errors.getvalue()


@pytest.mark.usefixtures("_bounded")
@pytest.mark.parametrize("name", MAINS)
@pytest.mark.timeout(max(300, 20 * TRIES))
@pytest.mark.filterwarnings("ignore")
def test_a_command_line_runs_or_is_refused_in_a_line(name, photos, pretrained, place, tmp_path_factory):
    last = str(pretrained / "last.pth")
    common = ["--checkpoint", last, "--data_path", str(photos), *DEVICE]
    short = ["--epochs", "1", "--batch_size", "8", "--warmup_epochs", "0"]
    before = {
        "main_pretrain": [*PRETRAIN, *short, "--data_path", str(photos)],
        "main_linprobe": [*common, *short],
        "main_finetune": [*common, *short],
        "main_knn": common,
        "main_features": [*common, "--output", str(place / "x.npy")],
        "visualize": [
            "--checkpoint",
            last,
            "--images",
            str(photos / "val"),
            "--device",
            "cpu",
            "--output",
            str(place / "x.png"),
        ],
        "util.convert": [last, str(place / "x.pth")],
    }[name]
    known = flags_of(name)
    after = [
        word for flag, value in (("--num_workers", "0"), ("--epochs", "1")) if flag in known for word in (flag, value)
    ]

    @settings(max_examples=TRIES, **SETTINGS)
    @given(line=lines(name))
    def run(line):
        words = [word for flag, values in line for word in (flag, *values)]
        folder = ["--output_dir", str(tmp_path_factory.mktemp("run"))] if "--output_dir" in known else []
        status, errors = outcome(name, [*before, *folder, *words, *after])
        if status == 2:  # of argparse, which shows the usage first
            errors = errors.splitlines()[-1]
            assert "error: " in errors
        elif isinstance(status, str):
            assert "error: " in status
            assert "\n" not in status.replace("é x", "")
        else:
            assert status in (0, 1, None), errors
        assert "Traceback" not in errors

    run()
