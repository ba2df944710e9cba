"""Images with segmentation masks: folders, decoding of masks, crops of both.

A mask is the last band of its image: 0 = ignored, k + 1 = class k, so that pixels padded with zeros are ignored.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.crop import check_pixels
from util.data.decode import read_image
from util.data.folders import Folder, Query, find_split, list_images
from util.data.pixels import PixelOptions
from util.data.tables import read_text

MAX_CLASSES = 255  # a band has 8 bits
ADE20K = {"train": "training", "val": "validation"}
SCALES = (0.5, 2.0)  # of training crops


def read_mask(path: str, palette: Sequence[int] | None) -> np.ndarray:
    """(h, w) int32: the class numbers in a mask file, or the position of each colour in the palette of 0xRRGGBB."""
    with Image.open(path) as mask:
        if palette is None:
            if mask.mode not in ("1", "L", "P", "I", "I;16"):
                raise ValueError(f"its mask {path} holds colours ({mask.mode}), not class numbers; use --palette")
            return np.asarray(mask).astype(np.int32)
        colours = np.asarray(mask.convert("RGB")).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    order = np.argsort(palette)
    found = order[np.searchsorted(palette, colours, sorter=order).clip(max=len(palette) - 1)].astype(np.int32)
    if (wrong := np.asarray(palette)[found] != colours).any():
        raise ValueError(f"its mask {path} has the colour {colours[wrong][0]:06x}, which --palette lacks")
    return found


class MaskFolder(Folder):
    """Image files with a mask each.

    ignore_index: number in the masks that is ignored; first: that of class 0, numbers below it are ignored.
    """

    def __init__(self, paths: list, masks: list, classes: list, palette: Any, ignore_index: int, first: int):
        super().__init__(paths, os.path.dirname(os.fsdecode(paths[0])))
        self.masks, self.classes, self.palette = masks, classes, palette
        self.ignore_index, self.first = ignore_index, first

    def read(self, i: int, options: PixelOptions) -> list[Image.Image]:
        """The bands of image i and its mask as class + 1. ValueError for unknown classes and for another size."""
        bands, path = read_image(self.paths[i], options), self.masks[i]
        numbers, (width, height) = read_mask(path, self.palette), bands[0].size
        if numbers.shape != (height, width):
            found = " x ".join(map(str, numbers.shape[::-1]))
            raise ValueError(f"its mask {path} has {found} pixels, not {width} x {height}")
        mask = np.where(numbers == self.ignore_index, 0, numbers - self.first + 1)
        if mask.max() > len(self.classes):
            raise ValueError(
                f"its mask {path} has class {mask.max() - 1 + self.first}, but there are {len(self.classes)} classes "
                f"(--classes; --ignore_index {self.ignore_index} is ignored)"
            )
        return [*bands, Image.fromarray(mask.clip(min=0).astype(np.uint8))]


def count_classes(masks: list[str], palette: Sequence[int] | None, ignore_index: int) -> int:
    """Largest class number in these masks, plus one."""

    def largest(path: str) -> int:
        numbers = read_mask(path, palette)
        return int(numbers.max(initial=-1, where=numbers != ignore_index))

    with ThreadPoolExecutor() as pool:
        return max(pool.map(largest, masks)) + 1


def folder_pairs(root: Path, split: str, ade: bool) -> tuple[list[bytes], list[str]]:
    """(Images, masks) of DIR/split, or of ADE20K's published folder."""
    places = ("images", "annotations" if ade else "masks")
    images, masks = (root / kind / ADE20K[split] if ade else root / split / kind for kind in places)
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"--data_path: there is no folder {folder}; images and masks have the same names")
    paths = list_images(images)
    return paths, [str(masks / Path(os.path.relpath(os.fsdecode(x), images)).with_suffix(".png")) for x in paths]


def table_pairs(path: Path, split: str, args: Namespace) -> tuple[list[bytes], list[str]]:
    """(Images, masks) of a split in a .csv or .tsv, which holds their paths relative to its folder."""
    columns = {"image_column": args.image_column, "split_column": args.split_column, "label_column": args.mask_column}
    query = Query(split, labelled=True, **columns)
    rows = read_text(path, query)
    name = find_split(set(rows.get("split", ())), query)
    if name is None:
        raise ValueError(f"--data_path {path} has no rows of the split {split} (--split_column)")
    pairs = [row[:2] for row in zip(*(rows[key] for key in ("image", "label", "split")), strict=True) if row[2] == name]
    images, masks = ([os.path.join(path.parent, x) for x in side] for side in zip(*pairs, strict=True))
    return [os.fsencode(image) for image in images], masks


