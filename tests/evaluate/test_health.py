"""Warnings of dead runs: that they are said of what is wrong, and of nothing else."""

import re

import pytest
import torch
from conftest import CPU, MODEL, PRETRAIN, call
from torch import nn

import main_pretrain
from models import build_model
from models_pixmim import patch_statistics, patchify, take
from util.data.batches import load_batch
from util.data.samples import Samples
from util.data.sources import pretrain_source
from util.data.transforms import Normalize, pretrain_transform
from util.evaluate.health import losses, warning_after, warnings_at_start


@pytest.fixture
def prepared(photos):
    """flags -> (model, normalised images, noise, args), as main_pretrain makes them."""

    def prepare(flags: str = "", data=photos):
        words = [*MODEL, *PRETRAIN, "--input_size", "32", "--data_path", str(data), *flags.split()]
        args = main_pretrain.get_parser().parse_args(words)
        model = build_model(args)
        transform = pretrain_transform(args.crop, args.input_size, args.crop_interpolation)
        samples = Samples(pretrain_source(args), transform, args, flip=True, noise_length=model.noise_length)
        batch = load_batch(samples, range(4), CPU)
        return model, Normalize(args, CPU)(batch), batch["noise"], args

    return prepare


def said(prepared, flags: str, **options) -> list[str]:
    model, images, _, args = prepared(flags, **options)
    return warnings_at_start(model, images, args)


@pytest.mark.parametrize(
    "flags", ["", "--lowpass_radius 0", "--lowpass centered", "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"]
)
def test_a_sound_run_is_not_warned_of(flags, prepared):
    assert said(prepared, flags) == []


def test_statistics_of_pixels_up_to_255_are_named_with_those_that_fit(prepared):
    (line,) = said(prepared, "--mean 123.675 116.28 103.53 --std 58.395 57.12 57.375 --lowpass_radius 0")
    assert line.startswith("warning: --mean 124 116 104 --std 58.4 57.1 57.4 make the example images -2.1")
    fitting = re.search(r"of these images (--mean .*) would be true", line).group(1)
    _, images, _, _ = prepared(fitting)
    assert images.mean((0, 2, 3)).abs().max() < 0.01
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.02  # three digits


def test_images_of_one_colour_are_named_instead(prepared, tmp_path):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / f"{i}.png")
    (line,) = said(prepared, "--lowpass_radius 0", data=tmp_path)
    assert line == f"warning: 4 images of --data_path {tmp_path} are nearly of one colour: look at them"


def test_a_target_without_detail_is_named(prepared):
    (line,) = said(prepared, "--lowpass centered --lowpass_radius 0.5")
    assert line == (
        "warning: --lowpass_radius 0.5 leaves 0.0% of the variance within patches, nearly constant targets: raise it; "
        "docs/decisions.md has a table of radii"
    )


def test_plain_pixels_are_noted(prepared):
    (line,) = said(prepared, "--no-norm_pix_loss")
    assert line.startswith("note: --no-norm_pix_loss: ")


class Constant(nn.Module):
    """A decoder that always says the same of its P values."""

    def __init__(self, value: float, removed: int, values: int):
        super().__init__()
        self.answer = torch.full((4, removed, values), value)

    def forward(self, tokens, mask):
        return self.answer


def test_the_constant_is_the_best_one(prepared):
    for flags in ("", "--no-norm_pix_loss"):
        model, images, noise, _ = prepared(flags)
        _, constant = losses(model, images, noise)
        mask = model(images, noise)[2]
        target = patchify(model.target(images), 8)[mask.removed]
        if not flags:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        scores = {}
        for value in (target.mean().item() - 0.1, target.mean().item(), target.mean().item() + 0.1):
            model.decoder = Constant(value, 12, 192)
            scores[value], same = losses(model, images, noise)
            assert same == constant
        assert min(scores.values()) == scores[target.mean().item()] == pytest.approx(constant, rel=1e-5)


def test_a_run_no_better_than_a_constant_is_warned_of_once_the_warm_up_is_over(prepared):
    model, images, noise, args = prepared("--warmup_epochs 3 --blr 0.5")
    model.decoder = Constant(0, 12, 192)
    assert warning_after(2, model, images, noise, args) is None
    line = warning_after(3, model, images, noise, args)
    assert line.startswith("warning: after epoch 3 the loss of the example images is ")
    assert "lower --blr (0.5 now), or find the cause in docs/healthy_run.md" in line
    assert model.training


def test_a_run_that_is_better_than_a_constant_is_not_warned_of(prepared):
    model, images, noise, args = prepared("--warmup_epochs 0")
    mask = model(images, noise)[2]
    target = take(patchify(model.target(images), 8), mask.drop)
    mean, std = patch_statistics(target)
    model.decoder = Constant(0, 12, 192)
    model.decoder.answer = 0.1 * (target - mean) / std  # leaves 0.9^2 of the loss
    assert warning_after(1, model, images, noise, args) is None


@pytest.mark.parametrize(
    ("flags", "causes"),
    [
        ("--epochs 20 --blr 0.06 --warmup_epochs 15", []),
        ("--epochs 2 --blr 30 --warmup_epochs 0", ["after epoch 1", "after epoch 2"]),
        ("--epochs 1 --mean 124 116 104 --std 58 57 57", ["--warmup_epochs 40 of --epochs 1", "--mean 124 116 104"]),
        ("--epochs 1 --lowpass centered --lowpass_radius 0.5", ["--warmup_epochs 40 of", "--lowpass_radius 0.5"]),
    ],
)
def test_a_dead_run_says_so_and_a_sound_one_does_not(flags, causes, photos, tmp_path):
    words = ["--input_size", 32, "--data_path", photos, "--batch_size", 8, "--image_every", 0, "--output_dir", tmp_path]
    said = call("main_pretrain", *PRETRAIN, *words, *flags.split())
    warnings = [line for line in said if line.startswith("warning: ") and "waiting for data" not in line]
    assert len(warnings) == len(causes), warnings
    assert all(cause in line for cause, line in zip(causes, warnings, strict=True))
