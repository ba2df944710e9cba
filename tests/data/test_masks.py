"""Folders of images and masks: layouts, decoding, errors, crops."""

import re
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODEL, call
from PIL import Image

from util.data.masks import fit_size, mask_folder, multi_scale_crop, split_masks, whole_image
from util.data.pixels import PixelOptions
from util.data.samples import Samples

COLUMNS = {"image_column": None, "mask_column": "mask", "split_column": None}
FLAGS = COLUMNS | {"classes": None, "palette": None, "ignore_index": 255, "short_side": None, "input_size": (16, 16)}


def flags(folder, **other) -> Namespace:
    return Namespace(**FLAGS | {"data_path": [str(folder)], "seed": 0, "in_chans": 3, "timeout_minutes": 1} | other)


def write_pair(folder, image: np.ndarray, mask: np.ndarray, name: str = "a", split: str = "train") -> None:
    for kind, pixels in (("images", image), ("masks", mask)):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / split / kind / f"{name}.png")


def band_of(source, i: int = 0) -> np.ndarray:
    return np.asarray(source.read(i, PixelOptions(3))[-1])


NUMBERS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
PALETTE = ["000000", "ff0000", "00ff80"]


def test_masks_of_numbers_palettes_and_colours_have_the_same_classes(tmp_path):
    image, expected = np.zeros((2, 3, 3), np.uint8), [[1, 2, 3], [3, 0, 1]]
    write_pair(tmp_path / "numbers", image, NUMBERS)
    write_pair(tmp_path / "bits16", image, NUMBERS.astype(np.uint16))
    write_pair(tmp_path / "indexed", image, NUMBERS)
    indexed = Image.fromarray(NUMBERS, "L").convert("P")
    indexed.putpalette([value for n in range(256) for value in (n, 255 - n, 7)])
    indexed.save(tmp_path / "indexed" / "train" / "masks" / "a.png")
    for name in ("numbers", "bits16", "indexed"):
        source = mask_folder(flags(tmp_path / name), "train")
        assert (source.classes, band_of(source).tolist()) == (["0", "1", "2"], expected)
    table = np.zeros((256, 3), np.uint8)
    table[[1, 2, 255]] = (255, 0, 0), (0, 255, 128), (255, 255, 255)
    write_pair(tmp_path / "colours", image, table[NUMBERS])
    source = mask_folder(flags(tmp_path / "colours", palette=[*PALETTE, "ffffff"], ignore_index=3), "train")
    assert (source.classes, band_of(source).tolist()) == (["0", "1", "2"], expected)


def test_ade20k_is_read_as_published(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / split / "ADE_1.jpg")
        Image.fromarray(np.array([[0, 1, 2], [150, 255, 0]], np.uint8)).save(
            tmp_path / "annotations" / split / "ADE_1.png"
        )
    source = mask_folder(flags(tmp_path), "val")
    assert len(source.classes) == 150
    assert band_of(source).tolist() == [[0, 1, 2], [150, 0, 0]]  # shifted by one: 0 is ignored, as is 255
    rows = "".join(f"{i}\t0.1\t1\t1\t0\tname {i}, other\n" for i in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tStuff\tName\n{rows}")
    assert mask_folder(flags(tmp_path), "train").classes[::149] == ["name 1", "name 150"]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_one_and_of_other_channels_are_read(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, channels), np.uint8)
    write_pair(tmp_path, pixels[..., 0], np.eye(9, 7, dtype=np.uint8))
    if channels > 1:
        np.save(tmp_path / "train" / "images" / "a.npy", pixels)
        (tmp_path / "train" / "images" / "a.png").unlink()
    samples = Samples(
        mask_folder(flags(tmp_path), "train"),
        partial(multi_scale_crop, args=flags(tmp_path)),
        flags(tmp_path, in_chans=channels),
    )
    assert samples.__getitems__([(0, 0)])["images"].shape == (1, 16, 16, channels + 1)


