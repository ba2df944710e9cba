"""Encoders with the weights of a checkpoint, and their features."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.args import channel_statistics
from util.data.batches import DevicePrefetcher
from util.data.transforms import Normalize
from util.dist import World, autocast
from util.formats.keys import Weights, architecture, family, to_timm
from util.formats.read import read_weights, weights_file
from util.formats.resize import image_size, resample_pos_embed

# timm's VisionTransformer, or a host with its forward_features, forward_head, num_prefix_tokens, embed_dim
Encoder = Any


MODEL_FLAGS = ("model", "patch_size", "input_size", "in_chans", "mean", "std", "pool")


def own_arguments(weights: Weights | None) -> dict:
    """Arguments of the run that wrote the weights, {} unless it was one of ours."""
    return weights.args if weights and weights.source == "pixmim" else {}


def read_architecture(
    args: Namespace, encoders, flags: tuple[str, ...] = MODEL_FLAGS
) -> tuple[Namespace, Weights | None]:
    """(args with each of `flags` that is None filled from --checkpoint, its weights); none is an untrained encoder.

    Flags that were given win: another --input_size resamples the position embedding.
    """
    if args.checkpoint == "none":
        if args.model is None:
            raise ValueError("--checkpoint none is an untrained encoder; say which with --model")
        found: dict = {"input_size": (224, 224), "in_chans": 3}
        weights = None
    else:
        weights = read_weights(args.checkpoint)
        found = own_arguments(weights) or infer_architecture(weights, args, encoders)
        found = found | {"input_size": tuple(found["input_size"])}
    filled = {name: found.get(name) for name in flags if getattr(args, name, "") is None}
    file = args.checkpoint if weights is None else str(weights_file(args.checkpoint))
    args = Namespace(**vars(args) | filled | {"checkpoint": file})
    args.mean, args.std = channel_statistics(args.in_chans, args.mean, args.std)
    return args, weights


def infer_architecture(weights: Weights, args: Namespace, encoders) -> dict:
    """Model flags that the shapes of a foreign checkpoint, and the config.json beside it, tell."""
    facts = architecture(weights.state)
    family, width, depth = facts["family"], facts["embed_dim"], facts["depth"]
    sizes = {name: getattr(encoder, "keywords", {}) for name, encoder in encoders.items()}  # of partials
    known = {(name.rpartition("_")[0], size.get("embed_dim"), size.get("depth")): name for name, size in sizes.items()}
    if args.model is None and (family, width, depth) not in known:
        raise ValueError(f"--checkpoint {args.checkpoint}: no {family} here is {width} wide and {depth} deep")
    size = image_size(weights)
    if args.input_size is None and size is None:
        raise ValueError(
            f"--checkpoint {args.checkpoint}: {facts['num_patches']} patches are no square; give --input_size H W"
        )
    model = known.get((family, width, depth))
    told, own = weights.args.get("num_heads"), sizes.get(args.model or model, {}).get("num_heads")
    if told and own and told != own:
        raise ValueError(
            f"--checkpoint {args.checkpoint} has {told} attention heads, --model {args.model or model} {own}"
        )
    return {
        "model": model,
        "patch_size": facts["patch_size"],
        "input_size": size or args.input_size,
        "in_chans": facts["in_chans"],
        "mean": weights.args.get("mean"),
        "std": weights.args.get("std"),
    }


def old_grid(weights: Weights, model: Encoder) -> tuple[int, int]:
    """Grid of the weights' position embedding: that of the run or config.json, else a square, else the model's."""
    run = own_arguments(weights)
    if run:
        height, width = (side // (run["patch_size"] or model.patch) for side in run["input_size"])
        return height, width
    size = image_size(weights)
    return (size[0] // model.patch, size[1] // model.patch) if size else model.grid


def listed(names: set[str]) -> str:
    """The first of many names."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_encoder(args: Namespace, build_encoder: Callable, weights: Weights | None, **options) -> Encoder:
    """The encoder or classifier with the weights of --checkpoint; fresh is what pre-training has not: fc_norm, head."""
    torch.manual_seed(args.seed)
    model = build_encoder(args, **options)
    for name in model.pretraining_only:
        delattr(model, name)
    if weights is None:
        return model
    state, own = to_timm(weights.state), model.state_dict()
    old, prefix = old_grid(weights, model), model.num_prefix_tokens
    if old != model.grid and old[0] * old[1] + prefix == state["pos_embed"].shape[1]:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], old, model.grid, prefix)
    fresh = {name for name in own if name.split(".")[0] in ("fc_norm", "head")}
    unused = {name for name in state if name.split(".")[0] in ("norm", "head", "fc_norm", *model.pretraining_only)}
    problems = {
        "missing": set(own) - set(state) - fresh,
        "unknown": set(state) - set(own) - unused,
        "of another shape": {n for n in set(own) & set(state) - fresh if own[n].shape != state[n].shape},
    }
    if any(problems.values()):
        kind = family(weights.state) or "host without rules"
        what = "; ".join(f"{problem}: {listed(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"--checkpoint {args.checkpoint}, a {kind}, does not fit --model {args.model}: {what}")
    kept = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(own | kept)
    return model


def pooling(weights: Weights | None, pool: str | None = None) -> dict:
    """timm's options of an encoder whose feature is `pool`; None = as the weights were probed, else the encoder's own."""
    if weights and "fc_norm.weight" in weights.state:
        if pool == "token":
            raise ValueError("--pool token: --checkpoint was fine-tuned on the mean of the patches; use --pool mean")
        return {"global_pool": "avg"}
    pool = pool or own_arguments(weights).get("pool")
    if pool == "mean":
        return {"global_pool": "avg", "fc_norm": False}  # of a ViT's normalised patches
    return {"global_pool": pool} if pool else {}


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """What a classifier would see of whole images, (B, D): the class token or the mean of the patches (`pooling`)."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)


def encode_batches(args: Namespace, world: World, encoder: Encoder, loader: DataLoader, what=features) -> Iterator:
    """(float32 `what(encoder, images)`, the batch) of each batch of this rank."""
    normalize = Normalize(args, world.device)
    for batch in DevicePrefetcher(loader, world.device):
        with torch.inference_mode(), autocast(args.amp, world.device):
            x = what(encoder, normalize(batch))
        yield x.float(), batch


@torch.no_grad()
def patch_features(encoder: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D, h, w): features of each patch, as a classifier would average them."""
    x = encoder.forward_features(images)
    if isinstance(x, list):  # ConvMAE's maps
        return x[-1]
    return x[:, encoder.num_prefix_tokens :].mT.unflatten(2, encoder.grid)
