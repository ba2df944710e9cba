"""Encoders with the weights of a checkpoint; features of images."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.args import channel_statistics
from util.data.batches import DevicePrefetcher
from util.data.transforms import Normalize
from util.dist import World, autocast
from util.files import hash_file
from util.formats.initial import adapt_channels
from util.formats.keys import join_names, to_timm
from util.formats.read import read_weights, weights_file
from util.formats.resize import resample_pos_embed
from util.formats.weights import Weights

# timm's VisionTransformer, or an encoder with its forward_features, forward_head, num_prefix_tokens, embed_dim
Encoder = Any
MODEL_FLAGS = (
    "model", "patch_size", "input_size", "in_chans", "class_tokens", "mean", "std", "crop_pct", "pool", "bands", "value_range", "alpha",
)  # fmt: skip


def read_architecture(
    args: Namespace, encoders, flags: Sequence[str] = MODEL_FLAGS
) -> tuple[Namespace, Weights | None]:
    """(Arguments with each flag in `flags` that is None read from --checkpoint, weights or None for --checkpoint none).

    Flags on the command line take precedence; another --input_size resamples the position embedding. `origin` is added: SHA-256
    of the file, its source and the arguments of the run that wrote it; None without a checkpoint.
    """
    if args.checkpoint == "none":
        if args.model is None:
            raise ValueError("--checkpoint none (an untrained encoder) requires --model")
        found: dict[str, Any] = {"input_size": (224, 224), "in_chans": 3}
        weights, file = None, args.checkpoint
    else:
        weights, file = read_file(args), str(weights_file(args.checkpoint))
        found = {name: getattr(weights, name) for name in flags}
        if args.in_chans not in (None, weights.in_chans):  # the file's statistics are those of its channels
            found |= {"mean": None, "std": None}
        # None = the model's, 1 or none
        found["class_tokens"] = weights.class_tokens if weights.class_tokens > 1 else None
        if weights.model:
            if (args.model or weights.model) not in encoders:
                raise ValueError(f"--checkpoint {args.checkpoint}: {weights.model} is unknown here; add --model")
            found["patch_size"] = weights.args.get("patch_size")  # None = the default of the model
        else:
            found["model"] = find_model(weights, args, encoders)
    filled = {name: found.get(name) for name in flags if getattr(args, name, "") is None}
    run = json.loads(json.dumps(weights.args, default=str, skipkeys=True)) if weights else {}
    origin = weights and {"sha256": hash_file(file), "source": weights.source, "args": run}
    args = Namespace(**vars(args) | filled | {"checkpoint": file, "origin": origin})
    args.mean, args.std = channel_statistics(args.in_chans, args.mean, args.std)
    return args, weights


def read_file(args: Namespace) -> Weights:
    """Weights of --checkpoint; ValueError if --patch_size or --in_chans contradicts them and no flag adapts them."""
    weights = read_weights(args.checkpoint, args.input_size, getattr(args, "use_ema", False))
    adaptable = {"patch_size": "resample_patches" in args, "in_chans": getattr(args, "init_channels", None)}
    for flag, adapts in adaptable.items():
        requested, has = getattr(args, flag), getattr(weights, flag)
        if weights.family and requested not in (None, has) and not adapts:
            remedy = ", or add --init_channels mean or cycle" if flag == "in_chans" and "init_channels" in args else ""
            raise ValueError(
                f"--{flag} {requested}: --checkpoint {args.checkpoint} has {has}; leave --{flag} out{remedy}, "
                f"or continue pre-training with it: main_pretrain.py --checkpoint (docs/continue.md)"
            )
    return weights


def find_model(weights: Weights, args: Namespace, encoders) -> str | None:
    """Name in `encoders` of the encoder of a foreign checkpoint; None if --model must name it.

    ValueError if --model or --input_size is missing, or if the number of attention heads differs.
    """
    # keywords of functools.partial
    sizes = {name: getattr(encoder, "keywords", {}) for name, encoder in encoders.items()}
    known = {(name.rpartition("_")[0], size.get("embed_dim"), size.get("depth")): name for name, size in sizes.items()}
    model = known.get((weights.family, weights.embed_dim, weights.depth))
    where = f"--checkpoint {args.checkpoint}"
    if args.model is None and model is None:
        size = f"width {weights.embed_dim} and depth {weights.depth}"
        raise ValueError(f"{where}: no --model is a {weights.family} of {size}; add --model")
    if args.input_size is None and weights.input_size is None:
        raise ValueError(f"{where}: {weights.num_patches} patches do not form a square; add --input_size H W")
    heads, expected = weights.args.get("num_heads"), sizes.get(args.model or model, {}).get("num_heads")
    if heads and expected and heads != expected:
        raise ValueError(f"{where} has {heads} attention heads, --model {args.model or model} {expected}")
    return model


def load_encoder(args: Namespace, build_encoder: Callable, weights: Weights | None, **options) -> Encoder:
    """Encoder or classifier with the weights of --checkpoint.

    fc_norm and head keep their initial values unless the checkpoint has them in the same shape. ValueError for other
    tensors that are missing, unknown or of another shape.
    """
    torch.manual_seed(args.seed)
    model = build_encoder(args, **options)
    for name in model.pretraining_only:
        delattr(model, name)
    if weights is None:
        return model
    state, own = weights.state, model.state_dict()
    if weights.in_chans not in (None, args.in_chans):
        state = adapt_channels(state, weights.in_chans, args.in_chans, args.init_channels)
    state = to_timm(state)
    size, prefix = weights.input_size, model.num_prefix_tokens
    old = weights.grid or ((size[0] // model.patch, size[1] // model.patch) if size else model.grid)
    if old != model.grid and old[0] * old[1] + prefix == state["pos_embed"].shape[1]:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], old, model.grid, prefix)
    fresh = {name for name in own if name.split(".")[0] in ("fc_norm", "head")}
    optional = ("norm", "head", "fc_norm", "ep", *model.pretraining_only)
    unused = {name for name in state if name.split(".")[0] in optional}
    problems = {
        "missing": set(own) - set(state) - fresh,
        "unknown": set(state) - set(own) - unused,
        "of another shape": {n for n in set(own) & set(state) - fresh if own[n].shape != state[n].shape},
    }
    if any(problems.values()):
        kind = weights.family or "custom encoder"
        what = "; ".join(f"{problem}: {join_names(sorted(names))}" for problem, names in problems.items() if names)
        raise ValueError(f"--checkpoint {args.checkpoint}, a {kind}, does not fit --model {args.model}: {what}")
    kept = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(own | kept)
    return model


def pooling(weights: Weights | None, pool: str | None = None) -> dict:
    """timm's options for an encoder with this `pool`; None = that of the checkpoint, else the encoder's default."""
    if weights and weights.pooled:
        if pool == "token":
            raise ValueError("--pool token: --checkpoint was fine-tuned on the mean of the patches; use --pool mean")
        return {"global_pool": "avg"}
    pool = pool or (weights.pool if weights else None)
    if pool == "mean":
        return {"global_pool": "avg", "fc_norm": False}  # the mean of a ViT's patch tokens after the final norm
    return {"global_pool": pool} if pool else {}


def pool_name(encoder: Encoder) -> str:
    """--pool of an encoder: "token" or "mean"."""
    return "token" if getattr(encoder, "global_pool", "avg") == "token" else "mean"


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """Features (B, D) of images (B, C, H, W): class token or mean of the patch tokens (see `pooling`)."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)