def damage_class(masks):
    Image.new("L", (28, 26), 7).save(masks / "2.png")


def damage_size(masks):
    Image.new("L", (5, 4)).save(masks / "2.png")


def damage_colour(masks):
    Image.new("RGB", (28, 26), "red").save(masks / "2.png")


def damage_file(masks):
    (masks / "2.png").write_bytes(b"no png")


@pytest.mark.parametrize(
    ("damage", "words", "line"),
    [
        (damage_class, [], r"2\.png .*class 7.* 2 .*--classes; --ignore_index 255"),
        (damage_size, [], r"2\.png .*5 x 4 .*28 x 26"),
        (damage_colour, [], r"2\.png .*RGB.*--palette"),
        (damage_colour, ["--palette", "000000", "00ff00"], r"2\.png .*ff0000.*--palette"),
        (damage_file, [], r"2\.png"),
        (lambda masks: (masks / "2.png").unlink(), [], r"1 of 3 .*no mask.*2\.png"),
        (shutil.rmtree, [], r"no folder .*masks"),
    ],
    ids=["class too many", "other size", "colours", "unknown colour", "damaged", "missing mask", "no masks"],
)
def test_damaged_masks_give_a_one_line_error_with_the_file_name(damage, words, line, masked, tmp_path):
    shutil.copytree(masked, tmp_path / "in")
    masks = tmp_path / "in" / "val" / "masks"
    for path in (tmp_path / "in").glob("*/masks/*.png") if words else ():
        with Image.open(path) as mask:
            black = Image.new("RGB", mask.size)
        black.save(path)
    damage(masks)
    command = ["main_segment", "--checkpoint", "none", *MODEL, *DEVICE, "--method", "knn", "--k", 1, *words]
    with pytest.raises(FileNotFoundError if damage is shutil.rmtree else ValueError, match=line) as caught:
        call(*command, "--classes", "a", "b", "--data_path", tmp_path / "in")
    assert "\n" not in str(caught.value)


def test_one_class_and_too_many_classes_are_refused(tmp_path):
    write_pair(tmp_path, np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"\b1 classes.*2 to 255 .*--classes"):
        mask_folder(flags(tmp_path), "train")
    write_pair(tmp_path, np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 900, np.uint16))
    with pytest.raises(ValueError, match=r"has 901 classes"):
        mask_folder(flags(tmp_path), "train")


@pytest.mark.parametrize(
    ("size", "side", "fitted"),
    [
        ((32, 64), None, (16, 32)),
        ((32, 64), 0, (32, 64)),
        ((8, 64), 0, (16, 128)),
        ((32, 48), 24, (24, 36)),
        ((9, 5), 4, (29, 16)),
    ],
)
def test_images_are_resized_to_the_short_side_and_cover_the_input(size, side, fitted):
    assert fit_size(*size, flags(".", short_side=side)) == fitted


def test_a_very_long_image_is_refused_by_name_before_it_is_enlarged(tmp_path):
    write_pair(tmp_path, np.zeros((2, 20000), np.uint8), np.zeros((2, 20000), np.uint8))
    args = flags(tmp_path, input_size=(512, 512), classes=["a", "b"])
    samples = Samples(mask_folder(args, "train"), partial(whole_image, args=args), flags(tmp_path, in_chans=3))
    reason = samples.__getitems__([(0, 0)])["stop"]
    assert re.search(r"a\.png .*20000 x 2 .*5120000 x 512", reason)
    args.short_side, args.input_size = 0, (2, 2)
    assert fit_size(5000, 5000, args) == (5000, 5000)  # as the image is: not enlarged
    args.short_side = 4500
    assert fit_size(3000, 4000, args) == (4500, 6000)  # as requested


