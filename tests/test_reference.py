"""Target, mask, loss, prediction and every gradient against the reference implementations.

The extracts in tests/reference are always compared, the full outputs in ../shared/reference if present. The weights are
read by util.formats.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from reference.make import MEAN, SEEDS, STD, read, sample
from torch import Tensor, nn

from models_convmae import ConvViT
from models_mff import MFFViT
from models_pixmim import Decoder, LowPass, MaskedViT, PixMIM, patch_statistics, patchify, take
from util.formats.keys import mae_names, pixmim_names, rename
from util.formats.read import read_weights
from util.formats.weights import Weights

SHARED = Path(__file__).parents[2] / "shared" / "reference"
EXTRACTS = ["mae", "pixmim", *SEEDS]
WHOLE = [*EXTRACTS, "mm_mae", "pixmim_raw_pixels", "lsmae_lowpass"]
where_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/reference")
CASES = [*(f"extract/{x}" for x in EXTRACTS), *(pytest.param(f"shared/{x}", marks=where_shared) for x in WHOLE)]


def answers_of(case: str) -> dict:
    place, name = case.split("/")
    return torch.load(SHARED / f"{name}.pt", weights_only=True) if place == "shared" else read(name)


def low_pass(images: Tensor, radius: float) -> LowPass:
    return LowPass(tuple(images.shape[-2:]), radius, MEAN.flatten().tolist(), STD.flatten().tolist())


def noise_of(answers: dict) -> Tensor:
    """Noise that gives the reference's mask; long_seq_mae stores only ranks: each 2 x 2 unit gets that of its first patch."""
    if answers["noise"] is not None:
        return answers["noise"]
    cfg = answers["cfg"]
    side, unit = cfg["img_size"] // cfg["patch_size"], cfg["mask_downsampling"]
    ranks = answers["ids_restore"].unflatten(1, (side, side)).float()
    return -nn.functional.max_pool2d(-ranks, unit).flatten(1)


def encoder_of(cfg: dict, weights: Weights) -> MaskedViT | ConvViT:
    """Encoder of the family and sizes of these weights."""
    sizes = {key: getattr(weights, key) for key in ("patch_size", "embed_dim", "depth")}
    sizes |= {"img_size": (cfg["img_size"],) * 2, "num_heads": cfg["num_heads"]}
    if weights.family == "convvit":
        return ConvViT(**sizes)
    return MFFViT(cfg["out_indices"], **sizes) if weights.family == "mff_vit" else MaskedViT(**sizes)


def model_of(answers: dict, folder: Path) -> tuple[PixMIM, Weights]:
    """(PixMIM with the reference's weights, the weights as read from a file)."""
    cfg = answers["cfg"]
    torch.save(answers["checkpoint"], folder / "reference.pth")
    weights = read_weights(folder / "reference.pth")
    radius = answers.get("radius", cfg.get("radius"))
    model = PixMIM(
        encoder_of(cfg, weights),
        low_pass(answers["imgs"], radius) if "target" in answers else nn.Identity(),
        decoder_dim=cfg["decoder_embed_dim"],
        decoder_depth=cfg["decoder_depth"],
        decoder_heads=cfg["decoder_num_heads"],
        mask_ratio=cfg["mask_ratio"],
        mask_unit=cfg.get("mask_downsampling", 1),
        norm_pix_loss=cfg["norm_pix"],
    )
    model.load_state_dict(pixmim_names(weights.state))
    return model, weights


