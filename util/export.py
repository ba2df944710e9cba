"""Weights in the files of other people's repositories, and the lines that load them there."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.args import channel_statistics
from util.names import (
    HOMES,
    State,
    Weights,
    architecture,
    decoder_heads,
    family,
    rename,
    to_hf,
    to_mae,
    to_mm,
    to_mmseg,
    to_timm,
)

EPS = 1e-6  # of every LayerNorm; transformers' default is 1e-12, mmsegmentation's 1e-5
ENTRIES = {  # width -> timm's entry point, its patch, depth and heads
    192: ("vit_tiny_patch16_224", 16, 12, 3),
    384: ("vit_small_patch16_224", 16, 12, 6),
    768: ("vit_base_patch16_224", 16, 12, 12),
    1024: ("vit_large_patch16_224", 16, 24, 16),
    1280: ("vit_huge_patch14_224", 14, 32, 16),
}
WHY = {
    "convvit": "they have no convolution stages below their ViT",
    "mff_vit": "it has none for the fused layers, without which the decoder is worth nothing",
}
PYRAMID = 256  # width of the norms of Detectron2's feature pyramid


# ---------------------------------------------------------------------------------------------------------------- sizes


def image_size(weights: Weights) -> tuple[int, int] | None:
    """(H, W) of the run if it fits the position embedding, else of the square that does; None if the file does not say."""
    sizes = architecture(weights.state)
    patch, side = sizes["patch_size"], math.isqrt(sizes["num_patches"])
    said = weights.args.get("input_size")
    height, width = (said * 2)[:2] if isinstance(said, list | tuple) and said else (said, said)
    fits = isinstance(height, int) and isinstance(width, int)
    if fits and (height // patch) * (width // patch) == sizes["num_patches"]:
        return height, width
    return (side * patch, side * patch) if side**2 == sizes["num_patches"] else None


def known_size(weights: Weights) -> tuple[int, int]:
    """`image_size`, which must be known."""
    size = image_size(weights)
    if size is None:
        patches = architecture(weights.state)["num_patches"]
        raise ValueError(
            f"--input_size is needed: {patches} patches are no square, and the file does not say which shape"
        )
    return size


def square(weights: Weights, whose: str) -> int:
    """Side of the image, which must be a square."""
    height, width = known_size(weights)
    if height != width:
        raise ValueError(f"--input_size {min(height, width)} is needed: {whose} takes squares, not {height} x {width}")
    return height


def resample(embed: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Position embedding (1, prefix + L, D) of another grid, bicubic without antialiasing as facebookresearch/mae.

    timm's resample_abs_pos_embed returns a 2 x 8 grid as it is when 4 x 4 is wanted.
    """
    prefix, patches = embed[:, :num_prefix_tokens], embed[:, num_prefix_tokens:]
    patches = F.interpolate(patches.mT.unflatten(2, old), new, mode="bicubic").flatten(2).mT
    return torch.cat([prefix, patches], dim=1)


