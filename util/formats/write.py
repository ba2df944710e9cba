"""Weights in the file formats of other repositories."""

import json
from pathlib import Path
from typing import Any

import torch

from util.formats.configs import hf_config, hf_processor, timm_config
from util.formats.keys import FORMATS, State, rename, to_hf, to_mae, to_mm, to_mmseg, to_timm
from util.formats.onnx import save_onnx
from util.formats.resize import known_size
from util.formats.weights import Weights

WHY = {
    "convvit": "these formats have no convolution stages",
    "mff_vit": "the format has no fused layers, which the decoder needs",
}
PYRAMID = 256  # width of the norms of Detectron2's feature pyramid


def select_tensors(weights: Weights, target: str, encoder_only: bool = False) -> State:
    """Tensors for the target format, in facebookresearch/mae's names; ValueError if it cannot hold this host."""
    state, host = weights.state, weights.family
    if host is None:
        unknown = next(key for key in state if rename(key, "mae", "mae") is None)
        remedy = "add the host's tensors to RULES in util/formats/keys.py, or use the file unconverted"
        raise ValueError(f"{unknown}: no rule maps it; {remedy}")
    if "ep.queries" in state:
        raise ValueError(
            f"--to {target}: no other repository has the efficient probing of this classifier (ep.queries, ep.value); evaluate it "
            "by main_linprobe.py --eval, or convert the checkpoint that it probes"
        )
    if target not in FORMATS[host]:
        formats = " or ".join(FORMATS[host])
        raise ValueError(f"--to {target} cannot hold a {host}: {WHY[host]}; use --to {formats}")
    if obstacle := _find_obstacle(weights, target, encoder_only):
        raise ValueError(f"--to {target} cannot hold {obstacle}")
    if target == "mae" and weights.averages_normed:
        raise ValueError("--to mae: its models do not average patches after the final norm; use --to timm")
    if target == "hf":
        return _select_for_hf(weights, host, encoder_only)
    if target in ("mae", "mmpretrain"):
        return to_mae(state) if target == "mae" else dict(state)
    if target == "detectron2" and weights.embed_dim == PYRAMID:
        why = "the final norm would be loaded into the feature pyramid"
        raise ValueError(f"--to detectron2: width {PYRAMID} is ambiguous, {why}; use --to timm")
    return to_timm(state) if target in ("timm", "onnx") else _remove_head(to_timm(state))


def _find_obstacle(weights: Weights, target: str, encoder_only: bool) -> str | None:
    """What of the class tokens and the cross-attention decoder the format has no place for, and the remedy."""
    tokens = f"{weights.class_tokens} class tokens"
    if weights.class_tokens > 1:
        if target not in ("timm", "hf", "onnx"):
            return f"{tokens}; use --to timm"
        if target == "hf" and (weights.num_classes or not encoder_only):
            remedy = "use --to onnx" if weights.num_classes else "add --encoder_only"
            return f"{tokens} with a decoder or head; {remedy}"
        if target == "timm" and weights.averages_tokens:
            return f"a classifier of the mean of {tokens}, timm's reads the first; use --to onnx"
    if weights.decoder == "cross":
        if target == "hf" and not encoder_only:
            return "a cross-attention decoder; add --encoder_only"
        if target == "mmpretrain" or (target == "mae" and not weights.fuse_levels):
            return f"a cross-attention decoder{' without --fuse_levels' * (target == 'mae')}; use --to timm"
    return None


def _select_for_hf(weights: Weights, host: str, encoder_only: bool) -> State:
    if "mask_token" in weights.state and not encoder_only:
        if host == "mff_vit":
            raise ValueError(f"--to hf cannot hold the decoder of a {host}: {WHY[host]}; add --encoder_only")
        return dict(weights.state)
    encoder = to_timm(weights.state)
    if "fc_norm.weight" in encoder or weights.averages_normed:
        why = "transformers' ViT classifies the class token, this model the mean of the patches"
        raise ValueError(f"--to hf: {why}; use --to timm")
    if encoder_only:
        return _remove_head(encoder)
    if "head.weight" not in encoder:
        raise ValueError("--to hf: the file has no decoder for ViTMAEForPreTraining; add --encoder_only")
    return encoder


def _remove_head(encoder: State) -> State:
    return {key: value for key, value in encoder.items() if key.split(".")[0] not in ("head", "fc_norm")}


def rename_tensors(state: State, target: str, backbone: str) -> State:
    """Copy of the state in the target's names, as contiguous tensors that share no memory."""
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
    """Write model.safetensors and JSON files; transformers 4.x requires the format in the metadata."""
    from safetensors.torch import save  # a dependency of timm; only this format needs it

    folder.mkdir()
    packed = save(state, metadata={"format": "pt"})  # save_file has errors of its own
    (folder / "model.safetensors").write_bytes(packed)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, weights: Weights, state: State, target: str, folder: bool) -> None:
    """Write `state`, in the target's names, to `path`; configuration files describe `weights`."""
    if target == "hf":
        files = {"config.json": hf_config(weights)}
        size = known_size(weights)
        if size[0] == size[1]:
            files["preprocessor_config.json"] = hf_processor(weights)
        _save_folder(path, state, files)
    elif folder:
        _save_folder(path, state, {"config.json": timm_config(weights)})
    elif target == "onnx":
        save_onnx(path, weights, state)
    else:
        sides = weights.input_size or ()
        shape: dict[str, Any] = {"input_size": [*sides]} if len({*sides}) == 2 else {}  # else a square is assumed
        extra = {target: shape, "mae": weights.settings | shape, "mmpretrain": weights.settings | shape}[target]
        box = {"model": state} if target in ("mae", "detectron2") else {"state_dict": state, "meta": {}}
        args = {"args": extra} if extra else {}  # as in files of MAE
        torch.save(state if target == "timm" else box | args, path)
