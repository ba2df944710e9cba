"""Classifiers on other images than those of val/: ImageNet-A, -R, -Sketch (folders of classes) and -C (corruptions)."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import fmean as mean

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from util.data.folders import Query, Source, find_split
from util.data.sources import labelled_source
from util.formats.weights import Weights

# Error of AlexNet in percent, mean of the severities 1 to 5, by which the mCE is normalised: Hendrycks & Dietterich,
# arXiv:1903.12261; digits of https://github.com/hendrycks/robustness (ImageNet-C/test.py)
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880, "glass_blur": 82.6268,
    "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip
SEVERITIES = range(1, 6)


def mask_classes(logits: Tensor, absent: list[int]) -> Tensor:
    """Logits (B, classes) -> (B, 2, classes): without the absent classes, as ImageNet-A and -R define, and with all."""
    masked = logits.clone()
    masked[:, absent] = -torch.inf
    return torch.stack([masked, logits], dim=1)


def class_names(weights: Weights) -> list[str] | None:
    """Folder names of a classifier's classes, in order; those of ImageNet-1k for 1000 classes without names; else None."""
    if weights.source == "pixmim":
        return weights.classes
    return ImageNetInfo("imagenet-1k").label_names() if weights.num_classes == 1000 else None


def find_images(args: Namespace, weights: Weights) -> tuple[Source, list[int], dict[str, list[Source]]]:
    """(Images, classes that do not compete, {}) of the val split of --data_path, where all classes compete, or of DIR/<class>/.

    For ImageNet-C's tree the images of its first folder, and those of each corruption and severity.
    """
    names, folder = class_names(weights) or [], Path(args.data_path[0])
    whole = len(args.data_path) == 1 and folder.is_dir() and not args.val_path
    if whole and not find_split((child.name for child in folder.iterdir()), Query(split="val")):
        if any((folder / name).is_dir() for name in names):
            source = labelled_source([str(folder)], None, names)
            return source, sorted({*range(len(names))} - {*source.labels.tolist()}), {}
        if tree := find_corruptions(folder, names):
            return next(iter(tree.values()))[0], [], tree
    return labelled_source(args.data_path, "val", weights.classes if weights.source == "pixmim" else None, args), [], {}


def find_corruptions(top: Path, classes: list[str]) -> dict[str, list[Source]]:
    """Images of DIR/[GROUP/]CORRUPTION/SEVERITY/CLASS/ for the severities 1 to 5 of each corruption; {} for another tree.

    ValueError for a missing severity, a corruption that occurs twice, and unknown classes.
    """
    places = [path for pattern in ("*/[1-5]", "*/*/[1-5]") for path in top.glob(pattern)]
    found = [path for path in places if any(map(Path.is_dir, path.glob("*")))]
    folders = sorted({path.parent for path in found}, key=lambda x: (x.name not in ALEXNET, x.name, x))
    for folder in folders:
        missing = [str(severity) for severity in SEVERITIES if not (folder / str(severity)).is_dir()]
        twice = [str(other) for other in folders if other.name == folder.name]
        if missing or len(twice) > 1:
            what = f"{folder} lacks severity {' '.join(missing)}" if missing else f"{' and '.join(twice)} are the same"
            raise ValueError(f"--data_path: {what}; expected CORRUPTION/1 to CORRUPTION/5 once, as in ImageNet-C")
    return {x.name: [labelled_source([str(x / str(level))], None, classes) for level in SEVERITIES] for x in folders}


def mean_corruption_error(errors: dict[str, list[float]]) -> float | None:
    """mCE in percent: mean of the errors / AlexNet's over ImageNet-C's 15 corruptions; None if one is missing."""
    if not ALEXNET.keys() <= errors.keys():
        return None
    return mean(100 * mean(errors[name]) / alexnet for name, alexnet in ALEXNET.items())


def evaluate_corruptions(tree: dict[str, list[Source]], accuracy: Callable, imagenet: bool, report: Callable) -> dict:
    """Errors in percent by corruption and severity, their mean, and for ImageNet's classes the mCE; reports a table.

    `accuracy` returns the top-1 accuracy of a source in percent; `report` prints a line.
    """
    report(f"| corruption | {' | '.join(f'severity {x}' for x in SEVERITIES)} | mean error | error / AlexNet's |")
    report("| --- " * 8 + "|")
    errors: dict[str, list[float]] = {}
    for name, sources in tree.items():
        errors[name] = row = [round(100 - accuracy(source), 3) for source in sources]
        relative = f"{100 * mean(row) / ALEXNET[name]:.1f}" if imagenet and name in ALEXNET else ""
        report(f"| {name} | {' | '.join(f'{error:.1f}' for error in row)} | {mean(row):.1f} | {relative} |")
    mce = mean_corruption_error(errors) if imagenet else None
    if mce is None:
        report("no mCE: it needs the 1000 classes of ImageNet and its 15 corruptions; mean_error is not normalised")
    total = {"mean_error": round(mean([mean(row) for row in errors.values()]), 3), "corruptions": len(errors)}
    return total | ({"mce": round(mce, 3)} if mce is not None else {}) | {"errors": errors}
