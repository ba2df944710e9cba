"""What is PixMIM without one of the levers that make its step short? The same numbers, by the common way."""

from copy import deepcopy

import torch
from timm.models.vision_transformer import Attention

from benchmarks.baseline_mae import masked_loss
from models_pixmim import MaskedViT, PixMIM, ShortAttention, mask_from_noise, take


class ProjectAll(MaskedViT):
    """Projects every patch and takes the visible ones."""

    def embed_visible(self, images, mask):
        x = take(self.patch_embed(images) + self.pos_embed[:, 1:], mask.keep)
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)


class PredictAll(PixMIM):
    """Predicts every patch, normalises every patch of the target and masks the loss."""

    def forward(self, images, noise=None):
        mask = mask_from_noise(noise, self.mask_ratio, self.encoder.grid, self.mask_unit)
        every = mask._replace(drop=torch.arange(mask.restore.shape[1], device=images.device).expand_as(mask.restore))
        prediction = self.decoder(self.encoder.encode(images, mask), every).float()
        return masked_loss(prediction, self.target(images), self.encoder.patch, mask.removed), prediction, mask


LEVERS = {  # name -> the class that has the lever, the one that has not
    "attention": (ShortAttention, Attention),
    "projection": (MaskedViT, ProjectAll),
    "prediction": (PixMIM, PredictAll),
}


def levers_of(model: PixMIM) -> list[str]:
    """Those that this model has."""
    kinds = {type(module) for module in model.modules()}
    return [lever for lever, (with_it, _) in LEVERS.items() if with_it in kinds]


def without(lever: str, model: PixMIM) -> PixMIM:
    """A copy of the model that has all levers but this one."""
    twin = deepcopy(model)
    with_it, without_it = LEVERS[lever]
    for module in twin.modules():
        if type(module) is with_it:
            module.__class__ = without_it
    return twin
