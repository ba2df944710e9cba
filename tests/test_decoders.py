"""Partial prediction, the cross-attention decoder and several class tokens: CrossMAE and Pixio beside PixMIM."""

import json
import re
from functools import cache, partial

import pytest
import torch
from conftest import (
    DEVICE,
    PRETRAIN,
    ROOT,
    assert_same,
    assert_same_run,
    call,
    free_ports,
    interrupted,
    pretrain,
    ranks,
    records,
    result,
    weights,
)
from PIL import Image
from test_models import MEAN, STD, perturb, slow_loss, small_encoder
from test_pretrain import SIZES, assert_close_runs
from torch import Tensor, nn
from torch.testing import assert_close

import main_pretrain
from models import build_model
from models_convmae import ConvViT
from models_mff import MFFViT
from models_pixmim import (
    ENCODERS,
    LowPass,
    MaskedViT,
    PixMIM,
    mask_from_noise,
    mask_units,
    patchify,
    take,
    unpatchify,
)
from util.args import resolve_defaults
from util.convert import convert
from util.formats.keys import mae_names, pixmim_names
from util.formats.read import read_weights

SHARED = ROOT.parent / "shared" / "reference"
where_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/reference")
SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
DECODERS = {
    "self": {},
    "cross": {"decoder": "cross"},
    "fused": {"decoder": "cross", "fuse_levels": True},
}
every_decoder = pytest.mark.parametrize("kind", DECODERS)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def host(name: str) -> nn.Module:
    sizes = {"img_size": (32, 48), "patch_size": 8}
    vit = {"embed_dim": 24, "depth": 3, "num_heads": 3}
    if name == "convvit":
        return ConvViT(**sizes, embed_dim=(8, 12, 24), depth=(1, 1, 2), num_heads=3)
    return MFFViT(**sizes, **vit) if name == "mff" else MaskedViT(**sizes, **vit)


def small_model(kind: str = "self", target: nn.Module | None = None, encoder: nn.Module | None = None, **options):
    return perturb(PixMIM(encoder or small_encoder(), target or nn.Identity(), **SMALL, **DECODERS[kind], **options))


def gradients(model: PixMIM, images: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(images, noise)[0]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------------------- reference outputs


@where_shared
@pytest.mark.parametrize("name", ["crossmae_kept25", "crossmae_kept75", "pixio"])
def test_outputs_and_gradients_match_the_released_code(name, tmp_path):
    answers = torch.load(SHARED / f"{name}.pt", weights_only=True)
    cfg = answers["cfg"]
    torch.save(answers["checkpoint"], tmp_path / "reference.pth")
    found = read_weights(tmp_path / "reference.pth")
    sizes = {"img_size": (64, 64), "patch_size": cfg["patch_size"], "num_heads": cfg["num_heads"]}
    encoder = MaskedViT(embed_dim=64, depth=found.depth, reg_tokens=found.class_tokens - 1, **sizes)
    model = PixMIM(
        encoder,
        nn.Identity(),
        decoder=found.decoder,
        decoder_dim=cfg["decoder_embed_dim"],
        decoder_depth=cfg["decoder_depth"],
        decoder_heads=cfg["decoder_num_heads"],
        fuse_levels=found.fuse_levels,
        learned_positions=found.pos_embed == "learned",
        mask_unit=cfg.get("mask_downsampling", 1),
        predict_ratio=cfg.get("kept_mask_ratio"),
    )
    model.load_state_dict(pixmim_names(found.state))
    loss, prediction, mask = model(answers["imgs"], answers["noise"])
    loss.backward()
    predicted = torch.zeros_like(mask.removed).scatter(1, mask.predict, True)
    assert torch.equal(predicted, answers["mask"])
    assert loss.item() == pytest.approx(answers["loss"].item(), rel=1e-5)
    in_raster_order = take(prediction, mask.predict.argsort(1))
    expected = answers["pred"] if name != "pixio" else answers["pred"][mask.removed].unflatten(0, (2, -1))
    assert_close(in_raster_order, expected, rtol=1e-4, atol=1e-4)

    theirs = dict(answers["grads"])
    if name == "pixio":
        theirs["cls_token"], theirs["reg_token"] = theirs["cls_token"].split([1, 7], dim=1)
    ours = mae_names({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not (ours[key] - theirs[key]).norm() < 1e-3 * theirs[key].norm()]


def test_crossmae_vit_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        options = {"decoder": "cross", "decoder_depth": 12, "fuse_levels": True, "predict_ratio": 0.25}
        model = PixMIM(ENCODERS["vit_base"](), nn.Identity(), **options)
    counts = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model.decoder, model.encoder)]
    assert counts == [41_388_444, 85_645_824]


