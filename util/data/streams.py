"""Tar shards read from front to back, from http or a pipe."""

import random
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import count
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from util.data.decode import EXTENSIONS, read_image
from util.data.folders import Source
from util.data.tars import expand, regular, webdataset
from util.dist import rank_from_env
from util.rng import ORDER, generator

BUFFER = 1000  # encoded images of a stream that a worker draws the next one from


TOO_FEW = "--data_path: {} shards are too few for {} ranks x {} workers; lower --num_workers, or pack smaller shards"


class Watched:
    """A file that is read from front to back and remembers its end."""

    def __init__(self, file: Any):
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.tail = (self.tail + data[-1024:])[-1024:]
        return data


def stream_shard(url: str) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of a shard; one that is missing, damaged or ends early is an error that names it."""
    file = process = None
    try:
        file = webdataset().gopen(url)
        process = getattr(file, "proc", None)
        watched: Any = Watched(file)
        with tarfile.open(fileobj=watched, mode="r|") as tar:
            for member in regular(tar):
                if member.name.lower().endswith(EXTENSIONS):
                    content: Any = tar.extractfile(member)
                    yield f"{url}: {member.name}", content.read()
        while watched.read(2**16):
            pass
        if watched.tail != bytes(1024):  # tarfile does not mind, and webdataset neither
            raise tarfile.ReadError("it ends without the end of a tar")
        file.close()  # here webdataset looks at the exit status
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = str(error)
        if process:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(1)
                reason = f"its command ended with status {status} (curl: 22 = not there)" if status else reason
        raise ValueError(
            f"--data_path: {url} is no whole, uncompressed tar: {reason}; mend or leave out this shard"
        ) from error
    finally:
        if process and process.poll() is None:  # the epoch ended before the shard
            process.kill()
        with suppress(OSError):
            if file:
                file.close()


class Stream(Source):
    """Shards read from front to back by webdataset, for pre-training alone: images have numbers, but no places.

    Number i draws crop, flip and mask as everywhere; which image it is depends on (seed, epoch, rank, worker).
    """

    def __init__(self, data_path: str, samples: int | None, seed: int):
        if samples is None:
            raise ValueError("--stream_samples is needed: a stream does not tell how many images make an epoch")
        webdataset()
        self.urls, self.seed = expand(data_path), seed
        self.labels, self.classes = np.zeros(samples, np.uint8), []
        self.rank, self.ranks, _ = rank_from_env()
        self.close()

    def __getstate__(self) -> dict:
        return vars(self) | {"epoch": None, "images": None}

    def close(self) -> None:
        if vars(self).get("images"):
            self.images.close()
        self.epoch: int | None = None
        self.images: Any = None
        self.fetched: dict[int, tuple[str, bytes]] = {}

    def start_epoch(self, epoch: int) -> None:
        """A new epoch begins anew, with the shards in another order."""
        if epoch != self.epoch:
            self.close()
            worker = get_worker_info()
            number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
            if len(self.urls) < self.ranks * workers:
                raise ValueError(TOO_FEW.format(len(self.urls), self.ranks, workers))
            self.epoch, self.images = epoch, self.endless(epoch, self.rank + self.ranks * number, self.ranks * workers)

    def endless(self, epoch: int, share: int, shares: int) -> Iterator[tuple[str, bytes]]:
        """Images of this worker's share of the shards; who is through before the epoch ends takes another share."""
        for turn in count(1):
            rng = generator(self.seed, ORDER, epoch, turn)  # 0 is the order of a folder
            mine = rng.permutation(len(self.urls))[share::shares]
            draw = random.Random(int(rng.integers(2**63, size=shares)[share]))
            images = (image for n in mine for image in stream_shard(self.urls[n]))
            empty = True
            for image in webdataset().shuffle(BUFFER, rng=draw)(images):
                empty = False
                yield image
            if empty:
                raise ValueError(f"--data_path: {self.urls[mine[0]]} holds no image ({' '.join(EXTENSIONS)})")

    def prefetch(self, indices: Sequence[int]) -> None:
        self.fetched = dict(zip(indices, self.images, strict=False))

    def image(self, i: int) -> tuple[str, bytes]:
        """What was fetched as i; in place of a bad one, another of the batch."""
        return self.fetched[i] if i in self.fetched else list(self.fetched.values())[i % len(self.fetched)]

    def name(self, i: int) -> str:
        return self.image(i)[0]

    def read(self, i: int, in_chans: int) -> list[Image.Image]:
        return read_image(BytesIO(self.image(i)[1]), in_chans)
