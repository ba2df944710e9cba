"""Weights in the file formats of other repositories."""

import json
from pathlib import Path

import torch

from util.formats.configs import hf_config, hf_processor, timm_config
from util.formats.keys import (
    HOMES,
    State,
    Weights,
    architecture,
    family,
    rename,
    to_hf,
    to_mae,
    to_mm,
    to_mmseg,
    to_timm,
)
from util.formats.onnx import _save_onnx
from util.formats.resize import averages_normed, known_size

WHY = {
    "convvit": "they have no convolution stages below their ViT",
    "mff_vit": "it has none for the fused layers, without which the decoder is worth nothing",
}


PYRAMID = 256  # width of the norms of Detectron2's feature pyramid


def select_tensors(weights: Weights, target: str, encoder_only: bool = False) -> State:
    """The tensors that the target has a place for, in facebookresearch/mae's names; ValueError if it has none."""
    state, host = weights.state, family(weights.state)
    if host is None:
        stranger = next(key for key in state if rename(key, "mae", "mae") is None)
        raise ValueError(f"no rule knows {stranger}: add the host's tensors to names.RULES, or use the file as it is")
    if target not in HOMES[host]:
        homes = " or ".join(HOMES[host])
        raise ValueError(f"--to {target} has no place for a {host}: {WHY[host]}; use --to {homes}")
    if target == "mae" and averages_normed(weights):
        raise ValueError("no model of facebookresearch/mae averages patches after the final norm: use --to timm")
    if target == "hf":
        return _selected_for_hf(weights, host, encoder_only)
    if target in ("mae", "mmpretrain"):
        return to_mae(state) if target == "mae" else dict(state)
    if target == "detectron2" and architecture(state)["embed_dim"] == PYRAMID:
        raise ValueError(
            f"--to detectron2: its matching of names would put a final norm {PYRAMID} wide into the pyramid"
        )
    return to_timm(state) if target in ("timm", "onnx") else _headless(to_timm(state))


def _selected_for_hf(weights: Weights, host: str, encoder_only: bool) -> State:
    if "mask_token" in weights.state and not encoder_only:
        if host == "mff_vit":
            raise ValueError(f"--to hf has no place for the decoder of a {host}: {WHY[host]}; add --encoder_only")
        return dict(weights.state)
    encoder = to_timm(weights.state)
    if "fc_norm.weight" in encoder or averages_normed(weights):
        raise ValueError(
            "--to hf: transformers' ViT classifies by the class token, this one by the mean: use --to timm"
        )
    if encoder_only:
        return _headless(encoder)
    if "head.weight" not in encoder:
        raise ValueError("--to hf: there is no decoder for a ViTMAEForPreTraining: add --encoder_only")
    return encoder


def _headless(encoder: State) -> State:
    return {key: value for key, value in encoder.items() if key.split(".")[0] not in ("head", "fc_norm")}


def rename_tensors(state: State, target: str, backbone: str) -> State:
    """State in the target's names; of a view only what it shows, and nothing twice."""
    if target == "hf":
        state = to_hf(state)
        if "decoder.mask_token" not in state and "classifier.weight" not in state:
            state = {key.removeprefix("vit."): value for key, value in state.items()}
    elif target == "mmpretrain":
        state = to_mm(state)
    elif target == "mmseg":
        state = to_mmseg(state, backbone)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def _save_folder(folder: Path, state: State, files: dict[str, dict]) -> None:
    """model.safetensors and JSON files; transformers 4.x asks for the format in the metadata."""
    from safetensors.torch import save_file  # timm brings it; no other format needs it

    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, weights: Weights, state: State, target: str, folder: bool) -> None:
    """Write `state`, which is in the target's names, to `path`; the weights tell what its configuration says."""
    if target == "hf":
        files = {"config.json": hf_config(weights)}
        size = known_size(weights)
        if size[0] == size[1]:
            files["preprocessor_config.json"] = hf_processor(weights)
        _save_folder(path, state, files)
    elif folder:
        _save_folder(path, state, {"config.json": timm_config(weights)})
    elif target == "onnx":
        _save_onnx(path, weights, state)
    else:
        wrapped = {
            "mae": {"model": state},
            "detectron2": {"model": state},
            "mmpretrain": {"state_dict": state, "meta": {}},
        }
        wrapped["mmseg"] = wrapped["mmpretrain"] | {"state_dict": state}
        torch.save(wrapped.get(target, state), path)
