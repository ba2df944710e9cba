"""Weights of PixMIM and its hosts from everybody's repositories, and back; `python -m util.convert IN OUT`.

A key that no rule maps, that is missing or has another shape is an error, never dropped. A stranger's pickle is read,
never executed.
"""

import argparse
import json
import os
import pickletools
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # python util/convert.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor

from util.args import SizeAction, number
from util.export import push, resized, save, selected, spelled, usage
from util.files import check_zip, is_what_was_written
from util.names import (
    DECODER,
    DROPPED,
    HOMES,
    State,
    Weights,
    architecture,
    decoder_heads,
    expected_shapes,
    family,
    from_hf,
    from_mmseg,
    home,
    mae_names,
    misshaped,
    pixmim_names,
    rename,
    to_mae,
    to_mm,
    to_timm,
)

__all__ = [
    "Weights", "architecture", "convert", "decoder_heads", "family", "home", "load", "mae_names", "pixmim_names", "rename",
    "to_mae", "to_mm", "to_timm", "usage",
]  # fmt: skip

BATCH_NORMS = (("head.0", "head.1", "head"), ("neck.bn", "head.layers.head", "head.layers.head"))  # of linear probes
BATCH_NORM_KEYS = ("running_mean", "running_var", "num_batches_tracked")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
COLUMNS = {"mm": "mm", "mmseg": "mm", "hf": "hf"}  # of names.RULES, by source; "mae" is that of the others
# Pickled beside the weights by mmengine and mmcv: training history (numpy arrays, bound methods) and configuration.
INERT = re.compile(
    r"(mmengine\.(logging|config)|mmcv\.utils)\..+|builtins\.getattr"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.multiarray\.(_reconstruct|scalar))"
)


class _Inert:
    """Stands for a pickled object that we do not need: takes any arguments and any state and keeps neither."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _refusal(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds {', '.join(names)}, which would have to be executed: refused; "
        'where you trust the file, save {"model": model.state_dict()} alone'
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a broken file raises becomes one line that names it."""
    try:
        yield
    except Exception as error:
        if stranger := re.search(r"GLOBAL (\S+)", str(error)):  # in a file from before torch 1.6
            raise _refusal(path, [stranger[1]]) from error
        with path.open("rb") as file:
            found = f"{path.stat().st_size} bytes, beginning with {file.read(8)!r}; {type(error).__name__}"
        raise ValueError(f"{path} is not a readable checkpoint ({found}): copy or download it again") from error


def _check_old(path: Path) -> None:
    """ValueError for a broken file from before torch 1.6: in its pieces torch would search for a reason for minutes."""
    with path.open("rb") as file:
        for _ in range(5):  # pickles: magic number, protocol, system, content, names of the storages that follow
            for _, value, _ in pickletools.genops(file):
                if isinstance(value, str | bytes) and len(value) > 2**12:
                    raise ValueError("no name is as long")


def _read(path: Path) -> Any:
    """The file's content with nothing executed: objects on the allow-list are empty shells, others are an error."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if path.suffix == ".onnx":
        raise ValueError(
            f"{path} is a graph, in which tensors need no names: convert the checkpoint that it was made of"
        )
    if head.lstrip().startswith(b"<") and head[8:9] != b"{":  # safetensors may begin with a length like b" <"
        raise ValueError(f"{path} is a web page, not a checkpoint: download the file itself")
    with _explained(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # timm brings it; no other format needs it

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        check_zip(path) if zipped else _check_old(path)
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    strangers = sorted(name for name in asked if name != "argparse.Namespace" and not INERT.fullmatch(name))
    if strangers:
        raise _refusal(path, strangers)
    shells = [(_Inert, name) for name in asked if name != "argparse.Namespace"]
    with _explained(path), torch.serialization.safe_globals([argparse.Namespace, *shells]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and content.get("sha256") and not is_what_was_written(content):
        raise ValueError(
            f"{path} is damaged, its checksum differs: copy it again, or use previous.pth or epoch-NNNN.pth"
        )
    return content


def weights_file(path: str | os.PathLike) -> Path:
    """The file itself, or that of a folder of transformers or timm that holds the weights."""
    path = Path(path)
    if not path.is_dir():
        return path
    file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if file is None:
        parts = any(path.glob("*.index.json"))
        how = "save it in one part (max_shard_size)" if parts else "name the checkpoint file in it"
        raise ValueError(f"{path} is a folder without {' or '.join(WEIGHT_FILES)}: {how}")
    return file


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """Content of a file, or of the weights in a folder of transformers or timm, and that folder's config.json."""
    file = weights_file(path)
    if file == path:
        return _read(path), {}
    config, about = path / "config.json", {}
    if config.is_file():
        try:
            about = json.loads(config.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config} is not JSON ({str(error)[:100]}): copy or download it again") from error
    if not about or not isinstance(about, dict):
        raise ValueError(f"{path} has no config.json that describes the model: download it too, or name {file}")
    return _read(file), about


