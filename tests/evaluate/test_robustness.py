"""Classifiers on ImageNet-A, -R, -Sketch and -C: folders with a part of the classes, and corruptions."""

import json
import shutil
from argparse import Namespace

import pytest
import timm
import torch
from conftest import CPU, DEVICE, call, class_folders, result
from torch import nn

from models import ENCODERS, build_encoder
from util.args import IMAGENET_MEAN, IMAGENET_STD
from util.data.batches import eval_loader
from util.data.sources import labelled_source
from util.data.transforms import Normalize, eval_transform
from util.dist import World
from util.evaluate.encoder import load_encoder, pooling, read_architecture
from util.evaluate.robustness import ALEXNET, evaluate_corruptions, mask_classes, mean_corruption_error

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def tuned(pretrained, photos, tmp_path_factory):
    """classifier.pth of a fine-tuning on ant, bee and cat."""
    folder = tmp_path_factory.mktemp("tuned")
    flags = ["--epochs", "1", "--batch_size", "8", "--warmup_epochs", "0", "--blr", "0.003", *DEVICE]
    call(
        "main_finetune", "--checkpoint", pretrained / "last.pth", "--data_path", photos, "--output_dir", folder, *flags
    )
    return folder / "classifier.pth"


def slow_logits(tuned, folder, crop_pct=None) -> list[tuple[list[float], int]]:
    """(Logits, label) of each image, one image at a time."""
    import main_finetune

    words = ["--eval", "--checkpoint", str(tuned), "--data_path", "x", "--batch_size", "1", *DEVICE]
    args, weights = read_architecture(main_finetune.get_parser().parse_args(words), ENCODERS)
    model = load_encoder(args, build_encoder, weights, num_classes=3, **pooling(weights)).eval()
    source, found = labelled_source([str(folder)], None, list(NAMES)), []
    for batch in eval_loader(args, World(0, 1, CPU), source, eval_transform(args.input_size, crop_pct)):
        with torch.no_grad():
            found.append((model(Normalize(args, CPU)(batch))[0].tolist(), int(batch["label"])))
    return found


def evaluate(tuned, folder, *words) -> dict:
    return result("main_finetune", "--eval", "--checkpoint", tuned, "--data_path", folder, *DEVICE, *words)


def test_classes_without_a_folder_are_never_predicted(tuned, tmp_path):
    class_folders(tmp_path, {"bee": 7, "cat": 6}, seed=3)
    rows = slow_logits(tuned, tmp_path)
    among = [max((1, 2), key=row.__getitem__) == label for row, label in rows]
    among_all = [max((0, 1, 2), key=row.__getitem__) == label for row, label in rows]
    found = evaluate(tuned, tmp_path)
    assert found["acc1"] == pytest.approx(100 * sum(among) / 13, abs=1e-3)
    assert found["acc1_all_classes"] == pytest.approx(100 * sum(among_all) / 13, abs=1e-3)
    assert (found["classes"], found["n"]) == (2, 13)


def test_a_masked_class_with_the_highest_logit_is_not_predicted():
    logits = torch.tensor([[5.0, 1.0, 2.0], [5.0, 3.0, 2.0]])
    masked, all_classes = mask_classes(logits, [0]).unbind(1)
    assert masked.argmax(1).tolist() == [2, 1]
    assert torch.equal(all_classes, logits)
    assert masked.softmax(1)[:, 1:].sum(1).tolist() == pytest.approx([1, 1])


def test_no_class_is_masked_if_all_have_a_folder(tuned, photos, tmp_path):
    shutil.copytree(photos / "val", tmp_path, dirs_exist_ok=True)
    assert evaluate(tuned, tmp_path) == evaluate(tuned, photos)


def test_no_class_is_masked_in_a_val_folder(tuned, tmp_path):
    class_folders(tmp_path / "val", {"bee": 7, "cat": 6}, seed=3)
    rows = slow_logits(tuned, tmp_path / "val")
    hits = [max((0, 1, 2), key=row.__getitem__) == label for row, label in rows]
    assert evaluate(tuned, tmp_path)["acc1"] == pytest.approx(100 * sum(hits) / 13, abs=1e-3)


def corruption_tree(folder, *corruptions, severities=range(1, 6)) -> None:
    for i, name in enumerate(corruptions):
        for severity in severities:
            class_folders(
                folder / name / str(severity), dict(zip(NAMES, (2, 3, 2), strict=True)), seed=10 * i + severity
            )


