"""The thread that writes checkpoints while training continues."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from util.args import WRITER
from util.checkpoint.state import store_checkpoint


class Writer:
    """Stores the newest content it was given in a thread; a full disk is tried again until there is room."""

    def __init__(self, folder: Path, say: Callable[[str], None], retry: float):
        self.folder, self.say, self.retry = folder, say, retry  # seconds
        self.lock = threading.Lock()
        self.waiting: tuple[dict, str | None] | None = None  # a thread works as long as something is
        self.error: Exception | None = None  # of the last try
        self.again = threading.Event()

    @property
    def busy(self) -> bool:
        """True while it writes; not while it waits for room."""
        return self.waiting is not None and self.error is None

    def give(self, content: dict, kept: str | None) -> None:
        before = self.waiting
        while before and before[1] and self.waiting is before and not self.error:
            time.sleep(0.005)  # one that is kept is not replaced by a newer one, while the disk takes it
        with self.lock:
            if self.waiting and self.error and self.waiting[1]:
                self.say(f"warning: {self.folder / self.waiting[1]} is given up for a newer checkpoint")
            idle, self.waiting = self.waiting is None, (content, kept)
        if idle:
            threading.Thread(target=self.work, name=WRITER).start()

    def work(self) -> None:
        while given := self.waiting:
            try:
                store_checkpoint(self.folder, *given)
            except (OSError, MemoryError) as error:
                self.error = error
                self.say(f"warning: {error}: make room; it is tried again every {self.retry:.0f} s")
                if not self.pause():
                    return
                continue
            if self.error:
                self.say(f"{self.folder / 'last.pth'} is written again")
            with self.lock:
                self.error = None
                if self.waiting is given:
                    self.waiting = None
                    return

    def pause(self) -> bool:
        """Wait for the time to try again; False if the process ends."""
        until = time.monotonic() + self.retry
        while time.monotonic() < until and not self.again.wait(0.1):
            if not threading.main_thread().is_alive():
                return False
        self.again.clear()
        return True

    def stored(self, patient: Callable[[], bool]) -> bool:
        """Wait until all is stored; as soon as nobody is patient, until it was tried once more. True if it is stored."""
        while self.waiting and (self.busy or patient()):
            time.sleep(0.005)
        if self.waiting:
            self.error = None
            self.again.set()
            while self.busy:
                time.sleep(0.005)
        return self.waiting is None

    def give_up(self) -> None:
        """Try no longer."""
        self.waiting = None
        self.again.set()