def test_initial_fusion_weights_are_uniform_within_xaviers_bound():
    fusion = PixMIM(ENCODERS["vit_tiny"](img_size=32), nn.Identity(), decoder="cross", fuse_levels=True).decoder.fusion
    bound = (6 / (13 + 8)) ** 0.5  # 13 levels, 8 blocks
    assert fusion.weight.shape == (8, 13)
    assert 0.9 * bound < fusion.weight.abs().max() <= bound


# ------------------------------------------------------------------------------------------------------ which patches


@pytest.mark.parametrize(("grid", "unit"), [((14, 14), 1), ((5, 7), 1), ((5, 7), 2), ((16, 16), 4)])
@pytest.mark.parametrize("part", [0.75, 0.5, 0.25, 0.3])
def test_the_next_patches_in_ascending_noise_are_skipped_and_the_last_predicted(grid, unit, part):
    noise, count = torch.rand(3, mask_units(grid, unit)), grid[0] * grid[1]
    mask, whole = (mask_from_noise(noise, 0.75, grid, unit, x) for x in (part, None))
    skipped = int(count * (0.75 - part))  # CrossMAE's number
    assert torch.equal(mask.keep, whole.keep)
    assert torch.equal(mask.removed, whole.removed)
    assert torch.equal(mask.predict, whole.predict[:, skipped:])
    assert mask.predict.shape[1] >= part * count


