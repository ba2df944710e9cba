"""Baseline of the step benchmark: MAE (arXiv:2111.06377) as it is commonly implemented, on the current timm.

Loss and gradients equal those of PixMIM with nn.Identity() as target (tests/test_benchmarks.py). All patches are
projected, attention is timm's, all patches are predicted and the loss is masked.
Letters: B batch, L patches, V visible patches, D width, P pixel values of a patch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from models_pixmim import PixMIM, patchify
from util.dist import autocast
from util.formats.keys import mae_names


def masked_loss(prediction: Tensor, images: Tensor, patch: int, removed: Tensor) -> Tensor:
    """Mean squared error () of the prediction (B, L, P) of normalised patches over the removed (B, L) patches."""
    target = patchify(images, patch)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction - target).square().mean(-1)
    return (error * removed).sum() / removed.sum()


def blocks(dim: int, depth: int, heads: int) -> nn.Sequential:
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)))


class BaselineMAE(nn.Module):
    """MAE with the parameter names of facebookresearch/mae. Its weights must be loaded: it does not initialise them.

    `encoder`, `decoder`: (width, depth, heads). `mask_unit`: side in patches of the blocks that are removed (LSMAE: 2).
    """

    def __init__(
        self, img_size: tuple[int, int], patch: int, in_chans: int, encoder: tuple[int, int, int],
        decoder: tuple[int, int, int], mask_ratio: float, mask_unit: int,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.mask_ratio, self.mask_unit = patch, mask_ratio, mask_unit
        dim, decoder_dim = encoder[0], decoder[0]
        self.patch_embed = PatchEmbed(img_size, patch, in_chans, dim)
        length = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + length, dim), requires_grad=False)
        self.blocks, self.norm = blocks(*encoder), nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + length, decoder_dim), requires_grad=False)
        self.decoder_blocks, self.decoder_norm = blocks(*decoder), nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch**2 * in_chans)

    def draw_order(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """(B, L) patches sorted by ascending noise (B, U) of their units. The noise is drawn if None."""
        h, w = self.patch_embed.grid_size
        units = -(-h // self.mask_unit), -(-w // self.mask_unit)
        noise = torch.rand(len(images), units[0] * units[1], device=images.device) if noise is None else noise
        if self.mask_unit > 1:
            spread = F.interpolate(noise.unflatten(1, units).unsqueeze(1), scale_factor=self.mask_unit)
            noise = spread[:, 0, :h, :w].flatten(1)
        return noise.argsort(dim=1, stable=self.mask_unit > 1)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised images (B, C, H, W) -> loss ()."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        batch, length, dim = x.shape
        visible = int(length * (1 - self.mask_ratio))
        order = self.draw_order(images, noise)
        restore = order.argsort(dim=1)
        x = torch.gather(x, 1, order[:, :visible, None].expand(-1, -1, dim))  # (B, L, D) -> (B, V, D)
        token = self.cls_token + self.pos_embed[:, :1]
        x = self.norm(self.blocks(torch.cat([token.expand(batch, -1, -1), x], dim=1)))

        x = self.decoder_embed(x)
        row = torch.cat([x[:, 1:], self.mask_token.expand(batch, length - visible, -1)], dim=1)
        row = torch.gather(row, 1, restore[..., None].expand_as(row))  # [visible | removed] -> raster order
        x = self.decoder_blocks(torch.cat([x[:, :1], row], dim=1) + self.decoder_pos_embed)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return masked_loss(prediction, images, self.patch, restore >= visible)


def baseline_of(model: PixMIM) -> BaselineMAE:
    """The baseline with the sizes and weights of a model."""
    encoder, decoder = model.encoder, model.decoder
    sizes = [(len(x.blocks), x.blocks[0].attn.num_heads) for x in (encoder, decoder)]
    shapes = (encoder.embed_dim, *sizes[0]), (decoder.embed.out_features, *sizes[1])
    image = encoder.patch_embed.img_size, encoder.patch, encoder.in_chans
    baseline = BaselineMAE(*image, *shapes, model.mask_ratio, model.mask_unit)
    baseline.load_state_dict(mae_names(model.state_dict()))
    return baseline.to(encoder.cls_token.device)


def baseline_optimizer(model: nn.Module, weight_decay: float = 0.05) -> torch.optim.Optimizer:
    """MAE's AdamW with foreach kernels, torch's default on GPUs."""
    return torch.optim.AdamW(param_groups_weight_decay(model, weight_decay), 1e-6, betas=(0.9, 0.95), foreach=True)


def baseline_step(model: BaselineMAE, optimizer, batch: dict, amp: str) -> float:
    """Loss of one step on batch["planes"] (B, C, H, W), normalised, at --amp bf16 or off; read back every step."""
    images = batch["planes"]
    with autocast(amp, images.device):
        loss = model(images)
    value = loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value
