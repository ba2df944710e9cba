"""Folders, decoding, order of the samples, loaders, unreadable images and transforms."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, PRETRAIN, ROOT, call, class_folders, one_rank, pretrain, records, smooth
from PIL import Image
from torchvision import transforms as T

from util.args import IMAGENET_MEAN, IMAGENET_STD
from util.data.batches import DevicePrefetcher, eval_loader, report_small_memory, train_loader
from util.data.decode import read_image
from util.data.folders import image_folder, list_images
from util.data.pixels import PixelOptions
from util.data.samplers import EvalSampler
from util.data.samples import Samples
from util.data.sources import labelled_source, labelled_sources
from util.data.timeouts import DiskTimeout, time_limit
from util.data.transforms import Normalize, eval_transform, pretrain_transform
from util.dist import World

RGB = Namespace(in_chans=3, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, timeout_minutes=1)
SKIP = Namespace(**vars(RGB), on_bad_image="skip")


def names(paths, folder: Path) -> list[str]:
    return [os.fsdecode(os.path.relpath(path, os.fsencode(folder))) for path in paths]


def save(folder: Path, *files: str) -> Path:
    """Write small images of these names."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), "red").save(folder / name)
    return folder


def bands_of(path: Path, in_chans: int = 3, **options) -> np.ndarray:
    return np.dstack([np.asarray(band) for band in read_image(os.fsencode(path), PixelOptions(in_chans, **options))])


# ------------------------------------------------------------------------------------------------------------- sources


def test_classes_are_sorted_by_the_names_of_their_folders(photos):
    train, val = labelled_sources(str(photos))
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert np.bincount(train.labels).tolist() == [6, 5, 5]
    assert np.bincount(val.labels).tolist() == [4, 3, 2]
    for path, label in zip(train.paths, train.labels, strict=True):
        assert Path(os.fsdecode(path)).parent.name == train.classes[label]


def test_a_class_that_val_lacks_keeps_the_labels_of_train(tmp_path):
    save(tmp_path, "train/a/0.png", "train/b/0.png", "train/c/0.png", "val/c/0.png")
    assert labelled_sources(str(tmp_path))[1].labels.tolist() == [2]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["b.png", "a.JPEG", "c.tif"], ["a.JPEG", "b.png", "c.tif"]),
        (["y/1/2/b.webp", "x/a.bmp", "top.png"], ["top.png", "x/a.bmp", "y/1/2/b.webp"]),
        (["train/n01/a.png", "train/n02/b.png", "val/n01/c.png"], ["train/n01/a.png", "train/n02/b.png"]),
    ],
    ids=["flat", "nested", "train and val"],
)
def test_finds_images_in_a_folder_of_any_structure(files, found, tmp_path):
    save(tmp_path, *files)
    (tmp_path / "notes.txt").write_text("no image")
    source = image_folder(str(tmp_path))
    assert names(source.paths, tmp_path) == found
    assert source.labels.tolist() == [0] * len(found)
    assert source.classes == []


def test_loops_of_links_are_detected_and_each_folder_is_read_once(tmp_path):
    save(tmp_path, "a/0.png", "b/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert sorted(Path(name).name for name in names(list_images(tmp_path), tmp_path)) == ["0.png", "1.png"]


def test_any_file_name_is_read(tmp_path):
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in (b" space .png", b"caf\xe9.png", b"two\nlines.png")]
    for path in paths:
        os.rename(save(tmp_path, "0.png") / "0.png", path)
    source = image_folder(str(tmp_path))
    assert source.paths.tolist() == paths
    assert all(read_image(path, PixelOptions(3))[0].size == (12, 10) for path in source.paths)


def test_errors_name_a_missing_folder_and_one_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder /.*/nowhere;"):
        image_folder(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"{tmp_path} .*no image .*\.jpg"):
        image_folder(str(tmp_path))


def test_errors_name_missing_empty_and_unknown_classes(tmp_path):
    save(tmp_path, "train/a/0.png", "train/b/0.png")
    with pytest.raises(FileNotFoundError, match=f"--data_path.*{tmp_path}/val;"):
        labelled_sources(str(tmp_path))
    save(tmp_path, "val/a/0.png", "val/zebra/0.png")
    with pytest.raises(ValueError, match=f"--data_path: {tmp_path}/val .*'zebra'"):
        labelled_sources(str(tmp_path))
    (tmp_path / "train" / "hollow").mkdir()
    with pytest.raises(ValueError, match=f"--data_path: {tmp_path}/train .*'hollow'"):
        labelled_source(str(tmp_path), "train")
    save(tmp_path / "flat", "val/0.png")
    with pytest.raises(ValueError, match=r"--data_path: .*/flat/val "):
        labelled_source(str(tmp_path / "flat"), "val")


