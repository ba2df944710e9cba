"""Pre-training on fakecuda.c, started by test_fakecuda.py. Kernels do nothing: numbers on the device mean nothing."""

import ctypes
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import PRETRAIN, call
from test_cuda import MISTAKES
from test_memory import flags
from torch._dynamo.utils import counters

import main_pretrain
from benchmarks import memory
from util.checkpoint.state import copy_to_host
from util.meters import Meter

LIBRARY = ctypes.CDLL(None)
COUNTS = ("launches", "copies", "waits")


def count() -> Counter:
    """Kernels launched, copies, and waits of the host since the start."""
    return Counter({name: ctypes.c_long.in_dll(LIBRARY, f"fake_{name}").value for name in COUNTS})


def train(photos, folder, steps: int, *words) -> Counter:
    """An epoch of so many steps: `count`, and how often each "file:line" waited as torch sees it."""
    sizes = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 16 // steps, "--log_every", 99, "--image_every", 0]
    place = ["--device", "cuda", "--data_path", photos, "--output_dir", folder / str(steps), "--max_skipped", 99]
    before = count()
    with patch.object(main_pretrain, "LossCheck"), warnings.catch_warnings(record=True) as found:  # it refuses infinity
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call("main_pretrain", *PRETRAIN, *sizes, *place, *words)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [x for x in found if "synchronizing CUDA" in str(x.message)]
    return count() - before + Counter(f"{Path(x.filename).name}:{x.lineno}" for x in waits)


def count_six_steps(photos, folder, *words) -> Counter:
    """`train`, of the steps between two log lines alone."""
    two, eight = (train(photos, folder, n, *words) for n in (2, 8))
    return eight - two


def test_device_copies_preserve_values():
    x = torch.randn(1000)
    assert torch.equal(x.pin_memory().cuda(non_blocking=True).clone().cpu(), x)


def test_a_checkpoint_is_copied_with_one_wait():
    content = {"model": [torch.randn(3, 5, device="cpu") for _ in range(50)], "step": 7}
    on_device = {"model": [x.cuda() for x in content["model"]], "step": 7}
    before = count()
    found = copy_to_host(on_device)
    assert (count() - before)["waits"] == 1
    assert found["step"] == 7
    assert all(x.equal(y) and x.is_pinned() for x, y in zip(found["model"], content["model"], strict=True))


CASES = ["", "--amp fp16", "--grad_checkpointing", "--decoder cross", "--model convvit_pico --input_size 32"]


@pytest.mark.parametrize("words", [*CASES, "--model mff_vit_pico --input_size 32"])
def test_no_step_waits_for_the_device(words, photos, tmp_path):
    found = count_six_steps(photos, tmp_path, "--amp", "bf16", *words.split())
    assert set(found) == {"launches", "copies"}
    assert found["launches"] > 6 * 100
    launches, copies = found["launches"] // 6, found["copies"] // 6
    print(f"counted: {words or 'vit_pico in bf16'}: {launches} launches and {copies} copies a step")


def test_reading_the_loss_in_the_meter_waits_in_each_step(photos, tmp_path, monkeypatch):
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, loss, norm: add(self, loss.cpu(), norm))
    found = count_six_steps(photos, tmp_path)
    line = test_reading_the_loss_in_the_meter_waits_in_each_step.__code__.co_firstlineno + 2
    assert found[f"on_fakecuda.py:{line}"] == 6
    assert found["waits"] >= 6


def plant_meter(monkeypatch) -> None:
    start = Meter.start_epoch

    def start_epoch(self, *args):
        batches = start(self, *args)
        self.losses.append(torch.zeros(()))
        return batches

    monkeypatch.setattr(Meter, "start_epoch", start_epoch)


@pytest.mark.parametrize(
    ("plant", "file"), [*MISTAKES.values(), (plant_meter, "util/meters.py")], ids=[*MISTAKES, "meter"]
)
def test_a_tensor_left_on_the_cpu_is_an_error(plant, file, photos, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match="same device") as error:
        train(photos, tmp_path, 2)
    assert any(str(entry.path).endswith(file) for entry in error.traceback)


class Card:
    """Memory of torch's allocator, in place of that which benchmarks.memory adds up."""

    def __init__(self):
        self.before = torch.cuda.memory_allocated()  # workspaces of cuBLAS

    live = property(lambda self: torch.cuda.memory_allocated() - self.before)
    peak = property(
        lambda self: torch.cuda.max_memory_allocated() - self.before,
        lambda self, _: torch.cuda.reset_peak_memory_stats(),
    )


@pytest.mark.parametrize("words", ["--amp bf16", "--amp bf16 --grad_checkpointing", "--amp off --decoder cross"])
def test_memory_of_a_step_equals_the_prediction(words, monkeypatch):
    @contextmanager
    def card():
        yield Card()

    args = flags(*words.split())
    predicted = memory.measure(args, 64)
    monkeypatch.setattr(memory, "fake_device", card)
    monkeypatch.setattr(memory, "DEVICE", torch.device("cuda", 0))
    with warnings.catch_warnings(action="ignore"):
        memory.measure(args, 2)  # makes the workspaces
        found = memory.measure(args, 64)
    print(f"counted: {words}: peak {found['peak']:.4f} GiB, predicted {predicted['peak']:.4f}")
    for name in ("weights", "gradients", "optimizer"):
        assert found[name] == pytest.approx(predicted[name], rel=0.001), name
    assert found["peak"] == pytest.approx(predicted["peak"], rel=0.05)


def test_inductor_compiles_one_graph(photos, tmp_path):
    counters.clear()
    train(photos, tmp_path, 2, "--compile", "--amp", "bf16")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    print("counted: kernels compiled:", counters["inductor"]["async_compile_cache_miss"])
