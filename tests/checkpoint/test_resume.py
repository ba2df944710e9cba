"""Interrupted runs resume bit for bit: signals, kills, damaged checkpoints, full disks, non-finite steps and lost ranks."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DEVICE,
    PRETRAIN,
    ROOT,
    assert_same,
    assert_same_run,
    call,
    ended,
    interrupted,
    pretrain,
    ranks,
    records,
    spawn,
    start_ranks,
    tensorboard_values,
    weights,
)
from torch.testing import assert_close

import main_linprobe
import main_pretrain
from util.checkpoint.resume import Progress
from util.checkpoint.saver import Saver
from util.checkpoint.state import read_checkpoint, store_checkpoint, write_checkpoint
from util.checkpoint.writer import Writer
from util.dist import World
from util.files import write_atomic
from util.log import Log, report_thread
from util.run import split_effective_batch

# 8 steps of 2 images per epoch; log lines and saves are at different steps; with kNN evaluation and figures
STEPS = ["--epochs", "2", "--batch_size", "2", "--log_every", "3", "--warmup_epochs", "1", "--blr", "0.1"]
EVAL = [*STEPS, "--image_every", "1", "--knn_every", "1"]
CLASSIFIER_FLAGS = ["--epochs", "2", "--batch_size", "2", "--log_every", "3", *DEVICE]


def train_classifier(name: str, photos, folder, pretrained, *words) -> None:
    flags = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--output_dir", folder]
    call(name, *CLASSIFIER_FLAGS, *flags, *words)


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    torch.set_num_threads(1)
    return pretrain(photos, tmp_path_factory.mktemp("uninterrupted") / "run", *EVAL)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("step", "number", "status"),  # of 14 steps that do not end an epoch
    [*((step, signal.SIGTERM, 75) for step in (1, 5, 9, 14)), (5, signal.SIGUSR1, 75), (5, signal.SIGINT, 130)],
)
def test_signal_finishes_the_step_saves_and_exits_with_75_or_130(
    step, number, status, uninterrupted, photos, tmp_path, monkeypatch, capfd
):
    assert interrupted(monkeypatch, step, lambda: pretrain(photos, tmp_path, *EVAL), number) == status
    assert re.search(rf"{number.name}: .*second signal", capfd.readouterr().err)
    progress = weights(tmp_path)["progress"]
    assert progress["epoch"] * 7 + progress["step"] == step  # seven steps of an epoch check for a stop request
    assert len(progress["losses"]) == progress["step"] % 3
    pretrain(photos, tmp_path, *EVAL)
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "words",
    [
        *["--accum_iter 2 --batch_size 1", "--num_workers 2", "--amp bf16", "--crop rrc", "--optimizer muon"],
        "--optimizer muon --model convvit_pico --decoder cross",
    ],
)
def test_pretraining_resumes_within_an_epoch_bit_for_bit(words, photos, tmp_path, monkeypatch):
    def train(folder):
        return pretrain(photos, tmp_path / folder, *STEPS, *words.split())

    train("uninterrupted")
    assert interrupted(monkeypatch, 5, lambda: train("interrupted")) == 75
    train("interrupted")
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("main_linprobe", "--warmup_epochs 0 --blr 0.1 3 --pool mean"),
        ("main_finetune", "--warmup_epochs 1 --blr 0.003 --drop_path 0.3"),  # mixup, erasing, drop path, RandAugment
    ],
)
def test_probing_and_fine_tuning_resume_within_an_epoch_bit_for_bit(
    name, words, pretrained, photos, tmp_path, monkeypatch
):
    def train(folder):
        train_classifier(name, photos, tmp_path / folder, pretrained, *words.split())

    train("uninterrupted")
    for step in (3, 5):  # counted from the last start
        assert interrupted(monkeypatch, step, lambda: train("interrupted")) == 75
    train("interrupted")
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted")
    one, other = (
        torch.load(tmp_path / f / "classifier.pth", weights_only=True) for f in ("uninterrupted", "interrupted")
    )
    assert one["sha256"] != other["sha256"]  # the output folder differs
    assert all(torch.equal(value, other["model"][k]) for k, value in one["model"].items())


def test_a_second_signal_exits_immediately_but_not_a_repetition_within_a_second(photos, tmp_path):
    script = f"""
import hashlib, pathlib, os, signal, threading, main_pretrain
from util.checkpoint.saver import Saver
def after_step(self, progress):
    os.kill(os.getpid(), signal.SIGTERM)
    for seconds in (0.2, 1.4):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
    threading.Timer(0.8, pathlib.Path({str(tmp_path / "survived")!r}).touch).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # runs no signal handler, as a collective
