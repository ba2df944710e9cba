"""Attention and components against slow computations of them; masks and filters against the model's."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models import ENCODERS
from models_pixmim import LowPass, mask_from_noise, patchify
from util.evaluate.encoder import patch_features
from util.plots.features import (
    RAMP,
    class_attention,
    colorize_maps,
    draw_attention,
    draw_components,
    principal_components,
    stretch_components,
)
from util.plots.grids import enlarge_maps
from util.plots.reconstruction import draw_filters, draw_masks, paste_patches


def encoder(name: str = "vit_pico", size: tuple[int, int] = (16, 24)):
    model = ENCODERS[name](img_size=size, patch_size=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing is zero, one or symmetric
    return model


def last_attention_by_hand(model, images: torch.Tensor) -> np.ndarray:
    """The class token's weights in the last block (B, heads, 1 + L), number by number."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    block = f"blocks.{len(model.blocks) - 1}."
    everything = mask_from_noise(torch.arange(6.0).expand(len(images), 6), 0, (2, 3))
    with torch.no_grad():
        x = model.blocks[:-1](model.embed_visible(images, everything)).double().numpy()
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6)
    x = x * weights[block + "norm1.weight"] + weights[block + "norm1.bias"]
    matrix, bias = weights[block + "attn.qkv.weight"], weights[block + "attn.qkv.bias"]
    dim, width = x.shape[-1], x.shape[-1] // model.blocks[-1].attn.num_heads
    found = np.zeros((len(x), dim // width, x.shape[1]))
    for b, tokens in enumerate(x):
        for head in range(dim // width):
            rows = slice(head * width, (head + 1) * width)
            query = matrix[:dim][rows] @ tokens[0] + bias[:dim][rows]
            scores = []
            for token in tokens:
                key = matrix[dim : 2 * dim][rows] @ token + bias[dim : 2 * dim][rows]
                scores.append(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(width))
            total = sum(math.exp(score - max(scores)) for score in scores)
            found[b, head] = [math.exp(score - max(scores)) / total for score in scores]
    return found


@pytest.mark.parametrize("name", ["vit_pico", "mff_vit_pico"])
def test_class_attention_equals_the_last_blocks_weights(name):
    model, images = encoder(name), torch.randn(2, 3, 16, 24)
    by_hand = last_attention_by_hand(model, images)
    attention = class_attention(model, images)
    assert attention.shape == (2, 3, 2, 3)
    assert np.allclose(attention.flatten(2).numpy(), by_hand[:, :, 1:], atol=1e-5)
    assert np.allclose(by_hand.sum(-1), 1)
    assert by_hand.std() > 0.01  # there is something to confuse


def test_attention_maps_remove_their_hooks():
    model = encoder()
    class_attention(model, torch.randn(1, 3, 16, 24))
    assert not model.blocks[-1].attn._forward_pre_hooks


def test_components_equal_those_of_numpy():
    features = torch.randn(3, 5, 4, 6) * torch.tensor([1.0, 5, 2, 0.5, 3]).view(5, 1, 1) + 7
    components, shares = principal_components(features)
    rows = features.double().permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    _, deviation, loadings = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.allclose(shares, deviation[:3] ** 2 / (deviation**2).sum())
    for i in range(3):
        score = ((rows - rows.mean(0)) @ loadings[i]).reshape(3, 4, 6)
        score *= np.sign(loadings[i][np.abs(loadings[i]).argmax()])
        assert np.allclose(components[:, i], score)
    covariance = np.cov(rows.T)
    assert np.allclose(components.transpose(0, 1).flatten(1).var(1), np.linalg.eigvalsh(covariance)[::-1][:3])


def test_components_are_scaled_to_their_middle_98_percent():
    values = torch.arange(100.0).view(1, 1, 10, 10)
    low, high = np.quantile(np.arange(100), [0.01, 0.99])
    expected = np.clip((np.arange(100) - low) / (high - low), 0, 1)
    assert np.allclose(stretch_components(values).flatten(), expected)
    assert torch.isfinite(stretch_components(torch.ones(1, 3, 2, 2))).all()


@pytest.mark.parametrize("name", ["vit_pico", "convvit_pico", "mff_vit_pico"])
def test_patch_features_are_those_that_a_classifier_averages(name):
    options = {"global_pool": "avg", "fc_norm": False}
    model = ENCODERS[name](img_size=(16, 24), patch_size=8, **options).eval()
    images = torch.randn(2, 3, 16, 24)
    mean = patch_features(model, images).mean((2, 3))
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    if name == "convvit_pico":  # its norm follows the mean
        mean = model.fc_norm(mean)
    assert_close(mean, pooled, atol=1e-5, rtol=1e-5)


def test_maps_go_from_pale_to_dark_and_each_value_fills_its_patch():
    picture = colorize_maps(enlarge_maps(torch.tensor([[[0.0, 1.0]]]), 4))
    assert picture.shape == (1, 4, 8, 3)
    assert (picture[0, :, :4] == RAMP[0]).all()
    assert (picture[0, :, 4:] == RAMP[-1]).all()
    lightness = colorize_maps(torch.linspace(0, 1, 64).view(1, 1, -1)).sum(-1)
    assert (np.diff(lightness.astype(int)) <= 0).all()


@pytest.fixture
def drawn(monkeypatch):
    found = {}
    monkeypatch.setattr(
        "util.plots.reconstruction.draw_columns", lambda columns, rows=(): found.update(columns, rows=rows)
    )
    monkeypatch.setattr("util.plots.features.draw_columns", lambda columns, rows=(): found.update(columns, rows=rows))
    return found


def test_the_attention_picture_has_a_column_per_head_divided_by_its_maximum(drawn):
    model, images = encoder(size=(16, 16)), torch.randn(2, 3, 16, 16)
    draw_attention(model, images, torch.rand(2, 3, 16, 16))
    assert list(drawn) == ["input", "head 1", "head 2", "head 3", "mean of heads", "rows"]
    maps = class_attention(model, images)
    assert np.array_equal(
        drawn["head 2"], colorize_maps(enlarge_maps(maps[:, 1] / maps[:, 1].amax((1, 2), keepdim=True), 8))
    )


def test_the_component_picture_shows_components_together_and_separately(drawn):
    model, images = encoder(size=(16, 16)), torch.randn(2, 3, 16, 16)
    draw_components(patch_features(model, images), torch.rand(2, 3, 16, 16))
    together, *alone = [value for name, value in drawn.items() if name.startswith("component")]
    assert len(alone) == 3
    assert np.array_equal(together, np.stack([one[..., 0] for one in alone], -1))


def test_masked_images_show_only_the_visible_patches(drawn):
    pixels = torch.rand(2, 3, 32, 32)
    masks = [mask_from_noise(torch.rand(2, 16), 0.75, (4, 4)) for _ in range(3)]
    draw_masks(pixels, [mask.removed.unflatten(1, (4, 4)) for mask in masks])
    for i, mask in enumerate(masks):
        shown = patchify(torch.from_numpy(drawn[f"mask {i + 1}"]).permute(0, 3, 1, 2), 8)
        truth = patchify((pixels * 255).round().byte(), 8)
        assert torch.equal(shown[~mask.removed], truth[~mask.removed])
        assert set(shown[mask.removed].unique().tolist()) == {128}  # 0.5 x 255, rounded to even


def test_filtered_images_are_the_kept_and_the_removed_part(drawn):
    pixels = torch.rand(2, 3, 32, 32) * 0.2 + 0.4  # nothing is clipped
    draw_filters(pixels, [4, 8], 8, lambda radius: LowPass((32, 32), radius, (0, 0, 0), (1, 1, 1), "centered"))
    assert drawn["rows"] == ["kept", "removed + grey"] * 2
    assert list(drawn) == ["input", "r = 4", "r = 8 (the target)", "rows"]
    kept = LowPass((32, 32), 4, (0, 0, 0), (1, 1, 1), "centered")(pixels)
    shown = torch.from_numpy(drawn["r = 4"]).permute(0, 3, 1, 2) / 255
    assert_close(shown[0::2], kept, atol=0.5 / 255 + 1e-6, rtol=0)
    assert_close(shown[0::2] + shown[1::2] - 0.5, pixels, atol=1 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_pasted_patches_equal_the_models_own_patch_order(channels):
    images, index = torch.rand(2, channels, 16, 24), torch.stack([torch.randperm(6)[:4] for _ in range(2)])
    patches = torch.rand(2, 4, 64 * channels)
    pasted = patchify(paste_patches(images, patches, index, 8), 8)
    expected = patchify(images, 8)
    for i in range(2):
        expected[i, index[i]] = patches[i]
    assert torch.equal(pasted, expected)
