"""Segmentation: heads, neighbours, DPT, windows, IoU, runs."""

import json
import math
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
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
from torch import nn
from torch.testing import assert_close

from main_segment import build_adamw, segmentation_loss
from models_pixmim import ENCODERS
from util.data.masks import mask_folder
from util.dist import World
from util.evaluate.segmentation import (
    Confusion,
    DenseProbe,
    PatchBank,
    PatchVotes,
    SharedNorm,
    build_bank,
    build_dpt,
    patch_maps,
    predict,
    window_starts,
)

ALONE = World(0, 1, CPU)
TRAIN = ["--epochs", 2, "--batch_size", 2, "--warmup_epochs", 0, "--log_every", 1]


def pico(size=(16, 16)) -> nn.Module:
    return ENCODERS["vit_pico"](img_size=size, patch_size=8).eval()


# ---------------------------------------------------------------------------------------------------------------- scores


def test_scores_equal_those_of_an_explicit_confusion_matrix():
    rng = np.random.default_rng(0)
    # classes 3 and 4 have no true pixel, 4 none
    truth, guess = rng.integers(-1, 3, (2, 7, 9)), rng.integers(0, 4, (2, 7, 9))
    confusion = Confusion(5, CPU)
    for t, g in zip(truth, guess, strict=True):
        confusion.add(torch.from_numpy(t), torch.from_numpy(g))
    found = confusion.result(ALONE, [*"abcde"])
    pairs = [(t, g) for t, g in zip(truth.ravel().tolist(), guess.ravel().tolist(), strict=True) if t >= 0]
    iou, recall = {}, []
    for k, name in enumerate("abcde"):
        both, either = sum(t == g == k for t, g in pairs), sum(k in pair for pair in pairs)
        iou[name] = 100 * both / either if either else None
        recall += [100 * both / sum(t == k for t, _ in pairs)] if k < 3 else []
    assert confusion.counts.dtype == torch.int64
    assert found["iou"] == {k: x if x is None else pytest.approx(x, abs=1e-3) for k, x in iou.items()}
    assert found["miou"] == pytest.approx(np.mean([x for x in iou.values() if x is not None]), abs=1e-3)
    assert found["mean_class_acc"] == pytest.approx(np.mean(recall), abs=1e-3)
    assert found["pixel_acc"] == pytest.approx(100 * np.mean([t == g for t, g in pairs]), abs=1e-3)


def test_masks_without_a_counted_pixel_are_refused():
    with pytest.raises(ValueError, match="--ignore_index"):
        Confusion(2, CPU).result(ALONE, ["a", "b"])


# --------------------------------------------------------------------------------------------------------------- windows


def test_windows_are_two_thirds_apart_and_end_at_the_end():
    assert window_starts(512, 512) == [0]
    assert window_starts(683, 512) == [0, 171]
    assert window_starts(1024, 512) == [0, 341, 512]
    assert all(window_starts(n, 9)[-1] == n - 9 for n in range(9, 60))


def test_a_window_equals_one_pass_where_the_image_fits():
    model, images = DenseProbe(pico((16, 24)), None, 3, 2, ALONE).eval(), torch.randn(1, 3, 16, 24)
    args = Namespace(input_size=(16, 24), batch_size=4, amp="off")
    with torch.no_grad():
        once = F.interpolate(model(images)[0], (16, 24), mode="bilinear")
        assert_close(predict(model, images, args, CPU), once, rtol=0, atol=0)


