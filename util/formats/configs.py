"""Configuration files of timm and transformers folders."""

from typing import Any

from util.args import channel_statistics
from util.formats.keys import Weights, architecture, decoder_heads
from util.formats.resize import ENTRIES, averages_normed, encoder_heads, image_size, known_size, square_side

EPS = 1e-6  # of every LayerNorm; transformers' default is 1e-12, mmsegmentation's 1e-5


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
            "image_size": square_side(weights, "transformers' ViTMAE"),
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
    side = square_side(weights, "a preprocessor of transformers")
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
