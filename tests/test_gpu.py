"""What a GPU computes, by `make gpu`; the same tests run on the CPU, where they check themselves."""

import json
import re
import sys
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import PRETRAIN, assert_same_run, call, interrupted, pretrain, ranks, records, result
from pretended_cuda import pretended_cuda
from test_reference import EXTRACTS, answers_of, distance, model_of, noise_of

from benchmarks import gpu
from util.dist import autocast

NEAR = {"off": 1e-4, "bf16": 0.03, "fp16": 0.005}  # relative L2 distance of the prediction
ONE_CARD = """
import sys, torch, torch.distributed as torch_dist
import main_pretrain, util.dist as dist
from util.args import run_main

init, card = torch_dist.init_process_group, torch.device(sys.argv[1])
dist.choose_device = lambda *_: card
torch_dist.init_process_group = lambda backend, **given: init("gloo", **given | {"device_id": None})
sys.argv = ["main_pretrain.py", *sys.argv[2:]]
run_main(main_pretrain.main)
"""


CARD = [pytest.param("cuda:0", marks=pytest.mark.gpu)] * torch.cuda.is_available()


@pytest.fixture(params=["cpu", "pretended", *CARD])
def device(request):
    pretends = request.param == "pretended"
    with pretended_cuda() if pretends else nullcontext():
        yield "cuda:0" if pretends else request.param


@pytest.mark.parametrize("amp", NEAR)
@pytest.mark.parametrize("name", EXTRACTS)
def test_prediction_and_gradients_are_those_of_the_cpu_in_float32(name, amp, device, tmp_path):
    answers = answers_of(f"extract/{name}")
    model, _ = model_of(answers, tmp_path)
    images, noise = answers["imgs"], noise_of(answers)
    loss, expected, mask = model(images, noise)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.to(device).zero_grad()
    with autocast(amp, torch.device(device)):
        loss, prediction, found = model(images.to(device), noise.to(device))
    loss.backward()
    assert torch.equal(found.removed.cpu(), mask.removed)
    assert loss.item() == pytest.approx(answers["loss"].item(), rel=1e-5 if amp == "off" else 0.01)
    assert distance(prediction.detach().cpu(), expected.detach()) < NEAR[amp]
    again = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    assert distance(again, gradients) < 3 * NEAR[amp]


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(device, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        words = ["--device", device, "--amp", "bf16", "--batch_size", 4]
        pretrain(photos, tmp_path / "unbroken", *words)
        start = partial(pretrain, photos, tmp_path / "resumed", *words)
        assert interrupted(monkeypatch, 3, start) == 75
        start()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_losses_and_accuracies_are_those_of_the_cpu(device, photos, pretrained, masked, tmp_path):
    found = []
    for place in ("cpu", device):
        on, folder = ["--device", place, "--num_workers", 0, "--amp", "off"], tmp_path / str(len(found))
        losses = [x["loss"] for x in records(pretrain(photos, folder / "pretrain", *on))]
        start = ["--checkpoint", pretrained / "last.pth", *on]
        labelled, steps = ["--data_path", photos], ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 4]
        fixed = ["--aa", "none", "--reprob", 0, "--mixup", 0, "--cutmix", 0, "--drop_path", 0]
        dense = ["--data_path", masked, "--short_side", 0]
        losses.append(result("main_linprobe", *start, *labelled, *steps, "--output_dir", folder / "probe")["loss"])
        losses.append(
            result("main_finetune", *start, *labelled, *steps, *fixed, "--output_dir", folder / "tune")["loss"]
        )
        losses.append(result("main_knn", *start, *labelled)["acc1"])
        losses.append(result("main_segment", *start, *dense, *steps, "--output_dir", folder / "segment")["miou"])
        call("main_features", *start, *labelled, "--output", folder / "x.npy")
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", *CARD])
def test_two_ranks_share_a_gpu_with_gloo(device, photos, tmp_path):
    words = [*PRETRAIN, "--device", device, "--image_every", 0, "--data_path", photos, "--epochs", 1]
    words += ["--warmup_epochs", 0, "--effective_batch", 4]
    for status, _, error in ranks(2, "-c", ONE_CARD, device, *words, "--output_dir", tmp_path / "two"):
        assert status == 0, error
    call("main_pretrain", *words, "--output_dir", tmp_path / "one")
    one, two = ([x["loss"] for x in records(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- the report


def test_without_a_gpu_the_report_exits_with_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with patch.object(sys, "argv", ["gpu.py"]), pytest.raises(SystemExit) as ending:
        gpu.run_main(gpu.main)
    assert re.fullmatch(r"gpu\.py: error: .*no GPU.*docs/gpu\.md.*", ending.value.code)


def test_a_row_has_the_steps_of_a_recipe_and_its_memory(device, tmp_path, monkeypatch):
    recipe = tmp_path / "small.args"
    recipe.write_text("\n".join([*PRETRAIN[:6], "--amp off --decoder_dim 32 --decoder_heads 2 --batch_size 8"]))
    monkeypatch.setattr(gpu, "measure", lambda args, size: {"peak": 0.25 if args.grad_checkpointing else 0.5})
    for capacity, name in ((1.0, "small"), (0.0, "small (checkpointing)")):
        row, fell = gpu.time_steps(recipe, torch.device(device), capacity, steps=6)
        assert fell
        assert len(row) == len(gpu.COLUMNS)
        assert (row[0], row[1], row[-1]) == (name, "8", "0.2" if capacity == 0 else "0.5")
        first, last = map(float, row[2].split(" -> "))
        assert last < first
    machine, missing = gpu.describe(torch.device(device))
    assert json.loads(machine.partition("; ")[2])["torch"] == torch.__version__
    assert missing.startswith("missing: ")
    assert len(gpu.recipes()) >= 10
