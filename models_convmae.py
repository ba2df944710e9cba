"""ConvMAE's encoder (arXiv:2205.03892): two stages of masked convolutions followed by a ViT.

Nothing is computed for removed patches. Both stages store each visible patch as a small channels-last map of 4 x 4, then
2 x 2 positions. Only the depthwise convolution looks beyond a patch: for it the maps are placed in an image that is zero
at removed patches, which is equivalent to multiplying its input by the mask.

Letters as in models_pixmim.py; n x n positions per patch, D1 and D2 widths of the convolution stages.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.vision_transformer import checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models_pixmim import (
    PatchMask,
    Size,
    init_like_mae,
    patchify,
    sincos_pos_embed,
    take,
    take_patches,
    transformer_block,
    unpatchify,
)


class Merge(nn.Conv2d):
    """k x k convolution with stride k within each patch, a linear layer: (B, V, n, n, D) -> (B, V, n / k, n / k, D')."""

    def __init__(self, in_dim: int, dim: int, k: int = 1):
        super().__init__(in_dim, dim, k, k)

    def forward(self, x: Tensor) -> Tensor:
        k = self.stride[0]
        x = x.unflatten(3, (-1, k)).unflatten(2, (-1, k)).transpose(3, 4)  # (B, V, n / k, n / k, k, k, D)
        return F.linear(x.flatten(4), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Downsampling between stages: strided convolution, norm, GELU."""

    def __init__(self, in_dim: int, dim: int, k: int):
        super().__init__()
        self.proj = Merge(in_dim, dim, k)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


class ConvBlock(nn.Module):
    """Residual 5 x 5 depthwise convolution between two pointwise ones, and residual MLP. Norms have eps 1e-5."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = Merge(dim, dim)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Merge(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=Merge(dim, 4 * dim), act=nn.GELU(), fc2=Merge(4 * dim, dim)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Size, keep: Tensor | None) -> Tensor:
        """(B, V, n, n, D) -> the same; `keep` (B, V) are the patches' indices, None = all patches."""
        x = x + self.drop_path(self.conv2(self.depthwise(self.conv1(self.norm1(x)), grid, keep)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def depthwise(self, x: Tensor, grid: Size, keep: Tensor | None) -> Tensor:
        """Depthwise convolution over the whole image, in which removed patches are zero."""
        n, patches = x.shape[2], x.flatten(2)
        if keep is not None:
            padded = patches.new_zeros(len(x), grid[0] * grid[1], patches.shape[2])
            patches = padded.scatter(1, keep.unsqueeze(-1).expand_as(patches), patches)
        patches = patchify(self.attn(unpatchify(patches, n, grid)), n)
        return (patches if keep is None else take(patches, keep)).unflatten(2, (n, n, -1))


class ConvViT(nn.Module):
    """ConvMAE's encoder with the parameter names of Alpha-VL/ConvMAE. It has no class token.

    `embed_dim` and `depth` are those of the two convolution stages and the ViT. Pooling follows that repository: mean of
    the patches, then `fc_norm`, learned if `global_pool` is "avg" (a classifier), else without parameters; the option
    `fc_norm` decides otherwise. `norm` is used for the fused output of pre-training only.
    """

    num_prefix_tokens = 0
    pretraining_only = ("stage1_output_decode", "stage2_output_decode")

    def __init__(  # noqa: PLR0913 - the names of timm and of ConvMAE
        self, img_size: Size = (224, 224), patch_size: int = 16, in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768), depth: Sequence[int] = (2, 2, 11), num_heads: int = 12,
        num_classes: int = 0, global_pool: str = "", fc_norm: bool | None = None, drop_path_rate: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"--patch_size {patch_size}: a patch size of ConvMAE must be a multiple of 4")
        height, width = img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"an input size of {height} x {width} is not a multiple of the patch size {patch_size}")
        if global_pool not in ("", "avg"):
            raise ValueError(f"--pool {global_pool}: ConvMAE has only the mean of the patches; use --pool mean")
        dim1, dim2, dim = embed_dim
        self.embed_dim, self.in_chans, self.patch = dim, in_chans, patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.grad_checkpointing = False
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        drop1, drop2, drop3 = calculate_drop_path_rates(drop_path_rate, [*depth], stagewise=True)

        self.patch_embed1 = PatchEmbed(in_chans, dim1, patch_size // 4)
        self.blocks1 = nn.ModuleList(ConvBlock(dim1, rate) for rate in drop1)
        self.patch_embed2 = PatchEmbed(dim1, dim2, 2)
        self.blocks2 = nn.ModuleList(ConvBlock(dim2, rate) for rate in drop2)
        self.patch_embed3 = PatchEmbed(dim2, dim, 2)
        self.patch_embed4 = nn.Linear(dim, dim)
        self.blocks3 = nn.Sequential(*(transformer_block(dim, num_heads, rate) for rate in drop3))
        self.stage1_output_decode = Merge(dim1, dim, 4)
        self.stage2_output_decode = Merge(dim2, dim, 2)
        learned = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if learned else norm_layer(dim)
        self.fc_norm = norm_layer(dim, elementwise_affine=learned)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_like_mae(self, projection="patch_embed3.proj")
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid, 0), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for timm.optim's layer decay: stem and convolution stages first, then the ViT blocks, then the rest."""
        return {"stem": r"^(?:pos_embed|patch_embed|blocks[12])", "blocks": r"^blocks3\.(\d+)"}

    def stages(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the two convolution stages, (B, V, 4, 4, D1) and (B, V, 2, 2, D2), and of the ViT, (B, V, D)."""
        if tuple(side // self.patch for side in images.shape[-2:]) != self.grid:
            raise ValueError(f"images of {tuple(images.shape[-2:])} px do not fit the grid of {self.grid} patches")
        if keep is None:
            patches, positions = patchify(images, self.patch), self.pos_embed
        else:
            patches, positions = take_patches(images, self.patch, keep), self.pos_embed[0][keep]
        x = self.patch_embed1(patches.unflatten(2, (self.patch, self.patch, -1)))
        x = first = self.convolve(self.blocks1, x, keep)
        x = second = self.convolve(self.blocks2, self.patch_embed2(x), keep)
        x = self.patch_embed4(self.patch_embed3(x).flatten(2)) + positions
        return first, second, checkpoint_seq(self.blocks3, x) if self.grad_checkpointing else self.blocks3(x)

    def convolve(self, blocks: nn.ModuleList, x: Tensor, keep: Tensor | None) -> Tensor:
        for block in blocks:
            given = x, self.grid, keep
            x = checkpoint(block, *given, use_reentrant=False) if self.grad_checkpointing else block(*given)
        return x

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) -> (B, V, D): sum of all three stages at the visible patches, after the final norm."""
        first, second, x = self.stages(images, mask.keep)
        return self.norm(x + self.stage1_output_decode(first).flatten(2) + self.stage2_output_decode(second).flatten(2))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of unmasked images: (B, D1, 4h, 4w), (B, D2, 2h, 2w), (B, D, h, w); strides 4, 8, 16 at patch 16."""
        first, second, x = self.stages(images, None)
        return [unpatchify(stage.flatten(2), n, self.grid) for stage, n in ((first, 4), (second, 2), (x, 1))]

    def forward_head(self, maps: list[Tensor], pre_logits: bool = False) -> Tensor:
        """Feature maps -> logits (B, K), or with pre_logits pooled features (B, D)."""
        x = self.fc_norm(maps[-1].mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


ENCODERS: dict[str, Callable[..., ConvViT]] = {
    "convvit_pico": partial(ConvViT, embed_dim=(16, 24, 48), depth=(1, 1, 2), num_heads=3),  # for tests
    "convvit_tiny": partial(ConvViT, embed_dim=(64, 96, 192), depth=(2, 2, 11), num_heads=3),
    "convvit_base": partial(ConvViT, embed_dim=(256, 384, 768), depth=(2, 2, 11), num_heads=12),
}