def test_overlapping_windows_are_averaged_pixel_by_pixel():
    model, images = DenseProbe(pico(), None, 3, 1, ALONE).eval(), torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        found = predict(model, images, Namespace(input_size=(16, 16), batch_size=3, amp="off"), CPU)
        votes = [[[] for _ in range(40)] for _ in range(24)]
        for y in (0, 8):
            for x in (0, 10, 20, 24):
                scores = F.interpolate(model(images[:, :, y : y + 16, x : x + 16])[0], (16, 16), mode="bilinear")[0]
                for i in range(16):
                    for j in range(16):
                        votes[y + i][x + j].append(scores[:, i, j])
    slow = torch.stack([torch.stack([torch.stack(cell).mean(0) for cell in row]) for row in votes])
    assert_close(found[0], slow.permute(2, 0, 1), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ heads


def test_patch_maps_are_the_outputs_of_the_blocks_before_the_norm():
    encoder, images = pico((16, 24)), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        first = encoder.blocks[0](encoder._pos_embed(encoder.patch_embed(images)))
        outputs = [x[:, 1:].mT.reshape(2, 48, 2, 3) for x in (first, encoder.blocks[1](first))]
        assert_close(patch_maps(encoder, images), outputs[1], rtol=0, atol=0)
        assert_close(patch_maps(encoder, images, [2, 1]), torch.cat(outputs[::-1], 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"--layers 3: .*2 blocks"):
        patch_maps(encoder, images, [1, 3])


def test_the_norm_equals_torchs_batch_norm():
    ours, theirs = SharedNorm(6, affine=False), nn.BatchNorm1d(6, affine=False)
    ours.world = ALONE
    for _ in range(3):
        x = torch.randn(4, 6, 5) * 3 + 1
        assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)
    assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): weights by which pixel centres read a line of patches."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(at), old - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, old - 1)] += at - low
    return matrix


