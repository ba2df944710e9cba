"""Warnings about pre-training runs that learn nothing."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, PRETRAIN, call, interrupted, records
from torch import nn

import main_pretrain
from models import build_model
from models_pixmim import patch_statistics, patchify
from util.args import resolve_defaults
from util.data.batches import load_batch
from util.data.samples import Samples
from util.data.sources import pretrain_source
from util.data.transforms import Normalize, pretrain_transform
from util.evaluate.health import check_examples, compare_with_constant, explain_loss


@pytest.fixture
def prepared(photos):
    """flags -> (model, normalised images, noise, args), as main_pretrain makes them."""

    def prepare(flags: str = "", data=photos):
        words = [*MODEL, *PRETRAIN, "--input_size", "32", "--data_path", str(data), *flags.split()]
        args = resolve_defaults(main_pretrain.get_parser().parse_args(words))
        model = build_model(args)
        transform = pretrain_transform(args.crop, args.input_size, args.crop_interpolation)
        samples = Samples(pretrain_source(args), transform, args, flip=True, noise_length=model.noise_length)
        batch = load_batch(samples, range(4), CPU)
        return model, Normalize(args, CPU)(batch), batch["noise"], args

    return prepare


def warn(prepared, flags: str, **options) -> list[str]:
    model, images, _, args = prepared(flags, **options)
    return check_examples(model, images, args)


@pytest.mark.parametrize(
    "flags", ["", "--lowpass_radius 0", "--lowpass centered", "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"]
)
def test_a_healthy_run_gets_no_warning(flags, prepared):
    assert warn(prepared, flags) == []


def test_warns_of_statistics_for_pixels_up_to_255_and_names_the_right_ones(prepared):
    (line,) = warn(prepared, "--mean 123.675 116.28 103.53 --std 58.395 57.12 57.375 --lowpass_radius 0")
    assert line.startswith("warning: --mean 124 116 104 --std 58.4 57.1 57.4 ")
    assert " -2.1" in line  # their mean after normalisation
    fitting = re.search(r"these images have (--mean .*)$", line).group(1)
    _, images, _, _ = prepared(fitting)
    assert images.mean((0, 2, 3)).abs().max() < 0.01
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.02  # three digits


def test_warns_of_images_of_one_colour_but_not_of_their_statistics(prepared, tmp_path):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / f"{i}.png")
    (line,) = warn(prepared, "--lowpass_radius 0", data=tmp_path)
    assert line.startswith(f"warning: --data_path {tmp_path}: 4 ")


def test_warns_of_a_target_without_detail(prepared):
    (line,) = warn(prepared, "--lowpass centered --lowpass_radius 0.5")
    assert line.startswith("warning: --lowpass_radius 0.5 ")
    assert " 0.0% " in line  # share of the variance within patches


def test_notes_targets_that_are_not_normalised(prepared):
    (line,) = warn(prepared, "--no-norm_pix_loss")
    assert line.startswith("note: --no-norm_pix_loss: ")


class Constant(nn.Module):
    """Decoder with a constant prediction."""

    def __init__(self, value: float, removed: int, values: int):
        super().__init__()
        self.prediction = torch.full((4, removed, values), value)

    def forward(self, tokens, mask):
        return self.prediction


def test_constant_prediction_for_comparison_has_the_lowest_loss(prepared):
    for flags in ("", "--no-norm_pix_loss"):
        model, images, noise, _ = prepared(flags)
        _, constant = compare_with_constant(model, images, noise)
        mask = model(images, noise)[2]
        target = patchify(model.target(images), 8)[mask.removed]
        if not flags:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        scores = {}
        for value in (target.mean().item() - 0.1, target.mean().item(), target.mean().item() + 0.1):
            model.decoder = Constant(value, 12, 192)
            scores[value], same = compare_with_constant(model, images, noise)
            assert same == constant
        assert min(scores.values()) == scores[target.mean().item()] == pytest.approx(constant, rel=1e-5)


# Shares of measured runs on photographs (docs/healthy_run.md): peak learning rate, updates an epoch, warm-up, {epoch: share}
MEASURED = {
    "good": (1.5e-3, 46, 2, {0: 1.639, 1: 0.969, 2: 0.897, 3: 0.856, 4: 0.852, 5: 0.830, 6: 0.817}),
    "too low": (3.75e-6, 46, 2, {0: 1.639, 1: 1.585, 2: 1.454, 3: 1.359, 4: 1.311, 5: 1.291, 6: 1.288}),
    "far too low": (1.4e-7, 4, 4, {0: 1.677, 5: 1.674, 20: 1.665, 40: 1.660}),
    "too high": (0.25, 46, 2, {0: 1.639, 1: 1.010, 2: 1.006, 3: 1.061, 4: 1.012, 5: 1.009, 6: 1.000}),
    "few updates": (8.2e-4, 4, 1, {0: 1.677, 1: 1.442, 2: 1.246, 3: 1.112, 4: 1.037, 5: 1.013}),
    "wrong statistics": (8.2e-4, 4, 4, {0: 1.608, 5: 0.159, 10: 0.014, 15: 0.003, 40: 0.001}),
}
# The loss of "good" from epoch 3 on as if training had collapsed, and a run that stays at the constant
INVENTED = {
    "collapsed": (1.5e-3, 46, 2, {0: 1.639, 2: 0.897, 3: 0.7, 4: 1.0, 6: 1.0}),
    "no signal": (1.5e-3, 46, 2, {0: 1.639, 1: 1.0, 6: 1.0}),
}
CAUSES = {
    "good": None, "too low": "falling", "far too low": "slow", "too high": "high", "few updates": "falling",
    "wrong statistics": "trivial", "collapsed": "diverged", "no signal": "constant",
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_cause_of_a_bad_loss_curve_is_identified(name):
    lr, steps, warmup, known = (MEASURED | INVENTED)[name]
    epochs = max(known)
    shares = np.interp(range(epochs + 1), list(known), list(known.values())).tolist()
    found = [explain_loss(shares[: n + 1], lr, steps, warmup, epochs) for n in range(epochs + 1)]
    assert not any(found[:warmup])
    assert {*found} - {None} == {CAUSES[name]} - {None}
    if CAUSES[name]:
        assert found[-1] == CAUSES[name]


@pytest.mark.parametrize(
    ("flags", "causes"),
    [
        ("--epochs 20 --blr 0.06 --warmup_epochs 15", []),
        ("--epochs 4 --blr 30 --warmup_epochs 0", [r"--blr 30 .*0\.938"]),
        ("--epochs 1 --mean 124 116 104 --std 58 57 57", ["--warmup_epochs 40 ", "--mean 124 116 104"]),
        ("--epochs 1 --lowpass centered --lowpass_radius 0.5", ["--warmup_epochs 40 ", "--lowpass_radius 0.5"]),
    ],
)
def test_run_prints_the_expected_warnings(flags, causes, photos, tmp_path):
    words = ["--input_size", 32, "--data_path", photos, "--batch_size", 8, "--image_every", 0, "--output_dir", tmp_path]
    said = call("main_pretrain", *PRETRAIN, *words, *flags.split())
    warnings = [line for line in said if line.startswith("warning: ") and "--num_workers" not in line]
    assert len(warnings) == len(causes), warnings
    assert all(re.search(cause, line) for cause, line in zip(causes, warnings, strict=True))


def test_a_resumed_run_does_not_repeat_its_warning(photos, tmp_path, monkeypatch):
    words = [*PRETRAIN, "--data_path", photos, "--batch_size", 8, "--image_every", 0, "--blr", 30, "--warmup_epochs", 0]
    said = []
    for stop in (3, None):  # in the third epoch, after the warning
        ending = partial(call, "main_pretrain", *words, "--epochs", 4, "--output_dir", tmp_path)
        monkeypatch.setattr("util.log.tqdm.write", lambda text, file: said.append(text))
        if stop:
            assert interrupted(monkeypatch, stop, ending) == 75
        else:
            assert len(ending()) == 1  # what was found in the folder
    assert sum("lower --blr 30" in line for line in said) == 1
    shares = [record["share_of_constant"] for record in records(tmp_path, "share_of_constant")]
    assert len(shares) == 5  # before training and after each epoch


def test_a_run_of_an_earlier_version_resumes_without_the_early_losses(photos, tmp_path, monkeypatch):
    words = [
        *PRETRAIN,
        "--data_path",
        photos,
        "--batch_size",
        8,
        "--image_every",
        0,
        "--warmup_epochs",
        0,
        "--epochs",
        3,
    ]
    ending = partial(call, "main_pretrain", *words, "--output_dir", tmp_path)
    assert interrupted(monkeypatch, 2, ending) == 75  # in the second epoch
    log = tmp_path / "log.jsonl"
    log.write_text("".join(x for x in log.read_text().splitlines(keepends=True) if "share_of_constant" not in x))
    ending()
    assert [record["epoch"] for record in records(tmp_path, "share_of_constant")] == [2, 3]


def test_nonfinite_example_loss_gives_one_warning_and_is_logged_as_null(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("util.evaluate.health.compare_with_constant", lambda *_: (math.nan, 1.0))
    words = [*PRETRAIN, "--epochs", 2, "--batch_size", 8, "--warmup_epochs", 1, "--image_every", 0]
    command = partial(call, "main_pretrain", *words, "--data_path", photos, "--output_dir", tmp_path)
    found = [line for line in command() if "not finite" in line]
    assert [line.startswith(f"warning: epoch {epoch}: ") for epoch, line in enumerate(found)] == [True] * 3
    assert [record["example_loss"] for record in records(tmp_path, "example_loss")] == [None] * 3
    command()  # resumes
