"""Benchmarks: equal computations of the variants they compare, and their commands."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, call
from PIL import Image
from test_models import small_pixmim
from torch import nn
from torch.testing import assert_close

from benchmarks.ablations import ABLATIONS, ablate
from benchmarks.baseline_mae import baseline_of
from benchmarks.loading import synthesise
from benchmarks.products import Products
from util.formats.keys import mae_names

SMALL = [*MODEL, "--model", "vit_pico", "--decoder_dim", "32", "--decoder_depth", "1", "--decoder_heads", "2"]


def example(unit: int = 1) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(PixMIM without a filter, images, noise)."""
    model = small_pixmim(nn.Identity(), mask_unit=unit)
    return model, torch.randn(3, 3, 32, 48), torch.rand(3, model.noise_length)


def gradients(model: nn.Module) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("unit", [1, 2, 3])  # units of 3 do not divide the grid of 4 x 6
def test_loss_and_gradients_of_the_baseline_equal_those_of_pixmim_without_a_filter(unit):
    model, images, noise = example(unit)
    baseline = baseline_of(model)
    ours, theirs = model(images, noise)[0], baseline(images, noise)
    ours.backward()
    theirs.backward()
    assert_close(theirs, ours, rtol=1e-6, atol=0)
    # float32, sums in other orders
    assert_close(gradients(baseline), mae_names(gradients(model)), rtol=1e-4, atol=1e-6)
    assert all(grad.any() for grad in gradients(baseline).values())


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_neither_loss_nor_gradients(name):
    model, images, noise = example()
    ablated = ablate(model, name)
    assert [type(m) for m in ablated.modules()] != [type(m) for m in model.modules()]
    for each in (model, ablated):
        each(images, noise)[0].backward()
    assert_close(ablated(images, noise)[0], model(images, noise)[0], rtol=1e-6, atol=0)
    assert_close(gradients(ablated), gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amp", [False, True])
def test_products_are_one_forward_and_two_backward_per_linear_layer(amp):
    model, images, noise = example()
    flops = []  # of the forward pass
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, x, y: flops.append(2 * y.numel() * m.in_features))
    with Products() as products:
        with torch.autocast("cpu", enabled=amp):
            loss = model(images, noise)[0]
        loss.backward()
    projection = 2 * 3 * 6 * (8 * 8 * 3) * 24  # 3 images, 6 of 24 patches, 192 values, 24 wide; pixels get no gradient
    assert products.flops == 3 * sum(flops) + 2 * projection
    assert {dtype for *_, dtype in products.seen} == {torch.bfloat16 if amp else torch.float32}


def test_throughput_prints_and_appends_a_result_per_batch_size(tmp_path):
    table = tmp_path / "results.md"
    words = ["--rounds", 1, "--batch_size", 1, 2, "--append", table, "--amp", "bf16", "--mask_unit", 2]
    results = [
        json.loads(line)
        for line in call("benchmarks.throughput", *SMALL, "--device", "cpu", *words)
        if line.startswith("{")
    ]
    assert [result["batch_size"] for result in results] == [1, 2]
    variants = {"ours", *ABLATIONS, "optimizer", "read-back", "baseline", "baseline fp32", "target", "matmuls"}
    for result in results:
        assert result["ratios"].keys() == variants
        assert all(0 < x < math.inf for spread in result["ratios"].values() for x in spread)
    rows = table.read_text().splitlines()
    assert [row.count(" | ") for row in rows] == [4] * 4  # head, rule, two results


def test_throughput_refuses_flags_that_the_baseline_lacks():
    with pytest.raises(ValueError, match="--no-norm_pix_loss"):
        call("benchmarks.throughput", *SMALL, "--device", "cpu", "--no-norm_pix_loss")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers
def test_loading_measures_every_pipeline_and_its_ratio_to_mae(photos, tmp_path):
    table = tmp_path / "results.md"
    words = ["--data_path", photos / "train", "--input_size", 32, "--seconds", 0.01, "--rounds", 1, "--append", table]
    result = json.loads(call("benchmarks.loading", *words)[-1])
    pipelines = {"mae", "rrc", "src", "raw", "zstd", "jpeg", "tar"}
    for where, expected in (("one core", pipelines | {"cold"}), ("two workers", pipelines)):
        assert result[where].keys() == expected
        assert result[where]["mae"]["ratio"] == [1, 1, 1]
        assert all(rate["images_per_s"][0] > 0 for rate in result[where].values())
    assert "two workers: raw" in table.read_text()


def test_startup_opens_caches_and_folders_in_a_new_process():
    lines = call("benchmarks.startup", "--images", 10, 2000)
    assert [line.split(":")[0] for line in lines] == [f"{k} of {n}" for k in ("cache", "folder") for n in (10, 2000)]


def test_synthetic_images_have_the_size_and_spectrum_of_photographs(tmp_path):
    synthesise(tmp_path, 2)
    for path in tmp_path.iterdir():
        assert 80_000 < path.stat().st_size < 140_000
        pixels = np.asarray(Image.open(path)).astype(float)
        assert pixels.shape == (375, 500, 3)
        power = np.abs(np.fft.rfft2(pixels[..., 0] - pixels[..., 0].mean())) ** 2
        low, high = (power[a:b, a:b].mean() for a, b in ((5, 10), (40, 80)))
        assert 8**1.5 < low / high < 8**3.5  # amplitude falls with frequency to the power of 1.2


@pytest.mark.slow
def test_ranks_times_runs_with_one_and_two_ranks(tmp_path):
    words = ["--model", "vit_pico", "--steps", 3, "--rounds", 1, "--batch_size", 1, "--amp", "off"]
    call("benchmarks.ranks", *words, "--append", tmp_path / "rows.md")
    (row,) = (tmp_path / "rows.md").read_text().splitlines()[2:]
    alone, together, ratio = map(float, re.search(r"1 rank (\S+) s, 2 ranks (\S+) s; (\S+)", row).groups())
    assert ratio == pytest.approx(together / alone, rel=0.01)


@pytest.mark.slow
def test_steps_times_variants_of_this_and_another_checkout(tmp_path):
    small = shlex.join(map(str, SMALL))
    variants = [f"{small} --batch_size 1", f"{ROOT}:{small} --batch_size 512"]
    call("benchmarks.steps", *variants, "--rounds", 3, "--append", tmp_path / "rows.md")
    (row,) = (tmp_path / "rows.md").read_text().splitlines()[2:]
    ratios = [float(x) for x in re.findall(r" s; (\S+) \(", row)]
    assert ratios[0] == 1
    assert ratios[1] > 2  # 512 images
    with pytest.raises(ValueError, match="--no_such_flag"):
        call("benchmarks.steps", "--no_such_flag 1")
