"""Reading of checkpoints in every format, of broken and malicious files, and the command line of util.convert."""

import argparse
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import assert_same, ended, spawn
from reference.make import read
from torch import Tensor, nn
from torch.testing import assert_close

from models import ENCODERS
from models_convmae import ConvViT
from models_mff import MFFViT
from models_pixmim import MaskedEncoder, MaskedViT, PixMIM
from util import convert
from util.args import IMAGENET_MEAN, IMAGENET_STD
from util.evaluate.encoder import features as encoder_features
from util.evaluate.encoder import load_encoder, read_architecture
from util.formats.commands import load_command
from util.formats.keys import (
    FORMATS,
    default_format,
    family,
    mae_names,
    pixmim_names,
    rename,
    tensor_sizes,
    to_timm,
)
from util.formats.read import _map_names, read_weights
from util.formats.resize import resample_pos_embed
from util.formats.unpickle import Placeholder, load_content
from util.formats.weights import Weights

ROOT = Path(__file__).parents[2]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
HOSTS = {
    "vit": lambda **kwargs: MaskedViT(**SIZES, **kwargs),
    "convvit": lambda **kwargs: ConvViT((32, 32), 8, embed_dim=(8, 16, 192), depth=(1, 2, 2), num_heads=3, **kwargs),
    "mff_vit": lambda **kwargs: MFFViT(**SIZES | {"depth": 3}, **kwargs),  # fuses all three layers
}
TIMM = "vit_tiny_patch16_224"
TIMM_OPTIONS = {"img_size": 32, "patch_size": 8, "depth": 2}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def perturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def build_pixmim(encoder: MaskedEncoder) -> PixMIM:
    return perturb(PixMIM(encoder, nn.Identity(), decoder_dim=64, decoder_depth=1, decoder_heads=2))


def state_of(host: str) -> dict[str, Tensor]:
    return mae_names(build_pixmim(HOSTS[host]()).state_dict())


@pytest.fixture
def model() -> PixMIM:
    return build_pixmim(HOSTS["vit"]())


@pytest.fixture
def mae(model) -> dict[str, Tensor]:
    return mae_names(model.state_dict())


def to_mm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {rename(key, "mae", "mm"): value for key, value in state.items()}


def make_classifier(state: dict[str, Tensor], pooled: bool = True) -> dict[str, Tensor]:
    """A fine-tuned encoder: fc_norm in place of norm, and a head for 5 classes."""
    state = to_timm(state)
    if pooled:
        state |= {f"fc_norm.{x}": state.pop(f"norm.{x}") for x in ("weight", "bias")}
    return state | {"head.weight": torch.randn(5, 192), "head.bias": torch.randn(5)}


def save_content(folder: Path, content) -> Path:
    torch.save(content, folder / "in.pth")
    return folder / "in.pth"


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -------------------------------------------------------------------------------------------------------------- formats

WRAPPERS = {
    "pixmim": lambda s: {"format": "pixmim-1", "model": s, "optimizer": {}, "args": {"model": "vit_tiny", "epochs": 3}},
    "mae": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(blr=1e-3)},
    "mm": lambda s: {"state_dict": to_mm_names(s), "meta": {"epoch": 3}, "optimizer": {"state": {}}},
    "timm": lambda s: to_timm(s),
}


@pytest.mark.parametrize("source", WRAPPERS)
def test_the_same_weights_are_read_from_every_format(source, mae, tmp_path):
    weights = read_weights(save_content(tmp_path, WRAPPERS[source](mae)))
    assert weights.source == source
    assert are_equal(weights.state, to_timm(mae) if source == "timm" else mae)
    assert weights.dropped == []
    assert weights.args == {"pixmim": {"model": "vit_tiny", "epochs": 3}, "mae": {"blr": 1e-3}}.get(source, {})


def test_renaming_tensors_is_invertible(model, mae):
    state = model.state_dict()
    assert are_equal(pixmim_names(mae), state)
    assert are_equal({rename(key, "mm", "mae"): value for key, value in to_mm_names(mae).items()}, mae)
    assert {key.split(".")[0] for key in to_mm_names(mae)} == {"backbone", "neck"}


def test_tensor_names_equal_those_of_mmpretrain():
    for ours, theirs in {
        "patch_embed.proj.bias": "backbone.patch_embed.projection.bias",
        "blocks.11.norm2.weight": "backbone.layers.11.ln2.weight",
        "blocks.0.mlp.fc1.bias": "backbone.layers.0.ffn.layers.0.0.bias",
        "blocks.10.mlp.fc2.weight": "backbone.layers.10.ffn.layers.1.weight",
        "norm.weight": "backbone.ln1.weight",
        "fc_norm.bias": "backbone.ln2.bias",
        "decoder_blocks.7.attn.qkv.weight": "neck.decoder_blocks.7.attn.qkv.weight",
        "decoder_norm.bias": "neck.ln1.bias",
        "head.weight": "head.fc.weight",
    }.items():
        assert rename(ours, "mae", "mm") == theirs
        assert rename(theirs, "mm", "mae") == ours


@pytest.mark.parametrize(
    "key", ["xbackbone.ln1.weight", "backbone.ln1.weight_", "backbone.layers.x.ln1.bias", "backbonexln1.bias"]
)
def test_rules_match_whole_names_only(key):
    assert rename(key, "mm", "mae") is None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_ddp_and_compile_are_removed(prefix, mae, tmp_path):
    state = {prefix + key: value for key, value in mae.items()}
    assert are_equal(read_weights(save_content(tmp_path, {"model": state})).state, mae)


