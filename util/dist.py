"""Who else takes part in this run: rank, number of ranks, device."""

import os
import re
import secrets
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    control: Any = None  # group in which the ranks agree without their devices; None = the default one

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks; the same on all of them."""
        if self.size > 1:
            values = values.clone()
            torch_dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list:
        """One picklable value of each rank, in the order of the ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        torch_dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.size > 1:
            with suppress(Exception):  # a peer that died first is no reason for a second message
                torch_dist.destroy_process_group()


class DelayedMax:
    """The largest of the numbers that the ranks name after a step; known after the next, so that nobody waits for it."""

    def __init__(self, world: World):
        self.world = world
        self.pending: tuple[Any, Tensor] | None = None

    def of(self, mine: int) -> int:
        """Name a number, get the largest of those named before; alone, this one."""
        if self.world.size == 1:
            return mine
        before, largest = self.pending, torch.tensor(mine)
        work = torch_dist.all_reduce(largest, torch_dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self.pending = work, largest
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])


def rank_from_env(environ=os.environ) -> tuple[int, int, int]:
    """(rank, size, local rank) from the variables of torchrun or of srun; (0, 1, 0) without either."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun, not by sbatch: a bare python stays alone
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])  # node[03-07,12] -> node03
        environ.setdefault("MASTER_ADDR", "".join(part or "" for part in first.groups()) if first else "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000))
        return int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"])
    return 0, 1, 0


def cpu_has_bf16() -> bool:
    """True where Linux lists bfloat16 among the processor's instructions; elsewhere nobody tells."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def autocast(amp: str, device: torch.device):
    """Context of the forward pass at --amp."""
    return torch.autocast(device.type, DTYPES.get(amp), enabled=amp in DTYPES)


def check_precision(amp: str, device: torch.device) -> None:
    """Refuse a precision that the device has not."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU, and the device is {device}; use --amp bf16 or off")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--amp bf16: this GPU has no bfloat16; use --amp fp16 or off")


def rendezvous_store(rank: int, size: int, timeout: timedelta) -> torch_dist.Store:
    """The store in which the ranks find each other.

    torchrun keeps one store over all restarts (pytorch issue 135712), where ranks that died have left their addresses: so
    rank 0 tells each of the living, who ask under a word of their own, the name under which this start meets.
    """
    store = next(iter(torch_dist.rendezvous("env://", rank, size, timeout=timeout)))[0]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return store
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ask/{rank}", word := name)
        name = store.get(f"answer/{word}").decode()  # waits
        store.set(f"here/{name}/{rank}", "")
    until = time.monotonic() + timeout.total_seconds()
    while rank == 0 and not all(store.check([f"here/{name}/{other}"]) for other in range(1, size)):
        for other in range(1, size):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", name)
        if time.monotonic() > until:
            raise RuntimeError("timed out before all ranks had come")
        time.sleep(0.02)
    return torch_dist.PrefixStore(name, store)


def init_world(device: str, amp: str, timeout_minutes: float = 30) -> World:
    """Join the group that torchrun or Slurm describes, with NCCL on GPUs and gloo on CPUs.

    A rank that waits longer than `timeout_minutes` for another ends with an error.
    """
    rank, size, local_rank = rank_from_env()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type != "cuda":
            torch.zeros(1, device=place).item()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: torch has no such device here; use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device}: torch sees no GPU here; use --device cpu or install a CUDA build")
        if place.index is not None and size > 1:
            raise ValueError(f"--device {device} puts all {size} ranks on one GPU; use --device cuda")
        if place.index is None:  # a rank that Slurm shows a single GPU finds it at 0
            place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    check_precision(amp, place)
    control = None
    if size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        torch_dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=rendezvous_store(rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=place if place.type == "cuda" else None,
        )
        if place.type == "cuda":
            control = torch_dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, place, control)
