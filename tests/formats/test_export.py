"""Every format that util.convert writes: read back unchanged, and loaded by its library."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from PIL import Image
from reference.make import read
from safetensors.torch import save_file
from test_convert import HOSTS, SIZES, Evil, are_equal, build_pixmim, load_line, make_classifier, perturb, save_content
from torch import Tensor, nn
from torch.testing import assert_close

from models_pixmim import MaskedViT, PixMIM
from util import convert
from util.data.decode import read_image
from util.data.pixels import PixelOptions
from util.data.transforms import eval_transform
from util.formats.commands import load_command
from util.formats.configs import hf_processor, timm_config
from util.formats.keys import mae_names, rename, to_hf, to_timm
from util.formats.read import read_weights
from util.formats.weights import Weights

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> PixMIM:
    return build_pixmim(HOSTS["vit"]())


@pytest.fixture
def mae(model) -> dict[str, Tensor]:
    return mae_names(model.state_dict())


def write_format(state: dict[str, Tensor], place: Path, target: str, args: dict | None = None, **options) -> Path:
    """File or folder that `--to target` writes from a run's checkpoint, in the folder `place`."""
    path = save_content(place, {"format": "pixmim-1", "model": state, "args": args or {}})
    out = place / f"{target}-{len(list(place.iterdir()))}"
    convert.convert(path, out, target, **options)
    return out


# --------------------------------------------------------------------------------------------------------- round trips

FORMATS: dict[str, dict[str, Any]] = {
    "mae": {"target": "mae"},
    "timm": {"target": "timm"},
    "timm folder": {"target": "timm", "folder": True},
    "hf": {"target": "hf"},
    "hf encoder": {"target": "hf", "encoder_only": True},
    "mmpretrain": {"target": "mmpretrain"},
    "mmseg MAE": {"target": "mmseg"},
    "mmseg VisionTransformer": {"target": "mmseg", "backbone": "VisionTransformer"},
    "detectron2": {"target": "detectron2"},
}
WHOLE = {"mae", "hf", "mmpretrain"}  # the others hold the encoder only
SOURCES = {"mae": "mae", "timm": "timm", "hf": "hf", "mmpretrain": "mm", "mmseg": "mmseg", "detectron2": "mae"}


PAIRS = [(one, two) for one, two in product(FORMATS, FORMATS) if one in WHOLE or two != "hf"]  # hf needs the decoder


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_conversion_between_any_two_formats_keeps_every_tensor(first, second, mae, tmp_path):
    one = write_format(mae, tmp_path, **FORMATS[first])
    report = convert.convert(one, tmp_path / "two", **FORMATS[second])
    whole = first in WHOLE and second in WHOLE
    weights = read_weights(tmp_path / "two")
    assert are_equal(weights.state, mae if whole else to_timm(mae))
    assert weights.source == SOURCES[FORMATS[second]["target"]]
    lost = first in WHOLE and second not in WHOLE
    assert report.splitlines()[1] == f"dropped  {'mask_token and decoder_* (20 keys)' if lost else 'nothing'}"


@pytest.mark.parametrize("kind", [k for k in FORMATS if k not in WHOLE])
def test_mff_is_exported_as_a_plain_vit_encoder(kind, tmp_path):
    state = mae_names(build_pixmim(HOSTS["mff_vit"]()).state_dict())
    assert are_equal(read_weights(write_format(state, tmp_path, **FORMATS[kind])).state, to_timm(state))


