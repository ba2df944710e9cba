"""Configuration files of timm and transformers folders."""

from typing import Any

from util.args import channel_statistics, default_crop_pct
from util.formats.resize import known_size, square_side
from util.formats.weights import HEADS, Weights

EPS = 1e-6  # of every LayerNorm; transformers' default is 1e-12, mmsegmentation's 1e-5
ENTRIES = {  # width -> timm's entry point, its patch size and depth
    192: ("vit_tiny_patch16_224", 16, 12),
    384: ("vit_small_patch16_224", 16, 12),
    768: ("vit_base_patch16_224", 16, 12),
    1024: ("vit_large_patch16_224", 16, 24),
    1280: ("vit_huge_patch14_224", 14, 32),
}


def timm_model(weights: Weights) -> tuple[str, dict[str, Any]]:
    """(timm's entry point, options of create_model that differ from its defaults)."""
    width = weights.embed_dim if weights.embed_dim in ENTRIES else 768
    entry, patch, depth = ENTRIES[width]
    usual = {"input_size": (224, 224), "patch_size": patch, "depth": depth, "num_heads": HEADS[width]}
    usual |= {"in_chans": 3, "mlp_ratio": 4, "embed_dim": width}
    names = {"input_size": "img_size"}
    options = {names.get(key, key): x for key, usually in usual.items() if (x := getattr(weights, key)) != usually}
    options |= {"reg_tokens": weights.class_tokens - 1} if weights.class_tokens > 1 else {}
    options |= {"num_classes": weights.num_classes}
    options |= {"global_pool": "avg"} if weights.pooled or weights.averages_normed else {}
    return entry, options | ({"fc_norm": False} if weights.averages_normed else {})


def _labels(weights: Weights) -> list[str] | None:
    names = weights.classes
    return [str(x) for x in names] if isinstance(names, list) and len(names) == weights.num_classes else None


def _statistics(weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel. Default: ImageNet's for 3 channels; ValueError for other numbers of channels."""
    try:
        return channel_statistics(weights.in_chans, weights.mean, weights.std)
    except ValueError as error:
        lacks = f"the file lacks mean and std of its {weights.in_chans} channels"
        raise ValueError(f"--folder, --to hf: {lacks}; convert to a format without folder") from error


def timm_config(weights: Weights) -> dict[str, Any]:
    """config.json of a timm folder: model and preprocessing."""
    size = known_size(weights)
    entry, options = timm_model(weights)
    mean, std = _statistics(weights)
    config = {
        "architecture": entry, "num_classes": weights.num_classes, "num_features": weights.embed_dim,
        "global_pool": options.get("global_pool", "token"),
        "model_args": {key: x for key, x in options.items() if key != "num_classes"},  # transformers passes its own
        "pretrained_cfg": {
            "num_classes": weights.num_classes, "input_size": [weights.in_chans, *size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": weights.crop_pct or default_crop_pct(size), "crop_mode": "center",
            "mean": mean, "std": std, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    names = _labels(weights)
    return config | ({"label_names": names} if names else {})


def hf_config(weights: Weights) -> dict[str, Any]:
    """config.json of a transformers folder. transformers' defaults (eps 1e-12, loss of raw pixels) are not MAE's."""
    size = known_size(weights)
    config = {
        "hidden_size": weights.embed_dim, "num_hidden_layers": weights.depth, "num_attention_heads": weights.num_heads,
        "intermediate_size": round(weights.mlp_ratio * weights.embed_dim), "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": EPS,
        "image_size": size[0] if size[0] == size[1] else [*size], "patch_size": weights.patch_size,
        "num_channels": weights.in_chans, "qkv_bias": True,
    }  # fmt: skip
    if weights.decoder_dim:
        ours = ("mask_unit", "lowpass_radius", "lowpass")  # transformers ignores them
        config |= {key: value for key, value in weights.settings.items() if key in ours}
        return config | {
            "model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"],
            "image_size": square_side(weights, "transformers' ViTMAE"), "decoder_hidden_size": weights.decoder_dim,
            "decoder_num_hidden_layers": weights.decoder_depth, "decoder_num_attention_heads": weights.decoder_heads,
            "decoder_intermediate_size": len(weights.state["decoder_blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": weights.norm_pix_loss is not False,
            "mask_ratio": 0.75 if weights.mask_ratio is None else weights.mask_ratio,
        }  # fmt: skip
    if weights.class_tokens > 1:
        own = {"n_cls_tokens": weights.class_tokens, "mlp_ratio": round(weights.mlp_ratio)}
        return config | own | {"model_type": "pixio", "architectures": ["PixioModel"]}
    config |= {"model_type": "vit", "architectures": ["ViTModel"], "encoder_stride": weights.patch_size}
    if weights.num_classes:
        names = _labels(weights) or [f"LABEL_{i}" for i in range(weights.num_classes)]
        config |= {"architectures": ["ViTForImageClassification"], "id2label": dict(enumerate(names))}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def hf_processor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json: bicubic resize of the short side, then a centre crop."""
    side = square_side(weights, "a preprocessor of transformers")
    mean, std = _statistics(weights)
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": int(side / (weights.crop_pct or default_crop_pct((side, side))))},
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
