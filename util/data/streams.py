"""Tar shards read sequentially: from http, a pipe, or compressed files."""

import bz2
import gzip
import lzma
import random
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from util.data.archives import has_key, iter_files
from util.data.decode import EXTENSIONS
from util.data.folders import IMAGE, Source, kind_of
from util.dist import rank_from_env
from util.files import import_package
from util.rng import ORDER, generator

SHUFFLE_BUFFER = 1000  # encoded images from which a worker draws the next one
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def is_stream(data_path: str) -> bool:
    """True for a URL or a `pipe:` command."""
    return re.match(r"pipe:|[a-z][a-z0-9]+://", data_path) is not None


def import_webdataset() -> Any:
    """The optional package, which only streams and lists in braces need."""
    return import_package("webdataset", "a stream or a list in braces")


def open_shard(url: str) -> Any:
    """File object of a URL, a command or a compressed file."""
    if is_stream(url):
        return import_webdataset().gopen(url)
    with open(url, "rb") as file:
        start = file.read(6)
    opener: Any = next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), None)
    if opener is None:
        raise ValueError("it is not compressed by gzip, bzip2 or xz; unpack it to a .tar")
    return opener(url)


class TailReader:
    """File that is read sequentially; `tail` holds the last 1024 bytes read."""

    def __init__(self, file: Any):
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.tail = (self.tail + data[-1024:])[-1024:]
        return data


def read_shard(url: str, tar_key: str | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of each image of a shard; ValueError if the shard is missing, damaged or ends early."""
    file = process = None
    try:
        file = open_shard(url)
        process = getattr(file, "proc", None)
        reader: Any = TailReader(file)
        with tarfile.open(fileobj=reader, mode="r|") as tar:
            for member in iter_files(tar):
                if kind_of(member.name) == IMAGE and has_key(member.name, tar_key):
                    content: Any = tar.extractfile(member)
                    yield f"{url}: {member.name}", content.read()
        while reader.read(2**16):
            pass
        if reader.tail != bytes(1024):  # neither tarfile nor webdataset checks this
            raise tarfile.ReadError("the end-of-archive marker is missing")
        file.close()  # webdataset checks the exit status here
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        reason = str(error)
        if process:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(1)
                reason = f"its command ended with status {status} (curl: 22 = not found)" if status else reason
        raise ValueError(f"--data_path: {url} is not a complete tar: {reason}; repair or omit it") from error
    finally:
        if process and process.poll() is None:  # the epoch ended within the shard
            process.kill()
        with suppress(OSError):
            if file:
                file.close()


class Stream(Source):
    """Tar shards read sequentially, for pre-training. Which image is index i depends on (seed, epoch, rank, worker)."""

    epoch: int | None = None  # of `images`
    images: Any = None  # generator of (name, encoded image)

    def __init__(self, urls: Sequence[str], samples: int | None, seed: int, tar_key: str | None = None):
        import_webdataset()
        self.urls, self.seed, self.tar_key = list(urls), seed, tar_key
        if samples is None and any(map(is_stream, urls)):
            raise ValueError(f"{urls[0]} is a stream of unknown length; set --stream_samples")
        if samples is None:
            samples = sum(1 for url in urls for _ in read_shard(url, tar_key))
        self.labels, self.classes = np.zeros(samples, np.uint8), []
        self.rank, self.ranks, _ = rank_from_env()
        self.prefetched: dict[int, tuple[str, bytes]] = {}

    def __getstate__(self) -> dict:
        return vars(self) | {"epoch": None, "images": None}  # each worker opens its own

    def close(self) -> None:
        if self.images:
            self.images.close()
        self.epoch, self.images, self.prefetched = None, None, {}

    def start_epoch(self, epoch: int) -> None:
        """Open the shards in the order of a new epoch."""
        if epoch == self.epoch:
            return
        self.close()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        readers = self.ranks * workers
        if len(self.urls) < readers:
            raise ValueError(
                f"--data_path: {len(self.urls)} shards are too few for {self.ranks} ranks x {workers} workers; "
                "lower --num_workers or make smaller shards"
            )
        self.epoch, self.images = epoch, self.read_images(epoch, self.rank + self.ranks * number, readers)

    def read_images(self, epoch: int, reader: int, readers: int) -> Iterator[tuple[str, bytes]]:
        """Shuffled images of every readers-th shard, without end: after the last shard the shards are dealt anew."""
        for turn in count(1):
            rng = generator(self.seed, ORDER, epoch, turn)  # turn 0 is the order of a folder
            shards = rng.permutation(len(self.urls))[reader::readers]
            draw = random.Random(int(rng.integers(2**63, size=readers)[reader]))
            images = (image for n in shards for image in read_shard(self.urls[n], self.tar_key))
            empty = True
            for image in import_webdataset().shuffle(SHUFFLE_BUFFER, rng=draw)(images):
                empty = False
                yield image
            if empty:
                raise ValueError(f"--data_path: {self.urls[shards[0]]} holds no image ({' '.join(EXTENSIONS)})")

    def prefetch(self, indices: Sequence[int]) -> None:
        self.prefetched = dict(zip(indices, self.images, strict=False))

    def encoded(self, i: int) -> tuple[str, bytes]:
        """(name, encoded image) prefetched as i; another of the batch if i is not in it, for i replaces a bad image."""
        return self.prefetched[i] if i in self.prefetched else [*self.prefetched.values()][i % len(self.prefetched)]

    def name(self, i: int) -> str:
        return self.encoded(i)[0] if self.prefetched else f"image {i} of the stream"  # a worker has read it

    def content(self, i: int) -> BytesIO:
        return BytesIO(self.encoded(i)[1])

    def digest(self) -> None:
        return None

    def summary(self) -> str:
        shards = f"{self.urls[0]}{f' and {len(self.urls) - 1} more shards' if len(self.urls) > 1 else ''}"
        return (
            f"{shards}: {len(self)} images, read from start to end in every epoch: the order comes from a buffer of "
            f"{SHUFFLE_BUFFER} images, a run resumes exactly between epochs only; uncompressed local tars have neither limit"
        )