def name_in_5(name: str) -> str:
    """Name of a tensor in transformers 5.x in memory, from its name in 4.x."""
    for old, new in {
        "vit.encoder.layer.": "vit.layers.", "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    return name


SPELLINGS: dict[str, Callable[[str], str]] = {
    "4.x": str,
    "5.x in memory": name_in_5,
    "5.x on disk": lambda name: name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("bare", [False, True], ids=["with decoder", "bare encoder"])
def test_tensor_names_of_all_transformers_versions_are_read(spelling, bare, mae, tmp_path):
    theirs = to_hf(to_timm(mae) if bare else mae)
    state = {SPELLINGS[spelling](name): value for name, value in theirs.items()}
    if bare:
        state = {name.removeprefix("vit."): value for name, value in state.items()}
        state |= {"pooler.dense.weight": torch.ones(192, 192), "pooler.dense.bias": torch.ones(192)}
    weights = read_weights(save_content(tmp_path, state))
    assert weights.source == "hf"
    assert are_equal(weights.state, to_timm(mae) if bare else mae)
    assert weights.dropped == (["vit.pooler.dense.weight", "vit.pooler.dense.bias"] if bare else [])


def test_a_tensor_under_two_names_is_refused(mae, tmp_path):
    state = to_hf(mae)
    state |= {name_in_5(name): value for name, value in state.items() if "layer.0.output.dense.bias" in name}
    with pytest.raises(ValueError, match=r"unknown: vit\.layers\.0\.mlp\.fc2\.bias$"):
        read_weights(save_content(tmp_path, state))


def test_a_missing_query_key_or_value_is_refused(mae, tmp_path):
    state = to_hf(mae)
    del state["vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(
        ValueError, match=r"unknown: .*query\.bias, .*value\.bias; missing: .*\{query,key,value\}\.bias$"
    ):
        read_weights(save_content(tmp_path, state))


# ------------------------------------------------------------------------------------------------------- keys of files


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: [*value.shape] for name, value in state.items()}


@pytest.mark.parametrize("reference", ["pixmim", "mff"])
def test_mmpretrain_files_have_the_keys_and_shapes_of_the_release(reference, tmp_path):
    theirs = read(reference)["checkpoint"]["state_dict"]
    path = save_content(tmp_path, {"state_dict": theirs, "meta": {}})
    convert.convert(path, tmp_path / "out.pth", "mmpretrain")
    ours = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert shapes(ours) == {k: v for k, v in shapes(theirs).items() if not k.startswith("target_generator.")}


@pytest.mark.parametrize("backbone", ["MAE", "VisionTransformer"])
def test_mmsegmentation_files_have_the_keys_and_shapes_of_its_backbone(backbone, tmp_path):
    """mmseg/models/backbones/{mae,beit,vit}.py: MAE has a qkv of its own, VisionTransformer torch's MultiheadAttention."""
    theirs = read("pixmim")["checkpoint"]["state_dict"]
    path = save_content(tmp_path, {"state_dict": theirs, "meta": {}})
    convert.convert(path, tmp_path / "out.pth", "mmseg", backbone=backbone)
    ours = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    wanted = {k.removeprefix("backbone."): v for k, v in shapes(theirs).items() if k.startswith("backbone.")}
    if backbone == "VisionTransformer":
        torchs = {".attn.qkv.": ".attn.attn.in_proj_", ".attn.proj.": ".attn.attn.out_proj."}
        for old, new in torchs.items():
            wanted = {k.replace(old, new): v for k, v in wanted.items()}
        attention = nn.MultiheadAttention(wanted["cls_token"][-1], 3)
        prefix = "layers.0.attn.attn."
        assert {k.removeprefix(prefix): v for k, v in wanted.items() if k.startswith(prefix)} == shapes(
            attention.state_dict()
        )
    assert shapes(ours) == wanted


def vitdet(width: int, depth: int, patch: int, positions: int, grid: int) -> dict[str, list[int]]:
    """Tensors of Detectron2's ViT in a SimpleFeaturePyramid: detectron2/modeling/backbone/vit.py, with relative positions."""
    layers = {"patch_embed.proj": [width, 3, patch, patch]}
    for n in range(depth):
        layers |= {f"blocks.{n}.{name}": shape for name, shape in (
            ("norm1", [width]), ("attn.qkv", [3 * width, width]), ("attn.proj", [width, width]), ("norm2", [width]),
            ("mlp.fc1", [4 * width, width]), ("mlp.fc2", [width, 4 * width]))}  # fmt: skip
    tensors = {
        f"backbone.net.{k}.{x}": s if x == "weight" else s[:1] for k, s in layers.items() for x in ("weight", "bias")
    }
    tensors |= {f"backbone.net.blocks.{n}.attn.rel_pos_{a}": [2 * grid - 1, 64] for n in range(depth) for a in "hw"}
    pyramid = {
        f"backbone.simfp_{n}.{i}.norm.{x}": [256] for n in (2, 3, 4, 5) for i in (4, 5) for x in ("weight", "bias")
    }
    return tensors | pyramid | {"backbone.net.pos_embed": [1, positions, width]}


def match_names(model: dict[str, list[int]], checkpoint: dict[str, list[int]]) -> dict[str, str]:
    """Detectron2's heuristics: a tensor takes the longest name that its own ends with, if the shapes agree."""
    pairs = {}
    for name, shape in model.items():
        ends = [key for key in checkpoint if name == key or name.endswith(f".{key}")]
        if ends and checkpoint[max(ends, key=len)] == shape:
            pairs[name] = max(ends, key=len)
    return pairs


@pytest.mark.parametrize("size", [32, 64])
def test_detectron2_matches_every_tensor_of_its_vit(size, mae, tmp_path):
    path = save_content(tmp_path, {"model": mae})
    report = convert.convert(path, tmp_path / "out.pth", "detectron2", input_size=(size, size))
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    theirs = vitdet(192, 2, 8, (size // 8) ** 2 + 1, 16)
    found = match_names(theirs, shapes(state))
    assert {name for name in theirs if name not in found} == {n for n in theirs if "rel_pos" in n or "simfp" in n}
    assert {*state} - {*found.values()} == {"cls_token", "norm.weight", "norm.bias"}  # it has none
    assert all(name == f"backbone.net.{key}" for name, key in found.items())
    assert load_line(report) == (
        f"'train.init_checkpoint=\"{tmp_path}/out.pth?matching_heuristics=True\"' model.backbone.net.pretrain_img_size={size} "
        "model.backbone.net.embed_dim=192 model.backbone.net.depth=2 model.backbone.net.num_heads=3 model.backbone.net.patch_size=8 "
        "model.backbone.top_block=null 'model.proposal_generator.in_features=[p1,p2,p3,p4]' "
        "'model.proposal_generator.anchor_generator.sizes=[[16],[32],[64],[128]]' "
        "'model.proposal_generator.anchor_generator.strides=[2,4,8,16]' "
        "'model.roi_heads.box_in_features=[p1,p2,p3,p4]' 'model.roi_heads.box_pooler.scales=[0.5,0.25,0.125,0.0625]' "
        "'model.roi_heads.mask_in_features=[p1,p2,p3,p4]' 'model.roi_heads.mask_pooler.scales=[0.5,0.25,0.125,0.0625]'"
    )


def test_detectron2_drops_position_embeddings_of_another_size(mae):
    """Control, and the silent failure described in docs/downstream.md."""
    assert "backbone.net.pos_embed" not in match_names(vitdet(192, 2, 8, 14 * 14 + 1, 16), shapes(to_timm(mae)))


def test_the_check_in_the_docs_lists_tensors_that_were_not_loaded(mae):
    """Function `lost` in docs/downstream.md, on a model built like ViTDet."""
    page = (Path(__file__).parents[2] / "docs" / "downstream.md").read_text()
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], found)
    file = to_timm(mae)
    net = MaskedViT(**SIZES)
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"net": net})})
    assert set(found["lost"](detector, file, "backbone.net.")) >= {"pos_embed", "cls_token", "blocks.0.attn.qkv.weight"}
    net.load_state_dict(file)
    net.norm, net.cls_token = nn.Identity(), None
    assert found["lost"](detector, file, "backbone.net.") == ["cls_token", "norm.weight", "norm.bias"]
    net.pos_embed = nn.Parameter(torch.zeros(1, 26, 192))
    assert "pos_embed" in found["lost"](detector, file, "backbone.net.")


