"""Schedules over the epochs: learning rate, image size."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise


def warmup_cosine(epoch: float, peak: float, floor: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0 to `peak`, then half a cosine down to `floor`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_lr(optimizer, lr: float, epoch: float) -> None:
    """Set the learning rate of each group to `lr` x its `lr_scale` (layer decay, several probes), to 0 in its `frozen_epochs`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0) * (epoch >= group.get("frozen_epochs", 0))


def size_ends(sizes: Sequence[tuple[int, float]], epochs: int, last: tuple[int, int]) -> list[int]:
    """Epoch at which each (size, share of the epochs) of --sizes ends; ValueError if they do not lead to the `last` size.

    It is the sum of the shares so far x epochs, rounded to the nearest epoch, halves up.
    """
    words = "--sizes " + " ".join(f"{size}:{share:g}" for size, share in sizes)
    totals = [*accumulate(share for _, share in sizes)]
    if abs(totals[-1] - 1) > 1e-6:
        raise ValueError(f"{words}: the shares of the epochs sum to {totals[-1]:g}, not to 1")
    if (sizes[-1][0],) * 2 != last:
        raise ValueError(f"{words}: the last size must be --input_size {last[0]} {last[1]}")
    ends = [math.floor(total * epochs + 0.5) for total in totals]
    if any(end <= start for start, end in pairwise([0, *ends])):
        raise ValueError(f"{words}: a size has less than one of --epochs {epochs}; raise its share, or leave it out")
    return ends
