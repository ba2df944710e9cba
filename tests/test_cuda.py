"""Every main on a pretended GPU: no tensor stays on the CPU, and the host does not wait between log lines."""

import re
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import PRETRAIN, assert_same_run, call, pretrain, records, result
from pretended_cuda import pretended_cuda

import main_pretrain
from models_pixmim import LowPass, MaskedViT, PixMIM
from util.data.transforms import Normalize

GPU = ["--num_workers", "0", "--device", "cuda"]
ALL = ["--image_every", 1, "--knn_every", 1, "--grad_checkpointing"]
METHODS = {
    "vit": "",
    "mae": "--lowpass_radius 0 --crop rrc --no-norm_pix_loss",
    "centered": "--lowpass centered --mask_unit 2 --input_size 32 --accum_iter 2",
    "cross": "--decoder cross --fuse_levels --predict_ratio 0.5 --class_tokens 3 --pos_embed learned --drop_path 0.1",
    "convvit": "--model convvit_pico --input_size 32",
    "mff": "--model mff_vit_pico --input_size 32",
    "muon": "--optimizer muon --input_size 32 --sizes 16:0.5 32:0.5",
}


@pytest.mark.parametrize("method", METHODS)
def test_pretraining_on_a_pretended_gpu_equals_the_cpu_bit_for_bit(method, photos, tmp_path):
    words = [*ALL, *METHODS[method].split()]
    pretrain(photos, tmp_path / "cpu", *words)
    with pretended_cuda():
        pretrain(photos, tmp_path / "gpu", *words, *GPU, "--seed", 1)
        with pytest.raises(ValueError, match=r"--seed 1, \w+ 0\b"):
            pretrain(photos, tmp_path / "gpu", *words, *GPU)
        pretrain(photos, tmp_path / "gpu", *words, *GPU, "--resume", "none", "--overwrite")
    assert_same_run(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["vit", "cross", "convvit", "mff", "muon"])
def test_loss_in_half_precision_is_close_to_float32(method, amp, photos, tmp_path):
    words = [*METHODS[method].split()]
    pretrain(photos, tmp_path / "off", *words)
    with pretended_cuda():
        pretrain(photos, tmp_path / amp, *words, *GPU, "--amp", amp)
    expected, found = ([x["loss"] for x in records(tmp_path / name)] for name in ("off", amp))
    assert found == pytest.approx(expected, rel=0.03)  # bf16 has 8 bits
    assert found != expected
    scaler = torch.load(tmp_path / amp / "last.pth", weights_only=True)["scaler"]
    assert ("scale" in scaler) == (amp == "fp16")


def test_evaluations_on_a_pretended_gpu_equal_the_cpu(pretrained, photos, masked, tmp_path):
    trained = ["--checkpoint", pretrained / "last.pth", "--amp", "off", "--num_workers", 0]
    steps = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 4]
    heads = ["--pool", "token", "mean", "ep", "--ep_queries", 4]
    dense = ["--data_path", masked, "--short_side", 0]
    mains: dict[str, list] = {
        "knn": ["main_knn", "--data_path", photos],
        "probe": ["main_linprobe", "--data_path", photos, *steps, *heads],
        "finetune": ["main_finetune", "--data_path", photos, *steps, "--aa", "none", "--reprob", 0, "--mixup", 0],
        "linear": ["main_segment", *dense, *steps, "--blr", 0.1, 1],
        "patches": ["main_segment", *dense, "--method", "knn", "--k", 1, 3],
    }
    for name, (main, *words) in mains.items():
        found = []
        for device in ("cpu", "cuda"):
            place = [] if name == "knn" else ["--output_dir", tmp_path / name / device]
            with pretended_cuda() if device == "cuda" else nullcontext():
                found.append(result(main, *trained, *words, *place, "--device", device))
        assert found[0] == found[1], name


def test_features_pictures_and_debug_step_run_on_a_pretended_gpu(cuda, pretrained, photos, masked, tmp_path):
    run, images = pretrain(photos, tmp_path / "run", *GPU, "--amp", "fp16"), photos / "val"
    checkpoint = ["--checkpoint", run / "last.pth"]
    for kind in ([], ["--maps"]):
        output = tmp_path / f"{len(kind)}.npy"
        call("main_features", *checkpoint, *GPU, "--data_path", images, "--output", output, *kind)
    for kind in ("", "--attention", "--pca", "--spectrum", "--masks", "--filter 3"):
        words = [*checkpoint, *GPU[2:], "--images", images, "--output", tmp_path / "x.png"]
        call("visualize", *words, *kind.split())
    probe = [
        "--data_path",
        photos,
        "--pool",
        "ep",
        "--ep_queries",
        4,
        "--output_dir",
        tmp_path / "probe",
        "--batch_size",
        4,
    ]
    call("main_linprobe", *checkpoint, *GPU, *probe, "--epochs", 1, "--warmup_epochs", 0)
    words[1] = tmp_path / "probe/classifier.pth"
    call("visualize", *words, "--ep_attention")
    assert result("main_linprobe", "--eval", "--checkpoint", words[1], *GPU, "--data_path", photos)["n"] == 9
    call("debug_step", run, 3, *GPU[2:])
    batch = torch.load(run / "debug-3.pth", weights_only=True)["batches"][0]
    assert batch["images"].device.type == "cpu"