def test_files_from_before_torch_1_6_and_safetensors_are_read(mae, tmp_path):
    path = tmp_path / "legacy.pth"
    torch.save({"model": mae, "args": argparse.Namespace(blr=1)}, path, _use_new_zipfile_serialization=False)
    assert are_equal(read_weights(path).state, mae)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(to_timm(mae), tmp_path / "x.safetensors")
    assert are_equal(read_weights(tmp_path / "x.safetensors").state, to_timm(mae))


def test_filter_and_preprocessor_of_the_release_are_listed_as_dropped(mae, tmp_path):
    extra = {"target_generator.low_pass_filter": torch.ones(3, 32, 32), "data_preprocessor.mean": torch.ones(3, 1, 1)}
    weights = read_weights(save_content(tmp_path, {"state_dict": to_mm_names(mae) | extra, "meta": {}}))
    assert are_equal(weights.state, mae)
    assert weights.dropped == list(extra)


@pytest.mark.parametrize("pooled", [True, False], ids=["fc_norm", "norm"])
def test_norm_and_head_of_a_classifier_are_read(pooled, mae, tmp_path):
    state = make_classifier(mae, pooled)
    weights = read_weights(save_content(tmp_path, {"state_dict": to_mm_names(state), "meta": {}}))
    assert are_equal(weights.state, state)
    facts = tensor_sizes(weights.state)
    assert (facts["num_classes"], facts["pooled"]) == (5, pooled)


@pytest.mark.parametrize("family", ["mae", "mm"])
def test_batch_norm_of_a_linear_probe_is_folded_into_the_head(family, mae, tmp_path):
    state = make_classifier(mae, pooled=False)
    norm = nn.BatchNorm1d(192, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    head = state.pop("head.weight"), state.pop("head.bias")
    if family == "mae":
        stats = {f"head.0.{key}": value for key, value in norm.state_dict().items()}
        content = {"model": state | stats | {"head.1.weight": head[0], "head.1.bias": head[1]}}
    else:
        stats = {f"neck.bn.{key}": value for key, value in norm.state_dict().items()}
        heads = {"head.layers.head.weight": head[0], "head.layers.head.bias": head[1]}
        content = {"state_dict": to_mm_names(state) | stats | heads, "meta": {}}
    weights = read_weights(save_content(tmp_path, content))
    features = torch.randn(4, 192)
    ours = features @ weights.state["head.weight"].T + weights.state["head.bias"]
    assert_close(ours, norm.eval()(features) @ head[0].T + head[1], rtol=1e-4, atol=1e-4)
    assert set(weights.dropped) == set(stats)


def test_sizes_of_a_vit_are_read_from_its_shapes(mae):
    assert tensor_sizes(mae) == {
        "family": "vit", "embed_dim": 192, "depth": 2, "patch_size": 8, "in_chans": 3, "mlp_ratio": 4.0, "num_patches": 16, "class_tokens": 1,
        "num_classes": 0, "pooled": False, "decoder": "self", "fuse_levels": False, "decoder_dim": 64, "decoder_depth": 1,
    }  # fmt: skip
    assert "decoder_dim" not in tensor_sizes(to_timm(mae))


@pytest.mark.parametrize(("host", "sizes"), [
    ("convvit", {"embed_dim": (8, 16, 192), "depth": (1, 2, 2), "class_tokens": 0}),
    ("mff_vit", {"embed_dim": 192, "depth": 3, "class_tokens": 1}),
])  # fmt: skip
def test_family_and_sizes_of_convmae_and_mff_are_read_from_their_shapes(host, sizes):
    state = state_of(host)
    assert family(state) == host
    assert tensor_sizes(state) == sizes | {
        "family": host, "patch_size": 8, "in_chans": 3, "mlp_ratio": 4.0, "num_patches": 16,
        "num_classes": 0, "pooled": False, "decoder": "self", "fuse_levels": False, "decoder_dim": 64, "decoder_depth": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vit_pico", "mff_vit_pico", "convvit_pico"])
def test_weights_of_a_run_with_default_flags_have_every_setting(name):
    """Runs of earlier versions hold None for defaults that are resolved after parsing today."""
    encoder = ENCODERS[name](img_size=(64, 64))
    args = {"model": name, "input_size": [64, 64], "in_chans": 3, "mean": None, "std": None, "lowpass_radius": None}
    weights = Weights.from_state(mae_names(build_pixmim(encoder).state_dict()), args)
    assert (weights.model, weights.num_heads, weights.input_size, weights.grid) == (name, 3, (64, 64), (4, 4))
    assert (weights.mean, weights.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert weights.lowpass_radius == 40 * 64 / 224
    assert weights.has_decoder
    assert (weights.decoder_dim, weights.decoder_depth, weights.decoder_heads) == (64, 1, 2)
    encoder_only = weights.with_state(to_timm(weights.state))
    assert (encoder_only.has_decoder, encoder_only.decoder_dim, encoder_only.decoder_heads) == (False, None, None)


def test_q_bias_and_v_bias_are_joined_with_a_zero_key_bias(mae, tmp_path):
    """long_seq_mae saves them so, in encoder and decoder."""
    state, joined = dict(mae), {}
    for key in [key for key in mae if key.endswith("qkv.bias")]:
        q, _, v = state.pop(key).chunk(3)
        state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        joined[key] = torch.cat([q, torch.zeros(len(q)), v])
    weights = read_weights(save_content(tmp_path, {"model": state}))
    assert len(joined) == 3
    assert are_equal(weights.state, mae | joined)
    assert weights.dropped == []

    block = "decoder_blocks.0.attn"
    del state[f"{block}.v_bias"]
    with pytest.raises(ValueError, match=rf"unknown: {block}\.q_bias; missing: {block}\.qkv\.bias$"):
        read_weights(save_content(tmp_path, {"model": state}))


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("name", "target"), [("lsmae", "mae"), ("convmae", "mae"), ("mff", "mmpretrain")])
def test_reference_checkpoints_survive_a_round_trip(name, target, tmp_path):
    theirs = read(name)["checkpoint"]
    modules = pixmim_names(read_weights(save_content(tmp_path, theirs)).state)
    ours = save_content(tmp_path, {"format": "pixmim-1", "model": mae_names(modules)})
    convert.convert(ours, tmp_path / "out.pth", target)
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), theirs)


