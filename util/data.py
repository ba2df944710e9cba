"""From folders of images to batches of uint8 on the device, each sample a function of (seed, epoch, index)."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from util.args import channel_statistics
from util.crop import SimpleResizedCrop, resize_to_cover
from util.dist import World
from util.rng import CROP, MASK, Seeded, generator, permutation
from util.run import Run

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".npy")
T_MODES = {mode.value: mode for mode in T.InterpolationMode}


# ------------------------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """Images of a folder. Arrays, not lists: workers share their memory."""

    paths: np.ndarray  # (N,) bytes, as the file system spells them
    labels: np.ndarray  # (N,) int64, all 0 where there are no classes
    classes: list[str]


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


def unlabelled_source(data_path: str) -> Source:
    """All images of DIR/train if there is one, else of DIR, whatever its structure."""
    folder = checked_folder(Path(data_path), "it holds images, nested or flat")
    folder = folder / "train" if (folder / "train").is_dir() else folder
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"--data_path: {folder} holds no image ({' '.join(EXTENSIONS)})")
    return Source(np.array(paths), np.zeros(len(paths), np.int64), [])


def labelled_source(data_path: str, split: str, classes: Sequence[str] | None = None) -> Source:
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
    return Source(np.array(paths), np.array(labels), list(number))


def labelled_sources(data_path: str) -> tuple[Source, Source]:
    """(train, val) of a folder with both, with the same classes."""
    train = labelled_source(data_path, "train")
    return train, labelled_source(data_path, "val", train.classes)


# -------------------------------------------------------------------------------------------------------------- images


def read_image(path: bytes, in_chans: int) -> list[Image.Image]:
    """An image as a person would see it: [RGB] or [grey] upright, alpha over white; bands of a (H, W, C) uint8 .npy."""
    name = os.fsdecode(path)
    if name.lower().endswith(".npy"):
        pixels = np.atleast_3d(np.load(name))
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != in_chans:
            raise ValueError(f"holds {pixels.dtype} {pixels.shape}, not uint8 (height, width, {in_chans})")
        return [Image.fromarray(band) for band in pixels.transpose(2, 0, 1)]
    if in_chans not in (1, 3):
        raise ValueError(f"--in_chans {in_chans} is for .npy files")
    with Image.open(name) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"has pixels of mode {image.mode} outside 16 bits")
            image = Image.fromarray((pixels // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return [image.convert("L" if in_chans == 1 else "RGB")]


def pretrain_transform(crop: str, size: tuple[int, int], interpolation: str | None) -> Callable:
    """`src`: SimpleResizedCrop, bilinear; `rrc`: MAE's RandomResizedCrop, bicubic. The flip is done on the device."""
    if crop == "src":
        return SimpleResizedCrop(size, interpolation or "bilinear")
    return Seeded(T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=T_MODES[interpolation or "bicubic"]))


def eval_transform(size: tuple[int, int], interpolation: str = "bicubic") -> Callable:
    """Resized to cover 256 / 224 of the input, then the centre."""
    height, width = (int(side * 256 / 224) for side in size)
    resize = partial(resize_to_cover, size=(height, width), interpolation=interpolation)
    return Seeded(T.Compose([resize, T.CenterCrop(size)]))


class Samples(Dataset):
    """Whole batches of decoded, cropped uint8 images; what cannot be read is reported, not raised."""

    def __init__(
        self,
        source: Source,
        transform: Callable,
        args,
        *,
        flip: bool = False,
        noise_length: int = 0,
        skip_bad: bool = False,
    ):
        self.source, self.transform, self.flip, self.noise_length = source, transform, flip, noise_length
        self.seed, self.in_chans, self.skip_bad = args.seed, args.in_chans, skip_bad

    def __len__(self) -> int:
        return len(self.source.paths)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """(epoch, index) of B samples -> images (B, H, W, C) uint8, flip (B,) bool, noise (B, U) float32, label, index, bad.

        `bad` lists (path, reason) of the images that could not be read; with `stop` the first of them ends the batch.
        """
        bad: list[tuple[str, str]] = []
        images, flips, noise, index = [], [], [], []
        for epoch, i in keys:
            readable = self.read(i, bad)
            if readable is None:
                return {"bad": bad}
            rng = generator(self.seed, CROP, epoch, i)
            images.append(self.transform(readable[0], rng))
            index.append(readable[1])
            flips.append(rng.random() < 0.5)
            noise.append(generator(self.seed, MASK, epoch, i).random(self.noise_length, np.float32))
        batch = {
            "images": np.stack(images),
            "noise": np.stack(noise),
            "label": self.source.labels[index],
            "index": index,
        }
        if self.flip:
            batch["flip"] = flips
        return {name: torch.as_tensor(value) for name, value in batch.items()} | {"bad": bad}

    def read(self, i: int, bad: list[tuple[str, str]]) -> tuple[list[Image.Image], int] | None:
        """Image i, or with `skip` the next one that can be read, and its index."""
        for candidate in range(i, i + (len(self) if self.skip_bad else 1)):
            path = self.source.paths[candidate % len(self)]
            try:
                return read_image(path, self.in_chans), candidate % len(self)
            except Exception as error:  # decoders raise everything from OSError to struct.error
                name = os.fsdecode(path).replace("\n", "\\n")
                bad.append((name, " ".join(str(error).split()) or type(error).__name__))
        return None


