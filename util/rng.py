"""Counter-based randomness: every draw is a function of (seed, epoch, sample index) or of (seed, step, rank)."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

ORDER, CROP, MASK, STEP = range(4)  # what a draw is for; the streams are independent


def generator(seed: int, stream: int, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """Generator whose draws depend on these four numbers alone (Philox: they are its key and counter)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, epoch, index]))


class SampleRng:
    """Generators of a stream, one after the other: to set a Philox anew takes an eighth of the time of making one."""

    def __init__(self, seed: int, stream: int):
        self.rng = generator(seed, stream)
        self.start = self.rng.bit_generator.state
        self.counter = self.start["state"]["counter"]

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """What `generator` gives for this sample, until the next call."""
        self.counter[2:] = epoch, index
        self.rng.bit_generator.state = self.start
        return self.rng


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of `count` samples in an epoch, (count,) int64."""
    return np.argsort(generator(seed, ORDER, epoch).random(count), kind="stable")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is drawn on the device in a (micro) step: dropout, drop path, mixup, erasing."""
    return int(generator(seed, STEP, step, rank).bit_generator.random_raw())


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for libraries that draw from nothing else."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's augmentations draw from it
    torch.manual_seed(seed)


class SeededTransform:
    """torchvision and timm transforms as a function of (bands, generator): PIL images -> uint8 (H, W, C).

    Every band is transformed with the same draws. `out` is memory for the result.
    """

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, bands: Sequence, rng: np.random.Generator, out: np.ndarray | None = None) -> np.ndarray:
        seed, pixels = int(rng.bit_generator.random_raw()), []
        for band in bands:
            seed_everything(seed)
            pixels.append(np.atleast_3d(np.asarray(self.transform(band))))
        return np.concatenate(pixels, axis=2, out=out)
