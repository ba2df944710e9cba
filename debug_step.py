"""Recompute one training step of a run and report what is not finite."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from util.data.folders import Source
from util.dist import autocast
from util.files import write_atomic
from util.formats.keys import mae_names
from util.rng import seed_everything, step_seed
from util.run import Run


def rows_not_finite(value: Any, count: int) -> list[int]:
    """Which of `count` rows of a tensor hold something that is not finite; all, if it has other rows."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.isfinite().all():
        return []
    if value.ndim == 0 or len(value) != count:
        return list(range(count))
    return (~value.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()


@contextmanager
def watched(model: nn.Module, count: int) -> Iterator[list[tuple[str, list[int]]]]:
    """Layers whose output is not finite, in the order of computation, with the rows that are not."""
    found: list[tuple[str, list[int]]] = []

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if rows := rows_not_finite(first, count):
            found.append((name or type(module).__name__, rows))

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    yield found
    for hook in hooks:
        hook.remove()


def replay(run: Run, model: Any, loss_fn: Callable, batches: list[dict], source: Source, done: int) -> None:
    """Compute step `done` + 1 on `batches`, say what of it is not finite, write it to a file, and end the process."""
    args, world = run.args, run.world
    said: list[str] = []
    plain = getattr(model, "module", model)
    plain = getattr(plain, "_orig_mod", plain)
    for micro, batch in enumerate(batches):
        names = [source.name(i) for i in batch["index"].tolist()]
        seed_everything(step_seed(args.seed, done * args.accum_iter + micro, world.rank))
        with watched(plain, len(names)) as found, autocast(args.amp, world.device):
            loss = loss_fn(plain, batch)
        loss.backward()
        said.append(
            f"step {done + 1}, batch {micro + 1} of {len(batches)} on rank {world.rank}: {len(names)} images, loss {loss.item():.6g}"
        )
        if found:
            layer, rows = found[0]
            said.append(f"not finite first in {layer}: " + ", ".join(f"{batch['index'][i]} {names[i]}" for i in rows))
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    norm = nn.utils.get_total_norm(list(gradients.values())).item()
    said.append(
        f"norm of the gradient {norm:.6g}; not finite in {len(wrong)} of {len(gradients)}: {' '.join(wrong[:8]) or 'none'}"
    )
    path = run.folder / f"replay-{done + 1}{f'-rank{world.rank}' if world.rank else ''}.pth"
    moved = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
    content = {"batches": moved, "model": mae_names(plain.state_dict()), "step": done + 1}
    write_atomic(path, partial(torch.save, content))
    said.append(f"{path} holds the batch and the weights before the step")
    for lines in world.gather(said):
        for line in lines:
            run.log.info(line)
    run.close()
    sys.exit(0)
