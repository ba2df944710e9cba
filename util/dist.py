"""Distributed set-up: rank, number of ranks and device, from torchrun, srun or a single process."""

import ctypes
import os
import re
import secrets
import signal
import sys
import time
import zlib
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class World(NamedTuple):
    """The ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # gloo group for messages that need no device; None = the default group

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that writes files and log lines."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, on every rank."""
        if self.size > 1:
            values = values.clone()
            torch_dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Tensors of all ranks, equal in shape, in rank order: (ranks, *shape), on every rank."""
        parts = [values]
        if self.size > 1:
            parts = [torch.empty_like(values) for _ in range(self.size)]
            torch_dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def gather(self, value: Any) -> list:
        """The picklable values of all ranks, in rank order, on every rank. RuntimeError at once if a rank has ended."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        torch_dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            with suppress(Exception):  # another rank has died and was reported already
                torch_dist.destroy_process_group()


def slurm_step(environ=os.environ) -> str:
    """Job and step of Slurm as "JOB.STEP"; "." without Slurm."""
    return f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"


def end_with_parent() -> None:
    """Let Linux send SIGTERM to this process, which then saves, when its parent dies: killed, it cannot end its children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def local_ranks(environ=os.environ) -> int:
    """Number of ranks on this node, from the variables of torchrun or srun; 1 without them."""
    if "LOCAL_WORLD_SIZE" in environ:
        return int(environ["LOCAL_WORLD_SIZE"])
    # 8(x2),4: 8 ranks on each of two nodes, 4 on a third
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE") or "1")
    per_node = [int(count) for count, nodes in tasks for _ in range(int(nodes or 1))]
    return per_node[min(int(environ.get("SLURM_NODEID", 0)), len(per_node) - 1)]


def rank_from_env(environ=os.environ) -> tuple[int, int, int]:
    """(rank, number of ranks, local rank) from the variables of torchrun or srun; (0, 1, 0) without them."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun, not by sbatch: plain python runs alone
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])  # node[03-07,12] -> node03
        environ.setdefault("MASTER_ADDR", "".join(part or "" for part in first.groups()) if first else "127.0.0.1")
        # steps of a job may run at once; ports from 32768 on are given to any connection
        environ.setdefault("MASTER_PORT", str(20000 + zlib.crc32(slurm_step(environ).encode()) % 12000))
        return int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"])
    return 0, 1, 0


def cpu_has_bf16() -> bool:
    """True if /proc/cpuinfo (Linux only) lists bfloat16 instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def autocast(amp: str, device: torch.device):
    """Autocast context of the forward pass for --amp."""
    return torch.autocast(device.type, DTYPES.get(amp), enabled=amp in DTYPES)


def check_precision(amp: str, device: torch.device) -> None:
    """ValueError if the device does not support --amp."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU, but the device is {device}; use --amp bf16 or off")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--amp bf16 is not supported by this GPU; use --amp fp16 or off")


def rendezvous_store(rank: int, size: int, timeout: timedelta) -> torch_dist.Store:
    """The key-value store through which the ranks find each other.

    torchrun keeps one store over all restarts (pytorch issue 135712), and dead ranks have left their addresses in it.
    Therefore rank 0 draws a new prefix for each start and hands it to every living rank, which asks with a random word.
    """
    store = next(iter(torch_dist.rendezvous("env://", rank, size, timeout=timeout)))[0]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch_dist.PrefixStore(slurm_step(), store)  # another run whose port is the same is not joined
    prefix = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ask/{rank}", word := prefix)
        prefix = store.get(f"answer/{word}").decode()  # blocks until rank 0 has answered
        store.set(f"here/{prefix}/{rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    while rank == 0 and not all(store.check([f"here/{prefix}/{other}"]) for other in range(1, size)):
        for other in range(1, size):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", prefix)
        if time.monotonic() > deadline:
            raise RuntimeError("timed out: not all ranks have started")
        time.sleep(0.02)
    return torch_dist.PrefixStore(prefix, store)


def choose_device(device: str, size: int, local_rank: int) -> torch.device:
    """The device that --device names; of several GPUs the one of this local rank. ValueError if it does not exist.

    Switches TF32 off.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.zeros(1, device=chosen).item()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device {device} is not available; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device}: torch finds no GPU; use --device cpu or a CUDA build of torch")
        if chosen.index is not None and size > 1:
            raise ValueError(f"--device {device} puts all {size} ranks on one GPU; use --device cuda")
        if size > 1 and "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK is set, but LOCAL_RANK, the rank within the node, is not; use torchrun or srun")
        count = torch.cuda.device_count()
        # a Slurm task may see its own GPU only, as number 0
        own = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        if local_rank >= count and not own:
            raise ValueError(f"local rank {local_rank} has no GPU, {count} visible; start one rank per GPU")
        if chosen.index is None:
            chosen = torch.device("cuda", 0 if own else local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # on by default, unlike that of matrix products
    return chosen


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors; by default each step gets it anew from Linux, by page faults."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are in the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def init_world(device: str, amp: str, timeout_minutes: float = 30) -> World:
    """Join the process group that torchrun or Slurm describes: NCCL on GPUs, gloo on CPUs.

    A rank that waits longer than `timeout_minutes` for another raises RuntimeError. NCCL, which would abort the process,
    waits twice as long: the ranks also meet over gloo, at every step, save and evaluation.
    """
    rank, size, local_rank = rank_from_env()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    chosen = choose_device(device, size, local_rank)
    check_precision(amp, chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    control = None
    if size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        on_gpu: dict[str, Any] = {"backend": "nccl", "timeout": 2 * timeout, "device_id": chosen}
        options = on_gpu if chosen.type == "cuda" else {"backend": "gloo", "timeout": timeout}
        store = rendezvous_store(rank, size, timeout)
        torch_dist.init_process_group(store=store, rank=rank, world_size=size, **options)
        if chosen.type == "cuda":
            control = torch_dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, chosen, control)
