"""Evaluation of encoders: scores, kNN, linear probes, fine-tuning, from checkpoints of every format."""

import json
import math
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CPU, DEVICE, MODEL, assert_same, call, interrupted, one_rank, ranks, records, result, weights
from timm.layers import resample_abs_pos_embed
from torch.testing import assert_close

import main_finetune
from models_pixmim import ENCODERS, MaskedViT
from util import convert
from util.args import IMAGENET_MEAN, IMAGENET_STD
from util.checkpoint.state import write_checkpoint
from util.data.batches import DevicePrefetcher, eval_loader
from util.data.samples import Samples
from util.data.sources import labelled_sources
from util.data.transforms import Normalize, eval_transform
from util.dist import World
from util.evaluate.classifier import save_classifier
from util.evaluate.encoder import features, pooling
from util.evaluate.knn import extract_features, find_neighbours, knn_votes
from util.evaluate.probes import Probe
from util.evaluate.scores import Score
from util.formats.keys import rename, to_timm
from util.formats.resize import resample_pos_embed
from util.rng import seed_everything

ALONE = World(0, 1, CPU)
TIMM = {"img_size": 16, "patch_size": 8, "num_classes": 3}
PICO = {"embed_dim": 48, "depth": 2}
PROBE = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "0", "--pool", "mean"]
TUNE = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "1", "--blr", "0.003"]


# -------------------------------------------------------------------------------------------------------------- scores


def count_scores(scores: np.ndarray, labels: list[int]) -> dict:
    """Accuracies in percent, by a loop over samples."""
    top1, top5, losses = [], [], []
    for row, label in zip(scores, labels, strict=True):
        order = sorted(range(len(row)), key=lambda c, row=row: -row[c])
        top1.append(order[0] == label)
        top5.append(label in order[:5])
        losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    by_class = [np.mean([hit for hit, x in zip(top1, labels, strict=True) if x == c]) for c in sorted(set(labels))]
    means = {"acc1": top1, "acc5": top5, "mean_class_acc": by_class}
    return {k: 100 * np.mean(v) for k, v in means.items()} | {"loss": np.mean(losses), "n": len(labels)}


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(9, [0] * 20 + [1] * 3 + [8] * 2), (3, [0, 1, 2, 2, 2]), (2, [1, 1, 1])],
    ids=["imbalanced, most classes absent", "fewer than five classes", "one class of two present"],
)
def test_scores_equal_a_count_by_hand(classes, labels):
    scores = np.random.default_rng(0).normal(size=(len(labels), classes))
    score = Score(classes, CPU)
    for part in np.array_split(np.arange(len(labels)), 2):
        score.add(torch.tensor(scores[part], dtype=torch.float32), torch.tensor(labels)[part])
    assert score.result(ALONE) == pytest.approx(count_scores(scores, labels), abs=1e-3)  # rounded to 3 places
    assert list(score.result(ALONE)) == ["acc1", "acc5", "mean_class_acc", "loss", "n"]


