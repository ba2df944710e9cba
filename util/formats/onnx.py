"""ONNX graphs of an encoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.files import import_package
from util.formats.configs import timm_model
from util.formats.keys import State
from util.formats.resize import known_size
from util.formats.weights import Weights


class _Features(nn.Module):
    """timm's model: images -> pooled features (B, D), all tokens (B, T, D) and, with a head, logits (B, K)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.model.forward_features(images)
        features = self.model.forward_head(tokens, pre_logits=True)
        if self.model.global_pool == "token":  # timm's: the first class token alone
            features = tokens[:, : self.model.num_prefix_tokens].mean(1)
        return (features, tokens, self.model.head(features)) if self.model.num_classes else (features, tokens)


def output_names(weights: Weights) -> list[str]:
    """Names of the graph's outputs, in order."""
    return ["features", "tokens", "logits"] if weights.num_classes else ["features", "tokens"]


def save_onnx(path: Path, weights: Weights, state: State) -> None:
    """Write an ONNX graph of the encoder, for batches of any size. ValueError above 2 GiB or without onnxscript."""
    size, (entry, options) = known_size(weights), timm_model(weights)
    if sum(value.nbytes for value in state.values()) > 2**31 - 2**20:
        raise ValueError("--to onnx: the graph is limited to 2 GiB; use --to timm")
    import_package("onnxscript", "--to onnx", "onnx onnxscript")  # torch.onnx imports it only after tracing the model
    import timm  # util.formats needs torch only

    model = timm.create_model(entry, **options)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    torch.onnx.export(
        _Features(model.eval()).eval(), (torch.zeros(2, weights.in_chans, *size),), path, input_names=["images"],
        output_names=output_names(weights), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
