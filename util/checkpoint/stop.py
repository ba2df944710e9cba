"""Stop requests: signals, and agreement of the ranks."""

import os
import signal
import threading
from types import FrameType

AGAIN = 75  # exit status of a run that was stopped and can go on: EX_TEMPFAIL, for who queues it again


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal; a second one ends the process at once, even one that waits for a rank that hangs."""

    def __init__(self, is_main: bool):
        self.is_main, self.owner = is_main, os.getpid()
        self.signal: signal.Signals | None = None
        # Python calls handlers between two of its own instructions, of which a collective has none for minutes; but the
        # number of each signal is written to this pipe as it comes.
        numbers, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.pipe_before = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self) for number in SIGNALS}
        threading.Thread(target=count, args=(numbers,), daemon=True).start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal or os.getpid() != self.owner:  # a loader's process ends with this one
            return
        self.signal = signal.Signals(number)
        if self.is_main:  # print would not be safe in the middle of another
            os.write(2, f"{self.signal.name}: finishing the step, then saving; a second signal ends at once\n".encode())

    @property
    def status(self) -> int:
        """What the process exits with."""
        return 130 if self.signal == signal.SIGINT else AGAIN

    def restore(self) -> None:
        """The handlers as they were before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.pipe_before)
        os.close(self.pipe)


def count(numbers: int) -> None:
    """End the process at the second signal; until the other end of the pipe is closed."""
    first = True
    while number := os.read(numbers, 1):
        if number[0] in SIGNALS:
            if not first:
                os._exit(128 + number[0])
            first = False
    os.close(numbers)
