"""Weights of PixMIM and its hosts from everybody's repositories, in one set of names; `python -m util.convert IN OUT`.

Everything inside the project has the names of facebookresearch/mae, which are timm's plus a decoder, or of
Alpha-VL/ConvMAE, which has the same decoder. A key that no rule maps, that is missing or has another shape is an error,
never dropped. A stranger's pickle is read, never executed.
"""

import argparse
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Weights(NamedTuple):
    """What a checkpoint holds for us."""

    state: State  # names of facebookresearch/mae: encoder, and decoder, fc_norm, head where the file has them
    args: dict[str, Any]  # arguments of the run that wrote the file, {} if it keeps none
    source: str  # "pixmim", "mae", "mm" or "timm"
    dropped: list[str]  # keys that a rule leaves out


class Rule(NamedTuple):
    """One tensor: its names, N for the number of a block, its shape, and which hosts have it.

    D width, T tokens, C channels, P patch side, F hidden width, K classes; E, G are D, F of the decoder. ConvMAE's stages:
    widths X, Y, hidden widths U, V, strides Q, R, S. M layers fused by MFF.
    """

    mae: str  # facebookresearch/mae, Alpha-VL/ConvMAE, timm
    mm: str | None  # mmselfsup, mmcls, mmpretrain
    shape: str
    hosts: tuple[str, ...]


VIT, MFF, CONV = ("vit", "mff_vit"), ("mff_vit",), ("convvit",)
ALL = (*VIT, *CONV)
TENSORS = (
    Rule("cls_token", "backbone.cls_token", "1 1 D", VIT),
    Rule("pos_embed", "backbone.pos_embed", "1 T D", ALL),
    Rule("mask_token", "neck.mask_token", "1 1 E", ALL),
    Rule("decoder_pos_embed", "neck.decoder_pos_embed", "1 T E", ALL),
    Rule("proj_weights", "backbone.proj_weights", "M 1 1 1", MFF),
)
LAYERS = (  # shape of the weight; the bias is as long as its first side
    Rule("patch_embed.proj", "backbone.patch_embed.projection", "D C P P", VIT),
    Rule("patch_embed1.proj", None, "X C Q Q", CONV),
    Rule("patch_embed1.norm", None, "X", CONV),
    Rule("patch_embed2.proj", None, "Y X R R", CONV),
    Rule("patch_embed2.norm", None, "Y", CONV),
    Rule("patch_embed3.proj", None, "D Y S S", CONV),
    Rule("patch_embed3.norm", None, "D", CONV),
    Rule("patch_embed4", None, "D D", CONV),
    Rule("stage1_output_decode", None, "D X 4 4", CONV),
    Rule("stage2_output_decode", None, "D Y 2 2", CONV),
    Rule("proj_layers.N", "backbone.proj_layers.N", "D D", MFF),
    Rule("norm", "backbone.ln1", "D", ALL),
    Rule("fc_norm", "backbone.ln2", "D", ALL),
    Rule("head", "head.fc", "K D", ALL),
    Rule("head", "head.layers.head", "K D", ALL),  # mmselfsup's linear probe
    Rule("decoder_embed", "neck.decoder_embed", "E D", ALL),
    Rule("decoder_norm", "neck.ln1", "E", ALL),
    Rule("decoder_pred", "neck.decoder_pred", "PPC E", VIT),
    Rule("decoder_pred", None, "QQRRSSC E", CONV),
)
CONV_BLOCK = (  # layers of a block of ConvMAE's first stage
    ("norm1", "X"), ("conv1", "X X 1 1"), ("attn", "X 1 5 5"), ("conv2", "X X 1 1"),
    ("norm2", "X"), ("mlp.fc1", "U X 1 1"), ("mlp.fc2", "X U 1 1"),
)  # fmt: skip
BLOCK = (  # layers of a block
    ("norm1", "ln1", "D"),
    ("attn.qkv", "attn.qkv", "3D D"),
    ("attn.proj", "attn.proj", "D D"),
    ("norm2", "ln2", "D"),
    ("mlp.fc1", "ffn.layers.0.0", "F D"),
    ("mlp.fc2", "ffn.layers.1", "D F"),
)


