"""python -m util.cache build --data_path DIR --out DIR, python -m util.cache verify DIR: packed caches of resized images."""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.args import Parser, SizeAction, add_pixel_arguments, add_source_arguments, number, run_main
from util.crop import INTERPOLATIONS, SimpleResizedCrop
from util.data.batches import init_worker
from util.data.cache import ENTRY, FORMAT, PAYLOADS, Cache, encode_payload, shard_path
from util.data.folders import Source
from util.data.pixels import MAX_PIXELS, PixelOptions
from util.data.ranges import resolve_pixels
from util.data.sources import indexed_source
from util.files import hash_file, printable, read_json, write_atomic, write_json


def verify(args: argparse.Namespace) -> None:
    """Compare the shards with their digests in the manifest; `Cache` does so with the index."""
    cache = Cache(args.cache)
    files = {shard_path(cache.folder, shard): digest for shard, digest in enumerate(cache.shard_digests)}
    bar = tqdm(files.items(), unit="file", file=sys.stdout)
    if damaged := [path.name for path, digest in bar if hash_file(path) != digest]:
        raise ValueError(f"{args.cache}: damaged: {' '.join(damaged)}; delete them and build again with the same flags")
    print(f"{args.cache}: {len(cache)} images in {len(cache.shard_digests)} shards, all undamaged")


class PackedImage(NamedTuple):
    """An entry of a cache: an image or a tile of one."""

    content: bytes
    height: int
    width: int
    place: tuple[int, int]  # (top, left) pixel of a tile


