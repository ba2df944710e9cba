"""PixMIM: masked image modelling with a low-frequency target (arXiv:2303.02416), on timm's vision transformers.

Contents: patches and masks, the low-pass target, masked ViT, decoders, the method and its loss, attention on CPUs. Needs
torch and timm only: copy this file alone.

Letters: B batch, C channels, H W pixels, h w patches, L = h * w, V visible and R predicted patches, D width, E width of
the decoder, P = p * p * C values of a patch in (row, column, channel) order, U mask units.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Size = tuple[int, int]


class PatchMask(NamedTuple):
    """Visible, removed and predicted patches of each image; patches are numbered row by row."""

    keep: Tensor  # (B, V) int64, visible patches in the order of the encoder's tokens
    predict: Tensor  # (B, R) int64, removed patches that are predicted (all or some), in the order of the prediction
    removed: Tensor  # (B, L) bool, True = not visible
    grid: Size  # (h, w) of the L patches


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


def take_patches(images: Tensor, patch: int, index: Tensor) -> Tensor:
    """Patches `index` (B, N) of images (B, C, H, W): (B, N, P). The others are not read."""
    # (B, h, w, p, p, C), a view
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    rows = torch.arange(len(images), device=images.device).unsqueeze(1)
    return x[rows, index // x.shape[2], index % x.shape[2]].flatten(2)


def mask_units(grid: Size, unit: int) -> int:
    """Number of mask units U: blocks of unit x unit patches, clipped at the edges."""
    return -(-grid[0] // unit) * -(-grid[1] // unit)


def mask_from_noise(
    noise: Tensor, ratio: float, grid: Size, unit: int = 1, predict_ratio: float | None = None
) -> PatchMask:
    """Mask that keeps the int(L * (1 - ratio)) patches with the smallest noise (B, U), as MAE does.

    Patches of a unit share its noise; a unit may be kept in part, in raster order. `predict_ratio` is the share of all
    patches that is predicted: the next int(L * (ratio - predict_ratio)) patches are neither visible nor predicted, as in
    CrossMAE.
    """
    h, w = grid
    if unit > 1:  # noise of the units -> noise of the patches
        noise = noise.unflatten(1, (-(-h // unit), -1))
        noise = noise.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, :h, :w].flatten(1)
    if noise.shape[1] != h * w:
        raise ValueError(f"noise for {noise.shape[1]} patches does not fit a grid of {h} x {w}")
    visible = int(h * w * (1 - ratio))
    skipped = 0 if predict_ratio is None else int(h * w * (ratio - predict_ratio))
    order = noise.argsort(dim=1, stable=True)
    keep = order[:, :visible]
    removed = torch.ones_like(order, dtype=torch.bool).scatter(1, keep, False)
    return PatchMask(keep, order[:, visible + skipped :], removed, grid)


# ----------------------------------------------------------------------------------------------------------- the target


def low_pass_disc(size: Size, radius: float, kind: str = "reference", device: torch.device | None = None) -> Tensor:
    """Frequencies that the filter keeps, (H, W) bool in the order of torch.fft.fft2.

    `centered`: distance from zero at most `radius` bins. `reference`: distance from the middle of the shifted spectrum,
    ((H - 1) / 2, (W - 1) / 2), which is half a bin below zero for even sides, as in the release
    (mmselfsup/models/target_generators/low_freq_generator.py).
    """
    distance2 = torch.zeros(size, device=device)
    for dim, n in enumerate(size):
        k = torch.arange(n, device=device)
        k = (k + n // 2) % n - n // 2  # exact; fftfreq(n) * n is not exact and loses boundary bins
        center = (n - 1) / 2 - n // 2 if kind == "reference" else 0.0
        distance2 += ((k - center) ** 2).unsqueeze(1 - dim)
    return distance2 <= radius**2


class LowPass(nn.Module):
    """(B, C, H, W) normalised -> the same without its high frequencies: the target of PixMIM (section 3.2).

    Always computed in float32, without gradient, on pixels in [0, 1]. `radius` in frequency bins of the image side, 40
    at 224 px. `reference` returns the magnitude of the complex filtered image, as the release does; `centered` is a
    real zero-phase filter. Buffers are not saved.

    Smaller images of the same aspect ratio have the same radius in bins, which are cycles per image side: a crop resized
    to 112 px, whose highest frequency is 56, keeps the same 40 as at 224 px.
    """

    def __init__(self, size: Size, radius: float, mean: Sequence[float], std: Sequence[float], kind: str = "reference"):
        super().__init__()
        self.size, self.radius, self.kind = size, radius, kind
        self.mean, self.std = (nn.Buffer(torch.tensor(x).view(-1, 1, 1), persistent=False) for x in (mean, std))
        self.even, self.odd = (nn.Buffer(x, persistent=False) for x in self.split_disc(size))

    def split_disc(self, size: Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Even and odd part of the disc, (H, W // 2 + 1)."""
        disc = low_pass_disc(size, self.radius, self.kind, device).float()
        mirrored = disc.flip(0, 1).roll((1, 1), (0, 1))  # the value at each bin's conjugate partner
        half = size[1] // 2 + 1
        return ((disc + mirrored) / 2)[:, :half], ((disc - mirrored) / 2)[:, :half]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2:]
        if size[0] * self.size[1] != size[1] * self.size[0]:
            raise ValueError(f"the low-pass target is built for {self.size} px, not for {tuple(size)}")
        even, odd = (self.even, self.odd) if size == self.size else self.split_disc(size, images.device)
        with torch.autocast(images.device.type, enabled=False):
            spectrum = torch.fft.rfft2(images.float() * self.std + self.mean)
            # The even part of the disc yields the real part of the filtered image, the odd part the imaginary part: two
            # real transforms instead of a complex one, with the same result.
            low = torch.fft.irfft2(spectrum * even, s=size)
            if self.kind == "reference":
                low = torch.hypot(low, torch.fft.irfft2(spectrum * (1j * odd), s=size))
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