Saver.after_step = after_step
main_pretrain.main()
"""
    status, _, _ = ended(spawn("-c", script, *PRETRAIN, *STEPS, "--data_path", photos, "--output_dir", tmp_path))
    assert status == 128 + signal.SIGTERM
    assert (tmp_path / "survived").exists()


def test_sigterm_stops_a_run_with_one_step_per_epoch(photos, tmp_path, monkeypatch):
    words = ["--epochs", 4, "--batch_size", 16, "--warmup_epochs", 1]
    reference, saves, real = pretrain(photos, tmp_path / "uninterrupted", *words), [], Saver.save

    def save(self, *given):
        saves.append(1)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *given)

    monkeypatch.setattr(Saver, "save", save)
    with pytest.raises(SystemExit) as ending:
        pretrain(photos, tmp_path / "interrupted", *words)
    assert ending.value.code == 75
    assert weights(tmp_path / "interrupted")["progress"]["epoch"] == 1
    pretrain(photos, tmp_path / "interrupted", *words)
    assert_same_run(reference, tmp_path / "interrupted")


def test_ranks_exit_together_after_the_checkpoint_is_written(photos, tmp_path, monkeypatch):
    events, store, gather = [], store_checkpoint, World.gather

    def slow(*given):
        time.sleep(0.5)
        store(*given)
        events.append("stored")

    monkeypatch.setattr("util.checkpoint.writer.store_checkpoint", slow)
    monkeypatch.setattr(World, "gather", lambda self, value: [events.append("met"), *gather(self, value)][1:])
    assert interrupted(monkeypatch, 3, lambda: pretrain(photos, tmp_path, *STEPS)) == 75
    assert events[-2:] == ["stored", "met"]


# ---------------------------------------------------------------------------------------------------------------- kills

KILL_RUN = """
import os, signal, sys, time
import main_pretrain
from util.checkpoint.saver import Saver

where, calls, real = sys.argv.pop(1), [], Saver.after_step
def after_step(self, progress):
    real(self, progress)
    calls.append(1)
    if where == str(len(calls)):
        while not os.path.exists(self.run.folder / "last.pth"):  # the first save may outlast the steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
def knn(*args, real=main_pretrain.knn, **options):
    calls.append("knn")
    if where == "knn" and calls.count("knn") == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
