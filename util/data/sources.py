"""The image source that --data_path names."""

from collections.abc import Sequence

from util.data.cache import Cache, is_cache
from util.data.folders import Source, class_folders, image_folder
from util.data.streams import Stream
from util.data.tars import is_stream, local_tars


def pretrain_source(args) -> Source:
    """Images of --data_path: a cache, tar shards here or from afar, or a folder of whatever structure."""
    if args.stream_samples and not is_stream(args.data_path):
        raise ValueError(
            f"--stream_samples {args.stream_samples} is for streams; --data_path {args.data_path} can be counted"
        )
    if is_cache(args.data_path):
        packed = Cache(args.data_path)
        packed.refuse_other_flags(args)
        return packed
    if is_stream(args.data_path):
        return Stream(args.data_path, args.stream_samples, args.seed)
    return local_tars(args.data_path) or image_folder(args.data_path)


def labelled_source(data_path: str, split: str, classes: Sequence[str] | None = None) -> Source:
    """Images of a split with their classes, which are those of its folders or tars, or as given."""
    if is_cache(data_path):
        raise ValueError(
            f"{data_path} is a cache, for pre-training alone: kNN (--knn_path) and classifiers need images"
        )
    if is_stream(data_path):
        raise ValueError(
            f"--data_path {data_path}: streams are for pre-training; kNN (--knn_path) and classifiers need images here"
        )
    return local_tars(data_path, split, classes) or class_folders(data_path, split, classes)


def labelled_sources(data_path: str) -> tuple[Source, Source]:
    """(train, val) of a folder with both, with the same classes."""
    train = labelled_source(data_path, "train")
    return train, labelled_source(data_path, "val", train.classes)
