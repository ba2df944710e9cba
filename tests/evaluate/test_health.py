"""Warnings about pre-training runs that learn nothing."""

import re

import pytest
import torch
from conftest import CPU, MODEL, PRETRAIN, call
from torch import nn

import main_pretrain
from models import build_model
from models_pixmim import patch_statistics, patchify, take
from util.args import resolve_defaults
from util.data.batches import load_batch
from util.data.samples import Samples
from util.data.sources import pretrain_source
from util.data.transforms import Normalize, pretrain_transform
from util.evaluate.health import check_examples, check_loss, compare_with_constant


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


def test_warns_of_images_of_one_colour_instead(prepared, tmp_path):
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


def test_the_constant_of_the_comparison_is_the_best_one(prepared):
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


def test_warns_after_the_warm_up_if_a_constant_is_as_good(prepared):
    model, images, noise, args = prepared("--warmup_epochs 3 --blr 0.5")
    model.decoder = Constant(0, 12, 192)
    assert check_loss(2, model, images, noise, args) is None
    line = check_loss(3, model, images, noise, args)
    assert line.startswith("warning: epoch 3: ")
    assert "--blr 0.5" in line
    assert model.training


def test_does_not_warn_if_the_model_beats_a_constant(prepared):
    model, images, noise, args = prepared("--warmup_epochs 0")
    mask = model(images, noise)[2]
    target = take(patchify(model.target(images), 8), mask.drop)
    mean, std = patch_statistics(target)
    model.decoder = Constant(0, 12, 192)
    model.decoder.prediction = 0.1 * (target - mean) / std  # leaves 0.9^2 of the loss
    assert check_loss(1, model, images, noise, args) is None


@pytest.mark.parametrize(
    ("flags", "causes"),
    [
        ("--epochs 20 --blr 0.06 --warmup_epochs 15", []),
        ("--epochs 2 --blr 30 --warmup_epochs 0", ["epoch 1", "epoch 2"]),
        ("--epochs 1 --mean 124 116 104 --std 58 57 57", ["--warmup_epochs 40 ", "--mean 124 116 104"]),
        ("--epochs 1 --lowpass centered --lowpass_radius 0.5", ["--warmup_epochs 40 ", "--lowpass_radius 0.5"]),
    ],
)
def test_a_run_prints_the_warnings_it_deserves(flags, causes, photos, tmp_path):
    words = ["--input_size", 32, "--data_path", photos, "--batch_size", 8, "--image_every", 0, "--output_dir", tmp_path]
    said = call("main_pretrain", *PRETRAIN, *words, *flags.split())
    warnings = [line for line in said if line.startswith("warning: ") and "waiting for data" not in line]
    assert len(warnings) == len(causes), warnings
    assert all(cause in line for cause, line in zip(causes, warnings, strict=True))