def test_an_encoder_as_wide_as_the_feature_pyramid_is_refused_by_detectron2(tmp_path):
    state = MaskedViT(img_size=32, patch_size=8, embed_dim=256, depth=1, num_heads=4).state_dict()
    assert "backbone.simfp_2.4.norm.weight" in match_names(vitdet(256, 1, 8, 17, 16), shapes(state))
    with pytest.raises(ValueError, match="--to detectron2: width 256"):
        write_format(state, tmp_path, "detectron2")


def test_a_patch_size_without_a_pyramid_of_vitdet_is_refused(tmp_path):
    state = MaskedViT(img_size=28, patch_size=14, embed_dim=192, depth=1, num_heads=3).state_dict()
    with pytest.raises(ValueError, match=r"--to detectron2: .* 16 or 8, not 14"):
        write_format(state, tmp_path, "detectron2")


def test_the_mmpretrain_command_works_from_any_folder(mae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = convert.convert(save_content(tmp_path, {"model": mae}), Path("a b.pth"), "mmpretrain")
    options = dict(word.split("=") for word in shlex.split(load_line(report))[1:])
    assert options["model.backbone.init_cfg.checkpoint"] == f"{tmp_path}/a b.pth"


def test_load_commands_of_vit_b_have_only_the_required_overrides(tmp_path):
    weights = Weights.from_state(
        MaskedViT(embed_dim=768, depth=12, num_heads=12, img_size=448).state_dict(), {}, "mae", []
    )
    assert load_command(weights, "detectron2", "/x.pth") == (
        "'train.init_checkpoint=\"/x.pth?matching_heuristics=True\"' model.backbone.net.pretrain_img_size=448"
    )
    assert (
        load_command(weights, "mmseg", "/x.pth")
        == "--cfg-options model.pretrained=/x.pth model.backbone.init_values=1.0"
    )
    line = load_command(weights, "mmseg", "/x.pth", backbone="VisionTransformer")
    assert line == "--cfg-options model.pretrained=/x.pth model.backbone.patch_bias=True"


# --------------------------------------------------------------------------------------------------- files in other libraries


def are_close(theirs: Tensor, ours: Tensor) -> bool:
    """Equal up to float32 rounding in another order of summation."""
    return bool(torch.allclose(theirs, ours, rtol=1e-4, atol=2e-5))


def break_states(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """States with mistakes of a converter; every comparison must detect each."""
    swapped, positionless, normless = dict(state), dict(state), dict(state)
    for x in ("weight", "bias"):
        swapped[f"blocks.0.norm1.{x}"], swapped[f"blocks.0.norm2.{x}"] = (
            state[f"blocks.0.norm2.{x}"],
            state[f"blocks.0.norm1.{x}"],
        )
    positionless["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), state["pos_embed"][:, 1:]], 1)
    normless |= {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192)}
    q, k, v = state["blocks.0.attn.qkv.weight"].chunk(3)
    return {
        "query and key": state | {"blocks.0.attn.qkv.weight": torch.cat([k, q, v])},
        "norm1 and norm2": swapped,
        "final norm": normless,
        "class position": positionless,
    }


def in_timm(folder: Path, images: Tensor) -> Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(images)


def in_transformers(folder: Path, images: Tensor) -> Tensor:
    return transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()(images).last_hidden_state


def in_onnxruntime(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0])


LIBRARIES: dict[str, tuple[Callable, dict]] = {
    "timm": (in_timm, {"target": "timm", "folder": True}),
    "transformers": (in_transformers, {"target": "hf", "encoder_only": True}),
    "onnxruntime": (in_onnxruntime, {"target": "onnx"}),
}


@pytest.fixture(scope="session")
def onnx_graph(tmp_path_factory) -> tuple[PixMIM, Path]:
    """A model and the ONNX graph of its encoder; the export takes seconds."""
    model = build_pixmim(HOSTS["vit"]())
    return model, write_format(mae_names(model.state_dict()), tmp_path_factory.mktemp("onnx"), "onnx")


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_other_libraries_give_equal_features_and_detect_swapped_tensors(library, model, mae, tmp_path, onnx_graph):
    use, options = LIBRARIES[library]
    if library == "onnxruntime":
        model, path = onnx_graph
        mae = mae_names(model.state_dict())
    else:
        path = write_format(mae, tmp_path, **options)
    ours = model.encoder.forward_features(IMAGES)
    assert are_close(use(path, IMAGES), ours)
    for slip, state in break_states(mae).items():
        if library != "onnxruntime" or slip == "query and key":  # an export takes seconds
            assert not are_close(use(write_format(state, tmp_path, **options), IMAGES), ours), slip


@torch.no_grad()
def test_layer_norm_eps_is_1e_6_in_every_library(mae, tmp_path):
    """Tokens of 1e-3: eps 1e-6 halves the output of the first norm, transformers' 1e-12 does not."""
    faint = mae | {
        name: mae[name] * 1e-3
        for name in ("pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
    }
    encoder = MaskedViT(**SIZES).eval()
    encoder.load_state_dict(to_timm(faint))
    ours = encoder.forward_features(IMAGES)
    for use, options in LIBRARIES.values():
        assert are_close(use(write_format(faint, tmp_path, **options), IMAGES), ours)
    folder = write_format(faint, tmp_path, **LIBRARIES["transformers"][1])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    assert not are_close(in_transformers(folder, IMAGES), ours)


@torch.no_grad()
def test_transformers_gives_equal_loss_and_prediction(model, mae, tmp_path):
    folder = write_format(mae, tmp_path, "hf", args={"decoder_heads": 2})
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    noise = torch.rand(3, 16)
    loss, prediction, mask = model(IMAGES, noise)
    output = theirs.eval()(IMAGES, noise=noise)
    assert torch.equal(output.mask.bool(), mask.removed)
    assert are_close(output.loss, loss)
    assert are_close(output.logits.gather(1, mask.predict[..., None].expand_as(prediction)), prediction)
    for raw in (False, True):  # control: the loss of raw pixels differs
        theirs.config.norm_pix_loss = not raw
        assert are_close(theirs(IMAGES, noise=noise).loss, loss) != raw


@torch.no_grad()
def test_zeroed_decoder_tensors_change_the_prediction_of_transformers(model, mae, tmp_path):
    noise = torch.rand(3, 16)
    _, prediction, mask = model(IMAGES, noise)
    for name in ("decoder_norm.bias", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_embed.bias"):
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(
            write_format(mae | {name: mae[name] * 0}, tmp_path, "hf")
        )
        logits = theirs.eval()(IMAGES, noise=noise).logits
        assert not are_close(logits.gather(1, mask.predict[..., None].expand_as(prediction)), prediction)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves a file open
@pytest.mark.parametrize("encoder_only", [False, True], ids=["with decoder", "encoder only"])
def test_folders_saved_by_transformers_are_read_unchanged(encoder_only, mae, tmp_path):
    kind = transformers.ViTModel if encoder_only else transformers.ViTMAEForPreTraining
    kind.from_pretrained(write_format(mae, tmp_path, "hf", encoder_only=encoder_only)).save_pretrained(
        tmp_path / "theirs"
    )
    weights = read_weights(tmp_path / "theirs")
    assert are_equal(weights.state, to_timm(mae) if encoder_only else mae)
    heads = {"num_heads": 3} | ({} if encoder_only else {"decoder_heads": 2, "norm_pix_loss": True, "mask_ratio": 0.75})
    assert weights.args == heads | {"input_size": [32, 32]}


@torch.no_grad()
def test_the_transformers_preprocessor_equals_the_evaluation_transform(mae, tmp_path):
    folder = write_format(mae, tmp_path, "hf", args={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).resize((160, 120)).save(tmp_path / "x.png")
    ours = eval_transform((32, 32))(
        read_image(os.fsencode(tmp_path / "x.png"), PixelOptions(3)), np.random.default_rng(0)
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    levels = ((theirs * std + mean) * 255 - torch.from_numpy(ours).permute(2, 0, 1)).abs()
    assert levels.mean() < 1  # of 255: torchvision resizes tensors, Pillow images
    assert levels.max() < 8


@pytest.mark.parametrize(
    ("size", "crop_pct", "share"), [(224, None, 0.875), (256, None, 1), (384, None, 1), (384, 0.5, 0.5)]
)
def test_folders_state_the_crop_of_evaluation(size, crop_pct, share, mae):
    args = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": crop_pct}
    weights = Weights.from_state(mae, args, "mae")
    weights = replace(weights, input_size=(size, size))
    assert timm_config(weights)["pretrained_cfg"]["crop_pct"] == share
    assert hf_processor(weights)["size"] == {"shortest_edge": int(size / share)}


@torch.no_grad()
def test_timm_folders_state_their_preprocessing(mae, tmp_path):
    folder = write_format(mae, tmp_path, "timm", folder=True, args={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert timm.data.resolve_model_data_config(model) == {
        "input_size": (3, 32, 32), "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
        "crop_pct": 0.875, "crop_mode": "center",
    }  # fmt: skip
    assert are_equal(model.state_dict(), to_timm(mae))
    assert (model.global_pool, model.num_classes) == ("token", 0)
    assert json.loads((folder / "config.json").read_text())["global_pool"] == "token"


@pytest.mark.parametrize("kind", ["encoder", "fine-tuned", "probe of the class token", "probe of the mean"])
@torch.no_grad()
def test_timm_folders_load_by_the_usual_entry_points_of_transformers(kind, mae, tmp_path):
    """AutoModel, AutoModelForImageClassification, AutoImageProcessor and pipeline give the numbers of timm."""
    state, args, classes = mae, {}, ["ant", "bee", "cat", "dog", "eel"]
    if kind != "encoder":
        state = make_classifier(mae, PROBES[kind][0])
        args = {"pool": PROBES[kind][1], "classes": classes}
    folder = write_format(state, tmp_path, "timm", folder=True, args=args)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    output = transformers.AutoModel.from_pretrained(folder).eval()(IMAGES)
    assert torch.equal(output.last_hidden_state, theirs.forward_features(IMAGES))
    assert torch.equal(output.pooler_output, theirs.forward_head(output.last_hidden_state, pre_logits=True))
    if kind == "encoder":
        return
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(classifier(IMAGES).logits, theirs(IMAGES))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    best = transformers.pipeline("image-classification", model=str(folder), device="cpu")(picture, top_k=1)[0]
    wanted = theirs(pixels).softmax(1)[0]
    assert best["label"] == classes[wanted.argmax()]
    assert best["score"] == pytest.approx(wanted.max().item(), abs=1e-5)


@torch.no_grad()
def test_transformers_folders_load_by_the_auto_classes(mae, tmp_path):
    encoder = MaskedViT(**SIZES).eval()
    encoder.load_state_dict(to_timm(mae))
    folder = write_format(mae, tmp_path, "hf", encoder_only=True)
    tokens = transformers.AutoModel.from_pretrained(folder).eval()(IMAGES).last_hidden_state
    assert are_close(tokens, encoder.forward_features(IMAGES))
    state, classes = make_classifier(mae, pooled=False), ["ant", "bee", "cat", "dog", "eel"]
    folder = write_format(state, tmp_path, "hf", args={"classes": classes})
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert are_close(classifier(IMAGES).logits, scores(state, "probe of the class token"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    best = transformers.pipeline("image-classification", model=str(folder), device="cpu")(picture, top_k=1)[0]
    assert best["label"] in classes


@torch.no_grad()
def test_timm_folders_load_from_the_hub(mae, tmp_path, monkeypatch):
    """A folder in the cache of huggingface_hub, as after the download; without network."""
    snapshot = tmp_path / "cache" / "models--someone--pixmim" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    os.replace(write_format(mae, tmp_path, "timm", folder=True), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("timm.models._builder._CHECK_HASH", False)
    model = timm.create_model("hf-hub:someone/pixmim", pretrained=True, cache_dir=tmp_path / "cache")
    assert are_equal(model.state_dict(), to_timm(mae))


PROBES = {  # kind of classifier -> whether norm became fc_norm, pool of the run
    "fine-tuned": (True, None),
    "probe of the class token": (False, None),
    "probe of the mean": (False, "mean"),
}


def scores(state: dict[str, Tensor], kind: str) -> Tensor:
    """Logits of the classifier, computed by hand from tokens before the last norm."""
    pooled, pool = PROBES[kind]
    encoder = MaskedViT(**SIZES).eval()
    encoder.load_state_dict(
        {k: v for k, v in state.items() if k.split(".")[0] not in ("fc_norm", "norm", "head")}, strict=False
    )
    encoder.norm = nn.Identity()
    tokens = encoder.forward_features(IMAGES)
    norm = "fc_norm" if pooled else "norm"

    def normed(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (192,), state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6)

    x = normed(tokens[:, 1:].mean(1)) if pooled else normed(tokens)[:, 1:].mean(1) if pool else normed(tokens)[:, 0]
    return x @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("kind", PROBES)
@torch.no_grad()
def test_classifiers_give_the_same_logits_in_every_library(kind, mae, tmp_path):
    pooled, pool = PROBES[kind]
    state, classes = make_classifier(mae, pooled), ["ant", "bee", "cat", "dog", "eel"]
    args = {"pool": pool, "classes": classes}
    ours = scores(state, kind)
    folder = write_format(state, tmp_path, "timm", folder=True, args=args)
    assert are_close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGES), ours)
    assert json.loads((folder / "config.json").read_text())["label_names"] == classes
    weights = read_weights(folder)
    assert (are_equal(weights.state, state), weights.pool, weights.classes) == (True, pool, classes)
    session = onnxruntime.InferenceSession(
        write_format(state, tmp_path, "onnx", args=args), providers=["CPUExecutionProvider"]
    )
    features, tokens, logits = session.run(["features", "tokens", "logits"], {"images": IMAGES.numpy()})
    assert are_close(torch.from_numpy(logits), ours)
    assert (features.shape, tokens.shape) == ((3, 192), (3, 17, 192))
    if kind == "probe of the class token":
        model = transformers.ViTForImageClassification.from_pretrained(
            write_format(state, tmp_path, "hf", args=args)
        ).eval()
        assert are_close(model(IMAGES).logits, ours)
        assert [*model.config.id2label.values()] == classes
    else:
        for encoder_only in (False, True):
            with pytest.raises(ValueError, match=r"--to hf.* use --to timm"):
                write_format(state, tmp_path, "hf", args=args, encoder_only=encoder_only)


@torch.no_grad()
def test_onnx_features_are_the_mean_of_all_class_tokens(tmp_path):
    encoder = perturb(MaskedViT(**SIZES, reg_tokens=3))
    path = write_format(encoder.state_dict(), tmp_path, "onnx", args={"class_tokens": 4})
    tokens = encoder.forward_features(IMAGES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [features] = session.run(["features"], {"images": IMAGES.numpy()})
    assert are_close(torch.from_numpy(features), tokens[:, :4].mean(1))
    assert not are_close(tokens[:, 0], tokens[:, :4].mean(1))  # timm's feature


@torch.no_grad()
def test_onnx_graphs_accept_batches_of_any_size(onnx_graph):
    model, path = onnx_graph
    for images in (IMAGES[:1], torch.cat([IMAGES] * 3)):
        assert are_close(in_onnxruntime(path, images), model.encoder.forward_features(images))


# ---------------------------------------------------------------------------------------------------- other sizes of input


@pytest.mark.parametrize("kind", ["timm folder", "hf encoder", "mae", "mmseg MAE"])
@torch.no_grad()
def test_position_embeddings_are_resampled_as_in_facebookresearch_mae(kind, mae, tmp_path):
    """Bicubic without antialiasing; the position of the class token is kept."""
    state = read_weights(write_format(mae, tmp_path, input_size=(48, 64), **FORMATS[kind])).state
    grid = mae["pos_embed"][:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, size=(6, 8), mode="bicubic", align_corners=False).flatten(2).mT
    assert_close(state["pos_embed"], torch.cat([mae["pos_embed"][:, :1], wanted], 1))
    assert ("decoder_pos_embed" in state) == (kind == "mae")
    assert all(value.shape[1] == 49 for name, value in state.items() if "pos_embed" in name)
    assert are_equal(
        {k: v for k, v in state.items() if "pos_embed" not in k}, {k: mae[k] for k in state if "pos_embed" not in k}
    )


@torch.no_grad()
def test_resized_models_give_equal_features_in_every_library(mae, tmp_path):
    images = torch.randn(2, 3, 48, 64)
    ours, *others = (
        use(write_format(mae, tmp_path, input_size=(48, 64), **options), images) for use, options in LIBRARIES.values()
    )
    assert ours.shape == (2, 49, 192)
    assert all(are_close(x, ours) for x in others)


def test_resizing_to_the_same_input_size_changes_nothing(mae, tmp_path):
    assert are_equal(read_weights(write_format(mae, tmp_path, "mae", input_size=(32, 32))).state, mae)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target": "timm", "input_size": (30, 32)}, "--input_size 30 32 .*patch size 8"),
        (
            {"target": "hf", "input_size": (32, 64)},
            "--input_size 32 .* ViTMAE .* 32 x 64",
        ),
        (
            {"target": "detectron2", "input_size": (32, 64)},
            "--input_size 32 .* ViTDet .* 32 x 64",
        ),
        ({"target": "mae", "folder": True}, "--folder .*--to timm"),
        ({"target": "timm", "encoder_only": True}, "--encoder_only .*--to hf.*--to timm"),
        ({"target": "hf", "backbone": "VisionTransformer"}, "--backbone VisionTransformer .*--to mmseg"),
    ],
    ids=["input_size", "hf rectangle", "detectron2 rectangle", "folder", "encoder_only", "backbone"],
)
def test_conflicting_flags_are_refused_in_one_line(flags, words, mae, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        write_format(mae, tmp_path, **flags)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_transformers_files_without_decoder_require_encoder_only(mae, tmp_path):
    with pytest.raises(ValueError, match=r"--to hf.*ViTMAEForPreTraining.* --encoder_only"):
        write_format(to_timm(mae), tmp_path, "hf")
    mff = mae_names(build_pixmim(HOSTS["mff_vit"]()).state_dict())
    with pytest.raises(ValueError, match=r"--to hf .*mff_vit: .*--encoder_only"):
        write_format(mff, tmp_path, "hf")


@pytest.mark.parametrize(
    ("kind", "needs"),
    [("timm folder", True), ("hf", True), ("onnx", True), ("mmseg MAE", False)],
    ids=["timm folder", "hf", "onnx", "mmseg needs none"],
)
def test_an_unknown_grid_requires_input_size(kind, needs, tmp_path):
    encoder = MaskedViT(img_size=(16, 48), patch_size=8, embed_dim=128, depth=1, num_heads=2)
    options = FORMATS.get(kind, {"target": kind}) | ({"encoder_only": True} if kind == "hf" else {})
    if needs:
        with pytest.raises(ValueError, match=r"--input_size .* 12 patches"):
            write_format(encoder.state_dict(), tmp_path, **options)
    assert write_format(encoder.state_dict(), tmp_path, input_size=(16, 48), **options).exists()


def test_numbers_of_heads_in_the_config_are_kept(mae, tmp_path):
    folder = write_format(mae, tmp_path, "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 6, "decoder_num_attention_heads": 4})
    )
    again = json.loads((convert_to(folder, "hf") / "config.json").read_text())
    assert (again["num_attention_heads"], again["decoder_num_attention_heads"]) == (6, 4)
    assert (
        json.loads((convert_to(folder, "timm", folder=True) / "config.json").read_text())["model_args"]["num_heads"]
        == 6
    )
    assert "num_heads=6" in load_command(read_weights(folder), "timm", "x.pth")


@pytest.mark.parametrize("target", ["mae", "mmpretrain", "hf"])
def test_statistics_of_the_run_are_read_back_from_its_conversion(target, mae, tmp_path):
    statistics = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    weights = read_weights(write_format(mae, tmp_path, target, args=statistics))
    assert {"mean": weights.mean, "std": weights.std} == statistics


def test_statistics_in_a_preprocessor_of_openmmlab_are_read_in_pixels_of_0_to_1(mae, tmp_path):
    buffers = {f"data_preprocessor.{key}": torch.tensor([51.0, 102.0, 25.5]).view(3, 1, 1) for key in ("mean", "std")}
    path = save_content(tmp_path, {"state_dict": {rename(k, "mae", "mm"): v for k, v in mae.items()} | buffers})
    weights = read_weights(path)
    assert weights.mean == weights.std == pytest.approx([0.2, 0.4, 0.1])


def test_a_probe_of_the_mean_pools_the_mean_after_conversion(mae, tmp_path):
    head = {"head.weight": torch.randn(5, 192), "head.bias": torch.randn(5)}
    file = write_format(to_timm(mae) | head, tmp_path, "mmpretrain", args={"pool": "mean", "classes": [*"abcde"]})
    weights = read_weights(file)
    assert (weights.averages_normed, weights.classes) == (True, [*"abcde"])


@pytest.mark.parametrize(("args", "said"), [({}, True), ({"norm_pix_loss": False}, False)])
def test_the_report_says_if_the_loss_in_the_config_of_transformers_is_assumed(args, said, mae, tmp_path):
    path = save_content(tmp_path, {"model": mae, "args": args})
    report = convert.convert(path, tmp_path / "hf", "hf")
    assert ("assumed  norm_pix_loss true" in report) == said
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["norm_pix_loss"] == said


def convert_to(path: Path, target: str, **options) -> Path:
    out = path.with_name(f"{path.name}-{target}")
    convert.convert(path, out, target, **options)
    return out


def test_folders_of_other_channels_require_mean_and_std(tmp_path):
    state = MaskedViT(**SIZES, in_chans=5).state_dict()
    with pytest.raises(ValueError, match=r"mean .*std .*5 channels"):
        write_format(state, tmp_path, "timm", folder=True)
    five_channels = {"mean": [0.5] * 5, "std": [0.2] * 5}
    folder = write_format(state, tmp_path, "timm", folder=True, args=five_channels)
    assert read_weights(folder).args["mean"] == [0.5] * 5


# ----------------------------------------------------------------------------------------------------- broken and malicious files


@pytest.fixture
def folder(mae, tmp_path) -> Path:
    """A valid folder of transformers, for tests to damage."""
    return write_format(mae, tmp_path, "hf")


LIES = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 5, "intermediate_size": 3072, "image_size": 224, "patch_size": 16,
    "num_channels": 1, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 0, "hidden_act": "relu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [*LIES.items(), ("image_size", "224"), ("image_size", True), ("num_attention_heads", "3"), ("patch_size", "x")],
)
def test_a_transformers_config_that_contradicts_the_weights_is_refused(key, value, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=rf"config\.json .*{value}") as error:
        read_weights(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["embed_dim", "depth", "patch_size", "in_chans", "img_size", "num_heads"])
def test_a_timm_config_that_contradicts_the_weights_is_refused(key, mae, tmp_path):
    folder = write_format(mae, tmp_path, "timm", folder=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"][key] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json .*7"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("mean", "abc"), ("mean", [0.5]), ("std", [True, 0.1, 0.2]), ("std", {"a": 1})]
)
def test_invalid_mean_and_std_in_a_config_are_refused(key, value, mae, tmp_path):
    folder = write_format(mae, tmp_path, "timm", folder=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json .*{key} .*\(the weights: 3 channels\)"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "config.json .*JSON"),
        (b"\xff\xfe\x00", "config.json .*JSON"),
        (b"[" * 100_000, "config.json .*JSON"),
        (b"[1, 2]", "no config.json"),
        (None, "no config.json"),
    ],
    ids=["broken", "binary", "nested too deeply", "list", "missing"],
)
def test_an_invalid_config_is_refused_in_one_line(content, words, folder):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_weights(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_code_in_a_bin_file_is_refused_and_not_executed(mae, folder):
    victim = folder.parent / "victim"
    (folder / "model.safetensors").unlink()
    torch.save(to_hf(mae) | {"x": Evil(f"touch {victim}")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds .*system"):
        read_weights(folder)
    assert not victim.exists()
    torch.save(to_hf(mae), folder / "pytorch_model.bin")
    assert are_equal(read_weights(folder).state, mae)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_safetensors_files_are_named(share, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for given in (folder, path):
        with pytest.raises(ValueError, match=r"model\.safetensors .*readable") as error:
            read_weights(given)
        assert "\n" not in str(error.value)


def test_safetensors_with_wrong_offsets_are_refused(folder):
    header = json.dumps(
        {"vit.embeddings.cls_token": {"dtype": "F32", "shape": [1, 1, 192], "data_offsets": [0, 10**12]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=r"model\.safetensors .*readable"):
        read_weights(folder)


def test_foreign_safetensors_are_refused_with_their_content(folder):
    save_file({"conv1.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"\b1 keys \(conv1\.weight"):
        read_weights(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_weights(folder)


def test_safetensors_that_begin_like_html_are_read(mae, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(to_timm(mae), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    padded = header + b" " * (0x3C20 - len(header))  # a length whose bytes are b" <"
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])
    assert path.read_bytes()[:2] == b" <"
    assert are_equal(read_weights(path).state, to_timm(mae))


def test_folders_without_weights_and_onnx_files_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        read_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="max_shard_size"):
        read_weights(folder)
    (tmp_path / "x.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(ValueError, match=r"x\.onnx .*ONNX"):
        read_weights(tmp_path / "x.onnx")


def test_a_folder_with_a_convmae_is_refused(folder):
    state = mae_names(build_pixmim(HOSTS["convvit"]()).state_dict())
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"ConvMAE"):
        read_weights(folder)
    assert are_equal(read_weights(folder / "model.safetensors").state, state)


def test_a_custom_encoder_is_not_resized(mae, tmp_path):
    with pytest.raises(ValueError, match=r"^gate"):
        write_format(mae | {"gate": torch.ones(1)}, tmp_path, "timm", input_size=(64, 64))


def test_a_folder_that_is_not_empty_is_never_overwritten(mae, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert.convert(save_content(tmp_path, {"model": mae}), out, "hf")  # an empty folder is accepted
    assert are_equal(read_weights(out).state, mae)
    with pytest.raises(ValueError, match=re.escape(str(out))):
        convert.convert(tmp_path / "in.pth", out, "timm", folder=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_leaves_no_incomplete_folder(mae, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match="No space"):
        write_format(mae, tmp_path, "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


# ------------------------------------------------------------------------------------------------------------------- the hub


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    convert.main()


def test_push_to_hub_creates_a_private_repository(mae, tmp_path, monkeypatch, capsys):
    calls: list[tuple[str, dict]] = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    command(
        monkeypatch, save_content(tmp_path, {"model": mae}), tmp_path / "out", "--folder", "--push_to_hub", "me/pixmim"
    )
    assert calls[0] == ("me/pixmim", {"private": True, "exist_ok": True})
    assert calls[1][1].keys() == {"config.json", "model.safetensors"}
    assert capsys.readouterr().out.endswith("pushed   me/pixmim\n")


def test_push_errors_name_the_flag_and_the_remedy(mae, tmp_path, monkeypatch):
    path = save_content(tmp_path, {"model": mae})
    with pytest.raises(ValueError, match=r"--push_to_hub me/x .*--folder"):
        command(monkeypatch, path, tmp_path / "out.pth", "--push_to_hub", "me/x")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(OSError, match=r"--push_to_hub me/x: division by zero; .*out "):
        command(monkeypatch, path, tmp_path / "out", "--to", "hf", "--push_to_hub", "me/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"--push_to_hub me/x .*pip install huggingface_hub"):
        command(monkeypatch, path, tmp_path / "out2", "--to", "hf", "--push_to_hub", "me/x")


def test_onnx_names_the_missing_package(mae, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"--to onnx .*onnxscript: pip install onnx onnxscript"):
        write_format(mae, tmp_path, "onnx")