def _expand() -> Iterator[Rule]:
    yield from TENSORS
    decoder, second = str.maketrans("DF", "EG"), str.maketrans("XU", "YV")
    blocks = [Rule(f"blocks1.N.{layer}", None, shape, CONV) for layer, shape in CONV_BLOCK]
    blocks += [Rule(f"blocks2.N.{layer}", None, shape.translate(second), CONV) for layer, shape in CONV_BLOCK]
    for ours, mm, shape in BLOCK:
        blocks.append(Rule(f"blocks.N.{ours}", f"backbone.layers.N.{mm}", shape, VIT))
        blocks.append(Rule(f"blocks3.N.{ours}", None, shape, CONV))
        blocks.append(Rule(f"decoder_blocks.N.{ours}", f"neck.decoder_blocks.N.{mm}", shape.translate(decoder), ALL))
    for layer in (*LAYERS, *blocks):
        for kind, shape in (("weight", layer.shape), ("bias", layer.shape.split()[0])):
            yield Rule(f"{layer.mae}.{kind}", layer.mm and f"{layer.mm}.{kind}", shape, layer.hosts)


RULES = tuple(_expand())
DROPPED = re.compile(r"target_generator\.low_pass_filter|data_preprocessor\.(mean|std)")
DECODER = re.compile(r"mask_token|decoder_.*")
FUSION = re.compile(r"(proj_layers|stage[12]_output_decode)\..*|proj_weights")  # MFF's, ConvMAE's: not for features
HOMES = {  # host -> the formats that have a place for it
    "vit": ("timm", "mae", "mmpretrain"),
    "mff_vit": ("timm", "mmpretrain"),
    "convvit": ("mae",),
}
BATCH_NORMS = (("head.0", "head.1", "head"), ("neck.bn", "head.layers.head", "head.layers.head"))  # of linear probes
BATCH_NORM_KEYS = ("running_mean", "running_var", "num_batches_tracked")
# Pickled beside the weights by mmengine and mmcv: training history (numpy arrays, bound methods) and configuration.
INERT = re.compile(
    r"(mmengine\.(logging|config)|mmcv\.utils)\..+|builtins\.getattr"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.multiarray\.(_reconstruct|scalar))"
)


@cache
def rename(key: str, source: str, target: str) -> str | None:
    """Name in column `target` of RULES of a tensor that column `source` calls `key`; None if no rule maps it."""
    for rule in RULES:
        theirs, name = getattr(rule, source), getattr(rule, target)
        match = theirs and name and re.fullmatch(re.escape(theirs).replace("N", r"(0|[1-9]\d*)"), key)
        if match:
            return name.replace("N", "".join(match.groups()))
    return None


def family(state: State) -> str | None:
    """The host, as the names in `models.ENCODERS` begin; None for one that RULES do not know."""
    if any(rename(key, "mae", "mae") is None for key in state):
        return None
    marks = {"patch_embed1.": "convvit", "proj_": "mff_vit"}
    return next((host for mark, host in marks.items() if any(key.startswith(mark) for key in state)), "vit")


def home(state: State) -> str | None:
    """The format in which a classifier of this host is read best; None for a host that RULES do not know."""
    host = family(state)
    return HOMES[host][0] if host else None


def pixmim_names(state: State) -> State:
    """facebookresearch/mae's names -> the modules of PixMIM: `encoder.*`, `decoder.*`."""
    decoder = {key: f"decoder.{key.removeprefix('decoder_')}" for key in state if DECODER.fullmatch(key)}
    return {decoder.get(key, f"encoder.{key}"): value for key, value in state.items()}


def mae_names(state: State) -> State:
    """The modules of PixMIM -> facebookresearch/mae's names; the inverse of `pixmim_names`."""
    bare = {key: re.sub(r"^(encoder|decoder(?=\.mask_token))\.", "", key) for key in state}
    return {re.sub(r"^decoder\.", "decoder_", bare[key]): value for key, value in state.items()}


def to_timm(state: State) -> State:
    """Encoder and classifier, as timm's VisionTransformer (of ConvMAE, its repository) names them; no more."""
    return {key: value for key, value in state.items() if not DECODER.fullmatch(key) and not FUSION.fullmatch(key)}


def to_mae(state: State) -> State:
    """Everything, as facebookresearch/mae or Alpha-VL/ConvMAE names it."""
    if family(state) != "convvit" or "head.weight" not in state or "fc_norm.weight" in state:
        return dict(state)
    width = state["head.weight"].shape[1]  # a probe of ConvMAE: there, the norm after pooling has parameters
    kept = {key: value for key, value in state.items() if key not in ("norm.weight", "norm.bias")}
    return kept | {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}


def to_mm(state: State) -> State:
    """Everything, as mmpretrain names it."""
    return {str(rename(key, "mae", "mm")): value for key, value in state.items()}


def _depth(state: State, prefix: str) -> int:
    return len({m[1] for key in state if (m := re.match(rf"{prefix}\.(\d+)\.", key))})


