"""Ablations: PixMIM without one of its optimisations, each computing the same loss and gradients the common way."""

from copy import deepcopy

import torch
from timm.models.vision_transformer import Attention

from benchmarks.baseline_mae import masked_loss
from models_pixmim import MaskedViT, PixMIM, ShortAttention, mask_from_noise, take


class ProjectAll(MaskedViT):
    """Projects all patches, then selects the visible ones."""

    def embed_visible(self, images, mask):
        x = take(self.patch_embed(images) + self.pos_embed[:, 1:], mask.keep)
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)


class PredictAll(PixMIM):
    """Predicts all patches, normalises all patches of the target, then masks the loss."""

    def forward(self, images, noise=None):
        mask = mask_from_noise(noise, self.mask_ratio, self.encoder.grid, self.mask_unit)
        every = mask._replace(drop=torch.arange(mask.restore.shape[1], device=images.device).expand_as(mask.restore))
        prediction = self.decoder(self.encoder.encode(images, mask), every).float()
        return masked_loss(prediction, self.target(images), self.encoder.patch, mask.removed), prediction, mask


ABLATIONS = {  # name -> (optimised class, common class)
    "attention": (ShortAttention, Attention),
    "projection": (MaskedViT, ProjectAll),
    "prediction": (PixMIM, PredictAll),
}


def applicable_ablations(model: PixMIM) -> list[str]:
    """Names of the optimisations that this model uses."""
    kinds = {type(module) for module in model.modules()}
    return [name for name, (optimised, _) in ABLATIONS.items() if optimised in kinds]


def ablate(model: PixMIM, name: str) -> PixMIM:
    """A copy of the model without this optimisation."""
    copy = deepcopy(model)
    optimised, common = ABLATIONS[name]
    for module in copy.modules():
        if type(module) is optimised:
            module.__class__ = common
    return copy