def test_loss_and_gradients_equal_a_slower_computation():
    torch.manual_seed(1)
    model = DenseProbe(pico((16, 24)), [1, 2], 3, 2, ALONE).train()
    images, truth = torch.randn(2, 3, 16, 24), torch.randint(-1, 3, (2, 16, 24))
    bands = torch.cat([torch.zeros(2, 16, 24, 3, dtype=torch.uint8), (truth + 1).unsqueeze(3).byte()], 3)
    loss = segmentation_loss(lambda batch: images)(model, {"images": bands})
    loss.backward()
    with torch.no_grad():
        tokens = patch_maps(model.encoder, images, [1, 2]).double().flatten(2).mT.numpy()  # (B, L, D)
    flat = tokens.reshape(-1, 96)
    tokens = (tokens - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-6)
    up, total = np.kron(bilinear_matrix(2, 16), bilinear_matrix(3, 24)), 0.0  # (pixels, L)
    for head in model.heads:
        weight, bias = head.weight[:, :, 0, 0].detach().double().numpy(), head.bias.detach().double().numpy()
        grad_weight, grad_bias = 0.0, 0.0
        for x, t in zip(tokens, truth.flatten(1).numpy(), strict=True):
            logits = up @ (x @ weight.T + bias)
            share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            known = t >= 0
            total -= np.log(share[known, t[known]]).sum() / (2 * 16 * 24)
            share[known, t[known]] -= 1
            grad = up.T @ (share * known[:, None]) / (2 * 16 * 24)
            grad_weight, grad_bias = grad_weight + grad.T @ x, grad_bias + grad.sum(0)
        assert_close(head.weight.grad[:, :, 0, 0].double(), torch.from_numpy(grad_weight), rtol=1e-4, atol=1e-5)
        assert_close(head.bias.grad.double(), torch.from_numpy(grad_bias), rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("size", [(16, 16), (40, 24)], ids=["one window", "overlapping windows"])
def test_knn_segmentation_of_the_training_image_itself_is_perfect(size):
    encoder, images, truth = pico(), torch.randn(1, 3, *size), torch.randint(0, 3, size)
    args = Namespace(input_size=(16, 16), layers=None, temperature=0.07, batch_size=1, amp="off")
    features, labels = [], []
    for y in window_starts(size[0], 16):
        for x in window_starts(size[1], 16):
            window = slice(y, y + 16), slice(x, x + 16)
            with torch.no_grad():
                features += patch_maps(encoder, images[..., *window])[0].flatten(1).mT
            labels += [truth[y + i : y + i + 8, x + j : x + j + 8].flatten() + 1 for i in (0, 8) for j in (0, 8)]
    bank = PatchBank(F.normalize(torch.stack(features), dim=1), torch.stack(labels).byte(), torch.zeros(len(labels)))
    model = PatchVotes(encoder, bank, 3, [1], args)
    with torch.no_grad():
        assert torch.equal(predict(model, images, args, CPU)[0].argmax(0), truth)


def test_votes_equal_a_loop_over_all_patches_and_pixels():
    rows, labels, queries = (
        F.normalize(torch.randn(20, 5)),
        torch.randint(0, 4, (20, 4)).byte(),
        F.normalize(torch.randn(3, 5)),
    )
    args = Namespace(layers=None, temperature=0.5)
    found = PatchVotes(pico(), PatchBank(rows, labels, torch.zeros(20)), 3, [2, 7, 50], args).votes(queries)
    for q, query in enumerate(queries):
        order = sorted(range(20), key=lambda i, query=query: -float(rows[i] @ query))
        for n, k in enumerate((2, 7, 50)):
            for pixel in range(4):
                votes = [0.0] * 4
                for i in order[:k]:
                    votes[labels[i, pixel]] += math.exp(float(rows[i] @ query) / 0.5)
                slow = torch.tensor(votes[1:]) / max(sum(votes[1:]), 1e-9)  # ignored pixels do not vote
                assert_close(found[q, n, :, pixel], slow, rtol=1e-4, atol=1e-6)


def test_patch_bank_has_at_most_bank_patches_with_their_labels(masked):
    args = Namespace(
        data_path=[str(masked)], classes=None, palette=None, ignore_index=255, short_side=0, input_size=(16, 16), seed=0,
        in_chans=3, timeout_minutes=1, num_workers=0, layers=None, amp="off", mean=[0.5] * 3, std=[0.5] * 3, bank_patches=20, batch_size=4,
    )  # fmt: skip
    encoder, source = pico(), mask_folder(args, "train")
    whole, alone = (
        build_bank(Namespace(**vars(args) | {"bank_patches": n}), ALONE, encoder, source) for n in (10**6, 20)
    )
    assert (len(alone.features), alone.images.bincount().tolist()) == (20, [3, 3, 4, 3, 3, 4])
    assert len(whole.features) > 20
    for row, labels, image in zip(*alone, strict=True):  # a subset of all patches, with their labels
        same = (whole.features == row).all(1) & (whole.images == image)
        assert same.sum() == 1
        assert torch.equal(whole.labels[same][0], labels)
    assert {*alone.exclude_images([1, 2]).images.tolist()} == {0, 3, 4, 5}


def segment(folder, masked, *words) -> dict:
    flags = [*DEVICE, "--data_path", masked, "--output_dir", folder]
    return result("main_segment", *flags, *words)


def test_knn_segments_the_square_and_selects_k_on_train(masked, tmp_path):
    found = segment(tmp_path, masked, "--checkpoint", "none", *MODEL, "--method", "knn", "--k", 1, 3, "--short_side", 0)
    assert (found["n"], found["selected_on"], {*found["miou_of_k"]}) == (3, "train", {"1", "3"})
    assert found["miou_of_k"][str(found["k"])] == max(found["miou_of_k"].values())
    assert found["iou"]["1"] > 30  # a bright square is found without training


def test_knn_votes_are_float32_with_a_bf16_encoder(masked, tmp_path):
    words = ["--checkpoint", "none", *MODEL, "--method", "knn", "--k", 3, "--short_side", 0]
    whole, half = (segment(tmp_path, masked, *words, "--amp", amp) for amp in ("off", "bf16"))
    assert half["miou"] == pytest.approx(whole["miou"], abs=3)


# -------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def heads(pretrained, masked, tmp_path_factory):
    """(folder, result) of two heads on both layers."""
    folder = tmp_path_factory.mktemp("segment")
    words = ["--checkpoint", pretrained / "last.pth", *TRAIN, "--layers", 1, 2, "--blr", 0.1, 2]
    return folder, segment(folder, masked, *words)


def test_heads_are_evaluated_and_trained_in_bf16(heads, masked, tmp_path, pretrained):
    folder, best = heads
    words = ["--eval", "--checkpoint", folder / "segmenter.pth", "--amp", "bf16"]
    assert segment(tmp_path, masked, *words)["miou"] == pytest.approx(best["miou"], abs=3)
    words = ["--checkpoint", pretrained / "last.pth", *TRAIN, "--layers", 1, 2, "--blr", 0.1, 2, "--amp", "bf16"]
    assert segment(tmp_path, masked, *words)["miou"] == pytest.approx(best["miou"], abs=6)


def test_the_best_head_is_logged_saved_and_evaluated_again(heads, masked):
    folder, best = heads
    assert [*best] == ["miou", "mean_class_acc", "pixel_acc", "iou", "n", "blr", "selected_on"]
    logged = records(folder, "val_miou")
    assert [x["epoch"] for x in logged] == [1, 2]
    assert (logged[-1]["val_miou"], logged[-1]["val_iou"]) == (best["miou"], best["iou"])
    again = segment(folder, masked, "--eval", "--checkpoint", folder / "segmenter.pth")
    assert again == {k: best[k] for k in again}


def test_a_segmenter_is_evaluated_on_the_columns_that_it_was_trained_on(masked, pretrained, tmp_path):
    rows = [f"{path},{path.parts[-3]},{path.parents[1] / 'masks' / path.name}" for path in masked.glob("*/images/*")]
    (tmp_path / "x.csv").write_text("file,part,seg\n" + "\n".join(rows))
    columns = [
        "--image_column",
        "file",
        "--split_column",
        "part",
        "--mask_column",
        "seg",
        "--classes",
        "ground",
        "square",
    ]
    words = ["--checkpoint", pretrained / "last.pth", *TRAIN, "--short_side", 16]
    trained = segment(tmp_path / "run", tmp_path / "x.csv", *words, *columns)
    saved = tmp_path / "run" / "segmenter.pth"
    again = segment(tmp_path / "eval", tmp_path / "x.csv", "--eval", "--checkpoint", saved)
    assert again == {name: trained[name] for name in again}


def test_other_mains_read_the_encoder_of_a_segmenter_and_eval_requires_a_segmenter(
    heads, pretrained, photos, masked, tmp_path
):
    ours, theirs = (
        result("main_knn", "--checkpoint", path, "--data_path", photos, *DEVICE)
        for path in (heads[0] / "segmenter.pth", pretrained / "last.pth")
    )
    assert ours == theirs
    for path in (pretrained / "last.pth", "none"):
        with pytest.raises(ValueError, match=rf"--checkpoint {path} .*segmenter\.pth"):
            segment(tmp_path, masked, "--eval", "--checkpoint", path, *MODEL)


def test_only_heads_and_statistics_are_trained(heads, pretrained):
    after, before = weights(heads[0])["model"], weights(pretrained)["model"]
    fresh = {name for name in after if name.startswith(("heads.", "bn."))}
    assert after["heads.0.weight"].shape == (2, 96, 1, 1)
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - fresh)
    assert not torch.equal(after["heads.0.weight"], after["heads.1.weight"])


