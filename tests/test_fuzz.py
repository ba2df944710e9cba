"""Fuzz tests: random command lines and damaged files give no traceback, no hang, no wrong load and no invalid flag value.

FUZZ is the number of command lines of each main; there are 25 times as many damaged files. FUZZ_SEED sets the random seed.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import resource
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import DEVICE, PRETRAIN, assert_same
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from util.args import picture, run_main
from util.checkpoint.state import read_checkpoint, write_checkpoint
from util.files import content_hash
from util.formats.read import read_weights
from util.formats.unpickle import load_content

EXAMPLES = int(os.environ.get("FUZZ", 10))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(autouse=True)
def _seed_on_failure():
    """pytest shows this line where a test fails."""
    print(f"FUZZ={EXAMPLES} FUZZ_SEED={SEED}")


# --------------------------------------------------------------------------------------------------------- broken files


def damaged(content: bytes, how: tuple[str, int, int, int]) -> bytes:
    """The content with a truncation, bit flips or replaced, removed or repeated bytes."""
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


def read_or_none(read, path):
    """The content that `read` returns; None if it raises a one-line ValueError that names the file."""
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
    return None


@pytest.fixture(scope="module")
def whole(pretrained, folder):
    """Checkpoint with every entry and tensors of 5 values, for fast reads."""
    content = torch.load(pretrained / "last.pth", weights_only=True)
    del content["sha256"]
    small = {name: value.flatten()[:5].clone() for name, value in content["model"].items()}
    return write_checkpoint(folder / "whole.pth", {**content, "model": small, "optimizer": {"state": small}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@seed(SEED)
@settings(max_examples=25 * EXAMPLES, **SETTINGS)
@given(how=DAMAGE)
def test_damaged_checkpoints_are_rejected_or_load_unchanged(how, whole, folder):
    broken = folder / "broken.pth"
    broken.write_bytes(damaged(whole.read_bytes(), how))
    for read in (read_checkpoint, load_content):
        content = read_or_none(read, broken)
        assert content is None or content_hash(content) == content_hash(read_checkpoint(whole))


@pytest.fixture(scope="module")
def foreign_files(pretrained, folder):
    """The decoder's weights as .pth, .old (legacy torch.save) and .safetensors."""
    decoder = {name: x for name, x in read_weights(pretrained / "last.pth").state.items() if "decoder" in name}
    torch.save({"model": decoder}, folder / "foreign_files.pth")
    torch.save({"model": decoder}, folder / "foreign_files.old", _use_new_zipfile_serialization=False)
    save_file(decoder, folder / "foreign_files.safetensors")
    return folder / "foreign_files"


