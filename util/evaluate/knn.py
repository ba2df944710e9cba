"""Weighted k-nearest-neighbour accuracy of an encoder. Each rank keeps the features of its own training images."""

from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.batches import DevicePrefetcher, eval_loader
from util.data.folders import Source
from util.data.transforms import eval_transform
from util.dist import World
from util.evaluate.encoder import Encoder, encode_batches, layer_features
from util.evaluate.scores import Score
from util.meters import log_bad_images
from util.run import Run

QUERIES, BLOCK = 1024, 2**13  # cosines of so many queries of all ranks and training images at once: 64 MiB in float64
LOW = 2**32 - 1
Setting = tuple[str | int, int, float]  # layer, k, temperature


@torch.inference_mode()
def extract_features(
    args: Namespace, world: World, encoder: Encoder, loader: DevicePrefetcher, layers: Sequence[str | int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(Features (N, layers, D) of unit length in float32, labels (N,), indices (N,)) of this rank's samples, on the device."""

    def encode(encoder: Encoder, images: Tensor) -> Tensor:
        return torch.stack(layer_features(encoder, images, layers), dim=1)

    rows = [torch.empty(0, len(layers), encoder.embed_dim, device=world.device)]
    numbers = [torch.empty(2, 0, dtype=torch.int64, device=world.device)]
    for x, batch in encode_batches(args, world, encoder, loader, encode):
        rows.append(F.normalize(x, dim=2))
        numbers.append(torch.stack([batch["label"], batch["index"]]))
    return torch.cat(rows), *torch.cat(numbers, dim=1)


def to_keys(similarity: Tensor, index: Tensor) -> Tensor:
    """Integers (N, M), all different, in the order of the cosines (N, M); of equal cosines the lower index (M,) is greater."""
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32 | LOW - index


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(Cosines, indices), the inverse of `to_keys`."""
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32), LOW - (keys & LOW)


def find_neighbours(world: World, bank: Tensor, index: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Cosines, indices) (Q, k) of the training images of all ranks that are nearest to this rank's queries, nearest first.

    `bank` (N, D) and `index` (N,) are this rank's, `queries` (Q, D) as many on each rank. Of equal cosines the lower index
    comes first, so that the result does not depend on the number of ranks.
    """
    # float64: rounded to float32 in any order of summation
    all_queries = world.all_gather(queries).flatten(0, 1).double()
    best = torch.full((len(all_queries), k), torch.iinfo(torch.int64).min, device=queries.device)
    for part, numbers in zip(bank.split(BLOCK), index.split(BLOCK), strict=True):
        keys = to_keys((all_queries @ part.double().T).float(), numbers)
        best = torch.cat([best, keys], dim=1).topk(k).values
    own = world.all_gather(best).unflatten(1, (world.size, -1))[:, world.rank]  # (ranks, Q, k)
    return from_keys(own.transpose(0, 1).flatten(1).topk(k).values)


def knn_votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Votes (Q, classes) of neighbours (Q, k), weighted by exp(cosine / temperature) (Wu et al., arXiv:1805.01978)."""
    # 1 for the nearest: the same ranking without overflow
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(similarity), num_classes, device=similarity.device).scatter_add_(1, labels, weight)


@torch.inference_mode()
def knn(
    args: Namespace, world: World, encoder: Encoder, sources: tuple[Source, Source], layers: Sequence[str | int],
    ks: Sequence[int] = (20,), temperatures: Sequence[float] = (0.07,), run: Run | None = None,
) -> dict[Setting, dict]:  # fmt: skip
    """{(layer, k, temperature): accuracy on val of a vote of the k nearest in train}; layers as in `layer_features`.

    The accuracies acc1, acc5, mean_class_acc are in percent, n counts images. Images left out (--on_bad_image skip) are
    counted as `unreadable` and listed by `log_bad_images`.
    """
    training, device = encoder.training, world.device
    encoder.eval()
    transform = eval_transform(args.input_size, args.crop_pct)
    loaders = [eval_loader(args, world, source, transform) for source in sources]
    (bank, _, index), (queries, truth, _) = (extract_features(args, world, encoder, x, layers) for x in loaders)
    encoder.train(training)
    bad = log_bad_images(world, loaders, run)
    counts = world.all_gather(torch.tensor([len(bank), len(queries)], device=device))
    (total, _), (_, longest) = counts.sum(0).tolist(), counts.amax(0).tolist()
    if not total or not longest:
        flag = "knn_path" if getattr(args, "knn_path", None) else "data_path"
        raise ValueError(f"--{flag} {' '.join(getattr(args, flag))}: no image can be read")
    labels, num_classes = torch.from_numpy(sources[0].labels).to(device).long(), len(sources[0].classes)
    scores = {(layer, k, t): Score(num_classes, device) for layer in layers for k in ks for t in temperatures}
    queries = F.pad(queries, (0, 0, 0, 0, 0, longest - len(queries)))  # as many on each rank
    rows = max(1, QUERIES // world.size)
    for n, layer in enumerate(layers):
        for start in range(0, longest, rows):
            part = queries[start : start + rows, n]
            similarity, found = find_neighbours(world, bank[:, n], index, part, min(max(ks), total))
            targets = truth[start : start + rows]
            for k in ks:
                for t in temperatures:
                    near = slice(len(targets)), slice(k)
                    scores[layer, k, t].add(knn_votes(similarity[near], labels[found[near]], num_classes, t), targets)
    results = {setting: score.result(world) | bad for setting, score in scores.items()}
    for result in results.values():
        del result["loss"]  # defined for logits
    return results
