"""Samplers: which images a rank loads, and in which order."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from util.dist import World
from util.rng import permutation
from util.run import Run

WORKER_BATCH = 256  # most images a worker loads at once: several workers share a large batch, and none holds all of it


class TrainSampler(Sampler):
    """(epoch, index) of this rank's samples, in parts of a micro-batch. Step k has the same on any number of ranks."""

    def __init__(self, count: int, run: Run):
        self.count, self.seed, self.batch, self.world = count, run.args.seed, run.batch, run.world
        self.micro = run.batch_size
        self.parts = -(-self.micro // WORKER_BATCH)  # of a micro-batch
        self.steps = count // run.batch  # of an epoch, whose remaining images are not used
        self.epoch = self.first = 0
        if not self.steps:
            raise ValueError(
                f"--batch_size {self.micro} x --accum_iter {run.accum_iter} x {self.world.size} ranks = "
                f"{run.batch} images per step, but --data_path has {count}; lower --batch_size"
            )

    def start(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at this step of this epoch."""
        self.epoch, self.first = epoch, step

    def samples(self, epoch: int, step: int) -> np.ndarray:
        """Indices of the images of a step, over all ranks."""
        return permutation(self.seed, epoch, self.count)[step * self.batch : (step + 1) * self.batch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.seed, self.epoch, self.count)[self.first * self.batch : self.steps * self.batch]
        for block in order.reshape(-1, self.world.size, self.micro):
            for part in np.array_split(block[self.world.rank], self.parts):
                yield [(self.epoch, int(i)) for i in part]


class EvalSampler(Sampler):
    """(0, index) of this rank's share of all samples. Nothing is padded, so that counts over the ranks are exact."""

    def __init__(self, count: int, batch_size: int, world: World, first: int = 0):
        self.indices = range(first + world.rank, count, world.size)
        self.batch_size = min(batch_size, WORKER_BATCH)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, i) for i in self.indices[start : start + self.batch_size]]
