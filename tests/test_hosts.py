"""ConvMAE, MFF, LSMAE and a custom encoder through pre-training, kNN, probe, fine-tuning, visualisation and conversion."""

import json
import re
from argparse import Namespace
from functools import cache, partial
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    DEVICE,
    PRETRAIN,
    assert_same,
    free_ports,
    interrupted,
    one_rank,
    pretrain,
    ranks,
    records,
    result,
    weights,
)
from test_classify import TUNE, knn, tune
from test_models import slow_loss
from test_pretrain import SIZES, assert_close_runs, losses
from test_visualize import draw
from torch import Tensor, nn
from torch.testing import assert_close

import main_finetune
import main_pretrain
from models import ENCODERS, build_encoder, build_model
from models_convmae import ConvViT
from models_pixmim import LowPass, MaskedViT, PixMIM, mask_from_noise
from util.args import resolve_defaults
from util.data.batches import load_batch
from util.data.samples import Samples
from util.data.sources import labelled_sources
from util.data.transforms import Normalize, eval_transform
from util.evaluate.encoder import MODEL_FLAGS, Encoder, load_encoder, pooling
from util.evaluate.knn import find_neighbours
from util.formats.keys import FUSION, pixmim_names, rename, to_timm
from util.formats.read import read_weights
from util.plots.reconstruction import draw_reconstruction, reconstruct
from visualize import find_images

HOSTS = {  # patches of 8 px; the stages of ConvMAE have patches of 2 and 4 px
    "convvit": "--model convvit_pico --input_size 32 48",
    "mff": "--model mff_vit_pico --input_size 32",
    "lsmae": "--model vit_pico --input_size 40 56 --mask_unit 2 --decoder_dim 48 --decoder_heads 3",  # grid 5 x 7
}
DEEP = {"deep": "--model mff_vit_tiny --input_size 32"}  # MFF with twelve layers
METHODS = {"PixMIM": "", "raw pixels": "--lowpass_radius 0 --crop rrc"}
every_host = pytest.mark.parametrize("host", HOSTS)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """(host, more flags) -> folder of a run of 2 epochs of 2 steps, shared by all tests. Copy it before changing it."""

    @cache
    def run(host: str, flags: str = ""):
        words = f"{(HOSTS | DEEP)[host]} --knn_every 2 {flags}".split()
        return pretrain(photos, tmp_path_factory.mktemp(host), *words)

    return run


def parse_flags(host: str, flags: str = "") -> Namespace:
    words = [*PRETRAIN, *(HOSTS | DEEP)[host].split(), *flags.split()]
    return resolve_defaults(main_pretrain.get_parser().parse_args([*words, "--data_path", "x"]))


def build_inputs(args: Namespace) -> tuple[PixMIM, Tensor, Tensor]:
    """(model, images, noise); the same in every call with the same sizes."""
    torch.manual_seed(0)
    model = build_model(args)
    torch.manual_seed(1)
    return model, torch.randn(2, 3, *args.input_size), torch.rand(2, model.noise_length)


# --------------------------------------------------------------------------------------------------------- pre-training


@every_host
def test_target_is_low_passed_or_with_radius_0_raw(host):
    predictions, found = [], []
    for flags in METHODS.values():
        model, images, noise = build_inputs(parse_flags(host, flags))
        loss, prediction, mask = model(images, noise)
        assert loss.item() == pytest.approx(slow_loss(model, images, prediction, mask), rel=1e-5)
        predictions.append(prediction)
        found.append(model.target)
    assert torch.equal(*predictions)  # the method does not change the encoder
    assert [type(target) for target in found] == [LowPass, nn.Identity]


@every_host
@every_method
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_run(
    host, method, trained, photos, tmp_path, monkeypatch
):
    words = f"{HOSTS[host]} {METHODS[method]}".split()
    assert interrupted(monkeypatch, 2, lambda: pretrain(photos, tmp_path, *words)) == 75  # in the second epoch
    assert weights(tmp_path)["progress"]["step"] == 1
    pretrain(photos, tmp_path, *words)
    one, other = weights(trained(host, METHODS[method])), weights(tmp_path)
    for part in ("model", "optimizer", "scaler", "progress"):
        assert_same(one[part], other[part])
    assert losses(tmp_path) == losses(trained(host, METHODS[method]))


@every_host
def test_accumulating_two_batches_of_4_equals_a_batch_of_8(host, trained, photos, tmp_path):
    pretrain(photos, tmp_path, *HOSTS[host].split(), "--batch_size", 4, "--accum_iter", 2)
    assert_close_runs(trained(host), tmp_path, 1e-6)