Saver.after_step, main_pretrain.knn = after_step, knn
main_pretrain.main()
"""


@pytest.mark.parametrize("where", ["6", "11", "knn"])
def test_killed_run_resumes_bit_for_bit(where, uninterrupted, photos, tmp_path):
    flags = [*PRETRAIN, *EVAL, "--image_every", 1, "--save_minutes", 0, "--data_path", photos, "--output_dir", tmp_path]
    status, _, err = ended(spawn("-c", KILL_RUN, where, *flags))
    assert status == -9, err
    with (tmp_path / "log.jsonl").open("a") as log:  # as if killed while logging
        log.write('{"epoch": 2.1, "loss": 9, "step": 17}\n{"epoch": 2.2, "lo')  # later than any checkpoint
    lines = call("main_pretrain", *flags)
    assert any(re.match(rf"resumed from {tmp_path}/(last|previous)\.pth: epoch ", line) for line in lines)
    assert_same_run(uninterrupted, tmp_path)


def test_checkpoints_are_written_by_save_minutes_without_blocking_steps(photos, tmp_path, monkeypatch):
    stored, steps, overtaken, real = [], [], [], store_checkpoint
    moved = threading.Condition()

    def slow(folder, content, kept):
        """Returns when three more steps are done, or all 14 that do not end an epoch."""
        with moved:
            began = len(steps)
            overtaken.append(moved.wait_for(lambda: len(steps) >= min(began + 3, 14), timeout=60))
        real(folder, content, kept)
        stored.append((content["progress"]["epoch"], content["progress"]["step"]))

    after_step = Saver.after_step

    def counted(self, progress):
        after_step(self, progress)
        with moved:
            steps.append(1)
            moved.notify_all()

    monkeypatch.setattr("util.checkpoint.writer.store_checkpoint", slow)
    monkeypatch.setattr(Saver, "after_step", counted)
    pretrain(photos, tmp_path, *STEPS, "--save_minutes", 0)
    assert all(overtaken)  # no step waited for a store
    assert stored[0] == (0, 1)
    assert stored[-1] == (1, 8)
    assert 2 <= len(stored) < 16  # a newer state replaces a waiting one
    stored.clear()
    pretrain(photos, tmp_path / "hourly", *STEPS, "--save_minutes", 60)
    assert {progress[1] for progress in stored} == {8}


def test_epoch_checkpoints_are_all_written_on_a_slow_disk(tmp_path, monkeypatch):
    store = store_checkpoint
    monkeypatch.setattr("util.checkpoint.writer.store_checkpoint", lambda *given: [time.sleep(0.05), store(*given)])
    writer = Writer(tmp_path, print, 1)
    for epoch in range(4):
        writer.submit({"epoch": epoch}, f"epoch-{epoch}.pth")
        writer.submit({"epoch": epoch, "step": 1}, None)
    assert writer.flush(keep_waiting=lambda: True)
    assert [read_checkpoint(tmp_path / f"epoch-{epoch}.pth")["epoch"] for epoch in range(4)] == [0, 1, 2, 3]
    assert read_checkpoint(tmp_path / "last.pth")["step"] == 1


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["half", "zeros", "flip", "empty", "gone"])
def test_warns_of_a_damaged_checkpoint_and_resumes_from_the_previous_one(
    damage, uninterrupted, photos, tmp_path, monkeypatch
):
    interrupted(monkeypatch, 5, lambda: pretrain(photos, tmp_path, *EVAL, "--save_minutes", 0))
    last = tmp_path / "last.pth"
    content = bytearray(last.read_bytes())
    if damage == "zeros":
        content[-len(content) // 3 :] = bytes(len(content) // 3)
    if damage == "flip":
        content[len(content) // 2] ^= 1
    last.write_bytes({"half": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "gone":
        last.unlink()  # killed between the two renames
    lines = call("main_pretrain", *PRETRAIN, *EVAL, "--data_path", photos, "--output_dir", tmp_path)
    named = any(line.startswith(f"warning: {last} is damaged") for line in lines)
    assert named == (damage != "gone")
    assert any(line.startswith(f"resumed from {tmp_path}/previous.pth: epoch 1 of 2, ") for line in lines)
    assert (tmp_path / "last.pth.damaged").exists() == (damage != "gone")
    assert_same_run(uninterrupted, tmp_path)


def test_run_in_the_pixmim_1_format_resumes(photos, tmp_path):
    pretrain(photos, tmp_path / "a", *STEPS)
    content = read_checkpoint(tmp_path / "a" / "epoch-0002.pth")
    older = {key: content[key] for key in ("optimizer", "scaler", "batch", "origin", "args", "model")}
    pretrain(photos, tmp_path / "b", *STEPS, "--epochs", 3, "--save_every", 1)
    first = read_checkpoint(tmp_path / "b" / "epoch-0001.pth")
    for name in ("last.pth", "previous.pth", "epoch-0002.pth", "epoch-0003.pth"):
        (tmp_path / "b" / name).unlink()
    older = {key: first[key] for key in older} | {"format": "pixmim-1", "progress": {"epoch": 1, "step": 0}}
    reference = weights(pretrain(photos, tmp_path / "c", *STEPS, "--epochs", 3))["model"]
    for name in ("save_minutes", "max_skipped", "timeout_minutes", "on_full_disk", "effective_batch"):
        del older["args"][name]  # flags that did not exist
    torch.save(older, tmp_path / "b" / "last.pth")
    pretrain(photos, tmp_path / "b", *STEPS, "--epochs", 3)
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path / "b")["model"].items())


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def fail_writes(monkeypatch):
    """A function: let `failures` atomic writes fail, from number `first` on; returns the list of their paths."""

    def fail(first: int, failures: int) -> list:
        calls, real = [], write_atomic

        def failing(path, fill):
            calls.append(path)
            if first <= len(calls) < first + failures:
                raise OSError(f"{path} cannot be written (No space left on device); the file before it is untouched")
            return real(path, fill)

        monkeypatch.setattr("util.checkpoint.state.write_atomic", failing)
        return calls

    return fail


def test_full_disk_warns_and_training_continues_until_space_is_free(
    uninterrupted, photos, tmp_path, fail_writes, monkeypatch
):
    calls = fail_writes(first=2, failures=3)
    monkeypatch.setattr(Writer, "__init__", with_short_retry(Writer.__init__))
    lines = call(
        "main_pretrain", *PRETRAIN, *EVAL, "--save_minutes", 0, "--data_path", photos, "--output_dir", tmp_path
    )
    warnings = [line for line in lines if "No space left" in line]
    assert len(warnings) == 3
    assert warnings[0].startswith(f"warning: {tmp_path}/.new.pth ")
    assert any(re.search(r"last\.pth .*again$", line) for line in lines)
    assert len(calls) >= 5  # one save, three failures, a retry that succeeds
    assert_same_run(uninterrupted, tmp_path)


def with_short_retry(real):
    """Writer.__init__ with 0.05 s between two attempts."""
    return lambda self, folder, info, retry: real(self, folder, info, 0.05)


def test_unwritten_log_lines_are_restored_once_from_the_checkpoint(tmp_path, monkeypatch):
    log, real = Log(tmp_path, True), Log.write_pending
    log.scalars({"epoch": 0.5, "loss": 1.0})
    monkeypatch.setattr(Log, "write_pending", lambda self: None)
    log.scalars({"epoch": 1.0, "loss": 2.0})
    waiting = log.sync()
    monkeypatch.setattr(Log, "write_pending", real)
    again = Log(tmp_path, True)
    again.rewind(1.0, waiting)
    again.rewind(1.0, waiting)  # existing lines are not repeated
    again.close()
    assert records(tmp_path) == [{"epoch": 0.5, "loss": 1.0}, {"epoch": 1.0, "loss": 2.0}]


@pytest.mark.parametrize(("name", "silent"), [("_AsyncWriterThread", True), ("Other", False)])
def test_only_tensorboard_disk_errors_are_suppressed(name, silent, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", partial(report_thread, seen.append))

    def run(self):
        raise OSError(28, "No space left on device")

    thread = type(name, (threading.Thread,), {"run": run})()
    thread.start()
    thread.join()
    assert len(seen) == (not silent)


def test_tensorboard_shows_a_repeated_evaluation_once(tmp_path):
    """Killed after the evaluation of epoch 1, resumed at its end: the evaluation is repeated."""
    records_of_run = [{"step": 2, "epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "knn_acc1": 30.0}]
    for start in (None, 1.0, 1.0):
        log = Log(tmp_path, True)
        log.open_board() if start is None else log.rewind(start)
        for record in records_of_run[0 if start is None else 1 :]:
            log.scalars(record)
        log.image("reconstruction", np.zeros((4, 4, 3), np.uint8), 1.0)
        log.close()
    assert records(tmp_path, "epoch") == records_of_run
    shown = tensorboard_values(tmp_path)  # fails for a point that is shown twice
    assert {name for name, _ in shown} == {"loss", "knn_acc1", "reconstruction"}


def test_full_disk_ends_the_run_with_on_full_disk_stop(photos, tmp_path, fail_writes):
    fail_writes(first=2, failures=1000)
    message = r"new\.pth .*No space .*\(--on_full_disk\)"
    with pytest.raises(OSError, match=message):
        pretrain(photos, tmp_path, *STEPS, "--epochs", 50, "--save_minutes", 0, "--on_full_disk", "stop")
    assert read_checkpoint(tmp_path / "last.pth")["progress"]["step"] == 1


def test_the_last_save_retries_on_a_full_disk_until_sigterm(photos, tmp_path, fail_writes, monkeypatch):
    calls, close = fail_writes(first=1, failures=1000), Saver.close
    monkeypatch.setattr(Writer, "__init__", with_short_retry(Writer.__init__))
    tries = []

    def record(self):
        tried = len(calls)

        def stop():
            while len(calls) < tried + 5:  # five more attempts, then SIGTERM
                time.sleep(0.01)
            tries.append(len(calls))
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        close(self)

    monkeypatch.setattr(Saver, "close", record)
    with pytest.raises(OSError, match=r"No space .*--on_full_disk"):
        pretrain(photos, tmp_path, *STEPS, "--epochs", 1)
    assert tries[0] <= len(calls) <= tries[0] + 2


def test_unexpected_writer_error_ends_the_run(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("util.checkpoint.writer.store_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(OSError, match=r"division by zero; .*same command"):
        pretrain(photos, tmp_path, *STEPS, "--epochs", 50, "--save_minutes", 0)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EIO])
def test_other_errors_than_a_full_disk_end_the_run(code, photos, tmp_path, monkeypatch):
    """chattr +i, a disk that has become read-only, a deleted folder: waiting would not help."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) > 8 and Path(target).name == "last.pth":
            raise OSError(code, os.strerror(code), str(target))
        return real(source, target)

    monkeypatch.setattr("util.checkpoint.state.os.replace", replace)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: .*last\.pth.*; .*same command"):
        pretrain(photos, tmp_path, *STEPS, "--epochs", 4, "--save_minutes", 0)
    monkeypatch.undo()
    pretrain(photos, tmp_path, *STEPS, "--epochs", 4)  # resumes what was saved before
    assert read_checkpoint(tmp_path / "last.pth")["progress"]["epoch"] == 3


