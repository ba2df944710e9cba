"""Image sources: what --data_path names, and subsets of the labelled training images."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.cache import Cache, is_cache
from util.data.folders import Source, class_folders, image_folder
from util.data.pixels import PixelOptions
from util.data.streams import Stream, is_stream
from util.data.tars import local_tars
from util.files import write_atomic
from util.rng import SUBSET, generator


def pretrain_source(args) -> Source:
    """Unlabelled images of --data_path: a cache, streamed or local tar shards, or a folder of any structure."""
    if args.stream_samples and not is_stream(args.data_path):
        raise ValueError(f"--stream_samples {args.stream_samples}: omit it, --data_path {args.data_path} is no stream")
    if is_cache(args.data_path):
        packed = Cache(args.data_path)
        packed.check_flags(args)
        return packed
    if is_stream(args.data_path):
        return Stream(args.data_path, args.stream_samples, args.seed)
    return local_tars(args.data_path) or image_folder(args.data_path)


def labelled_source(data_path: str, split: str, classes: Sequence[str] | None = None) -> Source:
    """Images of a split with their classes: those of its folders or tar shards, unless `classes` lists them."""
    if is_cache(data_path):
        raise ValueError(f"--data_path {data_path} is a cache; kNN (--knn_path) and classifiers need images")
    if is_stream(data_path):
        raise ValueError(f"--data_path {data_path} is a stream; kNN (--knn_path) and classifiers need local images")
    source = local_tars(data_path, split, classes) or class_folders(data_path, split, classes)
    if len(classes or np.unique(source.labels)) < 2:
        raise ValueError(f"--data_path: {data_path}/{split} has one class; kNN and classifiers need at least two")
    return source


def labelled_sources(data_path: str) -> tuple[Source, Source]:
    """(train, val) of a folder that holds both, with the classes of train."""
    train = labelled_source(data_path, "train")
    return train, labelled_source(data_path, "val", train.classes)


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

    def read(self, i: int, options: PixelOptions) -> list[Image.Image] | np.ndarray:
        return self.source.read(self.indices[i], options)

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
