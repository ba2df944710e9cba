"""Linear and attentive probes on a frozen encoder."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from util.evaluate.encoder import Encoder, encoder_blocks, forward_blocks, is_finetuned, pool_name, pool_tokens
from util.formats.weights import Weights


def order_pools(weights: Weights | None, pools: Iterable[str]) -> list[str]:
    """The poolings, first the one whose result is reported. The training of the encoder decides, never the accuracy.

    Labels trained one feature. A masked objective trains patch tokens, which efficient probing weighs; among linear
    probes the class token comes first, as in the published ones.
    """
    tuned = "mean" if weights and (weights.pooled or weights.pool == "mean") else "token"
    order = [*([tuned] if is_finetuned(weights) else []), "ep", "token", "mean"]
    return sorted({*pools}, key=order.index)


class EfficientProbing(nn.Module):
    """Attentive pooling by learned queries (arXiv:2506.10178): tokens (B, N, D) -> (B, D).

    Query j weighs the tokens and yields D / Q values, those of the j-th slice of a linear layer. ValueError if the
    number Q of queries does not divide the width D.
    """

    def __init__(self, dim: int, queries: int):
        super().__init__()
        if dim % queries:
            raise ValueError(f"--ep_queries {queries} does not divide the width {dim} of the encoder; use a divisor")
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.value = nn.Linear(dim, dim, bias=False)

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, Q, N); the weights of each query sum to 1."""
        return (self.queries @ tokens.mT * tokens.shape[-1] ** -0.5).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self.attention(tokens) @ tokens  # (B, Q, D); pooling first saves N / Q of the products of `value`
        slices = self.value.weight.unflatten(0, (len(self.queries), -1))  # (Q, D / Q, D)
        return torch.einsum("bqd,qed->bqe", pooled, slices).flatten(1)


class ProbeHead(nn.Module):
    """Pooling if it is learned, batch norm without affine parameters, linear layer: feature or tokens -> (B, classes)."""

    def __init__(self, pool: str, blr: float, dim: int, num_classes: int, queries: int):
        super().__init__()
        self.pool, self.blr = pool, blr
        self.ep = EfficientProbing(dim, queries) if pool == "ep" else nn.Identity()
        self.bn: nn.Module = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if pool != "ep":
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.ep(x).float()))


class Probe(nn.Module):
    """Frozen encoder and parallel heads, pools x blrs: images -> logits (B, heads, classes) by one pass.

    The initial values of a head depend on the seed and its pooling alone. ValueError for the pooling "token" of an
    encoder without class token.
    """

    def __init__(
        self, encoder: Encoder, num_classes: int, pools: Sequence[str], blrs: Sequence[float], queries=32, seed=0
    ):
        super().__init__()
        if "token" in pools and not encoder.num_prefix_tokens:
            raise ValueError("--pool token: the encoder has no class token; use --pool mean or ep")
        self.encoder = encoder.requires_grad_(False)
        self.layers = [len(encoder_blocks(encoder))] if "ep" in pools else []
        heads = []
        for pool, blr in product(pools, blrs):
            torch.manual_seed(seed)
            heads.append(ProbeHead(pool, blr, encoder.embed_dim, num_classes, queries))
        self.heads: Any = nn.ModuleList(heads)

    @classmethod
    def from_classifier(cls, encoder: Encoder, state: dict[str, Tensor]) -> "Probe":
        """The efficient probing of a classifier.pth, as one head."""
        probe = cls(encoder, len(state["head.weight"]), ["ep"], [0.0], len(state["ep.queries"]))
        probe.heads[0].bn = nn.Identity()  # `classifier` has folded it into the linear layer
        probe.heads[0].load_state_dict({k: value for k, value in state.items() if k.split(".")[0] in ("ep", "head")})
        return probe

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def pool_features(self, images: Tensor) -> dict[str, Tensor]:
        """{pooling: input of its heads}: features (B, D), for "ep" the patch tokens (B, L, D) before the final norm."""
        encoder, found = self.encoder, {}
        x, tokens = forward_blocks(encoder, images, self.layers)
        for pool in dict.fromkeys(head.pool for head in self.heads):
            if pool == "ep":
                found[pool] = tokens[self.layers[0]][:, encoder.num_prefix_tokens :]
            elif pool == pool_name(encoder):
                found[pool] = encoder.forward_head(x, pre_logits=True)
            else:
                found[pool] = encoder.fc_norm(pool_tokens(encoder, x, pool))
        return found

    def forward(self, images: Tensor) -> Tensor:
        found = self.pool_features(images)
        return torch.stack([head(found[head.pool]) for head in self.heads], dim=1)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, Q, h, w): attention of the queries of the first head, which has the pooling "ep"."""
        return self.heads[0].ep.attention(self.pool_features(images)["ep"]).unflatten(2, self.encoder.grid)

    def classifier(self, number: int) -> dict[str, Tensor]:
        """State of a classifier: the encoder and one head, with the batch norm folded into the linear layer."""
        head = self.heads[number]
        weight = head.head.weight * (head.bn.running_var + head.bn.eps).rsqrt()
        folded = {"head.weight": weight, "head.bias": head.head.bias - weight @ head.bn.running_mean}
        learned = {f"ep.{name}": value for name, value in head.ep.state_dict().items()}
        return {**self.encoder.state_dict(), **learned, **{name: value.detach() for name, value in folded.items()}}
