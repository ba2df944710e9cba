"""What an encoder is worth: features, kNN, linear probes, accuracy; encoders from any checkpoint that `convert` reads."""

import json
from argparse import Namespace
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import checkpoint, convert
from util.args import encoder_options
from util.data import Feed, Normalize, eval_loader, eval_transform, labelled_source
from util.dist import World, autocast, join
from util.export import image_size, resample
from util.run import Run, plain
from util.sources import Source

# ------------------------------------------------------------------------------------------------------------ encoders


# timm's VisionTransformer, or a host with its forward_features, forward_head, num_prefix_tokens, embed_dim
Encoder = Any
MODEL_FLAGS = ("model", "patch_size", "input_size", "in_chans", "mean", "std", "pool")


def own_arguments(weights: convert.Weights | None) -> dict:
    """Arguments of the run that wrote the weights, {} unless it was one of ours."""
    return weights.args if weights and weights.source == "pixmim" else {}


def read_architecture(
    args: Namespace, encoders, flags: tuple[str, ...] = MODEL_FLAGS
) -> tuple[Namespace, convert.Weights | None]:
    """(args with each of `flags` that is None filled from --checkpoint, its weights); none is an untrained encoder.

    Flags that were given win: another --input_size resamples the position embedding.
    """
    if args.checkpoint == "none":
        if args.model is None:
            raise ValueError("--checkpoint none is an untrained encoder; say which with --model")
        found: dict = {"input_size": (224, 224), "in_chans": 3}
        weights = None
    else:
        weights = convert.load(args.checkpoint)
        found = own_arguments(weights) or infer_architecture(weights, args, encoders)
        found = found | {"input_size": tuple(found["input_size"])}
    filled = {name: found.get(name) for name in flags if getattr(args, name, "") is None}
    file = args.checkpoint if weights is None else str(convert.weights_file(args.checkpoint))
    return Namespace(**vars(args) | filled | {"checkpoint": file}), weights


def infer_architecture(weights: convert.Weights, args: Namespace, encoders) -> dict:
    """Model flags that the shapes of a foreign checkpoint, and the config.json beside it, tell."""
    facts = convert.architecture(weights.state)
    family, width, depth = facts["family"], facts["embed_dim"], facts["depth"]
    sizes = {name: getattr(encoder, "keywords", {}) for name, encoder in encoders.items()}  # of partials
    known = {(name.rpartition("_")[0], size.get("embed_dim"), size.get("depth")): name for name, size in sizes.items()}
    if args.model is None and (family, width, depth) not in known:
        raise ValueError(f"--checkpoint {args.checkpoint}: no {family} here is {width} wide and {depth} deep")
    size = image_size(weights)
    if args.input_size is None and size is None:
        raise ValueError(
            f"--checkpoint {args.checkpoint}: {facts['num_patches']} patches are no square; give --input_size H W"
        )
    model = known.get((family, width, depth))
    told, own = weights.args.get("num_heads"), sizes.get(args.model or model, {}).get("num_heads")
    if told and own and told != own:
        raise ValueError(
            f"--checkpoint {args.checkpoint} has {told} attention heads, --model {args.model or model} {own}"
        )
    return {
        "model": model,
        "patch_size": facts["patch_size"],
        "input_size": size or args.input_size,
        "in_chans": facts["in_chans"],
        "mean": weights.args.get("mean"),
        "std": weights.args.get("std"),
    }


