"""PixMIM: masked image modelling with a low-frequency target (arXiv:2303.02416), on timm's vision transformers.

Contents: patches and masks, the low-pass target, masked ViT, decoder, loss. Needs torch and timm only: copy this file alone.

Letters: B batch, C channels, H W pixels, h w patches, L = h * w, V visible and R removed patches, D width,
P = p * p * C values of a patch in (row, column, channel) order, U mask units.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_seq
from torch import Tensor, nn

Size = tuple[int, int]


class PatchMask(NamedTuple):
    """Visible and removed patches of each image; patches are numbered row by row."""

    keep: Tensor  # (B, V) int64, visible patches in the order of the encoder's tokens
    drop: Tensor  # (B, R) int64, removed patches in the order of the prediction
    restore: Tensor  # (B, L) int64, [visible | removed] -> raster order
    removed: Tensor  # (B, L) bool, True = to be reconstructed


class MaskedEncoder(Protocol):
    """Interface of a host: a class with these members can be pre-trained by PixMIM."""

    embed_dim: int
    num_prefix_tokens: int
    in_chans: int
    grid: Size
    patch: int
    grad_checkpointing: bool
    pretraining_only: tuple[str, ...]  # names of the parts that only `encode` uses; classifiers drop them

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor: ...  # (B, C, H, W) -> (B, prefix + V, D)


# ---------------------------------------------------------------------------------------------------- patches and masks


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P), patches row by row."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, grid: Size) -> Tensor:
    """(B, L, P) -> (B, C, H, W), the inverse of `patchify`."""
    x = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, N) of x (B, L, D): (B, N, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def mask_units(grid: Size, unit: int) -> int:
    """Number of mask units U: blocks of unit x unit patches, clipped at the edges."""
    return -(-grid[0] // unit) * -(-grid[1] // unit)


def mask_from_noise(noise: Tensor, ratio: float, grid: Size, unit: int = 1) -> PatchMask:
    """Mask that keeps the int(L * (1 - ratio)) patches with the smallest noise (B, U), as MAE does.

    Patches of a unit share its noise and are kept in raster order, so the number kept is the same for every grid.
    """
    h, w = grid
    if unit > 1:  # noise of the units -> noise of the patches
        noise = noise.unflatten(1, (-(-h // unit), -1))
        noise = noise.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, :h, :w].flatten(1)
    if noise.shape[1] != h * w:
        raise ValueError(f"noise for {noise.shape[1]} patches does not fit a grid of {h} x {w}")
    visible = int(h * w * (1 - ratio))
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return PatchMask(order[:, :visible], order[:, visible:], restore, restore >= visible)


# ----------------------------------------------------------------------------------------------------------- the target


def low_pass_disc(size: Size, radius: float, kind: str = "reference") -> Tensor:
    """Frequencies that the filter keeps, (H, W) bool in the order of torch.fft.fft2.

    `centered`: distance from zero at most `radius` bins. `reference`: distance from the middle of the shifted spectrum,
    ((H - 1) / 2, (W - 1) / 2), which is half a bin below zero for even sides, as in the release
    (mmselfsup/models/target_generators/low_freq_generator.py).
    """
    distance2 = torch.zeros(size)
    for dim, n in enumerate(size):
        k = (torch.arange(n) + n // 2) % n - n // 2  # exact; fftfreq(n) * n is not exact and loses boundary bins
        zero = (n - 1) / 2 - n // 2 if kind == "reference" else 0.0
        distance2 += ((k - zero) ** 2).unsqueeze(1 - dim)
    return distance2 <= radius**2


class LowPass(nn.Module):
    """(B, C, H, W) normalised -> the same without its high frequencies: the target of PixMIM (section 3.2).

    Always computed in float32, without gradient, on pixels in [0, 1]. `radius` in frequency bins of the image side, 40
    at 224 px. `reference` returns the magnitude of the complex filtered image, as the release does; `centered` is a
    real zero-phase filter. Buffers are not saved.
    """

    mean: Tensor
    std: Tensor
    even: Tensor
    odd: Tensor

    def __init__(self, size: Size, radius: float, mean: Sequence[float], std: Sequence[float], kind: str = "reference"):
        super().__init__()
        self.size, self.radius, self.kind = size, radius, kind
        disc = low_pass_disc(size, radius, kind).float()
        mirrored = disc.flip(0, 1).roll((1, 1), (0, 1))  # the value at each bin's conjugate partner
        half = size[1] // 2 + 1
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("even", ((disc + mirrored) / 2)[:, :half], persistent=False)
        self.register_buffer("odd", ((disc - mirrored) / 2)[:, :half], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.size:
            raise ValueError(f"the low-pass target is built for {self.size} px, not for {tuple(images.shape[-2:])}")
        with torch.autocast(images.device.type, enabled=False):
            spectrum = torch.fft.rfft2(images.float() * self.std + self.mean)
            # The even part of the disc yields the real part of the filtered image, the odd part the imaginary part: two
            # real transforms instead of a complex one, with the same result.
            low = torch.fft.irfft2(spectrum * self.even, s=self.size)
            if self.kind == "reference":
                low = torch.hypot(low, torch.fft.irfft2(spectrum * (1j * self.odd), s=self.size))
            return (low - self.mean) / self.std


# --------------------------------------------------------------------------------------------------- encoder and decoder


def sincos_pos_embed(dim: int, grid: Size, num_prefix_tokens: int) -> Tensor:
    """Fixed position embedding (1, prefix + L, dim): columns in the first half, rows in the second, as in MAE."""
    if dim % 4:
        raise ValueError(f"width {dim}: a sin-cos position embedding needs a multiple of 4")
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (cols, rows)]
    embed = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(embed, (0, 0, num_prefix_tokens, 0)).float().unsqueeze(0)


def init_like_mae(module: nn.Module, projection: str = "patch_embed.proj") -> None:
    """Initialise as MAE: linears and patch projection xavier-uniform, biases zero, tokens normal(0.02)."""
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear) or name == projection:
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for name, p in module.named_parameters():
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(p, std=0.02)


def transformer_block(dim: int, heads: int, drop_path: float = 0.0) -> Block:
    """Transformer block of MAE's encoder and decoder."""
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return Block(dim, heads, qkv_bias=True, norm_layer=norm_layer, attn_layer=ShortAttention, drop_path=drop_path)