@pytest.mark.parametrize("tuned", [False, True], ids=["pre-trained", "fine-tuned"])
@pytest.mark.parametrize("host", HOSTS)
def test_converted_files_are_read_back_unchanged(host, tuned, tmp_path):
    state = make_classifier(state_of(host)) if tuned else state_of(host)
    path = save_content(tmp_path, {"format": "pixmim-1", "model": state})
    for target in {"mae", "mmpretrain"} & {*FORMATS[family(state)]}:
        report = convert.convert(path, tmp_path / "out.pth", target)
        again = read_weights(tmp_path / "out.pth")
        assert are_equal(again.state, state)
        assert again.source == {"mae": "mae", "mmpretrain": "mm"}[target]
        assert "dropped  nothing" in report


def test_a_fine_tuned_convmae_survives_a_round_trip(tmp_path):
    model = perturb(HOSTS["convvit"](num_classes=5, global_pool="avg"))
    fusion = {key for key in model.state_dict() if key.startswith(model.pretraining_only)}
    state = {key: value for key, value in model.state_dict().items() if key not in fusion}
    assert state.keys() == make_classifier(state_of("convvit")).keys()
    report = convert.convert(save_content(tmp_path, state), tmp_path / "out.pth", "mae")
    assert are_equal(torch.load(tmp_path / "out.pth", weights_only=True)["model"], state)
    assert load_line(report).startswith("models_convvit.ConvViT(img_size=[32, 16, 8], patch_size=[2, 2, 2],")
    assert "num_classes=5, global_pool=True, qkv_bias=True" in report


def test_a_convmae_probe_is_written_with_the_fc_norm_of_its_repository(tmp_path):
    probe = perturb(HOSTS["convvit"](num_classes=5, global_pool="avg", fc_norm=False))
    state = to_timm(probe.state_dict())
    report = convert.convert(save_content(tmp_path, state), tmp_path / "out.pth", "mae")
    tuned = HOSTS["convvit"](num_classes=5, global_pool="avg").eval()
    unused = {key: value for key, value in tuned.state_dict().items() if key.startswith(tuned.pretraining_only)}
    tuned.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["model"] | unused)
    images = torch.randn(2, 3, 32, 32)
    assert_close(tuned(images), probe(images))
    assert "dropped  norm.weight, norm.bias" in report


CONVMAE_LINE = (
    "models_convmae.MaskedAutoencoderConvViT(img_size={}, patch_size=[4, 2, 2], in_chans=3, embed_dim=[8, 16, 64], "
    "depth=[1, 1, 1], num_heads=1, mlp_ratio=[4, 4, 4], decoder_embed_dim=64, decoder_depth=1, decoder_num_heads={}, "
    "norm_layer=partial(nn.LayerNorm, eps=1e-6)).load_state_dict(torch.load('x.pth', weights_only=True)['model'])"
)


@pytest.mark.parametrize(
    ("size", "args", "given"),
    [
        ((224, 224), {}, ("[224, 56, 28]", 2)),  # heads: 32 wide each
        ((224, 224), {"input_size": 224}, ("[224, 56, 28]", 2)),  # as in a file of Alpha-VL/ConvMAE
        ((224, 224), {"input_size": [224, 224], "decoder_heads": 4}, ("[224, 56, 28]", 4)),
        ((64, 64), {"input_size": [64, 64]}, ("[64, 16, 8]", 2)),
    ],
    ids=["no args", "args of Alpha-VL/ConvMAE", "decoder_heads in args", "64 px"],
)
def test_load_command_of_convmae_has_the_sizes_of_all_stages(size, args, given):
    encoder = ConvViT(size, 16, embed_dim=(8, 16, 64), depth=(1, 1, 1), num_heads=1)
    weights = Weights.from_state(mae_names(build_pixmim(encoder).state_dict()), args, "mae", [])
    assert load_command(weights, "mae", "x.pth") == CONVMAE_LINE.format(*given)