def sample_positions(embed: Tensor, own: Size, grid: Size) -> Tensor:
    """Position embedding (1, prefix + L, D) of its `own` grid -> of another grid of patches of the same crop.

    Patch i of n is at the coordinate of its centre in the own grid of N, (i + 0.5) N / n - 0.5, interpolated bicubically.
    """
    if grid == own:
        return embed
    prefix = embed.shape[1] - own[0] * own[1]
    return resample_abs_pos_embed(embed, [*grid], [*own], prefix, antialias=False)


def init_like_mae(module: nn.Module, projection: str = "patch_embed.proj") -> None:
    """Initialise as MAE: linears and patch projection xavier-uniform, biases zero, tokens normal(0.02)."""
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear) or name == projection:
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for name, p in module.named_parameters():
        if name in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(p, std=0.02)


def transformer_block(dim: int, heads: int, drop_path: float = 0.0) -> Block:
    """Transformer block of MAE's encoder and decoder."""
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return Block(dim, heads, qkv_bias=True, norm_layer=norm_layer, attn_layer=ShortAttention, drop_path=drop_path)


class MaskedViT(VisionTransformer):
    """timm's VisionTransformer with the same state dict, MAE's initialisation and the method `encode`.

    `reg_tokens` = N - 1 gives N class tokens, as in Pixio: global_pool "token" is their mean (timm's: the first alone).
    ValueError for the options of timm that `encode` would ignore, such as dynamic_img_size.
    """

    pretraining_only: tuple[str, ...] = ()
    supported = (  # options of timm; a subclass whose `encode` uses others adds them
        "img_size", "patch_size", "in_chans", "reg_tokens", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
        "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "final_norm", "fc_norm",
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
        """(B, C, H, W) -> (B, prefix + V, D): class tokens and visible patches, before the first block."""
        expected = tuple(side * self.patch for side in mask.grid)
        if images.shape[-2:] != expected:
            raise ValueError(f"images of {tuple(images.shape[-2:])} px do not fit a mask for {expected} px")
        proj, pos_embed = self.patch_embed.proj, sample_positions(self.pos_embed, self.grid, mask.grid)
        x = take_patches(images, self.patch, mask.keep)
        x = F.linear(x, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
        x = x + pos_embed[0, self.num_prefix_tokens :][mask.keep]
        prefix = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)
        prefix = prefix + pos_embed[:, : self.num_prefix_tokens]
        return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def levels(self, images: Tensor, mask: PatchMask) -> list[Tensor]:
        """(B, C, H, W) -> tokens (B, prefix + V, D) before the first block and after each, not normalised."""
        levels = [self.embed_visible(images, mask)]
        for block in self.blocks:
            x = levels[-1]
            levels.append(checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x))
        return levels

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) -> (B, prefix + V, D): tokens after the final norm. Removed patches are not read."""
        return self.norm(self.levels(images, mask)[-1])

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, prefix + L, D) -> (B, D) as in timm, but "token" is the mean of all class tokens."""
        if (pool_type or self.global_pool) == "token":
            return x[:, : self.num_prefix_tokens].mean(dim=1)
        return super().pool(x, pool_type)


