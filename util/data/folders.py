"""Image folders: images and what is left out by name, splits, classes; the interface of every image source."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.data.decode import EXTENSIONS, FORMATS, has_image_content, read_image
from util.data.pixels import PixelOptions
from util.data.timeouts import DiskTimeout, time_limit
from util.files import printable

IMAGE, HIDDEN = "image", "hidden or system"  # kinds of files beside their extensions
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
LeftOut = dict[str, tuple[int, str]]  # kind -> (number of files, an example)


class Query(NamedTuple):
    """Which images are wanted, and the flags that say how to find them."""

    split: str | None = "train"  # a key of SPLITS; None = all images
    whole: bool = True  # data that has no such split belongs to it as a whole
    labelled: bool = False
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    tar_key: str | None = None
    verbose_data: bool = False
    on_bad_image: str = "stop"
    pretraining: bool = False  # caches, and shards that can be read from start to end only, may be used
    stream_samples: int | None = None
    seed: int = 0


class Source:
    """Images by index. Facts about each image are kept in arrays, whose memory forked workers share."""

    labels: np.ndarray  # (N,) integers; all 0 without classes
    classes: list[str]
    paths: np.ndarray  # (N,) bytes, need not be UTF-8: paths of the images, within archives for those in them; or (0,)
    place: str  # the file or folder that was read, for messages
    root: str  # the folder to which `relative_name` refers
    left_out: LeftOut

    def __len__(self) -> int:
        return len(self.labels)

    def location(self, i: int) -> tuple[str, str]:
        """(file of image i, its place in that file, for messages)."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Name of image i for messages."""
        return "".join(self.location(i))

    def relative_name(self, i: int) -> str:
        """Name of image i in lists: CLASS/IMAGE in class folders."""
        file, member = self.location(i)
        return os.path.relpath(file, self.root) + member

    def start_epoch(self, epoch: int) -> None:
        """Called before the images of this epoch are prefetched and read."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Hint that these images will be read next."""

    def content(self, i: int) -> bytes | BytesIO:
        """Path or content of the file of image i."""
        raise NotImplementedError

    def read(self, i: int, options: PixelOptions) -> list[Image.Image] | np.ndarray:
        """Image i as bands, or resized already as pixels (h, w, C) uint8. An unreadable image raises any exception."""
        return read_image(self.content(i), options)

    def sizes(self) -> np.ndarray:
        """(N,) size of each image in bytes, by which a cache notices other images of the same name."""
        raise NotImplementedError

    def digest(self) -> str | None:
        """SHA-256 of the names of all images, by which a resumed run checks its data; None if unknown."""
        return digest_names(self.paths.tolist())

    def close(self) -> None:
        """Close all open files. Reading opens them again."""

    def pixel_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of at most 16 images at even steps, without those that Pillow cannot identify."""
        found: list[tuple[int, int]] = []
        with suppress(DiskTimeout), time_limit(5):  # a pipe or a dead disk does not answer
            for i in np.linspace(0, len(self) - 1, min(16, len(self))).astype(int).tolist():
                try:
                    with Image.open(self.content(i), formats=FORMATS) as image:
                        found.append(image.size)
                except DiskTimeout:
                    raise
                except Exception:  # decoders raise everything from OSError to struct.error
                    continue
        return found

    def summary(self) -> str:
        """One line: images, classes, extensions, sizes of some images, what was left out."""
        kinds = Counter(os.path.splitext(name)[1].lower() for name in self.paths.tolist())
        parts = [f"{self.place}: {len(self)} images"] + ([f"{len(self.classes)} classes"] if self.classes else [])
        parts += [" ".join(f"{os.fsdecode(kind)} {count}" for kind, count in kinds.most_common(8))] if kinds else []
        if sizes := self.pixel_sizes():
            least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
            parts.append(f"{least[0]} x {least[1]} to {most[0]} x {most[1]} pixels ({len(sizes)} read)")
        return ", ".join(parts) + (f"; left out: {describe_left_out(self.left_out)}" if self.left_out else "")


class Folder(Source):
    """Image files."""

    def __init__(self, paths: Sequence[bytes] | np.ndarray, root: str | Path = "", left_out: LeftOut | None = None):
        self.paths, self.place, self.root, self.left_out = np.array(paths), str(root), str(root), left_out or {}
        self.labels, self.classes = np.zeros(len(paths), np.int64), []

    def location(self, i: int) -> tuple[str, str]:
        return os.fsdecode(self.paths[i]), ""

    def content(self, i: int) -> bytes:
        return self.paths[i]

    def sizes(self) -> np.ndarray:
        return np.array([os.stat(path).st_size for path in self.paths])


def digest_names(names: Sequence[bytes]) -> str:
    """SHA-256 of names relative to their common folder, which may have been moved."""
    start = len(os.path.commonpath([min(names), max(names)]))
    digest = hashlib.sha256()
    for name in names:
        digest.update(name[start:] + b"\0")
    return digest.hexdigest()


def describe_left_out(left_out: LeftOut) -> str:
    """`3 .txt (notes.txt), 1 hidden or system (.DS_Store)`, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: -item[1][0])
    return ", ".join(f"{count} {kind} ({os.path.basename(example)})" for kind, (count, example) in ordered[:8])


