"""Tensor names of MAE, OpenMMLab and transformers side by side, and their shapes."""

import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from util.files import printable

State = dict[str, Tensor]


class Rule(NamedTuple):
    """One tensor: its name in each repository (N = number of the block), its shape, the encoders (hosts) that have it.

    D width, T tokens, C channels, P patch side, F hidden width, K classes; E, G = D, F of the decoder. ConvMAE's stages:
    widths X, Y, hidden widths U, V, strides Q, R, S. M = layers fused by MFF, I = queries of efficient probing.
    A = class tokens after the first. J, L = blocks of CrossMAE's decoder, levels of the encoder that they read.
    """

    mae: str  # facebookresearch/mae, Alpha-VL/ConvMAE, TonyLianLong/CrossMAE, timm
    mm: str | None  # mmselfsup, mmcls, mmpretrain; mmsegmentation without "backbone."
    hf: str | None  # transformers 4.x; {query,key,value} are three tensors there
    shape: str
    hosts: tuple[str, ...]


VIT, MFF, CONV = ("vit", "mff_vit"), ("mff_vit",), ("convvit",)
ALL = (*VIT, *CONV)
TENSORS = (
    Rule("cls_token", "backbone.cls_token", "vit.embeddings.cls_token", "1 1 D", VIT),
    Rule("reg_token", None, None, "1 A D", VIT),
    Rule("pos_embed", "backbone.pos_embed", "vit.embeddings.position_embeddings", "1 T D", ALL),
    Rule("mask_token", "neck.mask_token", "decoder.mask_token", "1 1 E", ALL),
    Rule("decoder_pos_embed", "neck.decoder_pos_embed", "decoder.decoder_pos_embed", "1 T E", ALL),
    Rule("proj_weights", "backbone.proj_weights", None, "M 1 1 1", MFF),
    Rule("ep.queries", None, None, "I D", ALL),  # classifiers of efficient probing
    Rule("ep.value.weight", None, None, "D D", ALL),
    Rule("wfm.linear.weight", None, None, "J L", ("vit",)),
)
LAYERS = (  # shape of the weight; the bias has the size of its first dimension
    Rule("patch_embed.proj", "backbone.patch_embed.projection", "vit.embeddings.patch_embeddings.projection", "D C P P", VIT),
    Rule("patch_embed1.proj", None, None, "X C Q Q", CONV),
    Rule("patch_embed1.norm", None, None, "X", CONV),
    Rule("patch_embed2.proj", None, None, "Y X R R", CONV),
    Rule("patch_embed2.norm", None, None, "Y", CONV),
    Rule("patch_embed3.proj", None, None, "D Y S S", CONV),
    Rule("patch_embed3.norm", None, None, "D", CONV),
    Rule("patch_embed4", None, None, "D D", CONV),
    Rule("stage1_output_decode", None, None, "D X 4 4", CONV),
    Rule("stage2_output_decode", None, None, "D Y 2 2", CONV),
    Rule("proj_layers.N", "backbone.proj_layers.N", None, "D D", MFF),
    Rule("dec_norms.N", None, None, "D", ("vit",)),
    Rule("norm", "backbone.ln1", "vit.layernorm", "D", ALL),
    Rule("fc_norm", "backbone.ln2", None, "D", ALL),
    Rule("head", "head.fc", "classifier", "K D", ALL),
    Rule("head", "head.layers.head", None, "K D", ALL),  # mmselfsup's linear probe
    Rule("decoder_embed", "neck.decoder_embed", "decoder.decoder_embed", "E D", ALL),
    Rule("decoder_norm", "neck.ln1", "decoder.decoder_norm", "E", ALL),
    Rule("decoder_pred", "neck.decoder_pred", "decoder.decoder_pred", "PPC E", VIT),
    Rule("decoder_pred", None, None, "QQRRSSC E", CONV),
)  # fmt: skip
CONV_BLOCK = (  # layers of a block in the first stage of ConvMAE
    ("norm1", "X"), ("conv1", "X X 1 1"), ("attn", "X 1 5 5"), ("conv2", "X X 1 1"),
    ("norm2", "X"), ("mlp.fc1", "U X 1 1"), ("mlp.fc2", "X U 1 1"),
)  # fmt: skip
BLOCK = (  # layers of a block
    ("norm1", "ln1", "layernorm_before", "D"),
    ("attn.qkv", "attn.qkv", "attention.attention.{query,key,value}", "3D D"),
    ("attn.proj", "attn.proj", "attention.output.dense", "D D"),
    ("norm2", "ln2", "layernorm_after", "D"),
    ("mlp.fc1", "ffn.layers.0.0", "intermediate.dense", "F D"),
    ("mlp.fc2", "ffn.layers.1", "output.dense", "D F"),
)


