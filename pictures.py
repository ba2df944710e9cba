"""Pictures of what an encoder learned, its attention and patch features, and of what PixMIM does: its masks and filter.

Letters as in models_pixmim.py; a map has a value for each of h x w patches.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_pretrain import masked, to_uint8
from models_pixmim import LowPass, PatchMask
from util.draw import draw_columns

RAMP = ((234, 240, 246), (150, 198, 224), (24, 100, 170), (8, 24, 66))  # pale to dark blue: lightness tells the value


# ----------------------------------------------------------------------------------------------------------- the encoder


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


@torch.no_grad()
def patch_features(encoder: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D, h, w): features of each patch, as a classifier would average them."""
    x = encoder.forward_features(images)
    if isinstance(x, list):  # ConvMAE's maps
        return x[-1]
    return x[:, encoder.num_prefix_tokens :].mT.unflatten(2, encoder.grid)


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


# ------------------------------------------------------------------------------------------------------------ the method


def masks_picture(pixels: Tensor, masks: list[PatchMask], patch: int) -> np.ndarray:
    """A row for each image: the image and what the encoder sees of it under each mask."""
    seen = {f"mask {i + 1}": to_uint8(masked(pixels, mask.drop, patch)) for i, mask in enumerate(masks)}
    return draw_columns({"input": to_uint8(pixels), **seen})


def filter_picture(pixels: Tensor, radii: list[float], own: float, kind: str) -> np.ndarray:
    """Two rows for each image: what filters of these radii keep and what they remove; `own` is the model's radius."""
    channels, size = pixels.shape[1], tuple(pixels.shape[-2:])
    blank = torch.ones_like(pixels)
    columns = {"input": to_uint8(torch.stack([pixels, blank], 1).flatten(0, 1))}
    for radius in radii:
        kept = LowPass(size, radius, [0.0] * channels, [1.0] * channels, kind).to(pixels.device)(pixels)
        label = f"r = {radius:g}" + (" (the target)" if radius == own else "")
        columns[label] = to_uint8(torch.stack([kept, pixels - kept + 0.5], 1).flatten(0, 1))
    return draw_columns(columns, rows=["kept", "removed + grey"] * len(pixels))
