"""The value range of a data set: one decision by a sample of its images, for --value_range auto."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from util.data.cache import Cache
from util.data.folders import Source
from util.data.pixels import PixelOptions, RawImage, choose_channels
from util.data.streams import Stream
from util.data.timeouts import DiskTimeout, time_limit
from util.dist import rank_from_env

SAMPLE = 256  # most files read
MOST_VALUES = 2**28  # of all files together
ALWAYS_8BIT = (b".jpg", b".jpeg", b".jfif", b".jpe", b".bmp", b".gif", b".webp", b".avif", b".heic", b".heif")


class ImageStatistics(NamedTuple):
    """What one image contributes to the decision."""

    kind: str  # "int" or "float"
    low: float
    high: float
    is_integral: bool  # no value has a fraction
    declared: tuple[float, float] | None
    values: np.ndarray  # (n, C) sampled
    colour: bool


def image_statistics(image: RawImage, options: PixelOptions) -> ImageStatistics | None:
    """Statistics of the channels used of an image; None if it has no finite value."""
    chosen, _ = choose_channels(image, options)
    values = chosen.reshape(-1, chosen.shape[2])
    if values.dtype.kind == "f":
        values = values[np.isfinite(values).all(1)]
    if not len(values):
        return None
    low, high, declared = float(values.min()), float(values.max()), image.declared
    if declared and not declared[0] <= low <= high <= declared[1]:
        declared = None  # a PNG whose values are scaled to 16 bits, as its specification asks for
    sampled = values[:: -(-len(values) // 4096)].astype(np.float64)
    kind, is_integral = "float" if values.dtype.kind == "f" else "int", bool(np.all(sampled % 1 == 0))
    return ImageStatistics(kind, low, high, is_integral, declared, sampled, image.colour)


def choose_range(facts: list[ImageStatistics]) -> tuple[list, str]:
    """(["auto", kind, LOW, HIGH, ...], reason). ValueError if integers and floats are mixed."""
    kinds = {x.kind for x in facts}
    if len(kinds) > 1:
        raise ValueError("--value_range auto: some images hold integers, some floats; give LOW HIGH, or separate them")
    low, high, kind = min(x.low for x in facts), max(x.high for x in facts), kinds.pop()
    if all(x.declared for x in facts):
        ends = np.array([x.declared for x in facts])
        return ["auto", kind, float(ends.min()), float(ends.max())], "as the files declare"
    if kind == "float" and low >= 0 and high <= 1:
        return ["auto", kind, 0.0, 1.0], "no value outside"
    if low >= 0 and high < 65536 and all(x.is_integral for x in facts):
        top = max(int(x.declared[1]) if x.declared else 2 ** max(8, int(x.high).bit_length()) - 1 for x in facts)
        most = max(float(np.quantile(x.values, 0.999)) for x in facts)
        dark = f"; 99.9 % are below {most:.0f}: --value_range 0 {most:.0f} gives more contrast" * (most < top / 4)
        return ["auto", kind, 0.0, float(top)], f"the largest is {high:g}{dark}"
    joint = facts[0].colour or len({x.values.shape[1] for x in facts}) > 1
    values = np.concatenate([x.values.reshape(-1, 1) if joint else x.values for x in facts])
    ends = np.quantile(values, (0.001, 0.999), axis=0).T
    ends = ends[:1] if np.all(ends == ends[0]) else ends  # a grey image gives three equal channels
    pairs = [float(f"{x:.6g}") for x in ends.ravel()]
    return ["auto", kind, *pairs], f"99.8 % of the values, from {low:g} to {high:g}"


def sample_images(source: Source, options: PixelOptions, timeout_s: float) -> Iterator[RawImage]:
    """Images that are not 8-bit, and TIFFs, among at most SAMPLE seeded ones; none if the extensions exclude them."""
    chosen, left = np.arange(len(source)), MOST_VALUES
    if len(source.paths) == len(source):
        chosen = np.flatnonzero([not path.lower().endswith(ALWAYS_8BIT) for path in source.paths.tolist()])
    for i in sorted(np.random.default_rng(0).permutation(chosen)[:SAMPLE].tolist()):
        try:
            with time_limit(timeout_s):
                found: Any = source.read(i, options)
        except DiskTimeout:
            return  # training reports it
        except Exception:  # training reports unreadable images
            continue
        yield from found
        left -= sum(image.values.size for image in found)
        if left < 0:
            return


def choose_value_range(args: Namespace, source: Source) -> list:
    """["auto", kind, LOW, HIGH, ...] for the images that are not 8-bit, ["auto"] if there are none in the sample."""
    options = replace(PixelOptions.from_args(args), raw=True)
    facts: list[ImageStatistics] = []
    alphas: list[bool] = []
    for image in sample_images(source, options, 60 * vars(args).get("timeout_minutes", 30)):
        if image.alpha == "tiff":
            alphas.append(np.ptp(image.values[..., -1]) > 0)
        if image.is_8bit:
            continue
        with suppress(ValueError):  # training reports images without the channels wanted
            if found := image_statistics(image, options):
                facts.append(found)
    is_main = rank_from_env()[0] == 0
    if options.alpha == "auto" and 2 * sum(alphas) > len(alphas) and is_main:
        print(
            f"warning: the fourth sample of {sum(alphas)} of {len(alphas)} TIFFs varies and is blended over white, as their "
            "ExtraSamples tag specifies; if it is a band, such as near infrared, use --alpha channel or --alpha drop",
            flush=True,
        )
    if not facts:
        return ["auto"]
    decision, reason = choose_range(facts)
    if is_main:
        numbers = " ".join(f"{x:g}" for x in decision[2:])
        print(f"--value_range auto: {numbers} ({len(facts)} images that are not 8-bit sampled; {reason})", flush=True)
    return decision


def resolve_pixels(args: Namespace, source: Source, recorded: dict | None = None) -> Namespace:
    """Copy of the arguments with the decision for --value_range auto, and with the flags that a cache was built with.

    `recorded`: arguments of the run that is resumed, whose decision is kept. A cache and a stream are not sampled.
    """
    given = vars(args)
    built = source.flags if isinstance(source, Cache) else {}
    filled = {name: given.get(name) or built.get(name) for name in ("bands", "value_range", "alpha")}
    filled["value_range"] = list(filled["value_range"] or ["auto"])
    if filled["value_range"] == ["auto"]:
        if recorded or built:
            filled["value_range"] = list((recorded or {}).get("value_range") or built.get("value_range") or ["full"])
        elif not isinstance(source, Stream):
            filled["value_range"] = choose_value_range(Namespace(**given | filled), source)
    resolved = Namespace(**given | filled)
    PixelOptions.from_args(resolved)
    return resolved
