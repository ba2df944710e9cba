"""Image sources: what --data_path names."""

from collections.abc import Sequence

import numpy as np

from util.data.cache import Cache, is_cache
from util.data.folders import Source, class_folders, image_folder
from util.data.streams import Stream, is_stream
from util.data.tars import local_tars


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
