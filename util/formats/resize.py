"""Image size of a checkpoint, and its position embedding at another size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from util.formats.weights import Weights


def known_size(weights: Weights) -> tuple[int, int]:
    """Input size (H, W) in pixels; ValueError if the file does not state it."""
    if weights.input_size is None:
        raise ValueError(f"--input_size is required: the file does not state the grid of {weights.num_patches} patches")
    return weights.input_size


def square_side(weights: Weights, model: str) -> int:
    """Side of a square input in pixels; ValueError for other shapes, which `model` does not support."""
    height, width = known_size(weights)
    if height != width:
        raise ValueError(
            f"--input_size {min(height, width)} is required: {model} supports squares, not {height} x {width}"
        )
    return height


def resample_pos_embed(embed: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Position embedding (1, prefix + L, D) of the grid `new`: bicubic without antialiasing, as in facebookresearch/mae.

    timm's resample_abs_pos_embed does not resample between grids of equal length, such as 2 x 8 and 4 x 4.
    """
    prefix, patches = embed[:, :num_prefix_tokens], embed[:, num_prefix_tokens:]
    patches = F.interpolate(patches.mT.unflatten(2, old), new, mode="bicubic").flatten(2).mT
    return torch.cat([prefix, patches], dim=1)


def resize_weights(weights: Weights, size: tuple[int, int]) -> Weights:
    """Weights for images of (H, W) pixels: resampled position embeddings, the same patch size."""
    patch, state = weights.patch_size, dict(weights.state)
    if any(side % patch for side in size):
        raise ValueError(f"--input_size {size[0]} {size[1]} is not a multiple of the patch size {patch}")
    new = (size[0] // patch, size[1] // patch)
    if new[0] * new[1] != weights.num_patches:
        known_size(weights)
    old = weights.grid or new
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        if old != new:
            resampled = resample_pos_embed(state[name].float(), old, new, weights.class_tokens)
            state[name] = resampled.to(state[name].dtype)
    return weights.with_state(state, input_size=[*size])
