"""Benchmark of start-up: time and memory to open a source of 10^3 to 10^6 images. `python -m benchmarks.startup`

Each source is opened in a new process. Caches are synthetic: a full index over sparse shards. Folders hold empty files.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.results import add_append_argument, append
from util.args import Parser, number, run_main
from util.data.cache import ENTRY, FORMAT, shard_path
from util.files import hash_file

OPEN_SOURCE = """
import resource, sys, time
from util.data.cache import Cache
from util.data.folders import image_folder
def memory_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before, start = memory_mib(), time.perf_counter()
source = Cache(sys.argv[1]) if sys.argv[2] == "cache" else image_folder(sys.argv[1])
print(len(source), time.perf_counter() - start, memory_mib() - before)
"""


def make_cache(folder: Path, count: int) -> None:
    """Write a cache of `count` images of 224 x 298 pixels in sparse shards of 5,000 images (1 GiB)."""
    size = 224 * 298 * 3
    index = np.zeros(count, ENTRY)
    number = np.arange(count)
    index["shard"], index["offset"], index["bytes"] = number // 5000, number % 5000 * size, size
    index["height"], index["width"] = 224, 298
    np.save(folder / "index.npy", index)
    lengths = np.bincount(index["shard"]) * size
    for shard, length in enumerate(lengths):
        shard_path(folder, shard).touch()
        os.truncate(shard_path(folder, shard), length)
    manifest = {"format": FORMAT, "input_size": [224, 224], "crop_interpolation": "bilinear", "in_chans": 3}
    shards = [{"bytes": int(length), "sha256": ""} for length in lengths]
    manifest |= {"payload": "raw", "images": count, "classes": [], "shards": shards}
    manifest["index_sha256"] = hash_file(folder / "index.npy")
    for name in ("plan.json", "manifest.json"):
        (folder / name).write_text(json.dumps(manifest))


def make_folder(folder: Path, count: int) -> None:
    """Write `count` empty files in folders of a thousand."""
    for start in range(0, count, 1000):
        (folder / f"{start // 1000:04d}").mkdir()
        for i in range(min(1000, count - start)):
            (folder / f"{start // 1000:04d}" / f"n01440764_{i:05d}.JPEG").touch()


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("Measure time and memory to open caches and folders of growing size.")
    add, sizes = parser.add_argument, [10**n for n in range(3, 7)]
    add("--images", type=number(int, 1), nargs="+", default=sizes, help="numbers of images")
    add_append_argument(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    lines = []
    for kind, make in (("cache", make_cache), ("folder", make_folder)):
        for count in args.images:
            with TemporaryDirectory() as folder:
                make(Path(folder), count)
                command = [sys.executable, "-c", OPEN_SOURCE, folder, kind]
                opened = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            images, seconds, mib = int(opened[0]), float(opened[1]), float(opened[2])
            lines.append(f"{kind} of {images}: {seconds:.3f} s, {mib:.0f} MiB")
            print(lines[-1], flush=True)
    append(args.append, "startup", torch.device("cpu"), lines)


if __name__ == "__main__":
    run_main(main)
