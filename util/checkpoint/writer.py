"""The thread that writes checkpoints while training continues."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

from util.args import WRITER_THREAD
from util.checkpoint.state import store_checkpoint


class Writer:
    """Stores the newest content that it was given. If the disk is full it retries every `retry` seconds."""

    def __init__(self, folder: Path, info: Callable[[str], None], retry: float):
        self.folder, self.info, self.retry = folder, info, retry
        self.lock = threading.Lock()
        self.pending: tuple[dict, str | None] | None = None  # (content, permanent name); a thread runs while it is set
        self.error: Exception | None = None  # of the last attempt
        self.retry_now = threading.Event()

    @property
    def failed(self) -> bool:
        """True after an error that waiting cannot mend; a full disk, a quota or too little memory may end."""
        full = isinstance(self.error, OSError) and self.error.errno in (errno.ENOSPC, errno.EDQUOT, None)
        return self.error is not None and not full and not isinstance(self.error, MemoryError)

    @property
    def busy(self) -> bool:
        """True while it writes; False while it waits for disk space."""
        return self.pending is not None and self.error is None

    def submit(self, content: dict, permanent: str | None) -> None:
        """Store this content next; it replaces content that has not been written yet."""
        before = self.pending
        while before and before[1] and self.pending is before and not self.error:
            time.sleep(0.005)  # a permanent checkpoint that is being written is not replaced
        with self.lock:
            if self.pending and self.error and self.pending[1]:
                self.info(f"warning: {self.folder / self.pending[1]} was never written; a newer checkpoint replaces it")
            idle, self.pending = self.pending is None, (content, permanent)
        if idle:
            threading.Thread(target=self.write_pending, name=WRITER_THREAD).start()

    def write_pending(self) -> None:
        while given := self.pending:
            try:
                store_checkpoint(self.folder, *given)
            except Exception as error:  # whatever it is, the run must learn of it
                self.error = error
                if self.failed:  # the run ends in its next step
                    return
                self.info(f"warning: {error}. Free disk space; retrying every {self.retry:.0f} s.")
                if not self.wait_for_retry():
                    return
                continue
            if self.error:
                self.info(f"{self.folder / 'last.pth'} is written again")
            with self.lock:
                self.error = None
                if self.pending is given:
                    self.pending = None
                    return

    def wait_for_retry(self) -> bool:
        """Wait until the next attempt is due; False if the process is ending."""
        until = time.monotonic() + self.retry
        while time.monotonic() < until and not self.retry_now.wait(0.1):
            if not threading.main_thread().is_alive():
                return False
        self.retry_now.clear()
        return True

    def flush(self, keep_waiting: Callable[[], bool]) -> bool:
        """Wait until everything is stored, or until one more attempt fails after `keep_waiting()` is False.

        Returns True if everything is stored.
        """
        while self.pending and (self.busy or (keep_waiting() and not self.failed)):
            time.sleep(0.005)
        if self.pending and not self.failed:
            self.error = None
            self.retry_now.set()
            while self.busy:
                time.sleep(0.005)
        return self.pending is None

    def cancel(self) -> None:
        """Stop retrying."""
        self.pending = None
        self.retry_now.set()