@every_host
def test_bf16_losses_are_close_but_not_equal_to_float32(host, trained, photos, tmp_path):
    pretrain(photos, tmp_path, *HOSTS[host].split(), "--amp", "bf16")
    assert losses(tmp_path) == pytest.approx(losses(trained(host)), rel=0.02)  # 8 bits of mantissa
    assert all(mine != theirs for mine, theirs in zip(losses(tmp_path), losses(trained(host)), strict=True))


@every_host
def test_gradient_checkpointing_gives_the_same_weights(host, trained, photos, tmp_path):
    pretrain(photos, tmp_path, *HOSTS[host].split(), "--grad_checkpointing")
    assert_same(weights(trained(host))["model"], weights(tmp_path)["model"])


@every_host
@pytest.mark.parametrize("flag", ["", "--grad_checkpointing"], ids=["stored", "recomputed"])
def test_gradient_checkpointing_computes_every_block_twice(host, flag):
    model, images, noise = build_inputs(parse_flags(host, flag))
    calls = dict.fromkeys((n for n, _ in model.named_modules() if re.search(r"blocks\d?\.\d+$", n)), 0)
    for name in calls:

        def count(*_, name=name):
            calls[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)
    model(images, noise)[0].backward()
    assert len(calls) == 1 + (1 + 1 + 2 if host == "convvit" else 2)
    assert set(calls.values()) == {2 if flag else 1}


