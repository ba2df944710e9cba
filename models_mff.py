"""MFF's encoder (arXiv:2308.00261): a masked ViT that fuses the outputs of several layers for the decoder."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models_pixmim import ENCODERS as VITS
from models_pixmim import MaskedViT, PatchMask


def default_layers(depth: int) -> tuple[int, ...]:
    """Fused layers: 0, 2, 4, 6, 8 and 11 of 12 as released, the same relative positions at other depths."""
    return tuple(sorted({round(layer * (depth - 1) / 11) for layer in (0, 2, 4, 6, 8, 11)}))


class MFFViT(MaskedViT):
    """MaskedViT whose `encode` returns a weighted sum of `fuse_layers`, each but the last through its own linear layer.

    The fusion is used in pre-training only; features are those of the plain ViT. Parameter names as in mmpretrain
    (models/selfsup/mff.py).
    """

    pretraining_only = ("proj_layers", "proj_weights")

    def __init__(self, fuse_layers: Sequence[int] | None = None, **kwargs):
        super().__init__(**kwargs)
        depth = len(self.blocks)
        self.fuse_layers = tuple(fuse_layers or default_layers(depth))
        if [*self.fuse_layers] != sorted({*range(depth)} & {*self.fuse_layers}) or self.fuse_layers[-1] != depth - 1:
            given = " ".join(map(str, self.fuse_layers))
            raise ValueError(f"--fuse_layers {given}: layers must ascend from 0 or later to the last, {depth - 1}")
        self.proj_layers = nn.ModuleList(nn.Linear(self.embed_dim, self.embed_dim) for _ in self.fuse_layers[:-1])
        self.proj_weights = nn.Parameter(torch.ones(len(self.fuse_layers), 1, 1, 1))

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) -> (B, prefix + V, D): weighted sum of the fused layers, after the final norm."""
        x = self.embed_visible(images, mask)
        share = self.proj_weights.flatten().softmax(0)
        projections = (*self.proj_layers, nn.Identity())
        fused = torch.zeros_like(x)
        for layer, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if layer in self.fuse_layers:
                i = self.fuse_layers.index(layer)
                fused = fused + share[i] * projections[i](x)
        return self.norm(fused)


ENCODERS: dict[str, Callable[..., MFFViT]] = {
    f"mff_{size}": partial(MFFViT, **VITS[size].keywords)
    for size in ("vit_pico", "vit_tiny", "vit_small", "vit_base", "vit_large")
}
