"""Counter-based random numbers: functions of (seed, epoch, sample index) or of (seed, step, rank)."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

ORDER, CROP, MASK, STEP, SUBSET = range(5)  # independent streams


def generator(seed: int, stream: int, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """Generator that depends only on these four numbers: they are key and counter of a Philox."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, epoch, index]))


class SampleRng:
    """`generator` for many samples of a stream: setting the counter takes an eighth of the time of a new Philox."""

    def __init__(self, seed: int, stream: int):
        self.rng = generator(seed, stream)
        self.start = self.rng.bit_generator.state
        self.counter = self.start["state"]["counter"]

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """Generator of this sample, valid until the next call."""
        self.counter[2:] = epoch, index
        self.rng.bit_generator.state = self.start
        return self.rng


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of `count` samples in an epoch, (count,) int64."""
    return np.argsort(generator(seed, ORDER, epoch).random(count), kind="stable")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the draws on the device in a (micro) step: dropout, drop path, mixup, erasing."""
    return int(generator(seed, STEP, step, rank).bit_generator.random_raw())


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for libraries that use these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  used by timm's augmentations
    torch.manual_seed(seed)


class SeededTransform:
    """A torchvision or timm transform as a function of (bands, generator): PIL images -> uint8 (H, W, C).

    All bands are transformed with the same draws. `out`: array for the result.
    """

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, bands: Sequence, rng: np.random.Generator, out: np.ndarray | None = None) -> np.ndarray:
        seed, pixels = int(rng.bit_generator.random_raw()), []
        for band in bands:
            seed_everything(seed)
            pixels.append(np.atleast_3d(np.asarray(self.transform(band))))
        return np.concatenate(pixels, axis=2, out=out)