def test_heads_trained_together_equal_heads_trained_separately(heads, pretrained, masked, tmp_path):
    together = weights(heads[0])["model"]
    for i, blr in enumerate((0.1, 2)):
        words = ["--checkpoint", pretrained / "last.pth", *TRAIN, "--layers", 1, 2, "--blr", blr]
        segment(tmp_path / str(i), masked, *words)
        alone = weights(tmp_path / str(i))["model"]
        assert_close(together[f"heads.{i}.weight"], alone["heads.0.weight"], rtol=1e-4, atol=1e-6)


def test_a_killed_run_resumes_bit_for_bit(heads, pretrained, masked, tmp_path, monkeypatch):
    words = ["--checkpoint", pretrained / "last.pth", *TRAIN, "--layers", 1, 2, "--blr", 0.1, 2]
    for step in (1, 3):  # counted from the last start
        assert interrupted(monkeypatch, step, lambda: segment(tmp_path, masked, *words)) == 75
    stopped = weights(tmp_path)
    assert segment(tmp_path, masked, *words) == heads[1]
    assert_same_run(tmp_path, heads[0])
    done = stopped["progress"]["epoch"] * stopped["steps"] + stopped["progress"]["step"]
    report = call("debug_step", tmp_path, done + 1, "--device", "cpu")
    assert any(line.startswith(f"step {done + 1}, batch 1 of 1 on rank 0: 2 images, loss ") for line in report)
    again = torch.load(tmp_path / f"debug-{done + 1}.pth", weights_only=True)
    assert_same(again["model"], stopped["model"])


