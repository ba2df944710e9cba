"""Image grids of an encoder: attention of the class token or of efficient probing, components of the patch features."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.plots.grids import draw_columns, enlarge_maps, to_uint8

RAMP = ((234, 240, 246), (150, 198, 224), (24, 100, 170), (8, 24, 66))  # pale to dark blue: lightness shows the value


@torch.no_grad()
def class_attention(encoder: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, heads, h, w): attention weights of the last block's class token for each patch.

    The weights of a head and those for class tokens sum to 1. Several class tokens: the mean of their weights.
    """
    attention, inputs = encoder.blocks[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    encoder.forward_features(images)
    hook.remove()
    q, k, _ = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    prefix = encoder.num_prefix_tokens
    weights = (attention.q_norm(q[:, :, :prefix]) * attention.scale @ attention.k_norm(k).mT).softmax(dim=-1)
    return weights.mean(2)[..., prefix:].unflatten(2, encoder.grid)


def principal_components(features: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """(B, D, h, w) -> first components (B, count, h, w) over all patches, their shares of the variance (count,).

    The sign of a component is arbitrary; here its largest loading is positive.
    """
    rows = features.double().movedim(1, -1)
    flat = rows.flatten(0, 2) - rows.flatten(0, 2).mean(0)
    _, deviation, loadings = torch.linalg.svd(flat, full_matrices=False)
    loadings = loadings[:count]
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
    scores = (flat @ (loadings * largest.sign()).mT).unflatten(0, rows.shape[:3])
    return scores.movedim(-1, 1), deviation[:count] ** 2 / (deviation**2).sum()


def stretch_components(components: Tensor) -> Tensor:
    """(B, N, h, w) -> the same in [0, 1]: each component's 1st to 99th percentile over all patches, clipped."""
    low, high = components.transpose(0, 1).flatten(1).quantile(components.new_tensor([0.01, 0.99]), dim=1)
    scaled = (components - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    return scaled.clamp(0, 1)


def colorize_maps(maps: Tensor) -> np.ndarray:
    """(B, H, W) in [0, 1] -> (B, H, W, 3) uint8, from pale to dark blue."""
    at = np.linspace(0, 1, len(RAMP))
    values = maps.cpu().numpy()
    channels = [np.interp(values, at, channel) for channel in zip(*RAMP, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def draw_attention(encoder: Any, images: Tensor, pixels: Tensor) -> np.ndarray:
    """Grid (H', W', 3) uint8, a row per image: the image, the attention of each head, their mean; maps are divided by their maximum."""
    maps = class_attention(encoder, images)
    maps = torch.cat([maps, maps.mean(1, keepdim=True)], dim=1)
    maps = enlarge_maps(maps / maps.amax((2, 3), keepdim=True), encoder.patch)
    labels = [*(f"head {i + 1}" for i in range(maps.shape[1] - 1)), "mean of heads"]
    heads = {label: colorize_maps(maps[:, i]) for i, label in enumerate(labels)}
    return draw_columns({"input": to_uint8(pixels), **heads})


def draw_queries(maps: Tensor, pixels: Tensor) -> np.ndarray:
    """Grid (H', W', 3) uint8, a column per image: the image, the mean of the queries' attention (B, Q, h, w), each query.

    Each map is divided by its maximum.
    """
    maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)
    maps = enlarge_maps(maps / maps.amax((2, 3), keepdim=True), pixels.shape[-1] // maps.shape[-1])
    rows = np.stack([to_uint8(pixels), *(colorize_maps(maps[:, i]) for i in range(maps.shape[1]))])
    labels = ["input", "mean", *(f"query {i}" for i in range(1, maps.shape[1]))]
    return draw_columns({f"image {n + 1}": rows[:, n] for n in range(rows.shape[1])}, labels)


def draw_components(features: Tensor, pixels: Tensor) -> np.ndarray:
    """Grid (H', W', 3) uint8, a row per image: the image, three components of its patch features (B, D, h, w) as RGB, and each alone."""
    components, shares = principal_components(features)
    maps = enlarge_maps(stretch_components(components), pixels.shape[-1] // features.shape[-1])
    alone = {
        f"component {i + 1}: {share:.0%} of the variance": to_uint8(maps[:, i : i + 1])
        for i, share in enumerate(shares)
    }
    return draw_columns({"input": to_uint8(pixels), "components 1, 2, 3 as red, green, blue": to_uint8(maps), **alone})