def _expand() -> Iterator[Rule]:
    yield from TENSORS
    decoder, second = str.maketrans("DF", "EG"), str.maketrans("XU", "YV")
    blocks = [Rule(f"blocks1.N.{layer}", None, None, shape, CONV) for layer, shape in CONV_BLOCK]
    blocks += [Rule(f"blocks2.N.{layer}", None, None, shape.translate(second), CONV) for layer, shape in CONV_BLOCK]
    cross = (("q", "E E"), ("kv", "2E D"), ("proj", "E E"))
    blocks += [Rule(f"decoder_blocks.N.cross_attn.{layer}", None, None, shape, ALL) for layer, shape in cross]
    for ours, mm, hf, shape in BLOCK:
        blocks.append(Rule(f"blocks.N.{ours}", f"backbone.layers.N.{mm}", f"vit.encoder.layer.N.{hf}", shape, VIT))
        blocks.append(Rule(f"blocks3.N.{ours}", None, None, shape, CONV))
        neck, theirs = f"neck.decoder_blocks.N.{mm}", f"decoder.decoder_layers.N.{hf}"
        blocks.append(Rule(f"decoder_blocks.N.{ours}", neck, theirs, shape.translate(decoder), ALL))
    for layer in (*LAYERS, *blocks):
        for kind, shape in (("weight", layer.shape), ("bias", layer.shape.split()[0])):
            mmpretrain, transformers = (f"{name}.{kind}" if name else None for name in (layer.mm, layer.hf))
            yield Rule(f"{layer.mae}.{kind}", mmpretrain, transformers, shape, layer.hosts)


