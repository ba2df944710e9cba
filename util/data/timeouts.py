"""Time limits for reads from a disk that does not answer."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def in_main_thread() -> bool:
    """True in a process's main thread, the one that a signal can interrupt; loaders of images decode in it."""
    return threading.current_thread() is threading.main_thread()


class DiskTimeout(TimeoutError):
    """A disk took too long."""


def raise_timeout(number: int, frame: FrameType | None) -> None:
    raise DiskTimeout("the disk does not answer (--timeout_minutes)")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """DiskTimeout inside if it takes longer, where that is possible."""
    if not in_main_thread():
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