@every_host
def test_the_compiled_model_is_one_graph_with_equal_loss_and_gradients(host):
    """Without inductor, which takes minutes: a graph break is an error here."""
    model, images, noise = build_inputs(parse_flags(host))
    losses, gradients = [], []
    for run in (model, torch.compile(model, dynamic=False, fullgraph=True, backend="eager")):
        model.zero_grad()
        loss = run(images, noise)[0]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert_close(*losses, rtol=1e-6, atol=0)
    assert_close(*gradients, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ two ranks

JOBS = """
import importlib, json, os, sys
for port, name, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], sys.argv[1:] = str(port), words
    importlib.import_module(name).main()
"""
PLAIN = ["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--drop_path", "0"]  # no random numbers of a rank


@pytest.fixture(scope="module")
def on_two_ranks(trained, photos, tmp_path_factory):
    """Folder with the runs of all hosts, and of ConvMAE's fine-tuning, on two ranks with batches of 4."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {host: ["main_pretrain", [*PRETRAIN, *SIZES, *flags.split()]] for host, flags in HOSTS.items()}
    checkpoint = str(trained("convvit") / "last.pth")
    jobs["tuned"] = ["main_finetune", [*DEVICE, *TUNE, *PLAIN, "--checkpoint", checkpoint]]
    ports = free_ports(len(jobs))  # one per job, so that no rank joins an earlier group
    commands = []
    for (name, (main, words)), port in zip(jobs.items(), ports, strict=True):
        place = ["--data_path", str(photos), "--output_dir", str(folder / name), "--batch_size", "4"]
        commands.append([port, main, [*words, *place]])
    for status, _, err in ranks(2, "-c", JOBS, json.dumps(commands)):
        assert status == 0, err
    return folder


@every_host
def test_two_ranks_equal_one_rank_with_twice_the_batch(host, on_two_ranks, trained):
    assert json.loads((on_two_ranks / host / "config.json").read_text())["world_size"] == 2
    assert_close_runs(trained(host), on_two_ranks / host, 1e-5)


def test_fine_tuning_convmae_on_two_ranks_equals_one_rank(on_two_ranks, trained, photos, tmp_path):
    tune(tmp_path, photos, trained("convvit") / "last.pth", *PLAIN)
    assert_close_runs(tmp_path, on_two_ranks / "tuned", 1e-5)
    before, after = to_timm(weights(trained("convvit"))["model"]), weights(on_two_ranks / "tuned")["model"]
    assert after.keys() ^ before.keys() == {f"{x}.{y}" for x in ("norm", "fc_norm", "head") for y in ("weight", "bias")}
    assert not [name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])]


# ------------------------------------------------------------------------------------------------- features and probes


def reference(host: str, state: dict, size: tuple[int, int], grid: tuple[int, int]) -> Encoder:
    """timm's ViT or a ConvViT with the weights of a checkpoint that was trained at `grid`."""
    if host == "convvit":
        model: Encoder = ConvViT(size, 8, embed_dim=(16, 24, 48), depth=(1, 1, 2), num_heads=3)
        del model.stage1_output_decode, model.stage2_output_decode
    else:
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        sizes = {"img_size": size, "patch_size": 8, "embed_dim": state["pos_embed"].shape[-1], "depth": depth}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    own = {name: value for name, value in state.items() if name in model.state_dict()}
    place = own["pos_embed"][:, -grid[0] * grid[1] :].unflatten(1, grid).permute(0, 3, 1, 2)
    place = F.interpolate(place, [side // 8 for side in size], mode="bicubic", align_corners=False)
    prefix = own["pos_embed"][:, : -grid[0] * grid[1]]
    model.load_state_dict(own | {"pos_embed": torch.cat([prefix, place.flatten(2).mT], dim=1)})
    return model.eval()


def pool_features(model: Encoder, images: Tensor, pool: str | None) -> list[Tensor]:
    """Features of images after and before the final norm, by definition."""
    if isinstance(model, ConvViT):
        mean = model.stages(images, None)[2].mean(1)
        return [F.layer_norm(mean, (48,), eps=1e-6), mean]
    before = model.blocks(model._pos_embed(model.patch_embed(images)))
    return [x[:, 1:].mean(1) if pool == "mean" else x[:, 0] for x in (model.norm(before), before)]


def knn_features(monkeypatch, checkpoint, photos, *words) -> list[Tensor]:
    """Features of train/ and val/, of unit length, that main_knn compares: after and before the final norm."""
    seen = []

    def record(world, bank, index, queries, k):
        seen.append(torch.cat([bank, queries]))
        return find_neighbours(world, bank, index, queries, k)

    monkeypatch.setattr("util.evaluate.knn.find_neighbours", record)
    knn(checkpoint, photos, *words)
    return seen


def normalised_photos(photos, size: tuple[int, int]) -> Tensor:
    """All images of train/ and val/, prepared for evaluation."""
    args, parts = one_rank(photos).args, []
    for source in labelled_sources(str(photos)):
        samples = Samples(source, eval_transform(size), args)
        parts.append(Normalize(args, CPU)(load_batch(samples, range(len(samples)), CPU)))
    return torch.cat(parts)


@every_host
@pytest.mark.parametrize(
    ("pool", "size"),
    [(None, None), ("mean", None), (None, (48, 24)), ("mean", (48, 32))],
    ids=["default", "mean", "48 x 24", "mean, 48 x 32"],
)
def test_knn_features_equal_the_reference_at_any_input_size(host, pool, size, trained, photos, monkeypatch):
    args, state = parse_flags(host), weights(trained(host))["model"]
    words = [*["--pool", pool] * bool(pool), *["--input_size", *(size or ())] * bool(size)]
    found = knn_features(monkeypatch, trained(host) / "last.pth", photos, *words)
    height, width = args.input_size
    model = reference(host, state, size or args.input_size, (height // 8, width // 8))
    expected = pool_features(model, normalised_photos(photos, size or args.input_size), pool)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, F.normalize(theirs, dim=1).detach(), rtol=0, atol=1e-5)
        assert torch.pdist(ours).min() > 1e-3  # 100 times the tolerance: images differ
    assert (found[0] - found[1]).abs().max() > 1e-3


@every_host
def test_knn_accuracy_in_the_run_equals_that_of_its_checkpoint(host, trained, photos):
    (during,) = records(trained(host), "knn_acc1")
    after = knn(trained(host) / "last.pth", photos)
    assert after.pop("knn_features") == "before_norm"
    assert (after.pop("k"), after.pop("temperature")) == (20, 0.07)
    after.pop("acc1_after_norm")
    assert during == {"epoch": 2, "knn_features": "before_norm"} | {f"knn_{name}": x for name, x in after.items()}


def probe(folder, photos, checkpoint, *words) -> dict:
    flags = ["--epochs", 1, "--batch_size", 8, "--warmup_epochs", 0, "--blr", 3]
    place = ["--checkpoint", checkpoint, "--data_path", photos, "--output_dir", folder]
    return result("main_linprobe", *DEVICE, *flags, *place, *words)


@every_host
@pytest.mark.parametrize("pool", [None, "mean"], ids=["default pool", "mean"])
def test_a_probe_keeps_the_encoder_and_eval_repeats_its_scores(host, pool, trained, photos, tmp_path):
    best = probe(tmp_path, photos, trained(host) / "last.pth", *["--pool", pool] * bool(pool))
    after, before = weights(tmp_path)["model"], to_timm(weights(trained(host))["model"])
    assert_same({name: value for name, value in after.items() if not name.startswith("heads.")}, before)
    assert after["heads.0.head.bias"].norm() > 0
    flags = ["--eval", "--checkpoint", tmp_path / "classifier.pth", "--data_path", photos, *DEVICE]
    again = result("main_linprobe", *flags)
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)  # the batch norm is folded into the head


def test_a_probe_of_a_probe_keeps_its_pooling(trained, photos, tmp_path):
    probe(tmp_path / "first", photos, trained("mff") / "last.pth", "--pool", "mean")
    best = probe(tmp_path / "second", photos, tmp_path / "first" / "classifier.pth")
    saved = torch.load(tmp_path / "second" / "classifier.pth", weights_only=True)
    assert saved["args"]["pool"] == "mean"
    flags = ["--eval", "--checkpoint", tmp_path / "second" / "classifier.pth", "--data_path", photos, *DEVICE]
    again = result("main_linprobe", *flags)
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)


@pytest.mark.parametrize(
    ("host", "flags", "message"),
    [
        ("convvit", "--model vit_pico", "convvit.*--model vit_pico: missing: .* and .* more; unknown: "),
        ("lsmae", "--model convvit_pico", "vit.*--model convvit_pico: missing: "),
        ("lsmae", "--patch_size 16 --input_size 32", "--patch_size 16: .* has 8"),
        ("convvit", "--model vit_pico --input_size 48 48", "convvit.*--model vit_pico"),
    ],
)
def test_knn_refuses_another_model_or_patch_size_in_one_line(host, flags, message, trained, photos):
    with pytest.raises(ValueError, match=message) as caught:
        knn(trained(host) / "last.pth", photos, *flags.split())
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("host", "flags", "message"),
    [
        ("deep", "--fuse_layers 3 11", "6 layers, not 2.*--fuse_layers"),
        ("convvit", "--model vit_pico", "--model vit_pico .*--input_size"),
        ("lsmae", "--decoder_dim 96", "--decoder_[*].* decoder.mask_token"),
    ],
)
def test_visualize_refuses_flags_that_contradict_the_checkpoint_in_one_line(
    host, flags, message, trained, photos, tmp_path
):
    with pytest.raises(ValueError, match=message) as caught:
        draw(trained(host) / "last.pth", photos / "val", tmp_path / "x.png", *flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ENCODERS)
def test_conversion_drops_the_layers_used_in_pre_training_only(name):
    with torch.device("meta"):
        encoder = ENCODERS[name]()
    left = {key for key in encoder.state_dict() if key.split(".")[0] in encoder.pretraining_only}
    assert left == {key for key in encoder.state_dict() if FUSION.fullmatch(key)}


@pytest.mark.parametrize("main", ["main_knn", "main_linprobe"])
def test_pool_token_is_refused_for_convmae(main, trained, photos, tmp_path):
    flags = ["--checkpoint", trained("convvit") / "last.pth", "--data_path", photos, "--pool", "token", *DEVICE]
    output = ["--output_dir", tmp_path / "new"] if main == "main_linprobe" else []
    with pytest.raises(ValueError, match=r"^--pool token: .*--pool mean$"):
        result(main, *flags, *output)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def tuned(trained, photos, tmp_path_factory):
    """host -> (folder, result) of one epoch of fine-tuning; LSMAE at another input size than in pre-training."""

    @cache
    def run(host: str):
        folder = tmp_path_factory.mktemp(f"tuned-{host}")
        words = ["--epochs", 1, *["--input_size", 24, 32] * (host == "lsmae")]
        return folder, tune(folder, photos, trained(host) / "last.pth", *words)

    return run


@every_host
def test_eval_of_a_fine_tuned_classifier_repeats_its_scores(host, tuned, photos):
    folder, last = tuned(host)
    flags = ["--checkpoint", folder / "classifier.pth", "--data_path", photos, *DEVICE]
    assert result("main_finetune", *flags, "--eval") == last


@pytest.mark.parametrize("host", ["mff", "lsmae"])
def test_a_fine_tuned_classifier_gives_the_same_logits_in_timm(host, tuned):
    path = tuned(host)[0] / "classifier.pth"
    size = (24, 32) if host == "lsmae" else (32, 32)
    options = {"img_size": size, "patch_size": 8, "num_classes": 3, "global_pool": "avg"}
    options |= {"embed_dim": 48, "depth": 2}
    theirs = timm.create_model("vit_tiny_patch16_224", **options, checkpoint_path=str(path)).eval()
    file = read_weights(path)
    assert file.state.keys() == theirs.state_dict().keys()
    args = main_finetune.get_parser().parse_args(["--checkpoint", str(path), "--data_path", "x"])
    args = Namespace(**vars(args) | {name: file.args.get(name) for name in MODEL_FLAGS})
    ours = load_encoder(args, build_encoder, file, num_classes=3, **pooling(file)).eval()
    images = torch.randn(5, 3, *size)
    logits = theirs(images)
    assert_close(ours(images), logits, rtol=1e-5, atol=1e-7)
    assert torch.pdist(logits.detach()).min() > 1e-5  # logits depend on the image


def test_convmae_classifiers_have_the_keys_of_its_repository(tuned, trained, photos, tmp_path):
    probe(tmp_path, photos, trained("convvit") / "last.pth")
    before = weights(trained("convvit"))["model"]
    decoder = {name for name in before if name.startswith(("decoder", "mask_token"))}
    fused = {f"{x}.{y}" for x in ("stage1_output_decode", "stage2_output_decode", "norm") for y in ("weight", "bias")}
    assert fused <= before.keys()
    learned = {f"{x}.{y}" for x in ("fc_norm", "head") for y in ("weight", "bias")}
    for folder, is_learned in ((tuned("convvit")[0], True), (tmp_path, False)):
        after = torch.load(folder / "classifier.pth", weights_only=True)["model"]
        assert after.keys() == before.keys() - decoder - fused | learned
        assert after["fc_norm.bias"].any() == is_learned


# ------------------------------------------------------------------------------------------------------------- pictures


def cells(picture: np.ndarray, size: tuple[int, int], rows: int) -> list[np.ndarray]:
    """Columns (B, H, W, 3) of a picture, scaled back to the input size."""
    zoom = max(1, round(224 / size[1]))
    height, width = (side * zoom for side in size)
    header = picture.shape[0] - rows * (height + 8)
    return [
        np.stack([picture[header + row * (height + 8) :, left:][:height:zoom, :width:zoom] for row in range(rows)])
        for left in range(8, picture.shape[1], width + 8)
    ]


@pytest.mark.parametrize(
    ("host", "flags"),
    [(host, flags) for host in HOSTS for flags in METHODS.values()] + [("deep", "--fuse_layers 3 7 11")],
)
def test_visualize_draws_the_reconstruction_of_the_runs_model(host, flags, trained, photos, tmp_path):
    args = parse_flags(host, flags)
    model = build_model(args)
    model.load_state_dict(pixmim_names(weights(trained(host, flags))["model"]))
    samples = Samples(
        find_images([str(photos / "val")], 3), eval_transform(args.input_size), args, noise_length=model.noise_length
    )
    batch = load_batch(samples, range(3), CPU)
    picture = draw(trained(host, flags) / "last.pth", photos / "val", tmp_path / "x.png", "--count", 3)
    assert np.array_equal(
        picture, draw_reconstruction(reconstruct(model, Normalize(args, CPU)(batch), batch["noise"], args))
    )

    columns = cells(picture, args.input_size, rows=3)
    pixels, filtered = columns[0], args.lowpass_radius != 0
    masked, prediction = columns[2:4] if filtered else columns[1:]
    removed = mask_from_noise(batch["noise"], 0.75, model.encoder.grid, args.mask_unit).removed
    removed = removed.unflatten(1, model.encoder.grid).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    assert np.array_equal(pixels, batch["images"].numpy())
    assert np.array_equal(masked[~removed], pixels[~removed])
    assert set(np.unique(masked[removed])) <= {127, 128}  # grey
    assert np.array_equal(prediction[~removed], pixels[~removed])
    differs = [prediction[removed] != other[removed] for other in (pixels, masked)]
    assert all(different.mean() > 0.5 for different in differs)
    assert len(columns) == (5 if filtered else 3)
    if filtered:
        assert (columns[1] != pixels).mean() > 0.5


# ------------------------------------------------------------------------------------------------------------- settings


def test_fusing_only_the_last_layer_equals_a_plain_vit(trained, photos, tmp_path):
    pretrain(photos, tmp_path, *DEEP["deep"].split(), "--model", "vit_tiny")
    alone = trained("deep", "--fuse_layers 11")
    state = weights(alone)["model"]
    assert state.pop("proj_weights").shape == (1, 1, 1, 1)
    assert_same(state, weights(tmp_path)["model"])
    assert losses(alone) == losses(tmp_path)


def test_the_decoder_reads_the_layers_of_fuse_layers(trained):
    """The same weights with other layers give another loss; there is one fusion weight per layer."""
    state = pixmim_names(weights(trained("deep", "--fuse_layers 3 7 11"))["model"])
    found = []
    for layers in ("3 7 11", "3 8 11", "2 7 11"):
        model, images, noise = build_inputs(parse_flags("deep", f"--fuse_layers {layers}"))
        model.load_state_dict(state)
        found.append(model(images, noise)[0].item())
    assert min(abs(a - b) for a, b in combinations(found, 2)) > 1e-5  # float32 near 1 has a resolution of 1e-7
    assert len(weights(trained("deep"))["model"]["proj_weights"]) == 6


@pytest.mark.parametrize(
    ("host", "flags", "message"),
    [
        ("lsmae", "--fuse_layers 11", "--fuse_layers.* --model vit_pico "),
        ("convvit", "--fuse_layers 11", "--fuse_layers.* --model convvit_pico "),
        *[
            ("deep", f"--fuse_layers {layers}", f"--fuse_layers {layers}: .* 11$")
            for layers in ("7 3 11", "11 3", "3 3 11", "3 7", "3 7 11 12", "12")
        ],
        ("convvit", "--patch_size 6", "--patch_size 6: .* 4$"),
        ("convvit", "--input_size 32 44", " 32 x 44 .* 8$"),
        ("mff", "--input_size 36", " 36 x 36 .* 8$"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_refused_in_one_line(host, flags, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrain(photos, tmp_path, *(HOSTS | DEEP)[host].split(), *flags.split())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "last.pth").exists()


@pytest.mark.parametrize(
    ("host", "flags", "message"),
    [
        ("deep", "--fuse_layers 3 7 11", r"--fuse_layers None, .*\[3, 7, 11\]"),
        ("mff", "--model vit_pico", "--model mff_vit_pico, .* vit_pico"),
        ("lsmae", "--mask_unit 1", "--mask_unit 2, .* 1"),
    ],
)
def test_resuming_with_another_model_is_refused(host, flags, message, trained, photos, tmp_path):
    words = [*(HOSTS | DEEP)[host].split(), *flags.split(), "--resume", trained(host) / "last.pth"]
    with pytest.raises(ValueError, match=message):
        pretrain(photos, tmp_path, *words)


# ------------------------------------------------------------------------------------------------ a custom encoder


class Scaled(MaskedViT):
    """A ViT with a scale of its tokens that is used in pre-training only."""

    pretraining_only = ("scale",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = nn.Parameter(torch.ones(self.embed_dim))

    def encode(self, images, mask):
        return self.scale * super().encode(images, mask)


def test_a_custom_encoder_requires_no_conversion_rule(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "scaled_vit", partial(Scaled, embed_dim=48, depth=2, num_heads=3))
    words = ["--model", "scaled_vit"]
    whole, broken = pretrain(photos, tmp_path / "whole", *words, "--save_every", 1), tmp_path / "broken"
    pretrain(photos, broken, *words, "--resume", whole / "epoch-0001.pth")
    state = weights(whole)["model"]
    assert_same(state, weights(broken)["model"])
    assert [x["epoch"] for x in records(broken)] == [1.5, 2]  # the second epoch only
    assert not torch.equal(state["scale"], torch.ones(48))
    assert rename("scale", "mae", "mae") is None

    checkpoint = whole / "last.pth"
    found = knn_features(monkeypatch, checkpoint, photos, "--input_size", 24, 16)
    model = reference("scaled_vit", state, (24, 16), (2, 2))
    for ours, theirs in zip(found, pool_features(model, normalised_photos(photos, (24, 16)), None), strict=True):
        assert_close(ours, F.normalize(theirs, dim=1).detach(), rtol=0, atol=1e-5)

    last = tune(tmp_path / "tuned", photos, checkpoint, "--epochs", 1)
    classifier = tmp_path / "tuned" / "classifier.pth"
    assert "scale" not in torch.load(classifier, weights_only=True)["model"]
    assert result("main_finetune", "--eval", "--checkpoint", classifier, "--data_path", photos, *DEVICE) == last
    assert probe(tmp_path / "probe", photos, checkpoint)["n"] == 9
    assert draw(checkpoint, photos / "val", tmp_path / "x.png").ndim == 3
