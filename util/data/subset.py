"""Subsets of the labelled training images, for evaluation with few labels (--train_fraction, --train_list)."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.folders import Source
from util.files import write_atomic
from util.rng import SUBSET, generator


class Subset(Source):
    """Images `indices` of a source, with all of its classes."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels, self.classes = source.labels[indices], source.classes

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])

    def start_epoch(self, epoch: int) -> None:
        self.source.start_epoch(epoch)

    def prefetch(self, indices: Sequence[int]) -> None:
        self.source.prefetch(self.indices[indices].tolist())

    def read(self, i: int, in_chans: int) -> list[Image.Image] | np.ndarray:
        return self.source.read(self.indices[i], in_chans)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()} {self.indices.tolist()}".encode()).hexdigest()

    def close(self) -> None:
        self.source.close()


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of this share of each class, at least one image; a smaller share of the same seed is a subset."""
    chosen = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(of_class)))
        chosen.append(generator(seed, SUBSET, label).permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))


def relative_names(source: Source, data_path: str) -> list[str]:
    """Names of the images, relative to DIR/train."""
    return [os.path.relpath(source.name(i), Path(data_path, "train")) for i in range(len(source))]


def select_training_images(source: Source, args: Namespace) -> Source:
    """The training images that --train_fraction or --train_list selects; ValueError for names that do not exist."""
    if args.train_list is None:
        chosen = draw_fraction(source.labels, args.train_fraction, args.seed)
        return source if args.train_fraction == 1 else Subset(source, chosen)
    if args.train_fraction < 1:
        raise ValueError(f"--train_fraction {args.train_fraction:g} and --train_list exclude each other; give one")
    try:
        wanted = Path(args.train_list).read_text(errors="surrogateescape").split("\n")
    except OSError as error:
        raise ValueError(f"--train_list {args.train_list} cannot be read: {error.strerror}") from error
    index = {name: i for i, name in enumerate(relative_names(source, args.data_path))}
    names = [name for name in wanted if name]
    missing = [name for name in names if name not in index]
    if missing or not names:
        what = (
            f"has {len(missing)} names that {args.data_path}/train lacks, such as {missing[0]}"
            if missing
            else "is empty"
        )
        raise ValueError(f"--train_list {args.train_list} {what}; expected CLASS/IMAGE, one a line")
    return Subset(source, np.sort(np.array([index[name] for name in names])))


def write_list(folder: Path, source: Source, data_path: str) -> None:
    """Write FOLDER/train_list.txt, which --train_list reads, if the source is a subset."""
    if isinstance(source, Subset):
        names = "".join(f"{name}\n" for name in relative_names(source, data_path))
        write_atomic(folder / "train_list.txt", names.encode(errors="surrogateescape"))