def old_grid(weights: convert.Weights, model: Encoder) -> tuple[int, int]:
    """Grid of the weights' position embedding: that of the run or config.json, else a square, else the model's."""
    run = own_arguments(weights)
    if run:
        height, width = (side // (run["patch_size"] or model.patch) for side in run["input_size"])
        return height, width
    size = image_size(weights)
    return (size[0] // model.patch, size[1] // model.patch) if size else model.grid


def listed(names: set[str]) -> str:
    """The first of many names."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_encoder(args: Namespace, encoders, weights: convert.Weights | None, **options) -> Encoder:
    """The encoder or classifier with the weights of --checkpoint; fresh is what pre-training has not: fc_norm, head."""
    torch.manual_seed(args.seed)
    model = encoders[args.model](**encoder_options(args), **options)
    for name in model.pretraining_only:
        delattr(model, name)
    if weights is None:
        return model
    state, own = convert.to_timm(weights.state), model.state_dict()
    old, prefix = old_grid(weights, model), model.num_prefix_tokens
    if old != model.grid and old[0] * old[1] + prefix == state["pos_embed"].shape[1]:
        state["pos_embed"] = resample(state["pos_embed"], old, model.grid, prefix)
    fresh = {name for name in own if name.split(".")[0] in ("fc_norm", "head")}
    unused = {name for name in state if name.split(".")[0] in ("norm", "head", "fc_norm", *model.pretraining_only)}
    problems = {
        "missing": set(own) - set(state) - fresh,
        "unknown": set(state) - set(own) - unused,
        "of another shape": {n for n in set(own) & set(state) - fresh if own[n].shape != state[n].shape},
    }
    if any(problems.values()):
        kind = convert.family(weights.state) or "host without rules"
        what = "; ".join(f"{problem}: {listed(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"--checkpoint {args.checkpoint}, a {kind}, does not fit --model {args.model}: {what}")
    kept = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(own | kept)
    return model


def pooling(weights: convert.Weights | None, pool: str | None = None) -> dict:
    """timm's options of an encoder whose feature is `pool`; None = as the weights were probed, else the encoder's own."""
    if weights and "fc_norm.weight" in weights.state:
        if pool == "token":
            raise ValueError("--pool token: --checkpoint was fine-tuned on the mean of the patches; use --pool mean")
        return {"global_pool": "avg"}
    pool = pool or own_arguments(weights).get("pool")
    if pool == "mean":
        return {"global_pool": "avg", "fc_norm": False}  # of a ViT's normalised patches
    return {"global_pool": pool} if pool else {}


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """What a classifier would see of whole images, (B, D): the class token or the mean of the patches (`pooling`)."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)


def computed(args: Namespace, world: World, encoder: Encoder, loader: DataLoader, what=features) -> Iterator:
    """(float32 `what(encoder, images)`, the batch) of each batch of this rank."""
    normalize = Normalize(args, world.device)
    for batch in Feed(loader, world.device):
        with torch.inference_mode(), autocast(args.amp, world.device):
            x = what(encoder, normalize(batch))
        yield x.float(), batch


# ------------------------------------------------------------------------------------------------------------- accuracy


class Score:
    """Counts of a classifier on this rank, exact over all of them."""

    def __init__(self, num_classes: int, device: torch.device):
        self.counts = torch.zeros(4, num_classes, dtype=torch.float64, device=device)  # n, top-1, top-5, loss by class

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores (B, classes), of which the softmax is the prediction; labels (B,)."""
        top = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(scores.float(), labels, reduction="none")
        rows = torch.stack([torch.ones_like(loss), top[:, 0], top.any(1), loss]).double()
        self.counts.index_add_(1, labels, rows)

    def result(self, world: World) -> dict[str, float]:
        """acc1, acc5, mean_class_acc in percent, mean loss, n."""
        by_class = world.sum(self.counts)
        n, top1, top5, loss = by_class.sum(1).tolist()
        present = by_class[0] > 0
        mean_class = (by_class[1, present] / by_class[0, present]).mean().item()
        return {
            "acc1": round(100 * top1 / n, 3),
            "acc5": round(100 * top5 / n, 3),
            "mean_class_acc": round(100 * mean_class, 3),
            "loss": round(loss / n, 5),
            "n": int(n),
        }


@torch.inference_mode()
def evaluate(args: Namespace, world: World, model: nn.Module, loader: DataLoader, num_classes: int) -> list[dict]:
    """One `Score.result` for each head of a classifier: model gives (B, classes) or (B, heads, classes)."""
    model.eval()
    normalize = Normalize(args, world.device)
    scores: list[Score] = []
    for batch in Feed(loader, world.device):
        with autocast(args.amp, world.device):
            logits = model(normalize(batch)).float()
        logits = logits.unsqueeze(1) if logits.ndim == 2 else logits
        scores = scores or [Score(num_classes, world.device) for _ in range(logits.shape[1])]
        for i, score in enumerate(scores):
            score.add(logits[:, i], batch["label"])
    heads = max(world.gather(len(scores)))  # a rank without images knows of none, and must take part in every sum
    scores += [Score(num_classes, world.device) for _ in range(heads - len(scores))]
    return [score.result(world) for score in scores]


# ------------------------------------------------------------------------------------------------------------------ kNN


@torch.inference_mode()
def extract(args: Namespace, world: World, encoder: Encoder, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """(features (N, D) of length 1, labels (N,)) of this rank's share, float32 on the device."""
    rows, labels = [], []
    for x, batch in computed(args, world, encoder, loader):
        rows.append(F.normalize(x, dim=1))
        labels.append(batch["label"])
    if not rows:
        return torch.empty(0, encoder.embed_dim, device=world.device), torch.empty(
            0, dtype=torch.int64, device=world.device
        )
    return torch.cat(rows), torch.cat(labels)


@torch.inference_mode()
def knn_votes(train: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes (N, classes) of the k nearest: each weighs exp(cosine / temperature) (Wu et al., arXiv:1805.01978)."""
    similarity, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1: no overflow, the same ranking
    return votes.scatter_add_(1, labels[nearest], weight)


def knn(
    args: Namespace, world: World, encoder: Encoder, sources: tuple[Source, Source], k: int = 20, temperature: float = 0.07
) -> dict:  # fmt: skip
    """Accuracy of the nearest neighbours in (train, val): acc1, acc5, mean_class_acc, n."""
    training = encoder.training
    encoder.eval()
    loaders = [eval_loader(args, world, source, eval_transform(args.input_size)) for source in sources]
    (train, labels), (queries, truth) = (extract(args, world, encoder, loader) for loader in loaders)
    encoder.train(training)
    shares = world.gather((train.cpu(), labels.cpu()))
    train, labels = (torch.cat(part).to(world.device) for part in zip(*shares, strict=True))
    num_classes = len(sources[0].classes)
    score = Score(num_classes, world.device)
    rows = max(1, 2**26 // len(train))  # 256 MiB of similarities
    for some, answers in zip(queries.split(rows), truth.split(rows), strict=True):
        score.add(knn_votes(train, labels, some, num_classes, k, temperature), answers)
    result = score.result(world)
    result.pop("loss")  # votes are no logits
    return result


# ---------------------------------------------------------------------------------------------------------------- probes


class Probe(nn.Module):
    """Frozen encoder -> batch norm without affine -> linear heads side by side: logits (B, heads, classes)."""

    def __init__(self, encoder: Encoder, num_classes: int, num_heads: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.bn: Any = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(deepcopy(head) for _ in range(num_heads))  # so a head does not depend on the others

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def average_statistics(self, world: World) -> None:
        """Make the running statistics those of all ranks."""
        for value in (self.bn.running_mean, self.bn.running_var):
            value.copy_(world.sum(value.double()) / world.size)  # in float64 the mean of equal values is exact

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = features(self.encoder, images)
        x = self.bn(x.float())
        return torch.stack([head(x) for head in self.heads], dim=1)

    def classifier(self, best: int) -> dict[str, Tensor]:
        """State of a classifier: the encoder and one of the heads, the batch norm folded into it."""
        head: Any = self.heads[best]
        scale = (self.bn.running_var + self.bn.eps).rsqrt()
        weight = head.weight * scale
        folded = {"head.weight": weight, "head.bias": head.bias - weight @ self.bn.running_mean}
        return {**self.encoder.state_dict(), **{name: value.detach() for name, value in folded.items()}}


def validate(run: Run, model: nn.Module, loader: DataLoader, num_classes: int, epoch: int) -> list[dict]:
    """`evaluate`, logged; the best of several heads stands for them."""
    results = evaluate(run.args, run.world, model, loader, num_classes)
    best = max(results, key=lambda result: result["acc1"])
    run.log.scalars({"epoch": epoch, **{f"val_{name}": value for name, value in best.items()}})
    run.log.say(f"epoch {epoch}  val {json.dumps(best)}")
    return results


def save_classifier(run: Run, state: dict[str, Tensor], classes: list[str]) -> None:
    """OUTPUT_DIR/classifier.pth: timm's names, for `timm.create_model(..., checkpoint_path=)` and for --eval."""
    if run.world.leads:
        args, state = plain(run.args) | {"classes": classes}, convert.to_mae(checkpoint.on_host(state))
        path = checkpoint.write(run.folder / "classifier.pth", {"model": state, "args": args})
        if target := convert.home(state):
            run.log.say(f"load it: {convert.usage(convert.Weights(state, args, 'pixmim', []), target, path)}")


def evaluate_saved(args: Namespace, encoders, weights: convert.Weights | None, interpolation: str = "bicubic") -> None:
    """--eval: print the accuracy of a saved classifier on DIR/val."""
    classes = own_arguments(weights).get("classes")
    count = len(weights.state.get("head.weight", ())) if weights else 0
    if not count:
        raise ValueError(f"--eval: --checkpoint {args.checkpoint} has no classifier; train one, or use main_knn.py")
    val = labelled_source(args.data_path, "val", classes)
    if len(val.classes) != count:
        raise ValueError(
            f"--checkpoint {args.checkpoint} knows {count} classes, {args.data_path}/val has {len(val.classes)}"
        )
    world = join(args.device, args.amp, args.timeout_minutes)
    model = load_encoder(args, encoders, weights, num_classes=count, **pooling(weights)).to(world.device)
    loader = eval_loader(args, world, val, eval_transform(args.input_size, interpolation))
    print_result(world, evaluate(args, world, model, loader, count)[0])
    world.leave()


def print_result(world: World, result: dict) -> None:
    """The last line of a main: one JSON object."""
    if world.leads:
        print(json.dumps(result), flush=True)
