"""Weights in the files of other people's repositories, and the lines that load them there."""

import math
import os
from typing import Any

from util.names import HOMES, Weights, architecture, decoder_heads, family, rename

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
        raise ValueError(f"no rule knows {stranger}: add the host's tensors to names.RULES, or use the file as it is")
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
