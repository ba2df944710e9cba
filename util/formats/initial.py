"""Initial weights of a pre-training run from a checkpoint: resampled, adapted to other channels, and reported."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from util.formats.keys import DECODER, FINAL_NORM, FUSION, State, join_names
from util.formats.resize import resample_pos_embed
from util.formats.weights import Weights

Size = tuple[int, int]
EMBEDDINGS = ("patch_embed.proj.weight", "patch_embed1.proj.weight")  # read the channels of the image
PREDICTION = ("decoder_pred.weight", "decoder_pred.bias")
REMEDIES = {
    "mean": "each channel gets the mean of the file's weights",
    "cycle": "the file's channels are repeated",
    "new": "patch embedding and prediction get random weights; --init_channels mean or cycle keeps the file's",
}


def adapt_channels(state: State, old: int, new: int, mode: str) -> State:
    """State for images of `new` channels instead of `old`.

    `mean` and `cycle` scale the patch embedding by old / new, so that its output keeps its size; `new` removes the tensors.
    """
    changed = dict(state)
    index = torch.arange(new) % old
    for name in (*EMBEDDINGS, *PREDICTION):
        if name not in state:
            continue
        embeds = name in EMBEDDINGS
        x = state[name] if embeds else state[name].unflatten(0, (-1, old))  # channels in dimension 1
        x = x[:, index] if mode == "cycle" else x.mean(1, keepdim=True).expand(-1, new, *x.shape[2:])
        changed[name] = x * (old / new) if embeds else x.flatten(0, 1)
        if mode == "new":
            del changed[name]
    return changed


def resample_patches(state: State, old: int, new: int, channels: int) -> State:
    """State of a ViT for patches of `new` px: patch embedding as in FlexiViT (arXiv:2212.08013), prediction bicubic."""
    from timm.layers import resample_patch_embed  # util.formats needs torch only

    changed = dict(state)
    if name := next((name for name in EMBEDDINGS if name in state), None):
        changed[name] = resample_patch_embed(state[name], [new, new])
    for name in PREDICTION:
        if name in state:
            rows = state[name].reshape(old, old, channels, -1).permute(3, 2, 0, 1)  # (E or 1, C, p, p)
            rows = F.interpolate(rows, (new, new), mode="bicubic", antialias=new < old)
            changed[name] = rows.permute(2, 3, 1, 0).reshape(new * new * channels, *state[name].shape[1:])
    return changed


def move_positions(embed: Tensor, old: Size, new: Size, prefix: int, sincos: Callable) -> Tensor:
    """Position embedding of the grid `new`: computed anew if it is MAE's or OpenMMLab's fixed one, else resampled."""
    for shift in (0, embed.shape[2] // 2):  # OpenMMLab: rows in the first half
        if torch.allclose(embed, sincos(embed.shape[2], old, prefix).roll(shift, -1), atol=1e-5):
            return sincos(embed.shape[2], new, prefix).roll(shift, -1)
    return resample_pos_embed(embed, old, new, prefix)


def adapt_to_encoder(weights: Weights, encoder: Any, args: Namespace, sincos: Callable) -> tuple[State, list[str]]:
    """(float32 state for this encoder's channels, patches and grid, what was changed); ValueError names the flag to add."""
    state = {name: value.float() for name, value in weights.state.items()}
    file, changes = f"--checkpoint {args.checkpoint}", []
    if weights.in_chans not in (None, encoder.in_chans):  # None: a custom encoder, whose file does not state it
        state = adapt_channels(state, weights.in_chans, encoder.in_chans, args.init_channels)
        how = REMEDIES[args.init_channels]
        changes.append(f"warning: {file} has {weights.in_chans} channels, --in_chans {encoder.in_chans}: {how}")
    if weights.patch_size not in (None, encoder.patch):
        what = f"{file} has patches of {weights.patch_size} px, --patch_size {encoder.patch}"
        if weights.family == "convvit":
            raise ValueError(f"{what}: ConvMAE supports no other size")
        if not args.resample_patches:
            raise ValueError(f"{what}: add --resample_patches")
        state = resample_patches(state, weights.patch_size, encoder.patch, encoder.in_chans)
        changes.append(f"{what}: resampled")
    old = weights.grid or encoder.grid
    if old != encoder.grid:
        for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
            state[name] = move_positions(state[name], old, encoder.grid, weights.class_tokens, sincos)
        learned = ", learned ones resampled" if weights.pos_embed == "learned" else ""
        new = encoder.grid
        changes.append(f"position embeddings: {old[0]} x {old[1]} -> {new[0]} x {new[1]} patches{learned}")
    return state, changes


def describe(kind: str, names: set[str], own: State) -> str:
    """Number of tensors, parameters and their share, with some names."""
    count, total = (sum(own[name].numel() for name in group) for group in (names, own))
    return f"{kind}: {len(names)} tensors, {count:,} parameters, {count / total:.1%} ({join_names(sorted(names))})"


def initial_state(weights: Weights, own: State, encoder, args, sincos: Callable) -> tuple[State, list[str]]:
    """(`own` with everything that the file has, report); both in facebookresearch/mae's names.

    `own` is the state of the new model. The decoder is read as a whole or not at all. ValueError if a tensor of the encoder
    is missing or of another shape.
    """
    state, report = adapt_to_encoder(weights, encoder, args, sincos)
    if args.fuse_levels and not weights.fuse_levels:  # the final norm is not used and not trained: it stays (1, 0)
        state = {name: value for name, value in state.items() if name not in FINAL_NORM}
    fits = {name for name, value in state.items() if name in own and own[name].shape == value.shape}
    optional = {name for name in own if FUSION.fullmatch(name) or name.startswith("norm.")}
    if args.init_channels == "new" and weights.in_chans not in (None, encoder.in_chans):
        optional |= {*EMBEDDINGS, *PREDICTION}
    decoder = {name for name in own if DECODER.fullmatch(name)}
    if wrong := sorted(own.keys() - decoder - fits - optional):
        shapes = {name: list(state[name].shape) if name in state else "missing" for name in wrong[:3]}
        raise ValueError(
            f"--checkpoint {args.checkpoint}, a {weights.family}, does not fit --model {args.model}: {len(wrong)} tensors, such as "
            + ", ".join(f"{name} {list(own[name].shape)} (the file: {found})" for name, found in shapes.items())
        )
    kinds = [(x.decoder or "self", bool(x.fuse_levels)) for x in (weights, args)]
    if not decoder <= fits | optional or kinds[0] != kinds[1]:
        fits -= decoder
        why = "missing; facebookresearch/mae has one in mae_pretrain_*_full.pth"
        if weights.has_decoder:
            kind = f"--decoder {weights.decoder}" + " --fuse_levels" * kinds[0][1]
            why = "of another size" if kinds[0] == kinds[1] else f"of another kind ({kind})"
        report.append(f"the decoder of the file is {why}: the new run starts with a random one")
    report.insert(0, describe("from the file", fits, own))
    if fresh := own.keys() - fits:
        report.append(describe("new, random", fresh, own))
    if unused := sorted(state.keys() - fits):
        report.append(f"not used: {len(unused)} tensors of the file ({join_names(unused)})")
    return own | {name: state[name] for name in fits}, report
