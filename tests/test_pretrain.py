"""Pre-training end to end: accumulation, two ranks, errors, log, config, TensorBoard and reconstruction figures."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    DEVICE,
    MODEL,
    PRETRAIN,
    assert_same,
    call,
    ended,
    one_rank,
    pretrain,
    ranks,
    records,
    result,
    spawn,
    weights,
)
from torch import nn
from torch.testing import assert_close

import main_pretrain
from models import build_model, build_target
from models_pixmim import LowPass, mask_from_noise, patch_statistics, patchify, take
from util import run
from util.args import resolve_defaults
from util.checkpoint.state import read_checkpoint, write_checkpoint
from util.data.transforms import Normalize
from util.plots.grids import to_uint8
from util.plots.reconstruction import draw_reconstruction, reconstruct
from util.run import versions, write_config

SIZES = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "1", "--blr", "0.03", "--image_every", "0"]
TRAIN = [*PRETRAIN, *SIZES]


def losses(folder) -> list[float]:
    return [x["loss"] for x in records(folder)]


def assert_close_runs(a, b, tolerance: float) -> None:
    """Losses, momenta (linear in the gradients of all steps) and weights of two runs."""
    assert_close(torch.tensor(losses(a)), torch.tensor(losses(b)), rtol=tolerance, atol=tolerance)
    one, other = weights(a), weights(b)
    moments = ([state["exp_avg"] for state in run["optimizer"]["state"].values()] for run in (one, other))
    for mine, theirs in zip(*moments, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for name, value in one["model"].items():
        moved = other["model"][name]
        if name.endswith("qkv.bias"):  # softmax is invariant to the key bias: its gradient is noise, which Adam scales
            value, moved = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (value, moved))
        elif name.endswith(".kv.bias"):
            value, moved = (x.chunk(2)[1] for x in (value, moved))
        assert_close(value, moved, rtol=0, atol=2e-6)  # a thousandth of the change by the steps


def test_accumulating_two_batches_of_four_equals_one_batch_of_eight(pretrained, photos, tmp_path):
    pretrain(photos, tmp_path, "--batch_size", 4, "--accum_iter", 2)
    assert_close_runs(pretrained, tmp_path, 1e-6)


def test_two_ranks_equal_one_rank_with_twice_the_batch_and_only_rank_0_writes(pretrained, photos, tmp_path):
    flags = ["--data_path", photos, "--output_dir", tmp_path, "--batch_size", 4, "--image_every", 1, "--knn_every", 2]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_pretrain.py"]
    status, out, err = ended(spawn(*torchrun, *TRAIN, *flags))
    assert status == 0, err
    assert_close_runs(pretrained, tmp_path, 1e-5)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert [x["step"] for x in records(tmp_path)] == [1, 2, 3, 4]
    assert out.count("effective batch 8") == 1
    assert json.loads((tmp_path / "config.json").read_text())["world_size"] == 2
    (shared,) = records(tmp_path, "knn_acc1")  # every image counts once, as on one rank
    alone = result("main_knn", "--checkpoint", tmp_path / "last.pth", "--data_path", photos, *DEVICE)
    assert alone.pop("knn_features") == "before_norm"
    alone = {name: x for name, x in alone.items() if name not in ("acc1_after_norm", "k", "temperature")}
    assert shared == {"epoch": 2, "knn_features": "before_norm"} | {f"knn_{name}": x for name, x in alone.items()}


def test_muon_is_the_same_with_accumulation_and_on_two_ranks_and_resumes_only_as_muon(photos, tmp_path):
    muon = ["--optimizer", "muon", "--batch_size", 4]
    pretrain(photos, tmp_path / "one", *muon, "--batch_size", 8)
    pretrain(photos, tmp_path / "accumulated", *muon, "--accum_iter", 2)
    flags = [*muon, "--data_path", photos, "--output_dir", tmp_path / "ranks"]
    for status, _, err in ranks(2, "main_pretrain.py", *TRAIN, *flags):
        assert status == 0, err
    one, *others = (weights(tmp_path / name)["model"] for name in ("one", "accumulated", "ranks"))
    for name in (name for name in one if not name.endswith("qkv.bias")):  # see assert_close_runs
        for other in others:  # of a change of 4e-4 by the steps; bfloat16's rounding in the iteration
            assert (one[name] - other[name]).square().mean().sqrt() < 1e-5, name
    with pytest.raises(ValueError, match=r"--optimizer muon, \w+ adamw; .*--checkpoint"):
        pretrain(photos, tmp_path / "one")


def test_each_image_is_used_at_most_once_per_epoch_and_the_incomplete_batch_is_dropped(photos, tmp_path):
    pretrain(photos, tmp_path, "--batch_size", 5)
    assert [x["epoch"] for x in records(tmp_path)] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])  # 16 // 5 steps


# --------------------------------------------------------------------------------------------------------------- errors


def test_uncommitted_changes_and_new_modules_are_saved_beside_the_configuration(tmp_path, monkeypatch):
    """`git apply` of the saved file in a fresh clone gives the code of the run."""
    run, code = one_rank(tmp_path / "out"), tmp_path / "code"
    (code / "util").mkdir(parents=True)
    run.folder.mkdir()
    (code / "util" / "run.py").write_text("a\n")
    git = "git", "-c", "user.name=x", "-c", "user.email=x@x"
    for command in ("init -q", "add .", "commit -qm x"):
        subprocess.run([*git, *command.split()], cwd=code, check=True)
    monkeypatch.setattr("util.run.__file__", str(code / "util" / "run.py"))
    monkeypatch.setattr("util.run.versions", versions.__wrapped__)
    saved = run.folder / "changes.diff"
    write_config(run)
    assert not saved.exists()
    (code / "util" / "run.py").write_text("a\nb \n")
    (code / "models_new.py").write_text("c = 1\n")
    (code / "notes.txt").write_text("not code")
    write_config(run)
    assert json.loads((run.folder / "config.json").read_text())["commit"].endswith("-dirty")
    subprocess.run([*git, "clone", "-q", code, tmp_path / "clone"], check=True)
    subprocess.run([*git, "apply", saved], cwd=tmp_path / "clone", check=True)
    found = {path.name: path.read_text() for path in (tmp_path / "clone").rglob("*.*") if ".git" not in path.parts}
    assert found == {"run.py": "a\nb \n", "models_new.py": "c = 1\n"}
    subprocess.run([*git, "checkout", "-q", "."], cwd=code, check=True)
    (code / "models_new.py").unlink()
    write_config(run)
    assert not saved.exists()


def test_a_run_with_defaults_accepts_flags_with_the_same_effect(pretrained, photos, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pth")
    older = dict.fromkeys(("lowpass_radius", "crop_interpolation", "mean", "std", "patch_size"))  # of earlier versions
    assert content["args"]["lowpass_radius"] == pytest.approx(40 * 16 / 224)
    write_checkpoint(tmp_path / "run" / "last.pth", content | {"args": content["args"] | older})
    same = {
        "lowpass_radius": 40 * 16 / 224, "crop_interpolation": "bilinear", "crop_pct": 0.875, "class_tokens": 1,
        "predict_ratio": 0.75, "alpha": "auto",
    }  # fmt: skip
    pretrain(photos, tmp_path / "run", *(word for name, value in same.items() for word in (f"--{name}", value)))
    other = {"lowpass_radius": 3, "crop_pct": 0.9, "class_tokens": 2, "predict_ratio": 0.5, "alpha": "drop"}
    for name, value in other.items():
        with pytest.raises(ValueError, match=rf"--{name} .*, not {value}"):
            pretrain(photos, tmp_path / "run", f"--{name}", value)
    with pytest.raises(ValueError, match=r"last\.pth .*fit this model"):
        pretrain(photos, tmp_path / "run", "--patch_size", 4)


def test_commit_is_none_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.__wrapped__()["commit"] is None


def test_nonfinite_loss_stops_every_rank_with_one_line(photos, tmp_path):
    flags = ["--data_path", photos, "--output_dir", tmp_path, "--batch_size", 4, "--blr", "1e9", "--warmup_epochs", 0]
    flags += ["--max_skipped", 0]
    for rank, (status, _, err) in enumerate(ranks(2, "main_pretrain.py", *TRAIN, *flags)):
        assert status == 1
        line = next(line for line in err.splitlines() if "error" in line)
        start = rf"main_pretrain\.py \(rank {rank}\): error: .*step 2, .*--max_skipped 0 .*no checkpoint"
        assert re.match(start, line), err
        assert "Traceback" not in err
    assert not (tmp_path / "last.pth").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input_size 225 224", "225 x 224 .*patch size 8"),
        ("--decoder_heads 5", "width 32 .* 5 .*heads"),
        ("--decoder_dim 30", "width 30"),
        ("--in_chans 4", "--mean: 0 .*--in_chans 4"),
        ("--amp fp16", "--amp fp16 .*GPU"),
    ],
)
def test_errors_name_incompatible_sizes_and_settings(flags, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain(photos, tmp_path, *flags.split())


# --------------------------------------------------------------------------------------------------------- output files


def test_log_has_one_object_for_each_log_step(pretrained, photos):
    log = records(pretrained)
    fields = ["step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "tflops", "memory_gib"]
    assert [list(x) for x in log] == [fields] * 4
    assert [(x["step"], x["epoch"]) for x in log] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    peak = 0.03 * 8 / 256  # 2 steps of warm-up from 0, then half a cosine over 2 steps
    assert [x["lr"] for x in log] == pytest.approx([0, peak / 2, peak, peak / 2])
    assert all(0 <= x["data_wait"] <= 1 and x["images_per_s"] > 0 and x["memory_gib"] > 0 for x in log)


def test_log_lines_average_the_steps_since_the_last_one(pretrained, photos, tmp_path):
    pretrain(photos, tmp_path, "--log_every", 2)
    each = losses(pretrained)
    assert losses(tmp_path) == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2], rel=1e-6)


def test_config_contains_arguments_versions_commit_command_and_world_size(pretrained):
    config = json.loads((pretrained / "config.json").read_text())
    assert config["args"] == weights(pretrained)["args"]
    assert (config["world_size"], config["batch"], config["device"]) == (1, 8, "cpu")
    assert config["torch"] == torch.__version__
    assert {"commit", "python", "torchvision", "timm"} <= config.keys()
    assert config["command"][1] == "main_pretrain.py"
    assert "--mask_unit" not in config["command"]
    assert str(pretrained) in config["command"]


def test_console_lines_show_progress_speed_and_time_left(photos, tmp_path):
    flags = [*TRAIN, "--epochs", 1, "--warmup_epochs", 0, "--data_path", photos, "--output_dir", tmp_path]
    found, head, first_step, first, second, *_, last = call("main_pretrain", *flags, "--blr", 0.0256)
    assert found.startswith(f"--data_path {photos}/train: 16 images, ")
    assert re.fullmatch(rf"1 x cpu, .*8 \(8 x 1 x 1\), .*0\.0008, .*{tmp_path}", head)
    line = r"epoch {}  step {}/2  loss \d\.\d{{4}}  lr \d\.\d\de[+-]\d\d  \d+ images/s  \S+ TFLOP/s  data wait \d+%  \d+\.\d GiB  \d:\d\d:\d\d left"
    assert re.fullmatch(r"first step: \d+\.\d s .*", first_step)
    assert re.fullmatch(line.format("0.50", 1), first)
    assert re.fullmatch(line.format("1.00", 2), second)
    assert last == f"1 epochs finished: {tmp_path}/last.pth"


def test_tensorboard_steps_are_thousandths_of_an_epoch_for_scalars_and_images(pretrained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(pretrained / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [500, 1000, 1500, 2000]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(pretrained), rel=1e-6)
    assert [event.step for event in events.Images("reconstruction")] == [1000, 2000]
    assert [event.step for event in events.Images("spectrum")] == [1000, 2000]
    below, above = ([e.value for e in events.Scalars(f"error_{side}_cutoff")] for side in ("below", "above"))
    assert len(below) == len(above) == 2
    assert min(below + above) > 0


# ------------------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize(
    "flags",
    [
        "--lowpass_radius 0 --crop rrc",
        "--amp bf16",
        "--input_size 16 24 --mask_unit 2 --lowpass centered --crop_interpolation bicubic --no-norm_pix_loss",
        "--grad_checkpointing",
        "--in_chans 1 --mean 0.5 --std 0.25",
        "--knn_every 1",
    ],
)
def test_other_settings_train_without_error(flags, photos, tmp_path):
    pretrain(photos, tmp_path, "--epochs", 1, *flags.split())
    assert len(losses(tmp_path)) == 2
    if "knn" in flags:
        (knn,) = records(tmp_path, "knn_acc1")
        assert (knn["epoch"], knn["knn_n"]) == (1, 9)


def test_grad_checkpointing_does_not_change_the_weights(pretrained, photos, tmp_path):
    pretrain(photos, tmp_path, "--epochs", 2, "--grad_checkpointing")
    assert_same(weights(pretrained)["model"], weights(tmp_path)["model"])


def test_knn_and_images_do_not_change_the_weights(pretrained, photos, tmp_path):
    pretrain(photos, tmp_path, "--knn_every", 1)
    assert_same(weights(pretrained)["model"], weights(tmp_path)["model"])


def test_bf16_losses_are_near_those_of_float32(pretrained, photos, tmp_path):
    pretrain(photos, tmp_path, "--amp", "bf16")
    assert losses(tmp_path) == pytest.approx(losses(pretrained), rel=0.02)  # 8 bits of mantissa


# ------------------------------------------------------------------------------------------------------- reconstruction


class FixedPrediction(nn.Module):
    """Decoder that returns a fixed prediction."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, tokens, mask):
        return self.answer


