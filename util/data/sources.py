"""Image sources: what --data_path names, and subsets of the labelled training images."""

import glob
import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.data.archives import Archives
from util.data.cache import Cache, is_cache
from util.data.folders import IMAGE, Folder, Query, Source, find_split, folder_source, kind_of, list_files, split_folder
from util.data.pixels import PixelOptions
from util.data.streams import Stream, import_webdataset, is_stream
from util.data.tables import TABLES, open_parquet, order_classes, read_text, table_of_paths
from util.dist import rank_from_env
from util.files import printable, write_atomic
from util.rng import SUBSET, generator

COMPRESSED = re.compile(r".*\.(tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)


def expand_path(word: str) -> list[str]:
    """The paths that a word with {00..99} or wildcards names, for words in quotes, which the shell leaves unchanged."""
    words = [word]
    if "{" in word and not os.path.exists(word):
        import_webdataset()
        from braceexpand import braceexpand  # a dependency of webdataset

        words = list(braceexpand(word))
    found: list[str] = []
    for name in words:
        wildcards = glob.has_magic(name) and not is_stream(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name, recursive=True)) if wildcards else [name]
        if not matches:
            raise FileNotFoundError(f"no file matches {name}")
        found += matches
    return found


def kind_of_source(path: str) -> str:
    """What a path names. Neighbours of one kind are read together; folders and tables each by itself."""
    name = path.lower()
    if is_stream(path):
        return "stream"
    if is_cache(path) or os.path.isdir(path):
        return f"{'cache' if is_cache(path) else 'folder'} {path}"
    if COMPRESSED.fullmatch(name):
        return "compressed"
    if name.endswith((".tar", ".zip")):
        return "archive"
    if name.endswith(TABLES):
        return f"table {path}"
    if name.endswith(".parquet"):
        return "parquet"
    return "file" if kind_of(os.path.basename(name)) == IMAGE else f"folder {path}"


def files_of_split(paths: Sequence[Path], query: Query) -> tuple[list[Path], Query]:
    """Those of these files whose names contain the wanted split, as train-0001.tar; all files if no name does."""
    words = {path: re.split(r"[-_.]", path.stem) for path in paths}
    split = find_split({word for each in words.values() for word in each}, query) if query.split else None
    if split is None:
        return list(paths), query
    return [path for path in paths if split in words[path]], query._replace(whole=True)


def open_folder(data_path: str, query: Query) -> Source:
    """The images below a folder, or in the archives or parquet files below it."""
    missing = None
    try:
        folder = split_folder(data_path, query)
        query = query._replace(whole=True)
    except FileNotFoundError as error:  # files may be named by their splits instead
        folder, missing = Path(data_path), error
    files = list_files(folder) if folder.is_dir() else {}
    packed = {kind: [Path(os.fsdecode(path)) for path in files.get(kind, [])] for kind in (".tar", ".zip", ".parquet")}
    # by stem: dog.tar before dog-house.tar
    archives = sorted(packed[".tar"] + packed[".zip"], key=lambda path: (path.parent, path.stem))
    names = [os.fsdecode(path) for kind, paths in files.items() if kind != IMAGE for path in paths]
    compressed = sorted(name for name in names if COMPRESSED.fullmatch(name))
    if (others := archives or compressed) and files.get(IMAGE):
        raise ValueError(f"{folder} holds {os.path.basename(others[0])} and image files; move one kind elsewhere")
    if compressed:
        return open_group("compressed", compressed, query)
    if archives or (packed[".parquet"] and not files.get(IMAGE)):
        return open_group("archive" if archives else "parquet", map(str, archives or packed[".parquet"]), query)
    if missing:
        raise missing
    return folder_source(folder, files, query)