def is_finetuned(weights: Weights | None) -> bool:
    """Whether labels have trained the encoder: it has a head, and was not a probe of this project."""
    return bool(weights and (weights.pooled or weights.num_classes) and "probe_as" not in weights.args)


def knn_layer(weights: Weights | None, requested: str = "auto") -> str:
    """--knn_features: by default after the final norm for fine-tuned encoders, before it for masked pre-training.

    Untrained encoders and own probes, whose encoder is frozen, count as the latter. Class token of MAE ViT-B: 35.6 before
    the norm, 16.1 after it (logs of efficient-probing, arXiv:2506.10178).
    """
    return requested if requested != "auto" else "after_norm" if is_finetuned(weights) else "before_norm"


def encoder_blocks(encoder: Encoder) -> nn.Sequential:
    """Transformer blocks; of ConvMAE those of its last stage."""
    return encoder.blocks3 if hasattr(encoder, "blocks3") else encoder.blocks


def forward_blocks(encoder: Encoder, images: Tensor, layers: Iterable[int]) -> tuple[Any, dict[int, Tensor]]:
    """(Output of `forward_features`, {layer: tokens (B, prefix + L, D) after this block}) of one pass; layers count from 1."""
    tokens: dict[int, Tensor] = {}
    blocks = encoder_blocks(encoder)
    hooks = [blocks[n - 1].register_forward_hook(lambda _, __, x, n=n: tokens.__setitem__(n, x)) for n in layers]
    x = encoder.forward_features(images)
    for hook in hooks:
        hook.remove()
    return x, tokens


def pool_tokens(encoder: Encoder, tokens: Tensor, pool: str) -> Tensor:
    """Tokens (B, prefix + L, D) -> class token (mean of several) or mean of the patch tokens (B, D)."""
    prefix = encoder.num_prefix_tokens
    return (tokens[:, :prefix] if pool == "token" else tokens[:, prefix:]).mean(1)


def layer_features(encoder: Encoder, images: Tensor, layers: Sequence[str | int]) -> list[Tensor]:
    """Features (B, D) of images (B, C, H, W) in each layer, by one pass.

    "before_norm", "after_norm": of the final norm; equal if the encoder has none. n: after block n, counted from 1.
    """
    inputs: list[Tensor] = []
    norms = [getattr(encoder, name, nn.Identity()) for name in ("norm", "fc_norm")]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    hooks = [norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for norm in norms]
    x, tokens = forward_blocks(encoder, images, [layer for layer in layers if isinstance(layer, int)])
    after = encoder.forward_head(x, pre_logits=True)
    for hook in hooks:
        hook.remove()
    x = inputs[-1] if inputs else after
    before = x if x.ndim == 2 else encoder.forward_head(x, pre_logits=True)
    found: dict[str | int, Tensor] = {n: pool_tokens(encoder, x, pool_name(encoder)) for n, x in tokens.items()}
    found |= {"before_norm": before, "after_norm": after}
    return [found[layer] for layer in layers]


def encode_batches(args, world: World, encoder: Encoder, loader: DevicePrefetcher, encode: Callable) -> Iterator:
    """(float32 output of `encode(encoder, images)`, batch) for each batch of this rank."""
    normalize = Normalize(args, world.device)
    for batch in loader:
        with torch.inference_mode(), autocast(args.amp, world.device):
            x = encode(encoder, normalize(batch))
        yield x.float(), batch


@torch.no_grad()
def patch_features(encoder: Any, images: Tensor) -> Tensor:
    """Features of each patch after the final norm: (B, C, H, W) -> (B, D, h, w)."""
    x = encoder.forward_features(images)
    if isinstance(x, list):  # ConvMAE's maps
        return x[-1]
    return x[:, encoder.num_prefix_tokens :].mT.unflatten(2, encoder.grid)
