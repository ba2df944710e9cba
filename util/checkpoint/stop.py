"""Stop requests: SIGTERM, SIGUSR1 (Slurm, before its time limit) and Ctrl-C let the step finish and be saved."""

import math
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from util.dist import World

EXIT_RESUMABLE = 75  # EX_TEMPFAIL: exit status of a stopped run that can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Signal handler that stores the first signal. A second one ends the process at once, even inside a collective."""

    def __init__(self, is_main: bool):
        self.is_main, self.owner = is_main, os.getpid()
        self.signal: signal.Signals | None = None
        # Python runs handlers between bytecodes only, and a collective may block for minutes. The signal's number,
        # however, is written to this pipe at once, where a thread reads it.
        read_end, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.previous_pipe = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
        self.previous_handlers = {number: signal.signal(number, self) for number in SIGNALS}
        threading.Thread(target=exit_at_second_signal, args=(read_end,), daemon=True).start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal or os.getpid() != self.owner:  # data-loader workers end with the trainer
            return
        self.signal = signal.Signals(number)
        if self.is_main:  # os.write: print is not safe inside a signal handler
            with suppress(OSError):  # a closed pipe must not prevent the save
                text = f"{self.signal.name}: finishing the step, then saving; a second signal ends at once\n"
                os.write(2, text.encode())

    def restore(self) -> None:
        """Reinstall the previous handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_pipe)
        os.close(self.pipe)


def exit_at_second_signal(read_end: int) -> None:
    """Body of the thread that reads signal numbers until the other end of the pipe is closed.

    A repetition within a second is the same request: Linux sends the signal of a parent's death once for each of its threads.
    """
    first = math.inf
    while number := os.read(read_end, 1):
        if number[0] in SIGNALS:
            if time.monotonic() > first + 1:
                os._exit(128 + number[0])
            first = min(first, time.monotonic())
    os.close(read_end)


class DelayedMax:
    """Maximum over the ranks of a number that each submits per step, known one step later, so that no rank waits."""

    def __init__(self, world: World):
        self.world = world
        self.pending: tuple[Any, Tensor] | None = None

    def exchange(self, mine: int) -> int:
        """Submit a number; returns the largest of the previous step: of this one with a single rank, 0 in the first step."""
        if self.world.size == 1:
            return mine
        before, largest = self.pending, torch.tensor(mine)
        work = torch_dist.all_reduce(largest, torch_dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self.pending = work, largest
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])
