"""Commands that load a converted file."""

import shlex
from pathlib import Path
from typing import Any

from util.formats.configs import hf_config, timm_model
from util.formats.onnx import output_names
from util.formats.resize import square_side
from util.formats.weights import Weights
from util.formats.write import select_tensors


def _format_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


class Expression(str):
    """Python source text; its repr has no quotes."""

    def __repr__(self) -> str:
        return str(self)


def _size_code(weights: Weights, stride: int = 1) -> Expression:
    size = weights.input_size
    if size is None:
        return Expression("(HEIGHT, WIDTH)")
    height, width = (side // stride for side in size)
    return Expression(height if height == width else f"({height}, {width})")


def _timm_line(weights: Weights, out: Path | str) -> str:
    entry, options = timm_model(weights)
    if "img_size" in options:
        options["img_size"] = _size_code(weights)
    return f"timm.create_model('{entry}', {_format_options(options)}, checkpoint_path='{out}')"


def _decoder_options(weights: Weights) -> dict[str, Any]:
    sizes = {"decoder_embed_dim": weights.decoder_dim, "decoder_depth": weights.decoder_depth}
    return sizes | {"decoder_num_heads": weights.decoder_heads}


def _load_line(constructor: str, options: dict[str, Any], out: Path | str) -> str:
    model = f"{constructor}({_format_options(options)}, norm_layer=partial(nn.LayerNorm, eps=1e-6))"
    return f"{model}.load_state_dict(torch.load('{out}', weights_only=True)['model'])"


def _mae_line(weights: Weights, out: Path | str) -> str:
    sizes = ("patch_size", "depth", "num_heads", "in_chans", "mlp_ratio", "embed_dim")
    options = {"img_size": _size_code(weights)} | {key: getattr(weights, key) for key in sizes}
    if weights.fuse_levels:
        options |= _decoder_options(weights) | {"weight_fm": True, "use_input": True}
        return _load_line("models_cross.MaskedAutoencoderViT", options, out)
    if weights.decoder_dim:
        return _load_line("models_mae.MaskedAutoencoderViT", options | _decoder_options(weights), out)
    options |= {"num_classes": weights.num_classes, "global_pool": weights.pooled, "qkv_bias": True}
    return _load_line("models_vit.VisionTransformer", options, out)


def _convmae_line(weights: Weights, out: Path | str) -> str:
    first = weights.patch_size // 4
    options = {
        "img_size": [_size_code(weights, stride) for stride in (1, first, 2 * first)], "patch_size": [first, 2, 2],
        "in_chans": weights.in_chans, "embed_dim": [*weights.embed_dim], "depth": [*weights.depth],
        "num_heads": weights.num_heads, "mlp_ratio": [4, 4, 4],
    }  # fmt: skip
    if weights.decoder_dim:
        if not options["img_size"][0].isdecimal():
            return "none: Alpha-VL/ConvMAE pre-trains on square images only; models_convvit loads the encoder"
        return _load_line("models_convmae.MaskedAutoencoderConvViT", options | _decoder_options(weights), out)
    pooled = weights.pooled or weights.num_classes > 0  # to_mae adds fc_norm to a probe
    options |= {"num_classes": weights.num_classes, "global_pool": pooled, "qkv_bias": True}
    return _load_line("models_convvit.ConvViT", options, out)


def _mm_options(weights: Weights) -> list[str]:
    """Config overrides for an OpenMMLab backbone that is not a ViT-B/16."""
    names = {"embed_dim": "embed_dims", "depth": "num_layers", "patch_size": "patch_size", "in_chans": "in_channels"}
    usual = {"embed_dim": 768, "depth": 12, "patch_size": 16, "in_chans": 3, "num_heads": 12, "mlp_ratio": 4}
    own = {key: getattr(weights, key) for key in usual}
    return [f"model.backbone.{names.get(key, key)}={own[key]}" for key in usual if own[key] != usual[key]]


def _pyramid_options(patch: int) -> dict[str, str]:
    """Config overrides of ViTDet's Mask R-CNN for its pyramid, p2 - p5 at patch size 16 and p1 - p4 at 8."""
    if patch == 16:
        return {}
    if patch != 8:
        raise ValueError(f"--to detectron2: the pyramid of ViTDet needs patch size 16 or 8, not {patch}; use --to timm")
    names, scales = "[p1,p2,p3,p4]", "[0.5,0.25,0.125,0.0625]"
    options = {"backbone.top_block": "null", "proposal_generator.in_features": names}
    generator = "proposal_generator.anchor_generator"
    options |= {f"{generator}.sizes": "[[16],[32],[64],[128]]", f"{generator}.strides": "[2,4,8,16]"}
    for head in ("box", "mask"):
        options |= {f"roi_heads.{head}_in_features": names, f"roi_heads.{head}_pooler.scales": scales}
    return options


def _detectron2_line(weights: Weights, out: Path | str) -> str:
    usual = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4}
    options: dict[str, Any] = {"pretrain_img_size": square_side(weights, "ViTDet")}
    options |= {key: getattr(weights, key) for key, value in usual.items() if getattr(weights, key) != value}
    options = {f"backbone.net.{key}": value for key, value in options.items()} | _pyramid_options(weights.patch_size)
    checkpoint = f'train.init_checkpoint="{Path(out).resolve()}?matching_heuristics=True"'  # hydra requires the quotes
    return shlex.join([checkpoint, *(f"model.{key}={value}" for key, value in options.items())])


def load_command(
    weights: Weights, target: str, out: Path | str, folder: bool = False, encoder_only: bool = False, backbone="MAE"
) -> str:
    """Python expression or config overrides that load `out`; ValueError if the format cannot hold the weights."""
    host, weights = weights.family, weights.with_state(select_tensors(weights, target, encoder_only))
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
        return f"onnxruntime.InferenceSession('{out}').run({output_names(weights)}, {{'images': images}})"
    if target == "mmseg":
        # the defaults are False and 0.1
        own = "patch_bias=True" if backbone == "VisionTransformer" else "init_values=1.0"
        checkpoint = shlex.quote(f"model.pretrained={Path(out).resolve()}")
        return " ".join(["--cfg-options", checkpoint, f"model.backbone.{own}", *_mm_options(weights)])
    init = {"type": "Pretrained", "checkpoint": Path(out).resolve(), "prefix": "backbone."}
    return shlex.join(["--cfg-options", *(f"model.backbone.init_cfg.{key}={value}" for key, value in init.items())])
