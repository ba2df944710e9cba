"""Pre-training that starts from the weights of a checkpoint (--checkpoint)."""

import json
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import PRETRAIN, assert_same, assert_same_run, call, interrupted, one_rank, pretrain, ranks, weights
from test_reference import EXTRACTS, SHARED, answers_of, model_of, noise_of
from torch import nn

import main_finetune
import main_pretrain
from models import ENCODERS, build_encoder
from models_pixmim import sincos_pos_embed
from util.convert import convert
from util.evaluate.encoder import load_encoder, read_architecture
from util.formats.initial import adapt_channels, initial_state, move_positions, resample_patches
from util.formats.keys import mae_names, pixmim_names
from util.formats.read import read_weights

START = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "1", "--image_every", "0"]
AS_IN_FILE = Namespace(
    checkpoint="x.pth", model="x", init_channels="new", resample_patches=False, decoder="self", fuse_levels=False
)
CASES = [f"extract/{name}" for name in EXTRACTS]
CASES += [pytest.param("shared/mm_mae", marks=pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared"))]


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_equals_the_reference(case, tmp_path):
    answers = answers_of(case)
    model, found = model_of(answers, tmp_path)
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    state, report = initial_state(found, mae_names(model.state_dict()), model.encoder, AS_IN_FILE, sincos_pos_embed)
    model.load_state_dict(pixmim_names(state))
    assert "100.0%" in report[0]
    assert not any("random" in line for line in report)
    loss, _, _ = model(answers["imgs"], noise_of(answers))
    assert loss.item() == pytest.approx(answers["loss"].item(), rel=1e-5)


def set_up_run(photos, tmp_path, *words):
    """Model of main_pretrain before its first step, and what it printed."""
    args = main_pretrain.get_parser().parse_args(list(map(str, ["--data_path", photos, *words])))
    run = one_rank(tmp_path)
    said = []
    run.log.info = said.append
    state, _ = main_pretrain.setup(args, lambda args: run._replace(args=Namespace(**vars(args) | {"num_workers": 0})))
    return state.model, said


@pytest.mark.parametrize("target", [None, "mae", "hf", "mmpretrain"])
def test_a_run_starts_with_exactly_the_weights_of_the_file_or_of_its_conversion(target, photos, pretrained, tmp_path):
    file = pretrained / "last.pth"
    if target:
        convert(file, file := tmp_path / "converted", target)
    model, said = set_up_run(photos, tmp_path, "--checkpoint", file, "--model", "vit_pico", "--amp", "off")
    assert_same(mae_names(model.state_dict()), weights(pretrained)["model"])
    assert re.match(r"from .*file: .*100\.0%", said[0])


def test_a_file_without_decoder_starts_with_a_random_one_and_a_note(photos, pretrained, tmp_path):
    convert(pretrained / "last.pth", tmp_path / "x.pth", "timm")
    sizes = ["--decoder_dim", 32, "--decoder_depth", 1, "--decoder_heads", 2, "--input_size", 16, "--patch_size", 8]
    model, said = set_up_run(photos, tmp_path, "--checkpoint", tmp_path / "x.pth", "--model", "vit_pico", *sizes)
    before = weights(pretrained)["model"]
    for name, value in mae_names(model.state_dict()).items():
        fixed = name in ("decoder_pos_embed",) or value.eq(0).all() or value.eq(1).all()
        assert torch.equal(value, before[name]) or name.startswith("decoder") or name == "mask_token" or fixed
    assert not torch.equal(mae_names(model.state_dict())["mask_token"], before["mask_token"])
    assert any("mae_pretrain_*_full.pth" in line for line in said)
    assert any(line.startswith("new, random: ") for line in said)


@torch.no_grad()
def test_repeated_channels_of_an_image_give_the_output_of_the_mean_and_of_cycled_weights():
    torch.manual_seed(0)
    names = {"patch_embed.proj.weight": torch.randn(6, 3, 4, 4), "decoder_pred.weight": torch.randn(48, 5)}
    x = torch.randn(2, 1, 8, 8)
    for mode in ("mean", "cycle"):
        new = adapt_channels(names, 3, 6, mode)
        ours = F.conv2d(x.expand(-1, 6, -1, -1), new["patch_embed.proj.weight"], stride=4)
        theirs = F.conv2d(x.expand(-1, 3, -1, -1), names["patch_embed.proj.weight"], stride=4)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        predicted, before = (t["decoder_pred.weight"].unflatten(0, (4, 4, -1)) for t in (new, names))
        for channel in range(6):
            expected = before.mean(2) if mode == "mean" else before[:, :, channel % 3]
            torch.testing.assert_close(predicted[:, :, channel], expected)
    assert adapt_channels(names, 3, 6, "new") == {}


@torch.no_grad()
def test_resampled_patches_predict_the_resized_patch_and_embed_it_alike():
    torch.manual_seed(0)
    state = {
        "patch_embed.proj.weight": torch.randn(6, 3, 4, 4),
        "decoder_pred.weight": torch.randn(48, 5),
        "decoder_pred.bias": torch.randn(48),
    }
    new = resample_patches(state, 4, 8, 3)
    x = torch.randn(7, 5)
    small, large = (F.linear(x, t["decoder_pred.weight"], t["decoder_pred.bias"]) for t in (state, new))
    small, large = (t.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2) for t, p in ((small, 4), (large, 8)))
    torch.testing.assert_close(F.interpolate(small, (8, 8), mode="bicubic"), large, rtol=1e-4, atol=1e-4)
    patch = torch.randn(2, 3, 4, 4)  # FlexiViT: the embedding of a patch equals that of its enlarged copy
    enlarged = F.interpolate(patch, (8, 8), mode="bicubic", antialias=True)
    one, other = (F.conv2d(image, t["patch_embed.proj.weight"]) for image, t in ((patch, state), (enlarged, new)))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_fixed_position_embeddings_are_computed_anew_and_learned_ones_resampled():
    for shift in (0, 12):  # MAE's and OpenMMLab's order
        fixed = sincos_pos_embed(24, (4, 4), 1).roll(shift, -1)
        moved = move_positions(fixed, (4, 4), (6, 3), 1, sincos_pos_embed)
        assert torch.equal(moved, sincos_pos_embed(24, (6, 3), 1).roll(shift, -1))
    moved = move_positions(fixed + 0.1, (4, 4), (6, 3), 1, sincos_pos_embed)
    plain = F.interpolate((fixed + 0.1)[:, 1:].mT.unflatten(2, (4, 4)), (6, 3), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(moved[:, 1:], plain)


FROZEN = [*START, "--freeze_encoder_epochs", "1", "--decoder_dim", "48", "--decoder_heads", "3"]


def continue_run(photos, pretrained, output, *words):
    flags = ["--checkpoint", pretrained / "last.pth", *PRETRAIN, *FROZEN, "--blr", "0.03", *words]
    call("main_pretrain", *flags, "--data_path", photos, "--output_dir", output, "--save_every", 1)
    return output


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_encoder_keeps_its_weights_for_these_epochs_only(optimizer, photos, pretrained, tmp_path):
    run = continue_run(photos, pretrained, tmp_path / "run", "--optimizer", optimizer)
    before = weights(pretrained)["model"]
    after = [torch.load(run / f"epoch-000{n}.pth", weights_only=True)["model"] for n in (1, 2)]
    encoder = [name for name in before if "decoder" not in name and name != "mask_token" and name != "pos_embed"]
    assert all(torch.equal(before[name], after[0][name]) for name in encoder)
    assert not any(torch.equal(before[name], after[1][name]) for name in encoder)
    assert not torch.equal(after[0]["mask_token"], after[1]["mask_token"])


def test_a_continued_run_resumes_bit_for_bit_and_checks_its_weights(photos, pretrained, tmp_path, monkeypatch):
    whole = continue_run(photos, pretrained, tmp_path / "whole")
    ending = lambda: continue_run(photos, pretrained, tmp_path / "broken")  # noqa: E731
    assert interrupted(monkeypatch, 1, ending) == 75
    ending()
    assert_same_run(whole, tmp_path / "broken")
    config = json.loads((whole / "config.json").read_text())
    assert config["origin"] == weights(whole)["origin"]
    assert len(config["origin"]) == 64
    with pytest.raises(ValueError, match=r"broken/last\.pth .*other weights .*--checkpoint .*whole/last\.pth"):
        continue_run(photos, whole, tmp_path / "broken")


def test_weights_of_a_continued_run_of_an_earlier_version_state_their_origin(photos, pretrained, tmp_path):
    content = torch.load(continue_run(photos, pretrained, tmp_path / "run") / "last.pth", weights_only=True)
    assert read_weights(tmp_path / "run" / "last.pth").args["origin"]["sha256"] == content["origin"]
    del content["args"]["origin"], content["sha256"]
    torch.save(content, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").args["origin"]["sha256"] == content["origin"]


def test_a_refused_resume_names_the_command_that_continues_from_its_weights(photos, pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"--epochs 2, not 5; .*--epochs 5 .*--checkpoint \S*last\.pth --output_dir"):
        pretrain(photos, pretrained, "--epochs", 5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model vit_tiny", "vit, .*--model vit_tiny"),
        ("--patch_size 4", "--patch_size 4: .*--resample_patches"),
        ("--in_chans 1", "--mean: 0 .*--in_chans 1 .*1"),
        ("--model convvit_tiny", "vit, .*--model convvit_tiny"),
        ("--decoder_heads 5", r"width 32 .* 5 attention heads"),
    ],
)
def test_incompatible_weights_are_refused_before_the_run_starts(flags, message, photos, pretrained, tmp_path):
    words = ["--checkpoint", pretrained / "last.pth", *START, "--data_path", photos, "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=message):
        call("main_pretrain", *words, *flags.split())
    assert not (tmp_path / "run").exists()


def is_encoder_tensor(name: str) -> bool:
    return "decoder" not in name and name != "mask_token"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)},
            r"missing: cls_token, pos_embed",
        ),
        (lambda state: {k: v for k, v in state.items() if not is_encoder_tensor(k)}, r"missing: cls_token, pos_embed"),
        (lambda state: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"\b1 keys \(conv1\.weight\)"),
        (lambda state: state | {"norm.bias": torch.full((48,), torch.nan)}, r"\b1 tensors .*nan or inf \(norm\.bias\)"),
    ],
    ids=["a head alone", "a decoder alone", "a ResNet", "a run that diverged"],
)
def test_a_file_without_a_usable_encoder_is_refused_before_the_run_starts(
    change, message, photos, pretrained, tmp_path
):
    torch.save({"model": change(weights(pretrained)["model"])}, tmp_path / "x.pth")
    flags = ["--checkpoint", tmp_path / "x.pth", "--data_path", photos, "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=rf"x\.pth.*{message}"):
        call("main_pretrain", *flags)
    assert not (tmp_path / "run").exists()


def test_half_precision_and_a_folded_batch_norm_start_with_the_values_of_the_file(photos, pretrained, tmp_path):
    before = weights(pretrained)["model"]
    statistics = {"head.0.running_mean": torch.zeros(48), "head.0.running_var": torch.ones(48)}
    probe = {
        "head.0.num_batches_tracked": torch.tensor(1),
        "head.1.weight": torch.zeros(9, 48),
        "head.1.bias": torch.zeros(9),
    }
    encoder = {name: value.half() for name, value in before.items() if is_encoder_tensor(name)}
    torch.save({"model": encoder | statistics | probe}, tmp_path / "x.pth")
    sizes = ["--model", "vit_pico", "--decoder_dim", 32, "--decoder_depth", 1, "--decoder_heads", 2]
    model, said = set_up_run(photos, tmp_path, "--checkpoint", tmp_path / "x.pth", *sizes)
    after = mae_names(model.state_dict())
    assert_same({name: after[name] for name in encoder}, {name: value.float() for name, value in encoder.items()})
    assert any(re.search(r"not used: 2 .*\(head\.bias, head\.weight\)$", line) for line in said)


def test_two_ranks_continue_as_one_rank_with_twice_the_batch(photos, pretrained, tmp_path):
    flags = ["--checkpoint", pretrained / "last.pth", *PRETRAIN, *FROZEN, "--data_path", photos, "--blr", "0.003"]
    call("main_pretrain", *flags, "--output_dir", tmp_path / "one")
    for status, _, err in ranks(2, "main_pretrain.py", *flags, "--batch_size", 4, "--output_dir", tmp_path / "two"):
        assert status == 0, err
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert one["origin"] == two["origin"]
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "cycle"])
def test_rgb_weights_read_grey_images_as_images_of_three_equal_channels(mode, pretrained):
    args = Namespace(checkpoint=str(pretrained / "last.pth"), in_chans=6, init_channels=mode, seed=0, input_size=None)
    args = Namespace(
        **vars(args),
        **dict.fromkeys(("model", "patch_size", "crop_pct", "pool", "class_tokens")),
        mean=[0] * 6,
        std=[1] * 6,
    )
    six = load_encoder(*encoder_arguments(args))
    three = load_encoder(*encoder_arguments(Namespace(**vars(args) | {"in_chans": 3, "mean": None, "std": None})))
    x = torch.randn(2, 1, 16, 16)
    theirs, ours = three.forward_features(x.expand(-1, 3, -1, -1)), six.forward_features(x.expand(-1, 6, -1, -1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def encoder_arguments(args: Namespace) -> tuple:
    """Arguments of `load_encoder` for the flags of an evaluation."""
    args, found = read_architecture(args, ENCODERS)
    return args, build_encoder, found


@pytest.mark.parametrize("main", ["main_knn", "main_linprobe", "main_finetune"])
def test_evaluations_refuse_other_channels_and_name_the_flag_that_adapts_them(main, photos, pretrained):
    flags = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--in_chans", 1, "--mean", 0, "--std", 1]
    with pytest.raises(ValueError, match=r"--in_chans 1: .*last\.pth .*3; .*--init_channels mean"):
        call(main, *flags)


def test_frozen_layers_get_neither_gradients_nor_state(photos, pretrained, tmp_path):
    flags = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--num_workers", "0", "--amp", "off"]
    args = main_finetune.get_parser().parse_args([*map(str, flags), "--freeze_layers", "1", "--batch_size", "4"])
    state, _ = main_finetune.setup(args, lambda args: one_rank(tmp_path, **vars(args)))
    trained = {name for name, p in state.model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in state.model.named_parameters()}
    assert everything - trained == {n for n in everything if n.startswith(("cls", "pos", "patch", "blocks.0"))}
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(trained)
    with pytest.raises(ValueError, match=r"--freeze_layers 3: .* 2 blocks"):
        main_finetune.freeze_layers(state.model, 3)
