"""From image sources to batches on the device."""

import os
import signal
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
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from util.data.cache import Cache
from util.data.folders import Source
from util.data.timeouts import DiskTimeout, in_main_thread, raise_timeout, time_limit
from util.dist import World
from util.rng import CROP, MASK, SampleRng, permutation
from util.run import Run

WORKER_BATCH = (
    256  # images that a worker prepares at once: a large batch neither waits for one worker nor fills its memory
)


class Samples(Dataset):
    """Parts of a batch: decoded, cropped uint8 images; what cannot be read is reported, not raised."""

    def __init__(
        self,
        source: Source,
        transform: Callable,
        args,
        *,
        flip: bool = False,
        noise_length: int = 0,
        skip_bad: bool = False,
    ):
        self.source, self.transform, self.flip, self.noise_length = source, transform, flip, noise_length
        self.seed, self.in_chans, self.skip_bad = args.seed, args.in_chans, skip_bad
        self.patience = 60 * args.timeout_minutes  # seconds

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """(epoch, index) of B samples -> images (B, H, W, C) uint8, flip (B,) bool, noise (B, U) float32, label, index, bad.

        `bad` lists (name, reason) of the images that could not be read; with `stop` the first of them ends the batch.
        """
        bad: list[tuple[str, str]] = []
        crops, masks = SampleRng(self.seed, CROP), SampleRng(self.seed, MASK)
        flips, index = [], []
        noise = np.empty((len(keys), self.noise_length), np.float32)
        images = None
        if in_main_thread():
            signal.signal(signal.SIGALRM, raise_timeout)
        try:
            self.source.start_epoch(keys[0][0])
            self.source.prefetch([i for _, i in keys])
        except (ValueError, OSError) as error:  # raised here, it would come out of a worker with a traceback
            return {"bad": bad, "stop": str(error)}
        for n, (epoch, i) in enumerate(keys):
            rng = crops.at(epoch, i)
            found = self.sample(i, rng, None if images is None else images[n], bad)
            if found is None:
                return {"bad": bad}
            if images is None:
                batch_images = alloc_batch(len(keys), found[0].shape)
                images = batch_images.numpy()
                images[0] = found[0]
            index.append(found[1])
            flips.append(rng.random() < 0.5)
            masks.at(epoch, i).random(out=noise[n], dtype=np.float32)
        batch = {
            "images": batch_images,
            "noise": torch.from_numpy(noise),
            "label": torch.from_numpy(self.source.labels[index].astype(np.int64)),
            "index": torch.tensor(index),
        }
        return batch | ({"flip": torch.tensor(flips)} if self.flip else {}) | {"bad": bad}

    def sample(self, i: int, rng, out: np.ndarray | None, bad: list[tuple[str, str]]) -> tuple[np.ndarray, int] | None:
        """Pixels of image i, cropped into `out`, or with `skip` of the next one that can be read; and its index."""
        for candidate in range(i, i + (len(self) if self.skip_bad else 1)):
            index = candidate % len(self)
            try:
                with time_limit(self.patience):
                    return self.transform(self.source.read(index, self.in_chans), rng, out), index
            except Exception as error:  # decoders raise everything from OSError to struct.error
                name = self.source.name(index).replace("\n", "\\n")
                bad.append((name, " ".join(str(error).split()) or type(error).__name__))
                if isinstance(error, DiskTimeout):  # it is not the image that is bad
                    return None
        return None


def alloc_batch(count: int, shape: tuple[int, ...]) -> Tensor:
    """Memory (count, *shape) uint8, in a worker process that which it shares: what is written is not copied again."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty((count, *shape), np.uint8))  # NumPy asks for huge pages, torch does not
    return default_collate([torch.zeros((), dtype=torch.uint8).expand(count, *shape)])[0]


class TrainSampler(Sampler):
    """Parts of micro-batches of (epoch, index) for this rank; step k holds the same samples on any number of ranks."""

    def __init__(self, count: int, run: Run):
        self.count, self.seed, self.batch, self.world = count, run.args.seed, run.batch, run.world
        self.micro = run.args.batch_size
        self.parts = -(-self.micro // WORKER_BATCH)  # of a micro-batch
        self.steps = count // run.batch  # the tail of each epoch's order waits for another epoch
        self.epoch = self.first = 0
        if not self.steps:
            raise ValueError(
                f"--batch_size {self.micro} x --accum_iter {run.args.accum_iter} x {self.world.size} ranks asks for "
                f"{run.batch} images a step, --data_path has {count}; lower --batch_size"
            )

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration goes through this epoch, from this step."""
        self.epoch, self.first = epoch, step

    def samples(self, epoch: int, step: int) -> np.ndarray:
        """Indices of the images of a step, over all ranks."""
        return permutation(self.seed, epoch, self.count)[step * self.batch : (step + 1) * self.batch]

    def __len__(self) -> int:
        return (self.steps - self.first) * (self.batch // (self.micro * self.world.size)) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.seed, self.epoch, self.count)[self.first * self.batch : self.steps * self.batch]
        for block in order.reshape(-1, self.world.size, self.micro):
            for part in np.array_split(block[self.world.rank], self.parts):
                yield [(self.epoch, int(i)) for i in part]


class EvalSampler(Sampler):
    """Every sample once, over the ranks: no padding, so counts are exact."""

    def __init__(self, count: int, batch_size: int, world: World):
        self.mine = range(world.rank, count, world.size)
        self.batch_size = min(batch_size, WORKER_BATCH)

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(0, i) for i in self.mine[start : start + self.batch_size]]


