"""Asked to stop: SIGTERM, SIGUSR1 (Slurm before its time limit) and Ctrl-C let the step be finished and saved."""

import os
import signal
from types import FrameType

AGAIN = 75  # exit status of a run that was stopped and can go on: EX_TEMPFAIL, for who queues it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Remembers the first signal; a second one ends the process at once."""

    def __init__(self, leads: bool):
        self.leads, self.owner = leads, os.getpid()
        self.signal: signal.Signals | None = None
        self.before = {number: signal.signal(number, self) for number in SIGNALS}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a loader's process, which ends with this one
            return
        if self.signal:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self.leads:  # print would not be safe in the middle of another
            os.write(2, f"{self.signal.name}: finishing the step, then saving; a second signal ends at once\n".encode())

    @property
    def status(self) -> int:
        """What the process exits with."""
        return 130 if self.signal == signal.SIGINT else AGAIN

    def restore(self) -> None:
        """The handlers as they were before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