@pytest.mark.slow
def test_two_ranks_equal_one(pretrained, masked, tmp_path):
    common = [
        "--checkpoint",
        pretrained / "last.pth",
        "--data_path",
        masked,
        *DEVICE,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
    ]
    one = result("main_segment", *common, "--batch_size", 2, "--blr", 1, "--output_dir", tmp_path / "one")
    (status, out, err), (other, silence, _) = ranks(
        2, "main_segment.py", *common, "--batch_size", 1, "--blr", 1, "--output_dir", tmp_path / "two"
    )
    assert (status, other, silence) == (0, 0, ""), err
    for name, value in weights(tmp_path / "one")["model"].items():
        assert_close(weights(tmp_path / "two")["model"][name], value, rtol=1e-4, atol=1e-5)
    assert json.loads(out.splitlines()[-1])["miou"] == pytest.approx(one["miou"], abs=0.5)
    same = ["--eval", "--checkpoint", tmp_path / "two" / "segmenter.pth", "--data_path", masked, *DEVICE]
    for words in (same, [*common[:10], "--method", "knn"]):
        (status, out, err), _ = ranks(2, "main_segment.py", *words)
        assert status == 0, err
        assert json.loads(out.splitlines()[-1]) == result("main_segment", *words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--layers", 3], "--layers 3: .*2 blocks"),
        (["--layers", 1, "--finetune"], "--layers: .*--finetune"),
        (["--method", "knn", "--finetune"], "--method knn: .*--finetune"),
        (["--blr", 1, 2, "--finetune"], "--blr: .*--finetune"),
        (["--crop_pct", 0.5], "--crop_pct 0.5: .*whole images"),
        (["--finetune"], "--finetune: .*DPT .*--model vit_pico"),
        (
            ["--finetune", "--model", "vit_tiny", "--input_size", 48, 32],
            "--input_size 48 32, --patch_size 8: .*multiple of 32",
        ),
        (["--model", "convvit_pico", "--layers", 1], "--layers: ConvMAE"),
        (["--input_size", 20], "20 x 20 .*patch size 8"),
    ],
)
def test_invalid_flags_give_a_one_line_error(words, line, masked, tmp_path):
    with pytest.raises(ValueError, match=line) as caught:
        segment(tmp_path, masked, "--checkpoint", "none", *MODEL, *TRAIN, *words)
    assert "\n" not in str(caught.value)


def test_convmae_is_segmented(masked, tmp_path):
    words = ["--checkpoint", "none", *MODEL, "--model", "convvit_pico", *TRAIN, "--epochs", 1]
    assert segment(tmp_path, masked, *words)["n"] == 3


# -------------------------------------------------------------------------------------------------------------------- DPT


def test_finetune_names_its_missing_package(masked, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match=r"--finetune .*pip install segmentation-models-pytorch"):
        segment(tmp_path, masked, "--checkpoint", "none", *MODEL, "--finetune", *TRAIN)


