"""Learning-rate schedule: a function of the fractional epoch."""

import math


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
