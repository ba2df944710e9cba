"""Pictures from PixMIM checkpoints and from checkpoints of other projects."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODEL, call, weights
from PIL import Image

from models import ENCODERS
from models_pixmim import PixMIM
from util.convert import convert
from util.formats.keys import rename, to_timm

BLANK = np.zeros((9, 9, 3), np.uint8)


def draw(checkpoint, images, output, *words) -> np.ndarray:
    flags = ["--checkpoint", checkpoint, "--images", images, "--output", output, *DEVICE[4:]]
    (line,) = call("visualize", *flags, *words)
    with Image.open(output) as picture:
        assert line.endswith(f"images, {picture.width} x {picture.height}")
        return np.asarray(picture)


@pytest.fixture
def mm(pretrained, tmp_path):
    """The checkpoint as mmselfsup writes it, with the filter that its PixMIM files hold."""
    state = {rename(k, "mae", "mm"): v for k, v in weights(pretrained)["model"].items()}
    state["target_generator.low_pass_filter"] = torch.ones(3, 16, 16)
    torch.save({"state_dict": state, "meta": {"epoch": 2}}, tmp_path / "mm.pth")
    return tmp_path / "mm.pth"


def test_the_reconstruction_has_a_row_per_image(pretrained, photos, tmp_path):
    picture = draw(pretrained / "last.pth", photos / "val", tmp_path / "new" / "x.png", "--count", 4)
    header = 2 * 24 + 8  # labels of at most two lines
    assert picture.shape == (header + 4 * (224 + 8), 8 + 5 * (224 + 8), 3)  # 16 px, shown 14 times as large


def test_an_mmselfsup_checkpoint_gives_the_same_picture(pretrained, mm, photos, tmp_path):
    ours = draw(pretrained / "last.pth", photos / "val", tmp_path / "ours.png")
    # the file does not hold the number of decoder heads and the seed
    theirs = draw(mm, photos / "val", tmp_path / "theirs.png", "--decoder_heads", 2)
    assert np.array_equal(ours, theirs)


def test_a_checkpoint_without_a_filter_is_drawn_as_mae(pretrained, photos, tmp_path):
    torch.save({"model": weights(pretrained)["model"]}, tmp_path / "mae.pth")
    picture = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png")
    assert picture.shape[1] == 8 + 3 * (224 + 8)  # no target, nothing removed
    wider = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png", "--lowpass_radius", 2)
    assert wider.shape[1] == 8 + 5 * (224 + 8)


def test_images_are_chosen_at_even_steps(photos):
    from visualize import find_images

    every = find_images([str(photos / "val")], 100).paths.tolist()
    assert len(every) == 9
    assert find_images([str(photos / "val")], 3).paths.tolist() == [every[0], every[3], every[6]]


def test_refuses_a_reconstruction_without_a_decoder(pretrained, photos, tmp_path):
    torch.save(to_timm(weights(pretrained)["model"]), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"--checkpoint .*timm\.pth has no decoder"):
        draw(tmp_path / "timm.pth", photos / "val", tmp_path / "x.png")
    with pytest.raises(ValueError, match="--checkpoint none has no decoder"):
        draw("none", photos / "val", tmp_path / "x.png", "--model", "vit_pico")


def test_refuses_missing_images_and_empty_folders(pretrained, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--images .*/nowhere"):
        draw(pretrained / "last.pth", photos / "nowhere", tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images .*/empty"):
        draw(pretrained / "last.pth", tmp_path / "empty", tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------------- other pictures


@pytest.mark.parametrize(
    ("flags", "columns"),
    [("--attention", 5), ("--attention --input_size 32", 5), ("--pca", 5), ("--masks", 7), ("--filter 2 4", 3)],
)
def test_pictures_need_no_decoder(flags, columns, pretrained, photos, tmp_path):
    torch.save(to_timm(weights(pretrained)["model"]), tmp_path / "timm.pth")
    for checkpoint in (pretrained / "last.pth", tmp_path / "timm.pth"):
        picture = draw(checkpoint, photos / "val", tmp_path / "x.png", "--count", 2, *flags.split())
        assert picture.shape[1] // 232 == columns
    untrained = draw("none", photos / "val", tmp_path / "x.png", *MODEL, "--count", 2, *flags.split())
    assert untrained.shape[1] == picture.shape[1]


def test_another_input_size_equals_the_picture_of_the_converted_checkpoint(pretrained, photos, tmp_path):
    convert(pretrained / "last.pth", tmp_path / "hf", "hf", input_size=(32, 32))
    flags = ["--count", 2, "--lowpass_radius", 5, "--input_size", 32, "--seed", 1]
    ours = draw(pretrained / "last.pth", photos / "val", tmp_path / "a.png", *flags)
    theirs = draw(tmp_path / "hf", photos / "val", tmp_path / "b.png", *flags, "--model", "vit_pico")
    assert np.array_equal(ours, theirs)


def test_the_spectrum_is_that_of_the_reconstruction(pretrained, photos, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "util.plots.reconstruction.draw_power", lambda images, radius: shown.update(images, r=radius) or BLANK
    )
    draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--spectrum")
    assert list(shown) == ["input", "target", "prediction", "error", "r"]
    assert torch.allclose(shown["prediction"] - shown["target"], shown["error"], atol=1e-6)
    assert shown["r"] == 40 * 16 / 224


def test_masks_are_those_of_training(photos, pretrained, tmp_path, monkeypatch):
    """Image i of epoch e is masked as the data loader and the model mask it."""
    import visualize
    from util.data.samples import Samples
    from util.data.transforms import eval_transform

    caught = {}
    monkeypatch.setattr(visualize, "draw_masks", lambda pixels, masks: caught.update(masks=masks) or BLANK)
    draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--masks", "--seed", 3, "--count", 2)
    source = visualize.find_images([str(photos / "val")], 2)
    samples = Samples(
        source, eval_transform((16, 16)), Namespace(seed=3, in_chans=3, timeout_minutes=1), noise_length=4
    )
    model = PixMIM(
        ENCODERS["vit_pico"](img_size=16, patch_size=8), torch.nn.Identity(), decoder_dim=32, decoder_depth=1
    )
    for epoch, removed in enumerate(caught["masks"]):
        noise = samples.__getitems__([(epoch, 0), (epoch, 1)])["noise"]
        assert torch.equal(removed.flatten(1), model(torch.zeros(2, 3, 16, 16), noise)[2].removed)
    assert len(caught["masks"]) == 6


def test_default_filter_radii_scale_with_the_input_size_and_include_the_models_radius(
    pretrained, photos, tmp_path, monkeypatch
):
    caught = {}
    monkeypatch.setattr(
        "visualize.draw_filters", lambda _, radii, own, low_pass: caught.update(radii=radii, own=own) or BLANK
    )
    draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--filter")
    assert caught == {"radii": [1, 40 * 16 / 224, 3, 6, 8], "own": 40 * 16 / 224}
    draw("none", photos / "val", tmp_path / "x.png", "--model", "vit_pico", "--filter")
    assert caught == {"radii": [10, 20, 40, 80, 112], "own": 40}


def test_encoders_without_a_class_token_have_components_but_no_attention(photos, tmp_path):
    conv = ["--model", "convvit_pico", "--patch_size", 8, "--input_size", 16]
    draw("none", photos / "val", tmp_path / "x.png", *conv, "--pca")
    with pytest.raises(ValueError, match="--attention: --model convvit_pico"):
        draw("none", photos / "val", tmp_path / "x.png", *conv, "--attention")


def test_refuses_two_pictures_at_a_time(pretrained, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--pca", "--filter")
    assert "argument --filter: not allowed with argument --pca" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["", "--spectrum"])
def test_refuses_an_untrained_model_where_a_decoder_is_needed(flag, photos, tmp_path):
    with pytest.raises(ValueError, match="--checkpoint none has no decoder"):
        draw("none", photos / "val", tmp_path / "x.png", *MODEL, *flag.split())