@pytest.mark.filterwarnings("ignore")
def test_a_dpt_has_every_tensor_of_the_encoder_and_layer_decay():
    pytest.importorskip("segmentation_models_pytorch")
    options = {
        "model": "vit_tiny",
        "patch_size": 16,
        "input_size": (32, 64),
        "in_chans": 1,
        "mean": [0.5],
        "std": [0.5],
    }
    encoder = ENCODERS["vit_tiny"](img_size=(32, 64), in_chans=1)
    model = build_dpt(Namespace(**options), encoder, 3, drop_path=0.1)
    loaded = model.encoder.model.state_dict()
    assert [name for name, value in encoder.state_dict().items() if not torch.equal(value, loaded[name])] == []
    assert len(loaded) == len(encoder.state_dict())
    assert model.encoder.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model(torch.randn(1, 1, 32, 64)).shape == (1, 3, 32, 64)
    args = Namespace(finetune=True, weight_decay=0.05, layer_decay=0.5)
    groups = build_adamw(model, Namespace(args=args, lr=0.1)).param_groups
    scale = {id(p): g.get("lr_scale", 1) for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert {*scale} == {id(p) for name, p in names.items() if "encoder.model.norm" not in name}
    assert scale[id(names["encoder.model.blocks.11.mlp.fc1.weight"])] == 0.5
    assert scale[id(names["encoder.model.patch_embed.proj.weight"])] == 0.5**13  # twelve blocks later comes the decoder
    assert {scale[id(p)] for name, p in names.items() if not name.startswith("encoder.")} == {1}
    model(torch.randn(2, 1, 32, 64)).sum().backward()
    assert [name for name, p in names.items() if p.requires_grad and p.grad is None] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_finetune_also_trains_an_untrained_encoder_and_resumes(masked, tmp_path, monkeypatch):
    smp = pytest.importorskip("segmentation_models_pytorch")
    small = {"decoder_intermediate_channels": (8, 8, 8, 8), "decoder_fusion_channels": 8}
    monkeypatch.setattr(smp, "DPT", partial(smp.DPT, **small))
    sizes = ["--model", "vit_tiny", "--patch_size", 16, "--input_size", 32]
    segment(tmp_path / "encoder", masked, "--checkpoint", "none", *sizes, *TRAIN, "--epochs", 1, "--seed", 1)
    words = ["--checkpoint", tmp_path / "encoder" / "segmenter.pth", "--finetune", *TRAIN]
    found = segment(tmp_path / "a", masked, *words)
    alone = segment(tmp_path / "b", masked, *words, "--untrained", "none")
    control = segment(tmp_path / "c", masked, "--checkpoint", "none", *sizes, "--finetune", *TRAIN)
    assert {k: found[k] for k in alone} == alone
    assert found["miou_untrained"] == control["miou"]
    again = segment(tmp_path / "a", masked, "--eval", "--checkpoint", tmp_path / "a" / "segmenter.pth")
    assert again == {k: found[k] for k in again}
    assert interrupted(monkeypatch, 6, lambda: segment(tmp_path / "d", masked, *words)) == 75  # in the second training
    assert segment(tmp_path / "d", masked, *words) == found
    assert_same(weights(tmp_path / "a")["model"], weights(tmp_path / "d")["model"])
    shutil.copytree(tmp_path / "a" / "untrained", tmp_path / "control")
    assert segment(tmp_path / "e", masked, *words, "--untrained", tmp_path / "control") == found


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_the_picture_shows_the_worst_images_of_val(heads, masked, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "visualize.draw_segmentation", lambda *given: drawn.append(given) or np.zeros((9, 9, 3), np.uint8)
    )
    words = [
        "--checkpoint",
        heads[0] / "segmenter.pth",
        "--images",
        masked,
        "--segment",
        "--count",
        2,
        "--device",
        "cpu",
    ]
    (line,) = call("visualize", *words, "--output", tmp_path / "x.png")
    images, masks, predictions, labels, classes = (list(x) for x in drawn[0])
    assert line.endswith("5 images, 9 x 9")  # 2 of 3 at even steps, and all 3 as the worst
    worst = [float(label.removeprefix("worst: ")) for label in labels if "worst" in label]
    assert worst == sorted(worst)
    for mask, prediction, label in zip(masks, predictions, labels, strict=True):
        score = Confusion(2, CPU)
        score.add(torch.from_numpy(mask), torch.from_numpy(prediction))
        assert f"{score.result(ALONE, classes)['miou']:.1f}" in label
    assert [image.shape[:2] for image in images] == [mask.shape for mask in masks]
    with pytest.raises(ValueError, match=r"--segment --images .*one folder"):
        call("visualize", *words[:2], "--segment", "--output", tmp_path / "x.png", "--images", "a", "b")