def resized(weights: Weights, size: tuple[int, int]) -> Weights:
    """The weights for images of (H, W); the grid changes, the patch does not."""
    sizes = architecture(weights.state)
    patch, prefix = sizes["patch_size"], int(sizes["class_token"])
    if any(side % patch for side in size):
        raise ValueError(f"--input_size {size[0]} {size[1]} is not a multiple of the patch size {patch}")
    new = (size[0] // patch, size[1] // patch)
    state = dict(weights.state)
    known = image_size(weights) or (size if new[0] * new[1] == sizes["num_patches"] else known_size(weights))
    old = (known[0] // patch, known[1] // patch)
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        if old != new:
            state[name] = resample(state[name].float(), old, new, prefix).to(state[name].dtype)
    return weights._replace(state=state, args=weights.args | {"input_size": [*size]})


def encoder_heads(weights: Weights) -> int:
    """As the file says, else as published for this width, else 64 wide each."""
    width = architecture(weights.state)["embed_dim"]
    said = weights.args.get("num_heads")
    return said or (ENTRIES[width][3] if width in ENTRIES else max(1, width // 64))


# ------------------------------------------------------------------------------------------------- what goes into a file


def selected(weights: Weights, target: str, encoder_only: bool = False) -> State:
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


def averages_normed(weights: Weights) -> bool:
    """Whether the classifier is a probe of the mean of normalised patches."""
    return (
        "head.weight" in weights.state and "fc_norm.weight" not in weights.state and weights.args.get("pool") == "mean"
    )


def spelled(state: State, target: str, backbone: str) -> State:
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


# -------------------------------------------------------------------------------------------------------- lines and models


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


def timm_model(weights: Weights) -> tuple[str, dict[str, Any]]:
    """timm's entry point, and the options of create_model that differ from it."""
    sizes = architecture(weights.state)
    entry, patch, depth, heads = ENTRIES.get(sizes["embed_dim"], ENTRIES[768])
    usual = {
        "img_size": (224, 224),
        "patch_size": patch,
        "depth": depth,
        "num_heads": heads,
        "in_chans": 3,
        "mlp_ratio": 4,
    }
    if sizes["embed_dim"] not in ENTRIES:
        usual["embed_dim"] = 768
    options = {key: sizes.get(key) for key in usual}
    options |= {"img_size": image_size(weights), "num_heads": encoder_heads(weights)}
    options = {key: value for key, value in options.items() if value != usual[key]} | {
        "num_classes": sizes["num_classes"]
    }
    options |= {"global_pool": "avg"} if sizes["pooled"] or averages_normed(weights) else {}
    return entry, options | ({"fc_norm": False} if averages_normed(weights) else {})


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
    options = {"pretrain_img_size": square(weights, "ViTDet")}
    options |= {key: sizes[key] for key, value in usual.items() if sizes[key] != value}
    checkpoint = f'train.init_checkpoint="{Path(out).resolve()}?matching_heuristics=True"'  # hydra wants the quotes
    return " ".join([shlex.quote(checkpoint), *(f"model.backbone.net.{key}={value}" for key, value in options.items())])


def usage(
    weights: Weights,
    target: str,
    out: Path | str,
    folder: bool = False,
    encoder_only: bool = False,
    backbone: str = "MAE",
) -> str:
    """The line that loads the file or folder `out` in its home; ValueError if that has no place for it."""
    host, weights = family(weights.state), weights._replace(state=selected(weights, target, encoder_only))
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


# --------------------------------------------------------------------------------------------------- folders and graphs


def _labels(weights: Weights, count: int) -> list[str] | None:
    names = weights.args.get("classes")
    return [str(name) for name in names] if isinstance(names, list) and len(names) == count else None


def _statistics(weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the run's images, ImageNet's unless it says; ValueError if nobody knows them."""
    channels = architecture(weights.state)["in_chans"]
    try:
        return channel_statistics(channels, weights.args.get("mean"), weights.args.get("std"))
    except ValueError as error:
        raise ValueError(
            f"the file does not tell mean and std of its {channels} channels, which a folder states"
        ) from error


def timm_config(weights: Weights) -> dict[str, Any]:
    """config.json of a timm folder: which model, and how its images are prepared."""
    sizes, size = architecture(weights.state), known_size(weights)
    entry, options = timm_model(weights)
    mean, std = _statistics(weights)
    config = {
        "architecture": entry,
        "num_classes": sizes["num_classes"],
        "num_features": sizes["embed_dim"],
        "global_pool": options.get("global_pool", "token"),
        "model_args": options,
        "pretrained_cfg": {
            "num_classes": sizes["num_classes"],
            "input_size": [sizes["in_chans"], *size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    names = _labels(weights, sizes["num_classes"])
    return config | ({"label_names": names} if names else {})


def hf_config(weights: Weights) -> dict[str, Any]:
    """config.json of a transformers folder. Its own defaults, eps 1e-12 and a loss of raw pixels, are not MAE's."""
    sizes = architecture(weights.state)
    size = known_size(weights)
    config = {
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": encoder_heads(weights),
        "intermediate_size": round(sizes["mlp_ratio"] * sizes["embed_dim"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPS,
        "image_size": size[0] if size[0] == size[1] else [*size],
        "patch_size": sizes["patch_size"],
        "num_channels": sizes["in_chans"],
        "qkv_bias": True,
    }
    if "decoder_dim" in sizes:
        return config | {
            "model_type": "vit_mae",
            "architectures": ["ViTMAEForPreTraining"],
            "image_size": square(weights, "transformers' ViTMAE"),
            "decoder_hidden_size": sizes["decoder_dim"],
            "decoder_num_hidden_layers": sizes["decoder_depth"],
            "decoder_num_attention_heads": decoder_heads(weights),
            "decoder_intermediate_size": len(weights.state["decoder_blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": weights.args.get("norm_pix_loss", True),
            "mask_ratio": weights.args.get("mask_ratio", 0.75),
        }
    config |= {"model_type": "vit", "architectures": ["ViTModel"], "encoder_stride": sizes["patch_size"]}
    if sizes["num_classes"]:
        names = _labels(weights, sizes["num_classes"]) or [f"LABEL_{i}" for i in range(sizes["num_classes"])]
        config |= {"architectures": ["ViTForImageClassification"], "id2label": dict(enumerate(names))}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def hf_processor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json: the short side to 256 / 224 of the input, bicubic, and the centre of it."""
    side = square(weights, "a preprocessor of transformers")
    mean, std = _statistics(weights)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(side * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _save_folder(folder: Path, state: State, files: dict[str, dict]) -> None:
    """model.safetensors and JSON files; transformers 4.x asks for the format in the metadata."""
    from safetensors.torch import save_file  # timm brings it; no other format needs it

    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class _Features(nn.Module):
    """timm's model -> what a classifier sees (B, D), all tokens (B, T, D), and where there is a head its scores (B, K)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.model.forward_features(images)
        features = self.model.forward_head(tokens, pre_logits=True)
        return (features, tokens, self.model.head(features)) if self.model.num_classes else (features, tokens)


def _outputs(weights: Weights) -> list[str]:
    return ["features", "tokens", "logits"] if "head.weight" in weights.state else ["features", "tokens"]


def _save_onnx(path: Path, weights: Weights, state: State) -> None:
    """A graph for batches of any size."""
    size, (entry, options) = known_size(weights), timm_model(weights)
    if sum(value.nbytes for value in state.values()) > 2**31 - 2**20:
        raise ValueError("--to onnx: a graph holds less than 2 GiB: use --to timm")
    try:
        import onnxscript  # noqa: F401 - torch.onnx asks for it only after it has traced the model
        import timm
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install onnx onnxscript") from error
    model = timm.create_model(entry, **options)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    torch.onnx.export(
        _Features(model.eval()).eval(),
        (torch.zeros(2, architecture(weights.state)["in_chans"], *size),),
        path,
        input_names=["images"],
        output_names=_outputs(weights),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def save(path: Path, weights: Weights, state: State, target: str, folder: bool) -> None:
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


def push(folder: Path, name: str) -> None:
    """Upload a folder to a private repository of the Hugging Face Hub, made unless it exists."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(f"--push_to_hub {name} needs huggingface_hub: pip install huggingface_hub") from error
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network, of the hub, of the name: each library has its own
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"--push_to_hub {name}: {reason or type(error).__name__}; {folder} is written, upload it yourself"
        ) from error
