"""Weights of a checkpoint of any supported repository."""

import argparse
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.args import default_crop_pct
from util.files import printable
from util.formats.keys import (
    DROPPED,
    FINAL_NORM,
    State,
    expected_shapes,
    family,
    find_misshaped,
    from_hf,
    from_mmseg,
    join_names,
    rename,
    tensor_sizes,
)
from util.formats.unpickle import load_content
from util.formats.weights import METHOD, Weights, check_settings

BATCH_NORMS = (("head.0", "head.1", "head"), ("neck.bn", "head.layers.head", "head.layers.head"))  # of linear probes
BATCH_NORM_KEYS = ("running_mean", "running_var", "num_batches_tracked")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# in a config of mmengine
SETTING = re.compile(r"\b(norm_pix|mask_ratio|decoder_num_heads)=(true|false|\d+(?:\.\d+)?)\b")
OUR_NAMES = {
    "kept_mask_ratio": "predict_ratio", "mask_downsampling": "mask_unit", "norm_pix": "norm_pix_loss",
    "decoder_num_heads": "decoder_heads",
}  # fmt: skip
WRAPPER = re.compile(r"module\.|_orig_mod\.|model\.")  # DistributedDataParallel, torch.compile, Lightning
PATCHES = re.compile(r"((?:(?:module|_orig_mod|model|backbone|encoder|vit)\.)+)patch_embed1?\.proj\.weight")
EMA = {"model": "model_ema", "state_dict": "state_dict_ema"}  # facebookresearch/mae's forks, timm
COLUMNS = {"mm": "mm", "mmseg": "mm", "hf": "hf"}  # of keys.RULES, by source; others: "mae"


def weights_file(path: str | os.PathLike) -> Path:
    """The file itself, or the weight file in a folder of transformers or timm."""
    path = Path(path)
    if not path.is_dir():
        return path
    file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if file is None:
        parts = any(path.glob("*.index.json"))
        how = "save it in one part (max_shard_size)" if parts else "pass the checkpoint file itself"
        raise ValueError(f"{path} is a folder without {' or '.join(WEIGHT_FILES)}: {how}")
    return file


def _load_with_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """(Content of the weight file, config.json of a folder of transformers or timm)."""
    file = weights_file(path)
    if file == path:
        return load_content(path), {}
    config, processor = (_read_json(path / name) for name in ("config.json", "preprocessor_config.json"))
    if not config:
        raise ValueError(f"{path} has no config.json that describes the model: download it, or pass {file}")
    preprocessing = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    return load_content(file), {"pretrained_cfg": preprocessing} | config  # timm's config.json has its own


