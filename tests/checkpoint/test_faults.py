"""Faults during a run: unreadable images, disks that do not answer, killed workers and signals."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    DEVICE,
    PRETRAIN,
    ROOT,
    assert_same_run,
    call,
    ended,
    pretrain,
    ranks,
    records,
    result,
    smooth,
    spawn,
    weights,
)
from PIL import Image

from tests.forkserver import ForkServer
from util.args import explain_error
from util.cache import build
from util.cache import get_parser as cache_parser
from util.crop import resize_to_cover
from util.data.batches import init_worker
from util.data.cache import Cache
from util.data.decode import read_image
from util.data.pixels import PixelOptions

ONE_EPOCH = ["--epochs", "1", "--batch_size", "4", "--warmup_epochs", "0", "--image_every", "0"]


@pytest.fixture
def images(tmp_path) -> Path:
    """12 good images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        smooth(rng, 30 + i, 25).save(folder / f"{i:02d}.png")
    return folder


def bitmap_header(width: int, height: int) -> bytes:
    """BMP bitmap_header that declares this size."""
    start = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = (
        width.to_bytes(4, "little")
        + height.to_bytes(4, "little")
        + (1).to_bytes(2, "little")
        + (24).to_bytes(2, "little")
    )
    return start + size + bytes(24)