def kind_of(path: str) -> str:
    """IMAGE, HIDDEN or the extension of a file, by the names of a relative path."""
    path = path.lower()
    for part in path.split("/"):
        if (part.startswith(".") and part.strip(".")) or part in SYSTEM_NAMES:
            return HIDDEN
    return IMAGE if path.endswith(EXTENSIONS) else os.path.splitext(path)[1] or "no extension"


def find_split(names: Iterable[str], query: Query) -> str | None:
    """The name, in any case, of the wanted split; the first in the order of SPLITS, None if there is none."""
    by_name = {name.casefold(): name for name in sorted(names)}
    return next((by_name[name] for name in SPLITS[query.split or ""] if name in by_name), None)


def raise_error(error: OSError) -> None:
    """For os.walk, which ignores unreadable folders otherwise."""
    raise error


def list_files(folder: str | Path) -> dict[str, list[bytes]]:
    """{kind: paths below a folder}, sorted by folder and name. Links are followed, each folder is read once."""
    found, seen = defaultdict(list), set()
    for parent, folders, files in os.walk(os.fsencode(folder), followlinks=True, onerror=raise_error):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in folders if kind_of(os.fsdecode(name)) == HIDDEN]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(files + hidden):
            path, kind = os.path.join(parent, name), kind_of(os.fsdecode(name))
            found[IMAGE if kind not in (IMAGE, HIDDEN) and has_image_content(path) else kind].append(path)
    return found


def list_images(folder: str | Path) -> list[bytes]:
    """Paths of all images below a folder."""
    return list_files(folder)[IMAGE]


def split_folder(data_path: str, query: Query) -> Path:
    """The folder of the wanted split in a folder, or the folder itself."""
    folder = Path(data_path)
    if query.split and folder.is_dir():
        name = find_split((child.name for child in folder.iterdir() if child.is_dir()), query)
        folder = folder / name if name else folder if query.whole else folder / query.split
    elif not query.whole and query.split:
        folder = folder / query.split
    if not folder.is_dir():
        needed = "one folder of images per class" if query.labelled else "images or folders of images"
        remedy = "; --val_path names other validation images" if query.split == "val" and not query.whole else ""
        raise FileNotFoundError(f"there is no folder {folder}; it must hold {needed}{remedy}")
    return folder


def label_by_folder(names: Sequence[bytes]) -> tuple[np.ndarray, list[str]]:
    """(labels, classes): the class of an image is the first folder of its relative path; -1 if it lies in none."""
    tops = [name.split(b"/", 1)[0] if b"/" in name else b"" for name in names]
    classes = sorted({*tops} - {b""})
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(top, -1) for top in tops], np.int64), [os.fsdecode(name) for name in classes]


def folder_source(folder: Path, files: dict[str, list[bytes]], query: Query) -> Folder:
    """The images among the files that `list_files` found in a folder, with the classes of its folders if wanted."""
    paths = files.get(IMAGE, [])
    others = {kind: names for kind, names in files.items() if kind != IMAGE and names}
    left_out = {kind: (len(names), os.fsdecode(names[0])) for kind, names in others.items()}
    if query.verbose_data:
        for kind, names in others.items():
            print("".join(f"left out ({kind}): {printable(os.fsdecode(name))}\n" for name in names), end="")
    count = sum(len(names) for kind, names in others.items() if kind != HIDDEN)
    if not paths or count > len(paths):
        what = f"holds no image ({' '.join(EXTENSIONS)})" if not paths else (
            f"has {len(paths)} images ({' '.join(EXTENSIONS)}), but most files would be left out"
        )  # fmt: skip
        found = f": {describe_left_out(left_out)}; list the images in a file, --data_path list.txt" if others else ""
        raise ValueError(f"{folder} {what}{found}")
    if not query.labelled:
        return Folder(paths, folder, left_out)
    start = len(os.path.join(os.fsencode(folder), b""))
    labels, classes = label_by_folder([path[start:] for path in paths])
    children = {child.name for child in folder.iterdir() if child.is_dir() and kind_of(child.name) != HIDDEN}
    if not classes or (empty := sorted(children - set(classes))):
        raise ValueError(f"{folder} has " + (f"classes without an image: {empty}" if classes else "no class folders"))
    if loose := np.flatnonzero(labels < 0).tolist():
        left_out["beside the class folders"] = len(loose), os.fsdecode(paths[loose[0]])
    source = Folder(np.array(paths)[labels >= 0], folder, left_out)
    source.labels, source.classes = labels[labels >= 0], classes
    return source


def image_folder(data_path: str) -> Folder:
    """All images below DIR/train if it exists, else below DIR, without classes."""
    folder = split_folder(data_path, Query())
    return folder_source(folder, list_files(folder), Query())
