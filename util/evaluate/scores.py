"""Accuracy of classifiers, exact over all ranks."""

import json
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.transforms import Normalize
from util.dist import World, autocast
from util.files import append_line
from util.meters import log_bad_images
from util.run import Run, args_to_dict, versions


class Score:
    """Counts of correct predictions on this rank; `result` sums them over all ranks."""

    def __init__(self, num_classes: int, device: torch.device):
        # rows: samples, top-1, top-5, loss
        self.counts = torch.zeros(4, num_classes, dtype=torch.float64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: scores (B, classes) are logits or votes; labels (B,)."""
        top = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(scores.float(), labels, reduction="none")
        rows = torch.stack([torch.ones_like(loss), top[:, 0], top.any(1), loss]).double()
        self.counts.index_add_(1, labels, rows)

    def result(self, world: World) -> dict[str, float]:
        """acc1, acc5, mean_class_acc in percent, mean loss, n, over all ranks."""
        by_class = world.sum(self.counts)
        n, top1, top5, loss = by_class.sum(1).tolist()
        present = by_class[0] > 0
        mean_class = (by_class[1, present] / by_class[0, present]).mean().item()
        shares = {"acc1": top1 / n, "acc5": top5 / n, "mean_class_acc": mean_class}
        return {name: round(100 * x, 3) for name, x in shares.items()} | {"loss": round(loss / n, 5), "n": int(n)}


@torch.inference_mode()
def evaluate(args, world: World, model: nn.Module, loader, num_classes: int, run: Run | None = None) -> list[dict]:
    """One `Score.result` per head of a classifier whose logits are (B, classes) or (B, heads, classes).

    Images left out (--on_bad_image skip) are counted as `unreadable` and listed by `log_bad_images`.
    """
    model.eval()
    normalize = Normalize(args, world.device)
    scores: list[Score] = []
    for batch in loader:
        with autocast(args.amp, world.device):
            logits = model(normalize(batch)).float()
        logits = logits.unsqueeze(1) if logits.ndim == 2 else logits
        scores = scores or [Score(num_classes, world.device) for _ in range(logits.shape[1])]
        for i, score in enumerate(scores):
            score.add(logits[:, i], batch["label"])
    bad = log_bad_images(world, [loader], run)
    heads = max(world.gather(len(scores)))  # a rank without images has no scores, but must join each sum
    if not heads:
        raise ValueError(f"--data_path {' '.join(args.data_path)}: no image can be read")
    scores += [Score(num_classes, world.device) for _ in range(heads - len(scores))]
    return [score.result(world) | bad for score in scores]


def best_of(results: list[dict], pool: str | None = None) -> dict:
    """The result with the highest top-1 accuracy, of the heads of this pooling."""
    return max((result for result in results if result.get("pool") == pool), key=lambda result: result["acc1"])


def validate(run: Run, model: Any, loader, num_classes: int, epoch: int, pool: str | None = None) -> list[dict]:
    """Results of `evaluate`; logs those of the best head of this pooling, and of all heads if there are several.

    The result of a `ProbeHead` also has its `pool` and `blr`.
    """
    results = evaluate(run.args, run.world, model, loader, num_classes, run)
    if pool:
        about = [{"pool": head.pool, "blr": head.blr} for head in model.heads]
        results = [result | head for result, head in zip(results, about, strict=True)]
    best = best_of(results, pool)
    record = {"epoch": epoch, **{f"val_{name}": value for name, value in best.items()}}
    run.log.scalars(record | ({"heads": results} if len(results) > 1 else {}))
    run.log.info(f"epoch {epoch}  val {json.dumps(best)}")
    return results


def print_result(world: World, result: dict, args: Namespace) -> None:
    """Print one JSON object, the last line of a main, on the main rank; append it with its origin to --results.

    The line holds the command, arguments, versions, and of --checkpoint the SHA-256 and the arguments of its own run.
    """
    if not world.is_main:
        return
    print(json.dumps(result), flush=True)
    trained = "output_dir" in args and not args.eval
    if path := getattr(args, "results", None) or (Path(args.output_dir) / "results.jsonl" if trained else None):
        about = {"main": Path(sys.argv[0]).name, "command": [Path(sys.executable).name, *sys.argv], **versions()}
        about |= {"time": datetime.now(UTC).isoformat(), "world_size": world.size, "args": args_to_dict(args)}
        try:
            append_line(Path(path), json.dumps(about | {"result": result}))
        except OSError as error:
            reason = f"--results {path} cannot be written ({error.strerror})"
            raise OSError(f"{reason}; the result is printed above") from error
