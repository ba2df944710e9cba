"""Ablations: PixMIM without one of its optimisations, each computing the same loss and gradients the common way."""

from copy import deepcopy

import torch
from timm.models.vision_transformer import Attention

from benchmarks.baseline_mae import masked_loss
from models_pixmim import Decoder, MaskedViT, PixMIM, ShortAttention, mask_from_noise, take


class ProjectAll(MaskedViT):
    """Projects all patches, then selects the visible ones."""

    def embed_visible(self, images, mask):
        x = take(self.patch_embed(images) + self.pos_embed[:, 1:], mask.keep)
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)


class PredictAll(PixMIM):
    """Predicts all patches, normalises all patches of the target, then masks the loss."""

    def forward(self, images, noise=None):
        mask = mask_from_noise(noise, self.mask_ratio, self.encoder.grid, self.mask_unit)
        decoder, first = self.decoder, self.encoder.num_prefix_tokens
        x = decoder.embed(self.encode(images, mask))
        patches = torch.cat([x[:, first:], decoder.mask_token.to(x.dtype).expand(*mask.predict.shape, -1)], dim=1)
        patches = take(patches, torch.cat([mask.keep, mask.predict], dim=1).argsort(dim=1))  # in raster order
        x = decoder.blocks(torch.cat([x[:, :first], patches], dim=1) + decoder.pos_embed)
        prediction = decoder.pred(decoder.norm(x))[:, first:].float()
        return masked_loss(prediction, self.target(images), self.encoder.patch, mask.removed), prediction, mask


ABLATIONS = {  # name -> (optimised class, common class)
    "attention": (ShortAttention, Attention),
    "projection": (MaskedViT, ProjectAll),
    "prediction": (PixMIM, PredictAll),
}


def applicable_ablations(model: PixMIM) -> list[str]:
    """Names of the optimisations that this model uses."""
    kinds = {type(module) for module in model.modules()} - (set() if is_plain(model) else {MaskedViT, PixMIM})
    return [name for name, (optimised, _) in ABLATIONS.items() if optimised in kinds]


def is_plain(model: PixMIM) -> bool:
    """Whether the model has one class token or none, and MAE's decoder that predicts every removed patch."""
    one_token = model.encoder.num_prefix_tokens <= 1
    return one_token and type(model.decoder) is Decoder and model.predict_ratio is None


def ablate(model: PixMIM, name: str) -> PixMIM:
    """A copy of the model without this optimisation."""
    copy = deepcopy(model)
    optimised, common = ABLATIONS[name]
    for module in copy.modules():
        if type(module) is optimised:
            module.__class__ = common
    return copy
