"""Packed cache of resized images: format and reading. `util/cache.py` builds it."""

import io
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.folders import Source
from util.data.pixels import PixelOptions
from util.files import hash_file, import_package, printable, read_json

FORMAT = "pixmim-cache-1"
PAYLOADS = ("raw", "zstd", "jpeg")
PIXEL_FLAGS = ("bands", "value_range", "alpha")
FIELDS = {"offset": "<u8", "bytes": "<u4", "label": "<i4", "shard": "<u4", "height": "<u4", "width": "<u4"}
ENTRY = np.dtype([*FIELDS.items()])


def encode_payload(payload: str, pixels: np.ndarray) -> bytes:
    """Pixels (h, w, C) uint8 -> bytes: `raw`; `zstd` of the difference to the row above; `jpeg`, which is lossy."""
    if payload == "zstd":
        difference = np.diff(pixels, axis=0, prepend=np.uint8(0))
        return import_package("zstandard", "--payload zstd").ZstdCompressor(level=3).compress(difference.tobytes())
    if payload == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()
    return pixels.tobytes()


def decode_payload(payload: str, content: bytes | memoryview, shape: tuple[int, int, int]) -> np.ndarray:
    """The inverse of `encode_payload`: pixels of this shape."""
    if payload == "jpeg":
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return np.asarray(image).reshape(shape)
    if payload == "zstd":
        decompressor = import_package("zstandard", "--payload zstd").ZstdDecompressor()
        content = decompressor.decompress(content, max_output_size=int(np.prod(shape)))
        return np.add.accumulate(np.frombuffer(content, np.uint8).reshape(shape), axis=0, dtype=np.uint8)
    return np.frombuffer(content, np.uint8).reshape(shape)


def is_cache(folder: str | Path) -> bool:
    """True for a finished cache. Other data sets may have a manifest.json as well."""
    return all((Path(folder) / name).is_file() for name in ("manifest.json", "plan.json"))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.bin"  # never a name from the manifest


class Cache(Source):
    """A finished cache: `SimpleResizedCrop.resize` of each image, in the order of the folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            manifest = read_json(self.folder / "manifest.json")
            if manifest["format"] != FORMAT or manifest["payload"] not in PAYLOADS:
                raise ValueError(f"its format is {manifest['format']!r} with {manifest['payload']!r}, not {FORMAT!r}")
            self.flags = {flag: manifest[flag] for flag in ("input_size", "crop_interpolation", "in_chans")}
            self.flags |= {flag: manifest.get(flag) for flag in PIXEL_FLAGS}
            self.payload, self.classes = str(manifest["payload"]), []
            self.shard_digests = [str(shard["sha256"]) for shard in manifest["shards"]]
            self.names_digest = manifest.get("names")
            sizes = np.array([int(shard["bytes"]) for shard in manifest["shards"]], np.uint64)
            index = np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)
            self.index = index.view(np.ndarray)  # still mapped; a memmap is slower to index
            self.check_index(manifest["images"], sizes)
            if hash_file(self.folder / "index.npy") != manifest["index_sha256"]:
                raise ValueError("the checksum of index.npy is wrong")
            cut = self.folder / "tiles.npy"
            self.tiles = np.load(cut, allow_pickle=False) if cut.exists() else None  # (N, 3): image, top, left
        except OSError:  # names its file
            raise
        except Exception as error:  # NumPy raises everything up to tokenize.TokenError for a damaged header
            raise ValueError(f"--data_path {folder} is a damaged cache: {printable(error)}; build it again") from error
        self.raise_open_limit()
        self.labels = self.index["label"]
        self.files: dict[int, int] = {}
        self.local = threading.local()  # the buffer of each thread

    def __reduce__(self):
        return Cache, (self.folder,)  # a spawned process opens its own

    def check_index(self, count: int, sizes: np.ndarray) -> None:
        """ValueError unless all shards have their full size and the index lies within them."""
        index = self.index
        if index.dtype != ENTRY or index.shape != (count,) or not count:
            raise ValueError(f"index.npy has {index.shape} entries of {index.dtype}, not {count} of {ENTRY}")
        for shard, size in enumerate(sizes):
            path = shard_path(self.folder, shard)
            found = path.stat().st_size if path.exists() else "no"
            if found != size:
                raise ValueError(f"{path.name} has {found} bytes of {size}")
        limits = sizes[np.minimum(index["shard"], len(sizes) - 1)]
        beyond = (index["offset"] > limits) | (index["offset"] + index["bytes"] > limits)  # the sum may overflow
        if index["shard"].max() >= len(sizes) or beyond.any():
            raise ValueError("index.npy points beyond the shards")

    def raise_open_limit(self) -> None:
        """Allow this process to keep all shards open; ValueError if the hard limit is too low."""
        (soft, hard), needed = resource.getrlimit(resource.RLIMIT_NOFILE), len(self.shard_digests) + 256
        if needed > hard:
            raise ValueError(
                f"--data_path {self.folder} has {len(self.shard_digests)} shards, too many for {hard} open files "
                "(ulimit -Hn); raise this limit, or build with a larger --shard_mib"
            )
        if needed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    def check_flags(self, args) -> None:
        """ValueError for flags that need other pixels than the cache holds."""
        if args.crop != "src":
            raise ValueError(
                f"--crop {args.crop}: the cache {self.folder} holds resized images, but RandomResizedCrop resizes "
                "another part of the image each time; use --crop src, or --data_path with the images"
            )
        requested = vars(args) | {"input_size": list(args.input_size)}
        if requested.get("sizes"):
            raise ValueError(f"--sizes: the cache {self.folder} holds one size; use --data_path with the images")
        for flag, cached in self.flags.items():
            if flag in PIXEL_FLAGS and requested.get(flag) in (None, "auto", ["auto"]):
                continue  # `resolve_pixels` takes the cache's
            if requested[flag] != cached:
                raise ValueError(
                    f"--{flag} {requested[flag]}: the cache {self.folder} was built with {cached}; "
                    "build another, or use --data_path with the images"
                )

    def name(self, i: int) -> str:
        if self.tiles is None:
            return f"image {i} of {self.folder}"
        image, top, left = self.tiles[i].tolist()
        return f"tile at row {top}, column {left} of image {image} of {self.folder}"

    def summary(self) -> str:
        return f"{self.folder}: a cache of {len(self)} images"

    def digest(self) -> str | None:
        return self.names_digest  # that of the folder, so that a run on the folder can resume on its cache

    def file(self, shard: int) -> int:
        """File descriptor of a shard, shared by all threads."""
        if shard not in self.files:
            opened = os.open(shard_path(self.folder, shard), os.O_RDONLY)
            if self.files.setdefault(shard, opened) != opened:  # another thread was faster
                os.close(opened)
        return self.files[shard]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Ask the system to read the images of a batch from the disk in parallel."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for offset, length, _, shard, _, _ in self.index[np.sort(indices)].tolist():
            os.posix_fadvise(self.file(shard), offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, i: int, options: PixelOptions) -> np.ndarray:
        """Pixels (h, w, C), valid until this thread reads another image: allocating takes longer than reading."""
        offset, length, _, shard, height, width = self.index[i].item()
        if length > len(getattr(self.local, "buffer", b"")):
            self.local.buffer = bytearray(length)
        content = memoryview(self.local.buffer)[:length]
        if os.preadv(self.file(shard), [content], offset) < length:
            raise EOFError(f"{shard_path(self.folder, shard)} ended early")
        return decode_payload(self.payload, content, (height, width, options.in_chans))