def slow_knn(train, labels, query, classes: int, k: int, temperature: float) -> list[float]:
    """Votes for one query, by a loop in NumPy."""
    cosines = [float(np.dot(x, query) / np.linalg.norm(x) / np.linalg.norm(query)) for x in train]
    votes = [0.0] * classes
    for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
        votes[labels[i]] += math.exp(cosines[i] / temperature)
    return votes


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_votes_equal_a_loop_over_all_neighbours(k):
    train, labels, queries = torch.randn(30, 8), torch.randint(0, 4, (30,)), torch.randn(6, 8)
    cosines, found = find_neighbours(ALONE, F.normalize(train), torch.arange(30), F.normalize(queries), min(k, 30))
    votes = knn_votes(cosines, labels[found], 4, 0.07)
    for query, mine in zip(queries.numpy(), votes, strict=True):
        slow = torch.tensor(slow_knn(train.numpy(), labels.tolist(), query, 4, k, 0.07))
        # ours have the weight 1 for the nearest
        assert_close(mine / mine.sum(), slow / slow.sum(), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ kNN


def knn(checkpoint, photos, *words) -> dict:
    return result("main_knn", "--checkpoint", checkpoint, "--data_path", photos, *DEVICE, *words)


@pytest.mark.parametrize("asked", ["auto", "before_norm", "after_norm"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_knn_accuracy_equals_a_loop_over_single_features(pool, asked, pretrained, photos):
    encoder = MaskedViT(**TIMM | PICO | {"num_classes": 0}, num_heads=3).eval()
    encoder.load_state_dict(to_timm(weights(pretrained)["model"]))
    args = Namespace(in_chans=3, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, timeout_minutes=1)
    sets: dict[str, list] = {"before_norm": [], "after_norm": []}
    for source in labelled_sources(str(photos)):
        samples = Samples(source, eval_transform((16, 16)), args)
        batch = next(iter(DevicePrefetcher([samples.__getitems__([(0, i) for i in range(len(samples))])], CPU)))
        before = encoder.blocks(encoder._pos_embed(encoder.patch_embed(Normalize(args, CPU)(batch))))
        for layer, x in (
            ("before_norm", before),
            ("after_norm", F.layer_norm(before, (48,), *encoder.norm.parameters(), 1e-6)),
        ):
            tokens = x.detach().numpy()
            sets[layer].append((tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1), source.labels.tolist()))
    expected = {}
    for layer, ((train, labels), (queries, truth)) in sets.items():
        votes = np.array([slow_knn(train, labels, query, 3, 3, 0.5) for query in queries])
        expected[layer] = {"knn_features": layer, "k": 3, "temperature": 0.5} | count_scores(votes, truth)
        expected[layer].pop("loss")  # votes are not logits
    flags = ["--pool", pool, "--k", 3, "--temperature", 0.5, "--knn_features", asked]
    words = ["main_knn", "--checkpoint", pretrained / "last.pth", "--data_path", photos, *DEVICE, *flags]
    first, last = map(json.loads, call(*words)[-2:])
    other, chosen = ("before_norm", "after_norm") if asked == "after_norm" else ("after_norm", "before_norm")
    assert first == expected[other] | {x: pytest.approx(y, abs=1e-3) for x, y in expected[other].items() if x[0] != "k"}
    assert last.pop(f"acc1_{other}") == first["acc1"]
    assert last == expected[chosen] | {
        x: pytest.approx(y, abs=1e-3) for x, y in expected[chosen].items() if x[0] != "k"
    }


def test_a_rank_without_images_has_empty_features_of_the_right_width(photos):
    args = one_rank(photos).args
    encoder = ENCODERS["vit_tiny"](img_size=16, patch_size=8)
    source = labelled_sources(str(photos))[1]
    loader = eval_loader(args, World(9, 10, CPU), source, eval_transform((16, 16)))
    features, labels, index = extract_features(args, ALONE, encoder, loader, ["before_norm"])
    assert (features.shape, labels.shape, index.shape) == ((0, 1, 192), (0,), (0,))


def test_an_untrained_encoder_requires_model(photos):
    assert knn("none", photos, *MODEL)["n"] == 9
    with pytest.raises(ValueError, match=r"--checkpoint none .* --model"):
        knn("none", photos)


FORMATS = {
    "mae": lambda s: {"model": s, "args": Namespace(model="mae_vit_tiny_patch16", input_size=224), "epoch": 3},
    "mm": lambda s: {"state_dict": {rename(k, "mae", "mm"): v for k, v in s.items()}, "meta": {"epoch": 3}},
    "timm": to_timm,
}


@pytest.mark.parametrize("source", FORMATS)
def test_knn_reads_foreign_checkpoints_without_conversion(source, pretrained, photos, tmp_path):
    torch.save(FORMATS[source](weights(pretrained)["model"]), tmp_path / "foreign.pth")
    assert knn(tmp_path / "foreign.pth", photos) == knn(pretrained / "last.pth", photos)


@pytest.mark.parametrize(
    "options", [{"target": "hf"}, {"target": "timm", "folder": True}], ids=["transformers", "timm"]
)
def test_knn_and_probe_read_folders_of_transformers_and_timm(options, pretrained_tiny, photos, tmp_path):
    convert.convert(pretrained_tiny / "last.pth", tmp_path / "x", **options)
    ours = knn(pretrained_tiny / "last.pth", photos)
    assert knn(tmp_path / "x", photos) == ours
    assert knn(tmp_path / "x", photos, "--input_size", 32, 24) == knn(
        pretrained_tiny / "last.pth", photos, "--input_size", 32, 24
    )
    words = ["--checkpoint", tmp_path / "x", "--data_path", photos, *DEVICE, *PROBE, "--output_dir", tmp_path / "probe"]
    assert result("main_linprobe", *words)["n"] == 9
    assert weights(tmp_path / "probe")["args"]["checkpoint"] == str(tmp_path / "x" / "model.safetensors")


def test_grid_and_heads_of_a_folder_are_read_from_its_config(photos, tmp_path):
    encoder = MaskedViT(img_size=(16, 24), patch_size=8, embed_dim=192, depth=12, num_heads=3)
    torch.save(encoder.state_dict(), tmp_path / "x.pth")
    convert.convert(tmp_path / "x.pth", tmp_path / "x", "timm", folder=True, input_size=(16, 24))
    assert knn(tmp_path / "x", photos) == knn(tmp_path / "x.pth", photos, "--input_size", 16, 24)
    assert knn(tmp_path / "x", photos, "--input_size", 24)["n"] == 9
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["model_args"]["num_heads"] = 6
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--checkpoint .*/x has 6 attention heads, --model vit_tiny 3"):
        knn(tmp_path / "x", photos)


def test_another_input_size_resamples_the_position_embedding(pretrained, photos, tmp_path):
    assert knn(pretrained / "last.pth", photos, "--input_size", 32, 24)["n"] == 9
    same, other = (
        result(
            "main_linprobe", "--checkpoint", pretrained / "last.pth", "--data_path", photos, *DEVICE, *PROBE,
            "--input_size", size, "--output_dir", tmp_path / str(size),
        )
        for size in (16, 32)
    )  # fmt: skip
    assert same["n"] == other["n"] == 9
    embeds = [
        torch.load(tmp_path / f"{size}" / "classifier.pth", weights_only=True)["model"]["pos_embed"]
        for size in (16, 32)
    ]
    small, large = (x[0, 1:].unflatten(0, (n, n)).permute(2, 0, 1)[None] for x, n in zip(embeds, (2, 4), strict=True))
    assert_close(large, F.interpolate(small, (4, 4), mode="bicubic", align_corners=False), rtol=1e-5, atol=1e-5)
    assert torch.equal(embeds[0][:, 0], embeds[1][:, 0])  # the class token is not resampled


@pytest.mark.parametrize(
    "grids", [((4, 4), (6, 6)), ((2, 6), (5, 3)), ((3, 5), (4, 4))], ids=lambda g: f"{g[0]} to {g[1]}"
)
def test_resampled_position_embeddings_equal_timms(grids):
    old, new = grids
    embed = torch.randn(1, 1 + old[0] * old[1], 8)
    theirs = resample_abs_pos_embed(embed, [*new], [*old], num_prefix_tokens=1, antialias=False)
    assert_close(resample_pos_embed(embed, old, new, 1), theirs, rtol=0, atol=1e-6)


def test_grids_of_equal_length_are_resampled():
    embed = torch.arange(16.0).view(1, 16, 1)
    assert not torch.equal(resample_pos_embed(embed, (2, 8), (4, 4), 0), embed)


def test_a_rectangular_foreign_checkpoint_requires_input_size(photos, tmp_path):
    state = MaskedViT(img_size=(16, 24), patch_size=8, embed_dim=48, depth=2, num_heads=3).state_dict()
    torch.save({"model": state}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth.* 6 patches .*--input_size"):
        knn(tmp_path / "foreign.pth", photos)
    assert knn(tmp_path / "foreign.pth", photos, "--input_size", 16, 24)["n"] == 9


def test_a_checkpoint_of_another_model_is_refused_with_the_keys(pretrained, photos):
    with pytest.raises(ValueError, match=r"last\.pth.*--model vit_small: .*blocks\.0"):
        knn(pretrained / "last.pth", photos, "--model", "vit_small")


def test_eval_of_a_foreign_classifier_says_that_the_order_of_its_classes_is_assumed(photos, tmp_path, capsys):
    classes = len([*(photos / "val").iterdir()])
    state = MaskedViT(**TIMM | PICO | {"num_classes": classes}, num_heads=3).state_dict()
    torch.save(state, tmp_path / "foreign.pth")
    lines = call("main_finetune", "--eval", "--checkpoint", tmp_path / "foreign.pth", "--data_path", photos, *DEVICE)
    assert sum(bool(re.search(rf"foreign\.pth: .*{classes} classes .*assumed", line)) for line in lines) == 1


def test_eval_refuses_a_checkpoint_without_classifier(pretrained, photos, tmp_path):
    for main in ("main_linprobe", "main_finetune"):
        with pytest.raises(ValueError, match=r"--eval: .*last\.pth"):
            result(main, "--eval", "--checkpoint", pretrained / "last.pth", "--data_path", photos, *DEVICE)


# ---------------------------------------------------------------------------------------------------------------- probes


def probe(folder, photos, checkpoint, *words) -> dict:
    flags = [*DEVICE, *PROBE, "--checkpoint", checkpoint, "--data_path", photos, "--output_dir", folder]
    return result("main_linprobe", *flags, *words)


@pytest.fixture(scope="module")
def probed(pretrained, photos, tmp_path_factory):
    """(folder, result) of a probe with three learning rates."""
    folder = tmp_path_factory.mktemp("probe")
    return folder, probe(folder, photos, pretrained / "last.pth", "--blr", 0.1, 3, 30)


def test_a_probe_trains_only_its_heads_and_statistics(probed, pretrained):
    after, before = weights(probed[0])["model"], weights(pretrained)["model"]
    parts = ("head.weight", "head.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    fresh = {f"heads.{i}.{x}" for i in range(3) for x in parts}
    assert after.keys() - fresh == to_timm(before).keys()
    for name in after.keys() - fresh:
        assert torch.equal(after[name], before[name])
    # equal initial weights, other learning rates
    assert not torch.equal(after["heads.0.head.weight"], after["heads.2.head.weight"])
    assert after["heads.0.bn.num_batches_tracked"] == 2 * 2
    assert after["heads.1.head.bias"].norm() > 0


def test_parallel_probes_equal_separate_probes(probed, pretrained, photos, tmp_path):
    together = weights(probed[0])["model"]
    for i, blr in enumerate((0.1, 3, 30)):
        probe(tmp_path / str(i), photos, pretrained / "last.pth", "--blr", blr)
        alone = weights(tmp_path / str(i))["model"]
        for part in ("weight", "bias"):
            assert torch.equal(together[f"heads.{i}.head.{part}"], alone[f"heads.0.head.{part}"])


def test_the_best_learning_rate_is_reported_and_saved(probed, photos):
    folder, best = probed
    assert list(best) == ["acc1", "acc5", "mean_class_acc", "loss", "n", "pool", "blr", "selected_on"]
    assert best["n"] == 9
    assert best["blr"] in (0.1, 3, 30)
    assert [x["epoch"] for x in records(folder, "val_acc1")] == [1, 2]
    assert records(folder, "val_acc1")[-1]["val_acc1"] == best["acc1"]
    again = result("main_linprobe", "--eval", "--checkpoint", folder / "classifier.pth", "--data_path", photos, *DEVICE)
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)
    assert again["acc1"] == best["acc1"]


def test_two_ranks_probe_as_one_even_if_one_has_no_validation_image(pretrained, photos, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "train").symlink_to(photos / "train")
    (tmp_path / "val" / "bee").mkdir()
    shutil.copy(photos / "val" / "bee" / "1.png", tmp_path / "val" / "bee")  # one validation image for two ranks
    words = ["main_linprobe.py", *DEVICE, *PROBE, "--epochs", 1, "--checkpoint", pretrained / "last.pth", "--blr", 1, 3]
    (status, out, err), (other, silence, _) = ranks(
        2, *words, "--data_path", tmp_path, "--output_dir", tmp_path / "out"
    )
    assert (status, other, silence) == (0, 0, ""), err
    best = json.loads(out.splitlines()[-1])
    assert best["n"] == 1
    flags = ["--eval", "--checkpoint", tmp_path / "out" / "classifier.pth", "--data_path", tmp_path, *DEVICE]
    again = result("main_linprobe", *flags)
    assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)
    one = ["--batch_size", 16, "--epochs", 1, "--blr", 1, 3]  # the same images per step on one rank
    probe(tmp_path / "one", tmp_path, pretrained / "last.pth", *one)
    means = [weights(tmp_path / name)["model"]["heads.0.bn.running_mean"] for name in ("out", "one")]
    assert_close(*means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_folded_classifier_in_timm_equals_the_probe(pool, pretrained, photos, tmp_path):
    probe(tmp_path, photos, pretrained / "last.pth", "--pool", pool, "--blr", 3)
    options = TIMM | PICO | ({"global_pool": "avg", "fc_norm": False} if pool == "mean" else {})
    encoder = MaskedViT(**options | {"num_classes": 0}, num_heads=3)
    ours = Probe(encoder, 3, [pool], [3]).eval()
    state = weights(tmp_path)["model"]
    ours.load_state_dict({k if k.startswith("heads.") else f"encoder.{k}": v for k, v in state.items()})
    theirs = timm.create_model(
        "vit_tiny_patch16_224", **options, checkpoint_path=str(tmp_path / "classifier.pth")
    ).eval()
    images = torch.randn(5, 3, 16, 16)
    assert_close(theirs(images), ours(images)[:, 0], rtol=1e-4, atol=1e-4)


def test_the_mmselfsup_probe_evaluates_with_bilinear_resizing(pretrained, photos, tmp_path):
    best = probe(tmp_path, photos, pretrained / "last.pth", "--probe_as", "mmselfsup")
    flags = ["--checkpoint", tmp_path / "classifier.pth", "--data_path", photos, *DEVICE, "--eval"]
    for main in ("main_linprobe", "main_finetune"):
        again = result(main, *flags)
        assert again == pytest.approx({k: best[k] for k in again}, abs=1e-4)
    state = torch.load(tmp_path / "classifier.pth", weights_only=True)
    del state["args"]["probe_as"]
    torch.save({"model": state["model"], "args": state["args"], "format": state["format"]}, tmp_path / "classifier.pth")
    assert result("main_linprobe", *flags)["loss"] != again["loss"]  # of facebookresearch/mae
    assert result("main_linprobe", *flags, "--probe_as", "mmselfsup") == again


def test_pooling_gives_the_class_token_or_the_mean_of_the_patches():
    images = torch.randn(2, 3, 16, 16)
    for pool in ("token", "mean"):
        encoder = ENCODERS["vit_tiny"](img_size=16, patch_size=8, **pooling(None, pool)).eval()
        tokens = encoder.forward_features(images)
        assert_close(features(encoder, images), tokens[:, 0] if pool == "token" else tokens[:, 1:].sum(1) / 4)


def test_a_finished_probe_prints_its_result_again(probed, pretrained, photos, tmp_path):
    folder = shutil.copytree(probed[0], tmp_path / "probe")
    assert probe(folder, photos, pretrained / "last.pth", "--blr", 0.1, 3, 30) == probed[1]
    assert (folder / "log.jsonl").read_text() == (probed[0] / "log.jsonl").read_text()


def test_resuming_a_probe_with_other_weights_is_refused(probed, pretrained, photos, tmp_path):
    folder = shutil.copytree(probed[0], tmp_path / "probe")
    other = torch.load(pretrained / "last.pth", weights_only=True)
    other["model"]["norm.bias"] += 1
    del other["sha256"]
    torch.save(other, tmp_path / "other.pth")
    content = torch.load(folder / "last.pth", weights_only=True)
    content["args"]["checkpoint"] = str(tmp_path / "other.pth")  # the same name, other weights
    del content["sha256"]
    write_checkpoint(folder / "last.pth", content)
    with pytest.raises(ValueError, match=r"weights .*--checkpoint"):
        probe(folder, photos, tmp_path / "other.pth", "--blr", 0.1, 3, 30)


def test_classifiers_are_copied_to_the_cpu_before_saving(tmp_path, monkeypatch):
    written, state = [], ENCODERS["vit_tiny"](img_size=16, patch_size=8, num_classes=3).state_dict()
    monkeypatch.setattr(
        "util.evaluate.classifier.write_checkpoint", lambda path, content: written.append(content) or path
    )
    run = one_rank(tmp_path)
    save_classifier(run, state, ["a", "b", "c"])  # a checksum requires tensors on the CPU
    assert_same(written[0]["model"], state)
    assert all(written[0]["model"][name].data_ptr() != value.data_ptr() for name, value in state.items())


def test_knn_votes_do_not_overflow_at_low_temperatures():
    train = F.normalize(torch.randn(30, 8), dim=1)
    labels = torch.arange(30) % 3
    cosines, found = find_neighbours(ALONE, train, torch.arange(30), train, 5)
    votes = knn_votes(cosines, labels[found], 3, temperature=1e-3)
    assert votes.isfinite().all()
    assert torch.equal(votes.argmax(1), labels)  # at this temperature only the nearest, the query itself, counts


# ----------------------------------------------------------------------------------------------------------- fine-tuning


def tune(folder, photos, checkpoint, *words) -> dict:
    flags = [*DEVICE, *TUNE, "--checkpoint", checkpoint, "--data_path", photos, "--output_dir", folder]
    return result("main_finetune", *flags, *words)


@pytest.fixture(scope="module")
def tuned(pretrained, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return folder, tune(folder, photos, pretrained / "last.pth")


def test_eval_of_a_fine_tuned_classifier_repeats_its_scores(tuned, photos):
    folder, last = tuned
    assert list(last) == ["acc1", "acc5", "mean_class_acc", "loss", "n"]
    assert last["n"] == 9
    flags = ["--eval", "--checkpoint", folder / "classifier.pth", "--data_path", photos, *DEVICE]
    assert result("main_finetune", *flags) == last


def test_a_fine_tuned_classifier_scores_the_same_in_timm(tuned, photos):
    folder, last = tuned
    options = TIMM | PICO | {"global_pool": "avg", "checkpoint_path": str(folder / "classifier.pth")}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    source, args = labelled_sources(str(photos))[1], one_rank(folder).args
    score = Score(3, CPU)
    for batch in eval_loader(args, ALONE, source, eval_transform((16, 16))):
        score.add(model(Normalize(args, CPU)(batch)).detach(), batch["label"])
    assert score.result(ALONE) == pytest.approx(last, abs=1e-4)


def test_fine_tuning_changes_every_pre_trained_parameter(tuned, pretrained):
    before, after = (to_timm(weights(folder)["model"]) for folder in (pretrained, tuned[0]))
    assert after.keys() - before.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    for name in before.keys() & after.keys():
        assert not torch.equal(before[name], after[name]), name  # position embeddings included
        assert_close(before[name], after[name], rtol=0, atol=1e-3)  # peak 9.4e-5, a few steps


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and newer, of worker processes
def test_resumed_fine_tuning_equals_an_uninterrupted_run(tuned, pretrained, photos, tmp_path, monkeypatch):
    interrupted(monkeypatch, 2, lambda: tune(tmp_path, photos, pretrained / "last.pth"))
    # a worker process: samples do not seed the main process
    assert tune(tmp_path, photos, pretrained / "last.pth", "--num_workers", 1) == tuned[1]
    assert_same(weights(tmp_path)["model"], weights(tuned[0])["model"])


@pytest.mark.parametrize(
    "words", ["--aa none --mixup 0 --cutmix 0 --reprob 0", "--mixup 0.8 --cutmix 0 --layer_decay 1"]
)
def test_fine_tuning_runs_from_scratch_and_without_augmentations(words, photos, tmp_path):
    assert tune(tmp_path, photos, "none", *MODEL, *words.split(), "--epochs", 1)["n"] == 9


def test_eval_uses_the_crop_recorded_in_the_classifier(pretrained, photos, tmp_path):
    last = tune(tmp_path, photos, pretrained / "last.pth", "--epochs", 1, "--crop_pct", 0.5)
    flags = ["--eval", "--checkpoint", tmp_path / "classifier.pth", "--data_path", photos, *DEVICE]
    assert result("main_finetune", *flags) == last
    assert result("main_finetune", *flags, "--crop_pct", 1)["loss"] != last["loss"]
    convert.convert(tmp_path / "classifier.pth", tmp_path / "timm", "timm", folder=True)
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.5
    flags[2] = tmp_path / "timm"
    again = result("main_finetune", *flags, "--model", "vit_pico")
    assert again == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("main", ["main_pretrain", "main_knn", "main_linprobe", "main_finetune", "--eval"])
def test_one_class_is_refused(main, tuned, pretrained, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    for name in ("bee", "cat"):
        for part in ("train", "val"):
            shutil.rmtree(tmp_path / "in" / part / name)
    words = ["--data_path", tmp_path / "in", *DEVICE, "--checkpoint", pretrained / "last.pth"]
    if main == "main_pretrain":
        words = [*words[:-2], *MODEL, "--knn_every", 1, "--output_dir", tmp_path / "out"]
    if main == "--eval":  # a foreign classifier, whose classes are the folders
        state = torch.load(tuned[0] / "classifier.pth", weights_only=True)["model"]
        torch.save({k: x[:1] if k.startswith("head.") else x for k, x in state.items()}, tmp_path / "x.pth")
        main, words = "main_finetune", [*words[:-1], tmp_path / "x.pth", "--eval"]
    with pytest.raises(ValueError, match=rf"--data_path: {tmp_path}/in/(train|val) ") as caught:
        call(main, *words)
    assert "\n" not in str(caught.value)


def test_knn_of_a_fine_tuned_encoder_uses_the_features_of_its_head(tuned, photos):
    found = knn(tuned[0] / "classifier.pth", photos)
    assert found == knn(tuned[0] / "classifier.pth", photos, "--knn_features", "after_norm")
    assert (found["knn_features"], "acc1_before_norm" in found) == ("after_norm", True)


def test_knn_of_a_probe_uses_the_features_of_its_encoder(probed, pretrained, photos):
    found = knn(probed[0] / "classifier.pth", photos)
    assert found == knn(pretrained / "last.pth", photos, "--pool", "mean")
    assert found["knn_features"] == "before_norm"


def test_mixup_of_an_odd_batch_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="--batch_size 7"):
        tune(tmp_path, photos, "none", *MODEL, "--batch_size", 7)


def test_pool_token_is_refused_for_a_classifier_on_mean_pooling(tuned, photos):
    with pytest.raises(ValueError, match=r"--pool token: .*--pool mean"):
        knn(tuned[0] / "classifier.pth", photos, "--pool", "token")


def test_mixed_images_have_mixed_labels():
    args = Namespace(reprob=0.0, mixup=0.8, cutmix=1.0, smoothing=0.1)
    loss = main_finetune.finetune_loss(args, lambda batch: batch["images"], 3, CPU)
    images, seen = torch.randn(4, 3, 16, 16), []
    seed_everything(0)

    def model(images):
        seen.append(images)  # mixed in place
        return torch.zeros(4, 3)

    batch = {"images": images.clone(), "label": torch.tensor([0, 1, 2, 0])}
    assert loss(model, batch).item() == pytest.approx(math.log(3))  # labels sum to 1 with and without mixing
    assert not torch.equal(seen[0], images)


def test_unknown_validation_classes_are_named(tuned, photos, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "val")
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "yak")
    with pytest.raises(ValueError, match=r"val .*'yak'"):
        call("main_finetune", "--eval", "--checkpoint", tuned[0] / "classifier.pth", "--data_path", tmp_path, *DEVICE)
