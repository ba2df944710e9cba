"""Samples: the images of a source, decoded, cropped and stacked to parts of a batch."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from util.data.folders import Source
from util.data.pixels import PixelOptions
from util.data.timeouts import DiskTimeout, time_limit
from util.dist import local_ranks
from util.rng import CROP, MASK, SampleRng


class Stage(NamedTuple):
    """Crop and number of random values of the mask in the epochs before `end`."""

    end: int
    transform: Callable
    noise_length: int


class Samples(Dataset):
    """Images of a source by (epoch, index). An unreadable image is reported in the result, not raised.

    `stages`, in ascending order, replace `transform` and `noise_length` in the epochs before the last one's end.
    """

    def __init__(
        self, source: Source, transform: Callable, args, *, flip: bool = False, noise_length: int = 0,
        replace_bad: bool = False, stages: Sequence[Stage] = (),
    ):  # fmt: skip
        self.source, self.transform, self.flip, self.noise_length = source, transform, flip, noise_length
        self.stages = stages
        self.seed, self.options, self.replace_bad = args.seed, PixelOptions.from_args(args), replace_bad
        self.on_bad_image = getattr(args, "on_bad_image", None)  # visualize.py has no such flag and stops
        self.timeout_s = 60 * args.timeout_minutes

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """(epoch, index) of B samples -> images (B, H, W, C) uint8, flip (B,) bool, noise (B, U) float32, label, index.

        `bad` lists (name, reason) of unreadable images. A result with `stop`, the reason, ends the run; it is not raised
        here because exceptions of workers arrive with a traceback. Without `images` all of them were left out.
        """
        bad: list[tuple[str, str]] = []
        last = Stage(0, self.transform, self.noise_length)
        _, transform, noise_length = next((stage for stage in self.stages if keys[0][0] < stage.end), last)
        try:
            self.source.start_epoch(keys[0][0])
            self.source.prefetch([i for _, i in keys])
        except (ValueError, OSError) as error:
            return {"bad": bad, "stop": str(error)}
        crops, masks = SampleRng(self.seed, CROP), SampleRng(self.seed, MASK)
        flips: list[bool] = []
        index: list[int] = []
        noise = np.empty((len(keys), noise_length), np.float32)
        images = None
        for epoch, i in keys:
            rng, n = crops.at(epoch, i), len(index)
            try:
                sample = self.read_sample(i, transform, rng, None if images is None else images[n], bad)
            except ValueError as error:
                return {"bad": bad, "stop": str(error)}
            if sample is None:
                continue
            pixels, used = sample
            if images is None:
                stacked = alloc_batch(len(keys), pixels.shape)
                images = stacked.numpy()
                images[0] = pixels
            index.append(used)
            flips.append(rng.random() < 0.5)
            masks.at(epoch, i).random(out=noise[n], dtype=np.float32)
        if images is None:
            return {"bad": bad}
        batch = {"images": stacked[: len(index)], "noise": torch.from_numpy(noise)[: len(index)]}
        batch["label"] = torch.from_numpy(self.source.labels[index].astype(np.int64))
        batch["index"] = torch.tensor(index)
        batch |= {"flip": torch.tensor(flips)} if self.flip else {}
        if get_worker_info() and not stacked.is_shared():  # arrays go through a pipe, tensors through shared memory
            return {name: value.numpy() for name, value in batch.items()} | {"bad": bad}
        return batch | {"bad": bad}

    def read_sample(self, i: int, transform: Callable, rng, out, bad: list) -> tuple[np.ndarray, int] | None:
        """(pixels, index) of image i; if unreadable, of the next readable one, or None. Appends to `bad`.

        ValueError without --on_bad_image skip, if no image can be read, or if the disk does not answer.
        """
        remedy = "; repair or remove it" + (", or use --on_bad_image skip" if self.on_bad_image == "stop" else "")
        for candidate in range(i, i + (len(self) if self.replace_bad else 1)):
            index = candidate % len(self)
            try:
                with time_limit(self.timeout_s):
                    return transform(self.source.read(index, self.options), rng, out), index
            except Exception as error:  # decoders raise everything from OSError to struct.error
                name = self.source.name(index).replace("\n", "\\n")
                reason = " ".join(str(error).split()) or type(error).__name__
                bad.append((name, reason))
                # after a timeout of the disk the next image would time out as well
                if self.on_bad_image != "skip" or isinstance(error, DiskTimeout):
                    raise ValueError(f"{name} cannot be read: {reason}{remedy}") from error
        if self.replace_bad:
            raise ValueError(f"{name} cannot be read: {reason}; nor can any other image")
        return None


def free_shared_memory() -> float:
    """Free bytes of /dev/shm, by which workers pass tensors; Docker gives it 64 MiB. inf where there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf


def alloc_batch(count: int, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised (count, *shape) uint8; in a worker process in shared memory if it has room, which saves a copy."""
    worker, size = get_worker_info(), count * math.prod(shape)
    # each worker of this machine may be about to fill a batch
    workers = worker.num_workers * local_ranks() if worker else 0
    if worker is None or free_shared_memory() < workers * (size + 2**20):
        return torch.from_numpy(np.empty((count, *shape), np.uint8))  # NumPy asks for huge pages, torch does not
    return default_collate([torch.zeros((), dtype=torch.uint8).expand(count, *shape)])[0]
