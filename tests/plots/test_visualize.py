"""Pictures from PixMIM checkpoints and from checkpoints of other projects."""

import json
import os
import re
import shutil
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODEL, call, pretrain, weights
from PIL import Image

from models import ENCODERS
from models_pixmim import PixMIM, low_pass_disc
from util.convert import convert
from util.formats.keys import rename, to_timm
from util.plots.reconstruction import reconstruct

BLANK = np.zeros((9, 9, 3), np.uint8)


def draw(checkpoint, images, output, *words) -> np.ndarray:
    flags = ["--checkpoint", checkpoint, "--images", images, "--output", output, *DEVICE[4:]]
    *notes, line = call("visualize", *flags, *words)
    assert notes == [] or re.match(rf"{checkpoint} .*assumed: ", notes[0])
    with Image.open(output) as picture:
        assert line.endswith(f"images, {picture.width} x {picture.height}")
        return np.asarray(picture)


@pytest.fixture
def mm(pretrained, tmp_path):
    """The checkpoint as mmselfsup writes it, with the filter that its PixMIM files hold, of radius 3."""
    state = {rename(k, "mae", "mm"): v for k, v in weights(pretrained)["model"].items()}
    filtered = torch.fft.fftshift(low_pass_disc((16, 16), 3)).float()
    state["target_generator.low_pass_filter"] = filtered.expand(3, -1, -1).clone()
    torch.save({"state_dict": state, "meta": {"epoch": 2}}, tmp_path / "mm.pth")
    return tmp_path / "mm.pth"


def test_the_reconstruction_has_a_row_per_image(pretrained, photos, tmp_path):
    picture = draw(pretrained / "last.pth", photos / "val", tmp_path / "new" / "x.png", "--count", 4)
    header = 2 * 24 + 8  # labels of at most two lines
    assert picture.shape == (header + 4 * (224 + 8), 8 + 5 * (224 + 8), 3)  # 16 px, shown 14 times as large


def test_an_mmselfsup_checkpoint_is_drawn_with_its_own_filter_and_the_settings_of_its_config(
    pretrained, mm, photos, tmp_path
):
    images = photos / "val"
    ours = draw(pretrained / "last.pth", images, tmp_path / "ours.png", "--lowpass_radius", 3)
    # without a config the file does not hold the number of decoder heads
    theirs = draw(mm, images, tmp_path / "theirs.png", "--decoder_heads", 2)
    assert np.array_equal(ours, theirs)
    content = torch.load(mm, weights_only=True)
    config = "model = dict(\n    backbone=dict(mask_ratio=0.5),\n    neck=dict(decoder_num_heads=2),\n    head=dict(norm_pix=False))\n"
    torch.save(content | {"meta": {"cfg": config}}, mm)
    flags = ["--lowpass_radius", 3, "--mask_ratio", 0.5, "--no-norm_pix_loss"]
    ours = draw(pretrained / "last.pth", images, tmp_path / "ours.png", *flags)
    assert np.array_equal(ours, draw(mm, images, tmp_path / "theirs.png"))


def test_a_checkpoint_without_a_filter_is_drawn_as_mae(pretrained, photos, tmp_path):
    torch.save({"model": weights(pretrained)["model"]}, tmp_path / "mae.pth")
    picture = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png")
    assert picture.shape[1] == 8 + 3 * (224 + 8)  # no target, nothing removed
    wider = draw(tmp_path / "mae.pth", photos / "val" / "ant" / "1.png", tmp_path / "x.png", "--lowpass_radius", 2)
    assert wider.shape[1] == 8 + 5 * (224 + 8)


def test_images_are_chosen_at_even_steps(photos, tmp_path):
    from visualize import find_images

    every = find_images([str(photos / "val")], 100).paths.tolist()
    assert len(every) == 9
    assert find_images([str(photos / "val")], 3).paths.tolist() == [every[0], every[3], every[6]]
    strange = tmp_path / "caf\udce9.png"  # not UTF-8
    shutil.copy(photos / "val" / "ant" / "1.png", strange)
    assert find_images([str(strange)], 3).paths.tolist() == [os.fsencode(strange)]


def test_refuses_a_reconstruction_without_a_decoder(pretrained, photos, tmp_path):
    torch.save(to_timm(weights(pretrained)["model"]), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"--checkpoint .*timm\.pth .*no decoder"):
        draw(tmp_path / "timm.pth", photos / "val", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"--checkpoint none .*no decoder"):
        draw("none", photos / "val", tmp_path / "x.png", "--model", "vit_pico")


