"""Efficient probing against the published module, several heads by one pass, kNN over ranks and layers."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    DEVICE,
    MODEL,
    assert_same,
    assert_same_run,
    call,
    interrupted,
    ranks,
    records,
    result,
    weights,
)
from PIL import Image
from test_reference import SHARED, where_shared
from torch.testing import assert_close

import main_linprobe
from models_convmae import ENCODERS as CONVMAE
from models_mff import ENCODERS as MFF
from models_pixmim import ENCODERS, MaskedViT
from util import convert
from util.dist import World
from util.evaluate.encoder import layer_features, pooling
from util.evaluate.knn import find_neighbours, from_keys, to_keys
from util.evaluate.probes import EfficientProbing, Probe, order_pools
from util.formats.read import read_weights
from util.formats.weights import Weights

ALONE = World(0, 1, CPU)
ALL = ["--pool", "token", "mean", "ep", "--ep_queries", 4]
FLAGS = ["--epochs", 2, "--batch_size", 8, "--warmup_epochs", 0, "--blr", 0.1, 3]


def probe(folder, photos, checkpoint, *words) -> dict:
    place = ["--checkpoint", checkpoint, "--data_path", photos, "--output_dir", folder]
    return result("main_linprobe", *DEVICE, *FLAGS, *place, *words)


@pytest.fixture(scope="module")
def probed(pretrained, photos, tmp_path_factory):
    """(folder, result) of six heads."""
    folder = tmp_path_factory.mktemp("probes")
    return folder, probe(folder, photos, pretrained / "last.pth", *ALL)


def evaluate_head(folder, photos, *words) -> dict:
    flags = ["--checkpoint", folder / "classifier.pth", "--data_path", photos, *DEVICE]
    return result("main_linprobe", "--eval", *flags, *words)


# ---------------------------------------------------------------------------------------------------- efficient probing


@where_shared
def test_pooling_and_gradients_equal_the_published_module():
    answers = torch.load(SHARED / "ep.pt", weights_only=True)
    state, grads, tokens = answers["checkpoint"], answers["grads"], answers["tokens"].clone().requires_grad_()
    ep = EfficientProbing(64, 8)
    ep.load_state_dict({"queries": state["cls_token"][0], "value.weight": state["v.weight"]})
    pooled = ep(tokens)
    assert_close(pooled, answers["pooled"], rtol=0, atol=1e-5)
    loss = (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum()  # as the answers' README defines it
    found = torch.autograd.grad(loss, [ep.queries, ep.value.weight, tokens])
    for ours, theirs in zip(found, [grads["cls_token"][0], grads["v.weight"], grads["tokens"]], strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_pooling_first_equals_projecting_each_token_first():
    ep, tokens = EfficientProbing(12, 3), torch.randn(2, 5, 12)
    with torch.no_grad():
        ep.queries.mul_(100)  # far from equal weights
    pooled = []
    for image in tokens:
        slices = []
        for j, query in enumerate(ep.queries):
            share = torch.softmax(torch.stack([query @ token for token in image]) / 12**0.5, 0)
            values = [ep.value.weight[4 * j : 4 * j + 4] @ token for token in image]
            slices.append(sum(a * v for a, v in zip(share, values, strict=True)))
        pooled.append(torch.cat(slices))
    assert_close(ep(tokens), torch.stack(pooled), rtol=1e-5, atol=1e-6)


def test_a_probe_of_vit_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Probe(ENCODERS["vit_base"](), 1000, ["ep"], [0.1], 32)
    assert sum(p.numel() for p in model.heads.parameters()) == 1_383_400


def test_initial_values_are_those_of_the_published_module():
    ep = EfficientProbing(512, 32)
    assert ep.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert ep.value.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)  # torch's Linear: uniform


@pytest.mark.parametrize("encoders", [ENCODERS, CONVMAE, MFF], ids=["vit", "convmae", "mff"])
def test_inputs_of_the_heads_equal_the_outputs_of_the_encoder_layers(encoders):
    name = next(name for name in encoders if name.endswith("pico"))
    encoder, images = encoders[name](img_size=(16, 24), patch_size=8).eval(), torch.randn(2, 3, 16, 24)
    found = Probe(encoder, 3, ["mean", "ep"], [0.1], 4).pool_features(images)
    if encoders is CONVMAE:
        before = encoder.stages(images, None)[2]
        after = encoder.fc_norm(before.mean(1))
    else:
        tokens = encoder.blocks(encoder._pos_embed(encoder.patch_embed(images)))
        before, after = tokens[:, 1:], encoder.norm(tokens)[:, 1:].mean(1)
    assert_close(found["ep"], before)
    assert_close(found["mean"], after)
    if encoders is CONVMAE:
        with pytest.raises(ValueError, match=r"--pool token: .*class token"):
            Probe(encoder, 3, ["token", "ep"], [0.1])


def test_queries_that_do_not_divide_the_width_are_refused_in_one_line(pretrained, photos, tmp_path):
    with pytest.raises(ValueError, match=r"--ep_queries 7 .*width 48") as caught:
        probe(tmp_path, photos, pretrained / "last.pth", "--pool", "ep", "--ep_queries", 7)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- several heads at once


def test_reported_pooling_depends_on_the_training_of_the_encoder():
    pools, state = (
        ["mean", "token", "ep"],
        MaskedViT(img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3).state_dict(),
    )
    head = {"head.weight": torch.zeros(3, 48), "head.bias": torch.zeros(3)}
    pooled = {f"fc_{name}": state[name] for name in ("norm.weight", "norm.bias")}
    masked, by_token, by_mean = (Weights.from_state(state | x, {}, "timm") for x in ({}, head, head | pooled))
    own = Weights.from_state(state | head, {"probe_as": "mae"})
    assert [order_pools(x, pools)[0] for x in (None, masked, own, by_token, by_mean)] == [
        "ep",
        "ep",
        "ep",
        "token",
        "mean",
    ]
    assert order_pools(masked, ["mean", "token"]) == ["token", "mean"]


def test_the_row_of_the_protocol_is_marked_saved_and_printed(probed, photos):
    folder, best = probed
    rows = records(folder, "heads")[-1]["heads"]
    assert [(x["pool"], x["blr"]) for x in rows] == [(p, b) for p in ("ep", "token", "mean") for b in (0.1, 3)]
    assert best["pool"] == "ep"  # whatever the other rows have
    assert best["acc1"] == max(x["acc1"] for x in rows if x["pool"] == "ep")
    assert {pool: x["acc1"] for pool, x in best["pools"].items()} == {
        pool: max(x["acc1"] for x in rows if x["pool"] == pool) for pool in ("ep", "token", "mean")
    }
    again = evaluate_head(folder, photos)
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)


def test_the_table_marks_the_reported_row():
    row = {"acc1": 50.0, "acc5": 100.0, "mean_class_acc": 9.5, "loss": 1.25}
    rows = [row | {"pool": pool, "blr": 0.1, "acc1": acc1} for pool, acc1 in (("ep", 50.0), ("token", 60.0))]
    head, first, second, rule = main_linprobe.format_table(rows, rows[0])
    assert head.split() == ["pool", "blr", "acc1", "acc5", "mean_class_acc", "loss"]
    assert first.split() == ["*", "ep", "0.1", "50.0", "100.0", "9.5", "1.25"]
    assert second.split() == ["token", "0.1", "60.0", "100.0", "9.5", "1.25"]
    assert rule.startswith("* --pool ep")


@pytest.mark.parametrize("pool", ["token", "mean", "ep"])
def test_a_head_trained_with_others_equals_a_head_trained_alone_bit_for_bit(pool, probed, pretrained, photos, tmp_path):
    probe(tmp_path, photos, pretrained / "last.pth", "--pool", pool, "--ep_queries", 4, "--blr", 3)
    alone = {k: x for k, x in weights(tmp_path)["model"].items() if k.startswith("heads.0.")}
    number = 2 * ["ep", "token", "mean"].index(pool) + 1
    together = weights(probed[0])["model"]
    assert_same({k: together[k.replace("heads.0.", f"heads.{number}.")] for k in alone}, alone)


def test_several_heads_resume_within_an_epoch_bit_for_bit(pretrained, photos, tmp_path, monkeypatch):
    words = [photos, pretrained / "last.pth", *ALL, "--batch_size", 2, "--log_every", 3]
    probe(tmp_path / "whole", *words)
    for step in (3, 5):
        assert interrupted(monkeypatch, step, lambda: probe(tmp_path / "broken", *words)) == 75
    assert probe(tmp_path / "broken", *words) == probe(tmp_path / "whole", *words)  # each prints its result again
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    files = [torch.load(tmp_path / name / "classifier.pth", weights_only=True)["model"] for name in ("whole", "broken")]
    assert_same(*files)


def test_two_ranks_train_the_same_heads_as_one_rank(pretrained, photos, tmp_path):
    flags = [*DEVICE, *FLAGS, *ALL, "--checkpoint", pretrained / "last.pth", "--data_path", photos]
    outcomes = ranks(2, "main_linprobe.py", *flags, "--batch_size", 4, "--output_dir", tmp_path / "two")
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    # forward passes of the same four images: a batch norm sees the batch of a rank
    probe(tmp_path / "one", photos, pretrained / "last.pth", *ALL, "--batch_size", 4, "--accum_iter", 2)
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "two"))
    names = [name for name in one if name.startswith("heads.") and ".bn." not in name]
    assert len(names) == 6 * 2 + 2 * 2
    for name in names:
        assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- saved classifiers


def test_efficient_probing_is_refused_by_each_format_by_name(probed, tmp_path):
    weights = read_weights(probed[0] / "classifier.pth")
    assert (weights.family, weights.num_classes, weights.pooled) == ("vit", 3, False)
    for target in ("timm", "mae", "mmpretrain", "hf", "mmseg", "detectron2", "onnx"):
        with pytest.raises(ValueError, match=rf"--to {target}: .*efficient probing.*--eval") as caught:
            convert.convert(probed[0] / "classifier.pth", tmp_path / "x", target)
        assert "\n" not in str(caught.value)


def test_other_mains_read_the_encoder_of_an_attentive_classifier(probed, pretrained, photos, tmp_path):
    words = ["--data_path", photos, *DEVICE]
    knn = [
        result("main_knn", "--checkpoint", x, *words) for x in (probed[0] / "classifier.pth", pretrained / "last.pth")
    ]
    assert knn[0] == knn[1]
    flags = ["--checkpoint", probed[0] / "classifier.pth", *words, "--epochs", 1, "--batch_size", 8]
    assert result("main_finetune", *flags, "--output_dir", tmp_path)["n"] == 9
    assert evaluate_head(probed[0], photos)["loss"] == result("main_finetune", "--eval", *flags)["loss"]


def test_absent_classes_are_masked_in_an_attentive_classifier(probed, photos, tmp_path):
    for name in ("ant", "bee"):
        shutil.copytree(photos / "val" / name, tmp_path / name)
    flags = ["--eval", "--checkpoint", probed[0] / "classifier.pth", "--data_path", tmp_path, *DEVICE]
    found = result("main_linprobe", *flags)
    assert (found["n"], found["classes"]) == (7, 2)
    assert found["acc1"] >= found["acc1_all_classes"]


def test_an_attentive_classifier_of_convmae_repeats_its_scores(photos, tmp_path):
    model = [*MODEL, "--model", "convvit_pico"]
    best = probe(tmp_path, photos, "none", *model, "--pool", "mean", "ep", "--ep_queries", 4)
    again = evaluate_head(tmp_path, photos)
    assert best["pool"] == "ep"
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)
    with pytest.raises(ValueError, match=r"--pool token: .*--pool mean"):
        probe(tmp_path / "x", photos, "none", *model, "--pool", "mean", "token")


def test_the_picture_of_the_queries_has_a_row_for_each_and_their_mean(probed, photos, tmp_path):
    out = tmp_path / "x.png"
    flags = ["--images", photos / "val", "--output", out, "--device", "cpu", "--ep_attention"]
    call("visualize", "--checkpoint", probed[0] / "classifier.pth", "--count", 3, *flags)
    with Image.open(out) as image:
        width, height = image.size
    assert height > 6 * 224 > 5 * 224 > width > 3 * 224  # input, mean and four queries; three images and labels
    with pytest.raises(ValueError, match=r"--ep_attention: .*main_linprobe\.py --pool ep"):
        call("visualize", "--checkpoint", "none", *MODEL, *flags)


def test_attention_maps_are_the_softmax_of_queries_and_patch_tokens(probed):
    state = read_weights(probed[0] / "classifier.pth").state
    encoder = ENCODERS["vit_pico"](img_size=(16, 16), patch_size=8, **pooling(None)).eval()
    images = torch.randn(2, 3, 16, 16)
    maps = Probe.from_classifier(encoder, state).attention_maps(images)
    tokens = encoder.blocks(encoder._pos_embed(encoder.patch_embed(images)))[:, 1:]
    for j, query in enumerate(state["ep.queries"]):
        expected = ((tokens * query).sum(2) / 48**0.5).softmax(1).unflatten(1, (2, 2))
        assert_close(maps[:, j], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- kNN


def test_sort_keys_order_by_cosine_and_then_by_lower_index():
    cosines = torch.tensor([[0.5, -0.25, 0.5, -0.0, 0.0, -1.0, 1.0, -0.75]])
    index = torch.tensor([7, 1, 3, 9, 2, 0, 2**31, 5])
    found, numbers = from_keys(to_keys(cosines, index).sort(descending=True).values)
    order = sorted(range(8), key=lambda i: (-cosines[0, i].item(), index[i].item()))
    assert numbers[0].tolist() == index[order].tolist()
    assert torch.equal(found[0], cosines[0, order] + 0.0)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_nearest_equals_sorting_all_cosines_even_with_ties(k, monkeypatch):
    monkeypatch.setattr("util.evaluate.knn.BLOCK", 11)
    bank = F.normalize(torch.randn(10, 6)).repeat(4, 1)  # each image four times
    queries = F.normalize(torch.randn(5, 6))
    index = torch.randperm(40)
    cosines, found = find_neighbours(ALONE, bank, index, queries, k)
    for query, row, numbers in zip(queries, cosines, found, strict=True):
        exact = [
            (round(-(query.double() @ x.double()).item(), 7), n) for x, n in zip(bank, index.tolist(), strict=True)
        ]
        assert [n for _, n in sorted(exact)[:k]] == numbers.tolist()
        assert row.tolist() == pytest.approx([-x for x, _ in sorted(exact)[:k]], abs=1e-6)


def knn_rows(*words) -> list[dict]:
    return [json.loads(line) for line in call("main_knn", *DEVICE, *words) if line.startswith("{")]


def test_each_of_several_k_and_temperatures_equals_a_run_of_its_own(pretrained, photos):
    words = ["--checkpoint", pretrained / "last.pth", "--data_path", photos]
    rows = knn_rows(*words, "--k", 1, 20, 3, "--temperature", 0.5, 0.07)
    assert len(rows) == 2 * 3 * 2
    assert (rows[-1]["knn_features"], rows[-1]["k"], rows[-1]["temperature"]) == ("before_norm", 20, 0.07)
    for row in rows:
        other = knn_rows(
            *words, "--k", row["k"], "--temperature", row["temperature"], "--knn_features", row["knn_features"]
        )
        assert {x: other[-1][x] for x in row if "acc1_" not in x} == {x: y for x, y in row.items() if "acc1_" not in x}


@pytest.mark.parametrize("model", ["vit_pico", "convvit_pico", "mff_vit_pico"])
def test_the_last_block_is_the_default_feature_and_the_others_differ(model, photos, tmp_path):
    chart = tmp_path / "new" / "x.png"
    words = ["--checkpoint", "none", *MODEL, "--model", model, "--data_path", photos, "--k", 3]
    rows = {row["knn_features"]: row for row in knn_rows(*words, "--layers", "all", "--layers_chart", chart)}
    assert [*rows] == ["block_1", "block_2", "after_norm", "before_norm"]
    assert rows["block_2"] == {x: y for x, y in rows["before_norm"].items() if "acc1_" not in x} | {
        "knn_features": "block_2"
    }
    with Image.open(chart) as image:
        assert image.size == (760, 600)
    encoders = ENCODERS | CONVMAE | MFF
    encoder, images = encoders[model](img_size=(16, 16), patch_size=8).eval(), torch.randn(2, 3, 16, 16)
    first, last, before = layer_features(encoder, images, [1, 2, "before_norm"])
    assert_close(last, before)
    assert (first - last).abs().max() > 1e-3


def test_several_class_tokens_are_averaged_in_each_layer_and_head():
    encoder = MaskedViT(img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3, reg_tokens=3).eval()
    images = torch.randn(2, 3, 16, 16)
    last, before = layer_features(encoder, images, [2, "before_norm"])
    assert torch.equal(last, before)
    for pools in (["token"], ["mean", "token"]):
        found = Probe(encoder, 3, pools, [0.1]).pool_features(images)
        assert_close(found["token"], encoder.forward_features(images)[:, :4].mean(1))


@pytest.mark.parametrize(
    ("words", "message"), [("--layers 1 3", "--layers 3: .* 2 blocks"), ("--layers_chart x.png", "requires --layers")]
)
def test_wrong_layers_are_refused_in_one_line(words, message, photos):
    with pytest.raises(ValueError, match=message):
        knn_rows("--checkpoint", "none", *MODEL, "--data_path", photos, *words.split())


def test_two_ranks_find_the_same_neighbours_as_one_rank_even_with_ties(pretrained, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    for name, source in (("ant", "bee"), ("bee", "cat"), ("cat", "ant")):  # the same images with other labels
        for file in (photos / "train" / source).iterdir():
            shutil.copy(file, tmp_path / "in" / "train" / name / f"copy_{file.name}")
    words = [
        "--checkpoint",
        pretrained / "last.pth",
        "--data_path",
        tmp_path / "in",
        "--k",
        1,
        2,
        5,
        "--layers",
        1,
        "--batch_size",
        3,
    ]
    one = knn_rows(*words)
    (status, out, err), (other, silence, _) = ranks(2, "main_knn.py", *DEVICE, *words)
    assert (status, other, silence) == (0, 0, ""), err
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == one
