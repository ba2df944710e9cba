"""Muon (timm's) for the weights of the hidden layers, AdamW for all other parameters."""

import re
from inspect import getfullargspec

import torch
from timm.optim.muon import Muon, muon
from torch import Tensor, nn

# Weights that AdamW updates though they are matrices: patch embedding (ConvMAE's first), prediction, fusion.
ADAMW = re.compile(r"(^|\.)(patch_embed1?|pred|fusion)\.")


def count_matrices(name: str, weight: Tensor) -> int:
    """Number of matrices that Muon updates in this parameter: 3 in a fused qkv, 2 in a fused kv; 0 = it is AdamW's.

    AdamW's are biases, norms, tokens (1, 1, D), position embeddings (1, L, D), MFF's `proj_weights` (N, 1, 1, 1),
    depthwise convolutions (D, 1, k, k) and what ADAMW names. ConvMAE's other convolutions are linear layers: one matrix
    (D', D k k).
    """
    if weight.ndim < 2 or 1 in weight.shape[:2] or ADAMW.search(name):
        return 0
    return {"qkv": 3, "kv": 2}.get(name.split(".")[-2], 1)


class SplitMuon(Muon):
    """timm's Muon for groups with `matrices` N: a weight (N D', D) is updated as N matrices (D', D)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            options = {name: group[name] for name in getfullargspec(muon).kwonlyargs}
            for p in group["params"] if group["matrices"] > 1 else ():
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                tensors = (p, p.grad, self.state[p]["momentum_buffer"])
                muon(*([*x.chunk(group["matrices"])] for x in tensors), **options)
                p.grad = None  # timm's step, which updates the other groups, skips it
        return super().step(closure)


def build_muon(groups: list[dict], model: nn.Module, lr: float) -> SplitMuon:
    """Muon with Nesterov momentum for these groups of the model's parameters, each split by `count_matrices`.

    Updates are scaled to the size of AdamW's, so the learning rate is that of AdamW. The other parameters are updated as
    by torch.optim.AdamW with betas 0.9 and 0.95.
    """
    split, counts = [], {p: count_matrices(name, p) for name, p in model.named_parameters()}
    for group in groups:
        for count in range(4):
            if params := [p for p in group["params"] if counts[p] == count]:
                kind = {"nesterov": True} if count else {"use_fallback": True, "eps": 1e-8}
                split.append(group | kind | {"params": params, "matrices": count})
    return SplitMuon(split, lr)