def test_a_rectangular_convmae_has_a_load_command_for_its_encoder_only():
    encoder = ConvViT((32, 64), 16, embed_dim=(8, 16, 64), depth=(1, 1, 1), num_heads=1)
    state, args = mae_names(build_pixmim(encoder).state_dict()), {"input_size": [32, 64]}
    line = load_command(Weights.from_state(state, args, "mae", []), "mae", "x.pth")
    assert re.search("models_convvit .*encoder", line)
    line = load_command(Weights.from_state(to_timm(state), args, "mae", []), "mae", "x.pth")
    assert "models_convvit.ConvViT(img_size=[(32, 64), (8, 16), (4, 8)], patch_size=[4, 2, 2]" in line


def test_load_command_of_a_convmae_encoder_matches_its_norm():
    weights = Weights.from_state(to_timm(state_of("convvit")), {}, "mae", [])
    assert "models_convvit.ConvViT(" in (line := load_command(weights, "mae", "x.pth"))
    assert "num_classes=0, global_pool=False" in line


@pytest.mark.parametrize(
    ("host", "target", "remedy"),
    [("convvit", "timm", "mae"), ("convvit", "mmpretrain", "mae"), ("convvit", "hf", "mae"), ("convvit", "onnx", "mae"),
     ("mff_vit", "mae", "timm or mmpretrain or hf or mmseg or detectron2 or onnx")],
)  # fmt: skip
def test_formats_that_cannot_hold_the_encoder_are_refused(host, target, remedy, tmp_path):
    with pytest.raises(ValueError, match=rf"--to {target} .*{host}.* --to {remedy}$"):
        convert.convert(save_content(tmp_path, {"model": state_of(host)}), tmp_path / "out.pth", target)
    assert not (tmp_path / "out.pth").exists()


# ------------------------------------------------------------------------------------------------- converted files in timm


@pytest.mark.parametrize("source", WRAPPERS)
def test_timm_gives_the_features_of_the_encoder(source, model, mae, tmp_path):
    convert.convert(save_content(tmp_path, WRAPPERS[source](mae)), tmp_path / "out.pth", "timm")
    theirs = timm.create_model(TIMM, num_classes=0, checkpoint_path=str(tmp_path / "out.pth"), **TIMM_OPTIONS).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(theirs.forward_features(images), model.encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    model = timm.create_model(TIMM, num_classes=0, **TIMM_OPTIONS).eval()
    model.load_state_dict(state)
    return model.forward_features(images)


@pytest.mark.parametrize("slip", ["query and key", "norm1 and norm2"])
def test_swapped_tensors_change_the_features_in_timm(slip, mae):
    """Control for the test above."""
    state, images = to_timm(mae), torch.randn(2, 3, 32, 32)
    wrong = dict(state)
    if slip == "query and key":
        q, k, v = state["blocks.0.attn.qkv.weight"].chunk(3)
        wrong["blocks.0.attn.qkv.weight"] = torch.cat([k, q, v])
    else:
        for x in ("weight", "bias"):
            wrong[f"blocks.0.norm1.{x}"], wrong[f"blocks.0.norm2.{x}"] = (
                state[f"blocks.0.norm2.{x}"],
                state[f"blocks.0.norm1.{x}"],
            )
    assert (features(wrong, images) - features(state, images)).abs().max() > 1e-3


def load_line(report: str) -> str:
    return report.splitlines()[-1].removeprefix("load it").strip()


@pytest.mark.parametrize("kind", ["pretrained", "mean of patches", "class token", "probe of the mean", "wide"])
def test_the_printed_load_command_loads_the_file_in_timm(kind, mae, tmp_path):
    state, args = mae, {}
    if kind in ("mean of patches", "class token"):
        state = make_classifier(mae, pooled=kind == "mean of patches")
    elif kind == "probe of the mean":
        state, args = make_classifier(mae, pooled=False), {"pool": "mean"}
    elif kind == "wide":
        encoder = MaskedViT(
            img_size=(16, 48), patch_size=8, embed_dim=128, depth=1, num_heads=2, in_chans=1, mlp_ratio=2
        )
        state, args = encoder.state_dict(), {"input_size": [16, 48]}
    path = save_content(tmp_path, {"format": "pixmim-1", "model": state, "args": args})
    line = load_line(convert.convert(path, tmp_path / "out.pth", "timm"))
    assert ("num_classes=0" in line) == (kind in ("pretrained", "wide"))
    loaded = eval(line, {"timm": timm}).eval()
    assert are_equal(loaded.state_dict(), to_timm(state))
    if kind == "probe of the mean":  # the norm precedes the mean
        images = torch.randn(2, 3, 32, 32)
        tokens = loaded.forward_features(images)[:, 1:].mean(1)
        assert_close(loaded(images), tokens @ state["head.weight"].T + state["head.bias"], rtol=1e-4, atol=1e-4)


def test_mff_without_fusion_layers_equals_timms_vit(tmp_path):
    model = build_pixmim(HOSTS["mff_vit"]())
    path = save_content(tmp_path, {"state_dict": to_mm_names(mae_names(model.state_dict())), "meta": {}})
    report = convert.convert(path, tmp_path / "out.pth", "timm")
    fusion = ["proj_weights", *(f"proj_layers.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias"))]
    assert report.splitlines()[1] == f"dropped  mask_token and decoder_* (20 keys), {', '.join(fusion)}"
    theirs, images = eval(load_line(report), {"timm": timm}).eval(), torch.randn(2, 3, 32, 32)
    assert_close(theirs.forward_features(images), model.encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def test_load_command_omits_the_defaults_of_timm():
    model = MaskedViT(embed_dim=768, depth=12, num_heads=12)
    weights = Weights.from_state(model.state_dict(), {}, "mae", [])
    line = "timm.create_model('vit_base_patch16_224', num_classes=0, checkpoint_path='x.pth')"
    assert load_command(weights, "timm", "x.pth") == line


def test_mae_files_have_encoder_and_decoder(mae, tmp_path):
    report = convert.convert(save_content(tmp_path, WRAPPERS["mm"](mae)), tmp_path / "out.pth", "mae")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert are_equal(content["model"], mae)
    assert content.keys() == {"model"}
    assert load_line(report).startswith("models_mae.MaskedAutoencoderViT(img_size=32, patch_size=8,")
    assert "decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2" in report


def test_a_probe_on_mean_pooling_is_refused_by_mae(mae, tmp_path):
    content = {"format": "pixmim-1", "model": make_classifier(mae, pooled=False), "args": {"pool": "mean"}}
    with pytest.raises(ValueError, match=r"--to mae.*--to timm"):
        convert.convert(save_content(tmp_path, content), tmp_path / "out.pth", "mae")
    assert not (tmp_path / "out.pth").exists()


def test_converted_files_hold_tensors_only_and_no_hidden_storage(mae, tmp_path):
    everything = torch.randn(1000, 192, 192)
    state = mae | {"blocks.0.attn.proj.weight": everything[0]}  # a view of a storage of 147 MB
    convert.convert(
        save_content(tmp_path, {"model": state, "args": argparse.Namespace(a=1)}), tmp_path / "out.pth", "timm"
    )
    assert (tmp_path / "out.pth").stat().st_size < 10e6
    assert all(isinstance(x, Tensor) for x in torch.load(tmp_path / "out.pth", weights_only=True).values())


# ----------------------------------------------------------------------------------------------------- mismatching tensors


def test_unknown_missing_and_misshaped_keys_are_all_listed(mae, tmp_path):
    state = to_mm_names(mae)
    del state["backbone.layers.1.ln2.bias"], state["neck.mask_token"]
    state |= {"backbone.layers.0.gamma": torch.ones(1), "neck.extra": torch.ones(1)}
    state["backbone.layers.0.attn.qkv.weight"] = torch.zeros(100, 192)
    state["neck.decoder_pred.bias"] = torch.zeros(191)
    with pytest.raises(ValueError, match=r"in\.pth \(read as mm\)") as error:
        read_weights(save_content(tmp_path, {"state_dict": state, "meta": {}}))
    unknown, missing, misshaped = re.split(r"; (?:missing|mis-shaped): ", str(error.value).split("unknown: ")[1])
    assert unknown == "backbone.layers.0.gamma, neck.extra"
    assert missing == "neck.mask_token, backbone.layers.1.ln2.bias"
    assert "backbone.layers.0.attn.qkv.weight is [100, 192], expected [576, 192]" in misshaped
    assert "neck.decoder_pred.bias is [191], expected [192]" in misshaped
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("blocks.5.norm1.weight", torch.ones(192)), ("blocks.0.ls1.gamma", torch.ones(192)), ("fc_norm.weight", torch.ones(192)),
     ("dist_token", torch.ones(1, 4, 192)), ("head.bias", torch.ones(3)), ("module.norm.weight", torch.ones(192))],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_an_unexpected_key_is_named(key, value, mae, tmp_path):
    with pytest.raises(ValueError, match=r"unknown|missing") as error:
        read_weights(save_content(tmp_path, mae | {key: value}))
    assert key.split(".")[0] in str(error.value)


