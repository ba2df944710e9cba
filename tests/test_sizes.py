"""--sizes: images of several sizes in turn. Positions, target, masks and crops of a smaller size, and exact resume."""

import numpy as np
import pytest
import torch
from conftest import PRETRAIN, assert_same, assert_same_run, call, interrupted, pretrain, ranks, records, weights
from torch.testing import assert_close

import main_pretrain
from models import build_model
from models_pixmim import LowPass, patchify, sample_positions, sincos_pos_embed, take
from util.args import resolve_defaults
from util.crop import SimpleResizedCrop
from util.data.samples import Samples
from util.lr_sched import size_ends
from util.rng import CROP, MASK, generator

SIZES = ["--input_size", "32", "--sizes", "16:0.5", "32:0.5"]


def parse(*flags: str):
    words = [*PRETRAIN, "--input_size", "32", "--data_path", "x", *flags]
    return resolve_defaults(main_pretrain.get_parser().parse_args(words))


# ---------------------------------------------------------------------------------------------- positions and the target


def cubic(t: np.ndarray) -> np.ndarray:
    """Weight of a neighbour at distance t in cubic convolution with a = -0.75."""
    t = abs(t)
    inner, outer = (1.25 * t - 2.25) * t**2 + 1, ((-0.75 * t + 3.75) * t - 6) * t + 3
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0))


