"""Memory predicted by benchmarks/memory.py, against sizes that autograd and a second measurement give."""

import sys
from unittest.mock import patch

import pytest
import torch
from conftest import CPU, PRETRAIN
from torch.autograd.graph import saved_tensors_hooks

import main_pretrain
from benchmarks import memory
from models import build_model
from util.args import resolve_defaults


def gib(sizes) -> float:
    """Sum of sizes in bytes, each rounded up to 512 as torch's allocator does."""
    return sum(-(-size // 512) * 512 for size in sizes) / 2**30


def flags(*words):
    given = [*PRETRAIN, "--model", "vit_tiny", "--input_size", "64", "--data_path", "-", *words]
    return resolve_defaults(main_pretrain.get_parser().parse_args(given))


@pytest.mark.parametrize("words", [[], ["--grad_checkpointing"], ["--decoder", "cross"], ["--model", "convvit_pico"]])
def test_parts_equal_the_sizes_of_a_real_step(words):
    args = flags(*words)
    found = memory.measure(args, 16)
    model, held = build_model(args), {}
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    tensors = [*model.parameters(), *model.buffers()]
    assert found["weights"] == pytest.approx(gib(x.nbytes for x in tensors))
    assert found["gradients"] == pytest.approx(sum(trained) / 2**30)
    assert found["optimizer"] == pytest.approx(2 * gib(trained) + gib([4] * len(trained)), rel=0.01)  # moments, step
    own = {x.untyped_storage().data_ptr() for x in tensors}

    def hold(x):
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage()  # kept alive, so that addresses stay unique
        return x

    with saved_tensors_hooks(hold, lambda x: x):
        model(torch.randn(16, 3, 64, 64), torch.rand(16, 64))
    saved = gib(storage.nbytes() for storage in held.values())
    assert found["activations"] == pytest.approx(saved, rel=0.05)
    assert found["peak"] > found["weights"] + found["optimizer"] + found["activations"]


def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch):
    monkeypatch.setattr(memory, "USABLE", {1: 1.0, 0: 0.01})
    args = flags()
    fits = memory.largest_batches(args, 32, memory.measure(args, 32)["peak"])
    assert fits[0] == 0  # the weights do not fit
    assert memory.measure(args, fits[1])["peak"] <= 1 < memory.measure(args, fits[1] * 102 // 100)["peak"]


def test_a_recipe_is_measured_without_a_gpu_and_checkpointing_needs_less(capsys):
    with patch.object(sys, "argv", ["memory.py", *PRETRAIN, "--batch_size", "8", "--amp", "bf16"]):
        memory.main()
    without, _, _, with_, _, largest = capsys.readouterr().out.splitlines()
    assert without.startswith("without --grad_checkpointing: peak 0.0 GiB")
    assert with_.startswith("with --grad_checkpointing: peak 0.0 GiB")
    assert "16 GB: " in largest
    assert torch.zeros(1).device == CPU  # and real tensors are back