RULES = tuple(_expand())
DROPPED = re.compile(r"target_generator\.low_pass_filter|data_preprocessor\.(mean|std)|(vit\.)?pooler\.dense\.\w+")
DECODER = re.compile(r"mask_token|decoder_.*|(wfm|dec_norms)(\..*)?")
# of MFF and ConvMAE: used in pre-training only
FUSION = re.compile(r"(proj_layers|stage[12]_output_decode)\..*|proj_weights")
THIRDS = "{query,key,value}"
FINAL_NORM = ("norm.weight", "norm.bias")
HF_NAMES = (  # transformers 5.x and models without a head -> 4.x
    (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
IN_PROJ = (  # mmpretrain, MAE of mmsegmentation -> torch's attention, as in VisionTransformer of mmsegmentation
    (".attn.qkv.", ".attn.attn.in_proj_"),
    (".attn.proj.", ".attn.attn.out_proj."),
)
FORMATS = {  # host -> the formats that can hold it
    "vit": ("timm", "mae", "mmpretrain", "hf", "mmseg", "detectron2", "onnx"),
    "mff_vit": ("timm", "mmpretrain", "hf", "mmseg", "detectron2", "onnx"),
    "convvit": ("mae",),
}


def join_names(names: list[str]) -> str:
    """The first four names and the number of the remaining ones."""
    return printable(", ".join(names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@cache
def rename(key: str, source: str, target: str) -> str | None:
    """Name in column `target` of RULES of the tensor named `key` in column `source`; None if no rule maps it."""
    for rule in RULES:
        theirs, name = getattr(rule, source), getattr(rule, target)
        match = theirs and name and re.fullmatch(re.escape(theirs).replace("N", r"(0|[1-9]\d*)"), key)
        if match:
            return name.replace("N", "".join(match.groups()))
    return None


def family(state: State) -> str | None:
    """Host, the prefix of its name in `models.ENCODERS`; None if RULES do not cover it."""
    if any(rename(key, "mae", "mae") is None for key in state):
        return None
    marks = {"patch_embed1.": "convvit", "proj_": "mff_vit"}
    return next((host for mark, host in marks.items() if any(key.startswith(mark) for key in state)), "vit")


def default_format(state: State) -> str | None:
    """Default format for a classifier of this host; None if RULES do not cover it, or for efficient probing."""
    host = family(state)
    return FORMATS[host][0] if host and "ep.queries" not in state else None


def pixmim_names(state: State) -> State:
    """State in facebookresearch/mae's names -> in names of PixMIM's modules, `encoder.*` and `decoder.*`."""
    named = {}
    for key, value in state.items():
        inner = re.sub(r"^dec(oder)?_", "", key.replace("wfm.linear.", "fusion."))
        named[f"decoder.{inner}" if DECODER.fullmatch(key) else f"encoder.{key}"] = value
    return named


def mae_names(state: State) -> State:
    """State in names of PixMIM's modules -> in facebookresearch/mae's names; the inverse of `pixmim_names`."""
    named = {}
    for key, value in state.items():
        name = re.sub(r"^(encoder|decoder(?=\.mask_token))\.", "", key.replace("decoder.fusion.", "wfm.linear."))
        named[re.sub(r"^decoder\.", "decoder_", re.sub(r"^decoder\.norms\.", "dec_norms.", name))] = value
    return named


def to_timm(state: State) -> State:
    """Encoder and classifier only, in the names of timm's VisionTransformer (ConvMAE: of its repository)."""
    return {key: value for key, value in state.items() if not DECODER.fullmatch(key) and not FUSION.fullmatch(key)}


def to_mae(state: State) -> State:
    """All tensors in the names of facebookresearch/mae, Alpha-VL/ConvMAE or CrossMAE, which has no final norm."""
    if "wfm.linear.weight" in state:
        return {key: value for key, value in state.items() if key not in FINAL_NORM}
    if family(state) != "convvit" or "head.weight" not in state or {"fc_norm.weight", "ep.queries"} & state.keys():
        return dict(state)
    width = state["head.weight"].shape[1]  # a probe of ConvMAE: in its repository the norm after pooling has parameters
    kept = {key: value for key, value in state.items() if key not in FINAL_NORM}
    return kept | {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}


def to_mm(state: State) -> State:
    """All tensors in mmpretrain's names."""
    return {str(rename(key, "mae", "mm")): value for key, value in state.items()}


def to_mmseg(state: State, backbone: str = "MAE") -> State:
    """Encoder in the names of mmsegmentation's backbone MAE or VisionTransformer."""
    named = {key.removeprefix("backbone."): value for key, value in to_mm(state).items()}
    return _replace_names(named, [(re.escape(old), new) for old, new in IN_PROJ]) if backbone != "MAE" else named


def from_mmseg(state: State) -> State:
    """State in mmsegmentation's names -> in mmpretrain's."""
    return _replace_names(state, [(r"^(?!backbone\.)", "backbone."), *((re.escape(new), old) for old, new in IN_PROJ)])


def to_hf(state: State) -> State:
    """All tensors in the names of transformers 4.x, which 5.x reads too. Class tokens are one tensor, as in its Pixio."""
    named: State = {}
    if "reg_token" in state:
        tokens = torch.cat([state["cls_token"], state["reg_token"]], dim=1)
        state = {key: value for key, value in state.items() if key != "reg_token"} | {"cls_token": tokens}
    for key, value in state.items():
        name = str(rename(key, "mae", "hf"))
        parts = value.chunk(3) if THIRDS in name else (value,)
        named |= {name.replace(THIRDS, part): x for part, x in zip(("query", "key", "value"), parts, strict=False)}
    return named


def from_hf(state: State) -> State:
    """State in names of transformers 4.x or 5.x, with or without head or decoder -> in those of column `hf` of RULES."""
    named = _replace_names(state, HF_NAMES)
    for key in [key for key in named if ".attention.attention.query." in key]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        # else reported as unknown
        if len({tuple(named[name].shape) if name in named else name for name in parts}) == 1:
            named[key.replace(".query.", f".{THIRDS}.")] = torch.cat([named.pop(name) for name in parts])
    return named


def _replace_names(state: State, replacements: Iterable[tuple[str, str]]) -> State:
    """State with patterns in its names replaced in order; a name that would occur twice is not changed."""
    named: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in replacements:
            name = re.sub(pattern, replacement, name)
        named[key if name in named or (name != key and name in state) else name] = value
    return named


def _depth(state: State, prefix: str) -> int:
    return len({m[1] for key in state if (m := re.match(rf"{prefix}\.(\d+)\.", key))})


def expected_shapes(state: State) -> dict[str, str]:
    """Name -> shape of every tensor of the parts in the state: encoder, decoder, norm or fc_norm, head."""
    host = family(state)
    parts = {key.split(".")[0] for key in state}
    cross = any(".cross_attn." in key for key in state)
    other = r"decoder_embed.*|decoder_blocks\.N\.attn.*" if cross else r".*\.cross_attn.*"  # of the other decoder
    other += "" if {"wfm", "dec_norms"} & parts else r"|(wfm|dec_norms)\..*"
    decoder, pooled = any(map(DECODER.fullmatch, parts)), "fc_norm" in parts
    absent = {"norm"} if pooled else {"fc_norm"}
    absent |= {"head", "ep", "reg_token"} - parts
    expected: dict[str, str] = {}
    for name, _, _, shape, hosts in RULES:
        part = name.split(".")[0]
        pretraining = DECODER.fullmatch(part) or FUSION.fullmatch(name)
        wanted = host in hosts and part not in absent and not re.fullmatch(other, name)
        if wanted and (decoder or part in parts or not pretraining):
            count = max(1, _depth(state, part)) if "N" in name else 1
            if part == "proj_layers" and "proj_weights" in state:
                count = state["proj_weights"].numel() - 1
            expected |= {name.replace("N", str(n)): shape for n in range(count)}
    return expected


def find_misshaped(state: State, expected: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(Name, error) of each tensor of a wrong shape; the first tensor with a letter in its shape defines its size."""
    sizes = {str(n): n for n in range(1, 6)}
    for name in (name for name in expected if name in state):
        shape, factors = list(state[name].shape), expected[name].split()
        if len(shape) == len(factors):
            sizes = dict(zip(factors, shape, strict=True)) | sizes
        expected_shape = [math.prod(sizes[c] for c in x) if sizes.keys() >= set(x) else x for x in factors]
        known = [n == m for n, m in zip(shape, expected_shape, strict=False) if isinstance(m, int)]
        if len(shape) != len(expected_shape) or not all(known):
            yield name, f"is {shape}, expected [{', '.join(map(str, expected_shape))}]"


def tensor_sizes(state: State) -> dict[str, Any]:
    """Sizes read from the shapes of a checked state in facebookresearch/mae's names; without attention heads."""
    tokens, width = state["pos_embed"].shape[1:]
    host = family(state)
    stages = ("1", "2", "3") if host == "convvit" else ("",)
    kernels = [state[f"patch_embed{stage}.proj.weight"] for stage in stages]
    class_tokens = ("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    widths, depths = tuple(map(len, kernels)), tuple(_depth(state, f"blocks{stage}") for stage in stages)
    sizes = {
        "family": host, "embed_dim": widths if host == "convvit" else width,
        "depth": depths if host == "convvit" else depths[0], "in_chans": kernels[0].shape[1],
        "patch_size": math.prod(kernel.shape[-1] for kernel in kernels), "num_patches": tokens - class_tokens,
        "mlp_ratio": state[f"blocks{stages[-1]}.0.mlp.fc1.weight"].shape[0] / width, "class_tokens": class_tokens,
        "num_classes": len(state.get("head.weight", ())), "pooled": "fc_norm.weight" in state,
    }  # fmt: skip
    if "mask_token" in state:
        cross = any(".cross_attn." in key for key in state)
        sizes |= {"decoder": "cross" if cross else "self", "fuse_levels": "wfm.linear.weight" in state}
        sizes |= {"decoder_dim": state["mask_token"].shape[-1], "decoder_depth": _depth(state, "decoder_blocks")}
    return sizes