def test_crops_without_scaling_equal_slices_of_the_padded_image(monkeypatch):
    monkeypatch.setattr("util.data.masks.SCALES", (1.0, 1.0))
    rng = np.random.default_rng(0)
    pixels, mask = rng.integers(1, 256, (40, 20, 3), np.uint8), rng.integers(1, 5, (40, 20), np.uint8)
    bands, places = [Image.fromarray(pixels), Image.fromarray(mask)], set()
    for seed in range(5):
        crop = multi_scale_crop(bands, np.random.default_rng(seed), args=flags(".", short_side=0))
        _, y, x = np.random.default_rng(seed).random(3)
        y, x = round(y * (40 - 16)), round(x * (20 - 16))
        assert np.array_equal(crop, np.dstack([pixels, mask])[y : y + 16, x : x + 16])
        places.add((y, x))
    assert len(places) > 1


def test_image_and_mask_stay_aligned_at_every_scale_and_padding_is_ignored():
    mask = np.kron(np.arange(1, 5).reshape(2, 2), np.ones((16, 16))).astype(np.uint8)
    bands, padded = [Image.fromarray(mask * 50), Image.fromarray(mask)], 0
    for seed in range(20):
        crop = multi_scale_crop(bands, np.random.default_rng(seed), args=flags(".")).astype(int)
        around = np.stack([np.roll(crop[..., 1], (dy, dx), (0, 1)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)])
        inside = (around.min(0) == around.max(0))[2:-2, 2:-2]  # away from edges, where bilinear and nearest differ
        assert inside.any()
        assert (np.abs(crop[..., 0] - 50 * crop[..., 1])[2:-2, 2:-2][inside] <= 1).all()
        padded += (crop[..., 1] == 0).mean() > 0.1
    assert padded > 3  # scales below 1 show less than a window


def test_crops_and_flips_are_a_function_of_seed_epoch_and_sample(masked):
    def sample(seed: int, epoch: int) -> dict:
        args = flags(masked, seed=seed)
        samples = Samples(mask_folder(args, "train"), partial(multi_scale_crop, args=args), args, flip=True)
        return samples.__getitems__([(epoch, 1), (epoch, 0)])

    first, again = sample(0, 0), sample(0, 0)
    assert torch.equal(first["images"], again["images"])
    assert torch.equal(first["flip"], again["flip"])
    assert not torch.equal(first["images"], sample(0, 1)["images"])
    assert not torch.equal(first["images"], sample(1, 0)["images"])


def test_masks_are_flipped_with_their_images():
    bands = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(2, -1, -1, -1)
    batch, classes = split_masks({"images": bands, "flip": torch.tensor([False, True])})
    assert batch["images"].shape == (2, 1, 3, 3)
    assert classes.tolist() == [[[2, 6, 10]], [[10, 6, 2]]]


def test_a_table_names_images_masks_and_splits(tmp_path):
    image = np.zeros((2, 3, 3), np.uint8)
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        write_pair(tmp_path / "in", image, NUMBERS, name, split)
    rows = [
        f"in/{s}/images/{n}.png,{s},in/{s}/masks/{n}.png" for s, n in (("val", "c"), ("train", "b"), ("train", "a"))
    ]
    (tmp_path / "x.csv").write_text("path,split,mask\n" + "\n".join(rows))
    source = mask_folder(flags(tmp_path / "x.csv"), "train")
    assert [source.name(i)[-5:] for i in range(len(source))] == ["b.png", "a.png"]  # the order of the table
    assert band_of(source).tolist() == [[1, 2, 3], [3, 0, 1]]
    assert len(mask_folder(flags(tmp_path / "x.csv"), "val", source.classes)) == 1
    with pytest.raises(ValueError, match=r"x\.csv .*column maske; .*path split mask"):
        mask_folder(flags(tmp_path / "x.csv", mask_column="maske"), "train")
    (tmp_path / "x.csv").write_text("path,mask\n" + "in/train/images/a.png,in/train/masks/a.png")
    with pytest.raises(ValueError, match=r"x\.csv .*train \(--split_column\)"):
        mask_folder(flags(tmp_path / "x.csv"), "train")