def test_a_log_without_its_checkpoints_is_deleted_only_with_overwrite(photos, tmp_path):
    pretrain(photos, tmp_path, *STEPS)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"--output_dir {tmp_path} .*log.*--resume none --overwrite"):
        pretrain(photos, tmp_path, *STEPS)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert any((tmp_path / "tensorboard").iterdir())
    pretrain(photos, tmp_path, *STEPS, "--resume", "none", "--overwrite")
    assert records(tmp_path)[0]["epoch"] < 1


def test_a_run_killed_before_its_first_checkpoint_begins_again(photos, tmp_path):
    pretrain(photos, tmp_path, *STEPS)
    early = [
        line for line in (tmp_path / "log.jsonl").read_text().splitlines(keepends=True) if json.loads(line)["epoch"] < 1
    ]
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    (tmp_path / "log.jsonl").write_text("".join(early))
    pretrain(photos, tmp_path, *STEPS)
    assert max(record["epoch"] for record in records(tmp_path)) == 2


def test_warns_if_the_number_of_threads_has_changed(pretrained, photos, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pth") | {"threads": 7}
    del content["format"]
    sizes = [
        "--epochs",
        2,
        "--batch_size",
        8,
        "--warmup_epochs",
        1,
        "--blr",
        0.03,
        "--image_every",
        0,
        "--save_every",
        1,
    ]
    words = [*PRETRAIN, *sizes, "--data_path", photos, "--output_dir", tmp_path / "run"]
    assert not any("OMP_NUM_THREADS" in line for line in call("main_pretrain", *words))
    write_checkpoint(tmp_path / "run" / "last.pth", content)
    assert any("7 threads" in line and "OMP_NUM_THREADS=7" in line for line in call("main_pretrain", *words))


def test_run_on_a_full_tmpfs_equals_an_uninterrupted_run(uninterrupted, photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = (uninterrupted / "last.pth").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={5 * checkpoint}", "none", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        (disk / "big").write_bytes(bytes(int(3.7 * checkpoint)))  # one checkpoint fits beside it
        flags = [*PRETRAIN, *EVAL, "--save_minutes", 0, "--data_path", photos, "--output_dir", disk / "run"]
        process = spawn("-u", "main_pretrain.py", *flags)
        lines = []
        for text in process.stdout:
            lines.append(text)
            if text.startswith(f"warning: {disk}/run/"):
                (disk / "big").unlink(missing_ok=True)
        assert process.wait(120) == 0
        assert not (disk / "big").exists()  # a warning named the file that did not fit
        assert_same_run(uninterrupted, disk / "run")
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["umount", "-l", disk], check=True)


# ----------------------------------------------------------------------------------------------------- non-finite steps


def make_losses_nonfinite(monkeypatch, steps, value=float("nan")) -> None:
    """Multiply the loss of these training steps (counted from 1 in this process) by `value`."""
    made, calls = main_pretrain.pretrain_loss, []

    def make_loss(normalize):
        loss = made(normalize)

        def bad(model, batch):
            result = loss(model, batch)
            if torch.is_grad_enabled():  # not while FLOPs are counted
                calls.append(1)
                return result * value if len(calls) in steps else result
            return result

        return bad

    monkeypatch.setattr(main_pretrain, "pretrain_loss", make_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_step_changes_no_weights_and_logs_its_samples(value, photos, tmp_path, monkeypatch):
    states, after_step = [], Saver.after_step

    def record(self, progress):
        states.append(
            [p.detach().clone() for p in self.state.model.parameters()]
            + [self.state.optimizer.state_dict()["state"][0]["step"].clone()]
        )
        after_step(self, progress)

    monkeypatch.setattr(Saver, "after_step", record)
    make_losses_nonfinite(monkeypatch, {3, 5}, value)
    lines = call(
        "main_pretrain", *PRETRAIN, *STEPS, "--image_every", 0, "--data_path", photos, "--output_dir", tmp_path
    )
    for before, after, same in ((1, 2, True), (3, 4, True), (0, 1, False), (2, 3, False)):  # counted from 0
        assert all(torch.equal(x, y) for x, y in zip(states[before], states[after], strict=True)) == same
    skipped = records(tmp_path, "skipped_step")
    assert [x["skipped_step"] for x in skipped] == [3, 5]
    source = main_pretrain.pretrain_source(main_pretrain.get_parser().parse_args(["--data_path", str(photos)]))
    order = build_sampler(photos, tmp_path, len(source))
    assert skipped[1]["samples"] == order.samples(0, 4).tolist()
    (line,) = [line for line in lines if line.startswith("warning: step 5: ")]
    assert line.endswith(f"debug_step.py {tmp_path} 5")
    logged = records(tmp_path)
    assert all(x["loss"] is not None and 0 < x["loss"] < 3 for x in logged)


def build_sampler(photos, folder, count: int):
    """Training sampler of a run with STEPS."""
    from conftest import one_rank

    from util.data.samplers import TrainSampler

    return TrainSampler(count, one_rank(folder, batch_size=2))


def test_too_many_consecutive_nonfinite_steps_end_the_run_and_keep_the_last_good_state(photos, tmp_path, monkeypatch):
    make_losses_nonfinite(monkeypatch, {2, 4, 5, 6, 7})
    message = rf"step 6, .*--max_skipped 2 .*{tmp_path}/last\.pth .*debug_step\.py {tmp_path} 4"
    with pytest.raises(FloatingPointError, match=message):
        pretrain(photos, tmp_path, *STEPS, "--max_skipped", 2, "--save_minutes", 0)
    assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / "last.pth")["model"].values())