def open_group(kind: str, paths: Iterable[str], query: Query) -> Source:
    """The images of neighbouring paths of one kind."""
    kind, paths = kind.split(" ")[0], list(paths)
    if kind in ("stream", "compressed", "cache") and not query.pretraining:
        needed = {"stream": "local images", "compressed": "uncompressed shards (gunzip)", "cache": "images"}[kind]
        raise ValueError(
            f"{paths[0]} is a {kind.replace('compressed', 'compressed tar')}; kNN (--knn_path), classifiers, features and "
            f"caches need {needed}"
        )
    if kind in ("stream", "compressed"):
        return Stream(paths, query.stream_samples, query.seed, query.tar_key)
    if kind == "cache":
        return Cache(paths[0])
    if kind == "folder":
        return open_folder(paths[0], query)
    if kind == "table":
        return table_of_paths(Path(paths[0]), read_text(Path(paths[0]), query), query)
    if kind == "file":
        return Folder([os.fsencode(path) for path in paths], os.path.dirname(paths[0]))
    chosen, query = files_of_split(list(map(Path, paths)), query)
    return Archives(chosen, query) if kind == "archive" else open_parquet(chosen, query)


def open_sources(data_path: Sequence[str], query: Query, flag: str, classes: Sequence[str] | None = None) -> Source:
    """The images of one or several paths, with a printed line for each. Labels refer to `classes` if given."""
    words = [data_path] if isinstance(data_path, str) else data_path  # a run of an earlier version has one
    try:
        paths = [path for word in words for path in expand_path(word)]
        parts = [open_group(kind, group, query) for kind, group in groupby(paths, kind_of_source)]
        if len(parts) > 1 and any(isinstance(part, Stream | Cache) for part in parts):
            raise ValueError(f"{' '.join(paths)}: a cache or a stream cannot be read together with other images")
        total = sum(map(len, parts))
        if query.labelled:
            own = [part.classes for part in parts]
            joined = own[0] if all(x == own[0] for x in own) else order_classes(c for x in own for c in x)
            known = list(classes or joined)
            for part in parts:
                align_classes(part, known)
            if len(classes or np.unique(np.concatenate([part.labels for part in parts]))) < 2:
                raise ValueError(f"{parts[0].place} has one class; kNN and classifiers need at least two")
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(str(error) if str(error).startswith("--") else f"{flag}: {error}") from error
    for part in parts:
        if rank_from_env()[0] == 0:
            share = f"; {len(part) / total:.1%} of all images" if len(parts) > 1 else ""
            print(printable(f"{flag} {part.summary()}{share}"))
            if query.verbose_data and part.classes:
                counts = np.bincount(part.labels, minlength=len(part.classes)).tolist()
                pairs = zip(part.classes, counts, strict=True)
                print(*(f"class {printable(name)}: {n} images" for name, n in pairs), sep="\n")
    return parts[0] if len(parts) == 1 else Concat(parts)


def align_classes(source: Source, classes: Sequence[str]) -> None:
    """Let the labels of a source refer to these classes: by name, or numbers of .cls files to classes with names."""
    if not source.classes:
        raise ValueError(f"{source.place} has no class folders")
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(source.classes) - set(number))
    if (
        unknown
        and all(x.isdecimal() and int(x) < len(classes) for x in source.classes)
        and not any(map(str.isdecimal, classes))
    ):
        number = {str(i): i for i in range(len(classes))}
    elif unknown:
        raise ValueError(f"{source.place} has classes that train lacks: {unknown}")
    source.labels = np.array([number[name] for name in source.classes])[source.labels]
    source.classes = list(classes)


def query_of(args: Namespace | None, **wanted: Any) -> Query:
    """The query of a command line; flags that it lacks have their defaults."""
    given = vars(args) if args else {}
    return Query(**{name: given[name] for name in Query._fields if name in given} | wanted)


def pretrain_source(args: Namespace) -> Source:
    """Unlabelled images of --data_path of any kind."""
    source = open_sources(args.data_path, query_of(args, pretraining=True), "--data_path")
    if args.stream_samples and not isinstance(source, Stream):
        where = f"--data_path {source.name(0)}"
        raise ValueError(f"--stream_samples {args.stream_samples}: omit it, {where} is not a stream")
    if isinstance(source, Cache):
        source.check_flags(args)
    return source


