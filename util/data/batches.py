"""Loaders (processes or threads), and batches copied to the device ahead of time."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.data.cache import Cache
from util.data.folders import Source
from util.data.samplers import EvalSampler, TrainSampler
from util.data.samples import Samples, free_shared_memory
from util.dist import World, local_ranks
from util.run import Run


class ThreadLoader:
    """The batches of a DataLoader, read by threads; for a cache.

    Reading and copying release the GIL, and private memory is several times faster than memory shared by processes.
    """

    def __init__(self, samples: Samples, sampler: Any, threads: int, pin: bool):
        self.dataset, self.batch_sampler, self.num_workers, self.pin = samples, sampler, threads, pin

    def __iter__(self) -> Iterator[dict]:
        pending: deque[Future] = deque()
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            for keys in self.batch_sampler:
                pending.append(pool.submit(self.load, keys))
                if len(pending) > 2 * self.num_workers:  # DataLoader's prefetch_factor is 2 as well
                    yield self.wait_for(pending.popleft())
            while pending:
                yield self.wait_for(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a thread may wait for a disk for ever

    def load(self, keys: list[tuple[int, int]]) -> dict:
        batch = self.dataset.__getitems__(keys)
        return {k: v.pin_memory() if self.pin and isinstance(v, Tensor) else v for k, v in batch.items()}

    def wait_for(self, batch: Future) -> dict:
        timeout = self.dataset.timeout_s
        try:
            return batch.result(timeout)
        except FutureTimeout as error:
            raise RuntimeError(f"DataLoader timed out after {timeout:.0f} s (--timeout_minutes)") from error


def init_worker(parent: int, worker: int) -> None:
    """Give a worker its own process group: Ctrl-C must not end it before the main process has finished a step."""
    if os.getppid() != parent:  # the parent was killed during the fork; torch would let this worker wait for ever
        os._exit(1)
    os.setpgrp()
    signal.set_wakeup_fd(-1)  # signals of a worker must not wake up the main process (util/checkpoint/stop.py)


def default_workers() -> int:
    """This rank's share of the cores, at most 24."""
    limited = hasattr(os, "sched_getaffinity")  # macOS has none
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    # srun may have bound this process to its share of the node's cores; torchrun does not
    on_node = cores if "LOCAL_WORLD_SIZE" in os.environ else int(os.environ.get("SLURM_CPUS_ON_NODE", cores))
    return min(24, max(1, min(cores, on_node // local_ranks())))


def make_loader(samples: Samples, sampler: Any, num_workers: int | None, device: torch.device) -> Any:
    """Loader of the parts that a sampler lists: threads for a cache, else processes; num_workers 0 is this process."""
    workers = default_workers() if num_workers is None else num_workers
    if isinstance(samples.source, Cache) and workers:
        return ThreadLoader(samples, sampler, workers, pin=device.type == "cuda")
    return DataLoader(
        samples, batch_sampler=sampler, num_workers=workers, collate_fn=dict,  # samples are batches already
        worker_init_fn=partial(init_worker, os.getpid()), pin_memory=device.type == "cuda",
        timeout=2 * samples.timeout_s if workers else 0,  # for a worker that its own time limit cannot interrupt
        persistent_workers=workers > 0 and isinstance(sampler, TrainSampler),
    )  # fmt: skip


def train_loader(run: Run, source: Source, transform: Callable, *, flip: bool, **options) -> Any:
    """Loader of training data. `loader.batch_sampler.start(epoch, step)` sets where the next iteration begins.

    `options` are passed to Samples.
    """
    samples = Samples(source, transform, run.args, flip=flip, replace_bad=True, **options)
    return make_loader(samples, TrainSampler(len(samples), run), run.args.num_workers, run.world.device)


def eval_loader(args, world: World, source: Source, transform: Callable, first: int = 0) -> "DevicePrefetcher":
    """Batches on the device of every image of the source from `first` on, each once, spread over the ranks.

    With --on_bad_image skip unreadable images are left out and collected in `bad`.
    """
    samples = Samples(source, transform, args)
    sampler = EvalSampler(len(samples), args.batch_size, world, first)
    return DevicePrefetcher(make_loader(samples, sampler, args.num_workers, world.device), world.device)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to a device: torch's allocator does not share memory between streams."""
    return torch.cuda.Stream(device)


@cache
def report_small_memory() -> None:
    """Print once that loader workers pass their batches through pipes."""
    free = free_shared_memory() / 2**20
    print(
        f"warning: /dev/shm has {free:.0f} MiB free, too little for the loader workers: batches go through pipes, which is slower; "
        "enlarge it (docker run --shm-size=8g or --ipc=host)",
        file=sys.stderr,
    )


class DevicePrefetcher:
    """Batches of a loader on the device. A batch is copied while the device still computes the step before."""

    def __init__(self, loader: Iterable[dict], device: torch.device, parts: int = 1):
        self.loader, self.device, self.parts = loader, device, parts  # `parts` of the loader make a batch
        self.stream = copy_stream(device) if device.type == "cuda" else None
        self.waited = 0.0  # seconds spent waiting for the loader
        self.bad: list[tuple[str, str]] = []  # (name, reason) of unreadable images; whoever reports them empties it

    def __iter__(self) -> Iterator[dict]:
        loaded = iter(self.loader)
        while True:
            before = time.perf_counter()
            parts = list(islice(loaded, self.parts))
            self.waited += time.perf_counter() - before
            if not parts:
                return
            for part in parts:
                if "stop" in part:
                    raise ValueError(part["stop"])
                self.bad += part.pop("bad")
            if parts := [part for part in parts if part]:  # all images of an evaluation's part may be unreadable
                yield self.copy(parts)

    def copy(self, parts: list[dict]) -> dict:
        """Parts on the host -> one batch on the device."""
        if isinstance(parts[0]["images"], np.ndarray):
            report_small_memory()
            parts = [{name: torch.from_numpy(value) for name, value in part.items()} for part in parts]
        with torch.cuda.stream(self.stream):  # does nothing for None
            moved = [{name: value.to(self.device, non_blocking=True) for name, value in part.items()} for part in parts]
            batch = moved[0] if len(moved) == 1 else {k: torch.cat([part[k] for part in moved]) for k in moved[0]}
        if self.stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for value in batch.values():
                value.record_stream(current)
        return batch


def load_batch(samples: Samples, indices: Sequence[int], device: torch.device) -> dict:
    """These samples, as drawn in the first epoch of the final image size, as one batch on the device."""
    epoch = max((stage.end for stage in samples.stages), default=0)
    batch = next(iter(DevicePrefetcher([samples.__getitems__([(epoch, i) for i in indices])], device)))
    samples.source.close()  # training starts a stream from its beginning
    return batch