@pytest.mark.parametrize("name", ["vit", "mff", "convvit"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_predict_ratio_equal_to_mask_ratio_gives_the_same_bits_as_the_default(name, kind):
    images, noise, found = torch.randn(2, 3, 32, 48), torch.rand(2, 24), []
    for part in (None, 0.75):
        torch.manual_seed(1)
        model = small_model(kind, LowPass((32, 48), 9, MEAN, STD), host(name), predict_ratio=part)
        found.append([*model.state_dict().items(), torch.rand(1), *gradients(model, images, noise)])
    assert_same(*found)


def test_self_attention_decoder_equals_maes_decoder_bit_for_bit():
    """MAE's decoder spelled out: all tokens of the grid in a row, then the removed ones."""
    model, images, noise = small_model(), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    _, prediction, mask = model(images, noise)
    decoder, order = model.decoder, noise.argsort(1)
    x = decoder.embed(model.encoder.encode(images, mask))
    row = torch.cat([x[:, 1:], decoder.mask_token.expand(2, 18, -1)], dim=1)
    row = torch.cat([x[:, :1], take(row, order.argsort(1))], dim=1) + decoder.pos_embed
    expected = decoder.pred(decoder.norm(take(decoder.blocks(row)[:, 1:], order[:, 6:])))
    assert torch.equal(prediction, expected)


def test_skipping_patches_equals_masking_them_in_attention():
    """Second computation: the decoder of all tokens, with a mask of its attention that hides the skipped ones."""
    model, images, noise = small_model(predict_ratio=0.25), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    _, prediction, mask = model(images, noise)
    decoder, order = model.decoder, noise.argsort(1)
    x = decoder.embed(model.encoder.encode(images, mask))
    x = torch.cat([x, decoder.mask_token.expand(2, 18, -1)], dim=1)
    x = x + torch.cat([decoder.pos_embed[0, :1].expand(2, -1, -1), decoder.pos_embed[0, 1:][order]], dim=1)
    seen = torch.ones(25, dtype=torch.bool)
    seen[7:19] = False  # class token and 6 visible patches; then int(24 * (.75 - .25)) skipped ones
    for block in decoder.blocks:
        x = block(x, attn_mask=seen.expand(2, 1, 25, 25))
    assert_close(prediction, decoder.pred(decoder.norm(x[:, 19:])), rtol=1e-5, atol=1e-5)


@every_decoder
@pytest.mark.parametrize("part", [0.25, 0.5, None])
def test_loss_is_that_of_a_loop_over_the_predicted_patches(kind, part):
    model = small_model(kind, LowPass((32, 48), 9, MEAN, STD), predict_ratio=part)
    images = torch.randn(2, 3, 32, 48)
    loss, prediction, mask = model(images)
    assert loss.item() == pytest.approx(slow_loss(model, images, prediction, mask), rel=1e-5)


def change(images: Tensor, patches: Tensor) -> Tensor:
    """Images with other pixels in these patches (B, N)."""
    chosen = torch.zeros(len(images), 24, dtype=torch.bool).scatter(1, patches, True).unsqueeze(-1)
    rows = patchify(images, 8)
    return unpatchify(torch.where(chosen, torch.randn_like(rows), rows), 8, (4, 6))


@every_decoder
def test_a_patch_that_is_neither_visible_nor_predicted_changes_neither_loss_nor_gradient(kind):
    model, images, noise = small_model(kind, predict_ratio=0.25), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    mask = model(images, noise)[2]
    skipped, predicted = noise.argsort(1)[:, 6:18], mask.predict
    assert_same(gradients(model, images, noise), gradients(model, change(images, skipped), noise))
    assert gradients(model, images, noise)[0] != gradients(model, change(images, predicted), noise)[0]  # control


def test_the_low_pass_target_of_a_predicted_patch_depends_on_skipped_ones_but_the_prediction_does_not():
    """The filter sees the whole image; encoder and decoder do not."""
    model = small_model("cross", LowPass((32, 48), 9, MEAN, STD), predict_ratio=0.25)
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    other = change(images, noise.argsort(1)[:, 6:18])
    (loss, prediction, _), (other_loss, other_prediction, _) = (model(x, noise) for x in (images, other))
    assert torch.equal(prediction, other_prediction)
    assert loss != other_loss


@every_decoder
def test_tokens_and_targets_exist_for_visible_and_predicted_patches_only(kind):
    model, images, noise = small_model(kind, predict_ratio=0.25), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    lengths = []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    mask = model(images, noise)[2]
    assert lengths == [1 + 6 + 6 if kind == "self" else 6] * 2  # class token, visible, predicted
    assert model.targets(images, mask)[0].shape == (2, 6, 192)


# ------------------------------------------------------------------------------------------------- the cross decoder


@pytest.mark.parametrize("kind", ["cross", "fused"])
def test_a_prediction_by_cross_attention_does_not_depend_on_the_others(kind):
    few, many = (small_model(kind, predict_ratio=part) for part in (0.25, 0.75))
    many.load_state_dict(few.state_dict())
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    (_, a, mask), (_, b, _) = few(images, noise), many(images, noise)
    assert_close(a, b[:, -mask.predict.shape[1] :], rtol=1e-5, atol=1e-6)


def test_a_prediction_by_self_attention_depends_on_the_others():
    """Control for the test above."""
    few, many = (small_model(predict_ratio=part) for part in (0.25, 0.75))
    many.load_state_dict(few.state_dict())
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    (_, a, _), (_, b, _) = few(images, noise), many(images, noise)
    assert (a - b[:, -6:]).abs().max() > 1e-3


def test_cross_attention_equals_torchs():
    """Second computation: torch.nn.MultiheadAttention with the same weights, one query at a time."""
    model, images, noise = small_model("cross", predict_ratio=0.25), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    _, prediction, mask = model(images, noise)
    tokens, decoder = model.encoder.encode(images, mask), model.decoder
    for place in range(6):
        x = (decoder.mask_token + decoder.pos_embed[:, 1:])[0][mask.predict[:, place]].unsqueeze(1)
        for block in decoder.blocks:
            attention = nn.MultiheadAttention(16, 2, kdim=24, vdim=24, batch_first=True)
            q, kv, proj = (block.cross_attn[name] for name in ("q", "kv", "proj"))
            k, v = kv.weight.chunk(2)
            named = {"q_proj_weight": q.weight, "k_proj_weight": k, "v_proj_weight": v}
            bias = {"in_proj_bias": torch.cat([q.bias, kv.bias]), "out_proj.bias": proj.bias}
            attention.load_state_dict(named | bias | {"out_proj.weight": proj.weight})
            x = x + attention(block.norm1(x), tokens, tokens, need_weights=False)[0]
            x = x + block.mlp(block.norm2(x))
        assert_close(prediction[:, place], decoder.pred(decoder.norm(x))[:, 0], rtol=1e-5, atol=1e-5)


def test_fusion_of_the_last_level_alone_equals_no_fusion():
    plain, fused = small_model("cross"), small_model("fused")
    fused.load_state_dict(plain.state_dict(), strict=False)
    fused.decoder.fusion.weight.data = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    for norm in fused.decoder.norms:
        norm.load_state_dict(plain.encoder.norm.state_dict())
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    assert_close(fused(images, noise)[1], plain(images, noise)[1], rtol=1e-5, atol=1e-6)


@every_decoder
def test_attention_in_bf16_is_near_float32(kind):
    model, images, noise = small_model(kind, predict_ratio=0.25), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, noise)[1]
    whole = model(images, noise)[1]
    assert (half - whole).norm() < 0.03 * whole.norm()  # 8 bits of mantissa
    assert not torch.equal(half, whole)


@every_decoder
def test_every_trained_parameter_gets_a_gradient_and_no_other_is_trained(kind):
    encoder = small_encoder(reg_tokens=3)
    model = small_model(kind, encoder=encoder, predict_ratio=0.5, learned_positions=True)
    gradients(model, torch.randn(2, 3, 32, 48), torch.rand(2, 24))
    parameters = dict(model.named_parameters())
    assert not [name for name, p in parameters.items() if p.requires_grad and not p.grad.abs().sum() > 0]
    fixed = {name for name, p in parameters.items() if not p.requires_grad}
    assert fixed == ({"encoder.norm.weight", "encoder.norm.bias"} if kind == "fused" else set())


# ---------------------------------------------------------------------------------------------- whole image predicted


@every_decoder
@pytest.mark.parametrize(("part", "passes"), [(0.25, 3), (0.5, 2), (0.6, 2), (None, 1)])
def test_every_removed_patch_is_predicted_in_passes_no_larger_than_in_training(kind, part, passes):
    model, images, noise = small_model(kind, predict_ratio=part), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    sizes, trained = [], model(images, noise)[2].predict.shape[1]
    model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[1].predict.shape[1]))
    prediction, mask = model.predict_removed(images, noise)
    assert len(sizes) == passes
    assert sum(sizes) == 18
    assert max(sizes) <= trained
    assert torch.equal(torch.zeros(2, 24, dtype=torch.bool).scatter(1, mask.predict, True), mask.removed)
    if part in (0.25, None):  # the last pass predicts the patches of training
        assert_close(prediction[:, -trained:], model(images, noise)[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- class tokens


def test_features_of_several_class_tokens_are_their_mean_and_those_of_one_are_timms():
    images = torch.randn(2, 3, 32, 48)
    for count in (1, 4):
        encoder = small_encoder(reg_tokens=count - 1).eval()
        tokens = encoder.forward_features(images)
        assert_close(encoder(images), tokens[:, :count].mean(1))
        assert_close(encoder.pool(tokens, "avg"), tokens[:, count:].mean(1))
        assert torch.equal(encoder(images), tokens[:, 0]) == (count == 1)


def test_class_and_position_embeddings_are_initialised_as_in_pixio():
    model = PixMIM(MaskedViT(img_size=64, patch_size=4, reg_tokens=7), nn.Identity(), learned_positions=True)
    for x in (model.encoder.reg_token, model.encoder.pos_embed, model.decoder.pos_embed):
        assert x.std().item() == pytest.approx(0.02, rel=0.05)
        assert x.abs().max() > 0.04
    assert model.encoder.pos_embed.shape[1] == model.decoder.pos_embed.shape[1] == 8 + 256


# -------------------------------------------------------------------------------------------------------------- runs

RUNS = {  # patches of 8 px
    "self": "--model vit_pico --input_size 32 --predict_ratio 0.25",
    "crossmae": "--model vit_pico --input_size 32 --decoder cross --decoder_depth 2 --fuse_levels --predict_ratio 0.25",
    "pixio": "--model vit_pico --input_size 32 48 --mask_unit 2 --class_tokens 3 --pos_embed learned --drop_path 0.5",
    "convvit": "--model convvit_pico --input_size 32 48 --decoder cross --predict_ratio 0.5 --pos_embed learned",
    "mff": "--model mff_vit_pico --input_size 32 --decoder cross --predict_ratio 0.25 --class_tokens 2",
    "lsmae": "--model vit_pico --input_size 40 56 --mask_unit 2 --decoder cross --fuse_levels --predict_ratio 0.3",
}
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Name in RUNS -> folder of a run of 2 epochs of 2 steps, shared by all tests. Copy it before changing it."""

    @cache
    def run(name: str):
        words = [*RUNS[name].split(), "--knn_every", "2", "--image_every", "2"]
        return pretrain(photos, tmp_path_factory.mktemp(name), *words)

    return run


def model_of(name: str, *flags: str) -> tuple[PixMIM, Tensor, Tensor]:
    words = [*PRETRAIN, *RUNS[name].split(), *flags, "--data_path", "x"]
    args = resolve_defaults(main_pretrain.get_parser().parse_args(words))
    torch.manual_seed(0)
    model = build_model(args)
    return model, torch.randn(2, 3, *args.input_size), torch.rand(2, model.noise_length)


@every_run
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_run(name, trained, photos, tmp_path, monkeypatch):
    words = [*RUNS[name].split(), "--knn_every", 2, "--image_every", 2]
    assert interrupted(monkeypatch, 2, lambda: pretrain(photos, tmp_path, *words)) == 75
    assert weights(tmp_path)["progress"]["step"] == 1
    pretrain(photos, tmp_path, *words)
    assert_same_run(trained(name), tmp_path)


@every_run
def test_health_check_spectrum_and_knn_of_a_run_are_finite(name, trained):
    log = records(trained(name), "epoch")
    for key in ("share_of_constant", "error_below_cutoff", "error_above_cutoff", "knn_acc1"):
        values = [line[key] for line in log if key in line]
        assert values
        assert all(0 <= value < 1e3 for value in values)


@pytest.mark.slow
@every_run
def test_the_compiled_model_is_one_graph_with_equal_loss_and_gradients(name):
    """Without inductor, which takes minutes: a graph break is an error here."""
    model, images, noise = model_of(name, "--drop_path", "0")
    (loss, grads), (compiled_loss, compiled_grads) = (
        gradients(run, images, noise)
        for run in (model, torch.compile(model, dynamic=False, fullgraph=True, backend="eager"))
    )
    assert_close(loss, compiled_loss, rtol=1e-6, atol=0)
    assert_close(grads, compiled_grads, rtol=1e-4, atol=1e-7)


@every_run
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for flags in ([], ["--grad_checkpointing"]):
        model, images, noise = model_of(name, *flags)
        torch.manual_seed(2)  # drop path
        found.append(gradients(model, images, noise))
    assert_same(*found)


@pytest.mark.parametrize("name", ["self", "crossmae", "convvit"])
def test_accumulating_two_batches_of_4_equals_a_batch_of_8(name, trained, photos, tmp_path):
    pretrain(photos, tmp_path, *RUNS[name].split(), "--batch_size", 4, "--accum_iter", 2)
    assert_close_runs(trained(name), tmp_path, 1e-6)


JOBS = """
import importlib, json, os, sys
for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], sys.argv[1:] = str(port), words
    importlib.import_module("main_pretrain").main()
"""
WITHOUT_DROP = [name for name in RUNS if "drop_path" not in RUNS[name]]  # it draws numbers of a rank


@pytest.fixture(scope="module")
def on_two_ranks(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ports = free_ports(len(WITHOUT_DROP))  # one per run
    commands = []
    for name, port in zip(WITHOUT_DROP, ports, strict=True):
        place = ["--data_path", str(photos), "--output_dir", str(folder / name), "--batch_size", "4"]
        commands.append([port, [*PRETRAIN, *SIZES, *RUNS[name].split(), *place]])
    for status, _, err in ranks(2, "-c", JOBS, json.dumps(commands)):
        assert status == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_DROP)
def test_two_ranks_equal_one_rank_with_twice_the_batch(name, on_two_ranks, trained):
    assert json.loads((on_two_ranks / name / "config.json").read_text())["world_size"] == 2
    assert_close_runs(trained(name), on_two_ranks / name, 1e-5)


@pytest.mark.parametrize("name", ["self", "crossmae", "pixio"])
def test_a_step_is_computed_again_by_debug_step(name, trained):
    lines = call("debug_step", trained(name), 4, "--device", "cpu")
    logged = records(trained(name))[-1]
    (loss,) = [float(x) for line in lines for x in re.findall(r"step 4, .* loss (\S+)", line)]
    assert loss == pytest.approx(logged["loss"], rel=1e-4)
    assert any("not finite: 0 of" in line for line in lines)


@pytest.mark.parametrize("name", RUNS)
def test_the_whole_image_is_drawn_with_the_settings_of_the_checkpoint(name, trained, photos, tmp_path):
    flags = [[], ["--spectrum"]] if name != "pixio" else [[], ["--attention"], ["--pca"]]
    for i, words in enumerate(flags):
        place = ["--images", photos / "val", "--output", tmp_path / f"{i}.png", "--device", "cpu", *words]
        call("visualize", "--checkpoint", trained(name) / "last.pth", *place)
        with Image.open(tmp_path / f"{i}.png") as picture:
            assert min(picture.size) > 100


def test_kNN_probe_features_and_fine_tuning_accept_several_class_tokens(trained, photos, tmp_path):
    start = ["--checkpoint", trained("pixio") / "last.pth", *DEVICE]
    pixels = ["--data_path", photos / "val", "--output", tmp_path / "x.npy"]
    assert result("main_features", *start[:2], *pixels, "--device", "cpu", "--num_workers", 0)["shape"] == [9, 48]
    assert result("main_knn", *start, "--data_path", photos)["n"] == 9
    train = [*start, "--data_path", photos, "--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0]
    probe = result("main_linprobe", *train, "--output_dir", tmp_path / "probe")
    evaluated = ["--eval", "--checkpoint", tmp_path / "probe" / "classifier.pth", "--data_path", photos, *DEVICE]
    assert result("main_linprobe", *evaluated)["acc1"] == probe["acc1"]
    tuned = result("main_finetune", *train, "--output_dir", tmp_path / "tuned")
    evaluated[2] = tmp_path / "tuned" / "classifier.pth"
    assert result("main_finetune", *evaluated)["acc1"] == tuned["acc1"]
    with pytest.raises(ValueError, match=r"--to timm .*3 class tokens.*--to onnx"):
        convert(tmp_path / "probe" / "classifier.pth", tmp_path / "x.pth", "timm")
    convert(tmp_path / "tuned" / "classifier.pth", tmp_path / "x.pth", "timm")


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--predict_ratio 0.8", "--predict_ratio 0.8: .*--mask_ratio 0.75"),
        ("--predict_ratio 0", "--predict_ratio 0.0: .*more than 0"),
        ("--model convvit_pico --class_tokens 2", "--class_tokens 2: --model convvit_pico"),
        ("--model convvit_pico --class_tokens 1", "--class_tokens 1: --model convvit_pico"),
        ("--model convvit_pico --decoder cross --fuse_levels", "--fuse_levels .*vit_"),
        ("--model mff_vit_pico --decoder cross --fuse_levels", "--fuse_levels .*vit_"),
        ("--fuse_levels", "--fuse_levels .*--decoder cross"),
        ("--decoder cross --decoder_heads 5", "width 32 .* 5 .*heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(flags, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        pretrain(photos, tmp_path, *flags.split())
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused_and_learned_positions_resampled_with_a_note(trained, photos, tmp_path):
    model, images, noise = model_of("pixio")
    with pytest.raises(ValueError, match=r"\(48, 32\).*\(32, 48\)"):
        model(images.mT, noise)
    words = [*DEVICE, *SIZES, "--data_path", photos, "--output_dir", tmp_path, "--checkpoint"]
    said = call("main_pretrain", *words, trained("pixio") / "last.pth", "--input_size", 48, 64)
    assert any("4 x 6 -> 6 x 8 " in line and "resampled" in line for line in said)
    assert json.loads((tmp_path / "config.json").read_text())["args"]["pos_embed"] == "learned"


def test_a_decoder_of_another_kind_is_replaced_by_a_random_one_with_a_note(trained, photos, tmp_path):
    words = [*DEVICE, *SIZES, "--data_path", photos, "--checkpoint"]
    for name, flags, kind in (
        ("self", ["--decoder", "cross", "--fuse_levels"], "self"),
        ("crossmae", ["--decoder", "self", "--no-fuse_levels"], "cross --fuse_levels"),
        ("lsmae", ["--no-fuse_levels"], "cross --fuse_levels"),
    ):
        said = call("main_pretrain", *words, trained(name) / "last.pth", *flags, "--output_dir", tmp_path / name)
        assert any(f"(--decoder {kind})" in line and "random" in line for line in said)
    with pytest.raises(ValueError, match="--no-fuse_levels"):
        call(
            "main_pretrain",
            *words,
            trained("crossmae") / "last.pth",
            "--decoder",
            "self",
            "--output_dir",
            tmp_path / "x",
        )


@pytest.mark.parametrize("name", ["self", "crossmae", "pixio", "convvit"])
def test_a_run_that_starts_from_a_checkpoint_has_its_decoder_and_class_tokens(name, trained, photos, tmp_path):
    words = [*DEVICE, *SIZES, "--data_path", photos, "--output_dir", tmp_path, "--log_every", 1]
    said = call("main_pretrain", *words, "--checkpoint", trained(name) / "last.pth")
    assert any(re.match(r"from .*file: .*100\.0%", line) for line in said)
    before, now = (json.loads((folder / "config.json").read_text())["args"] for folder in (trained(name), tmp_path))
    for flag in ("decoder", "decoder_depth", "fuse_levels", "pos_embed"):
        assert now[flag] == before[flag]
    assert now["class_tokens"] == before["class_tokens"] == (3 if name == "pixio" else None)


@pytest.mark.parametrize(
    ("name", "target", "options", "message"),
    [
        ("crossmae", "mmpretrain", {}, "cross-attention decoder; .*--to timm"),
        ("crossmae", "hf", {}, "cross-attention decoder; .*--encoder_only"),
        ("mff", "mmpretrain", {}, "2 class tokens; .*--to timm"),
        ("convvit", "mae", {}, "cross-attention decoder .*--fuse_levels"),
        ("pixio", "mae", {}, "3 class tokens; .*--to timm"),
        ("pixio", "detectron2", {}, "3 class tokens; .*--to timm"),
        ("pixio", "hf", {}, "3 class tokens .*decoder.*--encoder_only"),
    ],
)
def test_formats_that_cannot_hold_the_run_are_refused_in_one_line(name, target, options, message, trained, tmp_path):
    with pytest.raises(ValueError, match=f"--to {target} .*{message}") as error:
        convert(trained(name) / "last.pth", tmp_path / "x", target, **options)
    assert "\n" not in str(error.value)


def test_peak_learning_rate_is_scaled_by_the_share_of_the_removed_patches_on_demand(photos, tmp_path):
    rates = []
    for name, flags in (("a", []), ("b", ["--lr_scale_by_prediction"])):
        pretrain(photos, tmp_path / name, *RUNS["self"].split(), "--epochs", 1, *flags)
        rates.append(json.loads((tmp_path / name / "config.json").read_text())["lr"])
    assert rates[1] == pytest.approx(rates[0] / 3)  # .25 / .75


# ----------------------------------------------------------------------------------------------------------- formats


@where_shared
def test_crossmaes_files_are_read_and_written_with_its_names(tmp_path, capsys):
    theirs = torch.load(SHARED / "crossmae_kept25.pt", weights_only=True)["checkpoint"]
    torch.save(theirs | {"args": {"kept_mask_ratio": 0.25, "mask_ratio": 0.75}}, tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours.pth", "mae")
    assert re.search(r"theirs\.pth: .*final norm.* weight 1, bias 0", capsys.readouterr().out)
    assert "models_cross.MaskedAutoencoderViT(" in report
    assert_same(torch.load(tmp_path / "ours.pth", weights_only=True)["model"], theirs["model"])
    assert read_weights(tmp_path / "ours.pth").predict_ratio == 0.25
    convert(tmp_path / "theirs.pth", tmp_path / "timm.pth", "timm")
    encoder = torch.load(tmp_path / "timm.pth", weights_only=True)
    assert torch.equal(encoder["norm.weight"], torch.ones(64))
    assert torch.equal(encoder["norm.bias"], torch.zeros(64))


@where_shared
def test_pixios_encoder_gives_the_same_tokens_in_timm_and_transformers(tmp_path):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    theirs = torch.load(SHARED / "pixio.pt", weights_only=True)["checkpoint"]
    torch.save(theirs | {"args": {"num_heads": 4}}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "timm", "timm", folder=True)
    convert(tmp_path / "x.pth", tmp_path / "hf", "hf", encoder_only=True)
    found = read_weights(tmp_path / "x.pth")
    images = torch.randn(2, 3, 64, 64)
    ours = MaskedViT(
        img_size=64,
        patch_size=4,
        embed_dim=64,
        depth=3,
        num_heads=4,
        reg_tokens=7,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    ours.load_state_dict({key: x for key, x in found.state.items() if key in ours.state_dict()})
    pixio = transformers.PixioModel.from_pretrained(tmp_path / "hf").eval()
    pixio.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = ours.eval().forward_features(images)
        assert_close(
            timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval().forward_features(images), expected
        )
        assert_close(pixio(images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    for folder in ("timm", "hf", "again"):
        again = read_weights(tmp_path / folder)
        assert again.class_tokens == 8
        assert_same(again.state, {key: found.state[key] for key in again.state})


@every_run
def test_conversion_to_every_format_that_holds_a_run_keeps_its_tensors(name, trained, tmp_path):
    state, read_back = weights(trained(name))["model"], 0
    for target in ("timm", "mae", "mmpretrain"):
        try:
            convert(trained(name) / "last.pth", tmp_path / target, target)
        except ValueError as error:
            assert f"--to {target} " in str(error)  # noqa: PT017 - see the table in docs/checkpoints.md
            continue
        again = read_weights(tmp_path / target).state
        assert_same(again, {key: state[key] for key in again})
        read_back += 1
    assert read_back == {"self": 3, "crossmae": 2, "convvit": 0, "lsmae": 2}.get(name, 1)
