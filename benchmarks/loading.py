"""Benchmark of data loading: images/s of each pipeline, and as a ratio to MAE's. `python -m benchmarks.loading`

- mae: MAE's pipeline of Pillow and torchvision (RandomResizedCrop, flip, ToTensor, Normalize), collated in float32
- rrc, src: our pipeline on image files with RandomResizedCrop or SimpleResizedCrop
- raw, zstd, jpeg: our pipeline on a cache with this payload
- cold: raw, each image once, after the cache was dropped from the page cache; only in this process, because the
  workers of a loader would read half of the images before the clock starts
- tar: our pipeline on tar shards

Every pipeline is timed for --seconds after its first batch, in this process ("one core") and by a loader with two
workers (processes; threads for a cache). The pipelines take turns in each round. A ratio is the median over the rounds
of images/s divided by the images/s of mae in the same round.
"""

import argparse
import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.results import add_append_argument, append, spread
from util import cache
from util.args import IMAGENET_MEAN, IMAGENET_STD, Parser, number, run_main
from util.data.archives import Archives
from util.data.batches import make_loader
from util.data.cache import Cache
from util.data.folders import Folder, Source, image_folder
from util.data.samples import Samples
from util.data.transforms import pretrain_transform

BATCH = 64


def synthesise(folder: Path, count: int) -> None:
    """Write synthetic JPEGs of ImageNet's size (500 x 375, about 110 kB): 1/f noise, the spectrum of photographs."""
    rng = np.random.default_rng(0)
    falling = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    falling[0, 0] = np.inf
    for i in range(count):
        waves = rng.normal(size=(2, 3, 375, 251)) / falling**1.2
        image = np.fft.irfft2(waves[0] + 1j * waves[1], s=(375, 500))
        image = 128 + 50 * image / image.std(axis=(1, 2), keepdims=True)
        pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=92)


class BaselineDataset(Dataset):
    """Images as facebookresearch/mae loads them."""

    def __init__(self, source: Folder, size: int):
        self.paths = source.paths
        crop = T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
        normalize = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalize])

    def __getitem__(self, i: int) -> torch.Tensor:
        with open(self.paths[i], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def random_keys(count: int, ours: bool) -> Iterator[list]:
    """Random batches of indices without end; for our datasets of (epoch, index)."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.integers(0, count, BATCH).tolist()
        yield [(0, i) for i in order] if ours else order


def measure_speed(dataset: Any, count: int, workers: int, seconds: float) -> float:
    """Images/s after the first batch."""
    ours = isinstance(dataset, Samples)
    keys: Any = random_keys(count, ours)
    if ours:
        loader = make_loader(dataset, keys, workers, torch.device("cpu"))
    else:
        loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers)
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        seen += BATCH
    return seen / passed


def measure_cold_speed(samples: Samples, folder: Path) -> float:
    """Images/s for all images of a cache, each once in random order, read from the disk."""
    drop_page_cache(folder)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    start = time.perf_counter()
    for first in range(0, len(order), BATCH):
        samples.__getitems__([(0, i) for i in order[first : first + BATCH]])
    return len(order) / (time.perf_counter() - start)


def drop_page_cache(folder: Path) -> None:
    """Ask the system to drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def make_sources(args, folder: Path) -> dict[str, Source]:
    """Caches and a tar shard of the images, written to a folder."""
    made: dict[str, Source] = {}
    for payload in ("raw", "zstd", "jpeg"):
        words = ["build", "--data_path", args.data_path, "--out", folder / payload, "--input_size", args.input_size]
        with redirect_stdout(io.StringIO()):
            cache.build(cache.get_parser().parse_args([*map(str, words), "--payload", payload, "--workers", "2"]))
        made[payload] = Cache(folder / payload)
    (folder / "tar").mkdir()
    tar = ["tar", "--sort=name", "-cf", folder / "tar" / "0.tar", "-C", args.data_path, "."]
    subprocess.run([*map(str, tar)], check=True)
    made["tar"] = Archives([folder / "tar" / "0.tar"])
    return made


def make_datasets(args, images: Folder, packed: dict[str, Source]) -> dict[str, Any]:
    """The dataset of each pipeline."""
    size = (args.input_size, args.input_size)
    flags = argparse.Namespace(seed=0, in_chans=3, timeout_minutes=1)
    patches = (args.input_size // 16) ** 2

    def ours(source: Source, crop: str = "src") -> Samples:
        transform = pretrain_transform(crop, size, "bilinear" if crop == "src" else "bicubic")
        return Samples(source, transform, flags, flip=True, noise_length=patches)

    return {
        "mae": BaselineDataset(images, args.input_size),
        "rrc": ours(images, "rrc"),
        "src": ours(images),
        **{name: ours(source) for name, source in packed.items()},
    }


def measure(args, images: Folder, folder: Path, log: Callable[[str], None]) -> dict:
    """Images/s and ratios to mae, each [least, median, most], of each pipeline, on one core and with two workers."""
    packed = make_sources(args, folder)
    sizes = {name: folder / name for name in packed}
    result: dict = {"kB": {n: sum(f.stat().st_size for f in p.iterdir()) / len(images) / 1e3 for n, p in sizes.items()}}
    log("kB an image: " + ", ".join(f"{name} {size:.0f}" for name, size in result["kB"].items()))
    pipelines = make_datasets(args, images, packed)
    for where, workers in (("one core", 0), ("two workers", 2)):
        rounds = []
        for turn in range(args.rounds):
            found = {}
            for name in [*pipelines][turn % len(pipelines) :] + [*pipelines][: turn % len(pipelines)]:
                found[name] = measure_speed(pipelines[name], len(images), workers, args.seconds)
            if not workers:
                found["cold"] = measure_cold_speed(pipelines["raw"], folder / "raw")
            rounds.append(found)
        result[where] = {}
        for name in rounds[0]:
            rate = spread([found[name] for found in rounds])
            ratio = spread([found[name] / found["mae"] for found in rounds])
            result[where][name] = {"images_per_s": rate, "ratio": ratio}
            log(f"{where}: {name} {rate[1]:.0f} images/s, {ratio[1]:.2f} x mae ({ratio[0]:.2f} to {ratio[2]:.2f})")
    return result


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Measure the images/s of every data pipeline and of MAE's.")
    add = parser.add_argument
    add("--data_path", help="folder of images (default: synthetic ones)")
    add("--synthetic", type=number(int, BATCH), default=384, help="number of synthetic images, noise of 500 x 375 px")
    add("--input_size", type=number(int, 16), default=224, help="side of the training input in pixels")
    add("--seconds", type=number(float, 0), default=3.0, help="duration of each measurement")
    add("--rounds", type=number(int, 1), default=5, help="measurements of each pipeline")
    add_append_argument(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with TemporaryDirectory() as folder:
        if args.data_path is None:
            args.data_path = f"{folder}/images"
            Path(args.data_path).mkdir()
            synthesise(Path(args.data_path), args.synthetic)
        images = image_folder(args.data_path)
        mean = sum(os.stat(path).st_size for path in images.paths) / len(images)
        log(f"{len(images)} images of {mean / 1000:.0f} kB")
        result = measure(args, images, Path(folder), log)
    print(json.dumps(result))
    append(args.append, "loading", torch.device("cpu"), lines)


if __name__ == "__main__":
    run_main(main)
