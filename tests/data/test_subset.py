"""Evaluation with few labels: --train_fraction and --train_list."""

import numpy as np
import pytest
from conftest import DEVICE, call, result

from util.data.sources import draw_fraction


def test_a_fraction_is_stratified_seeded_and_contains_smaller_fractions():
    labels = np.repeat([0, 1, 2], [200, 50, 3])
    tenth = draw_fraction(labels, 0.1, seed=0)
    assert np.bincount(labels[tenth]).tolist() == [20, 5, 1]  # at least one image a class
    assert set(draw_fraction(labels, 0.01, seed=0)) < set(tenth)
    assert np.array_equal(tenth, draw_fraction(labels, 0.1, seed=0))
    assert not np.array_equal(tenth, draw_fraction(labels, 0.1, seed=1))
    assert np.array_equal(draw_fraction(labels, 1.0, seed=0), np.arange(253))


@pytest.mark.parametrize("main", ["main_linprobe", "main_finetune"])
def test_the_saved_train_list_reproduces_the_results(main, photos, pretrained, tmp_path):
    flags = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--epochs", 1, "--warmup_epochs", 0]
    flags += ["--batch_size", 2, *DEVICE]
    one = result(main, *flags, "--train_fraction", 0.5, "--output_dir", tmp_path / "one")
    listed = tmp_path / "one" / "train_list.txt"
    names = listed.read_text().splitlines()
    assert [sum(name.startswith(kind) for name in names) for kind in ("ant/", "bee/", "cat/")] == [3, 2, 2]
    assert result(main, *flags, "--train_list", listed, "--output_dir", tmp_path / "two") == one


def test_knn_of_a_list_equals_knn_of_a_folder_with_these_images(photos, pretrained, tmp_path):
    names = ["ant/0.JPG", "bee/1.png", "bee/2.png", "cat/4.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "val").symlink_to(photos / "val")
    for name in names:
        link = tmp_path / "few" / "train" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photos / "train" / name)
    flags = ["--checkpoint", pretrained / "last.pth", "--k", 2, *DEVICE]
    listed = result("main_knn", *flags, "--data_path", photos, "--train_list", tmp_path / "list.txt")
    assert listed == result("main_knn", *flags, "--data_path", tmp_path / "few")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("ant/0.JPG\nant/99.png", "", r"list\.txt .*\b1 names .*ant/99\.png"),
        ("", "", r"list\.txt .*empty"),
        ("ant/0.JPG", "--train_fraction 0.5", r"--train_fraction 0\.5 .*--train_list"),
        (None, "", r"list\.txt .*No such file"),
    ],
)
def test_invalid_lists_are_refused_by_name(content, flags, message, photos, pretrained, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    words = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--train_list", tmp_path / "list.txt"]
    with pytest.raises(ValueError, match=message):
        call("main_knn", *words, *DEVICE, *flags.split())