def test_skipped_steps_are_counted_across_log_lines_epochs_and_restarts(photos, tmp_path, monkeypatch):
    make_losses_nonfinite(monkeypatch, {7, 8, 9})
    assert interrupted(monkeypatch, 8, lambda: pretrain(photos, tmp_path, *STEPS, "--max_skipped", 4)) == 75
    monkeypatch.undo()
    progress = weights(tmp_path)["progress"]
    assert (progress["epoch"], progress["step"], progress["skipped"]) == (1, 1, 2)
    make_losses_nonfinite(monkeypatch, {1, 2})
    with pytest.raises(FloatingPointError, match=r"step 11, .*--max_skipped 4 "):
        pretrain(photos, tmp_path, *STEPS, "--max_skipped", 4)


def test_step_with_a_finite_loss_and_nonfinite_gradient_is_skipped(photos, tmp_path, monkeypatch):
    made = main_pretrain.pretrain_loss

    def steep(normalize):
        loss = made(normalize)
        return lambda model, batch: loss(model, batch) + (0 * model.decoder.mask_token.sum()).sqrt()  # d sqrt(0) = inf

    monkeypatch.setattr(main_pretrain, "pretrain_loss", steep)
    with pytest.raises(FloatingPointError, match=r"step 2, .*--max_skipped 1 .*no checkpoint"):
        pretrain(photos, tmp_path, *STEPS, "--max_skipped", 1)