# What config.json calls it (transformers, then timm) -> the same in `architecture`
CLAIMS = {
    "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_channels": "in_chans", "patch_size": "patch_size",
    "decoder_hidden_size": "decoder_dim", "decoder_num_hidden_layers": "decoder_depth", "intermediate_size": "hidden",
    "embed_dim": "embed_dim", "depth": "depth", "in_chans": "in_chans", "mlp_ratio": "mlp_ratio", "num_classes": "num_classes",
}  # fmt: skip


def _contradictions(claims: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """What config.json says that cannot be true of weights with these facts."""
    for key, fact in CLAIMS.items():
        if claims.get(key) is not None and fact in facts and claims[key] not in (facts[fact], [facts[fact]] * 2):
            yield f"{key} {claims[key]} (the weights: {facts[fact]})"
    patch, (height, width) = facts["patch_size"], claims["input_size"]
    if height is not None and not (_count(height) and _count(width)):
        yield f"image size {height}, {width}"
    elif height is not None and (height // patch) * (width // patch) != facts["num_patches"]:
        yield f"image size {height}, {width} (the weights: {facts['num_patches']} patches of {patch} px)"
    for key, dim in (("num_heads", facts["embed_dim"]), ("decoder_heads", facts.get("decoder_dim", 0))):
        if claims[key] is not None and (not _count(claims[key]) or dim % claims[key]):
            yield f"{claims[key]} attention heads (the weights: width {dim})"
    for key in ("mean", "std"):
        values = claims[key]
        numbers = isinstance(values, list) and {*map(type, values)} <= {int, float}
        if values is not None and not (numbers and len(values) == facts["in_chans"]):
            yield f"{key} {values} (the weights: {facts['in_chans']} channels)"
    if claims.get("hidden_act", "gelu") != "gelu":
        yield f"hidden_act {claims['hidden_act']} (here: gelu)"


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _told(path: Path, about: dict[str, Any], state: State) -> tuple[dict[str, Any], list[str]]:
    """Arguments of a run that config.json tells, and what of it is not taken; ValueError if the weights contradict it."""
    facts = architecture(state)
    if facts["family"] == "convvit":
        raise ValueError(f"{path} holds a ConvMAE, which neither transformers nor timm has: name the weights in it")
    facts["hidden"] = round(facts["mlp_ratio"] * facts["embed_dim"])
    inner, looks = (
        x if isinstance(x := about.get(key), dict) else {} for key in ("model_args", "pretrained_cfg")
    )  # timm's
    claims = about | inner
    size = claims.get("image_size", claims.get("img_size"))
    claims |= {
        "input_size": size if isinstance(size, list) and len(size) == 2 else [size, size],
        "num_heads": claims.get("num_attention_heads", claims.get("num_heads")),
        "decoder_heads": claims.get("decoder_num_attention_heads") if "decoder_dim" in facts else None,
        "mean": looks.get("mean"),
        "std": looks.get("std"),
    }
    if wrong := [*_contradictions(claims, facts)]:
        raise ValueError(f"{path / 'config.json'} says {', '.join(wrong)}: it belongs to other weights")
    args = {key: claims[key] for key in ("num_heads", "decoder_heads", "mean", "std")}
    args |= {"input_size": None if size is None else claims["input_size"], "classes": about.get("label_names")}
    args |= {
        key: x for key, kind in (("norm_pix_loss", bool), ("mask_ratio", float)) if type(x := about.get(key)) is kind
    }
    if claims.get("fc_norm") is False and claims.get("global_pool") == "avg":
        args["pool"] = "mean"
    eps = about.get("layer_norm_eps", 1e-6)
    unused = [] if eps == 1e-6 else [f"config.json's layer_norm_eps {eps} (1e-06 here, as MAE has it)"]
    return {name: value for name, value in args.items() if value is not None}, unused


def _fold_batch_norm(state: State) -> tuple[State, list[str]]:
    """State with a linear probe's BatchNorm (no affine, eps 1e-6) folded into its head, and the keys that went."""
    for norm, linear, head in BATCH_NORMS:
        rest = dict(state)
        mean, variance, _ = (rest.pop(f"{norm}.{key}", None) for key in BATCH_NORM_KEYS)
        weight, bias = (rest.pop(f"{linear}.{key}", None) for key in ("weight", "bias"))
        if mean is None or variance is None or weight is None or bias is None:
            continue
        if mean.shape == variance.shape == weight.shape[1:]:  # else they stay, unknown keys
            weight = weight * (variance + 1e-6).rsqrt()
            gone = [key for key in state if key.startswith(f"{norm}.") and key not in rest]
            return rest | {f"{head}.weight": weight, f"{head}.bias": bias - weight @ mean}, gone
    return state, []


def _join_qkv_bias(state: State) -> State:
    """State with q_bias and v_bias, as long_seq_mae saves them on TPUs, as the one bias of qkv; keys have none."""
    joined = dict(state)
    for key in state:
        block = key.removesuffix("q_bias")
        if block != key and f"{block}v_bias" in state and f"{block}qkv.bias" not in state:
            q, v = joined.pop(key), joined.pop(f"{block}v_bias")
            joined[f"{block}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return joined


def _spelled(box: dict, state: State) -> tuple[str, State]:
    """Who wrote it, and the state in the names of one column of RULES."""
    if str(box.get("format", "")).startswith("pixmim"):
        return "pixmim", state
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return "hf", from_hf(state)
    if any(key.startswith("backbone.") for key in state):
        return "mm", from_mmseg(state) if any(".attn.attn.in_proj_" in key for key in state) else state
    if "patch_embed.projection.weight" in state:
        return "mmseg", from_mmseg(state)
    return "mae" if "model" in box or "mask_token" in state else "timm", state


def load(path: str | os.PathLike) -> Weights:
    """Weights of a checkpoint of PixMIM, facebookresearch/mae and long_seq_mae, ConvMAE, OpenMMLab, transformers or timm.

    A file, or a folder with config.json as transformers and timm save it. FileNotFoundError, or ValueError with the
    file, what was found in it (all unknown, missing and mis-shaped keys) and the remedy.
    """
    path = Path(path)
    content, about = _open(path)
    box = content if isinstance(content, dict) else {}
    state = next((box[key] for key in ("model", "state_dict") if isinstance(box.get(key), dict)), box)
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = f"a dict of {', '.join(map(str, box))}" if box else f"a {type(content).__name__}"
        raise ValueError(f'{path} holds {found[:200]}: expected tensors by name, bare or under "model" or "state_dict"')
    for prefix in ("module.", "_orig_mod."):  # DistributedDataParallel, torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    args = box.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    source, state = _spelled(box, state)
    state, dropped = _fold_batch_norm(_join_qkv_bias(state))
    dropped += [key for key in state if DROPPED.fullmatch(key)]
    state = {key: value for key, value in state.items() if key not in dropped}
    if source != "pixmim" or family(state):  # a run's own host without rules is left to its model to check
        state = _map(path, state, source)
    if about:
        args, unused = _told(path, about, state)
        dropped += unused
    return Weights(state, args, source, dropped)


def _map(path: Path, state: State, source: str) -> State:
    """State in facebookresearch/mae's names; ValueError if it is not, key for key, what the tables describe."""
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
            f"{path}: not one of its {len(state)} keys ({', '.join(list(state)[:3])}, ...) is known: "
            "expected PixMIM, MAE, ConvMAE, mmselfsup, mmpretrain, mmsegmentation's backbone, transformers' or timm's ViT"
        )
    mapped = {name: state[key] for name, key in native.items()}
    expected = expected_shapes(mapped)
    problems = {
        "unknown": unknown + [native[name] for name in mapped if name not in expected],
        "missing": [str(rename(name, "mae", column)) for name in expected if name not in mapped],
        "mis-shaped": [f"{native[name]} {complaint}" for name, complaint in misshaped(mapped, expected)],
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{path} (read as {source}) is not what names.RULES describe: {lists}")
    return mapped


def convert(
    source: Path,
    out: Path,
    target: str,
    *,
    folder: bool = False,
    encoder_only: bool = False,
    input_size: tuple[int, int] | None = None,
    backbone: str = "MAE",
) -> str:
    """Write `out`, a file or folder of tensors only, in the format of `target`; returns the report."""
    if source.resolve() == out.resolve():
        raise ValueError(f"OUT is IN ({out}): choose another name, the original is not overwritten")
    _check_flags(target, folder, encoder_only, backbone)
    folder = folder or target == "hf"
    occupied = any(out.iterdir()) if folder and out.is_dir() else out.exists() if folder else out.is_dir()
    if occupied or not out.parent.is_dir():
        what = "new or empty folder" if folder else "file"
        raise ValueError(f"cannot write {out}: it must be a {what} in an existing folder")
    weights = load(source)
    selected(weights, target, encoder_only)  # a host without a place there is refused before it is looked at
    weights = weights if input_size is None else resized(weights, input_size)
    line = usage(weights, target, out, folder, encoder_only, backbone)
    chosen = selected(weights, target, encoder_only)
    state = spelled(chosen, target, backbone)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save(temporary, weights._replace(state=chosen), state, target, folder)
        if folder and out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
    gone = [key for key in weights.state if key not in chosen]
    decoder = sum(1 for key in gone if DECODER.fullmatch(key))
    dropped = weights.dropped + ([f"mask_token and decoder_* ({decoder} keys)"] if decoder else [])
    dropped += [key for key in gone if not DECODER.fullmatch(key)]
    return (
        f"read     {source}: {weights.source}, {len(weights.state)} keys mapped\n"
        f"dropped  {', '.join(dropped) or 'nothing'}\n"
        f"wrote    {out}: {target}, {len(state)} keys\n"
        f"load it  {line}"
    )


def _check_flags(target: str, folder: bool, encoder_only: bool, backbone: str) -> None:
    if folder and target not in ("timm", "hf"):
        raise ValueError(f"--folder is for --to timm (--to hf always is one), not for --to {target}")
    if encoder_only and target != "hf":
        raise ValueError(f"--encoder_only is for --to hf, not for --to {target}")
    if backbone != "MAE" and target != "mmseg":
        raise ValueError(f"--backbone {backbone} is for --to mmseg, not for --to {target}")


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m util.convert", description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("IN", type=Path, help="checkpoint of PixMIM, MAE, ConvMAE, mmselfsup / mmpretrain / mmsegmentation, timm or transformers; "
                              "of the last two also a folder")
    add("OUT", type=Path, help="file to write; with --folder and --to hf a new folder")
    add("--to", choices=HOMES["vit"], default="timm", help="format; mae is Alpha-VL/ConvMAE's as well")
    add("--folder", action="store_true", help="timm: a folder with config.json, for local-dir: and the Hugging Face Hub")
    add("--encoder_only", action="store_true", help="hf: a ViTModel, without decoder; else a ViTMAEForPreTraining")
    add("--backbone", choices=["MAE", "VisionTransformer"], default="MAE", help="mmseg: whose names the attention has")
    add("--input_size", type=number(int, 1), nargs="+", action=SizeAction, metavar="H",
        help="resample position embeddings for images of this side in pixels, or H W")
    add("--push_to_hub", metavar="NAME", help="upload the folder to this repository, which is made private if it is new")
    # fmt: on
    return parser


def main() -> None:
    args = get_parser().parse_args()
    options = {"folder": args.folder, "encoder_only": args.encoder_only, "backbone": args.backbone}
    try:
        if args.push_to_hub and not (args.folder or args.to == "hf"):
            raise ValueError(f"--push_to_hub {args.push_to_hub} uploads folders: add --folder, or use --to hf")
        print(convert(args.IN, args.OUT, args.to, input_size=args.input_size, **options))
        if args.push_to_hub:
            push(args.OUT, args.push_to_hub)
            print(f"pushed   {args.push_to_hub}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