class MaskedViT(VisionTransformer):
    """timm's VisionTransformer with the same state dict, MAE's initialisation and the method `encode`.

    ValueError for the options of timm that `encode` would ignore, such as register tokens.
    """

    pretraining_only: tuple[str, ...] = ()
    supported = (  # options of timm; a subclass whose `encode` uses others adds them
        "img_size", "patch_size", "in_chans", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
        "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "final_norm", "fc_norm",
        "pool_include_prefix", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "norm_layer",
        "act_layer", "block_fn", "mlp_layer",
    )  # fmt: skip

    def __init__(self, num_classes: int = 0, **options):
        if ignored := [f"{name}={value}" for name, value in options.items() if name not in self.supported]:
            raise ValueError(f"{type(self).__name__} does not support {', '.join(ignored)}: `encode` would ignore it")
        super().__init__(num_classes=num_classes, weight_init="skip", attn_layer=ShortAttention, **options)
        size = self.patch_embed.img_size
        if len({*self.patch_embed.patch_size}) > 1:
            raise ValueError(f"patch_size {self.patch_embed.patch_size}: patches must be square")
        if any(side % self.patch for side in size):
            raise ValueError(f"an input size of {size[0]} x {size[1]} is not a multiple of the patch size {self.patch}")
        init_like_mae(self)
        embed = sincos_pos_embed(self.embed_dim, self.grid, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(embed, requires_grad=False)

    @property
    def grid(self) -> Size:
        return self.patch_embed.grid_size

    @property
    def patch(self) -> int:
        return self.patch_embed.patch_size[0]

    def embed_visible(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) -> (B, 1 + V, D): class token and visible patches, before the first block."""
        if images.shape[-2:] != self.patch_embed.img_size:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} px do not fit an encoder for {self.patch_embed.img_size} px"
            )
        proj = self.patch_embed.proj
        x = take(patchify(images, self.patch), mask.keep)
        x = F.linear(x, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
        x = x + self.pos_embed[0, self.num_prefix_tokens :][mask.keep]
        prefix = self.cls_token + self.pos_embed[:, : self.num_prefix_tokens]
        return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) -> (B, 1 + V, D): class token and visible patches after the final norm. Removed patches are not read."""
        x = self.embed_visible(images, mask)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)