@pytest.mark.parametrize("host", HOSTS)
def test_every_missing_key_is_named(host, tmp_path):
    state = state_of(host)
    for key in state:
        with pytest.raises(ValueError, match=rf"py: missing: {re.escape(key)}$"):
            _map_names(tmp_path, {k: v for k, v in state.items() if k != key}, "mae")


@pytest.mark.parametrize("host", HOSTS)
def test_the_shape_of_every_tensor_is_checked(host, tmp_path):
    state = state_of(host)
    for key, value in state.items():
        with pytest.raises(ValueError, match="mis-shaped"):
            _map_names(tmp_path, state | {key: torch.cat([value, value], -1)}, "mae")


@pytest.mark.parametrize(
    ("host", "key", "value", "problem"),
    [
        ("convvit", "blocks1.0.gamma", torch.ones(8), "unknown: blocks1.0.gamma"),
        ("convvit", "cls_token", torch.ones(1, 1, 192), "unknown: cls_token"),
        ("convvit", "blocks1.0.attn.weight", torch.ones(8, 1, 3, 3),
         "mis-shaped: blocks1.0.attn.weight is [8, 1, 3, 3], expected [8, 1, 5, 5]"),
        ("convvit", "stage2_output_decode.weight", torch.ones(192, 8, 2, 2),
         "mis-shaped: stage2_output_decode.weight is [192, 8, 2, 2], expected [192, 16, 2, 2]"),
        ("mff_vit", "backbone.proj_layers.2.bias", torch.ones(192), "unknown: backbone.proj_layers.2.bias"),
        ("mff_vit", "backbone.proj_layers.1.weight", torch.ones(192, 64),
         "mis-shaped: backbone.proj_layers.1.weight is [192, 64], expected [192, 192]"),
    ],
    ids=lambda x: x if isinstance(x, str) and ":" not in x else "",
)  # fmt: skip
def test_keys_that_do_not_fit_the_encoder_are_named(host, key, value, problem, tmp_path):
    state = state_of(host)
    content = (
        {"model": state | {key: value}} if host == "convvit" else {"state_dict": to_mm_names(state) | {key: value}}
    )
    with pytest.raises(ValueError, match=rf"in\.pth .*py: {re.escape(problem)}$"):
        read_weights(save_content(tmp_path, content))