def test_overflows_of_fp16_are_no_errors_and_debug_step_repeats_them_with_their_loss_scale(
    cuda, photos, tmp_path, monkeypatch
):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    words = [*PRETRAIN, *GPU, "--amp", "fp16", "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 4]
    lines = call("main_pretrain", *words, "--image_every", 0, "--data_path", photos, "--output_dir", tmp_path)
    found = [line for line in lines if line.startswith(("step", "warning: step"))]
    assert [bool(re.match(f"step {n}: .*fp16", line)) for n, line in enumerate(found, 1)] == [True] * 8
    (line,) = [line for line in call("debug_step", tmp_path, 7, *GPU[2:]) if "loss scale" in line]
    assert f"loss scale {2.0**54:g}; not finite: " in line  # halved six times, once before the save after four steps
    assert "not finite: 0" not in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of segmentation-models-pytorch
def test_dpt_runs_on_a_pretended_gpu(cuda, masked, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    sizes = ["--model", "vit_tiny", "--patch_size", 16, "--input_size", 32, "--batch_size", 2, "--epochs", 1]
    words = ["--finetune", "--warmup_epochs", 0, "--data_path", masked, "--output_dir", tmp_path, *GPU, *sizes]
    assert result("main_segment", "--checkpoint", "none", *words)["n"] == 3
    drawn = ["--images", masked, "--output", tmp_path / "x.png", *GPU[2:]]
    call("visualize", "--segment", "--checkpoint", tmp_path / "segmenter.pth", *drawn)


# ---------------------------------------------------------------------------------------------------------- host waits


def waits_of(steps: int, waits: list, main: str, *words) -> Counter:
    """Host waits of one epoch of so many steps, of 16 images in all."""
    del waits[:]
    call(main, *words, *GPU, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 16 // steps, "--log_every", 99)
    return Counter(waits)


@pytest.mark.parametrize("words", ["--amp bf16", "--amp fp16", "--decoder cross --grad_checkpointing"])
def test_no_step_of_pretraining_waits_for_the_device(words, cuda, photos, tmp_path):
    flags = ["main_pretrain", *PRETRAIN, *words.split(), "--data_path", photos, "--image_every", 0]
    two, eight = (waits_of(n, cuda, *flags, "--output_dir", tmp_path / str(n)) for n in (2, 8))
    assert eight == two


def test_no_step_of_finetuning_waits_and_those_of_lars_and_muon_wait_once(cuda, pretrained, photos, tmp_path):
    start = ["--checkpoint", pretrained / "last.pth", "--data_path", photos]
    tune = ["main_finetune", *start]
    probe = ["main_linprobe", *start]
    muon = ["main_pretrain", *PRETRAIN, "--optimizer", "muon", "--data_path", photos, "--image_every", 0]
    for words, waiting in ((tune, 0), (probe, 6), (muon, 6)):
        place = ["--output_dir", tmp_path / words[0]]
        two, eight = (waits_of(n, cuda, *words, *place, "--resume", "none", "--overwrite") for n in (2, 8))
        found = {code.partition(" ")[2][:21]: n for (_, code), n in (eight - two).items()}
        assert found == ({"elif norm.isfinite():": waiting} if waiting else {}), words[0]


def test_a_planted_item_call_is_reported_with_its_line(cuda, photos, tmp_path, monkeypatch):
    def loss_fn(normalize):
        def loss(model, batch):
            loss = model(normalize(batch), batch["noise"])[0]
            loss.item()  # planted
            return loss

        return loss

    monkeypatch.setattr(main_pretrain, "pretrain_loss", loss_fn)
    pretrain(photos, tmp_path, *GPU, "--batch_size", 4)
    line = loss_fn.__code__.co_firstlineno + 3
    steps = 2 * 4 + 1  # two epochs, and the pass that counts operations
    found = Counter(cuda)["aten._local_scalar_dense.default", f"tests/test_cuda.py:{line} loss.item()  # planted"]
    assert found == steps


# --------------------------------------------------------------------------------------------------- planted mistakes


def leave_on_cpu(monkeypatch, owner: type, name: str) -> None:
    """Make a buffer or parameter an attribute that `to` does not move."""
    build = owner.__init__

    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        value = getattr(self, name).detach()
        delattr(self, name)
        setattr(self, name, value)

    monkeypatch.setattr(owner, "__init__", init)


def plant_noise(monkeypatch) -> None:
    forward = PixMIM.forward
    monkeypatch.setattr(PixMIM, "forward", lambda self, images, noise: forward(self, images, noise.cpu()))


def plant_flip(monkeypatch) -> None:
    call = Normalize.__call__
    monkeypatch.setattr(Normalize, "__call__", lambda self, batch: call(self, batch | {"flip": batch["flip"].cpu()}))


def plant_mean(monkeypatch) -> None:
    monkeypatch.setattr(
        Normalize, "__init__", lambda self, args, device: vars(self).update(mean=torch.ones(3, 1, 1), std=1)
    )


MISTAKES = {
    "noise": (plant_noise, "models_pixmim.py"),
    "flip": (plant_flip, "util/data/transforms.py"),
    "mean": (plant_mean, "util/data/transforms.py"),
    "low-pass buffer": (partial(leave_on_cpu, owner=LowPass, name="even"), "models_pixmim.py"),
    "position embedding": (partial(leave_on_cpu, owner=MaskedViT, name="pos_embed"), "models_pixmim.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tensor_left_on_the_cpu_is_an_error_that_names_the_file(mistake, photos, tmp_path, monkeypatch):
    plant, file = MISTAKES[mistake]
    plant(monkeypatch)
    pretrain(photos, tmp_path / "cpu")
    with pretended_cuda(), pytest.raises(RuntimeError, match=f"cuda:0 .*cpu, .* in {file}:"):
        pretrain(photos, tmp_path / "gpu", *GPU)
