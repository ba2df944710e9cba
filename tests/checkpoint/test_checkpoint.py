"""Checkpoints: atomic writes, contents, and checks before a run is resumed."""

import errno
import os
import re
import resource
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, ended, pretrain, records, spawn, weights
from reference.make import read as reference

from util.checkpoint.resume import candidates
from util.checkpoint.state import read_checkpoint, store_checkpoint, write_checkpoint
from util.files import write_atomic

SAVE_AND_KILL = """
import io, os, signal, sys
from argparse import Namespace
from pathlib import Path
import torch
from util.checkpoint.state import store_checkpoint

real = torch.save
def half(content, file):
    buffer = io.BytesIO()
    real(content, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def killed(*names):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "torch.save":
    torch.save = half
else:
    at, replace, calls = int(sys.argv[2]), os.replace, []
    os.replace = lambda *names: killed() if len(calls) == at else calls.append(replace(*names))
store_checkpoint(Path(sys.argv[-1]), {"model": torch.ones(100_000)}, "epoch-0009.pth")
"""


@pytest.fixture
def run(pretrained, tmp_path):
    """Copy of the finished run; epoch-NNNN.pth are hard links, which is safe since they are replaced, never rewritten."""

    def copy(source: str, target: str) -> None:
        (os.link if "epoch-" in source else shutil.copy)(source, target)

    yield shutil.copytree(pretrained, tmp_path / "run", copy_function=copy)
    shutil.rmtree(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("location", ["torch.save", *[f"os.replace {n}" for n in range(5)]])
def test_save_killed_at_any_point_leaves_a_complete_checkpoint(location, run):
    before = read_checkpoint(run / "last.pth")
    status, _, err = ended(spawn("-c", SAVE_AND_KILL, *location.split(), run))
    # four renames: .new.pth, epoch-NNNN.pth, last.pth to previous.pth, the new file to last.pth
    if location == "os.replace 4":
        assert status == 0, err
    else:
        assert status == -9, err
    first = candidates(run, "auto")[0]
    if location != "os.replace 4":
        assert_same(read_checkpoint(first), before)
    store_checkpoint(run, {"batch": 3}, None)  # files left by the killed process do not interfere
    assert read_checkpoint(run / "last.pth")["batch"] == 3
    assert {path.name for path in run.glob(".*")} <= {".lock", ".new.pth", ".epoch-0009.pth.tmp"}


def test_full_disk_keeps_the_old_file_and_raises_an_error(run):
    before, limits = read_checkpoint(run / "last.pth"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pth .*written"):
            write_checkpoint(run / "last.pth", {"model": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(read_checkpoint(run / "last.pth"), before)
    assert not list(run.glob(".*.tmp"))


def test_numpys_error_of_a_full_disk_is_explained(tmp_path):
    def fill(file):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        np.save(file, np.ones(100_000))

    (tmp_path / "x.npy").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"x\.npy .*written.*disk") as caught:
            write_atomic(tmp_path / "x.npy", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "x.npy").read_bytes() == b"old"


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose pages hold the tensor; "" for memory of the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, *_, name = line.split(maxsplit=5) if line.count("/") else [*line.split(), ""]
        first, last = (int(part, 16) for part in where.split("-"))
        if first <= tensor.data_ptr() < last:
            return name
    raise AssertionError("the tensor is in no part of the memory")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists mapped files")
def test_ranks_share_the_pages_of_a_checkpoint(tmp_path):
    path, values = tmp_path / "x.pth", torch.arange(1_000_000)
    write_checkpoint(path, {"model": values})
    assert mapped_file(read_checkpoint(path)["model"]) != str(path)
    shared = read_checkpoint(path, mmap=True)["model"]
    assert mapped_file(shared) == str(path)
    assert torch.equal(shared, values)
    shared.zero_()  # in a private copy
    assert torch.equal(read_checkpoint(path)["model"], values)


def test_a_checkpoint_that_the_disk_cannot_read_is_damaged(tmp_path):
    """So that the save before it is used. Reading the first page of this file is an input/output error without a name."""
    (tmp_path / "last.pth").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"last\.pth is damaged"):
        read_checkpoint(tmp_path / "last.pth")


def without_block_numbers(names) -> set[str]:
    """Tensor names with N in place of block numbers."""
    return {re.sub(r"(?<=blocks\.)\d+", "N", name) for name in names}


def test_last_pth_contains_mae_tensor_names_and_the_training_state(pretrained):
    content = weights(pretrained)  # read with weights_only
    assert without_block_numbers(content["model"]) == without_block_numbers(reference("mae")["checkpoint"]["model"])
    assert len(content["model"]) == 4 + 5 * 2 + 3 * 12  # tokens and positions; embeddings, norms, head; blocks
    assert content["progress"] == {"epoch": 1, "step": 2, "losses": (), "skipped": 0}  # the evaluation is still to come
    assert content["batch"] == 8
    assert content["args"]["input_size"] == [16, 16]
    assert {"optimizer", "scaler", "format"} <= content.keys()


def test_epoch_checkpoints_are_written_every_save_every_epochs_and_at_the_end(pretrained, photos, tmp_path):
    assert sorted(path.name for path in pretrained.glob("epoch-*")) == ["epoch-0001.pth", "epoch-0002.pth"]
    assert torch.load(pretrained / "epoch-0001.pth", weights_only=True)["progress"]["epoch"] == 0
    assert_same(torch.load(pretrained / "epoch-0002.pth", weights_only=True), weights(pretrained))
    other = pretrain(photos, tmp_path / "run", "--epochs", 3, "--save_every", 2)
    assert sorted(path.name for path in other.glob("epoch-*")) == ["epoch-0002.pth", "epoch-0003.pth"]


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--mask_ratio", 0.5, r"--mask_ratio 0\.75, \w+ 0\.5\b"),
        ("--seed", 1, r"--seed 0, \w+ 1\b"),
        ("--epochs", 3, r"--epochs 2, \w+ 3\b"),
        ("--crop", "rrc", r"--crop src, \w+ rrc\b"),
        ("--input_size", 24, r"--input_size \[16, 16\], \w+ \[24, 24\]"),
        ("--batch_size", 4, r" 8, \w+ 4 .*--effective_batch 8"),
    ],
)
def test_resume_with_other_flags_is_rejected_and_names_the_flag(flag, value, message, run, photos):
    with pytest.raises(ValueError, match=message):
        pretrain(photos, run, flag, value)