# -------------------------------------------------------------------------------------------------------------- images


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    return image


def pixels_of(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


WHITE, RED, GREY = (255, 255, 255), (255, 0, 0), (128, 128, 128)
VIEWED = {  # file -> image, pixels that an image viewer shows
    "rgba.png": (pixels_of("RGBA", (255, 0, 0, 255), (9, 9, 9, 0)), [RED, WHITE]),  # white paper
    "half.png": (pixels_of("RGBA", (0, 0, 0, 127), (255, 0, 0, 255)), [GREY, RED]),  # 255 * (1 - 127 / 255)
    "la.png": (pixels_of("LA", (128, 255), (0, 0)), [GREY, WHITE]),
    "palette.png": (palette_with_transparency(), [WHITE, RED]),  # colour 0 is transparent
    "palette.gif": (palette_with_transparency(), [WHITE, RED]),
    "grey.png": (pixels_of("L", 128, 255), [GREY, WHITE]),
    "grey16.png": (Image.fromarray(np.array([[128 * 257, 65535]], np.uint16)), [GREY, WHITE]),  # 65535 is white
    "grey16.tif": (Image.fromarray(np.array([[128 * 257, 65535]], np.uint16)), [GREY, WHITE]),
    "bits.png": (pixels_of("1", 0, 1), [(0, 0, 0), WHITE]),  # 1 is white, not almost black
    "cmyk.tif": (pixels_of("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), [RED, WHITE]),  # inks: magenta + yellow, none
}


def test_images_are_decoded_as_viewers_show_them(tmp_path):
    for name, (image, viewed) in VIEWED.items():
        image.save(tmp_path / name)
        assert bands_of(tmp_path / name, value_range=("full",))[0].tolist() == [list(colour) for colour in viewed], name


def test_one_channel_is_the_luminance(tmp_path):
    pixels_of("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert bands_of(tmp_path / "x.png", in_chans=1)[0, :, 0].tolist() == [76, 255]  # 0.299 x 255, white paper


def test_photographs_are_turned_upright(tmp_path):
    image, exif = smooth(np.random.default_rng(0), 12, 8), Image.Exif()
    for orientation, turns in ((3, 2), (6, 3), (8, 1)):  # np.rot90 turns counter-clockwise
        exif[0x0112] = orientation
        image.save(tmp_path / "x.png", exif=exif)
        assert np.array_equal(bands_of(tmp_path / "x.png"), np.rot90(np.asarray(image), turns))


def test_npy_files_have_any_number_of_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 5), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    assert np.array_equal(bands_of(tmp_path / "x.npy", in_chans=5), pixels)
    shutil.copy(tmp_path / "x.npy", tmp_path / "X.NPY")
    assert np.array_equal(bands_of(tmp_path / "X.NPY", in_chans=5), pixels)
    crop = pretrain_transform("src", (8, 8), "bilinear")(
        read_image(os.fsencode(tmp_path / "x.npy"), PixelOptions(5)), np.random.default_rng()
    )
    assert crop.shape == (8, 8, 5)


def test_another_number_of_channels_is_an_error_that_names_the_flags(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 7, 5), np.uint8))
    with pytest.raises(ValueError, match=r"has 5 bands.* --in_chans 3; .*--bands 1 2 3 .*--in_chans 5"):
        bands_of(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.zeros((9, 7, 3)))
    with pytest.raises(ValueError, match=r"float64 .*--value_range auto"):
        bands_of(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"has 3 bands.* --in_chans 5"):
        bands_of(save(tmp_path, "x.png") / "x.png", in_chans=5)


# ------------------------------------------------------------------------------------------------------------ bad images


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Nine good images, a truncated one and a text file, whose names have a newline and a byte that is not UTF-8."""
    class_folders(tmp_path / "images", {"a": 9}, seed=0)
    good = (tmp_path / "images" / "a" / "1.png").read_bytes()
    folder = os.fsencode(tmp_path / "images" / "a")
    for name, content in ((b"cut\noff.png", good[: len(good) // 2]), (b"caf\xe9.jpg", b"no image")):
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(content)
    return tmp_path / "images"


def test_a_bad_image_stops_the_run_with_one_line_naming_it(tmp_path, capfd):
    class_folders(tmp_path / "a", {"a": 4}, seed=0)
    (tmp_path / "a" / "a" / "zz.png").write_bytes(b"no image")
    flags = ["--data_path", tmp_path / "a", "--output_dir", tmp_path / "out", "--batch_size", 5, "--epochs", 1]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a/a/zz\.png .*--on_bad_image skip$"):
        call("main_pretrain", *PRETRAIN, *flags)
    assert capfd.readouterr().err == ""


def test_skipped_images_are_replaced_and_listed(damaged, tmp_path):
    pretrain(damaged, tmp_path / "out", "--on_bad_image", "skip", "--batch_size", 11)
    assert len(records(tmp_path / "out")) == 2
    lines = (tmp_path / "out" / "bad_images.txt").read_bytes().splitlines()
    assert len(lines) == 2  # each file once
    assert b"caf\xe9.jpg\t" in lines[0]
    assert rb"cut\noff.png" in lines[1]


def test_the_next_readable_image_and_its_label_replace_a_bad_one(tmp_path):
    class_folders(tmp_path / "train", {"a": 2, "b": 1}, seed=0)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    source = labelled_source(str(tmp_path), "train")
    samples = Samples(source, eval_transform((8, 8)), SKIP, replace_bad=True)
    batch = samples.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert batch["index"].tolist() == [0, 2, 2]
    assert batch["label"].tolist() == [0, 1, 1]
    assert [path for path, _ in batch["bad"]] == [f"{tmp_path}/train/a/1.png"]


def test_skipping_raises_if_no_image_is_readable(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    samples = Samples(image_folder(str(tmp_path)), eval_transform((8, 8)), SKIP, replace_bad=True)
    with pytest.raises(ValueError, match=r"0\.png "):
        next(iter(DevicePrefetcher([samples.__getitems__([(0, 0)])], CPU)))


# ------------------------------------------------------------------------------------------------------ order and loaders


def step_batches(photos, tmp_path, size: int, accum: int, crop: str = "src", workers: int = 0) -> list[dict]:
    """Global batch of each step of epoch 1: 8 images over `size` ranks and `accum` forward passes."""
    micro, shares = 8 // size // accum, []
    source = image_folder(str(photos))
    for rank in range(size):
        run = one_rank(tmp_path, rank, size, batch_size=micro, accum_iter=accum, num_workers=workers)
        loader = train_loader(run, source, pretrain_transform(crop, (16, 24), "bilinear"), flip=True, noise_length=6)
        loader.batch_sampler.start(1)
        shares.append([{k: v for k, v in batch.items() if k != "bad"} for batch in loader])
    micros = list(zip(*shares, strict=True))
    assert len(micros) == 2 * accum
    steps = [[x for each in micros[i : i + accum] for x in each] for i in range(0, len(micros), accum)]
    return [{name: torch.cat([x[name] for x in step]) for name in step[0]} for step in steps]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers
@pytest.mark.parametrize("free", [0, 2 * 2**20, 2**30])
def test_workers_without_shared_memory_pass_the_same_batches_through_pipes(free, photos, tmp_path, monkeypatch, capsys):
    """Docker's /dev/shm has 64 MiB. Two workers that may both fill a batch need twice its size, and a MiB each."""
    monkeypatch.setattr("util.data.samples.free_shared_memory", lambda: free)
    report_small_memory.cache_clear()
    source, crop = image_folder(str(photos)), pretrain_transform("src", (16, 24), "bilinear")
    epochs = []
    for workers in (0, 2):
        run = one_rank(tmp_path, batch_size=4, num_workers=workers)
        loader = train_loader(run, source, crop, flip=True, noise_length=6)
        loader.batch_sampler.start(1)
        epochs.append([*DevicePrefetcher(loader, CPU)])
    for alone, given in zip(*epochs, strict=True):
        assert alone.keys() == given.keys()
        assert all(torch.equal(alone[name], given[name]) for name in alone)
        assert given["images"].is_shared() == (free == 2**30)
    warned = "/dev/shm" in capsys.readouterr().err
    assert warned == (free != 2**30)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_trains_on_a_small_dev_shm(photos, tmp_path):
    words = [
        "--data_path",
        photos,
        "--output_dir",
        tmp_path,
        *PRETRAIN,
        "--batch_size",
        4,
        "--num_workers",
        2,
        "--epochs",
        1,
    ]
    command = (
        f"mount -t tmpfs -o size=1m none /dev/shm && {sys.executable} main_pretrain.py {shlex.join(map(str, words))}"
    )
    found = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "ermission denied" in found.stderr or "not permitted" in found.stderr:
        pytest.skip("mounting is not allowed here")
    assert found.returncode == 0, found.stderr
    assert re.search(r"/dev/shm .*\b1 MiB", found.stderr)
    assert "1 epochs finished" in found.stdout


@pytest.mark.parametrize(
    ("size", "accum", "crop", "workers"),
    [(2, 1, "src", 0), (8, 1, "src", 0), (1, 4, "src", 0), (2, 2, "rrc", 0), (1, 1, "rrc", 2), (1, 2, "src", 2)],
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers
def test_samples_crops_flips_and_masks_of_a_step_equal_those_of_one_rank(photos, tmp_path, size, accum, crop, workers):
    alone = step_batches(photos, tmp_path, 1, 1, crop)
    shared = step_batches(photos, tmp_path, size, accum, crop, workers)
    assert len(alone) == len(shared) == 2  # 16 images
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys() == {"images", "flip", "noise", "label", "index"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(i for step in alone for i in step["index"].tolist()) == list(range(16))


def test_epochs_differ_in_order_crops_flips_and_masks(photos, tmp_path):
    run = one_rank(tmp_path, batch_size=16)
    crop = pretrain_transform("src", (16, 16), "bilinear")
    loader = train_loader(run, image_folder(str(photos)), crop, flip=True, noise_length=4)
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.start(epoch)
        batch = next(iter(loader))
        epochs.append({k: v[batch["index"].argsort()] for k, v in batch.items() if k not in ("bad", "index")})
        epochs[-1]["index"] = batch["index"]
    for name in ("images", "flip", "noise", "index"):
        assert not torch.equal(epochs[0][name], epochs[1][name])


def test_a_batch_joined_from_parts_equals_the_whole_batch(photos, tmp_path, monkeypatch):
    whole = step_batches(photos, tmp_path, 1, 1)
    monkeypatch.setattr("util.data.samplers.WORKER_BATCH", 3)
    run, source = one_rank(tmp_path), image_folder(str(photos))
    loader = train_loader(run, source, pretrain_transform("src", (16, 24), "bilinear"), flip=True, noise_length=6)
    loader.batch_sampler.start(1)
    assert [len(keys) for keys in loader.batch_sampler] == [3, 3, 2] * 2
    for mine, theirs in zip(DevicePrefetcher(loader, CPU, loader.batch_sampler.parts), whole, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_epoch_can_start_at_any_step(photos, tmp_path):
    run = one_rank(tmp_path, batch_size=2, accum_iter=2)
    loader = train_loader(run, image_folder(str(photos)), pretrain_transform("src", (8, 8), "bilinear"), flip=True)
    order = loader.batch_sampler
    order.start(3)
    whole = list(order)
    order.start(3, 1)
    assert list(order) == whole[2:]


def test_evaluation_covers_every_index_once_without_padding():
    for size, count in product(range(1, 6), (3, 16, 17)):
        orders = [EvalSampler(count, 4, World(rank, size, CPU)) for rank in range(size)]
        keys = [key for order in orders for batch in order for key in batch]
        assert sorted(keys) == [(0, i) for i in range(count)]


def test_refuses_a_batch_larger_than_the_data(photos, tmp_path):
    run = one_rank(tmp_path, size=4, batch_size=2, accum_iter=3)
    with pytest.raises(ValueError, match=r"--batch_size 2 x --accum_iter 3 x 4 ranks .*24 .*--data_path .*16"):
        train_loader(run, image_folder(str(photos)), pretrain_transform("src", (8, 8), "bilinear"), flip=True)
    with pytest.raises(ValueError, match="--batch_size 17 "):
        call("main_pretrain", *PRETRAIN, "--batch_size", 17, "--data_path", photos, "--output_dir", tmp_path)


# ----------------------------------------------------------------------------------------------------------- the device


def test_normalize_equals_torchvision_s_to_tensor_flip_and_normalize():
    rng = np.random.default_rng(0)
    images, flips = rng.integers(0, 256, (4, 6, 8, 3), np.uint8), [True, False, True, False]
    ours = Normalize(RGB, CPU)({"images": torch.from_numpy(images), "flip": torch.tensor(flips)})
    pipeline = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    for image, flip, mine in zip(images, flips, ours, strict=True):
        theirs = pipeline(Image.fromarray(image))
        assert torch.equal(mine, theirs.flip(2) if flip else theirs)


def test_mean_and_std_are_per_channel():
    args = Namespace(in_chans=2, mean=[0.5, 0.0], std=[0.5, 1.0])
    batch = {"images": torch.full((1, 2, 2, 2), 255, dtype=torch.uint8)}
    assert Normalize(args, CPU)(batch)[0, :, 0, 0].tolist() == [1.0, 1.0]  # (1 - 0.5) / 0.5, (1 - 0) / 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("side", "crop_pct", "resized"),
    [(224, None, 256), (64, None, 73), (256, None, 256), (384, None, 384), (384, 0.875, 438), (224, 0.9, 248)],
)
def test_eval_transform_equals_torchvision_s_resize_and_centre_crop(side, crop_pct, resized, interpolation):
    pipeline = T.Compose([T.Resize(resized, T.InterpolationMode(interpolation)), T.CenterCrop(side)])
    for width_height in ((300, 280), (240, 400), (20, 30)):
        image = smooth(np.random.default_rng(0), *width_height)
        ours = eval_transform((side, side), crop_pct, interpolation)([image], np.random.default_rng())
        assert np.array_equal(ours, np.asarray(pipeline(image)))


@pytest.mark.parametrize(
    ("size", "resized"), [((112, 224), (128, 256)), ((224, 448), (224, 448)), ((448, 96), (448, 96))]
)
def test_evaluation_crop_depends_on_the_longer_side(size, resized):
    width, height = 2 * resized[1], 2 * resized[0]  # of the aspect ratio of the input: the resize is exact
    image = smooth(np.random.default_rng(0), width, height)
    pipeline = T.Compose([T.Resize(resized, T.InterpolationMode.BICUBIC), T.CenterCrop(size)])
    assert np.array_equal(eval_transform(size)([image], np.random.default_rng()), np.asarray(pipeline(image)))


def test_shards_with_one_class_number_are_one_class(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        save(tmp_path, "x.png")
        (tmp_path / "x.cls").write_text("1")  # class 0 has no image
        for name in ("x.png", "x.cls"):
            tar.add(tmp_path / name, name)
    with pytest.raises(ValueError, match=f"--data_path: {tmp_path}/train/0.tar .*one class"):
        labelled_source(str(tmp_path), "train")


def test_eval_transform_pads_nothing_at_a_size_that_is_not_square():
    image = Image.new("RGB", (40, 40), "white")
    pixels = eval_transform((32, 96))([image], np.random.default_rng())
    assert pixels.shape == (32, 96, 3)
    assert pixels.min() == 255  # no black padding


def test_rrc_equals_mae_s_random_resized_crop():
    image, rng = smooth(np.random.default_rng(0), 60, 50), np.random.default_rng(1)
    seed = int(np.random.default_rng(1).bit_generator.random_raw())
    ours = pretrain_transform("rrc", (16, 16), "bicubic")([image], rng)
    torch.manual_seed(seed)
    theirs = T.RandomResizedCrop(16, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)(image)
    assert np.array_equal(ours, np.asarray(theirs))


def test_evaluation_does_not_flip(photos):
    args = Namespace(**vars(RGB) | {"num_workers": 0, "batch_size": 4})
    source = labelled_sources(str(photos))[1]
    batches = list(eval_loader(args, World(0, 1, CPU), source, eval_transform((16, 16))))
    assert [len(batch["images"]) for batch in batches] == [4, 4, 1]
    assert all("flip" not in batch for batch in batches)
    assert torch.cat([batch["label"] for batch in batches]).tolist() == source.labels.tolist()


def test_time_limit_restores_the_timer_of_the_caller(monkeypatch):
    """pytest-timeout has one, too; without it a test that hangs would hang for ever."""
    before = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 100, 7)
    try:
        with pytest.raises(DiskTimeout), time_limit(0.01):
            time.sleep(5)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left <= 100
        assert interval == 7
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, before[1])
        signal.setitimer(signal.ITIMER_REAL, *before[0])
