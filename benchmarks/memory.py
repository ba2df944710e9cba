"""GPU memory of a training step, without a GPU. `python -m benchmarks.memory --model vit_base --batch_size 512`

Takes the flags and recipes of main_pretrain.py; the optimiser counts as AdamW. The step runs on tensors without numbers
(torch's FakeTensorMode), and the sizes of all that are alive at once are added up. Not counted, but left free on a card: the
CUDA context, workspaces of libraries, DDP's buckets and fragmentation.
"""

import argparse
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_pretrain
import models
import models_pixmim
from engine_pretrain import make_gradient_nan, optimizer_step, pretrain_loss
from util.args import resolve_defaults, run_main
from util.data.transforms import Normalize
from util.dist import autocast

DEVICE = torch.device("cpu")
USABLE = {card: 0.9 * card - 1 for card in (16, 24, 40, 80)}  # GiB of a card that a step may use


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device == DEVICE:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        """Count a storage until it is freed; torch's allocator rounds to 512 bytes."""
        if storage not in self.known:
            size = -(-storage.nbytes() // 512) * 512
            self.known.add(storage)
            self.change(size)
            weakref.finalize(storage, self.change, -size)

    def change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def fake_device() -> Iterator[Memory]:
    """Tensors without numbers, which are counted. They say "cpu": without a GPU torch runs no backward pass for others."""
    with ExitStack() as stack:
        with patch.object(torch.cuda, "is_available", lambda: True):  # else no backward pass would run
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # fused attention, as on GPUs
        stack.enter_context(patch.object(models_pixmim, "use_products", lambda *_: False))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        yield stack.enter_context(Memory())


def measure(args: Namespace, batch_size: int) -> dict[str, float]:
    """GiB of a step of pre-training: weights, gradients, optimizer, activations saved for backward, target alone, peak."""
    target = models.build_target(args)  # reads values
    with patch.object(models, "build_target", lambda _: target), torch.device("meta"):
        model: Any = models.build_model(args)
    found = {}
    with fake_device() as memory:
        model = model.to_empty(device=DEVICE)
        found["weights"] = memory.live
        optimizer = torch.optim.AdamW(param_groups_weight_decay(model), fused=True)
        shape = batch_size, *args.input_size, args.in_chans
        batch = {
            "images": torch.zeros(shape, dtype=torch.uint8, device=DEVICE),
            "noise": torch.rand(batch_size, model.noise_length, device=DEVICE),
        }
        loss_fn, scaler = pretrain_loss(Normalize(args, DEVICE)), torch.amp.GradScaler(DEVICE.type, enabled=False)
        for _ in range(2):  # the first makes the optimiser's state
            before = memory.peak = memory.live
            with autocast(args.amp, DEVICE):
                loss = loss_fn(model, batch)
            found["activations"] = memory.live - before
            make_gradient_nan(loss).backward()
            found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer_step(optimizer, scaler, model.parameters())
            del loss
        found["optimizer"] = memory.live - found["weights"] - sum(x.nbytes for x in batch.values())
        found["peak"] = memory.peak
        images = torch.zeros(batch_size, args.in_chans, *args.input_size, device=DEVICE)
        before = memory.peak = memory.live
        model.target(images)
        found["target"] = memory.peak - before
    return {name: value / 2**30 for name, value in found.items()}


def largest_batches(args: Namespace, batch_size: int, peak: float) -> dict[int, int]:
    """{GiB of a card: images of a step that fits}; beyond `batch_size` images, memory is linear in their number."""
    image = (measure(args, 2 * batch_size)["peak"] - peak) / batch_size
    return {card: max(0, int(batch_size + (usable - peak) / image)) for card, usable in USABLE.items()}


def get_parser() -> argparse.ArgumentParser:
    """That of main_pretrain.py, without the need of images."""
    parser = main_pretrain.get_parser()
    data_path = next(action for action in parser._actions if action.dest == "data_path")
    data_path.required, data_path.help = False, "not read (default: none)"
    return parser


def main() -> None:
    args = resolve_defaults(get_parser().parse_args())
    for checkpointing in (False, True):
        chosen = Namespace(**vars(args) | {"grad_checkpointing": checkpointing})
        found = measure(chosen, args.batch_size)
        peak = found.pop("peak")
        fits = largest_batches(chosen, args.batch_size, peak)
        print(f"{'with' if checkpointing else 'without'} --grad_checkpointing: peak {peak:.1f} GiB")
        print("    " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
        print("    largest --batch_size: " + ", ".join(f"{card} GB: {n}" for card, n in fits.items()))


if __name__ == "__main__":
    run_main(main)