@pytest.mark.parametrize(("host", "part"), [("convvit", "stage1_output_decode"), ("mff_vit", "proj_layers.1")])
def test_missing_fusion_layers_are_named(host, part, tmp_path):
    state = state_of(host)
    gone = [key for key in state if key.startswith(part)]
    with pytest.raises(ValueError, match=rf"py: missing: {re.escape(', '.join(gone))}$"):
        read_weights(save_content(tmp_path, {"model": {key: state[key] for key in state.keys() - gone}}))


@pytest.mark.parametrize(
    ("content", "found"),
    [({"conv1.weight": torch.ones(1)}, "1 keys (conv1.weight"), ([1, 2], "a list"), ({}, "a dict"),
     ({"epoch": 3, "loss": 0.1}, "a dict of epoch, loss"), (torch.ones(3), "a Tensor"), ({"model": {}}, "a dict of model")],
    ids=["foreign tensors", "list", "empty dict", "dict without weights", "tensor", "empty model"],
)  # fmt: skip
def test_error_describes_the_content_of_an_unknown_file(content, found, tmp_path):
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        read_weights(save_content(tmp_path, content))
    assert "in.pth" in str(error.value)
    assert "expected" in str(error.value)


# ---------------------------------------------------------------------------- grids of equal length, averages, prefixes

STRIP = (128, 32)  # 16 x 4 patches of 8 px: as many as a square of 64 px
STRIPS = {
    "vit": lambda size: MaskedViT(**SIZES | {"img_size": size}),
    "convvit": lambda size: ConvViT(size, 8, embed_dim=(8, 16, 192), depth=(1, 2, 2), num_heads=3),
    "mff_vit": lambda size: MFFViT(**SIZES | {"depth": 3, "img_size": size}),
}


def build_here(args, **options):
    return STRIPS[args.model](args.input_size)


def our_features(path: Path, images: Tensor, host: str = "vit", **flags) -> Tensor:
    """Features of images as main_features.py computes them, at the size of the images unless told otherwise."""
    names = {"model": host, "input_size": tuple(images.shape[-2:]), "patch_size": None, "in_chans": None, "mean": None}
    given = names | {"std": None, "pool": None, "seed": 0, "checkpoint": str(path)} | flags
    args, weights = read_architecture(argparse.Namespace(**given), STRIPS)
    return encoder_features(load_encoder(args, build_here, weights).eval(), images)


@pytest.mark.parametrize("learned", [True, False], ids=["learned positions", "sin-cos positions"])
@pytest.mark.parametrize(
    ("host", "target"),
    [
        (host, target)
        for host in STRIPS
        for target in (*FORMATS[host], "folder")
        if target not in ("onnx", "detectron2") and (host, target) != ("convvit", "folder")
    ],
)
@torch.no_grad()
def test_a_strip_of_a_square_number_of_patches_keeps_its_features_in_every_format(host, target, learned, tmp_path):
    encoder, images = STRIPS[host](STRIP), torch.randn(2, 3, *STRIP)
    state = mae_names(build_pixmim(encoder).state_dict())
    if not learned:
        state["pos_embed"] = STRIPS[host](STRIP).pos_embed
        encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    ours = encoder_features(encoder, images)
    options = {"folder": True} if target == "folder" else {"encoder_only": True} if target == "hf" else {}
    kind = "timm" if target == "folder" else target
    path = tmp_path / "out"
    foreign = save_content(tmp_path, {"model": state})
    convert.convert(foreign, path, kind, input_size=STRIP, **options)
    for file in (foreign, path):
        assert_close(our_features(file, images, host), ours, rtol=1e-4, atol=1e-4)
    if kind != "timm" or target == "folder" or not learned:  # the file records its size or shows it
        assert read_weights(path).input_size == STRIP
    square = read_weights(foreign, (64, 64)).with_state(state, input_size=[64, 64])
    assert square.grid == (8, 8)  # control: as a square the features are others
    wrong = STRIPS[host](STRIP).eval()
    moved = resample_pos_embed(state["pos_embed"], (8, 8), (16, 4), wrong.num_prefix_tokens)
    wrong.load_state_dict({key: moved if key == "pos_embed" else state[key] for key in wrong.state_dict()})
    assert (encoder_features(wrong, images) - ours).abs().max() > 0.01


def test_a_file_that_may_be_a_square_or_a_strip_is_refused_with_both_readings(model, mae, tmp_path):
    mae["pos_embed"] = torch.randn(1, 65, 192)
    state = to_timm(mae)
    path = save_content(tmp_path, state)
    with pytest.raises(ValueError, match=r"--input_size 256 64: .*64 x 64 or 128 x 32 px"):
        read_weights(path, (256, 64))
    assert read_weights(path, (96, 96)).input_size == read_weights(path).input_size == (64, 64)
    convert.convert(path, tmp_path / "folder", "timm", folder=True, input_size=STRIP)
    assert read_weights(tmp_path / "folder", (256, 64)).input_size == STRIP


