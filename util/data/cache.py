"""Packed cache of resized images: reading."""

import io
import json
import os
import resource
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.data.folders import Source

FORMAT = "pixmim-cache-1"


ENTRY = np.dtype(
    [("offset", "<u8"), ("bytes", "<u4"), ("label", "<i4"), ("shard", "<u4"), ("height", "<u4"), ("width", "<u4")]
)


def zstandard() -> Any:
    try:
        return import_module("zstandard")
    except ImportError as error:
        raise ValueError("--payload zstd: `pip install zstandard` first, it is optional") from error


def encode(payload: str, pixels: np.ndarray) -> bytes:
    """Pixels (h, w, C) uint8 as a payload keeps them: raw; zstd of the difference to the row above; JPEG, not exact."""
    if payload == "zstd":
        return zstandard().ZstdCompressor(level=3).compress(np.diff(pixels, axis=0, prepend=np.uint8(0)).tobytes())
    if payload == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()
    return pixels.tobytes()


def decode(payload: str, content: bytes | memoryview, shape: tuple[int, int, int]) -> np.ndarray:
    """The inverse of `encode`."""
    if payload == "jpeg":
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return np.asarray(image).reshape(shape)
    if payload == "zstd":
        content = zstandard().ZstdDecompressor().decompress(content, max_output_size=int(np.prod(shape)))
        return np.add.accumulate(np.frombuffer(content, np.uint8).reshape(shape), axis=0, dtype=np.uint8)
    return np.frombuffer(content, np.uint8).reshape(shape)


def is_cache(folder: str | Path) -> bool:
    """True for a finished cache; other data sets may have a manifest.json as well."""
    return all((Path(folder) / name).is_file() for name in ("manifest.json", "plan.json"))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.bin"  # never a name from a file


class Cache(Source):
    """A finished cache: what `SimpleResizedCrop.resize` makes of each image, in the order of the folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
            self.flags = {flag: manifest[flag] for flag in ("input_size", "crop_interpolation", "in_chans")}
            self.payload, self.classes = str(manifest["payload"]), [str(name) for name in manifest["classes"]]
            self.digests = [str(shard["sha256"]) for shard in manifest["shards"]]
            self.index_digest, self.names = str(manifest["index_sha256"]), manifest.get("names")
            sizes = np.array([int(shard["bytes"]) for shard in manifest["shards"]], np.uint64)
            index = np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)
            self.index = index.view(np.ndarray)  # still in the file, and faster to look up than a memmap
            self.check(manifest["images"], sizes)
        except (ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise ValueError(
                f"--data_path {folder} is a damaged cache: {error}; run the command that built it again"
            ) from error
        self.allow_open_shards()
        self.labels = self.index["label"]
        self.files: dict[int, int] = {}
        self.own = threading.local()  # of each thread a buffer

    def __reduce__(self):
        return Cache, (self.folder,)  # a process that is spawned opens it for itself

    def check(self, count: int, sizes: np.ndarray) -> None:
        """The index lies within shards that have their whole length."""
        index = self.index
        if index.dtype != ENTRY or index.shape != (count,) or not count:
            raise ValueError(
                f"index.npy has {index.shape} entries of {index.dtype.names}, not {count} of {ENTRY.names}"
            )
        for shard, size in enumerate(sizes):
            path = shard_path(self.folder, shard)
            found = path.stat().st_size if path.exists() else "no"
            if found != size:
                raise ValueError(f"{path.name} has {found} bytes of {size}")
        if index["shard"].max() >= len(sizes) or np.any(index["offset"] + index["bytes"] > sizes[index["shard"]]):
            raise ValueError("index.npy points beyond the shards")

    def allow_open_shards(self) -> None:
        """Raise the number of files that this process may open, if that is too low: shards stay open."""
        (allowed, most), needed = resource.getrlimit(resource.RLIMIT_NOFILE), len(self.digests) + 256
        if needed > most:
            raise ValueError(
                f"--data_path {self.folder}: its {len(self.digests)} shards are more than {most}, the files that a process may "
                "open (ulimit -n), leave room for; build with a larger --shard_mib"
            )
        if needed > allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))

    def refuse_other_flags(self, args) -> None:
        """A line for flags that ask for pixels which this cache has not."""
        if args.crop != "src":
            raise ValueError(
                f"--crop {args.crop} on the cache {self.folder}: RandomResizedCrop resizes another part of the image each "
                "time, which cannot be kept; use --crop src, or --data_path with the images"
            )
        asked = {
            "input_size": list(args.input_size),
            "crop_interpolation": args.crop_interpolation or "bilinear",
            "in_chans": args.in_chans,
        }
        for flag, has in self.flags.items():
            if asked[flag] != has:
                raise ValueError(
                    f"--{flag} {asked[flag]}: the cache {self.folder} holds images resized for {has}; "
                    f"build another, or use --data_path with the images"
                )

    def name(self, i: int) -> str:
        return f"image {i} of {self.folder}"

    def digest(self) -> str | None:
        return self.names  # of the folder: a run may go on from its cache

    def file(self, shard: int) -> int:
        """Descriptor of a shard, the same for all threads."""
        if shard not in self.files:
            opened = os.open(shard_path(self.folder, shard), os.O_RDONLY)
            if self.files.setdefault(shard, opened) != opened:  # another thread was faster
                os.close(opened)
        return self.files[shard]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Let the disk fetch the images of a batch all at once."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for offset, length, _, shard, _, _ in self.index[np.sort(indices)].tolist():
            os.posix_fadvise(self.file(shard), offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, i: int, in_chans: int) -> np.ndarray:
        """Pixels (h, w, C), until this thread reads another: new memory for each would take longer than reading."""
        offset, length, _, shard, height, width = self.index[i].item()
        if length > len(getattr(self.own, "buffer", b"")):
            self.own.buffer = bytearray(length)
        content = memoryview(self.own.buffer)[:length]
        if os.preadv(self.file(shard), [content], offset) < length:
            raise EOFError(f"{shard_path(self.folder, shard)} ended early")
        return decode(self.payload, content, (height, width, in_chans))
