"""Learning-rate schedule at key epochs and against the formula of facebookresearch/mae."""

import math
from argparse import Namespace

import pytest
import torch
from conftest import CPU

from util.dist import World
from util.lr_sched import set_lr, warmup_cosine
from util.run import Run, peak_lr


def mae_lr(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Formula of util/lr_sched.py in facebookresearch/mae."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    turn = math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(turn))


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.0), (20, 1.2e-3), (40, 2.4e-3), (170, (2.4e-3 + 1e-6) / 2), (300, 1e-6)]
)
def test_learning_rate_at_key_epochs_of_the_300_epoch_schedule(epoch, expected):
    # start, half of the warm-up, its end (peak), half of the cosine (mean of peak and minimum), end
    assert warmup_cosine(epoch, 2.4e-3, 1e-6, 40, 300) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 5, 7.5])
@pytest.mark.parametrize("floor", [0, 1e-5])
def test_learning_rate_matches_mae_at_every_step(warmup, floor):
    for step in range(0, 1000, 7):
        epoch = step / 10
        assert warmup_cosine(epoch, 1e-3, floor, warmup, 100) == pytest.approx(mae_lr(epoch, 1e-3, floor, warmup, 100))


def test_schedule_without_warmup_starts_at_the_peak_and_warmup_only_schedule_ends_near_it():
    assert warmup_cosine(0, 1.0, 0, 0, 10) == 1.0
    assert warmup_cosine(9.5, 1.0, 0, 10, 10) == 0.95


def test_set_lr_applies_the_scale_of_each_group():
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": tensors[:1], "lr_scale": 0.25}, {"params": tensors[1:]}], lr=1)
    set_lr(optimizer, 0.1, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1]


def test_peak_lr_follows_the_linear_scaling_rule_and_lr_at_uses_the_flags_of_the_run():
    assert peak_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)  # arXiv:2111.06377, table 8
    args = Namespace(min_lr=1e-6, warmup_epochs=5, epochs=100)
    run = Run(args, World(0, 1, CPU), None, None, 1024, 1, 2e-3)
    assert run.lr_at(2.5) == mae_lr(2.5, 2e-3, 1e-6, 5, 100)
    assert run.lr_at(60) == mae_lr(60, 2e-3, 1e-6, 5, 100)
