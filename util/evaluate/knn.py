"""Weighted k-nearest-neighbour accuracy of an encoder."""

from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.batches import DevicePrefetcher, eval_loader
from util.data.folders import Source
from util.data.transforms import eval_transform
from util.dist import World
from util.evaluate.encoder import Encoder, encode_batches, features_around_norm
from util.evaluate.scores import Score
from util.meters import log_bad_images
from util.run import Run


@torch.inference_mode()
def extract_features(
    args: Namespace, world: World, encoder: Encoder, loader: DevicePrefetcher, layers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """(Features (N, layers, D) of unit length in float32, labels (N,)) of this rank's samples, on the device."""

    def encode(encoder: Encoder, images: Tensor) -> Tensor:
        found = features_around_norm(encoder, images)
        return torch.stack([found[layer] for layer in layers], dim=1)

    rows = [torch.empty(0, len(layers), encoder.embed_dim, device=world.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=world.device)]
    for x, batch in encode_batches(args, world, encoder, loader, encode):
        rows.append(F.normalize(x, dim=2))
        labels.append(batch["label"])
    return torch.cat(rows), torch.cat(labels)


@torch.inference_mode()
def knn_votes(train: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes (N, classes) of the k nearest, weighted by exp(cosine / temperature) (Wu et al., arXiv:1805.01978)."""
    similarity, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    weight = (
        (similarity - similarity[:, :1]) / temperature
    ).exp()  # 1 for the nearest: the same ranking without overflow
    return votes.scatter_add_(1, labels[nearest], weight)


def knn(
    args: Namespace, world: World, encoder: Encoder, sources: tuple[Source, Source], layers: Sequence[str],
    k: int = 20, temperature: float = 0.07, run: Run | None = None,
) -> list[dict]:  # fmt: skip
    """For each layer, "before_norm" or "after_norm", the accuracy on val of a vote of the nearest neighbours in train.

    Keys: knn_features (the layer), acc1, acc5, mean_class_acc in percent, n. Images left out (--on_bad_image skip) are counted as
    `unreadable` and listed by `log_bad_images`.
    """
    training = encoder.training
    encoder.eval()
    transform = eval_transform(args.input_size, args.crop_pct)
    loaders = [eval_loader(args, world, source, transform) for source in sources]
    (train, labels), (queries, truth) = (extract_features(args, world, encoder, loader, layers) for loader in loaders)
    encoder.train(training)
    bad = log_bad_images(world, loaders, run)
    shares = world.gather((train.cpu(), labels.cpu()))
    train, labels = (torch.cat(part).to(world.device) for part in zip(*shares, strict=True))
    if not len(train) or not any(world.gather(len(queries))):
        flag = "knn_path" if getattr(args, "knn_path", None) else "data_path"
        raise ValueError(f"--{flag} {' '.join(getattr(args, flag))}: no image can be read")
    num_classes = len(sources[0].classes)
    results = []
    for n, layer in enumerate(layers):
        score = Score(num_classes, world.device)
        rows = max(1, 2**26 // len(train))  # queries per chunk: 256 MiB of similarities
        for chunk, targets in zip(queries[:, n].split(rows), truth.split(rows), strict=True):
            score.add(knn_votes(train[:, n], labels, chunk, num_classes, k, temperature), targets)
        result = score.result(world)
        result.pop("loss")  # votes are not logits
        results.append({"knn_features": layer, **result, **bad})
    return results