class Decoder(nn.Module):
    """(B, prefix + V, D), mask -> (B, R, P): self-attention among the visible and the predicted patches, as in MAE."""

    def __init__(self, grid: Size, in_dim: int, dim: int, depth: int, heads: int, out_dim: int, num_prefix_tokens: int):
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
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
        mask_tokens = self.mask_token.to(x.dtype).expand(*mask.predict.shape, -1)
        prefix = torch.arange(self.num_prefix_tokens, device=x.device).expand(len(x), -1)
        patches = torch.cat([mask.keep, mask.predict], dim=1) + self.num_prefix_tokens
        # in raster order, as in MAE; patches that are neither visible nor predicted have no token
        positions, order = torch.cat([prefix, patches], dim=1).sort(dim=1)
        pos_embed = sample_positions(self.pos_embed, self.grid, mask.grid)
        x = take(torch.cat([x, mask_tokens], dim=1), order) + pos_embed[0][positions]
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.pred(self.norm(take(x, order.argsort(dim=1)[:, tokens.shape[1] :])))


class CrossBlock(nn.Module):
    """Transformer block whose queries (B, R, E) attend to tokens (B, N, D) of the encoder instead of each other."""

    def __init__(self, dim: int, in_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        layers = {"q": nn.Linear(dim, dim), "kv": nn.Linear(in_dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        self.cross_attn = nn.ModuleDict(layers)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = self.cross_attn["q"](self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.cross_attn["kv"](tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.cross_attn["proj"](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """(B, prefix + V, D), mask -> (B, R, P) by cross-attention alone, as in CrossMAE (arXiv:2401.14391).

    Predicted patches do not see each other, so a prediction does not depend on which others are made. With `levels` the
    tokens are a list of as many levels of the encoder, and each block reads its own weighted sum of them.
    """

    def __init__(
        self, grid: Size, in_dim: int, dim: int, depth: int, heads: int, out_dim: int, num_prefix_tokens: int,
        levels: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.grad_checkpointing = False
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.fusion = nn.Linear(levels, depth, bias=False) if levels else None
        self.norms = nn.ModuleList(nn.LayerNorm(in_dim, eps=1e-6) for _ in range(depth if levels else 0))
        self.blocks = nn.ModuleList(CrossBlock(dim, in_dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        init_like_mae(self)
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, grid, num_prefix_tokens), requires_grad=False)

    def read(self, tokens: Tensor | list[Tensor]) -> list[Tensor]:
        """Tokens (B, prefix + V, D) that each block attends to."""
        if self.fusion is None:
            return [tokens] * len(self.blocks)
        levels = torch.stack(tokens)
        sums = (self.fusion.weight @ levels.flatten(1)).unflatten(1, levels.shape[1:])  # (depth, B, prefix + V, D)
        return [norm(x) for norm, x in zip(self.norms, sums, strict=True)]

    def forward(self, tokens: Tensor | list[Tensor], mask: PatchMask) -> Tensor:
        pos_embed = sample_positions(self.pos_embed, self.grid, mask.grid)
        x = self.mask_token + pos_embed[0, self.num_prefix_tokens :][mask.predict]
        for block, memory in zip(self.blocks, self.read(tokens), strict=True):
            x = checkpoint(block, x, memory, use_reentrant=False) if self.grad_checkpointing else block(x, memory)
        return self.pred(self.norm(x))


# ------------------------------------------------------------------------------------------------------------- the method


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch as in MAE: unbiased variance, eps 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class PixMIM(nn.Module):
    """Masked autoencoder: mean squared error between predicted and target patches, over the predicted patches.

    `target` maps images (B, C, H, W) to target images: LowPass for PixMIM, nn.Identity for MAE.
    `decoder` is "self" (MAE) or "cross" (CrossMAE; with `fuse_levels` its blocks read all levels of a MaskedViT).
    `predict_ratio` is the share of all patches that is predicted; None = every removed patch. `learned_positions` trains
    the parameter `pos_embed` of encoder and decoder.
    """

    def __init__(  # noqa: PLR0913 - the names of the flags
        self, encoder: MaskedEncoder, target: nn.Module, *, decoder: str = "self", decoder_dim: int = 512,
        decoder_depth: int = 8, decoder_heads: int = 16, fuse_levels: bool = False, learned_positions: bool = False,
        mask_ratio: float = 0.75, mask_unit: int = 1, predict_ratio: float | None = None, norm_pix_loss: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.target, self.fuse_levels = encoder, target, fuse_levels
        self.mask_ratio, self.mask_unit, self.predict_ratio = mask_ratio, mask_unit, predict_ratio
        self.norm_pix_loss = norm_pix_loss
        self.check_mask(encoder.grid)
        if decoder_dim % decoder_heads:
            raise ValueError(f"decoder width {decoder_dim} is not a multiple of its {decoder_heads} attention heads")
        if fuse_levels and (decoder != "cross" or type(encoder).encode is not MaskedViT.encode):
            raise ValueError("--fuse_levels needs --decoder cross and a vit_* model; use --no-fuse_levels")
        options = {
            "grid": encoder.grid, "in_dim": encoder.embed_dim, "dim": decoder_dim, "depth": decoder_depth,
            "heads": decoder_heads, "out_dim": encoder.patch**2 * encoder.in_chans,
            "num_prefix_tokens": encoder.num_prefix_tokens,
        }  # fmt: skip
        if fuse_levels:
            options["levels"] = len(encoder.blocks) + 1
            encoder.norm.requires_grad_(False)  # not used: it stays (1, 0)
        self.decoder = CrossDecoder(**options) if decoder == "cross" else Decoder(**options)
        if learned_positions:  # as Pixio: rows of the class tokens too
            for part in (encoder, self.decoder):
                nn.init.trunc_normal_(part.pos_embed, std=0.02)
                part.pos_embed.requires_grad_()

    def check_mask(self, grid: Size) -> None:
        """ValueError if the mask leaves nothing to see or to predict."""
        ratio, part = self.mask_ratio, self.predict_ratio
        visible = int(grid[0] * grid[1] * (1 - ratio))
        if not 0 < visible < grid[0] * grid[1]:
            raise ValueError(f"a mask ratio of {ratio} leaves {visible} of {grid[0] * grid[1]} patches visible")
        if self.mask_unit > min(grid):
            raise ValueError(f"mask units of {self.mask_unit} patches are larger than the grid {grid}")
        if part is not None and not 0 < part <= ratio:
            raise ValueError(f"--predict_ratio {part}: predict more than 0 and at most --mask_ratio {ratio} of patches")

    @property
    def noise_length(self) -> int:
        """U, number of random values that determine the mask of an image."""
        return mask_units(self.encoder.grid, self.mask_unit)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every block in the backward pass to save memory."""
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = enable

    @torch.no_grad()
    def targets(self, images: Tensor, mask: PatchMask) -> tuple[Tensor, Tensor, Tensor]:
        """Target (B, R, P) of the predicted patches, float32, and the mean and std by which it was normalised.

        With norm_pix_loss those of each patch, (B, R, 1), else 0 and 1.
        """
        target = take_patches(self.target(images).float(), self.encoder.patch, mask.predict)
        mean, std = patch_statistics(target) if self.norm_pix_loss else (target.new_zeros(1), target.new_ones(1))
        return (target - mean) / std, mean, std

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor | list[Tensor]:
        """What the decoder reads: tokens (B, prefix + V, D), or with fuse_levels a list of them."""
        return self.encoder.levels(images, mask) if self.fuse_levels else self.encoder.encode(images, mask)

    def grid_of(self, images: Tensor) -> Size:
        """(h, w) patches of images of the encoder's size, or of a smaller one of the same aspect ratio."""
        (height, width), (h, w), patch = images.shape[-2:], self.encoder.grid, self.encoder.patch
        if height * w != width * h or height > h * patch or height % patch or width % patch:
            raise ValueError(f"images of {height, width} px do not fit a model for {h * patch, w * patch} px")
        return height // patch, width // patch

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, PatchMask]:
        """Normalised images (B, C, H, W), noise (B, U) -> loss (), prediction (B, R, P) of `mask.predict`, mask."""
        grid = self.grid_of(images)
        if noise is None:
            noise = torch.rand(len(images), mask_units(grid, self.mask_unit), device=images.device)
        mask = mask_from_noise(noise, self.mask_ratio, grid, self.mask_unit, self.predict_ratio)
        target, _, _ = self.targets(images, mask)  # first: its spectra need memory that the activations do not hold yet
        prediction = self.decoder(self.encode(images, mask), mask).float()
        return F.mse_loss(prediction, target), prediction, mask

    def predict_removed(self, images: Tensor, noise: Tensor) -> tuple[Tensor, PatchMask]:
        """Prediction of every removed patch and its mask, in passes of at most as many patches as in training."""
        mask = mask_from_noise(noise, self.mask_ratio, self.grid_of(images), self.mask_unit)
        passes = math.ceil(self.mask_ratio / (self.predict_ratio or self.mask_ratio))
        tokens, parts = self.encode(images, mask), mask.predict.tensor_split(passes, dim=1)
        predictions = [self.decoder(tokens, mask._replace(predict=part)) for part in parts]
        return torch.cat(predictions, dim=1).float(), mask


# ------------------------------------------------------------------------------------------------------- speed on CPUs


def use_products(x: Tensor, length: int) -> bool:
    """True where explicit matrix products are faster than fused attention: on a CPU in half precision.

    Longer sequences use the fused kernel, which needs less memory.
    """
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and length <= 1024


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (B, heads, R, d) to keys and values (B, heads, N, d): (B, heads, R, d)."""
    if use_products(q, k.shape[2]):
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class ShortAttention(Attention):
    """timm's attention, by explicit matrix products where they are faster."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not use_products(x, x.shape[1]) or self.gate is not None or attn_mask is not None or is_causal:
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
