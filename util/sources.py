"""Where images come from: folders of files, and what one looks like to a person."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # it warns of half as many as it refuses; here the limit is
MAX_PIXELS = 2**28  # in memory at once; compressed they may be few bytes
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # Pillow runs a program, Ghostscript, for some others
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".npy")


# ------------------------------------------------------------------------------------------------------------- sources


class Source:
    """Images by number. What it keeps of each is in arrays: workers share their memory."""

    labels: np.ndarray  # (N,) integers, all 0 where there are no classes
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What a message calls image i."""
        raise NotImplementedError

    def enter(self, epoch: int) -> None:
        """What is expected and read next belongs to this epoch."""

    def expect(self, indices: Sequence[int]) -> None:
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


def checked_folder(folder: Path, why: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path: there is no folder {folder}; {why}")
    return folder


def unlabelled_folder(data_path: str) -> Folder:
    """All images of DIR/train if there is one, else of DIR, whatever its structure."""
    folder = checked_folder(Path(data_path), "it holds images, nested or flat")
    folder = folder / "train" if (folder / "train").is_dir() else folder
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"--data_path: {folder} holds no image ({' '.join(EXTENSIONS)})")
    return Folder(np.array(paths), np.zeros(len(paths), np.int64), [])


def class_folders(data_path: str, split: str, classes: Sequence[str] | None = None) -> Folder:
    """Images of DIR/split/<class>/, the classes in the order of their names or as given."""
    folder = checked_folder(Path(data_path) / split, "it holds one folder of images for each class")
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


# -------------------------------------------------------------------------------------------------------------- images


def read_image(path: bytes | BytesIO, in_chans: int) -> list[Image.Image]:
    """An image as a person would see it: [RGB] or [grey] upright, alpha over white; bands of a (H, W, C) uint8 .npy."""
    file = path if isinstance(path, BytesIO) else os.fsdecode(path)
    if file.getvalue().startswith(b"\x93NUMPY") if isinstance(file, BytesIO) else file.lower().endswith(".npy"):
        pixels = np.atleast_3d(np.load(file))
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != in_chans:
            raise ValueError(f"holds {pixels.dtype} {pixels.shape}, not uint8 (height, width, {in_chans})")
        return [Image.fromarray(band) for band in pixels.transpose(2, 0, 1)]
    if in_chans not in (1, 3):
        raise ValueError(f"--in_chans {in_chans} is for .npy files")
    image: Image.Image
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
        # In place, and below converted only where it must be: copies would cost a tenth of the decoding.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"has pixels of mode {image.mode} outside 16 bits")
            image = Image.fromarray((pixels // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "L" if in_chans == 1 else "RGB"
        return [image if image.mode == mode else image.convert(mode)]
