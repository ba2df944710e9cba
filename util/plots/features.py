"""Image grids of an encoder: attention of the class token, principal components of patch features."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.evaluate.encoder import patch_features
from util.plots.grids import draw_columns
from util.plots.reconstruction import to_uint8

RAMP = ((234, 240, 246), (150, 198, 224), (24, 100, 170), (8, 24, 66))  # pale to dark blue: lightness tells the value


@torch.no_grad()
def class_attention(encoder: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, heads, h, w): the weight that the last block's class token gives to each patch.

    With the class token's weight for itself those of a head add up to 1.
    """
    attention, inputs = encoder.blocks[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda _, words: inputs.append(words[0]))
    encoder.forward_features(images)
    hook.remove()
    q, k, _ = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (attention.q_norm(q[:, :, :1]) * attention.scale @ attention.k_norm(k).mT).softmax(dim=-1)
    return weights[:, :, 0, encoder.num_prefix_tokens :].unflatten(2, encoder.grid)


def principal_components(features: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """(B, D, h, w) -> first components (B, count, h, w) of all patches together, their shares of the variance (count,).

    A component's sign is nobody's choice; here its largest loading is positive.
    """
    rows = features.double().movedim(1, -1)
    flat = rows.flatten(0, 2) - rows.flatten(0, 2).mean(0)
    _, deviation, loadings = torch.linalg.svd(flat, full_matrices=False)
    loadings = loadings[:count]
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
    scores = (flat @ (loadings * largest.sign()).mT).unflatten(0, rows.shape[:3])
    return scores.movedim(-1, 1), deviation[:count] ** 2 / (deviation**2).sum()


def stretched(components: Tensor) -> Tensor:
    """(B, N, h, w) in [0, 1]: of each component the middle 98 % of all patches."""
    low, high = components.transpose(0, 1).flatten(1).quantile(components.new_tensor([0.01, 0.99]), dim=1)
    scaled = (components - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    return scaled.clamp(0, 1)


def heat(maps: Tensor) -> np.ndarray:
    """(B, H, W) in [0, 1] -> (B, H, W, 3) uint8, pale to dark blue."""
    at = np.linspace(0, 1, len(RAMP))
    values = maps.cpu().numpy()
    return (
        np.stack([np.interp(values, at, channel) for channel in zip(*RAMP, strict=True)], -1).round().astype(np.uint8)
    )


def enlarged(maps: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W): each value as large as its patch."""
    return maps.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def attention_picture(encoder: Any, images: Tensor, pixels: Tensor) -> np.ndarray:
    """A row for each image: the image, the attention of each head, their mean; each map as a share of its maximum."""
    maps = class_attention(encoder, images)
    maps = torch.cat([maps, maps.mean(1, keepdim=True)], dim=1)
    maps = enlarged(maps / maps.amax((2, 3), keepdim=True), encoder.patch)
    labels = [*(f"head {i + 1}" for i in range(maps.shape[1] - 1)), "mean of heads"]
    heads = {label: heat(maps[:, i]) for i, label in enumerate(labels)}
    return draw_columns({"input": to_uint8(pixels), **heads})


def pca_picture(encoder: Any, images: Tensor, pixels: Tensor) -> np.ndarray:
    """A row for each image: the image, three components of its patch features as red, green and blue, and each alone."""
    components, shares = principal_components(patch_features(encoder, images))
    maps = enlarged(stretched(components), encoder.patch)
    alone = {
        f"component {i + 1}: {share:.0%} of the variance": to_uint8(maps[:, i : i + 1])
        for i, share in enumerate(shares)
    }
    return draw_columns({"input": to_uint8(pixels), "components 1, 2, 3 as red, green, blue": to_uint8(maps), **alone})
