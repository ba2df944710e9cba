"""Linear probes on a frozen encoder."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from util.dist import World
from util.evaluate.encoder import Encoder, features


class Probe(nn.Module):
    """Frozen encoder, batch norm without affine parameters, parallel linear heads: logits (B, heads, classes)."""

    def __init__(self, encoder: Encoder, num_classes: int, num_heads: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.bn: Any = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(
            deepcopy(head) for _ in range(num_heads)
        )  # equal initial weights, whatever the number of heads

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def average_statistics(self, world: World) -> None:
        """Average the running statistics over all ranks, in place."""
        for value in (self.bn.running_mean, self.bn.running_var):
            value.copy_(world.sum(value.double()) / world.size)  # float64: the mean of equal values is exact

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = features(self.encoder, images)
        x = self.bn(x.float())
        return torch.stack([head(x) for head in self.heads], dim=1)

    def classifier(self, best: int) -> dict[str, Tensor]:
        """State of a classifier: the encoder and head number `best`, with the batch norm folded into the head."""
        head: Any = self.heads[best]
        scale = (self.bn.running_var + self.bn.eps).rsqrt()
        weight = head.weight * scale
        folded = {"head.weight": weight, "head.bias": head.bias - weight @ self.bn.running_mean}
        return {**self.encoder.state_dict(), **{name: value.detach() for name, value in folded.items()}}
