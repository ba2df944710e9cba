"""Image size of a checkpoint, and its position embedding at another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from util.formats.keys import Weights, architecture


def image_size(weights: Weights) -> tuple[int, int] | None:
    """(H, W) of the run if it fits the position embedding, else of the square that does; None if the file does not say."""
    sizes = architecture(weights.state)
    patch, side = sizes["patch_size"], math.isqrt(sizes["num_patches"])
    said = weights.args.get("input_size")
    height, width = (said * 2)[:2] if isinstance(said, list | tuple) and said else (said, said)
    fits = isinstance(height, int) and isinstance(width, int)
    if fits and (height // patch) * (width // patch) == sizes["num_patches"]:
        return height, width
    return (side * patch, side * patch) if side**2 == sizes["num_patches"] else None


def known_size(weights: Weights) -> tuple[int, int]:
    """`image_size`, which must be known."""
    size = image_size(weights)
    if size is None:
        patches = architecture(weights.state)["num_patches"]
        raise ValueError(
            f"--input_size is needed: {patches} patches are no square, and the file does not say which shape"
        )
    return size


def square_side(weights: Weights, whose: str) -> int:
    """Side of the image, which must be a square."""
    height, width = known_size(weights)
    if height != width:
        raise ValueError(f"--input_size {min(height, width)} is needed: {whose} takes squares, not {height} x {width}")
    return height


def resample_pos_embed(embed: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Position embedding (1, prefix + L, D) of another grid, bicubic without antialiasing as facebookresearch/mae.

    timm's resample_abs_pos_embed returns a 2 x 8 grid as it is when 4 x 4 is wanted.
    """
    prefix, patches = embed[:, :num_prefix_tokens], embed[:, num_prefix_tokens:]
    patches = F.interpolate(patches.mT.unflatten(2, old), new, mode="bicubic").flatten(2).mT
    return torch.cat([prefix, patches], dim=1)


def resize_weights(weights: Weights, size: tuple[int, int]) -> Weights:
    """The weights for images of (H, W); the grid changes, the patch does not."""
    sizes = architecture(weights.state)
    patch, prefix = sizes["patch_size"], int(sizes["class_token"])
    if any(side % patch for side in size):
        raise ValueError(f"--input_size {size[0]} {size[1]} is not a multiple of the patch size {patch}")
    new = (size[0] // patch, size[1] // patch)
    state = dict(weights.state)
    known = image_size(weights) or (size if new[0] * new[1] == sizes["num_patches"] else known_size(weights))
    old = (known[0] // patch, known[1] // patch)
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        if old != new:
            state[name] = resample_pos_embed(state[name].float(), old, new, prefix).to(state[name].dtype)
    return weights._replace(state=state, args=weights.args | {"input_size": [*size]})


def encoder_heads(weights: Weights) -> int:
    """As the file says, else as published for this width, else 64 wide each."""
    width = architecture(weights.state)["embed_dim"]
    said = weights.args.get("num_heads")
    return said or (ENTRIES[width][3] if width in ENTRIES else max(1, width // 64))


ENTRIES = {  # width -> timm's entry point, its patch, depth and heads
    192: ("vit_tiny_patch16_224", 16, 12, 3),
    384: ("vit_small_patch16_224", 16, 12, 6),
    768: ("vit_base_patch16_224", 16, 12, 12),
    1024: ("vit_large_patch16_224", 16, 24, 16),
    1280: ("vit_huge_patch14_224", 14, 32, 16),
}


def averages_normed(weights: Weights) -> bool:
    """Whether the classifier is a probe of the mean of normalised patches."""
    return (
        "head.weight" in weights.state and "fc_norm.weight" not in weights.state and weights.args.get("pool") == "mean"
    )