def distance(ours: Tensor, answer: Tensor | dict[str, Tensor]) -> float:
    """Relative L2 distance to a reference tensor or to the samples of it in an extract; 0 = equal."""
    kept = {"values": answer} if isinstance(answer, Tensor) else answer
    mine = {"values": ours} if isinstance(answer, Tensor) else sample(ours)
    return max(float((mine[key] - kept[key]).norm() / kept[key].norm()) for key in kept)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_match_the_reference(case, tmp_path):
    answers = answers_of(case)
    model, weights = model_of(answers, tmp_path)
    images = answers["imgs"]
    loss, prediction, mask = model(images, noise_of(answers))
    loss.backward()

    assert torch.equal(mask.removed, answers["mask"])
    if "target" in answers:
        assert distance(model.target(images), answers["target"]) < 1e-5
    assert loss.item() == pytest.approx(answers["loss"].item(), rel=1e-5)
    if "fusion_weights" in answers:
        share = model.encoder.proj_weights.flatten().softmax(0)
        torch.testing.assert_close(share, answers["fusion_weights"], rtol=0, atol=1e-6)

    if isinstance(answers["pred"], Tensor):
        whole = take(answers["pred"], mask.predict)
        torch.testing.assert_close(prediction, whole, rtol=1e-4, atol=1e-4)
    else:  # extracts store masked patches in raster order
        raster = take(prediction, mask.predict.argsort(1)).flatten(0, 1)
        torch.testing.assert_close(sample(raster)["values"], answers["pred"]["values"], rtol=1e-4, atol=1e-4)

    column = "mm" if weights.source == "mm" else "mae"
    theirs = {rename(key, column, "mae"): value for key, value in answers["grads"].items()}
    ours = mae_names({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert ours.keys() == theirs.keys()
    far = {name: d for name in ours if not (d := distance(ours[name], theirs[name])) < 1e-3}
    assert not far


@where_shared
@pytest.mark.parametrize("name", SEEDS)
def test_extracts_regenerate_the_inputs_and_weights_of_the_reference(name):
    drawn, answers = read(name), answers_of(f"shared/{name}")
    for key in ("imgs", "checkpoint"):
        torch.testing.assert_close(drawn[key], answers[key], rtol=0, atol=1e-5)  # 5e-6 where randn is not vectorised


@where_shared
@pytest.mark.parametrize("name", ["pixmim", "pixmim_raw_pixels"])
def test_target_patches_match_the_released_code(name):
    answers = torch.load(SHARED / f"{name}.pt", weights_only=True)
    patches = patchify(low_pass(answers["imgs"], answers["cfg"]["radius"])(answers["imgs"]), 16)
    if answers["cfg"]["norm_pix"]:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    assert distance(patches, answers["target_patches"]) < 1e-5


def low_pass_cases():
    yield from (pytest.param(partial(read, "lowpass"), key, id=f"extract-{key}") for key in ("32x32_r10", "33x47_r9"))
    keys = ("224x224_r40", "448x448_r80", "96x96_r24", "32x32_r10", "33x47_r9", "224x160_r40", "64x64_r1")
    shared = partial(torch.load, SHARED / "lowpass.pt", weights_only=True)
    yield from (pytest.param(shared, key, id=f"shared-{key}", marks=where_shared) for key in keys)


@pytest.mark.parametrize(("answers", "key"), [*low_pass_cases()])
def test_lowpass_matches_the_released_code(answers, key):
    case = answers()["cases"][key]
    target = low_pass(case["imgs"], case["radius"])(case["imgs"])
    assert distance(target, case["target"]) < 1e-5


@pytest.mark.parametrize("case", ["extract/mae", pytest.param("shared/mae", marks=where_shared)])
def test_initial_position_embeddings_match_mae(case):
    answers = answers_of(case)
    cfg, state = answers["cfg"], answers["checkpoint"]["model"]
    encoder = MaskedViT(img_size=224, patch_size=16, embed_dim=cfg["embed_dim"], depth=1, num_heads=3)
    decoder = Decoder(encoder.grid, cfg["embed_dim"], cfg["decoder_embed_dim"], 1, cfg["decoder_num_heads"], 768, 1)
    torch.testing.assert_close(encoder.pos_embed.data, state["pos_embed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(decoder.pos_embed.data, state["decoder_pos_embed"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["qkv", "norms", "rows"])
def test_wrong_weight_mappings_change_the_prediction(what, tmp_path):
    """Control: an error in the name tables changes the prediction by far more than the tolerance."""
    answers = read("pixmim")
    model, _ = model_of(answers, tmp_path)
    right = model(answers["imgs"], answers["noise"])[1]
    state = model.state_dict()
    block = "encoder.blocks.0."
    if what == "qkv":
        state[block + "attn.qkv.weight"] = state[block + "attn.qkv.weight"].roll(48, 0)
    elif what == "norms":
        a, b = block + "norm1.weight", block + "norm2.weight"
        state[a], state[b] = state[b].clone(), state[a].clone()
    else:  # halves of the position embedding, which mmselfsup and MAE order differently
        state["encoder.pos_embed"] = state["encoder.pos_embed"].roll(24, -1)
    model.load_state_dict(state)
    assert (model(answers["imgs"], answers["noise"])[1] - right).abs().max() > 1e-3
