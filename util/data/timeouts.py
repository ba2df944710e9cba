"""Time limit for reading from a disk that does not answer."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class DiskTimeout(TimeoutError):
    """A read exceeded its time limit."""


def raise_timeout(number: int, frame: FrameType | None) -> None:
    raise DiskTimeout("the disk does not answer (--timeout_minutes)")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise DiskTimeout in the block after this time; only in a main thread, because only it receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, raise_timeout)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # the caller's, for example of pytest-timeout