def test_a_moving_average_is_read_on_demand_only(mae, tmp_path, capsys):
    average = {key: value + 1 for key, value in mae.items()}
    for name, ema in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        path = save_content(tmp_path, {name: mae, ema: {f"module.{key}": x for key, x in average.items()}})
        assert are_equal(read_weights(path).state, mae)
        assert re.fullmatch(rf".*reads {name}, not {ema}; --use_ema .*\n", capsys.readouterr().out)
        assert are_equal(read_weights(path, use_ema=True).state, average)
        assert capsys.readouterr().out == f"{path}: reads {ema}\n"
    with pytest.raises(ValueError, match=r"--use_ema: .*in\.pth"):
        read_weights(save_content(tmp_path, {"model": mae}), use_ema=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.module."])
def test_wrappers_are_removed_in_any_order_and_number(prefix, mae, tmp_path, capsys):
    path = save_content(tmp_path, {"model": {prefix + key: value for key, value in mae.items()}})
    assert are_equal(read_weights(path).state, mae)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder.", "backbone.vit.", "model._orig_mod.backbone."])
@pytest.mark.parametrize("host", HOSTS)
def test_prefixes_of_training_frameworks_are_removed_and_printed(prefix, host, tmp_path, capsys):
    state = to_timm(state_of(host))
    named = {prefix + key: value for key, value in state.items()}
    path = save_content(tmp_path, {"state_dict": named, "pytorch-lightning_version": "2.5"})
    assert are_equal(read_weights(path).state, state)
    assert re.fullmatch(rf"{path}: .* {re.escape(prefix)}\n", capsys.readouterr().out)
    heads = {"projector.weight": torch.ones(2), "momentum_backbone.patch_embed.proj.weight": torch.ones(2)}
    weights = read_weights(save_content(tmp_path, {"state_dict": named | heads}))
    assert "ignores 2 keys" in capsys.readouterr().out
    assert "projector.weight" in weights.dropped[0]


def test_errors_of_other_families_are_short(mae, tmp_path):
    swin = {f"layers.{i}.blocks.{j}.attn.table": torch.ones(1) for i in range(4) for j in range(18)}
    swin |= {"patch_embed.proj.weight": torch.ones(96, 3, 4, 4), "norm.weight": torch.ones(768)}
    with pytest.raises(ValueError, match=r"unknown: layers\.0.* 68 more; missing: .* more") as error:
        read_weights(save_content(tmp_path, swin))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("flag", "value", "has"), [("patch_size", 16, 8), ("in_chans", 1, 3)])
def test_a_patch_size_or_channels_that_the_file_lacks_are_refused_with_its_own(flag, value, has, mae, tmp_path):
    path = save_content(tmp_path, {"model": mae})
    with pytest.raises(ValueError, match=rf"--{flag} {value}: .*in\.pth has {has}"):
        our_features(path, torch.randn(1, 3, 32, 32), **{flag: value})


# ---------------------------------------------------------------------------------------------- broken and malicious files

BROKEN = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "text": (b"hello there, this is no checkpoint at all", "in.pth .*readable"),
    "empty": (b"", "in.pth .*readable"),
    "bytes": (bytes(range(256)) * 8, "in.pth .*readable"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_errors_of_broken_files_are_one_line(kind, tmp_path):
    content, words = BROKEN[kind]
    path = tmp_path / "in.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to execute the file is not repeated
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files_are_named(share, mae, tmp_path):
    path = save_content(tmp_path, {"model": mae})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"in\.pth .*readable"):
        read_weights(path)