def _read_json(path: Path) -> dict[str, Any]:
    """Dictionary in a JSON file; {} if there is none."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:100]}): copy or download it again") from error
    return content if isinstance(content, dict) else {}


# Key of config.json (transformers, then timm) -> key of `tensor_sizes`
CLAIMS = {
    "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_channels": "in_chans", "patch_size": "patch_size",
    "decoder_hidden_size": "decoder_dim", "decoder_num_hidden_layers": "decoder_depth", "intermediate_size": "hidden",
    "embed_dim": "embed_dim", "depth": "depth", "in_chans": "in_chans", "mlp_ratio": "mlp_ratio", "num_classes": "num_classes",
}  # fmt: skip


def _find_contradictions(stated: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Values in config.json that contradict the sizes of the weights."""
    for key, fact in CLAIMS.items():
        if stated.get(key) is not None and fact in facts and stated[key] not in (facts[fact], [facts[fact]] * 2):
            yield f"{key} {stated[key]} (the weights: {facts[fact]})"
    patch, (height, width) = facts["patch_size"], stated["input_size"]
    if height is not None and not (_is_count(height) and _is_count(width)):
        yield f"image size {height}, {width}"
    elif height is not None and (height // patch) * (width // patch) != facts["num_patches"]:
        yield f"image size {height}, {width} (the weights: {facts['num_patches']} patches of {patch} px)"
    for key, dim in (("num_heads", facts["embed_dim"]), ("decoder_heads", facts.get("decoder_dim", 0))):
        if stated[key] is not None and (not _is_count(stated[key]) or dim % stated[key]):
            yield f"{stated[key]} attention heads (the weights: width {dim})"
    for key in ("mean", "std"):
        values = stated[key]
        numbers = isinstance(values, list) and {*map(type, values)} <= {int, float}
        if values is not None and not (numbers and len(values) == facts["in_chans"]):
            yield f"{key} {values} (the weights: {facts['in_chans']} channels)"
    if stated.get("hidden_act", "gelu") != "gelu":
        yield f"hidden_act {stated['hidden_act']} (here: gelu)"


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _config_args(path: Path, config: dict[str, Any], state: State) -> tuple[dict[str, Any], list[str]]:
    """(Arguments in config.json, list of its unused values); ValueError if the weights contradict it."""
    facts = tensor_sizes(state)
    if facts["family"] == "convvit":
        raise ValueError(f"{path} holds a ConvMAE, which transformers and timm lack: pass the weight file itself")
    facts["hidden"] = round(facts["mlp_ratio"] * facts["embed_dim"])
    # timm's
    model_args, preprocessing = (
        x if isinstance(x := config.get(key), dict) else {} for key in ("model_args", "pretrained_cfg")
    )
    stated = config | model_args
    size = stated.get("image_size", stated.get("img_size"))
    stated |= {
        "input_size": size if isinstance(size, list) and len(size) == 2 else [size, size],
        "num_heads": stated.get("num_attention_heads", stated.get("num_heads")),
        "decoder_heads": stated.get("decoder_num_attention_heads") if "decoder_dim" in facts else None,
        "mean": preprocessing.get("mean"),
        "std": preprocessing.get("std"),
    }
    if wrong := [*_find_contradictions(stated, facts)]:
        raise ValueError(f"{path / 'config.json'} states {', '.join(wrong)}: use the config.json of these weights")
    args = {key: stated[key] for key in ("num_heads", "decoder_heads", "mean", "std")}
    args |= {"input_size": None if size is None else stated["input_size"], "classes": config.get("label_names")}
    usual = {"norm_pix_loss": False, "mask_ratio": 0.75} if config.get("model_type") == "vit_mae" else {}
    args |= {key: config.get(key, usual.get(key)) for key in METHOD}
    if stated.get("fc_norm") is False and stated.get("global_pool") == "avg":
        args["pool"] = "mean"
    crop_pct = preprocessing.get("crop_pct")  # of a classifier; features of any encoder follow MAE's rule
    if "head.weight" in state and size is not None and isinstance(crop_pct, int | float) and 0.01 <= crop_pct <= 1:
        args["crop_pct"] = None if crop_pct == default_crop_pct(tuple(stated["input_size"])) else crop_pct
    eps = config.get("layer_norm_eps", 1e-6)
    unused = [] if eps == 1e-6 else [f"config.json's layer_norm_eps {eps} (1e-06 here, as in MAE)"]
    return {name: value for name, value in args.items() if value is not None}, unused


def _disc_radius(low_pass: Tensor) -> float:
    """Radius in bins of the release's filter (C, H, W), 1 around the centre of the shifted spectrum; 0 if it keeps all."""
    y, x = (torch.arange(n) - (n - 1) / 2 for n in low_pass.shape[-2:])
    distance = (y[:, None] ** 2 + x**2).sqrt()
    return 0 if low_pass.all() else math.ceil(distance[low_pass[0] > 0].max())


def _stated_args(checkpoint: dict, state: State) -> dict[str, Any]:
    """Settings that a file states beside the weights, under their names there and under ours."""
    args, meta = checkpoint.get("args"), checkpoint.get("meta")
    found = dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, dict) else {}
    settings = str(meta.get("cfg")).lower() if isinstance(meta, dict) else ""
    found |= {key: json.loads(value) for key, value in SETTING.findall(settings)}
    found |= {ours: found[theirs] for theirs, ours in OUR_NAMES.items() if theirs in found}
    if "progress" in checkpoint and str(checkpoint.get("format", "")).startswith("pixmim"):
        at = checkpoint["progress"]
        found |= {"epochs_done": at["epoch"] + at["step"] / checkpoint.get("steps", 1)}
        found |= {key: checkpoint[key] for key in ("batch", "data") if key in checkpoint}
        if checkpoint.get("origin") and not found.get("origin"):  # of an earlier version, whose arguments lack it
            found["origin"] = {"sha256": checkpoint["origin"], "source": None, "args": {}}
    if "target_generator.low_pass_filter" in state:
        found["lowpass_radius"] = _disc_radius(state["target_generator.low_pass_filter"])
    keys = {key: f"data_preprocessor.{key}" for key in ("mean", "std")}
    return found | {key: (state[name].flatten() / 255).tolist() for key, name in keys.items() if name in state}