def tensors_of(content) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by name, nested in "model" or not."""
    container = content.get("model", content) if isinstance(content, dict) else {}
    return (
        {name: x for name, x in container.items() if isinstance(x, torch.Tensor)} if isinstance(container, dict) else {}
    )


def raw(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for _, x in sorted(tensors.items()))


def distance(a: bytes, b: bytes) -> int:
    """Number of bytes that differ."""
    return int((np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).sum())


@seed(SEED)
@settings(max_examples=5 * EXAMPLES, **SETTINGS)
@given(how=DAMAGE, suffix=st.sampled_from([".pth", ".old", ".safetensors"]))
def test_damaged_files_of_other_projects_are_rejected_or_load_unchanged(how, suffix, foreign_files, folder):
    """.old and .safetensors have no checksum: if length and structure are valid, only damaged bytes may differ."""
    path, broken = foreign_files.with_suffix(suffix), folder / f"broken{suffix}"
    whole = path.read_bytes()
    broken.write_bytes(damaged(whole, how))
    content = read_or_none(load_content, broken)
    if content is None:
        return
    found, expected = tensors_of(content), tensors_of(load_content(path))
    if suffix == ".pth" or len(broken.read_bytes()) != len(whole):
        assert_same(found, expected)
    elif {k: (x.shape, x.dtype) for k, x in found.items()} == {k: (x.shape, x.dtype) for k, x in expected.items()}:
        assert distance(raw(found), raw(expected)) <= distance(broken.read_bytes(), whole)


# -------------------------------------------------------------------------------------------------------- command lines

WORDS = ["", "-1", "0", "1", "2", "3", "7", "17", "0.5", "1e-9", "1e9", "nan", "inf", "-inf", "99999999999999999999"]
WORDS += [
    *["none", "auto", "x", "--", "/dev/null", "nowhere/x", "@x", "fp16", "cuda:9", "meta", "rrc", "vit_base"],
    *["é x", "16:0.5", "16:1"],
]
EXCLUDED = {"-h", "--help", "--compile", "--push_to_hub"}  # take minutes; need an account


# Valid range of each numeric flag, independent of the parsers. A flag that is missing here fails the test of its main.
MAXIMUM = 10**9
RANGES = {
    (int, 0, 256): "num_workers",
    (int, 0, MAXIMUM): "freeze_encoder_epochs freeze_layers short_side fuse_layers image_every knn_every max_skipped",
    (int, 0, 2**63 - 1): "seed",
    (int, 0, 65535): "ignore_index",
    (int, 1, 10**6): "epochs",
    (
        int,
        1,
        MAXIMUM,
    ): "accum_iter bands bank_patches batch_size class_tokens count decoder_depth decoder_heads effective_batch ep_queries in_chans input_size k layers log_every "
    "mask_unit patch_size save_every stream_samples",
    (int, 4, MAXIMUM): "decoder_dim",
    (float, 0, 0.99): "drop_path",
    (float, 0, 1): "mask_ratio predict_ratio reprob smoothing",
    (float, 0, MAXIMUM): "blr cutmix lowpass_radius min_lr mixup save_minutes warmup_epochs weight_decay",
    (float, 0.01, 1): "crop_pct layer_decay",
    (float, 1e-9, 1): "train_fraction",
    (float, 1e-3, 10**5): "timeout_minutes",
    (float, 1e-3, MAXIMUM): "temperature",
    (float, 1e-6, MAXIMUM): "std",
    (float, 1, MAXIMUM): "filter",
    (float, -MAXIMUM, MAXIMUM): "mean",
}
NUMBERS = {name: limits for limits, names in RANGES.items() for name in names.split()}
VALUE_COUNTS = {
    "input_size": (1, 2),
    "bands": (1, 99),
    "mean": (1, 99),
    "std": (1, 99),
    "fuse_layers": (1, 99),
    "filter": (0, 99),
    **dict.fromkeys(("images", "data_path", "val_path", "knn_path"), (1, 99)),
    "value_range": (1, 99),
    "classes": (1, 99),
    "palette": (1, 99),
    "sizes": (1, 99),
    "k": (1, 99),
    "layers": (1, 99),
}
LISTS = {("main_linprobe", "blr"), ("main_linprobe", "pool"), ("main_segment", "blr"), ("main_knn", "temperature")}
KEYWORDS = {"main_knn --layers": "all", "main_pretrain --lowpass_radius": "auto", "visualize --lowpass_radius": "auto"}
RANGE_WORDS = ("auto", "full", "percentile")
REFUSED = object()


def accepted(name: str, action: argparse.Action, values: list[str]):
    """The value of a flag for these words, or REFUSED: from the tables above, without argparse."""
    dest = action.dest
    if action.nargs == 0:
        return REFUSED if values else True
    low, high = (1, 99) if (name, dest) in LISTS else VALUE_COUNTS.get(dest, (1, 1))
    if (
        not low <= len(values) <= high
        or "" in values
        or any(re.match(r"-(?!\d+$|\d*\.\d+$)", value) for value in values)
    ):
        return REFUSED  # a word that begins with a dash and is not a number is another flag
    if dest == "value_range":
        return accepted_range(values)
    if dest == "sizes":
        values = [[16, float(value[3:])] if value.startswith("16:") else REFUSED for value in values]
    elif dest == "palette":
        values = [value.lower() if re.fullmatch("[0-9a-fA-F]{6}", value) else REFUSED for value in values]
    elif action.choices is None and action.type not in (None, Path, picture):
        values = [
            value if value == KEYWORDS.get(f"{name} --{dest}") else number_of(value, *NUMBERS[dest]) for value in values
        ]
    wrong_choice = action.choices is not None and not {*values} <= {*action.choices}
    wrong_suffix = action.type is picture and Path(values[0]).suffix not in (".png", ".jpg", ".jpeg")
    if REFUSED in values or wrong_choice or wrong_suffix:
        return REFUSED
    if dest == "input_size":
        return values[0], values[-1]
    return values if high > 1 else values[0]


def accepted_range(values: list[str]):
    numbers = [number_of(value, float, -(10**12), 10**12) for value in values if value not in RANGE_WORDS]
    words = [value for value in values if value in RANGE_WORDS]
    lengths = {"auto": [0], "full": [0], "percentile": [2]}.get("".join(words), [2 * n for n in range(1, 99)])
    rising = REFUSED not in numbers and all(low < high for low, high in zip(numbers[::2], numbers[1::2], strict=False))
    in_percent = rising and ("percentile" not in words or all(0 <= x <= 100 for x in numbers))
    fits = len(words) <= 1 and len(numbers) in lengths and values[: len(words)] == words
    return [*words, *numbers] if fits and in_percent else REFUSED


def number_of(text: str, kind: type, low: float, high: float):
    try:
        value = kind(text)
    except ValueError:
        return REFUSED
    return value if low <= value <= high else REFUSED


def flags_of(name: str) -> list[str]:
    parser = importlib.import_module(name).get_parser()
    return sorted({flag for action in parser._actions for flag in action.option_strings} - EXCLUDED)


def command_lines(name: str):
    """Strategy: up to four flags of a main, mostly with a valid number of values, from its choices or WORDS."""
    flags = []
    for action in importlib.import_module(name).get_parser()._actions:
        value = st.sampled_from([*map(str, action.choices or []), *WORDS])
        counts = {0: st.just(0), None: st.just(1)}.get(action.nargs, st.integers(0, 3))
        values = st.one_of(counts, counts, st.integers(0, 2)).flatmap(
            lambda n, value=value: st.lists(value, min_size=n, max_size=n)
        )
        for flag in sorted({*action.option_strings} - EXCLUDED):
            flags += [st.tuples(st.just(flag), values)] * 20 + [st.tuples(st.just(flag[:-1]), values)]  # unknown
    return st.lists(st.one_of(flags), min_size=1, max_size=4)


MAINS = [
    "main_pretrain",
    "main_linprobe",
    "main_finetune",
    "main_segment",
    "main_knn",
    "main_features",
    "visualize",
    "util.convert",
]


@pytest.fixture
def _memory_limit(monkeypatch, tmp_path):
    """Limit the address space to 16 GiB and work in a temporary folder."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, before[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("util.args.exit_after_save", lambda: sys.exit(1))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def run_command(name: str, words: list[str]) -> tuple[object, str, dict | None]:
    """(exit status or message, stderr, parsed arguments) of a main run in this process."""
    errors, status, parsed, parse = io.StringIO(), 0, [], argparse.ArgumentParser.parse_args

    def record_arguments(self, *given):
        args = parse(self, *given)
        parsed.append(dict(vars(args)))
        return args

    with (
        patch.object(argparse.ArgumentParser, "parse_args", record_arguments),
        patch.object(sys, "argv", [f"{name}.py", *words]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run_main(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code
    return status, errors.getvalue(), parsed[0] if parsed else None


def check_parsed(name: str, line, args: dict | None, given_again=()) -> None:
    """Assert that valid values were parsed as given (except flags given again) and invalid ones were rejected."""
    if any(word == "--" or word.startswith("@") for _, values in line for word in values):
        return  # `--` ends the flags, @FILE adds flags
    actions = {flag: x for x in importlib.import_module(name).get_parser()._actions for flag in x.option_strings}
    expected = {}
    for flag, values in line:
        if flag not in actions:
            assert args is None, f"{flag} was accepted"
            return
        value = accepted(name, actions[flag], values)
        if isinstance(actions[flag], argparse.BooleanOptionalAction) and value is not REFUSED:
            value = not flag.startswith("--no-")
        expected.setdefault(actions[flag].dest, []).append(value)
    refused = [dest for dest, values in expected.items() if REFUSED in values]
    for group in importlib.import_module(name).get_parser()._mutually_exclusive_groups:
        given = [action.dest for action in group._group_actions if action.dest in expected]
        refused += given if len(given) > 1 else []
    assert (args is None) == bool(refused), (refused, args)
    for dest, values in expected.items() if args else ():
        if dest not in given_again:
            assert str(args[dest]) == str(values[-1]), dest


@pytest.mark.parametrize("name", MAINS)
def test_every_flag_accepts_only_its_documented_values(name, monkeypatch):
    """Each flag with each word, the limits of its range and the values just outside."""
    parser = importlib.import_module(name).get_parser()

    def refuse(message: str):
        raise argparse.ArgumentTypeError(message)

    monkeypatch.setattr(parser, "error", refuse)
    required = [word for x in parser._actions if x.required for word in (*x.option_strings, "x.png")]
    words = [word for word in WORDS if word != "--" and not word.startswith("@")]
    wrong = []
    for action in parser._actions:
        kind, low, high = NUMBERS.get(action.dest, (int, 0, 0))
        step = 1 if kind is int else 1e-9
        ends = [str(end) for end in (low - step, low, high, high + max(step, high * 1e-6 * (kind is float)))]
        lists = [
            [],
            *([word] for word in (*words, *ends, *(action.choices or ()))),
            ["1", "2"],
            ["1", "x"],
            ["1", "2", "3"],
        ]
        for flag in sorted({*action.option_strings} - {"-h", "--help"}):
            for values in lists:
                line, found = [(flag, list(map(str, values)))], None
                with contextlib.suppress(argparse.ArgumentTypeError):
                    found = vars(parser.parse_args([*required, flag, *line[0][1]]))
                try:
                    check_parsed(name, line, found)
                except AssertionError:
                    wrong.append((flag, values))
    assert wrong == []


@pytest.mark.usefixtures("_memory_limit")
@pytest.mark.parametrize("name", MAINS)
@pytest.mark.timeout(max(300, 20 * EXAMPLES))
@pytest.mark.filterwarnings("ignore")
def test_random_command_lines_run_or_fail_with_one_line(name, photos, masked, pretrained, folder, tmp_path_factory):
    last = str(pretrained / "last.pth")
    common = ["--checkpoint", last, "--data_path", str(photos), *DEVICE]
    short = ["--epochs", "1", "--batch_size", "8", "--warmup_epochs", "0"]
    before = {
        "main_pretrain": [*PRETRAIN, *short, "--data_path", str(photos)],
        "main_linprobe": [*common, *short],
        "main_finetune": [*common, *short],
        "main_segment": [*common[:2], "--data_path", str(masked), *DEVICE, *short],
        "main_knn": common,
        "main_features": [*common, "--output", str(folder / "x.npy")],
        "visualize": [
            "--checkpoint",
            last,
            "--images",
            str(photos / "val"),
            "--device",
            "cpu",
            "--output",
            str(folder / "x.png"),
        ],
        "util.convert": [last, str(folder / "x.pth")],
    }[name]
    known = flags_of(name)
    after = [
        word for flag, value in (("--num_workers", "0"), ("--epochs", "1")) if flag in known for word in (flag, value)
    ]

    @seed(SEED)
    @settings(max_examples=EXAMPLES, **SETTINGS)
    @given(line=command_lines(name))
    def run(line):
        words = [word for flag, values in line for word in (flag, *values)]
        output = ["--output_dir", str(tmp_path_factory.mktemp("run"))] if "--output_dir" in known else []
        status, errors, args = run_command(name, [*before, *output, *words, *after])
        check_parsed(name, line, args, ("num_workers", "epochs"))
        if status == 2:  # argparse prints the usage first
            errors = errors.splitlines()[-1]
            assert "error: " in errors
        elif isinstance(status, str):
            assert "error: " in status
            assert "\n" not in status.replace("é x", "")
        else:
            assert status in (0, 1, None), errors
        assert "Traceback" not in errors

    run()