class Decoder(nn.Module):
    """(B, prefix + V, D), mask -> (B, R, P): pixel values of the removed patches."""

    def __init__(self, grid: Size, in_dim: int, dim: int, depth: int, heads: int, out_dim: int, num_prefix_tokens: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder width {dim} is not a multiple of its {heads} attention heads")
        self.num_prefix_tokens = num_prefix_tokens
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(*(transformer_block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        init_like_mae(self)
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, grid, num_prefix_tokens), requires_grad=False)

    def forward(self, tokens: Tensor, mask: PatchMask) -> Tensor:
        x = self.embed(tokens)
        prefix, visible = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)
        hidden = self.mask_token.to(x.dtype).expand(*mask.drop.shape, -1)
        x = torch.cat([prefix, take(torch.cat([visible, hidden], dim=1), mask.restore)], dim=1) + self.pos_embed
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.pred(self.norm(take(x[:, self.num_prefix_tokens :], mask.drop)))


# ------------------------------------------------------------------------------------------------------------- the method


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch as in MAE: unbiased variance, eps 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class PixMIM(nn.Module):
    """Masked autoencoder: mean squared error between predicted and target patches, over the removed patches.

    `target` maps images (B, C, H, W) to target images: LowPass for PixMIM, nn.Identity for the host alone (MAE).
    """

    def __init__(
        self,
        encoder: MaskedEncoder,
        target: nn.Module,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        mask_unit: int = 1,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        self.encoder, self.target = encoder, target
        self.mask_ratio, self.mask_unit, self.norm_pix_loss = mask_ratio, mask_unit, norm_pix_loss
        length = encoder.grid[0] * encoder.grid[1]
        visible = int(length * (1 - mask_ratio))
        if not 0 < visible < length:
            raise ValueError(f"a mask ratio of {mask_ratio} leaves {visible} of {length} patches visible")
        if mask_unit > min(encoder.grid):
            raise ValueError(f"mask units of {mask_unit} patches are larger than the grid {encoder.grid}")
        values = encoder.patch**2 * encoder.in_chans
        prefix = encoder.num_prefix_tokens
        self.decoder = Decoder(
            encoder.grid, encoder.embed_dim, decoder_dim, decoder_depth, decoder_heads, values, prefix
        )

    @property
    def noise_length(self) -> int:
        """U, number of random values that determine the mask of an image."""
        return mask_units(self.encoder.grid, self.mask_unit)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every block in the backward pass to save memory."""
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = enable

    @torch.no_grad()
    def targets(self, images: Tensor, mask: PatchMask) -> tuple[Tensor, Tensor, Tensor]:
        """Target (B, R, P) of the removed patches, float32, and the mean and std by which it was normalised.

        With norm_pix_loss those of each patch, (B, R, 1), else 0 and 1.
        """
        target = take(patchify(self.target(images).float(), self.encoder.patch), mask.drop)
        mean, std = patch_statistics(target) if self.norm_pix_loss else (target.new_zeros(1), target.new_ones(1))
        return (target - mean) / std, mean, std

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, PatchMask]:
        """Normalised images (B, C, H, W), noise (B, U) -> loss (), prediction (B, R, P) of the patches `mask.drop`, mask."""
        if noise is None:
            noise = torch.rand(len(images), self.noise_length, device=images.device)
        mask = mask_from_noise(noise, self.mask_ratio, self.encoder.grid, self.mask_unit)
        prediction = self.decoder(self.encoder.encode(images, mask), mask).float()
        target, _, _ = self.targets(images, mask)
        return F.mse_loss(prediction, target), prediction, mask


# ------------------------------------------------------------------------------------------------------- speed on CPUs


class ShortAttention(Attention):
    """timm's attention; on a CPU in half precision, short sequences use explicit matrix products, which are faster there."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        explicit = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[1] <= 256
        if not explicit or self.gate is not None or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((self.q_norm(q) * self.scale @ self.k_norm(k).mT).softmax(dim=-1))
        return self.proj_drop(self.proj(self.norm((weights @ v).transpose(1, 2).flatten(2))))


# -------------------------------------------------------------------------------------------------------------- models

ENCODERS: dict[str, Callable[..., MaskedViT]] = {
    "vit_pico": partial(MaskedViT, embed_dim=48, depth=2, num_heads=3, patch_size=16),  # for tests
    "vit_tiny": partial(MaskedViT, embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "vit_small": partial(MaskedViT, embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "vit_base": partial(MaskedViT, embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "vit_large": partial(MaskedViT, embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "vit_huge": partial(MaskedViT, embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}
