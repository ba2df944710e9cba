"""The line of code or the overrides that load a converted file."""

import shlex
from pathlib import Path
from typing import Any

from util.formats.configs import hf_config, timm_model
from util.formats.keys import Weights, architecture, decoder_heads, family
from util.formats.onnx import _outputs
from util.formats.resize import encoder_heads, image_size, square_side
from util.formats.write import select_tensors


def _given(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


class Code(str):
    """Text that stands for itself in a line of Python."""

    def __repr__(self) -> str:
        return str(self)


def _size_code(weights: Weights, stride: int = 1) -> Code:
    size = image_size(weights)
    if size is None:
        return Code("(HEIGHT, WIDTH)")
    height, width = (side // stride for side in size)
    return Code(height if height == width else f"({height}, {width})")


def _timm_line(weights: Weights, out: Path | str) -> str:
    entry, options = timm_model(weights)
    if "img_size" in options:
        options["img_size"] = _size_code(weights)
    return f"timm.create_model('{entry}', {_given(options)}, checkpoint_path='{out}')"


def _decoder_options(weights: Weights) -> dict[str, Any]:
    sizes = architecture(weights.state)
    return {
        "decoder_embed_dim": sizes["decoder_dim"],
        "decoder_depth": sizes["decoder_depth"],
        "decoder_num_heads": decoder_heads(weights),
    }


def _load_line(home: str, options: dict[str, Any], out: Path | str) -> str:
    model = f"{home}({_given(options)}, norm_layer=partial(nn.LayerNorm, eps=1e-6))"
    return f"{model}.load_state_dict(torch.load('{out}', weights_only=True)['model'])"


def _mae_line(weights: Weights, out: Path | str) -> str:
    sizes = architecture(weights.state)
    options = {"img_size": _size_code(weights)} | {key: sizes[key] for key in ("patch_size", "depth")}
    options |= {"num_heads": encoder_heads(weights)} | {
        key: sizes[key] for key in ("in_chans", "mlp_ratio", "embed_dim")
    }
    if "decoder_dim" in sizes:
        return _load_line("models_mae.MaskedAutoencoderViT", options | _decoder_options(weights), out)
    options |= {"num_classes": sizes["num_classes"], "global_pool": sizes["pooled"], "qkv_bias": True}
    return _load_line("models_vit.VisionTransformer", options, out)


def _convmae_line(weights: Weights, out: Path | str) -> str:
    """The line that loads the file in Alpha-VL/ConvMAE."""
    sizes = architecture(weights.state)
    first = sizes["patch_size"] // 4
    options = {
        "img_size": [_size_code(weights, stride) for stride in (1, first, 2 * first)],
        "patch_size": [first, 2, 2],
        "in_chans": sizes["in_chans"],
        "embed_dim": [*sizes["embed_dim"]],
        "depth": [*sizes["depth"]],
        "num_heads": max(1, sizes["embed_dim"][-1] // 64),
        "mlp_ratio": [4, 4, 4],
    }
    if "decoder_dim" in sizes:
        if not options["img_size"][0].isdecimal():
            return "none: Alpha-VL/ConvMAE pre-trains squares alone; its models_convvit takes the encoder"
        return _load_line("models_convmae.MaskedAutoencoderConvViT", options | _decoder_options(weights), out)
    pooled = sizes["pooled"] or sizes["num_classes"] > 0  # to_mae gives a probe its fc_norm
    options |= {"num_classes": sizes["num_classes"], "global_pool": pooled, "qkv_bias": True}
    return _load_line("models_convvit.ConvViT", options, out)


def _mm_options(weights: Weights) -> list[str]:
    """Overrides of a backbone of OpenMMLab that is no ViT-B/16."""
    sizes = architecture(weights.state)
    names = {"embed_dim": "embed_dims", "depth": "num_layers", "patch_size": "patch_size", "in_chans": "in_channels"}
    usual = {"embed_dim": 768, "depth": 12, "patch_size": 16, "in_chans": 3, "num_heads": 12, "mlp_ratio": 4}
    sizes |= {"num_heads": encoder_heads(weights)}
    return [f"model.backbone.{names.get(key, key)}={sizes[key]}" for key, value in usual.items() if sizes[key] != value]


def _detectron2_line(weights: Weights, out: Path | str) -> str:
    sizes = architecture(weights.state) | {"num_heads": encoder_heads(weights)}
    usual = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4}
    options = {"pretrain_img_size": square_side(weights, "ViTDet")}
    options |= {key: sizes[key] for key, value in usual.items() if sizes[key] != value}
    checkpoint = f'train.init_checkpoint="{Path(out).resolve()}?matching_heuristics=True"'  # hydra wants the quotes
    return " ".join([shlex.quote(checkpoint), *(f"model.backbone.net.{key}={value}" for key, value in options.items())])


def load_command(
    weights: Weights,
    target: str,
    out: Path | str,
    folder: bool = False,
    encoder_only: bool = False,
    backbone: str = "MAE",
) -> str:
    """The line that loads the file or folder `out` in its home; ValueError if that has no place for it."""
    host, weights = family(weights.state), weights._replace(state=select_tensors(weights, target, encoder_only))
    if target == "timm":
        return f"timm.create_model('local-dir:{out}', pretrained=True)" if folder else _timm_line(weights, out)
    if target == "mae":
        return _convmae_line(weights, out) if host == "convvit" else _mae_line(weights, out)
    if target == "hf":
        kind = hf_config(weights)["architectures"][0]
        bare = ", add_pooling_layer=False" if kind == "ViTModel" else ""
        return f"transformers.{kind}.from_pretrained('{out}'{bare})"
    if target == "detectron2":
        return _detectron2_line(weights, out)
    if target == "onnx":
        return f"onnxruntime.InferenceSession('{out}').run({_outputs(weights)}, {{'images': images}})"
    if target == "mmseg":
        own = "patch_bias=True" if backbone == "VisionTransformer" else "init_values=1.0"  # False and 0.1 by default
        checkpoint = shlex.quote(f"model.pretrained={Path(out).resolve()}")
        return " ".join(["--cfg-options", checkpoint, f"model.backbone.{own}", *_mm_options(weights)])
    init = {"type": "Pretrained", "checkpoint": out, "prefix": "backbone."}
    return f"--cfg-options {' '.join(f'model.backbone.init_cfg.{key}={value}' for key, value in init.items())}"
