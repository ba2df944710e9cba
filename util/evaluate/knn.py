"""Weighted k-nearest-neighbour accuracy of an encoder."""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.batches import DevicePrefetcher, eval_loader
from util.data.folders import Source
from util.data.transforms import eval_transform
from util.dist import World
from util.evaluate.encoder import Encoder, encode_batches
from util.evaluate.scores import Score
from util.meters import log_bad_images
from util.run import Run


@torch.inference_mode()
def extract_features(
    args: Namespace, world: World, encoder: Encoder, loader: DevicePrefetcher
) -> tuple[Tensor, Tensor]:
    """(Features (N, D) of unit length in float32, labels (N,)) of this rank's samples, on the device."""
    rows, labels = [], []
    for x, batch in encode_batches(args, world, encoder, loader):
        rows.append(F.normalize(x, dim=1))
        labels.append(batch["label"])
    if not rows:
        return torch.empty(0, encoder.embed_dim, device=world.device), torch.empty(
            0, dtype=torch.int64, device=world.device
        )
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
    args: Namespace, world: World, encoder: Encoder, sources: tuple[Source, Source], k: int = 20, temperature: float = 0.07,
    run: Run | None = None,
) -> dict:  # fmt: skip
    """Accuracy on val of a vote of the nearest neighbours in train: acc1, acc5, mean_class_acc in percent, n.

    Images left out (--on_bad_image skip) are counted as `unreadable` and listed by `log_bad_images`.
    """
    training = encoder.training
    encoder.eval()
    loaders = [eval_loader(args, world, source, eval_transform(args.input_size)) for source in sources]
    (train, labels), (queries, truth) = (extract_features(args, world, encoder, loader) for loader in loaders)
    encoder.train(training)
    bad = log_bad_images(world, loaders, run)
    shares = world.gather((train.cpu(), labels.cpu()))
    train, labels = (torch.cat(part).to(world.device) for part in zip(*shares, strict=True))
    if not len(train) or not any(world.gather(len(queries))):
        raise ValueError(f"--data_path {getattr(args, 'knn_path', None) or args.data_path}: no image can be read")
    num_classes = len(sources[0].classes)
    score = Score(num_classes, world.device)
    rows = max(1, 2**26 // len(train))  # queries per chunk: 256 MiB of similarities
    for chunk, targets in zip(queries.split(rows), truth.split(rows), strict=True):
        score.add(knn_votes(train, labels, chunk, num_classes, k, temperature), targets)
    result = score.result(world)
    result.pop("loss")  # votes are not logits
    return result | bad