def test_refuses_missing_images_and_empty_folders(pretrained, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--images .*/nowhere"):
        draw(pretrained / "last.pth", photos / "nowhere", tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images .*/empty"):
        draw(pretrained / "last.pth", tmp_path / "empty", tmp_path / "x.png")


# ------------------------------------------------------------------------------------------- the method of other files

RAW = "--no-norm_pix_loss --mask_ratio 0.5"
LOW = "--lowpass centered --lowpass_radius 5 --mask_unit 2 --mean 0.5 0.4 0.3 --std 0.2 0.3 0.4"
RUNS = {  # pre-training flags -> the formats that hold encoder and decoder
    f"{RAW} --lowpass_radius 0": ("mae", "hf", "mmpretrain"),
    "--lowpass_radius 0 --mask_ratio 0.9": ("mae", "hf", "mmpretrain"),
    f"{LOW} --decoder_dim 48 --decoder_heads 3": ("mae", "hf", "mmpretrain"),
    f"{RAW} --mask_unit 2 --input_size 16 48": ("mae", "mmpretrain"),
    f"{LOW} --model convvit_pico --no-norm_pix_loss": ("mae",),
    f"{LOW} --model mff_vit_pico --fuse_layers 1 --mask_ratio 0.6": ("mmpretrain",),
}


@pytest.mark.parametrize("flags", RUNS)
def test_conversions_of_a_run_give_the_picture_of_the_run_without_flags_and_notes(flags, photos, tmp_path):
    run = pretrain(photos, tmp_path / "run", "--input_size", 32, *flags.split(), "--epochs", 1) / "last.pth"
    ours = draw(run, photos / "val", tmp_path / "x.png")
    for target in RUNS[flags]:
        convert(run, tmp_path / target, target)
        assert np.array_equal(ours, draw(tmp_path / target, photos / "val", tmp_path / "y.png")), target
        again = convert_again(tmp_path / target)
        assert np.array_equal(ours, draw(again, photos / "val", tmp_path / "y.png")), f"{target} -> {again.name}"
        command = ["--checkpoint", again, "--images", photos / "val", "--output", tmp_path / "y.png", *DEVICE[4:]]
        assert len(call("visualize", *command)) == 1  # nothing is assumed


def convert_again(path: Path) -> Path:
    """The conversion, converted to another format that holds its decoder, else to its own."""
    target = {"mae": "mmpretrain", "mmpretrain": "mae", "hf": "mae"}[path.name]
    out = path.with_name(f"{target} from {path.name}")
    with suppress(ValueError):  # ConvMAE and MFF have one format
        convert(path, out, target)
        return out
    convert(path, out, path.name)
    return out


def save_as(kind: str, state: dict, args: dict, out: Path) -> Path:
    """A file as facebookresearch/mae, long_seq_mae or transformers writes it."""
    if kind == "transformers":
        torch.save({"model": state, "args": {"num_heads": 3, "decoder_heads": 2}}, out.with_suffix(".pth"))
        convert(out.with_suffix(".pth"), out, "hf")
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | args))
        return out
    torch.save({"model": state, "args": args if kind == "a dict" else Namespace(**args), "epoch": 3}, out)
    return out


@pytest.mark.parametrize("raw", [True, False], ids=["raw pixels", "normalised"])
@pytest.mark.parametrize("kind", ["a Namespace", "a dict", "transformers"])
def test_loss_and_mask_ratio_are_read_from_files_of_other_projects(kind, raw, pretrained, photos, tmp_path):
    args = {"norm_pix_loss": not raw, "mask_ratio": 0.5}
    file = save_as(kind, weights(pretrained)["model"], args, tmp_path / "theirs")
    loss = "--no-norm_pix_loss" if raw else "--norm_pix_loss"
    flags = ["--lowpass_radius", 0, loss, "--mask_ratio", 0.5]
    ours = draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", *flags)
    heads = [] if kind == "transformers" else ["--decoder_heads", 2]  # args of MAE have no heads
    assert np.array_equal(ours, draw(file, photos / "val", tmp_path / "y.png", *heads))


def test_a_config_of_transformers_without_its_defaults_is_read_with_them(pretrained, photos, tmp_path):
    file = save_as("transformers", weights(pretrained)["model"], {}, tmp_path / "theirs")
    config = json.loads((file / "config.json").read_text())
    del config["norm_pix_loss"], config["mask_ratio"]  # ViTMAEConfig: False, 0.75
    (file / "config.json").write_text(json.dumps(config))
    ours = draw(
        pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--lowpass_radius", 0, "--no-norm_pix_loss"
    )
    assert np.array_equal(ours, draw(file, photos / "val", tmp_path / "y.png"))