def test_old_files_with_an_inserted_byte_are_refused(tmp_path):
    """Files from before torch 1.6 have no checksums: the byte shifts the tensors and leaves one byte at the end."""
    path = tmp_path / "in.pth"
    torch.save({"norm.weight": torch.ones(5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for place in (len(content), len(content) - 10):  # after the 20 bytes of the tensor, and in them
        path.write_bytes(content[:place] + b"x" + content[place:])
        assert torch.load(path, weights_only=True)["norm.weight"].shape == (5,)  # torch itself does not notice
        with pytest.raises(ValueError, match=r"in\.pth .*last tensor"):
            load_content(path)


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        read_weights(tmp_path / "nothing.pth")


class Evil:
    """Pickles to a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_code_is_refused_and_not_executed(new_format, mae, tmp_path):
    victim = tmp_path / "victim"
    content = {"model": mae, "args": Evil(f"touch {victim}")}
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"in\.pth holds .*system"):
        read_weights(tmp_path / "in.pth")
    assert not victim.exists()
    torch.load(tmp_path / "in.pth", weights_only=False)
    assert victim.exists()  # control: the file executes the command


class EvilGetattr:
    """Pickles to builtins.getattr, which is on the allow-list; a placeholder must replace it."""

    def __reduce__(self):
        return getattr, ({}, "keys")


def test_allowed_globals_are_replaced_by_placeholders(mae, tmp_path):
    path = save_content(tmp_path, {"model": mae, "x": EvilGetattr(), "y": np.float64(3), "z": np.arange(3)})
    content = load_content(path)
    assert {type(content[key]) for key in "xyz"} == {Placeholder}
    assert not any(vars(content[key]) for key in "xyz")


@pytest.fixture
def message_hub():
    """A training history like mmengine's, whose module can be imported while saving only."""

    class HistoryBuffer:
        def __init__(self):
            self.history, self.counts = np.random.default_rng(0).random(5), np.ones(5, dtype=np.int64)
            self.statistics = {"mean": HistoryBuffer.mean}

        def mean(self):
            return self.history.mean()

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = name, "HistoryBuffer.mean"
    modules = {part: types.ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    modules[name].HistoryBuffer = HistoryBuffer
    sys.modules.update(modules)
    yield {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 3, "lr": np.float64(0.1)}}
    for part in modules:
        sys.modules.pop(part, None)


def test_mmengines_message_hub_is_ignored(message_hub, mae, tmp_path):
    path = save_content(tmp_path, {"state_dict": to_mm_names(mae), "meta": {"epoch": 1}, "message_hub": message_hub})
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"mmengine.logging.history_buffer.HistoryBuffer", "numpy.ndarray", "builtins.getattr"} <= set(asked)
    for part in [part for part in sys.modules if part.startswith("mmengine")]:
        del sys.modules[part]
    weights = read_weights(path)
    assert (weights.source, are_equal(weights.state, mae)) == ("mm", True)
    assert not any(part.startswith("mmengine") for part in sys.modules)


def test_reading_leaves_torchs_safe_globals_unchanged(mae, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read_weights(save_content(tmp_path, {"model": mae, "args": argparse.Namespace(a=np.float64(1))}))
    assert set(torch.serialization.get_safe_globals()) == before


# ---------------------------------------------------------------------------------------------------------- command line


def run(*arguments, module: bool = False) -> subprocess.CompletedProcess:
    start = ["-m", "util.convert"] if module else ["util/convert.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
def test_convert_runs_as_a_module_and_as_a_script(module, mae, tmp_path):
    result = run(save_content(tmp_path, WRAPPERS["mm"](mae)), tmp_path / "out.pth", module=module)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mm, 50 keys mapped" in result.stdout
    assert "mask_token and decoder_* (20 keys)" in result.stdout
    assert are_equal(torch.load(tmp_path / "out.pth", weights_only=True), to_timm(mae))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_missing_recipe_of_convert_gives_a_one_line_error():
    result = run("@nowhere.args", "x.pth")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("convert.py: error: @nowhere.args: recipe ")


def test_a_failed_conversion_exits_with_1_and_does_not_change_out(mae, tmp_path):
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")
    result = run(save_content(tmp_path, {"model": mae | {"extra": torch.ones(1)}}), out, "--to", "mae")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("convert.py: error: ")
    assert result.stderr.count("\n") == 1
    assert out.read_bytes() == b"precious"


def test_a_custom_encoder_is_read_unchanged_but_not_converted(mae, tmp_path):
    state = mae | {"gate.weight": torch.ones(3)}
    path = save_content(tmp_path, {"format": "pixmim-1", "model": state, "args": {"model": "gated"}})
    weights = read_weights(path)
    assert are_equal(weights.state, state)
    assert family(state) is default_format(state) is None
    result = run(path, tmp_path / "out.pth", module=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"convert\.py: error: gate\.weight: .*\n", result.stderr)
    assert not (tmp_path / "out.pth").exists()


def test_an_invalid_flag_exits_with_2():
    assert run("a", "b", "--to", "tensorflow").returncode == 2


@pytest.mark.parametrize("spelling", ["in.pth", "./x/../in.pth"])
def test_conversion_never_overwrites_its_input(spelling, mae, tmp_path):
    path = save_content(tmp_path, {"model": mae})
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"in\.pth"):
        convert.convert(path, Path(os.path.join(tmp_path, spelling)), "timm")


@pytest.mark.parametrize("out", ["", "nowhere/out.pth"])
def test_an_unwritable_out_is_refused_before_reading(out, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / out))):
        convert.convert(tmp_path / "missing.pth", tmp_path / out, "timm")


def test_a_full_disk_changes_no_file_and_leaves_no_temporary_file(mae, tmp_path, monkeypatch):
    path, out = save_content(tmp_path, {"model": mae}), tmp_path / "out.pth"
    out.write_bytes(b"precious")

    def half_written(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="No space"):
        convert.convert(path, out, "timm")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in.pth", "out.pth"]
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize("target", ["timm", "mae", "mmpretrain", "mmseg", "detectron2", "timm --folder", "hf"])
def test_a_file_above_the_size_limit_gives_a_one_line_error_with_its_name(target, mae, tmp_path):
    path, out = save_content(tmp_path, {"model": mae}), tmp_path / "out"
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\nfrom util.args import run_main; from util.convert import main; run_main(main)"
    status, _, err = ended(spawn("-c", limited, path, out, "--to", *target.split()))
    assert status == 1
    assert re.fullmatch(rf"-c: error: {out} .*written.*unchanged\n", err)
    assert [x.name for x in tmp_path.iterdir()] == ["in.pth"]


def test_formats_import_only_torch_and_the_standard_library():
    imports = {
        name
        for path in [ROOT / "util" / "convert.py", *(ROOT / "util" / "formats").glob("*.py")]
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    }
    assert {name for name in imports if name not in sys.stdlib_module_names} == {"torch", "util"}
