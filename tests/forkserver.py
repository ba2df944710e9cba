"""Fork server: processes with torch, timm and the mains already imported, instead of new interpreters.

`python -m tests.forkserver FD` is that interpreter. It serves `ForkServer.start` until the other end of the socket FD is closed.
A process has its own arguments, environment, folder, output and exit status. Only its hash seed is the server's.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_REQUEST = 2**17  # bytes
PRELOAD = ["main_pretrain", "main_linprobe", "main_finetune", "main_knn", "torch.utils.tensorboard"]


class Process:
    """Process of the server, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, pid: int, status: socket.socket, out: int, err: int):
        self.pid, self.status, self.returncode = pid, status, None
        self.stdout, self.stderr = (os.fdopen(pipe, encoding="utf-8", errors="surrogateescape") for pipe in (out, err))
        self.read = {self.stdout: b"", self.stderr: b""}

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self.status.recv(16))
            self.status.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), read until every process that holds the pipe has ended."""
        until = None if timeout is None else time.monotonic() + timeout
        waiting = [file for file in self.read if not file.closed]
        while waiting:
            left = None if until is None else max(0, until - time.monotonic())
            ready = select.select(waiting, [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            for file in ready:
                content = os.read(file.fileno(), 2**16)
                self.read[file] += content
                if not content:
                    waiting.remove(file)
                    file.close()
        self.wait(until and max(0, until - time.monotonic()))
        out, err = (content.decode(errors="surrogateescape") for content in self.read.values())
        return out, err


class ForkServer:
    """Client of the forked interpreter, which starts with the first process."""

    def __init__(self) -> None:
        self.channel: socket.socket | None = None

    def connect(self) -> socket.socket:
        if self.channel is None:
            self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
            with theirs:
                self.server = subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
        return self.channel

    def start(self, words: list[str], environment: dict[str, str], folder: Path) -> Process:
        """Start `python WORDS`; words are a script or `-c SCRIPT`, after `-u` for line buffering."""
        channel, request = self.connect(), json.dumps([words, environment, str(folder)]).encode()
        assert len(request) <= MAX_REQUEST
        (out, out_theirs), (err, err_theirs) = os.pipe(), os.pipe()
        status, status_theirs = socket.socketpair()
        with status_theirs:
            socket.send_fds(channel, [request], [out_theirs, err_theirs, status_theirs.fileno()])
        os.close(out_theirs)
        os.close(err_theirs)
        return Process(int(status.recv(16)), status, out, err)

    def close(self) -> None:
        """End the server and its processes. A shutdown reaches it even if a forgotten fork of this process holds the socket."""
        if self.channel is not None:
            self.channel.shutdown(socket.SHUT_RDWR)
            self.channel.close()
            self.server.wait()


def serve(channel: socket.socket) -> list[str]:
    """Fork a process for each request; in it, return the words. A closed channel ends the server and its processes."""
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process id, socket for its exit status
    while True:
        for ready in select.select([channel, *running], [], [])[0]:
            if ready is not channel:
                pid, status = running.pop(ready)
                os.close(ready)
                with status, suppress(OSError):  # the test may have ended
                    status.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                continue
            request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
            if not request:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            words, environment, folder = json.loads(request)
            *outputs, status = *descriptors[:2], socket.socket(fileno=descriptors[2])
            pid = os.fork()
            if pid == 0:
                for connection in (channel, status, *(other for _, other in running.values())):
                    connection.close()
                for descriptor in running:
                    os.close(descriptor)
                set_up_process(outputs, environment, folder)
                return words
            for output in outputs:
                os.close(output)
            status.send(b"%d" % pid)
            running[os.pidfd_open(pid)] = pid, status


def set_up_process(outputs: list[int], environment: dict[str, str], folder: str) -> None:
    """Give this process the output, environment and folder of the request."""
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def run(words: list[str]) -> None:
    """Run a script, or the text after -c, as __main__."""
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(line_buffering=True)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, text, name = ["-c", *words[2:]], words[1], "<string>"
    else:
        sys.argv, text, name = words, Path(words[0]).read_text(), words[0]
        main.__file__ = name
        sys.path.insert(0, str(Path(name).absolute().parent))
    exec(compile(text, name, "exec"), main.__dict__)


if __name__ == "__main__":
    for module in PRELOAD:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork keeps only one thread"
    gc.freeze()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
