"""Image folders, with and without classes, and the interface of every image source."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.decode import EXTENSIONS, has_image_content, read_image
from util.data.pixels import PixelOptions


class Source:
    """Images by index. Facts about each image are kept in arrays, whose memory forked workers share."""

    labels: np.ndarray  # (N,) integers; all 0 without classes
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Name of image i for messages."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Called before the images of this epoch are prefetched and read."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Hint that these images will be read next."""

    def read(self, i: int, options: PixelOptions) -> list[Image.Image] | np.ndarray:
        """Image i as bands, or resized already as pixels (h, w, C) uint8. An unreadable image raises any exception."""
        raise NotImplementedError

    def digest(self) -> str | None:
        """SHA-256 of the names of all images, by which a resumed run checks its data; None if unknown."""
        return None

    def close(self) -> None:
        """Close all open files. Reading opens them again."""


@dataclass(frozen=True)
class Folder(Source):
    """Image files."""

    paths: np.ndarray  # (N,) bytes: names need not be UTF-8
    labels: np.ndarray
    classes: list[str]

    def name(self, i: int) -> str:
        return os.fsdecode(self.paths[i])

    def digest(self) -> str:
        start = len(
            os.path.commonpath([min(self.paths), max(self.paths)])
        )  # relative names: the folder may have been moved
        names = hashlib.sha256()
        for path in self.paths:
            names.update(path[start:] + b"\0")
        return names.hexdigest()

    def read(self, i: int, options: PixelOptions) -> list[Image.Image]:
        return read_image(self.paths[i], options)


def raise_error(error: OSError) -> None:
    """For os.walk, which ignores unreadable folders otherwise."""
    raise error


def list_images(folder: str | Path) -> list[bytes]:
    """Paths of all images below a folder, sorted by name. Links are followed, each folder is read once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(os.fsencode(folder), followlinks=True, onerror=raise_error):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        paths = (os.path.join(parent, name) for name in sorted(files))
        found += [path for path in paths if os.fsdecode(path).lower().endswith(EXTENSIONS) or has_image_content(path)]
    return found


def require_folder(folder: Path, contents: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path: there is no folder {folder}; it must hold {contents}")
    return folder


def image_folder(data_path: str) -> Folder:
    """All images below DIR/train if it exists, else below DIR, without classes."""
    folder = require_folder(Path(data_path), "images or folders of images")
    folder = folder / "train" if (folder / "train").is_dir() else folder
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"--data_path: {folder} holds no image ({' '.join(EXTENSIONS)})")
    return Folder(np.array(paths), np.zeros(len(paths), np.int64), [])


def class_folders(data_path: str, split: str, classes: Sequence[str] | None = None) -> Folder:
    """Images of DIR/split/<class>/ with their classes, sorted by name unless `classes` lists them."""
    folder = require_folder(Path(data_path) / split, "one folder of images per class")
    by_class = {child.name: list_images(child) for child in sorted(folder.iterdir()) if child.is_dir()}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty or not by_class:
        raise ValueError(
            f"--data_path: {folder} has " + (f"classes without an image: {empty}" if empty else "no class folders")
        )
    number = {name: i for i, name in enumerate(classes or by_class)}
    if set(by_class) - set(number):
        raise ValueError(f"--data_path: {folder} has classes that train lacks: {sorted(set(by_class) - set(number))}")
    paths = [path for group in by_class.values() for path in group]
    labels = [number[name] for name, group in by_class.items() for _ in group]
    return Folder(np.array(paths), np.array(labels), list(number))