def indexed_source(args: Namespace, split: str | None) -> Source:
    """Unlabelled images of --data_path, read at random: of `train` if there is one, or all of them for None."""
    return open_sources(args.data_path, query_of(args, split=split), "--data_path")


def labelled_source(
    data_path: Sequence[str], split: str | None, classes: Sequence[str] | None = None, args: Namespace | None = None,
    flag: str = "--data_path",
) -> Source:  # fmt: skip
    """Images of a split (None = all) with their classes, `classes` if given; val is --val_path if that is given."""
    val_path = getattr(args, "val_path", None)
    query = query_of(args, split=split, labelled=True, whole=val_path is not None)
    if split == "val" and val_path:
        data_path, flag = val_path, "--val_path"
    return open_sources(data_path, query, flag, classes)


def labelled_sources(data_path: Sequence[str], args=None, flag: str = "--data_path") -> tuple[Source, Source]:
    """(train, val) with the classes of train."""
    train = labelled_source(data_path, "train", None, args, flag)
    return train, labelled_source(data_path, "val", train.classes, args, flag)


class View(Source):
    """Images of other sources that are read at random."""

    def __init__(self, parts: Sequence[Source], labels: np.ndarray):
        self.parts, self.classes, self.labels = list(parts), parts[0].classes, labels

    def find(self, i: int) -> tuple[Source, int]:
        """(source of image i, its index there)."""
        raise NotImplementedError

    def location(self, i: int) -> tuple[str, str]:
        part, inside = self.find(i)
        return part.location(inside)

    def read(self, i: int, options: PixelOptions) -> list[Image.Image] | np.ndarray:
        part, inside = self.find(i)
        return part.read(inside, options)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class Concat(View):
    """The images of several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        super().__init__(parts, np.concatenate([part.labels for part in parts]))
        self.paths = np.concatenate([part.paths for part in parts])
        self.ends = np.cumsum([len(part) for part in parts])

    def find(self, i: int) -> tuple[Source, int]:
        n = int(np.searchsorted(self.ends, i, "right"))
        return self.parts[n], int(i - self.ends[n] + len(self.parts[n]))

    def relative_name(self, i: int) -> str:
        return self.name(i)

    def sizes(self) -> np.ndarray:
        return np.concatenate([part.sizes() for part in self.parts])

    def digest(self) -> str:
        return hashlib.sha256(" ".join(str(part.digest()) for part in self.parts).encode()).hexdigest()


class Subset(View):
    """Images `indices` of a source, with all of its classes."""

    def __init__(self, source: Source, indices: np.ndarray):
        super().__init__([source], source.labels[indices])
        self.indices = indices

    def find(self, i: int) -> tuple[Source, int]:
        return self.parts[0], int(self.indices[i])

    def relative_name(self, i: int) -> str:
        return self.parts[0].relative_name(int(self.indices[i]))

    def digest(self) -> str:
        return hashlib.sha256(f"{self.parts[0].digest()} {self.indices.tolist()}".encode()).hexdigest()


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of this share of each class, at least one image; a smaller share of the same seed is a subset."""
    chosen = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(of_class)))
        chosen.append(generator(seed, SUBSET, label).permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))


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
    index = {source.relative_name(i): i for i in range(len(source))}
    names = [name for name in wanted if name]
    lost = [name for name in names if name not in index]
    if lost or not names:
        what = f"has {len(lost)} names that the training images lack, such as {lost[0]}" if lost else "is empty"
        raise ValueError(f"--train_list {args.train_list} {what}; expected {source.relative_name(0)}, one a line")
    return Subset(source, np.sort(np.array([index[name] for name in names])))


def write_list(folder: Path, source: Source) -> None:
    """Write FOLDER/train_list.txt, which --train_list reads, if the source is a subset."""
    if isinstance(source, Subset):
        names = "".join(f"{source.relative_name(i)}\n" for i in range(len(source)))
        write_atomic(folder / "train_list.txt", names.encode(errors="surrogateescape"))