def test_debug_step_repeats_a_step_with_its_weights_and_images(photos, tmp_path, monkeypatch):
    pretrain(photos, tmp_path, *STEPS, "--save_every", 1)
    before = (tmp_path / "log.jsonl").read_bytes(), (tmp_path / "last.pth").read_bytes()
    report = call("debug_step", tmp_path, 12, "--device", "cpu")
    assert report[2].startswith("step 12, batch 1 of 1 on rank 0: 2 images, loss ")
    repeated = torch.load(tmp_path / "debug-12.pth", weights_only=True)
    assert repeated["batches"][0]["index"].tolist() == build_sampler(photos, tmp_path, 16).samples(1, 3).tolist()
    assert before == ((tmp_path / "log.jsonl").read_bytes(), (tmp_path / "last.pth").read_bytes())
    interrupted(monkeypatch, 10, lambda: pretrain(photos, tmp_path / "until", *STEPS))  # 11 steps: one ended an epoch
    assert all(torch.equal(v, repeated["model"][k]) for k, v in weights(tmp_path / "until")["model"].items())
    with pytest.raises(ValueError, match=r"STEP 17: .*16 steps"):
        call("debug_step", tmp_path, 17)
    lines = call("debug_step", tmp_path, 3, "--device", "cpu")
    assert re.search(r"initial weights .*step 3\b", lines[1])
    early = torch.load(tmp_path / "debug-3.pth", weights_only=True)["model"]
    interrupted(monkeypatch, 2, lambda: pretrain(photos, tmp_path / "two", *STEPS))
    assert all(torch.equal(v, early[k]) for k, v in weights(tmp_path / "two")["model"].items())
    with pytest.raises(ValueError, match=r"nowhere/config.json"):
        call("debug_step", tmp_path / "nowhere", 3)


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"jobs": []}', b'{"args": null}', b"\xff", b"[" * 10**5])
def test_a_run_resumes_with_a_damaged_config_file(content, photos, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    whole, content = json.loads((run / "config.json").read_text()), content.replace(b"{", b'{"sha256": "0", ')
    (run / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run/config\.json .*damaged"):
        call("debug_step", run, 3)
    pretrain(photos, run, "--save_every", 1, "--image_every", 1)
    assert json.loads((run / "config.json").read_text())["args"] == whole["args"] | {"output_dir": str(run)}


def test_nonfinite_step_keeps_probe_weights_and_batch_norm_statistics(pretrained, photos, tmp_path, monkeypatch):
    states, after_step, made, calls = [], Saver.after_step, main_linprobe.probe_loss, []

    def record(self, progress):
        states.append(
            [value.clone() for name, value in self.state.model.state_dict().items() if "num_batches" not in name]
        )
        after_step(self, progress)

    def make_loss(normalize):
        loss = made(normalize)

        def bad(model, batch):
            calls.extend([1] * torch.is_grad_enabled())
            return loss(model, batch | {"images": batch["images"] + 50}) * (math.nan if len(calls) == 2 else 1)

        return bad

    monkeypatch.setattr(Saver, "after_step", record)
    monkeypatch.setattr(main_linprobe, "probe_loss", make_loss)
    words = ["--warmup_epochs", 0, "--blr", 1, "--pool", "mean"]
    train_classifier("main_linprobe", photos, tmp_path, pretrained, *words)
    first, second, third = ([torch.equal(x, y) for x, y in zip(a, b, strict=True)] for a, b in pairwise(states[:4]))
    assert all(first)
    assert not all(second)
    assert not all(third)


# ---------------------------------------------------------------------------------------------------------------- ranks

SIGNAL_RANK_1 = """
import os, signal, sys
import main_pretrain
from util.args import run_main
from util.checkpoint.saver import Saver

calls, real = [], Saver.after_step
def after_step(self, progress):
    real(self, progress)
    calls.append(1)
    if len(calls) == 10 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{})
Saver.after_step = after_step
run_main(main_pretrain.main)
"""
TWO_RANKS = [
    *PRETRAIN,
    *STEPS,
    "--effective_batch",
    "2",
    "--save_minutes",
    "0",
    "--timeout_minutes",
    "0.1",
    "--knn_every",
    "1",
]


def test_killed_rank_ends_the_other_with_one_line_and_the_run_resumes(photos, tmp_path):
    flags = [*TWO_RANKS, "--data_path", photos, "--output_dir"]
    for status, _, err in ranks(2, "main_pretrain.py", *flags, tmp_path / "uninterrupted"):
        assert status == 0, err
    (zero, _, err), (one, _, _) = ranks(2, "-c", SIGNAL_RANK_1.format("SIGKILL"), *flags, tmp_path / "interrupted")
    assert (zero, one) == (1, -9), err
    assert "Traceback" not in err
    assert re.search("another rank .*--timeout_minutes", err)
    for status, _, err in ranks(2, "main_pretrain.py", *flags, tmp_path / "interrupted"):
        assert status == 0, err
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted")
    # one rank with the same effective batch
    status, _, err = ended(spawn("main_pretrain.py", *flags, tmp_path / "alone"))
    assert status == 0, err
    losses = [[x["loss"] for x in records(tmp_path / f)] for f in ("uninterrupted", "alone")]
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def test_hanging_rank_ends_the_other_within_the_timeout(photos, tmp_path):
    flags = [*TWO_RANKS, "--data_path", photos, "--output_dir", tmp_path]
    zero, one = start_ranks(2, "-c", SIGNAL_RANK_1.format("SIGSTOP"), *flags)
    status, _, err = ended(zero)
    assert one.poll() is None  # it is still stopped
    one.kill()
    ended(one)
    assert status == 1
    assert "Traceback" not in err
    assert re.search("another rank .*--timeout_minutes", err)


@pytest.mark.slow  # three interpreters
def test_ranks_save_and_end_if_their_torchrun_is_killed(photos, tmp_path):
    flags = [*TWO_RANKS, "--epochs", 500, "--knn_every", 0, "--timeout_minutes", 1, "--data_path", photos]
    flags += ["--output_dir", tmp_path]
    torchrun = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_pretrain.py", *flags)
    while not (tmp_path / "last.pth").exists() and torchrun.poll() is None:
        time.sleep(0.1)
    torchrun.kill()
    status, out, err = ended(torchrun)  # the ranks hold its pipes until they end
    assert status == -9
    assert re.search(r"SIGTERM: .*step \d+ .*saved; .*same command", out), err


@pytest.mark.slow  # five interpreters
def test_torchrun_restarts_a_killed_rank_and_the_run_resumes_bit_for_bit(photos, tmp_path):
    flags = [*TWO_RANKS, "--data_path", photos, "--output_dir"]
    script = tmp_path / "signal_rank_1.py"
    once = 'if len(calls) == 10 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":'
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        + SIGNAL_RANK_1.format("SIGKILL").replace('if len(calls) == 10 and os.environ["RANK"] == "1":', once)
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    # a restart must resume in spite of --resume none
    status, out, err = ended(spawn(*torchrun, script, *flags, tmp_path / "run", "--resume", "none", "--overwrite"))
    assert status == 0, err
    assert "resumed from" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    for status, _, err in ranks(2, "main_pretrain.py", *flags, tmp_path / "uninterrupted"):
        assert status == 0, err
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


def test_signal_to_one_rank_stops_both_at_the_same_step(photos, tmp_path):
    flags = [*TWO_RANKS, "--data_path", photos, "--output_dir", tmp_path]
    ends = ranks(2, "-c", SIGNAL_RANK_1.format("SIGUSR1"), *flags)
    assert [status for status, _, _ in ends] == [75, 75], ends
    progress = weights(tmp_path)["progress"]
    assert (progress["epoch"], progress["step"]) in {(1, 4), (1, 5)}  # call 10, 7 per epoch, agreed a step later
    assert re.search(rf"step {progress['step']} of 8 .*epoch 2, saved", ends[0][1])
    (zero, out, err), (one, _, _) = ranks(2, "debug_step.py", tmp_path, 14, "--device", "cpu")
    assert (zero, one) == (0, 0), err
    for rank, name in enumerate(("debug-14.pth", "debug-14-rank1.pth")):
        assert f"step 14, batch 1 of 1 on rank {rank}: 1 images, loss " in out
        assert len(torch.load(tmp_path / name, weights_only=True)["batches"][0]["index"]) == 1


def test_probing_on_two_ranks_resumes_with_the_batch_norm_statistics_of_each_rank(pretrained, photos, tmp_path):
    flags = [*CLASSIFIER_FLAGS, "--warmup_epochs", 0, "--blr", 1, "--pool", "mean", "--data_path", photos]
    flags = ["main_linprobe", *flags, "--save_every", 1, "--checkpoint", pretrained / "last.pth", "--output_dir"]
    for status, _, err in ranks(2, f"{flags[0]}.py", *flags[1:], tmp_path / "uninterrupted"):
        assert status == 0, err
    script = SIGNAL_RANK_1.replace("main_pretrain", "main_linprobe").replace("== 10", "== 4").format("SIGTERM")
    assert [status for status, _, _ in ranks(2, "-c", script, *flags[1:], tmp_path / "interrupted")] == [75, 75]
    each = weights(tmp_path / "interrupted")["statistics"]
    assert not torch.equal(each[0][0], each[1][0])
    for status, _, err in ranks(2, f"{flags[0]}.py", *flags[1:], tmp_path / "interrupted"):
        assert status == 0, err
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted")
    # from the initial weights past the end of the first epoch, where the ranks average their statistics
    saved = torch.load(tmp_path / "uninterrupted" / "epoch-0001.pth", weights_only=True)
    for path in (tmp_path / "uninterrupted").glob("*.pth"):
        path.unlink()
    step = saved["steps"] + 1
    for status, _, err in ranks(2, "debug_step.py", tmp_path / "uninterrupted", step, "--device", "cpu"):
        assert status == 0, err
    for suffix in ("", "-rank1"):
        repeated = torch.load(tmp_path / "uninterrupted" / f"debug-{step}{suffix}.pth", weights_only=True)["model"]
        assert_same(repeated, saved["model"])


def test_error_if_ranks_find_different_checkpoints(photos, tmp_path, monkeypatch):
    pretrain(photos, tmp_path, *STEPS)
    monkeypatch.setattr(World, "gather", lambda self, value: [value, Progress(0, 3)])
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: .*ranks .*different"):
        pretrain(photos, tmp_path, *STEPS)


@pytest.mark.parametrize(
    ("effective", "ranks", "batch", "accum"),
    [(4096, 8, 512, 1), (4096, 4, 512, 2), (4096, 1, 512, 8), (96, 1, 40, 3), (6, 2, 512, 1), (14, 2, 4, 7)],
)
def test_effective_batch_is_split_among_ranks(effective, ranks, batch, accum):
    most = {(96, 1): 40, (14, 2): 4}.get((effective, ranks), 512)
    batch_size, accum_iter = split_effective_batch(effective, most, ranks)
    assert accum_iter == accum
    assert batch_size * accum_iter * ranks == effective
    assert batch_size <= batch


def test_effective_batch_not_divisible_by_the_ranks_is_rejected():
    with pytest.raises(ValueError, match=r"--effective_batch 4096 .* 3 ranks"):
        split_effective_batch(4096, 512, 3)


@pytest.mark.parametrize(
    ("environ", "is_restart"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "a"}, True),
        ({"TORCHELASTIC_RUN_ID": "b"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # another command of the same allocation
        ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
    ],
)
def test_only_a_restart_of_the_same_job_ignores_resume_none(environ, is_restart, photos, tmp_path, monkeypatch):
    first, again = ["--epochs", 1, "--warmup_epochs", 0], ["--resume", "none", "--overwrite"]
    with monkeypatch.context() as began:
        began.setenv("TORCHELASTIC_RUN_ID", "a")
        began.setenv("SLURM_JOB_ID", "7")
        pretrain(photos, tmp_path, *first)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    words = [*PRETRAIN, *first, "--batch_size", 8, "--blr", 0.03, "--image_every", 0, "--data_path", photos, *again]
    lines = call("main_pretrain", *words, "--output_dir", tmp_path)
    assert any(line.startswith("resumed from") for line in lines) == is_restart


def test_restart_uses_the_checkpoint_given_to_resume_at_first(photos, tmp_path, monkeypatch):
    pretrain(photos, tmp_path, "--save_every", 1)
    monkeypatch.setattr(main_pretrain, "train_one_epoch", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(photos, tmp_path, "--save_every", 1, "--resume", tmp_path / "epoch-0001.pth")
    assert weights(tmp_path)["progress"]["epoch"] == 0


def test_second_run_in_the_same_output_folder_is_rejected(photos, tmp_path):
    lock_script = (
        f"import time; from pathlib import Path; from util.checkpoint.resume import lock_folder; "
        f"lock_folder(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", lock_script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{tmp_path}: process {process.pid} .*writing"):
            pretrain(photos, tmp_path, *STEPS)
    finally:
        process.kill()
        process.communicate()
    pretrain(photos, tmp_path, *STEPS)  # the lock is released when its process ends