def cut_tiles(bands: list[Image.Image], tile: int | None) -> Iterator[tuple[tuple[int, int], list[Image.Image]]]:
    """((top, left), bands) of equal tiles of at most `tile` pixels a side; of the whole image without `tile`."""
    counts = [(side, -(-side // (tile or side))) for side in bands[0].size]
    columns, rows = ([side * i // n for i in range(n + 1)] for side, n in counts)
    for (top, bottom), (left, right) in product(pairwise(rows), pairwise(columns)):
        yield (top, left), [band.crop((left, top, right, bottom)) for band in bands] if tile else bands


class PackDataset(Dataset):
    """Entries of each image of a source as a cache stores them, by lists of indices; for an unreadable image the reason."""

    def __init__(self, source: Source, crop: SimpleResizedCrop, args: argparse.Namespace):
        self.source, self.crop, self.payload, self.tile = source, crop, args.payload, args.tile
        self.options = replace(PixelOptions.from_args(args), max_pixels=2**34 if args.tile else MAX_PIXELS)

    def __getitem__(self, indices: np.ndarray) -> list[list[PackedImage] | str]:
        packed: list[list[PackedImage] | str] = []
        for i in indices:
            try:
                entries = []
                for place, bands in cut_tiles(list(self.source.read(i, self.options)), self.tile):
                    pixels = self.crop.resize(bands)
                    height, width, _ = pixels.shape
                    entries.append(PackedImage(encode_payload(self.payload, pixels), height, width, place))
                packed.append(entries)
            except Exception as error:  # decoders raise everything from OSError to struct.error
                packed.append(" ".join(str(error).split()) or type(error).__name__)
        return packed

    def pack(self, indices: np.ndarray, workers: int) -> Iterator[list[PackedImage] | str]:
        """These images in order, packed by worker processes."""
        chunks = np.array_split(indices, -(-len(indices) // (1 if self.tile else 32)))
        options: Any = {"collate_fn": list, "worker_init_fn": partial(init_worker, os.getpid())}
        for packed in DataLoader(self, batch_size=None, sampler=chunks, num_workers=workers, **options):
            yield from packed


def read_plan(path: Path) -> dict:
    """The plan of an earlier call; ValueError if it is damaged."""
    try:
        plan = read_json(path)
        if type(plan["images_per_shard"]) is int and plan["images_per_shard"] > 0:
            return plan
        reason = "no images_per_shard"
    except (ValueError, KeyError) as error:
        reason = printable(error)
    raise ValueError(f"{path} is damaged ({reason}): delete its folder and build again")


class Builder:
    """A build that can be killed and resumed: plan.json holds its flags, an .npz the index of each finished shard."""

    def __init__(self, args: argparse.Namespace):
        self.folder, self.source = Path(args.out), indexed_source(args, "train")
        self.args = args = resolve_pixels(args, self.source)
        crop = SimpleResizedCrop(args.input_size, args.crop_interpolation)
        self.dataset = PackDataset(self.source, crop, args)
        # names and sizes
        files = hashlib.sha256(f"{self.source.digest()} {self.source.sizes().tolist()}".encode())
        flags = ("crop_interpolation", "in_chans", "bands", "value_range", "alpha", "tile", "payload")
        self.plan: dict[str, Any] = {"format": FORMAT, "input_size": list(args.input_size)}
        self.plan |= {flag: getattr(args, flag) for flag in flags} | {"images": len(self.source)}
        self.plan |= {"files": files.hexdigest(), "pillow": PIL.__version__}
        self.plan["names"] = self.source.digest() if args.tile is None else None

    def prepare(self) -> None:
        """Compare with the plan of an earlier call, print the expected size and time, and write the plan."""
        plan_path = self.folder / "plan.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_plan(plan_path) if plan_path.exists() else {}
        if not before and any(self.folder.iterdir()):
            raise ValueError(f"--out {self.folder} is not empty; choose another folder")
        for key, value in self.plan.items():
            if before.get(key, value) != value:
                raise ValueError(
                    f"--out {self.folder} holds a cache with {key} {before[key]}, not {value}; "
                    "choose another folder, or delete it"
                )
        count = len(self.source)
        sample = np.linspace(0, count - 1, min(count, 256)).astype(int)
        start = time.perf_counter()
        tried = [*self.dataset.pack(sample, self.args.workers)]
        packed = [image for image in tried if not isinstance(image, str)]
        seconds = (time.perf_counter() - start) / len(sample) * count
        if not packed:
            raise ValueError(f"--data_path {' '.join(self.args.data_path)}: no image can be packed: {tried[0]}")
        mean = sum(len(entry.content) for entries in packed for entry in entries) / len(packed)
        per_shard = max(1, int(self.args.shard_mib * 2**20 / mean))
        self.plan["images_per_shard"] = before.get("images_per_shard", per_shard)
        written = sum(path.stat().st_size for path in self.folder.glob("shard-*.bin"))
        needed, free = mean * count * 1.02 - written, shutil.disk_usage(self.folder).free
        print(
            f"{count} images: about {mean * count / 2**30:.2f} GiB ({mean / 1000:.0f} kB per image) and "
            f"{seconds / 60:.1f} minutes with {self.args.workers} workers; {free / 2**30:.1f} GiB free",
            flush=True,
        )
        if needed > free:
            raise ValueError(
                f"--out {self.folder} needs {needed / 2**30:.2f} GiB more, but only {free / 2**30:.2f} GiB are free; "
                "choose another disk, a smaller --input_size or --payload zstd or jpeg"
            )
        write_json(plan_path, self.plan)

    def shard_ranges(self) -> list[tuple[int, int]]:
        """(first image, one past the last) of each shard."""
        count, per_shard = len(self.source), self.plan["images_per_shard"]
        return [(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]

    def load_shard_index(self, shard: int) -> tuple[np.ndarray, str, np.ndarray] | None:
        """(index entries, SHA-256, image and place of each entry) of a finished shard; None if it is unfinished or of other images."""
        path, part = shard_path(self.folder, shard), self.folder / f"shard-{shard:05d}.npz"
        if not (path.exists() and part.exists()):
            return None
        try:
            with part.open("rb") as file, np.load(file, allow_pickle=False) as found:
                entries, digest, size = found["entries"], str(found["digest"]), int(found["size"])
                places = found["places"]
            if entries.dtype != ENTRY or entries.ndim != 1:
                raise ValueError(f"it holds {entries.dtype}")
            if not np.array_equal(np.unique(places[:, 0]), np.arange(*self.shard_ranges()[shard])):
                raise ValueError("it holds other images")
        except Exception as error:  # a damaged zip raises everything from OSError to zlib.error
            tqdm.write(f"{part} is damaged ({printable(error)}): its shard is built again", file=sys.stdout)
            return None
        return (entries, digest, places) if path.stat().st_size == size else None

    def write_shard(self, shard: int, first: int, last: int, bar: tqdm) -> None:
        """Write a shard, then its index, each atomically."""
        path, offset = shard_path(self.folder, shard), 0
        entries, places = [], []
        temporary, digest = path.with_suffix(".tmp"), hashlib.sha256()
        with temporary.open("wb") as file:
            for i, packed in enumerate(self.dataset.pack(np.arange(first, last), self.args.workers), first):
                bar.update()
                if isinstance(packed, str):
                    bar.write(self.describe_skipped(i, packed), file=sys.stdout)
                    packed = [PackedImage(b"", 0, 0, (0, 0))]
                for content, height, width, place in packed:
                    entries.append((offset, len(content), self.source.labels[i], shard, height, width))
                    places.append((i, *place))
                    file.write(content)
                    digest.update(content)
                    offset += len(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        index, texts = np.array(entries, ENTRY), np.array(digest.hexdigest())
        fill = partial(np.savez, entries=index, places=np.array(places, np.int32), digest=texts, size=np.array(offset))
        write_atomic(self.folder / f"shard-{shard:05d}.npz", fill)

    def describe_skipped(self, i: int, reason: str) -> str:
        """Log line for an unreadable image; ValueError with --on_bad_image stop."""
        name = printable(self.source.name(i))
        if self.args.on_bad_image == "stop":
            raise ValueError(f"{name} cannot be read: {reason}; repair or remove it, or use --on_bad_image skip")
        return f"skipped: {name}: {reason}"

    def finish(self) -> None:
        """Join the indices and write the manifest. The next readable image replaces a skipped one, as in training."""
        parts = [self.load_shard_index(shard) for shard in range(len(self.shard_ranges()))]
        index = np.concatenate([part[0] for part in parts if part])
        tiles = np.concatenate([part[2] for part in parts if part]) if self.args.tile else None
        skipped = np.flatnonzero(index["bytes"] == 0)
        if len(skipped) == len(index):
            raise ValueError(f"--data_path {' '.join(self.args.data_path)}: no image can be read")
        for _ in range(2):  # twice: those at the end are replaced by the first images
            for i in skipped[::-1]:
                index[i] = index[(i + 1) % len(index)]
                if tiles is not None:
                    tiles[i] = tiles[(i + 1) % len(index)]
        if tiles is not None:
            write_atomic(self.folder / "tiles.npy", partial(np.save, arr=tiles))
        digest = hash_file(write_atomic(self.folder / "index.npy", partial(np.save, arr=index)))
        sizes = [shard_path(self.folder, shard).stat().st_size for shard in range(len(parts))]
        shards = [{"bytes": size, "sha256": part[1]} for size, part in zip(sizes, parts, strict=True) if part]
        manifest = self.plan | {"images": len(index), "shards": shards, "index_sha256": digest}
        write_json(self.folder / "manifest.json", manifest)


def build(args: argparse.Namespace) -> None:
    """Pack the images of --data_path, resuming an earlier call after its last finished shard."""
    builder = Builder(args)
    try:
        builder.prepare()
        interval_s = 0.5 if sys.stdout.isatty() else 30
        with tqdm(total=len(builder.source), unit="image", mininterval=interval_s, file=sys.stdout) as bar:
            for shard, (first, last) in enumerate(builder.shard_ranges()):
                if builder.load_shard_index(shard):
                    bar.update(last - first)
                    bar.unpause()
                else:
                    builder.write_shard(shard, first, last, bar)
        builder.finish()
    except RuntimeError as error:  # from the DataLoader: a worker died
        raise ValueError(f"{error}; run the same command again, with fewer --workers if memory was short") from error
    except OSError as error:
        line = f"--out {args.out} cannot be written ({error}); free disk space and run the same command again to resume"
        raise OSError(line) from error
    total = sum(path.stat().st_size for path in builder.folder.glob("shard-*.bin"))
    print(f"{args.out}: {len(builder.source)} images, {total / 2**30:.2f} GiB; use it as --data_path")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    # fmt: off
    make = commands.add_parser("build", help="pack a folder of images")
    make.set_defaults(command=build)
    add = make.add_argument
    add_source_arguments(make, "images, as for main_pretrain.py: a folder, tar or zip files, or a table")
    add("--out", required=True, help="folder of the cache")
    add("--input_size", type=number(int, 1), nargs="+", action=SizeAction, metavar="H", default=(224, 224),
        help="side of the training input in pixels, or H W")
    add("--crop_interpolation", choices=list(INTERPOLATIONS), default="bilinear", help="interpolation of the resize")
    add("--in_chans", type=number(int, 1), default=3, help="channels of an image")
    add_pixel_arguments(make, "")
    add("--tile", type=number(int, 8), metavar="N",
        help="cut images into equal tiles of at most N pixels a side, each an entry of the cache; also reads images of more than "
             "2^28 pixels: only for files you trust (default: whole images)")
    add("--payload", choices=PAYLOADS, default="raw",
        help="raw = fastest; zstd = smaller, lossless; jpeg = smallest, lossy (quality 95); speeds in docs/data.md")
    add("--workers", type=number(int, 0), default=os.cpu_count() or 1, help="processes that decode; 0 = this process")
    add("--shard_mib", type=number(float, 1e-3), default=1024,
        help="size of a shard in MiB; a killed build loses at most one shard")
    add("--on_bad_image", choices=["stop", "skip"], default="stop",
        help="unreadable image: stop = end the build; skip = use the next image in its place")
    # fmt: on
    check = commands.add_parser("verify", help="compare a cache with the digests in its manifest")
    check.set_defaults(command=verify)
    check.add_argument("cache", help="folder of the cache")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    args.command(args)


if __name__ == "__main__":
    run_main(main)