@pytest.mark.parametrize("group", ["", "noise"])
def test_imagenet_c_gives_one_table_of_errors(tuned, tmp_path, group):
    corruption_tree(tmp_path / group, "gaussian_noise", "fog")
    lines = call("main_finetune", "--eval", "--checkpoint", tuned, "--data_path", tmp_path, *DEVICE)
    expected = {}
    for name in ("gaussian_noise", "fog"):
        expected[name] = []
        for severity in range(1, 6):
            rows = slow_logits(tuned, tmp_path / group / name / str(severity), crop_pct=1.0)
            wrong = sum(max((0, 1, 2), key=row.__getitem__) != label for row, label in rows)
            expected[name].append(pytest.approx(100 * wrong / 7, abs=1e-3))
    found = json.loads(lines[-1])
    assert found["errors"] == expected
    mean = sum(sum(row) for row in found["errors"].values()) / 10
    assert found["mean_error"] == pytest.approx(mean, abs=1e-3)
    assert "mce" not in found  # AlexNet's errors are those of ImageNet's 1000 classes and of 15 corruptions
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        *("| corruption", "| ---", "| fog", "| gaussian_noise"),
    ]
    assert any(line.startswith("no mCE") for line in lines)


def test_the_mean_corruption_error_is_that_of_the_paper():
    # AlexNet itself has 100; halving the errors of one of the 15 corruptions leaves 100 - 50 / 15
    errors = {name: [error] * 5 for name, error in ALEXNET.items()}
    assert mean_corruption_error(errors) == pytest.approx(100)
    assert mean_corruption_error(errors | {"fog": [0.5 * ALEXNET["fog"]] * 5}) == pytest.approx(100 - 50 / 15)
    assert mean_corruption_error(errors | {"spatter": [99.0] * 5}) == pytest.approx(100)  # one of the four extra ones
    assert mean_corruption_error({name: errors[name] for name in errors if name != "snow"}) is None


def test_the_table_has_the_mce_for_imagenets_classes_and_all_corruptions():
    lines: list[str] = []
    tree = {name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in [*ALEXNET, "spatter"]}  # shares that are right
    found = evaluate_corruptions(tree, lambda right: 100 * right, True, lines.append)
    expected = sum(100 * 70 / error for error in ALEXNET.values()) / 15
    assert found["mce"] == pytest.approx(expected, abs=1e-3)
    assert found["mean_error"] == 70
    assert found["corruptions"] == 16
    assert lines[2] == f"| gaussian_noise | 90.0 | 80.0 | 70.0 | 60.0 | 50.0 | 70.0 | {7000 / 88.6428:.1f} |"
    assert lines[-1].endswith(" | 70.0 |  |")
    assert "mce" not in evaluate_corruptions(tree, lambda right: 100 * right, False, lines.append)


def test_classes_of_a_foreign_imagenet_classifier_are_those_of_imagenet(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8)
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    names = ("n01443537", "n15075141")  # numbers 1 and 999 of ImageNet-1k
    class_folders(tmp_path / "a", dict.fromkeys(names, 3), seed=0)
    right = 0
    source = labelled_source([str(tmp_path / "a")], None)
    args = Namespace(
        seed=0, in_chans=3, mean=IMAGENET_MEAN, std=IMAGENET_STD, timeout_minutes=1, num_workers=0, batch_size=1
    )
    for batch in eval_loader(args, World(0, 1, CPU), source, eval_transform((16, 16))):
        with torch.no_grad():
            logits = model.eval()(Normalize(args, CPU)(batch))[0]
        right += int(logits[999] > logits[1]) == batch["label"].item()
    assert evaluate(tmp_path / "timm.pth", tmp_path / "a", "--input_size", "16")["acc1"] == pytest.approx(
        100 * right / 6, abs=1e-3
    )


def test_the_errors_of_alexnet_are_means_of_the_published_severities():
    severities = [0.69528, 0.82542, 0.93554, 0.98138, 0.99452]  # Gaussian noise, as public evaluation code lists them
    assert sum(severities) / 5 == pytest.approx(ALEXNET["gaussian_noise"] / 100, abs=1e-6)
    assert len(ALEXNET) == 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: corruption_tree(f, "fog", severities=(1, 2, 4, 5)), r"fog .*severity 3;"),
        (lambda f: [corruption_tree(f / g, "fog") for g in ("a", "b")], r"a/fog .*b/fog .*same"),
        (lambda f: class_folders(f / "fog" / "1", {"ant": 1, "dog": 1}, 0), r"fog .*severity 2 3 4 5"),
        (
            lambda f: [class_folders(f / "fog" / str(s), {"ant": 1, "dog": 1}, 0) for s in range(1, 6)],
            r"fog/1 .*classes .*\['dog'\]",
        ),
        (lambda f: class_folders(f, {"ant": 1, "dog": 1}, 0), r"--data_path.*classes .*\['dog'\]"),
        (lambda f: (f / "ant").mkdir(), r"no image \("),
        (lambda f: class_folders(f, {"dog": 1, "eel": 1}, 0), r"no folder .*/val;"),
        (lambda f: None, r"no folder .*/val;"),
    ],
)
def test_an_invalid_folder_structure_gives_a_one_line_error(tuned, tmp_path, make, message):
    make(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        evaluate(tuned, tmp_path)
    assert "\n" not in str(error.value)