def identity(batch: Any) -> Any:
    """Collate function: the batch is one already."""
    return batch


class ThreadLoader:
    """What make_loader gives for a cache: the batches of a DataLoader, read by threads.

    Reading and copying hold no lock of the interpreter, and memory that no other process sees is several times faster.
    """

    def __init__(self, samples: Samples, order: Any, threads: int, pin: bool):
        self.dataset, self.batch_sampler, self.num_workers, self.pin = samples, order, threads, pin

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def batch(self, keys: list[tuple[int, int]]) -> dict:
        batch = self.dataset.__getitems__(keys)
        return {k: v.pin_memory() if self.pin and isinstance(v, Tensor) else v for k, v in batch.items()}

    def __iter__(self) -> Iterator[dict]:
        ahead: deque[Future] = deque()
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            for keys in self.batch_sampler:
                ahead.append(pool.submit(self.batch, keys))
                if len(ahead) > 2 * self.num_workers:  # as many as a DataLoader has in advance
                    yield self.result(ahead.popleft())
            while ahead:
                yield self.result(ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a disk that does not answer is not waited for

    def result(self, batch: Future) -> dict:
        try:
            return batch.result(self.dataset.patience)
        except FutureTimeout as error:
            raise RuntimeError(
                f"DataLoader timed out after {self.dataset.patience:.0f} s (--timeout_minutes)"
            ) from error


def init_worker(parent: int, worker: int) -> None:
    """A signal to the whole process group, Ctrl-C for one, is for the process that trains: it needs its loaders to end well."""
    if os.getppid() != parent:  # killed since it made this one, which torch would let wait for it for ever
        os._exit(1)
    os.setpgrp()
    signal.set_wakeup_fd(-1)  # what it gets is not counted there (util/interrupt.py)


def make_loader(samples: Samples, order: Sampler, args, device: torch.device) -> DataLoader | ThreadLoader:
    workers = args.num_workers
    if workers is None:
        limited = hasattr(os, "sched_getaffinity")  # macOS has none
        cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
        workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if isinstance(samples.source, Cache) and workers:
        return ThreadLoader(samples, order, workers, pin=device.type == "cuda")
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=identity,
        worker_init_fn=partial(init_worker, os.getpid()),
        timeout=2 * samples.patience if workers else 0,  # where a worker cannot even be woken
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and isinstance(order, TrainSampler),
    )


def train_loader(run: Run, source: Source, transform: Callable, *, flip: bool, noise_length: int = 0) -> Any:
    """Endless training data; `loader.batch_sampler.start(epoch, step)` says where the next iteration begins."""
    skip_bad = run.args.on_bad_image == "skip"
    samples = Samples(source, transform, run.args, flip=flip, noise_length=noise_length, skip_bad=skip_bad)
    return make_loader(samples, TrainSampler(len(samples), run), run.args, run.world.device)


def eval_loader(args, world: World, source: Source, transform: Callable) -> Any:
    """Every image of the source once, spread over the ranks."""
    samples = Samples(source, transform, args)
    return make_loader(samples, EvalSampler(len(samples), args.batch_size, world), args, world.device)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all that is copied to a device: torch's allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


class DevicePrefetcher:
    """Batches on the device; knows how long it waited for them and which images were bad."""

    def __init__(self, loader: Iterable[dict], device: torch.device, parts: int = 1):
        self.loader, self.device, self.parts = loader, device, parts  # parts of a batch, as the loader gives them
        self.copies = copy_stream(device) if device.type == "cuda" else None
        self.waited = 0.0  # seconds
        self.bad: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[dict]:
        parts = iter(self.loader)
        while True:
            before = time.perf_counter()
            some = list(islice(parts, self.parts))
            self.waited += time.perf_counter() - before
            if not some:
                return
            yield self.joined(some)

    def joined(self, parts: list[dict]) -> dict:
        """Parts -> a batch on the device, copied while the device still computes the step before."""
        for part in parts:
            bad = part.pop("bad")
            if "stop" in part:
                raise ValueError(part["stop"])
            if "images" not in part:
                name, reason = bad[-1]
                raise ValueError(
                    f"{name} cannot be read: {reason}; mend or remove it; training can --on_bad_image skip"
                )
            self.bad += bad
        with torch.cuda.stream(self.copies):  # of None it does nothing
            moved = [{name: value.to(self.device, non_blocking=True) for name, value in part.items()} for part in parts]
            batch = moved[0] if len(moved) == 1 else {k: torch.cat([part[k] for part in moved]) for k in moved[0]}
        if self.copies:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.copies)
            for value in batch.values():
                value.record_stream(now)
        return batch


def one_batch(samples: Samples, indices: Sequence[int], device: torch.device) -> dict:
    """These samples of epoch 0, as a batch on the device."""
    batch = next(iter(DevicePrefetcher([samples.__getitems__([(0, i) for i in indices])], device)))
    samples.source.close()  # training begins a stream anew
    return batch
