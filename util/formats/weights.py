"""Tensors of a checkpoint and the settings that its file states."""

import json
import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.args import resolve_defaults
from util.formats.keys import State, family, tensor_sizes

METHOD: dict[str, Any] = {  # settings of pre-training -> type of their value
    "norm_pix_loss": bool, "mask_ratio": float | int, "mask_unit": int, "lowpass_radius": float | int, "lowpass": str,
    "fuse_layers": list | tuple, "predict_ratio": float | int, "pos_embed": str,
}  # fmt: skip
PIXELS: dict[str, Any] = {"bands": list | tuple, "value_range": list | tuple, "alpha": str}
COUNTS = ("patch_size", "in_chans", "decoder_dim", "decoder_depth", "decoder_heads", "mask_unit", "class_tokens")
LIMITS: dict[str, tuple[Any, float, float]] = {  # settings of our own runs -> type, least, most; None = any
    "mask_ratio": (float | int, 1e-6, 1 - 1e-6), "predict_ratio": (float | int, 0, 1), "crop_pct": (float | int, 0.01, 1),
    "lowpass_radius": (float | int, 0, 10**6),
    **dict.fromkeys(COUNTS, (int, 1, 10**6)),
}  # fmt: skip
HEADS = {48: 3, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # width -> attention heads of the published models


@dataclass(frozen=True)
class Weights:
    """A checkpoint. None = the file does not state it; a custom encoder, which RULES do not cover, has no sizes."""

    state: State  # names of facebookresearch/mae: encoder, and decoder, fc_norm, head where the file has them
    args: dict[str, Any]  # arguments of the run that wrote the file, or options in its config.json; {} without either
    source: str  # "pixmim", "mae", "mm", "mmseg", "hf" or "timm"
    dropped: list[str]  # keys that are not read
    num_classes: int  # 0 without a head
    pooled: bool  # the head follows fc_norm on the mean of the patch tokens
    family: str | None = None  # prefix of the names in models.ENCODERS
    model: str | None = None  # --model of our own runs
    embed_dim: Any = None  # ConvMAE: embed_dim and depth are tuples over its stages
    depth: Any = None
    num_heads: int = 0
    mlp_ratio: float = 0
    patch_size: Any = None  # pixels
    in_chans: Any = None
    num_patches: int = 0
    class_tokens: int = 0
    input_size: tuple[int, int] | None = None  # (H, W) pixels
    size_recorded: bool = False  # by the file; else input_size is read from the position embedding
    grid: tuple[int, int] | None = None  # (h, w) patches
    mean: Any = None
    std: Any = None
    bands: Any = None
    value_range: Any = None
    alpha: str | None = None
    crop_pct: float | None = None  # side of the evaluation crop as a share of the resized image
    decoder: str | None = None  # "self" or "cross"
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    fuse_levels: bool | None = None
    norm_pix_loss: bool | None = None
    mask_ratio: float | None = None
    predict_ratio: float | None = None
    mask_unit: int | None = None
    lowpass_radius: float | None = None  # frequency bins; 0 = raw pixels
    lowpass: str | None = None
    fuse_layers: Any = None
    pos_embed: str | None = None  # "sincos" or "learned"
    pool: str | None = None  # "token" or "mean": --pool of a probe
    classes: Any = None  # names of the classes

    @classmethod
    def from_state(cls, state: State, raw: dict, source: str = "pixmim", dropped: Iterable[str] = ()) -> "Weights":
        """Weights with settings read from the shapes of a checked state and from the arguments `raw`."""
        own, stated = source == "pixmim", dict(raw)
        if own and {"input_size", "in_chans", "mean", "std"} <= raw.keys():
            stated = vars(resolve_defaults(Namespace(**{"crop": "", **raw})))
        facts: dict[str, Any] = {"num_classes": len(state.get("head.weight", ())), "pooled": "fc_norm.weight" in state}
        facts |= {key: stated.get(key) for key in ("mean", "std", "pool", "classes")}
        kinds = METHOD | {"crop_pct": float | int} | PIXELS
        facts |= {key: x for key, kind in kinds.items() if isinstance(x := stated.get(key), kind)}
        if own:
            facts |= {key: stated.get(key) for key in OWN} | {"class_tokens": stated.get("class_tokens") or 0}
        elif "mask_token" in state:
            facts.setdefault("lowpass_radius", 0)
        if family(state):
            facts |= dict.fromkeys(key for key in OWN if "decoder" in key) | tensor_sizes(state)
            patch, count = facts["patch_size"], facts["num_patches"]
            size = _stated_size(stated.get("input_size"), patch, count)
            grid = None if size else _guess_grid(state["pos_embed"][0, -count:])
            facts["size_recorded"] = size is not None
            facts["input_size"] = (grid[0] * patch, grid[1] * patch) if grid else size
            widths = facts["embed_dim"]
            width = widths[-1] if isinstance(widths, tuple) else widths
            facts["num_heads"] = stated.get("num_heads") or HEADS.get(width, max(1, width // 64))
            if facts["decoder_dim"]:  # heads of width 32, as in MAE and LSMAE
                rows = state["decoder_pos_embed"][:, : facts["class_tokens"]]  # zero if they are sin-cos
                facts.setdefault("pos_embed", "learned" if rows.any() else "sincos")
                facts["decoder_heads"] = stated.get("decoder_heads") or max(1, facts["decoder_dim"] // 32)
        elif "input_size" in stated:
            facts["input_size"] = tuple(stated["input_size"])
        size, patch = facts.get("input_size"), facts.get("patch_size")
        facts["grid"] = (size[0] // patch, size[1] // patch) if size and patch else None
        return cls(state, raw, source, list(dropped), **facts)

    def with_state(self, state: State, **args: Any) -> "Weights":
        """Copy of the checkpoint with other tensors or arguments."""
        return Weights.from_state(state, self.args | args, self.source, self.dropped)

    @property
    def has_decoder(self) -> bool:
        return "decoder_pred.weight" in self.state

    @property
    def settings(self) -> dict[str, Any]:
        """Stated settings that the tensors do not tell, as plain values under MAE's and our names; `read_weights` reads them."""
        names = ("num_heads", "decoder_heads", "mean", "std", "crop_pct", "pool", "classes", "input_size")
        keys = (*METHOD, *PIXELS, *names)
        facts = {key: x for key in keys if key in self.args and (x := getattr(self, key)) is not None}
        size = facts.get("input_size")
        facts |= {"input_size": size[0]} if size and size[0] == size[1] else {}  # a number, as in args of MAE
        return json.loads(json.dumps(facts))

    @property
    def averages_tokens(self) -> bool:
        """Whether the classifier is a probe on the mean of several class tokens."""
        return self.num_classes > 0 and self.class_tokens > 1 and not self.pooled and self.pool != "mean"

    @property
    def averages_normed(self) -> bool:
        """Whether the classifier is a probe on the mean of the patch tokens after the final norm."""
        return self.num_classes > 0 and not self.pooled and self.pool == "mean"


def check_settings(args: dict[str, Any]) -> None:
    """ValueError if a setting of our own run has a type or value that no version of this project writes."""
    bad = [name for name in ("mean", "std") if not isinstance(args.get(name) or [], list | tuple)]
    bad += [name for name in ("model", "lowpass", "decoder") if not isinstance(args.get(name) or "", str)]
    for name, (kind, least, most) in LIMITS.items():
        x = args.get(name)
        if x is not None and (not isinstance(x, kind) or isinstance(x, bool) or not least <= x <= most):
            bad.append(name)
    if bad:
        setting = f"{bad[0]} is {args[bad[0]]!r}"
        raise ValueError(f"its setting {setting}, which this project does not write: use the original file")


OWN = ("model", "patch_size", "in_chans", "decoder", "decoder_dim", "decoder_depth", "decoder_heads", "fuse_levels")


def _stated_size(stated: Any, patch: int, num_patches: int) -> tuple[int, int] | None:
    """(H, W) as stated if it fits the position embedding, else None."""
    height, width = (stated * 2)[:2] if isinstance(stated, list | tuple) and stated else (stated, stated)
    fits = isinstance(height, int) and isinstance(width, int) and (height // patch) * (width // patch) == num_patches
    return (height, width) if fits else None


def _guess_grid(embed: Tensor) -> tuple[int, int] | None:
    """Grid of a square number of patches (L, D): that of a sin-cos position embedding, else a square; else None.

    One half of a sin-cos embedding depends on the row alone, the other on the column alone, on its own grid only.
    """
    count, side = len(embed), math.isqrt(len(embed))
    if side**2 != count:
        return None
    found = []
    for height in (n for n in range(1, count + 1) if count % n == 0):
        halves = embed.float().unflatten(0, (height, -1)).chunk(2, dim=2)
        spread = [[(x.amax(dim) - x.amin(dim)).max() < 0.01 for dim in (0, 1)] for x in halves]
        if (spread[0][0] and spread[1][1]) or (spread[0][1] and spread[1][0]):
            found.append((height, count // height))
    return found[0] if len(found) == 1 else (side, side)