@pytest.mark.parametrize(("change", "message"), [("more", "16 .*--data_path .* 17 "), ("other", "names .*--data_path")])
def test_resume_with_other_images_is_rejected(change, message, run, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    pretrain(data, run)  # the folder may be moved
    image = data / "train" / "ant" / "1.png"
    (shutil.copy if change == "more" else shutil.move)(image, image.with_name("7.png"))
    with pytest.raises(ValueError, match=f"last.pth .*{message}"):
        pretrain(data, run)


def test_run_resumes_with_the_same_effective_batch_and_smaller_batches(pretrained, photos, tmp_path):
    """In the second epoch, accumulation and log interval change no sample, mask or learning rate."""
    parts = ["--batch_size", 4, "--accum_iter", 2, "--log_every", 2]
    resumed = pretrain(photos, tmp_path / "resumed", *parts, "--resume", pretrained / "epoch-0001.pth")
    (second,) = records(resumed)  # mean of its two steps
    expected = records(pretrained)[2:]
    assert (second["step"], second["lr"]) == (4, expected[1]["lr"])
    assert second["loss"] == pytest.approx(sum(x["loss"] for x in expected) / 2, rel=1e-6)
    assert second["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-4)
    before = torch.load(pretrained / "epoch-0001.pth", weights_only=True)["model"]
    after, unchanged = weights(resumed)["model"], weights(pretrained)["model"]
    for name, value in unchanged.items():
        # the gradient of the keys' bias is noise, which Adam scales
        ours, theirs = (x.chunk(3)[::2] if name.endswith("qkv.bias") else [x] for x in (after[name], value))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)
    moved = max((value - before[name]).abs().max() for name, value in unchanged.items())
    assert moved > 100 * 2e-6  # the tolerance is small compared with the change by the epoch
    with pytest.raises(ValueError, match=r"--batch_size"):  # the effective batch differs
        pretrain(photos, tmp_path / "other", "--batch_size", 4, "--resume", pretrained / "epoch-0001.pth")


def test_resume_from_foreign_truncated_or_missing_files_is_rejected_by_name(run, photos, tmp_path):
    whole = (run / "last.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {}, "epoch": 3}, tmp_path / "foreign.pth")
    for name in ("half", "foreign"):
        with pytest.raises(ValueError, match=rf"--resume .*{name}\.pth"):
            pretrain(photos, run, "--resume", tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"--resume .*nowhere\.pth"):
        pretrain(photos, run, "--resume", tmp_path / "nowhere.pth")


def test_resume_of_foreign_weights_names_checkpoint_and_no_unsafe_switch(run, photos, tmp_path):
    torch.save({"model": {}, "args": Namespace(blr=1)}, tmp_path / "tensors.pth")
    torch.save({"model": {}, "hub": Path("x")}, tmp_path / "objects.pth")
    (tmp_path / "file.safetensors").write_bytes(b"x" * 64)
    for name in ("tensors.pth", "objects.pth", "file.safetensors"):
        with pytest.raises(ValueError, match=rf"--resume .*{name} .*weights.*--checkpoint") as error:
            pretrain(photos, run, "--resume", tmp_path / name)
        for word in ("weights_only", "\x1b", "\n", "damaged"):
            assert word not in str(error.value)


def test_resume_loads_the_given_file(run, photos, pretrained):
    (run / "last.pth").unlink()
    pretrain(photos, run, "--resume", run / "epoch-0001.pth", "--image_every", 0)
    assert_same(weights(run)["model"], weights(pretrained)["model"])
    assert [x["step"] for x in records(run)] == [1, 2, 3, 4]


def test_finished_run_does_not_train_again(run, photos):
    before = [(run / name).read_bytes() for name in ("last.pth", "log.jsonl")]
    pretrain(photos, run, "--save_every", 1, "--image_every", 1)
    assert before == [(run / name).read_bytes() for name in ("last.pth", "log.jsonl")]


def test_resume_none_requires_overwrite_and_starts_a_new_run(run, photos):
    with pytest.raises(ValueError, match=f"--resume none: {run} .*--overwrite"):
        pretrain(photos, run, "--resume", "none", "--seed", 1)
    assert weights(run)["args"]["seed"] == 0
    pretrain(photos, run, "--resume", "none", "--overwrite", "--seed", 1, "--epochs", 1)
    assert weights(run)["args"]["seed"] == 1
    assert [x["step"] for x in records(run)] == [1, 2]
    assert sorted(path.name for path in run.glob("epoch-*")) == ["epoch-0001.pth"]