def test_mask_units_of_long_seq_mae_are_read_from_its_file(pretrained, photos, tmp_path):
    args = {"norm_pix_loss": True, "mask_ratio": 0.75, "mask_downsampling": 2}
    file = save_as("a Namespace", weights(pretrained)["model"], args, tmp_path / "lsmae.pth")
    ours = draw(pretrained / "last.pth", photos / "val", tmp_path / "x.png", "--masks", "--mask_unit", 2)
    assert np.array_equal(ours, draw(file, photos / "val", tmp_path / "y.png", "--masks"))
    assert not np.array_equal(ours, draw(pretrained / "last.pth", photos / "val", tmp_path / "y.png", "--masks"))


@pytest.mark.parametrize(
    ("flags", "assumed"),
    [
        ("", ["--norm_pix_loss", "--mask_ratio 0.75", "mae_visualize_*", "--no-norm_pix_loss"]),
        ("--spectrum", ["--norm_pix_loss", "--mask_ratio 0.75"]),
        ("--no-norm_pix_loss", ["--mask_ratio 0.75"]),
        ("--masks", ["--mask_ratio 0.75"]),
        ("--mask_ratio 0.5 --norm_pix_loss", None),
        ("--masks --mask_ratio 0.5", None),
        ("--filter", None),
        ("--pca", None),
    ],
)
def test_a_note_states_the_assumed_settings_of_a_file_without_them(flags, assumed, pretrained, photos, tmp_path):
    torch.save({"model": weights(pretrained)["model"]}, tmp_path / "mae.pth")
    command = ["--checkpoint", tmp_path / "mae.pth", "--images", photos / "val", "--output", tmp_path / "x.png"]
    notes = [line for line in call("visualize", *command, *DEVICE[4:], *flags.split())[:-1] if line[0] != "{"]
    assert len(notes) == (assumed is not None)
    assert all(words in notes[0] for words in assumed or ())
    assert "norm_pix_loss" not in "".join(notes) or "norm_pix_loss" not in flags


@pytest.mark.parametrize("target", ["mae", "hf"])
def test_removed_pixels_do_not_reach_the_predicted_pixels_of_raw_weights(target, photos, tmp_path, monkeypatch):
    """With the true mean of each patch, a model that has learned nothing would show the image."""
    import visualize

    calls = []
    monkeypatch.setattr(visualize, "reconstruct", lambda *args: calls.append(args) or reconstruct(*args))
    run = pretrain(photos, tmp_path / "run", *RAW.split(), "--lowpass_radius", 0, "--epochs", 1) / "last.pth"
    convert(run, tmp_path / target, target)
    draw(tmp_path / target, photos / "val", tmp_path / "x.png")
    ((model, images, noise, args),) = calls
    made = reconstruct(model, images, noise, args)
    removed = (made.masked == 0.5).all(1, keepdim=True).expand_as(images)
    other = reconstruct(model, torch.where(removed, torch.randn_like(images), images), noise, args)
    assert removed.float().mean() == 0.5
    assert torch.equal(made.filled[removed], other.filled[removed])


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
    lines = call("visualize", "--checkpoint", pretrained / "last.pth", "--images", photos / "val", "--output",
                 tmp_path / "x.png", "--spectrum")  # fmt: skip
    assert list(shown) == ["input", "target", "prediction", "error", "r"]
    found = json.loads(lines[0])
    wrong = torch.where(shown["error"] != 0, shown["prediction"] - shown["input"], 0.0).double().numpy()
    k = np.fft.fftfreq(16, 1 / 16)
    low = np.ceil(np.hypot(k[:, None], k)) <= found["radius"]  # the rings up to the radius
    parts = [np.fft.ifft2(np.fft.fft2(wrong) * keep).real for keep in (low, ~low)]
    expected = [255 * np.sqrt(np.square(part).mean()) for part in parts]
    assert [found["rms_below"], found["rms_above"]] == pytest.approx(expected, rel=1e-5)
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
    assert re.search("--filter: .*--pca", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("flag", ["", "--spectrum"])
def test_refuses_an_untrained_model_where_a_decoder_is_needed(flag, photos, tmp_path):
    with pytest.raises(ValueError, match=r"--checkpoint none .*no decoder"):
        draw("none", photos / "val", tmp_path / "x.png", *MODEL, *flag.split())
