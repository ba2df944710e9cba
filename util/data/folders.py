"""Image folders, with and without classes."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.decode import EXTENSIONS, read_image


class Source:
    """Images by number. What it keeps of each is in arrays: workers share their memory."""

    labels: np.ndarray  # (N,) integers, all 0 where there are no classes
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What a message calls image i."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """What is expected and read next belongs to this epoch."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """A hint that these images are read next."""

    def read(self, i: int, in_chans: int) -> list[Image.Image] | np.ndarray:
        """Image i: bands for a crop, or, resized already, pixels (h, w, C) uint8. A broken one raises anything."""
        raise NotImplementedError

    def digest(self) -> str | None:
        """Of the names of the images, so that a run does not go on with others; None where that is not known."""
        return None

    def close(self) -> None:
        """Let go of the files that are open; reading opens them again."""


@dataclass(frozen=True)
class Folder(Source):
    paths: np.ndarray  # (N,) bytes, as the file system spells them
    labels: np.ndarray
    classes: list[str]

    def name(self, i: int) -> str:
        return os.fsdecode(self.paths[i])

    def digest(self) -> str:
        start = len(os.path.commonpath([min(self.paths), max(self.paths)]))  # the folder may move
        names = hashlib.sha256()
        for path in self.paths:
            names.update(path[start:] + b"\0")
        return names.hexdigest()

    def read(self, i: int, in_chans: int) -> list[Image.Image]:
        return read_image(self.paths[i], in_chans)


def refuse(error: OSError) -> None:
    """A folder that cannot be read is an error, not an empty folder."""
    raise error


def list_images(folder: str | Path) -> list[bytes]:
    """Paths of all images below a folder, in the order of their names; links are followed once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(os.fsencode(folder), followlinks=True, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        found += [
            os.path.join(parent, name) for name in sorted(files) if os.fsdecode(name).lower().endswith(EXTENSIONS)
        ]
    return found


def require_folder(folder: Path, why: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path: there is no folder {folder}; {why}")
    return folder


def image_folder(data_path: str) -> Folder:
    """All images of DIR/train if there is one, else of DIR, whatever its structure."""
    folder = require_folder(Path(data_path), "it holds images, nested or flat")
    folder = folder / "train" if (folder / "train").is_dir() else folder
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"--data_path: {folder} holds no image ({' '.join(EXTENSIONS)})")
    return Folder(np.array(paths), np.zeros(len(paths), np.int64), [])


def class_folders(data_path: str, split: str, classes: Sequence[str] | None = None) -> Folder:
    """Images of DIR/split/<class>/, the classes in the order of their names or as given."""
    folder = require_folder(Path(data_path) / split, "it holds one folder of images for each class")
    by_class = {child.name: list_images(child) for child in sorted(folder.iterdir()) if child.is_dir()}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty or not by_class:
        raise ValueError(
            f"--data_path: {folder} has " + (f"classes without an image: {empty}" if empty else "no class folders")
        )
    number = {name: i for i, name in enumerate(classes or by_class)}
    if set(by_class) - set(number):
        raise ValueError(f"--data_path: {folder} has classes that train has not: {sorted(set(by_class) - set(number))}")
    paths = [path for group in by_class.values() for path in group]
    labels = [number[name] for name, group in by_class.items() for _ in group]
    return Folder(np.array(paths), np.array(labels), list(number))