def _expected(state: State) -> dict[str, str]:
    """Name -> shape of every tensor of the parts that the state has: encoder, decoder, fc_norm in place of norm, head."""
    host = family(state)
    parts = {key.split(".")[0] for key in state}
    decoder, pooled = any(map(DECODER.fullmatch, parts)), "fc_norm" in parts
    absent = {"norm"} if pooled else {"fc_norm"}
    absent |= {"head"} - parts
    expected: dict[str, str] = {}
    for name, _, shape, hosts in RULES:
        part = name.split(".")[0]
        pretraining = DECODER.fullmatch(part) or FUSION.fullmatch(name)
        if host in hosts and part not in absent and (decoder or part in parts or not pretraining):
            count = max(1, _depth(state, part)) if "N" in name else 1
            if part == "proj_layers" and "proj_weights" in state:
                count = state["proj_weights"].numel() - 1
            expected |= {name.replace("N", str(n)): shape for n in range(count)}
    return expected


def _misshaped(state: State, expected: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Name and complaint; the first tensor that has a letter in its shape decides what it stands for."""
    sizes = {str(n): n for n in range(1, 6)}
    for name in (name for name in expected if name in state):
        shape, factors = list(state[name].shape), expected[name].split()
        if len(shape) == len(factors):
            sizes = dict(zip(factors, shape, strict=True)) | sizes
        wanted = [math.prod(sizes[c] for c in x) if sizes.keys() >= set(x) else x for x in factors]
        if len(shape) != len(wanted) or any(n != m for n, m in zip(shape, wanted, strict=True) if isinstance(m, int)):
            yield name, f"is {shape}, expected [{', '.join(map(str, wanted))}]"


def architecture(state: State) -> dict[str, Any]:
    """Sizes that a checked state in facebookresearch/mae's names implies; heads leave no trace in it."""
    tokens, width = state["pos_embed"].shape[1:]
    host = family(state)
    stages = ("1", "2", "3") if host == "convvit" else ("",)
    kernels = [state[f"patch_embed{stage}.proj.weight"] for stage in stages]
    widths, depths = tuple(map(len, kernels)), tuple(_depth(state, f"blocks{stage}") for stage in stages)
    sizes = {
        "family": host,
        "embed_dim": widths if host == "convvit" else width,
        "depth": depths if host == "convvit" else depths[0],
        "patch_size": math.prod(kernel.shape[-1] for kernel in kernels),
        "in_chans": kernels[0].shape[1],
        "mlp_ratio": state[f"blocks{stages[-1]}.0.mlp.fc1.weight"].shape[0] / width,
        "num_patches": tokens - ("cls_token" in state),
        "class_token": "cls_token" in state,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "pooled": "fc_norm.weight" in state,
    }
    if "mask_token" in state:
        sizes |= {"decoder_dim": state["mask_token"].shape[-1], "decoder_depth": _depth(state, "decoder_blocks")}
    return sizes


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


def _read(path: Path) -> Any:
    """The file's content with nothing executed: objects on the allow-list are empty shells, others are an error."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint file in it")
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if head.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint: download the file itself")
    with _explained(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # timm brings it; no other format needs it

            return load_file(path)
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    strangers = sorted(name for name in asked if name != "argparse.Namespace" and not INERT.fullmatch(name))
    if strangers:
        raise _refusal(path, strangers)
    shells = [(_Inert, name) for name in asked if name != "argparse.Namespace"]
    with _explained(path), torch.serialization.safe_globals([argparse.Namespace, *shells]):
        return torch.load(path, map_location="cpu", weights_only=True)


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


def load(path: str | os.PathLike) -> Weights:
    """Weights of a checkpoint of PixMIM, facebookresearch/mae and long_seq_mae, ConvMAE, mmselfsup / mmcls / mmpretrain or timm.

    FileNotFoundError, or ValueError with the file, what was found in it (all unknown, missing and mis-shaped keys) and
    the remedy.
    """
    path = Path(path)
    content = _read(path)
    box = content if isinstance(content, dict) else {}
    state = next((box[key] for key in ("model", "state_dict") if isinstance(box.get(key), dict)), box)
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = f"a dict of {', '.join(map(str, box))}" if box else f"a {type(content).__name__}"
        raise ValueError(f'{path} holds {found[:200]}: expected tensors by name, bare or under "model" or "state_dict"')
    for prefix in ("module.", "_orig_mod."):  # DistributedDataParallel, torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if str(box.get("format", "")).startswith("pixmim"):
        source = "pixmim"
    elif any(key.startswith("backbone.") for key in state):
        source = "mm"
    else:
        source = "mae" if "model" in box or "mask_token" in state else "timm"
    args = box.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    state, dropped = _fold_batch_norm(_join_qkv_bias(state))
    dropped += [key for key in state if DROPPED.fullmatch(key)]
    state = {key: value for key, value in state.items() if key not in dropped}
    if source != "pixmim" or family(state):  # a run's own host without rules is left to its model to check
        state = _map(path, state, source)
    return Weights(state, args if isinstance(args, dict) else {}, source, dropped)


def _map(path: Path, state: State, source: str) -> State:
    """State in facebookresearch/mae's names; ValueError if it is not, key for key, what the tables describe."""
    column = "mm" if source == "mm" else "mae"
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
            "expected PixMIM, MAE, ConvMAE, mmselfsup, mmpretrain or timm's ViT"
        )
    mapped = {name: state[key] for name, key in native.items()}
    expected = _expected(mapped)
    problems = {
        "unknown": unknown + [native[name] for name in mapped if name not in expected],
        "missing": [str(rename(name, "mae", column)) for name in expected if name not in mapped],
        "mis-shaped": [f"{native[name]} {complaint}" for name, complaint in _misshaped(mapped, expected)],
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{path} (read as {source}) is not what convert.RULES describe: {lists}")
    return mapped


ENTRIES = {  # width -> timm's entry point, its patch, depth and heads
    192: ("vit_tiny_patch16_224", 16, 12, 3),
    384: ("vit_small_patch16_224", 16, 12, 6),
    768: ("vit_base_patch16_224", 16, 12, 12),
    1024: ("vit_large_patch16_224", 16, 24, 16),
    1280: ("vit_huge_patch14_224", 14, 32, 16),
}


def _img_size(sizes: dict[str, Any], args: dict[str, Any], stride: int = 1) -> str:
    """Image size / stride, as code: the run's size if it fits the position embedding, else the square that does."""
    patch, side = sizes["patch_size"], math.isqrt(sizes["num_patches"])
    said = args.get("input_size")
    height, width = (said * 2)[:2] if isinstance(said, list | tuple) and said else (said, said)
    if not isinstance(height, int) or (height // patch) * (width // patch) != sizes["num_patches"]:
        if side**2 != sizes["num_patches"]:
            return "(HEIGHT, WIDTH)"  # the file does not say which
        height = width = side * patch
    return str(height // stride) if height == width else f"({height // stride}, {width // stride})"


def _convmae_usage(weights: Weights, out: str | os.PathLike) -> str:
    """The line that loads the file in Alpha-VL/ConvMAE."""
    sizes = architecture(weights.state)
    first = sizes["patch_size"] // 4
    sides = [_img_size(sizes, weights.args, stride) for stride in (1, first, 2 * first)]
    options = {
        "img_size": f"[{', '.join(sides)}]",
        "patch_size": [first, 2, 2],
        "in_chans": sizes["in_chans"],
        "embed_dim": [*sizes["embed_dim"]],
        "depth": [*sizes["depth"]],
        "num_heads": max(1, sizes["embed_dim"][-1] // 64),
        "mlp_ratio": [4, 4, 4],
    }
    if "decoder_dim" in sizes:
        home = "models_convmae.MaskedAutoencoderConvViT"
        options |= _decoder_options(weights)
        if not sides[0].isdecimal():
            return "none: Alpha-VL/ConvMAE pre-trains squares alone; its models_convvit takes the encoder"
    else:
        home = "models_convvit.ConvViT"
        pooled = sizes["pooled"] or sizes["num_classes"] > 0  # to_mae gives a probe its fc_norm
        options |= {"num_classes": sizes["num_classes"], "global_pool": pooled, "qkv_bias": True}
    return _load_line(home, options, out)


def decoder_heads(weights: Weights) -> int:
    """As the run that wrote the file says, else 32 wide each, as MAE's and LSMAE's are."""
    return weights.args.get("decoder_heads") or max(1, weights.state["mask_token"].shape[-1] // 32)


def _decoder_options(weights: Weights) -> dict[str, Any]:
    sizes = architecture(weights.state)
    return {
        "decoder_embed_dim": sizes["decoder_dim"],
        "decoder_depth": sizes["decoder_depth"],
        "decoder_num_heads": decoder_heads(weights),
    }


def _load_line(home: str, options: dict[str, Any], out: str | os.PathLike) -> str:
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    model = f"{home}({given}, norm_layer=partial(nn.LayerNorm, eps=1e-6))"
    return f"{model}.load_state_dict(torch.load('{out}', weights_only=True)['model'])"


def usage(weights: Weights, target: str, out: str | os.PathLike) -> str:
    """The line that loads the converted file in its home: timm, mmpretrain, facebookresearch/mae or Alpha-VL/ConvMAE."""
    host = family(weights.state)
    if host is None:
        stranger = next(key for key in weights.state if rename(key, "mae", "mae") is None)
        raise ValueError(f"no rule knows {stranger}: add the host's tensors to convert.RULES, or use the file as it is")
    if target not in HOMES[host]:
        raise ValueError(f"--to {target} has no place for a {host}: use --to {' or '.join(HOMES[host])}")
    if target == "mmpretrain":
        init = {"type": "Pretrained", "checkpoint": out, "prefix": "backbone."}
        return f"--cfg-options {' '.join(f'model.backbone.init_cfg.{key}={value}' for key, value in init.items())}"
    if host == "convvit":
        return _convmae_usage(weights, out)
    sizes = architecture(weights.state)
    entry, patch, depth, heads = ENTRIES.get(sizes["embed_dim"], ENTRIES[768])
    usual = {"img_size": "224", "patch_size": patch, "depth": depth, "num_heads": heads, "in_chans": 3, "mlp_ratio": 4}
    if sizes["embed_dim"] not in ENTRIES:
        heads = max(1, sizes["embed_dim"] // 64)  # no file tells; 64 wide each, as most ViTs have them
        usual["embed_dim"] = 768
    options = {key: sizes.get(key) for key in usual}
    options |= {"img_size": _img_size(sizes, weights.args), "num_heads": heads}
    classifier = {"num_classes": sizes["num_classes"]}
    mean_of_normed = sizes["num_classes"] and not sizes["pooled"] and weights.args.get("pool") == "mean"
    if target == "timm":
        options = {key: value for key, value in options.items() if value != usual[key]} | classifier
        options |= {"global_pool": "'avg'"} if sizes["pooled"] or mean_of_normed else {}
        options |= {"fc_norm": False} if mean_of_normed else {}
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        return f"timm.create_model('{entry}', {given}, checkpoint_path='{out}')"
    if mean_of_normed:
        raise ValueError("no model of facebookresearch/mae averages patches after the final norm: use --to timm")
    options["embed_dim"] = sizes["embed_dim"]
    if "decoder_dim" in sizes:
        return _load_line("models_mae.MaskedAutoencoderViT", options | _decoder_options(weights), out)
    options |= classifier | {"global_pool": sizes["pooled"], "qkv_bias": True}
    return _load_line("models_vit.VisionTransformer", options, out)


def convert(source: Path, out: Path, target: str) -> str:
    """Write `out`, a file of tensors only, in the format of `target`; returns the report."""
    if source.resolve() == out.resolve():
        raise ValueError(f"OUT is IN ({out}): choose another name, the original is not overwritten")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: it must be a file in an existing folder")
    weights = load(source)
    line = usage(weights, target, out)
    state = {"timm": to_timm, "mae": to_mae, "mmpretrain": to_mm}[target](weights.state)
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}  # of a view, only what it shows
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        wrapped = {"timm": state, "mae": {"model": state}, "mmpretrain": {"state_dict": state, "meta": {}}}
        torch.save(wrapped[target], temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    dropped = [*weights.dropped]
    if target != "mmpretrain":  # there, everything stays, under other names
        gone = [key for key in weights.state if key not in state]
        decoder = sum(1 for key in gone if DECODER.fullmatch(key))
        dropped += [f"mask_token and decoder_* ({decoder} keys)"] if decoder else []
        dropped += [key for key in gone if not DECODER.fullmatch(key)]
    return (
        f"read     {source}: {weights.source}, {len(weights.state)} keys mapped\n"
        f"dropped  {', '.join(dropped) or 'nothing'}\n"
        f"wrote    {out}: {target}, {len(state)} keys\n"
        f"load it  {line}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m util.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("IN", type=Path, help="checkpoint of PixMIM, MAE, ConvMAE, mmselfsup / mmpretrain or timm")
    parser.add_argument("OUT", type=Path, help="file to write")
    parser.add_argument(
        "--to",
        choices=["timm", "mae", "mmpretrain"],
        default="timm",
        help="format (default: %(default)s); mae is Alpha-VL/ConvMAE's as well",
    )
    args = parser.parse_args()
    try:
        print(convert(args.IN, args.OUT, args.to))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