# ------------------------------------------------------------------------------------------------- order and loaders


class TrainOrder(Sampler):
    """Micro-batches of (epoch, index) for this rank; step k holds the same samples on any number of ranks."""

    def __init__(self, count: int, run: Run):
        self.count, self.seed, self.batch, self.world = count, run.args.seed, run.batch, run.world
        self.micro = run.args.batch_size
        self.steps = count // run.batch  # the tail of each epoch's order waits for another epoch
        self.epoch = self.first = 0
        if not self.steps:
            raise ValueError(
                f"--batch_size {self.micro} x --accum_iter {run.args.accum_iter} x {self.world.size} ranks asks for "
                f"{run.batch} images a step, --data_path has {count}; lower --batch_size"
            )

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration goes through this epoch, from this step."""
        self.epoch, self.first = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first) * (self.batch // (self.micro * self.world.size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.seed, self.epoch, self.count)[self.first * self.batch : self.steps * self.batch]
        for block in order.reshape(-1, self.world.size, self.micro):
            yield [(self.epoch, int(i)) for i in block[self.world.rank]]


class EvalOrder(Sampler):
    """Every sample once, over the ranks: no padding, so counts are exact."""

    def __init__(self, count: int, batch_size: int, world: World):
        self.mine = range(world.rank, count, world.size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(0, i) for i in self.mine[start : start + self.batch_size]]


def as_it_is(batch: Any) -> Any:
    """Collate function: the batch is one already."""
    return batch


def make_loader(samples: Samples, order: Sampler, args, device: torch.device) -> DataLoader:
    workers = args.num_workers
    if workers is None:
        limited = hasattr(os, "sched_getaffinity")  # macOS has none
        cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
        workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and isinstance(order, TrainOrder),
    )


def train_loader(run: Run, source: Source, transform: Callable, *, flip: bool, noise_length: int = 0) -> DataLoader:
    """Endless training data; `loader.batch_sampler.start(epoch, step)` says where the next iteration begins."""
    skip_bad = run.args.on_bad_image == "skip"
    samples = Samples(source, transform, run.args, flip=flip, noise_length=noise_length, skip_bad=skip_bad)
    return make_loader(samples, TrainOrder(len(samples), run), run.args, run.world.device)


def eval_loader(args, world: World, source: Source, transform: Callable) -> DataLoader:
    """Every image of the source once, spread over the ranks."""
    samples = Samples(source, transform, args)
    return make_loader(samples, EvalOrder(len(samples), args.batch_size, world), args, world.device)


class Feed:
    """Batches on the device; knows how long it waited for them and which images were bad."""

    def __init__(self, loader: Iterable[dict], device: torch.device):
        self.loader, self.device = loader, device
        self.waited = 0.0  # seconds
        self.bad: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[dict]:
        before = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - before
            bad = batch.pop("bad")
            if "images" not in batch:
                path, reason = bad[0]
                raise ValueError(
                    f"{path} cannot be read: {reason}; mend or remove it; training can --on_bad_image skip"
                )
            self.bad += bad
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            before = time.perf_counter()


def one_batch(samples: Samples, indices: Sequence[int], device: torch.device) -> dict:
    """These samples of epoch 0, as a batch on the device."""
    return next(iter(Feed([samples.__getitems__([(0, i) for i in indices])], device)))


class Normalize:
    """Batch of uint8 -> normalised images (B, C, H, W) float32, flipped where the batch says so, on its device."""

    def __init__(self, args, device: torch.device):
        mean, std = channel_statistics(args.in_chans, args.mean, args.std)
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, batch: dict) -> Tensor:
        images = batch["images"].permute(0, 3, 1, 2)
        if "flip" in batch:
            images = torch.where(batch["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        return images.float().div(255).sub(self.mean).div(self.std)
