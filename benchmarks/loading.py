"""How fast does data come? Images/s of each way into a training batch, beside MAE's.

- mae: Pillow, torchvision's RandomResizedCrop, flip, ToTensor, Normalize and collation of float32, as MAE does it
- rrc, src: ours from images, RandomResizedCrop and SimpleResizedCrop
- raw, zstd, jpeg: ours from a cache of that payload
- cold: raw, each image once, after its files were dropped from the page cache; in this process alone, because a loader
  would have read half of them ahead
- tar: ours from tar shards

Each is timed from its first batch on for some seconds, in this process (a core) and through a loader with two workers (of a cache, threads),
in turn with the others; a ratio is the median over the rounds of images/s / images/s of mae in the same round.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.results import append, spread
from util.args import IMAGENET_MEAN, IMAGENET_STD, Parser, number, run_main
from util.data.batches import Samples, make_loader
from util.data.cache import Cache
from util.data.folders import Folder, Source, image_folder
from util.data.tars import Tars
from util.data.transforms import pretrain_transform

BATCH = 64


def synthesise(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's size, 500 x 375 and about 110 kB: coloured 1/f noise, which has the spectrum of photographs."""
    rng = np.random.default_rng(0)
    falling = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    falling[0, 0] = np.inf
    for i in range(count):
        waves = rng.normal(size=(2, 3, 375, 251)) / falling**1.2
        image = np.fft.irfft2(waves[0] + 1j * waves[1], s=(375, 500))
        image = 128 + 50 * image / image.std(axis=(1, 2), keepdims=True)
        pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=92)


class CommonMAE(Dataset):
    """An image as facebookresearch/mae's main reads it."""

    def __init__(self, source: Folder, size: int):
        self.paths = source.paths
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __getitem__(self, i: int) -> torch.Tensor:
        with open(self.paths[i], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def endless(count: int, ours: bool) -> Iterator[list]:
    """Keys of batches in random order."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.integers(0, count, BATCH).tolist()
        yield [(0, i) for i in order] if ours else order


def speed(dataset: Any, count: int, workers: int, seconds: float) -> float:
    """Images/s from the first batch on."""
    ours = isinstance(dataset, Samples)
    keys: Any = endless(count, ours)
    if ours:
        loader = make_loader(
            dataset, keys, argparse.Namespace(num_workers=workers, timeout_minutes=1), torch.device("cpu")
        )
    else:
        loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers)
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        seen += BATCH
    return seen / passed


def cold_speed(samples: Samples, folder: Path) -> float:
    """Images/s of all images of a cache, once each in random order, from the disk."""
    drop_from_memory(folder)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    start = time.perf_counter()
    for first in range(0, len(order), BATCH):
        samples.__getitems__([(0, i) for i in order[first : first + BATCH]])
    return len(order) / (time.perf_counter() - start)


def drop_from_memory(folder: Path) -> None:
    """Ask the system to forget the files of a folder."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def sources(args, folder: Path) -> dict[str, Source]:
    """Caches and tar shards of the images, made in a folder."""
    made: dict[str, Source] = {}
    for payload in ("raw", "zstd", "jpeg"):
        words = ["--data_path", args.data_path, "--out", folder / payload, "--input_size", args.input_size]
        build = [sys.executable, "-m", "util.cache", "build", *words, "--payload", payload, "--workers", 2]
        subprocess.run([*map(str, build)], check=True, stdout=subprocess.DEVNULL)
        made[payload] = Cache(folder / payload)
    (folder / "tar").mkdir()
    tar = ["tar", "--sort=name", "-cf", folder / "tar" / "0.tar", "-C", args.data_path, "."]
    subprocess.run([*map(str, tar)], check=True)
    made["tar"] = Tars([folder / "tar" / "0.tar"])
    return made


def datasets(args, images: Folder, packed: dict[str, Source]) -> dict[str, Any]:
    size = (args.input_size, args.input_size)
    flags = argparse.Namespace(seed=0, in_chans=3, timeout_minutes=1)
    patches = (args.input_size // 16) ** 2

    def ours(source: Source, crop: str = "src") -> Samples:
        return Samples(source, pretrain_transform(crop, size, None), flags, flip=True, noise_length=patches)

    return {
        "mae": CommonMAE(images, args.input_size),
        "rrc": ours(images, "rrc"),
        "src": ours(images),
        **{name: ours(source) for name, source in packed.items()},
    }


def measure(args, images: Folder, folder: Path, say: Callable[[str], None]) -> dict:
    """Images/s and ratios to mae, [least, median, most], of each way, for a core and for two workers."""
    packed = sources(args, folder)
    sizes = {name: folder / name for name in packed}
    result: dict = {"kB": {n: sum(f.stat().st_size for f in p.iterdir()) / len(images) / 1e3 for n, p in sizes.items()}}
    say("kB an image: " + ", ".join(f"{name} {size:.0f}" for name, size in result["kB"].items()))
    ways = datasets(args, images, packed)
    for where, workers in (("one core", 0), ("two workers", 2)):
        rounds = []
        for turn in range(args.rounds):
            found = {}
            for name in [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]:
                found[name] = speed(ways[name], len(images), workers, args.seconds)
            if not workers:
                found["cold"] = cold_speed(ways["raw"], folder / "raw")
            rounds.append(found)
        result[where] = {}
        for name in rounds[0]:
            rate = spread([found[name] for found in rounds])
            ratio = spread([found[name] / found["mae"] for found in rounds])
            result[where][name] = {"images_per_s": rate, "ratio": ratio}
            say(f"{where}: {name} {rate[1]:.0f} images/s, {ratio[1]:.2f} x mae ({ratio[0]:.2f} to {ratio[2]:.2f})")
    return result


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Time every way into a training batch beside that of MAE.")
    add = parser.add_argument
    add("--data_path", help="folder of images; unless given, made up")
    add("--synthetic", type=number(int, BATCH), default=384, help="images made up: noise of ImageNet's size")
    add("--input_size", type=number(int, 16), default=224, help="side of the training input in pixels")
    add("--seconds", type=number(float, 0), default=3.0, help="time for each way in a round")
    add("--rounds", type=number(int, 1), default=5, help="how often all of them take their turn")
    add("--append", type=Path, metavar="FILE", help="Markdown table that gets a row")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    said: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        said.append(line)

    with TemporaryDirectory() as folder:
        if args.data_path is None:
            args.data_path = f"{folder}/images"
            Path(args.data_path).mkdir()
            synthesise(Path(args.data_path), args.synthetic)
        images = image_folder(args.data_path)
        mean = sum(os.stat(path).st_size for path in images.paths) / len(images)
        say(f"{len(images)} images of {mean / 1000:.0f} kB")
        result = measure(args, images, Path(folder), say)
    print(json.dumps(result))
    append(args.append, "loading", torch.device("cpu"), said)


if __name__ == "__main__":
    run_main(main)