def _fold_batch_norm(state: State) -> tuple[State, list[str]]:
    """State with a linear probe's BatchNorm (no affine, eps 1e-6) folded into its head, and the removed keys."""
    for norm, linear, head in BATCH_NORMS:
        rest = dict(state)
        mean, variance, _ = (rest.pop(f"{norm}.{key}", None) for key in BATCH_NORM_KEYS)
        weight, bias = (rest.pop(f"{linear}.{key}", None) for key in ("weight", "bias"))
        if mean is None or variance is None or weight is None or bias is None:
            continue
        if mean.shape == variance.shape == weight.shape[1:]:  # else reported as unknown
            weight = weight * (variance + 1e-6).rsqrt()
            removed = [key for key in state if key.startswith(f"{norm}.") and key not in rest]
            return rest | {f"{head}.weight": weight, f"{head}.bias": bias - weight @ mean}, removed
    return state, []


def _join_qkv_bias(state: State) -> State:
    """State with q_bias and v_bias, as long_seq_mae saves them on TPUs, joined to one bias of qkv; the key bias is 0."""
    joined = dict(state)
    for key in state:
        block = key.removesuffix("q_bias")
        if block != key and f"{block}v_bias" in state and f"{block}qkv.bias" not in state:
            q, v = joined.pop(key), joined.pop(f"{block}v_bias")
            joined[f"{block}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return joined


def _detect_source(checkpoint: dict, state: State) -> tuple[str, State]:
    """(Source repository, state in the names of one column of RULES)."""
    if str(checkpoint.get("format", "")).startswith("pixmim"):
        return "pixmim", state
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return "hf", from_hf(state)
    if any(key.startswith("backbone.") for key in state):
        return "mm", from_mmseg(state) if any(".attn.attn.in_proj_" in key for key in state) else state
    if "patch_embed.projection.weight" in state:
        return "mmseg", from_mmseg(state)
    return "mae" if "model" in checkpoint or "mask_token" in state else "timm", state


def _report(path: Path, text: str) -> None:
    """Print one line about a file, on the first rank only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(printable(f"{path}: {text}"), flush=True)


def _select_state(path: Path, checkpoint: dict, use_ema: bool) -> dict:
    """Tensors of a file: with use_ema those of its moving average; ValueError where there is none."""
    found = {key: checkpoint[key] for pair in EMA.items() for key in pair if isinstance(checkpoint.get(key), dict)}
    averages = [key for key in found if key in EMA.values()]
    if use_ema and not averages:
        raise ValueError(f"--use_ema: {path} has neither {' nor '.join(EMA.values())}; leave the flag out")
    key = averages[0] if use_ema else next(iter(found), None)
    if averages and (use_ema or len(found) > 1):
        others = ", ".join(name for name in found if name != key)
        _report(path, f"reads {key}" + (f", not {others}; --use_ema chooses the moving average" if not use_ema else ""))
    return checkpoint if key is None else found[key]


def _strip_prefixes(path: Path, state: State) -> tuple[State, list[str]]:
    """(State without the prefixes of wrappers and training frameworks, description of the keys outside them)."""
    prefix = ""
    while (match := WRAPPER.match(next(iter(state)))) and all(key.startswith(match[0]) for key in state):
        prefix += match[0]
        state = {key.removeprefix(match[0]): value for key, value in state.items()}
    starts = [match[1] for key in state if (match := PATCHES.fullmatch(key))]
    start = min(starts, key=len, default="") if "patch_embed.proj.weight" not in state else ""
    others = [key for key in state if not key.startswith(start)]
    state = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    ignored = [f"{len(others)} keys outside {prefix}{start} ({join_names(others)})"] if others else []
    if re.sub(r"module\.|_orig_mod\.", "", prefix + start):
        _report(path, f"reads the keys below {prefix}{start}" + "".join(f"; ignores {text}" for text in ignored))
    return state, ignored


def _with_size(path: Path, weights: Weights, requested: tuple[int, int] | None) -> Weights:
    """Weights whose input size is `requested` if the file records none and its number of patches fits.

    ValueError if it does not fit and the file may be a square or have the aspect ratio of `requested`.
    """
    patch, count, square = weights.patch_size, weights.num_patches, weights.input_size
    if not weights.family or requested is None or weights.size_recorded:
        return weights
    height, width = (side // patch for side in requested)
    if height * width == count:
        if square and square != requested:
            how = f"read as {requested[0]} x {requested[1]} px, as asked, not {square[0]} x {square[1]}"
            _report(path, f"records no input size: {how}")
        return weights.with_state(weights.state, input_size=[*requested])
    scale = math.sqrt(count / max(1, height * width))
    other = (round(height * scale) * patch, round(width * scale) * patch)
    if height != width and square and square[0] == square[1] and other[0] * other[1] == count * patch**2:
        how = "--to mae" if weights.family == "convvit" else "--folder, which records it"
        raise ValueError(
            f"--input_size {requested[0]} {requested[1]}: {path} records no input size, and its {count} patches may be "
            f"{square[0]} x {square[1]} or {other[0]} x {other[1]} px; run util.convert with that --input_size and {how}"
        )
    return weights


def read_weights(path: str | os.PathLike, input_size: tuple[int, int] | None = None, use_ema: bool = False) -> Weights:
    """Weights of a checkpoint of PixMIM, facebookresearch/mae and long_seq_mae, ConvMAE, OpenMMLab, transformers or timm.

    `path` is a file, or a folder with config.json of transformers or timm. FileNotFoundError, or ValueError that names
    the file, unknown, missing and mis-shaped keys, and the remedy. A file that does not record the size of its input is
    read with `input_size` if that has as many patches. use_ema: the moving average of the weights.
    """
    path = Path(path)
    content, config = _load_with_config(path)
    checkpoint = content if isinstance(content, dict) else {}
    state = _select_state(path, checkpoint, use_ema)
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = f"a dict of {', '.join(map(str, checkpoint))}" if checkpoint else f"a {type(content).__name__}"
        expected = 'a dict of tensors, bare or under "model" or "state_dict"'
        raise ValueError(f"{path} holds {found[:200]}: expected {expected}")
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        names = f"{len(broken)} tensors hold nan or inf ({join_names(broken)})"
        raise ValueError(f"{path}: {names}: the run diverged; use an earlier checkpoint")
    state, ignored = _strip_prefixes(path, state)
    args = _stated_args(checkpoint, state)
    source, state = _detect_source(checkpoint, state)
    state, dropped = _fold_batch_norm(_join_qkv_bias(state))
    dropped += ignored + [key for key in state if DROPPED.fullmatch(key)]
    state = {key: value for key, value in state.items() if key not in dropped}
    if source != "pixmim" or family(state):  # own runs of custom encoders are checked by load_encoder
        state = _map_names(path, state, source)
    if config:
        args, unused = _config_args(path, config, state)
        dropped += unused
    if source == "pixmim":
        try:
            check_settings(args)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return _with_size(path, Weights.from_state(state, args, source, dropped), input_size)


def _map_names(path: Path, state: State, source: str) -> State:
    """State in facebookresearch/mae's names; ValueError names keys and shapes that do not match RULES."""
    column = COLUMNS.get(source, "mae")
    native: dict[str, str] = {}
    unknown = []
    for key in state:
        name = rename(key, column, "mae")
        if name is None or name in native:
            unknown.append(key)
        else:
            native[name] = key
    if not native:
        raise ValueError(
            f"{path}: none of its {len(state)} keys ({join_names([*state])}) is known: "
            "expected PixMIM, MAE, ConvMAE, mmselfsup, mmpretrain, mmsegmentation's backbone, transformers' or timm's ViT"
        )
    mapped = {name: state[key] for name, key in native.items()}
    tokens = mapped.get("cls_token")
    if tokens is not None and tokens.ndim == 3 and tokens.shape[1] > 1 and "reg_token" not in mapped:  # Pixio
        mapped |= {"cls_token": tokens[:, :1], "reg_token": tokens[:, 1:]}
        native["reg_token"] = native["cls_token"]
    if "wfm.linear.weight" in mapped and not {*FINAL_NORM} & {*mapped}:
        width = mapped["pos_embed"].shape[-1] if "pos_embed" in mapped else 0
        mapped |= dict(zip(FINAL_NORM, (torch.ones(width), torch.zeros(width)), strict=True))
        native |= {name: name for name in FINAL_NORM}
        _report(path, "CrossMAE has no final norm: read as weight 1, bias 0")
    expected = expected_shapes(mapped)
    problems = {
        "unknown": unknown + [native[name] for name in mapped if name not in expected],
        "missing": [str(rename(name, "mae", column)) for name in expected if name not in mapped],
        "mis-shaped": [f"{native[name]} {error}" for name, error in find_misshaped(mapped, expected)],
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {join_names(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{path} (read as {source}) does not match util/formats/keys.py: {lists}")
    return mapped
