"""benchmarks.mechanisms: perturbed images and kept shares against second computations."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image

SIZE = 32


@pytest.fixture
def perturbed(tmp_path) -> dict[str, np.ndarray]:
    """Kind -> pixels of one image that needs no resize, and its original."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(60, 190, (8, 8, 3), np.uint8))
    image = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    for name in "ab":
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        image.save(folder / "x.png")
    words = ["--data_path", tmp_path, "--out", tmp_path / "out", "--input_size", SIZE, "--radius", 6, "--patch_size", 8]
    [line] = [line for line in call("benchmarks.mechanisms", "perturb", *words) if line[0] == "{"]
    assert json.loads(line)["images"] == 2
    files = {kind: tmp_path / "out" / kind / "val" / "a" / "x.png" for kind in json.loads(line)["kinds"]}
    return {"original": np.asarray(image), **{kind: np.asarray(Image.open(file)) for kind, file in files.items()}}


def distance() -> np.ndarray:
    k = np.fft.fftfreq(SIZE, 1 / SIZE)
    return np.hypot(k[:, None], k)


def test_control_equals_the_unchanged_image(perturbed):
    assert np.array_equal(perturbed["none"], perturbed["original"])


@pytest.mark.parametrize(("kind", "grey"), [("lowpassed", 0.0), ("highpassed", 127.5)])
def test_filters_keep_the_frequencies_of_their_side_of_the_cut_off(perturbed, kind, grey):
    keep = (distance() <= 6) == (kind == "lowpassed")
    spectrum = np.fft.fft2(perturbed["original"].astype(float), axes=(0, 1)) * keep[..., None]
    expected = np.fft.ifft2(spectrum, axes=(0, 1)).real + grey
    assert np.abs(perturbed[kind] - expected.clip(0, 255)).max() <= 0.51  # rounded to 8 bits


def test_blur_is_a_gaussian_of_two_pixels(perturbed):
    taps = np.exp(-(np.arange(-6, 7.0) ** 2) / (2 * 2.0**2))
    padded = np.pad(perturbed["original"].astype(float), ((6, 6), (6, 6), (0, 0)), "reflect")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, taps / taps.sum(), "valid")
    assert np.abs(perturbed["blurred"] - padded).max() <= 0.51


def test_noise_has_a_tenth_of_the_range_and_grey_the_luminance(perturbed):
    noise = perturbed["noised"].astype(float) - perturbed["original"]
    assert noise.std() == pytest.approx(25.5, rel=0.05)
    luminance = perturbed["original"] @ [0.299, 0.587, 0.114]
    assert np.abs(perturbed["grey"] - luminance[..., None]).max() <= 0.51


def test_shuffling_moves_whole_patches(perturbed):
    def patches(image: np.ndarray) -> list[bytes]:
        return [image[y : y + 8, x : x + 8].tobytes() for y in range(0, SIZE, 8) for x in range(0, SIZE, 8)]

    moved, before = patches(perturbed["shuffled"]), patches(perturbed["original"])
    assert sorted(moved) == sorted(before)
    assert sum(a != b for a, b in zip(moved, before, strict=True)) > 8


def write_mask(folder: Path, mask: np.ndarray) -> None:
    for kind, pixels in (("images", np.zeros((*mask.shape, 3), np.uint8)), ("masks", mask)):
        path = folder / "train" / kind / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)


def test_kept_shares_equal_those_of_all_windows(tmp_path):
    mask = np.zeros((64, 128), np.uint8)
    mask[:, :64] = 1  # the left half
    write_mask(tmp_path, mask)
    words = ["--data_path", tmp_path, "--input_size", 64, "--draws", 3000]
    found = {x["kept"]: x for x in map(json.loads, call("benchmarks.mechanisms", "crops", *words))}
    # windows of 64 start at -4 to 68 columns and at -4 to 4 rows, each as likely
    left = np.clip(64 - np.abs(np.arange(-4, 69)), 0, None) / 64  # of the object's columns
    inside = (np.minimum(np.arange(-4, 69) + 64, 128) - np.clip(np.arange(-4, 69), 0, None)) / 128
    rows = np.mean(64 - np.abs(np.arange(-4, 5))) / 64
    assert found["src objects"]["mean"] == pytest.approx(100 * rows * left.mean(), abs=2)
    assert found["src image"]["mean"] == pytest.approx(100 * rows * inside.mean(), abs=1)
    # area uniform in 20 to 100 %, but a wide image cuts high windows off: between the least and the mean without that
    assert 20 < found["rrc image"]["mean"] < 60
    assert found["rrc objects"]["mean"] == pytest.approx(found["rrc image"]["mean"], abs=2)  # symmetric