BAD_FILES = {
    "truncated": lambda path: path.write_bytes((path.parent / "00.png").read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "of another kind": lambda path: path.write_text("no image"),
    "a bomb": lambda path: path.write_bytes(bitmap_header(50_000, 50_000)),
    "without pixels": lambda path: path.write_bytes(bitmap_header(0, 10)),
    "a line": lambda path: Image.new("RGB", (200_000, 1)).save(path, "PNG"),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/x.jpg"),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unreadable_images_stop_the_run_or_are_replaced(kind, images, tmp_path):
    BAD_FILES[kind](images / "x.jpg")
    words = ONE_EPOCH + {
        "a pipe": ["--timeout_minutes", 0.005],
        "a line": ["--input_size", 64, "--patch_size", 16],  # resizing it would give 800 megapixels
    }.get(kind, [])
    with pytest.raises(ValueError, match=r"x\.jpg .+--on_bad_image skip"):
        pretrain(images, tmp_path / "run", *words)
    if kind == "a pipe":  # like a disk that does not answer: other images could not be read either
        with pytest.raises(ValueError, match=r"x\.jpg .*--timeout_minutes"):
            pretrain(images, tmp_path / "run", *words, "--on_bad_image", "skip")
        return
    pretrain(images, tmp_path / "run", *words, "--on_bad_image", "skip")
    assert "x.jpg" in (tmp_path / "run" / "bad_images.txt").read_text()


# --------------------------------------------------------------------------------------------------- bad evaluation images

SKIP = ["--on_bad_image", "skip"]


@pytest.fixture(scope="module")
def with_junk(photos, tmp_path_factory) -> tuple[Path, Path]:
    """(Class folders with four unreadable images in train/ and val/, the same folders without these)."""
    good, bad = (tmp_path_factory.mktemp("junk") / name for name in ("good", "bad"))
    shutil.copytree(photos, good)
    shutil.copytree(photos, bad)
    for name in ("train/ant/00.png", "val/ant/00.png", "val/bee/zz.png", "val/cat/zz.JPG"):
        (bad / name).write_bytes(b"no image")
    return bad, good


def test_evaluations_during_pretraining_leave_out_and_list_unreadable_images(with_junk, tmp_path):
    words = [*ONE_EPOCH, "--knn_every", 1, *SKIP]
    lines = call("main_pretrain", *PRETRAIN, *words, "--data_path", with_junk[0], "--output_dir", tmp_path / "bad")
    pretrain(with_junk[1], tmp_path / "good", *ONE_EPOCH)
    (bad,) = records(tmp_path / "bad", "knn_n")
    flags = ["--checkpoint", tmp_path / "bad" / "last.pth", *DEVICE]
    good = result("main_knn", *flags, "--data_path", with_junk[1])
    layer = good.pop("knn_features")
    good = {name: value for name, value in good.items() if name not in ("acc1_after_norm", "k", "temperature")}
    expected = {f"knn_{name}": value for name, value in good.items()}
    assert bad == {"epoch": 1, "knn_features": layer, **expected, "knn_unreadable": 4}
    assert any(line.startswith(f"epoch 1  kNN {layer} {{") and '"unreadable": 4}' in line for line in lines)
    listed = (tmp_path / "bad" / "bad_images.txt").read_text()
    assert all(
        f"{with_junk[0]}/{name}\t" in listed for name in ("train/ant/00.png", "val/bee/zz.png", "val/cat/zz.JPG")
    )


@pytest.mark.parametrize("name", ["main_linprobe", "main_finetune"])
def test_validation_and_eval_leave_out_unreadable_images(name, with_junk, pretrained, tmp_path):
    flags = ["--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, *DEVICE, "--checkpoint", pretrained / "last.pth"]
    last = result(name, *flags, *SKIP, "--data_path", with_junk[0], "--output_dir", tmp_path)
    (record,) = records(tmp_path, "val_n")
    assert (last["n"], last["unreadable"], record["val_n"], record["val_unreadable"]) == (9, 3, 9, 3)
    assert "val/cat/zz.JPG\t" in (tmp_path / "bad_images.txt").read_text()
    flags = ["--eval", "--checkpoint", tmp_path / "classifier.pth", *DEVICE]
    with pytest.raises(ValueError, match=r"val/\w+/\w+\.\w+ .*--on_bad_image skip"):
        result(name, *flags, "--data_path", with_junk[0])
    good = result(name, *flags, "--data_path", with_junk[1])
    assert result(name, *flags, *SKIP, "--data_path", with_junk[0]) == good | {"unreadable": 3}


def test_knn_stops_at_an_unreadable_image_or_leaves_it_out_and_prints_it(with_junk, pretrained, capfd):
    flags = ["--checkpoint", pretrained / "last.pth", *DEVICE]
    with pytest.raises(ValueError, match=r"ant/00\.png .*--on_bad_image skip"):
        result("main_knn", *flags, "--data_path", with_junk[0])
    found = result("main_knn", *flags, "--data_path", with_junk[0], *SKIP)
    assert found == result("main_knn", *flags, "--data_path", with_junk[1]) | {"unreadable": 4}
    assert sorted(line.split(": ")[1] for line in capfd.readouterr().err.splitlines()) == sorted(
        f"{with_junk[0]}/{name}" for name in ("train/ant/00.png", "val/ant/00.png", "val/bee/zz.png", "val/cat/zz.JPG")
    )


def test_counts_over_ranks_are_exact_if_one_rank_has_unreadable_images_only(photos, pretrained, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    for path in sorted((tmp_path / "in" / "val").rglob("*.*"))[1::2]:  # all images of rank 1
        path.write_bytes(b"no image")
    checkpoint = ["--checkpoint", pretrained / "last.pth", "--data_path", tmp_path / "in", *DEVICE, *SKIP]
    alone = result("main_knn", *checkpoint)
    assert (alone["n"], alone["unreadable"]) == (5, 4)
    (zero, out, err), (one, _, _) = ranks(2, "main_knn.py", *checkpoint)
    assert (zero, one) == (0, 0), err
    assert json.loads(out.splitlines()[-1]) == alone
    training = ["--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, "--output_dir", tmp_path / "probe"]
    (zero, out, err), (one, _, _) = ranks(2, "main_linprobe.py", *checkpoint, *training)
    assert (zero, one) == (0, 0), err
    assert [json.loads(out.splitlines()[-1])[name] for name in ("n", "unreadable")] == [5, 4]


@pytest.mark.parametrize("name", ["main_knn", "main_linprobe"])
def test_an_evaluation_without_a_readable_image_is_refused(name, photos, pretrained, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    for path in (tmp_path / "in" / "val").rglob("*.*"):
        path.write_bytes(b"no image")
    training = ["--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, "--output_dir", tmp_path / "probe"]
    flags = ["--checkpoint", pretrained / "last.pth", "--data_path", tmp_path / "in", *DEVICE, *SKIP]
    with pytest.raises(ValueError, match=f"--data_path {tmp_path}/in: no image"):
        result(name, *flags, *(training if name == "main_linprobe" else []))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_loader_worker_reports_a_disk_that_does_not_answer(images, tmp_path):
    os.mkfifo(images / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg .*--timeout_minutes"):
        pretrain(images, tmp_path / "run", *ONE_EPOCH, "--timeout_minutes", 0.01, "--num_workers", 1)


def test_cache_read_timeout_ends_the_run(images, tmp_path, monkeypatch):
    build(
        cache_parser().parse_args(
            ["build", "--data_path", str(images), "--out", str(tmp_path / "c"), "--input_size", "16"]
        )
    )
    released, waited = threading.Event(), []
    read = Cache.read

    def slow(self, i, in_chans):
        if threading.current_thread() is not threading.main_thread():
            waited.append(released.wait(60))
        return read(self, i, in_chans)

    monkeypatch.setattr(Cache, "read", slow)
    try:
        with pytest.raises(RuntimeError) as error:
            pretrain(tmp_path / "c", tmp_path / "run", *ONE_EPOCH, "--timeout_minutes", 0.01, "--num_workers", 1)
        assert not waited  # the reader is still busy
        assert re.search("timed out .*1 s .*--timeout_minutes", explain_error(error.value))
    finally:
        released.set()


def test_large_images_are_read_without_a_warning(tmp_path):
    Image.new("L", (12_000, 9_000)).save(tmp_path / "large.png")  # 108 megapixels
    (image,) = read_image(os.fsencode(tmp_path / "large.png"), PixelOptions(1))  # pytest turns warnings into errors
    assert image.size == (12_000, 9_000)


def test_extreme_aspect_ratios_are_rejected_before_resizing():
    assert resize_to_cover(Image.new("L", (30_000, 3)), (8, 8)).size == (80_000, 8)
    with pytest.raises(ValueError, match=r"100000 x 1 .*22400000 x 224 .*\(224, 224\)"):
        resize_to_cover(Image.new("L", (100_000, 1)), (224, 224))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("parent", ["alive", "killed"])
def test_loader_worker_exits_if_its_parent_was_killed_during_the_fork(parent):
    loader = multiprocessing.get_context("fork").Process(
        target=init_worker, args=(os.getpid() if parent == "alive" else 1, 0)
    )
    loader.start()
    loader.join(60)
    assert loader.exitcode == (parent == "killed")


KILL_LOADER_WORKER = """
import os, signal, sys
import main_pretrain
from util.args import run_main
from util.data.pixels import PixelOptions
from util.data.samples import Samples
from torch.utils.data import get_worker_info

real = Samples.__getitems__
def killed(self, keys):
    if get_worker_info() and keys[0][0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, keys)
Samples.__getitems__ = killed
run_main(main_pretrain.main)
"""


def test_killed_loader_worker_ends_the_run_with_one_line_and_the_run_resumes(photos, tmp_path):
    words = [*PRETRAIN, "--epochs", 2, "--batch_size", 8, "--num_workers", 1, "--image_every", 0]
    flags = [*words, "--data_path", photos, "--output_dir", tmp_path / "a"]
    status, _, err = ended(spawn("-c", KILL_LOADER_WORKER, *flags))
    assert status == 1
    assert "Traceback" not in err
    assert "DataLoader worker (pid" in err
    assert "--num_workers" in err
    assert weights(tmp_path / "a")["progress"]["epoch"] == 0
    for folder in ("a", "b"):
        status, _, err = ended(
            spawn("main_pretrain.py", *words, "--data_path", photos, "--output_dir", tmp_path / folder)
        )
        assert status == 0, err
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_signal_to_the_process_group_finishes_the_step_and_saves(photos, tmp_path):
    words = [
        *PRETRAIN,
        "--epochs",
        500,
        "--batch_size",
        4,
        "--num_workers",
        2,
        "--image_every",
        0,
        "--warmup_epochs",
        1,
    ]
    script = "import os, runpy; os.setsid(); runpy.run_path('main_pretrain.py', run_name='__main__')"
    process = spawn("-u", "-c", script, *words, "--data_path", photos, "--output_dir", tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 2.0"):
            break
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = ended(process)
    assert status == 130, err
    assert weights(tmp_path)["progress"]["epoch"] < 499  # training did not finish
    assert ", saved; " in out
    assert "Traceback" not in err


def test_fork_server_ends_although_a_fork_of_its_client_lives():
    """A loader worker that a failed test leaves behind holds every descriptor of pytest's process."""
    server = ForkServer()
    assert server.start(["-c", "print(1)"], dict(os.environ), ROOT).communicate(timeout=60)[0] == "1\n"
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
    worker.start()
    closing = threading.Thread(target=server.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
    worker.kill()