def mask_folder(args: Namespace, split: str, classes: Sequence[str] | None = None) -> MaskFolder:
    """Images and masks of a split of a folder or table, with these classes.

    None = --classes, ADE20K's, the palette's or as many as the masks have. Reads the data flags of main_segment.py.
    """
    if len(args.data_path) > 1:
        raise ValueError(f"--data_path {' '.join(args.data_path)}: segmentation reads one folder or table")
    root = Path(args.data_path[0])
    ade = (root / "annotations").is_dir()
    is_table = root.suffix.lower() in (".csv", ".tsv") and not root.is_dir()
    paths, masks = table_pairs(root, split, args) if is_table else folder_pairs(root, split, ade)
    if not paths:
        raise ValueError(f"--data_path: {root} holds no image for {split}")
    if lost := [path for path in masks if not Path(path).is_file()]:
        raise ValueError(f"--data_path: {len(lost)} of {len(paths)} images of {root} have no mask, such as {lost[0]}")
    palette = args.palette and [int(colour, 16) for colour in args.palette]
    classes = classes or args.classes
    if classes is None and ade:
        table = root / "objectInfo150.txt"  # tab-separated, a head line, the name in the last column
        lines = table.read_text().splitlines()[1:] if table.is_file() else map(str, range(1, 151))
        classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    classes = [*map(str, classes or range(count_classes(masks, palette, args.ignore_index)))]
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"--data_path: {root} has {len(classes)} classes; expected 2 to {MAX_CLASSES} (--classes)")
    return MaskFolder(paths, masks, classes, palette, args.ignore_index, int(ade))


def fit_size(height: int, width: int, args: Namespace) -> tuple[int, int]:
    """(H, W) to which an image is resized: short side --short_side (0 = unchanged), at least --input_size in both directions.

    ValueError if a very long image would be enlarged to more pixels than `resize_to_cover` allows.
    """
    input_height, input_width = args.input_size
    side = min(args.input_size) if args.short_side is None else args.short_side
    cover = max(input_height / height, input_width / width)
    scale = max(side / min(height, width) if side else 1.0, cover)
    h, w = max(round(height * scale), input_height), max(round(width * scale), input_width)
    if scale == cover > 1:
        check_pixels((width, height), (w, h), args.input_size)
    return h, w


def multi_scale_crop(
    bands: Sequence[Image.Image], rng: np.random.Generator, out=None, *, args: Namespace
) -> np.ndarray:
    """Bands -> (H, W, C + 1) uint8: a window at a random place and of a random scale, 1/2 to 2 times `fit_size`.

    A window that is larger than the image is filled with zeros. Images are resized bilinearly, masks to the nearest.
    """
    (width, height), (scale, *place) = bands[0].size, rng.random(3)
    zoom = fit_size(height, width, args)[0] / height * SCALES[0] * (SCALES[1] / SCALES[0]) ** scale
    h, w = (max(1, round(side / zoom)) for side in args.input_size)
    top, left = (round(draw * (n - side)) for draw, n, side in zip(place, (height, width), (h, w), strict=True))
    filters = [Image.Resampling.BILINEAR] * (len(bands) - 1) + [Image.Resampling.NEAREST]
    box, size = (left, top, left + w, top + h), args.input_size[::-1]
    return stack_bands([band.crop(box).resize(size, kind) for band, kind in zip(bands, filters, strict=True)], out)


def whole_image(bands: Sequence[Image.Image], rng: Any, out=None, *, args: Namespace) -> np.ndarray:
    """Bands -> (h, w, C + 1) uint8, unchanged: the transform of evaluation. ValueError as `fit_size`."""
    fit_size(bands[0].height, bands[0].width, args)
    return stack_bands(bands, out)


def stack_bands(bands: Sequence[Image.Image], out: np.ndarray | None = None) -> np.ndarray:
    """Bands -> (h, w, C + 1) uint8."""
    return np.concatenate([np.atleast_3d(np.asarray(band)) for band in bands], axis=2, out=out)


def split_masks(batch: dict) -> tuple[dict, Tensor]:
    """(batch without the band of the masks, classes (B, H, W) int64, -1 = ignored), flipped where `Normalize` flips images."""
    images, masks = batch["images"][..., :-1], batch["images"][..., -1].long() - 1
    if "flip" in batch:
        masks = torch.where(batch["flip"].view(-1, 1, 1), masks.flip(2), masks)
    return batch | {"images": images}, masks
