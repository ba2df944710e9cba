"""Pictures from checkpoints of ours and of others."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, call, weights
from PIL import Image

from util import convert


def draw(checkpoint, images, output, *words) -> np.ndarray:
    flags = ["--checkpoint", checkpoint, "--images", images, "--output", output, *DEVICE[4:]]
    (line,) = call("visualize", *flags, *words)
    with Image.open(output) as picture:
        assert line.endswith(f"images, {picture.width} x {picture.height}")
        return np.asarray(picture)


@pytest.fixture
def mm(pretrained, tmp_path):
    """The checkpoint as mmselfsup would have written it, with the filter that its PixMIM files hold."""
    state = {convert.rename(k, "mae", "mm"): v for k, v in weights(pretrained)["model"].items()}
    state["target_generator.low_pass_filter"] = torch.ones(3, 16, 16)
    torch.save({"state_dict": state, "meta": {"epoch": 2}}, tmp_path / "mm.pth")
    return tmp_path / "mm.pth"


def test_the_picture_of_a_checkpoint_has_a_row_for_each_image(pretrained, photos, tmp_path):
    picture = draw(pretrained / "last.pth", photos / "val", tmp_path / "new" / "x.png", "--count", 4)
    header = 2 * 24 + 8  # labels of at most two lines
    assert picture.shape == (header + 4 * (224 + 8), 8 + 5 * (224 + 8), 3)  # 16 px, shown 14 times as large


def test_the_picture_of_a_foreign_checkpoint_is_that_of_ours(pretrained, mm, photos, tmp_path):
    ours = draw(pretrained / "last.pth", photos / "val", tmp_path / "ours.png")
    # its decoder's heads and the seed are what the file does not tell
    theirs = draw(mm, photos / "val", tmp_path / "theirs.png", "--decoder_heads", 2)
    assert np.array_equal(ours, theirs)


def test_a_foreign_checkpoint_without_a_filter_is_drawn_as_mae(pretrained, photos, tmp_path):
    torch.save({"model": weights(pretrained)["model"]}, tmp_path / "mae.pth")
    picture = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png")
    assert picture.shape[1] == 8 + 3 * (224 + 8)  # no target, nothing removed
    wider = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png", "--lowpass_radius", 2)
    assert wider.shape[1] == 8 + 5 * (224 + 8)


def test_images_are_spread_over_those_found(photos):
    from visualize import find_images

    every = find_images([str(photos / "val")], 100).paths.tolist()
    assert len(every) == 9
    assert find_images([str(photos / "val")], 3).paths.tolist() == [every[0], every[3], every[6]]


def test_a_checkpoint_without_a_decoder_is_refused(pretrained, photos, tmp_path):
    torch.save(convert.to_timm(weights(pretrained)["model"]), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"timm\.pth has no decoder; a picture needs a pre-training checkpoint"):
        draw(tmp_path / "timm.pth", photos / "val", tmp_path / "x.png")
    with pytest.raises(ValueError, match="none has no decoder"):
        draw("none", photos / "val", tmp_path / "x.png", "--model", "vit_tiny")


def test_missing_and_empty_images_are_named(pretrained, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--images .*/nowhere: there is no such file or folder"):
        draw(pretrained / "last.pth", photos / "nowhere", tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images .*/empty: no images there"):
        draw(pretrained / "last.pth", tmp_path / "empty", tmp_path / "x.png")
