"""Shared fixtures and helpers: small image folders, and mains run in this process or in new ones."""

import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from argparse import ArgumentParser, Namespace, _SubParsersAction
from contextlib import redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.forkserver import ForkServer, Process
from tests.pretended_cuda import pretended_cuda
from util.args import IMAGENET_MEAN, IMAGENET_STD
from util.checkpoint.saver import Saver
from util.checkpoint.stop import SIGNALS
from util.dist import World
from util.log import Log
from util.run import Run

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DEVICE = ["--amp", "off", "--num_workers", "0", "--device", "cpu"]
MODEL = ["--model", "vit_pico", "--patch_size", "8", "--input_size", "16"]
PRETRAIN = [
    *MODEL,
    *DEVICE,
    *["--decoder_dim", "32", "--decoder_depth", "1", "--decoder_heads", "2", "--log_every", "1"],
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, so that sums have the same order in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_signal_handlers():
    """Restore the handlers that a main leaves if it fails."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """Skip fsync: most of the gigabytes written are deleted at the end of the test."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def cuda():
    """torch with a pretended GPU; the list of places where the host waits for it."""
    with pretended_cuda() as waits:
        yield waits


def smooth(rng: np.random.Generator, width: int, height: int, base=(128, 128, 128)) -> Image.Image:
    """A random image without sharp edges around a colour."""
    coarse = np.clip(rng.normal(base, 50, (4, 4, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder: Path, counts: dict[str, int], seed: int) -> None:
    """folder/<class>/<n>.png (every third a .JPG), of changing sizes; each class has its own mean colour."""
    rng = np.random.default_rng(seed)
    for i, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            image = smooth(rng, 18 + 3 * n, 30 - 2 * n, np.roll((200, 100, 60), i))
            image.save(folder / name / f"{n}{'.png' if n % 3 else '.JPG'}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """train/ with 3 classes of 6, 5 and 5 images, val/ with 4, 3 and 2."""
    folder = tmp_path_factory.mktemp("photos")
    class_folders(folder / "train", {"ant": 6, "bee": 5, "cat": 5}, seed=0)
    class_folders(folder / "val", {"ant": 4, "bee": 3, "cat": 2}, seed=1)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory) -> Path:
    """train/ and val/ with 6 and 3 images of a coloured ground with a square, and masks: 0 ground, 1 square, 255 at an edge."""
    folder, rng = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for n in range(count):
            image, mask = (
                np.array(smooth(rng, 22 + 3 * n, 30 - 2 * n, (60, 90, 120))),
                np.zeros((30 - 2 * n, 22 + 3 * n), np.uint8),
            )
            y, x = rng.integers(0, 12, 2)
            image[y : y + 8, x : x + 8], mask[y : y + 8, x : x + 8] = (230, 200, 60), 1
            mask[-1] = 255
            Image.fromarray(image).save(folder / split / "images" / f"{n}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{n}.png")
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, photos) -> Path:
    """Output folder of a finished run: 2 epochs of 2 steps of 8 images. Copy it before changing it."""
    torch.set_num_threads(1)
    return pretrain(photos, tmp_path_factory.mktemp("pretrained") / "run", "--save_every", 1, "--image_every", 1)


@pytest.fixture(scope="session")
def pretrained_tiny(tmp_path_factory, photos) -> Path:
    """Like `pretrained` with vit_tiny, whose heads are 64 wide as formats without a head count assume."""
    torch.set_num_threads(1)
    return pretrain(photos, tmp_path_factory.mktemp("pretrained_tiny") / "run", "--model", "vit_tiny")


def pretrain(photos: Path, output: Path, *words) -> Path:
    """Output folder of a tiny pre-training in this process."""
    sizes = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "1", "--blr", "0.03", "--image_every", "0"]
    call("main_pretrain", *PRETRAIN, *sizes, "--data_path", photos, "--output_dir", output, *words)
    return output


def call(name: str, *words) -> list[str]:
    """Lines that a main prints, run in this process; its errors are raised."""
    output, logs, open_board = io.StringIO(), [], Log.open_board

    def open_and_record(self, *args):
        logs.append(self)
        open_board(self, *args)

    argv = patch.object(sys, "argv", [f"{name}.py", *map(str, words)])
    with argv, patch.object(Log, "open_board", open_and_record), redirect_stdout(output):
        try:
            importlib.import_module(name).main()
        finally:  # a run that failed leaves TensorBoard's thread, which would miss the folder after the test
            for log in logs:
                with suppress(OSError):
                    log.board.close()
    return output.getvalue().splitlines()


def files(folder: Path) -> dict[Path, bytes]:
    """{path: content} of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result(*words) -> dict:
    """The JSON object that a main prints last."""
    return json.loads(call(*words)[-1])


FORKS = ForkServer()


@pytest.fixture(scope="session", autouse=True)
def _fork_server():
    yield
    FORKS.close()


def spawn(*words, **environment) -> subprocess.Popen | Process:
    """Start Python with these arguments and one thread in the repository root, as a fork of the server where equivalent."""
    words = list(map(str, words))
    python = any(name.startswith("PYTHON") for name in environment)  # read only when an interpreter starts
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()}
    if sys.platform == "linux" and words[0] != "-m" and not python:
        return FORKS.start(words, environment, ROOT)
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen | Process) -> tuple[int | None, str, str]:
    """(exit status, stdout, stderr) of a process; after 120 s it is killed and the status is None."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # its children may keep the pipes open
            return None, *process.communicate(timeout=5)
        return None, "", "it did not end"
    return process.returncode, out, err


def free_ports(count: int) -> list[int]:
    """Different ports that are free. Linux gives those from 32768 on to any connection, perhaps before they are used here."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} free ports")


def start_ranks(count: int, *words) -> list[subprocess.Popen | Process]:
    """Start ranks with the environment variables of torchrun."""
    (port,) = free_ports(1)
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [spawn(*words, RANK=r, LOCAL_RANK=r, **group) for r in range(count)]


def ranks(count: int, *words) -> list[tuple[int | None, str, str]]:
    """`ended` of each of several ranks."""
    return [ended(process) for process in start_ranks(count, *words)]


def one_rank(tmp_path: Path, rank: int = 0, size: int = 1, **flags) -> Run:
    """The `Run` of these flags, without a process group."""
    defaults = {
        "seed": 0,
        "in_chans": 3,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "on_bad_image": "stop",
        "num_workers": 0,
        "timeout_minutes": 1,
    }
    args = Namespace(**defaults | {"batch_size": 8, "accum_iter": 1, "amp": "off", "output_dir": str(tmp_path)} | flags)
    resume = getattr(args, "resume", "auto")
    world, log = World(rank, size, CPU), Log(tmp_path, False)
    return Run(args, world, log, tmp_path, args.batch_size, args.accum_iter, 0.1, resume)


def interrupted(monkeypatch, step: int, main, number=signal.SIGTERM) -> int:
    """Exit status of a main in this process that gets a signal in step `step`, not counting last steps of epochs."""
    calls, real = [], Saver.after_step

    def after_step(self, progress):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        real(self, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "after_step", after_step)
        with pytest.raises(SystemExit) as ending:
            main()
    traceback.clear_frames(ending.tb)  # ends loader workers now; garbage collection would wait 5 s for each
    return ending.value.code


def records(folder: Path, key: str = "loss") -> list[dict]:
    """Objects in log.jsonl with this key."""
    return [x for x in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in x]


def weights(folder: Path) -> dict:
    return torch.load(folder / "last.pth", weights_only=True)


def parsers_of(module: str) -> dict[str, ArgumentParser]:
    """Parser of a script, "" -> its own, and those of its commands."""
    parsers = {"": importlib.import_module(module).get_parser()}
    for action in parsers[""]._actions:
        parsers |= action.choices if isinstance(action, _SubParsersAction) else {}
    return parsers


def assert_same(a, b) -> None:
    """Assert that nested containers of tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


TIMING_FIELDS = ("images_per_s", "data_wait", "tflops", "memory_gib")  # differ between equal runs


def tensorboard_values(folder: Path) -> dict:
    """{(name, step): value on TensorBoard}, without TIMING_FIELDS.

    TensorBoard reads the event files of a run by their names, which contain the second of their start. Runs of a test restart
    within a second, so the files are renamed in the order of their first events.
    """

    def first_event_time(path: Path) -> float:
        return next(iter(EventFileLoader(str(path)).Load())).wall_time

    with TemporaryDirectory() as ordered:
        for i, path in enumerate(sorted((folder / "tensorboard").iterdir(), key=first_event_time)):
            Path(ordered, f"{i:04d}.tfevents").symlink_to(path.absolute())
        shown = EventAccumulator(ordered, size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = shown.Tags()
    for read, names in ((shown.Scalars, tags["scalars"]), (shown.Images, tags["images"])):
        for name in names:
            steps = [event.step for event in read(name)]
            assert len(steps) == len({*steps}), f"TensorBoard shows a point of {name} twice"
    scalars = {(t, e.step): e.value for t in tags["scalars"] if t not in TIMING_FIELDS for e in shown.Scalars(t)}
    return scalars | {(t, e.step): e.encoded_image_string for t in tags["images"] for e in shown.Images(t)}


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that checkpoint, log and TensorBoard of two runs are equal bit for bit."""
    one, other = weights(a), weights(b)
    for part in ("model", "optimizer", "scaler", "statistics", "progress"):
        assert_same(one[part], other[part])
    logs = ([{k: v for k, v in x.items() if k not in TIMING_FIELDS} for x in records(f, "epoch")] for f in (a, b))
    for x, y in zip(*logs, strict=True):
        assert x == y
    assert tensorboard_values(a) == tensorboard_values(b)