@pytest.mark.parametrize(("own", "grid"), [((8, 8), (4, 4)), ((14, 14), (7, 7)), ((7, 14), (3, 6)), ((4, 4), (4, 4))])
def test_positions_of_a_smaller_grid_are_those_of_its_centres_in_the_own_grid(own, grid):
    embed = sincos_pos_embed(16, own, 2) + torch.randn(1, 2 + own[0] * own[1], 16)
    table = embed[0, 2:].unflatten(0, own).double()
    for dim, (most, n) in enumerate(zip(own, grid, strict=True)):
        matrix = np.zeros((n, most))
        for i in range(n):
            place = (i + 0.5) * most / n - 0.5
            for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                matrix[i, min(max(j, 0), most - 1)] += cubic(place - j)
        table = torch.tensordot(torch.from_numpy(matrix), table, ([1], [dim])).movedim(0, dim)
    found = sample_positions(embed, own, grid)
    assert_close(found[0, 2:].double(), table.flatten(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(found[:, :2], embed[:, :2])


def test_fixed_positions_of_a_smaller_grid_are_near_sin_and_cos_of_their_coordinates():
    found = sample_positions(sincos_pos_embed(192, (14, 14), 1), (14, 14), (7, 7))[0, 1:].unflatten(0, (7, 7))
    omega = 10000 ** -(torch.arange(48) / 48)
    angle = (2 * torch.arange(7) + 0.5)[:, None] * omega
    columns = torch.cat([angle.sin(), angle.cos()], dim=1)
    error = (found[:, 1:-1, :96] - columns[1:-1]).abs().max(), (found[1:-1, :, 96:] - columns[1:-1, None]).abs().max()
    assert max(error) < 0.03
    assert (sincos_pos_embed(192, (7, 7), 0)[0].unflatten(0, (7, 7))[:, 1:-1, :96] - columns[1:-1]).abs().max() > 1


@pytest.mark.parametrize("kind", ["reference", "centered"])
def test_target_of_a_smaller_image_has_the_frequencies_of_the_large_one(kind):
    spectrum = torch.zeros(2, 3, 64, 64, dtype=torch.complex64)
    k = torch.arange(-15, 16)
    spectrum[:, :, k[:, None], k] = torch.randn(2, 3, 31, 31, dtype=torch.complex64) * 20
    large = torch.fft.ifft2(spectrum).real  # below 16 cycles: every second pixel determines it
    target = LowPass((64, 64), 10, [0.4] * 3, [0.2] * 3, kind)
    small = target(large[..., ::2, ::2])
    assert_close(small, target(large)[..., ::2, ::2], rtol=0, atol=1e-4)
    assert torch.equal(small, LowPass((32, 32), 10, [0.4] * 3, [0.2] * 3, kind)(large[..., ::2, ::2]))
    assert (small - large[..., ::2, ::2]).abs().max() > 0.1  # the filter changes the image


HOSTS = [
    "",
    "--decoder cross --fuse_levels --class_tokens 2",
    "--model mff_vit_pico",
    "--pos_embed learned --mask_unit 2",
]


@pytest.mark.parametrize("flags", [*HOSTS, "--predict_ratio 0.3"])
def test_a_step_at_a_smaller_size_is_that_of_a_model_of_this_size_with_the_sampled_positions(flags):
    args = parse("--input_size", "64", "--lowpass_radius", "10", *flags.split())
    model = build_model(args)
    args.input_size = (32, 32)
    small = build_model(args)
    state = model.state_dict()
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        state[name] = sample_positions(state[name], (8, 8), (4, 4))
    small.load_state_dict(state)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, small.noise_length)
    (loss, prediction, mask), expected = (each(images, noise) for each in (model, small))
    assert_same([loss, prediction, *mask], [expected[0], expected[1], *expected[2]])
    target = take(patchify(LowPass((32, 32), 10, args.mean, args.std)(images), 8), mask.predict)
    std, mean = torch.std_mean(target, dim=2, keepdim=True)
    assert_close(loss, (prediction - (target - mean) / std).square().mean(), rtol=1e-4, atol=0)
    for each in (loss, expected[0]):
        each.backward()
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        if p.requires_grad and not name.endswith("pos_embed"):
            assert torch.equal(p.grad, q.grad), name
    if "learned" in flags:
        own = model.encoder.pos_embed.detach().requires_grad_()
        sample_positions(own, (8, 8), (4, 4)).backward(small.encoder.pos_embed.grad)
        assert_close(model.encoder.pos_embed.grad, own.grad)


@pytest.mark.parametrize("side", [40, 20, 64])
def test_images_that_are_larger_or_no_multiple_of_the_patch_are_refused(side):
    with pytest.raises(ValueError, match=rf"\({side}, {side}\) px .*\(32, 32\) px"):
        build_model(parse())(torch.zeros(1, 3, side, side))


# -------------------------------------------------------------------------------------------------- schedule and errors


@pytest.mark.parametrize(
    ("sizes", "epochs", "ends"),
    [
        ([(32, 0.75), (64, 0.25)], 150, [113, 150]),  # 112.5: halves up
        ([(16, 0.1), (32, 0.2), (64, 0.7)], 10, [1, 3, 10]),
        ([(64, 1.0)], 7, [7]),
    ],
)
def test_parts_end_at_the_sum_of_their_shares_rounded_to_the_nearest_epoch(sizes, epochs, ends):
    assert size_ends(sizes, epochs, (64, 64)) == ends


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sizes 16:0.5 32:0.4", r"--sizes 16:0\.5 32:0\.4: .*0\.9\b"),
        ("--sizes 32:0.5 16:0.5", r"last size .*--input_size 32 32"),
        ("--sizes 16:0.5 32:0.5 --input_size 32 48", r"last size .*--input_size 32 48"),
        ("--sizes 20:0.5 32:0.5", r"--sizes 20: .*multiples of 8 px \(--patch_size x --mask_unit\)"),
        ("--sizes 24:0.5 32:0.5 --mask_unit 2", r"--sizes 24: .*multiples of 16 px"),
        ("--sizes 64:0.5 32:0.5", r"--sizes 64: .*up to --input_size"),
        ("--sizes 8:0.5 32:0.5 --lowpass_radius 0", r"mask ratio .* 0 of 1 patches"),
        (
            "--sizes 16:0.5 32:0.5 --lowpass_radius 9",
            r"--sizes 16: .* 256 frequencies; .*--lowpass_radius 9\b",
        ),
        ("--sizes 16:0.5 32:0.5 --model convvit_pico", r"--sizes: --model convvit_pico .*vit_\*"),
        ("--sizes 16:0.5 32:0.5 --epochs 1", r"size .*less .*--epochs 1"),
    ],
)
def test_errors_name_sizes_that_do_not_fit(flags, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        pretrain(photos, tmp_path, "--input_size", 32, *flags.split())
    assert "\n" not in str(error.value)


def test_a_cache_refuses_sizes(photos, tmp_path):
    call("util.cache", "build", "--data_path", photos, "--out", tmp_path / "cache", "--input_size", 32, "--workers", 1)
    with pytest.raises(ValueError, match=r"--sizes: .*/cache .*one size; .*--data_path"):
        call("main_pretrain", *PRETRAIN, *SIZES, "--data_path", tmp_path / "cache", "--output_dir", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- training


def test_each_epoch_has_the_crops_and_masks_of_its_size(photos, tmp_path, monkeypatch):
    parts, read = [], Samples.__getitems__

    def record(self, keys):
        parts.append((self, keys, read(self, keys)))
        return parts[-1][2]

    monkeypatch.setattr(Samples, "__getitems__", record)
    pretrain(photos, tmp_path, *SIZES, "--epochs", 4, "--image_every", 1, "--knn_every", 4)
    trained = [part for part in parts if part[0].replace_bad]
    assert [(keys[0][0], len(part["images"][0])) for _, keys, part in trained] == [
        *[(4, 32)],  # examples of pictures and health checks
        *[(0, 16), (0, 16), (1, 16), (1, 16), (2, 32), (2, 32), (3, 32), (3, 32)],
    ]
    for samples, keys, part in trained:
        side = part["images"].shape[1]
        crop = SimpleResizedCrop((side, side))
        for n, (epoch, i) in enumerate(keys):
            pixels = crop(samples.source.read(i, samples.options), generator(0, CROP, epoch, i))
            assert np.array_equal(part["images"][n], pixels)
            noise = generator(0, MASK, epoch, i).random((side // 8) ** 2, np.float32)
            assert np.array_equal(part["noise"][n], noise)


@pytest.mark.parametrize(
    ("step", "flags"),  # of 3 steps at 16 px and 3 at 32 px that do not end an epoch
    [
        *[(2, ""), (3, "--pos_embed learned --optimizer muon --crop rrc"), (6, "")],
        pytest.param(4, "--num_workers 2 --knn_every 0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_either_size_resumes_bit_for_bit(step, flags, photos, tmp_path, monkeypatch):
    def train(folder):
        words = [*SIZES, "--batch_size", 4, "--image_every", 1, "--knn_every", 1, *flags.split()]
        return pretrain(photos, tmp_path / folder, *words)

    train("whole")
    assert interrupted(monkeypatch, step, lambda: train("broken")) == 75
    train("broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_two_ranks_equal_one_and_one_size_equals_no_sizes(photos, tmp_path):
    pretrain(photos, tmp_path / "one", *SIZES)
    flags = [
        *PRETRAIN,
        "--epochs",
        2,
        "--batch_size",
        4,
        "--warmup_epochs",
        1,
        "--blr",
        0.03,
        "--image_every",
        0,
        *SIZES,
    ]
    for status, _, err in ranks(2, "main_pretrain.py", *flags, "--data_path", photos, "--output_dir", tmp_path / "two"):
        assert status == 0, err
    losses = [[x["loss"] for x in records(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pretrain(photos, tmp_path / "same", "--input_size", 32, "--sizes", "32:1")
    pretrain(photos, tmp_path / "plain", "--input_size", 32)
    assert_same(weights(tmp_path / "same")["model"], weights(tmp_path / "plain")["model"])
    with pytest.raises(ValueError, match=r"--sizes \[\[16, 0\.5\], \[32, 0\.5\]\], \w+ None"):
        pretrain(photos, tmp_path / "one", "--input_size", 32)
    assert not torch.equal(*(weights(tmp_path / name)["model"]["cls_token"] for name in ("one", "plain")))
    assert weights(tmp_path / "one")["model"].keys() == weights(tmp_path / "plain")["model"].keys()
