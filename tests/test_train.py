"""Speed measurements of the training loop: FLOPs, share of the peak, data wait and host synchronisation."""

import re
import threading
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import CPU, PRETRAIN, call, one_rank, pretrain, records

import main_pretrain
from engine_pretrain import pretrain_loss
from models import ENCODERS, build_model
from util.args import resolve_defaults
from util.checkpoint.resume import Progress
from util.data.batches import DevicePrefetcher
from util.data.samplers import TrainSampler
from util.data.samples import Samples
from util.data.transforms import Normalize
from util.evaluate.probes import Probe
from util.meters import Meter, image_flops, peak_tflops


def products(tokens: int, dim: int, depth: int) -> int:
    """FLOPs of ViT blocks: four square projections, an MLP of 4 times the width and attention's two products."""
    return depth * (2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim)


@pytest.mark.parametrize("flags", ["", "--grad_checkpointing", "--amp bf16", "--lowpass_radius 0"])
def test_flops_of_a_step_are_three_times_those_of_the_forward_matrix_products(flags):
    words = [*PRETRAIN, "--input_size", "64", *flags.split(), "--data_path", "x"]
    args = resolve_defaults(main_pretrain.get_parser().parse_args(words))
    model = build_model(args)
    batch = {"images": torch.zeros(3, 64, 64, 3, dtype=torch.uint8), "noise": torch.rand(3, 64)}
    forward = products(17, 48, 2) + 2 * 16 * 192 * 48  # 16 of 64 patches of 8 x 8 x 3 values, and the class token
    forward += products(65, 32, 1) + 2 * 17 * 48 * 32 + 2 * 48 * 32 * 192  # decoder, its embedding and prediction
    loss_fn = partial(pretrain_loss(Normalize(args, CPU)), model)
    assert image_flops(model, loss_fn, batch, args.amp) == 3 * forward
    assert model.training


def test_flops_of_a_frozen_encoder_are_forward_only_and_counting_keeps_batch_norm_statistics():
    probe = Probe(ENCODERS["vit_tiny"](img_size=32), 5, ["token"], [0.1]).train()
    before = probe.heads[0].bn.running_mean.clone()
    flops = image_flops(probe, lambda batch: probe(batch["images"]), {"images": torch.randn(4, 3, 32, 32)}, "off")
    assert flops == products(5, 192, 12) + 2 * 4 * 768 * 192 + 2 * 192 * 5
    assert torch.equal(probe.heads[0].bn.running_mean, before)
    assert probe.training


@pytest.mark.parametrize(
    ("name", "amp", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA H100 80GB HBM3", "off", None),  # no peak for float32
        ("Somebody's GPU", "bf16", None),
        ("NVIDIA L40", "bf16", None),  # not an L4
        ("NVIDIA RTX A1000", "bf16", None),  # not an A100
    ],
)
def test_peak_tflops_match_the_data_sheets_of_known_gpus(name, amp, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_tflops(amp, torch.device("cuda", 0)) == peak
    assert peak_tflops(amp, CPU) is None


def test_log_contains_the_share_of_peak_flops(tmp_path):
    run = one_rank(tmp_path, size=2)
    meter = Meter(run, lambda batch: None, None)
    meter.flops, meter.peak = 2e9, 100
    assert meter.speed(10_000) == {"tflops": pytest.approx(20), "peak_share": pytest.approx(0.2)}


def test_warns_if_training_waits_for_data(photos, tmp_path, monkeypatch):
    """By a clock that only reading images (9 s a batch) and steps (1 s each) move."""
    now, read, add = [0.0], Samples.__getitems__, Meter.add
    clock = Namespace(**vars(time) | {"perf_counter": lambda: now[0]})

    def read_slowly(self, keys):
        now[0] += 9
        return read(self, keys)

    def add_slowly(self, loss, grad_norm):
        now[0] += 1
        add(self, loss, grad_norm)

    monkeypatch.setattr("util.meters.time", clock)
    monkeypatch.setattr("util.data.batches.time", clock)
    monkeypatch.setattr(Samples, "__getitems__", read_slowly)
    monkeypatch.setattr(Meter, "add", add_slowly)
    words = ["--data_path", photos, "--output_dir", tmp_path, "--batch_size", 8, "--epochs", 1]
    lines = call("main_pretrain", *PRETRAIN, *words)
    (warning,) = [line for line in lines if "--num_workers" in line]
    assert re.match(r"warning: 90% of epoch 1 .*--num_workers \(0 ", warning)  # 2 x 9 s of 2 x 10 s
    (first,) = [line for line in lines if line.startswith("first step: ")]
    assert float(first.split()[2]) == 10  # with its batch
    assert [x["data_wait"] for x in records(tmp_path)] == [0.9, 0.9]


def test_no_warning_if_training_does_not_wait_for_data(tmp_path, capsys):
    run = one_rank(tmp_path)
    run.log.active = True
    for waited, warnings in ((0.05, 0), (0.2, 1)):
        feed = DevicePrefetcher([], CPU)
        meter = Meter(run, lambda batch: None, None)
        meter.start_epoch(Progress(0, 0), feed, TrainSampler(16, run), str)
        meter.start -= 100
        feed.waited = 100 * waited
        meter.end_epoch(2)
        assert capsys.readouterr().out.count("warning") == warnings


def test_no_tensor_is_copied_to_the_host_between_log_lines(photos, tmp_path, monkeypatch):
    read, train_one_epoch = [], main_pretrain.train_one_epoch
    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def record_read(self, *args, real=real, name=name):
            if (
                threading.current_thread() is threading.main_thread()
            ):  # the writer thread reads tensors of the checkpoint
                read.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, record_read)

    def count_reads(*args):
        read.clear()
        progress = train_one_epoch(*args)
        epochs.append({name: read.count(name) for name in set(read)})
        return progress

    epochs = []
    monkeypatch.setattr(main_pretrain, "train_one_epoch", count_reads)
    pretrain(photos, tmp_path, "--batch_size", 4, "--log_every", 4, "--num_workers", 0)
    # tolist: losses of four steps; item: gradient norm, loader seed (on the host) and, once, the end of the first step;
    # numpy: the loader fills four batches on the host
    assert epochs == [{"tolist": 1, "item": 3, "numpy": 4}, {"tolist": 1, "item": 2, "numpy": 4}]