def parse(*flags: str):
    return resolve_defaults(main_pretrain.get_parser().parse_args([*MODEL, *PRETRAIN, "--data_path", "x", *flags]))


def test_reconstructions_of_grey_images_are_drawn_in_grey(monkeypatch):
    args, drawn = parse("--no-norm_pix_loss"), {}
    model = build_model(args)
    grey = torch.randint(0, 256, (2, 16, 16, 1), dtype=torch.uint8)
    for images, is_grey in ((grey.expand(-1, -1, -1, 3), True), (torch.cat([grey, grey, 255 - grey], 3), False)):
        monkeypatch.setattr("util.plots.reconstruction.draw_columns", drawn.update)
        normalised = Normalize(args, CPU)({"images": images})
        draw_reconstruction(reconstruct(model, normalised, torch.rand(2, model.noise_length), args))
        prediction = next(x for label, x in drawn.items() if label.startswith("prediction"))
        assert (prediction == prediction[..., :1]).all() == is_grey


def columns(monkeypatch, flags: str, perfect: bool = True):
    """(figure columns, images, target, mask) of a model that predicts its target exactly (`perfect`) or an untrained one."""
    args = parse(*flags.split())
    model = build_model(args)
    pixels = torch.randint(0, 256, (3, 4, 4, args.in_chans), dtype=torch.uint8).repeat_interleave(6, 1)
    batch = {
        "images": pixels.repeat_interleave(4, 2).repeat_interleave(args.input_size[1] // 16, 2)[:, : args.input_size[0]]
    }
    images, noise = Normalize(args, CPU)(batch), torch.rand(3, model.noise_length)
    mask = mask_from_noise(noise, args.mask_ratio, model.encoder.grid, args.mask_unit)
    target = model.target(images)
    if perfect:
        answer = take(patchify(target, 8), mask.predict)
        if args.norm_pix_loss:
            mean, std = patch_statistics(answer)
            answer = (answer - mean) / std
        model.decoder = FixedPrediction(answer)
    drawn = {}
    monkeypatch.setattr("util.plots.reconstruction.draw_columns", drawn.update)
    draw_reconstruction(reconstruct(model, images, noise, args))
    mean, std = (
        torch.tensor(x).view(-1, 1, 1) for x in (args.mean or (0.485, 0.456, 0.406), args.std or (0.229, 0.224, 0.225))
    )
    target = to_uint8(target * std + mean)
    removed = mask.removed.unflatten(1, model.encoder.grid).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    return drawn, to_uint8(images * std + mean), target, removed


@pytest.mark.parametrize("flags", ["", "--no-norm_pix_loss", "--lowpass_radius 0", "--in_chans 1 --mean 0.4 --std 0.3"])
def test_perfect_prediction_shows_the_target_at_masked_patches(flags, monkeypatch):
    drawn, pixels, target, removed = columns(monkeypatch, flags)
    (prediction,) = (value for label, value in drawn.items() if label.startswith("prediction"))
    assert np.array_equal(drawn["input"], pixels)
    assert np.array_equal(prediction[~removed], pixels[~removed])
    assert abs(prediction[removed].astype(int) - target[removed]).max() <= 1  # a rounding of 1/255
    assert np.array_equal(drawn["masked input"][~removed], pixels[~removed])
    assert set(np.unique(drawn["masked input"][removed])) <= {127, 128}  # grey
    if "lowpass_radius" not in flags:
        (shown,) = (value for label, value in drawn.items() if label.startswith("low-pass target, r = 2.85714"))
        assert np.array_equal(shown, target)
        assert abs(target.astype(int) - pixels).max() > 20  # the filter changes the image


def test_reconstruction_error_covers_only_masked_patches():
    args = parse()
    model = build_model(args)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 4)
    loss, _, mask = model(images, noise)
    error = patchify(reconstruct(model, images, noise, args).error, 8)
    assert error[~mask.removed].abs().max() == 0
    _, scale = patch_statistics(take(patchify(model.target(images), 8), mask.predict))
    std = torch.tensor([0.229, 0.224, 0.225]).repeat(64)
    assert_close((take(error, mask.predict) / std / scale).square().mean(), loss, rtol=1e-4, atol=0)


def test_labels_state_how_the_prediction_is_denormalized(monkeypatch):
    assert "prediction (true patch mean and std)" in columns(monkeypatch, "")[0]
    assert "prediction (pixels)" in columns(monkeypatch, "--no-norm_pix_loss --lowpass_radius 0")[0]


def test_lowpass_removes_every_kept_frequency_from_the_residual():
    args = parse("--lowpass", "centered")
    target, images = build_target(args), torch.randn(1, 3, 16, 16)
    assert isinstance(target, LowPass)
    rest = images - target(images)
    low = torch.fft.fft2(rest * target.std)  # no frequency that the filter keeps remains
    assert low.abs()[0, :, :2, :2].max() < 1e-4


def test_reconstruction_figure_has_one_labelled_row_per_image():
    args = parse()
    model = build_model(args)
    picture = draw_reconstruction(reconstruct(model, torch.randn(2, 3, 16, 16), torch.rand(2, 4), args))
    assert picture.dtype == np.uint8
    zoomed = 16 * 14  # 224 px of each column
    assert picture.shape[1:] == (8 + 5 * (zoomed + 8), 3)
    header = picture.shape[0] - 2 * (zoomed + 8)
    assert header == 2 * 24 + 8  # the longest label, of the prediction, takes two lines of 1.2 x 20 px
    assert model.training  # unchanged


def test_default_lowpass_radius_scales_with_the_shorter_side():
    assert parse("--input_size", "224").lowpass_radius == 40
    assert parse("--input_size", "448", "560").lowpass_radius == 80
    assert parse("--lowpass_radius", "7").lowpass_radius == 7


def test_warns_if_the_cpu_has_no_bf16(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "cpu_has_bf16", lambda: False)
    words = [*TRAIN, "--epochs", 1, "--data_path", photos, "--output_dir", tmp_path]
    assert call("main_pretrain", *words, "--amp", "bf16")[1].startswith("warning: --amp bf16: this CPU")
    lines = call("main_pretrain", *words, "--amp", "off", "--resume", "none", "--overwrite")
    assert not [line for line in lines if "bfloat16" in line]
