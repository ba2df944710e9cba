"""main_features.py: features of images in folders and tar shards, with their names."""

import json
import os
import re
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODEL, call, ended, files, result, spawn
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from torch.testing import assert_close

import main_features
from models_convmae import ConvViT
from models_pixmim import MaskedViT
from util.data.decode import read_image
from util.data.pixels import PixelOptions
from util.data.transforms import eval_transform
from util.formats.read import read_weights
from util.formats.resize import resize_weights

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
ON_CPU = ["--num_workers", "0", "--device", "cpu"]


def extract(folder: Path, checkpoint: Path, output: Path, *words) -> np.ndarray:
    printed = result(
        "main_features", "--data_path", folder, "--checkpoint", checkpoint, "--output", output, *ON_CPU, *words
    )
    array = np.load(output)
    assert printed == {"output": str(output), "shape": [*array.shape]}
    return array


def names_of(output: Path) -> list[str]:
    return json.loads(output.with_suffix(".json").read_text())["files"]


def one_by_one(folder: Path, names: list[str], run: Path, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """Tokens (N, 1 + L, D), by a loop over images."""
    encoder = MaskedViT(img_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
    encoder.load_state_dict(resize_weights(read_weights(run / "last.pth"), size).state, strict=False)
    tokens = []
    for name in names:
        pixels = eval_transform(size)(read_image(os.fsencode(folder / name), PixelOptions(3)), np.random.default_rng(0))
        images = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD
        with torch.no_grad():
            tokens.append(encoder.forward_features(images[None]))
    return torch.cat(tokens)


@pytest.mark.parametrize("words", ["", "--pool token", "--pool mean", "--maps", "--maps --input_size 24 32"])
def test_each_row_equals_the_features_of_the_named_file(words, photos, pretrained, tmp_path):
    array = extract(photos, pretrained / "last.pth", tmp_path / "x.npy", "--batch_size", 4, *words.split())
    names = names_of(tmp_path / "x.npy")
    assert len(names) == len(array) == 25  # train and val; the last batch has one
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert names[0] == "train/ant/0.JPG"
    size = (24, 32) if "24" in words else (16, 16)
    tokens = one_by_one(photos, names, pretrained, size)
    patches = tokens[:, 1:]
    maps = patches.mT.unflatten(2, (size[0] // 8, size[1] // 8))
    wanted = maps if "maps" in words else patches.mean(1) if "mean" in words else tokens[:, 0]
    assert array.dtype == np.float32
    assert_close(torch.from_numpy(array), wanted, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_number_of_workers(photos, pretrained, tmp_path):
    one, two = tmp_path / "1.npy", tmp_path / "2.npy"
    for path, workers in ((one, 0), (two, 1)):
        call("main_features", "--data_path", photos, "--checkpoint", pretrained / "last.pth", "--output", path, "--device", "cpu",
             "--num_workers", workers)  # fmt: skip
    assert one.read_bytes() == two.read_bytes()
    assert names_of(one) == names_of(two)


def test_safetensors_have_the_file_names_in_their_metadata(photos, pretrained, tmp_path):
    array = extract(photos / "val", pretrained / "last.pth", tmp_path / "x.npy")
    output = tmp_path / "new" / "x.safetensors"
    result(
        "main_features",
        "--data_path",
        photos / "val",
        "--checkpoint",
        pretrained / "last.pth",
        "--output",
        output,
        *ON_CPU,
    )
    with safe_open(output, "numpy") as file:
        about = file.metadata()
        assert np.array_equal(file.get_tensor("features"), array)
    assert json.loads(about["files"]) == names_of(tmp_path / "x.npy")
    assert (about["feature"], about["checkpoint"]) == ("token", str(pretrained / "last.pth"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.safetensors"]


def test_features_of_tar_shards_equal_those_of_the_files(photos, pretrained, tmp_path):
    folder, shards = photos / "val", tmp_path / "shards"
    shards.mkdir()
    files = sorted(path for path in folder.rglob("*.*"))
    for n in range(2):
        with tarfile.open(shards / f"{n}.tar", "w") as tar:
            for path in files[4 * n : 4 * n + (4 if n == 0 else 99)]:
                tar.add(path, str(path.relative_to(folder)))
    packed = extract(shards, pretrained / "last.pth", tmp_path / "x.npy")
    names = [name.split(": ") for name in names_of(tmp_path / "x.npy")]
    assert [shard for shard, _ in names] == ["0.tar"] * 4 + ["1.tar"] * (len(files) - 4)
    loose = extract(folder, pretrained / "last.pth", tmp_path / "y.npy")
    order = [names_of(tmp_path / "y.npy").index(name) for _, name in names]
    assert np.array_equal(packed, loose[order])


@pytest.mark.parametrize(("words", "shape"), [([], (9, 192)), (["--maps"], (9, 192, 2, 2))])
def test_convmae_gives_the_mean_and_map_of_its_last_stage(words, shape, photos, tmp_path):
    model = ConvViT((16, 16), 8, embed_dim=(64, 96, 192), depth=(2, 2, 11), num_heads=3)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(model.pretraining_only)}
    torch.save({"model": state}, tmp_path / "conv.pth")
    assert extract(photos / "val", tmp_path / "conv.pth", tmp_path / "x.npy", *words).shape == shape
    assert json.loads((tmp_path / "x.json").read_text())["feature"] == ("maps" if words else "mean")


def test_features_of_grey_images_by_an_untrained_encoder(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (20, 30), 7).save(tmp_path / "in" / "one.png")
    words = [*MODEL, *DEVICE, "--in_chans", "1", "--mean", "0.5", "--std", "0.2"]
    printed = result(
        "main_features", "--data_path", tmp_path / "in", "--checkpoint", "none", "--output", tmp_path / "x.npy", *words
    )
    assert printed["shape"] == [1, 48]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"--output": "x.csv"}, r"--output .*x\.csv: .*\.npy or \.safetensors"),
        ({"--pool": "mean", "--maps": None}, "--pool mean .*--maps"),
        ({"--data_path": "https://example.org/x.tar"}, r"--data_path: https://example\.org/x\.tar .*stream"),
        ({"--data_path": "nowhere"}, "--data_path: .*no folder nowhere"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(words, message, photos, pretrained, tmp_path):
    given = {"--data_path": photos, "--checkpoint": pretrained / "last.pth", "--output": tmp_path / "x.npy"} | words
    with pytest.raises((ValueError, OSError), match=message) as error:
        call("main_features", *ON_CPU, *[w for pair in given.items() for w in pair if w is not None])
    assert "\n" not in str(error.value)


KILL_FEATURES = """
import os, signal, sys
import main_features
where, real = int(sys.argv.pop(1)), main_features.encode_batches
def encode_batches(*given):
    for n, batch in enumerate(real(*given)):
        if n == where:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
main_features.encode_batches = encode_batches
main_features.main()
"""


def parse_header(content: bytes) -> tuple:
    """(Header, rest) of a .safetensors file, whose metadata have no order; any other content as it is."""
    size = int.from_bytes(content[:8], "little")
    return (json.loads(content[8 : 8 + size]), content[8 + size :]) if size < len(content) else (content,)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_killed_extraction_continues_and_its_files_equal_those_of_an_unbroken_one(
    suffix, photos, pretrained, tmp_path, monkeypatch, capfd
):
    shutil.copytree(photos, tmp_path / "in")
    for name in ("train/ant/1.png", "train/ant/3.JPG", "val/cat/1.png"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    flags = ["--data_path", tmp_path / "in", "--checkpoint", pretrained / "last.pth", "--batch_size", 2, *ON_CPU]
    flags += ["--on_bad_image", "skip", "--output"]
    unbroken, killed = (tmp_path / name / f"x{suffix}" for name in ("unbroken", "killed"))
    result("main_features", *flags, unbroken)
    status, _, err = ended(spawn("-c", KILL_FEATURES, 4, *flags, killed))
    assert status == -9, err
    assert not killed.exists()
    encoded, real = [], main_features.encode_batches
    monkeypatch.setattr(
        main_features, "encode_batches", lambda *given: (encoded.append(len(x)) or (x, b) for x, b in real(*given))
    )
    printed = result("main_features", *flags, killed)
    assert sum(encoded) == 16  # 25 images, less the 8 of the four batches that were kept, and one unreadable later
    assert (printed["shape"], printed["unreadable"]) == ([22, 48], 3)
    one, other = (files(output.parent) for output in (unbroken, killed))
    assert {path.name: parse_header(x) for path, x in one.items()} == {
        path.name: parse_header(x) for path, x in other.items()
    }
    assert "25/25" in capfd.readouterr().err


def test_unreadable_images_have_neither_a_row_nor_a_name(photos, pretrained, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "in")
    whole = extract(tmp_path / "in", pretrained / "last.pth", tmp_path / "whole.npy")
    names = names_of(tmp_path / "whole.npy")
    for n in (0, 1, 7):
        (tmp_path / "in" / names[n]).write_bytes(b"no image")
    flags = ["--data_path", tmp_path / "in", "--checkpoint", pretrained / "last.pth", *ON_CPU, "--on_bad_image", "skip"]
    result("main_features", *flags, "--batch_size", 2, "--output", tmp_path / "x.npy")
    kept = [n for n in range(9) if n not in (0, 1, 7)]
    assert names_of(tmp_path / "x.npy") == [names[n] for n in kept]
    assert json.loads((tmp_path / "x.json").read_text())["unreadable"] == [names[n] for n in (0, 1, 7)]
    assert_close(torch.from_numpy(np.load(tmp_path / "x.npy")), torch.from_numpy(whole[kept]), rtol=1e-5, atol=1e-6)


def test_extraction_continues_after_a_broken_image_is_removed_and_starts_again_with_other_flags(
    photos, pretrained, tmp_path, capfd
):
    shutil.copytree(photos / "val", tmp_path / "in")
    (tmp_path / "in" / "cat" / "0.JPG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0\.JPG .*--on_bad_image skip"):
        extract(tmp_path / "in", pretrained / "last.pth", tmp_path / "x.npy", "--batch_size", 2)
    assert not (tmp_path / "x.npy").exists()
    (tmp_path / "in" / "cat" / "0.JPG").unlink()
    extract(tmp_path / "in", pretrained / "last.pth", tmp_path / "y.npy", "--batch_size", 2)
    for suffix in ("", ".json"):
        shutil.copy(tmp_path / f"x.npy.partial{suffix}", tmp_path / f"z.npy.partial{suffix}")
    extract(tmp_path / "in", pretrained / "last.pth", tmp_path / "x.npy", "--batch_size", 2)
    assert "6 of 8 images" in capfd.readouterr().err
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()
    extract(tmp_path / "in", pretrained / "last.pth", tmp_path / "z.npy", "--batch_size", 2, "--pool", "mean")
    assert re.search(r"z\.npy\.partial.* other flags", capfd.readouterr().err)
    assert not np.array_equal(np.load(tmp_path / "y.npy"), np.load(tmp_path / "z.npy"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("x.npy.partial", lambda x: x[:200] + bytes([x[200] ^ 8]) + x[201:]),
        ("x.npy.partial", lambda x: x[:1000]),
        ("x.npy.partial.json", lambda x: x[:40] + b"\xff" + x[40:]),
        ("x.npy.partial.json", lambda x: x[:40]),
        ("x.npy.partial.json", lambda x: b"[]"),
        ("x.npy.partial.json", lambda x: re.sub(rb',\s*"(rows|sha256)": "\w+"', b"", x)),
        ("x.npy.partial.json", lambda x: re.sub(rb'"size": \d+', b'"size": -1', x)),
    ],
)
def test_a_damaged_partial_file_is_named_and_extraction_starts_again(name, damage, photos, pretrained, tmp_path, capfd):
    words = ["--batch_size", 4, *ON_CPU, "--data_path", photos, "--checkpoint", pretrained / "last.pth", "--output"]
    result("main_features", *words, tmp_path / "whole.npy")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"--output {tmp_path}/x\.npy: .*same command"):
            result("main_features", *words, tmp_path / "x.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    result("main_features", *words, tmp_path / "x.npy")
    assert re.search(rf"{tmp_path / name} .*(damaged|earlier version)", capfd.readouterr().err)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_several_ranks_are_refused(photos, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("main_features.init_world", lambda *_: type("World", (), {"size": 2}))
    with pytest.raises(ValueError, match=r"main_features\.py .* 2"):
        extract(photos, pretrained / "last.pth", tmp_path / "x.npy")


@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_a_full_disk_gives_a_one_line_error_and_the_same_command_continues(ending, photos, pretrained, tmp_path):
    output, (_, hard) = tmp_path / f"x{ending}", resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["--data_path", photos, "--checkpoint", pretrained / "last.pth", "--batch_size", 4, *ON_CPU, "--output"]
    result("main_features", *words, tmp_path / f"whole{ending}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))  # of 4,928 bytes
    try:
        with pytest.raises(OSError, match=rf"^--output {output}: File too large; .*disk space"):
            result("main_features", *words, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not output.exists()
    result("main_features", *words, output)
    a, b = (
        load_file(x)["features"] if ending == ".safetensors" else np.load(x)
        for x in (output, tmp_path / f"whole{ending}")
    )
    assert np.array_equal(a, b)
    assert not list(tmp_path.glob("*.partial*"))


def test_a_disk_that_is_too_small_is_refused_after_the_first_batch(photos, pretrained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for free, ending, fits in ((4800, ".npy", True), (4799, ".npy", False), (9599, ".safetensors", False)):
        monkeypatch.setattr("main_features.shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        words = ["--data_path", photos, "--checkpoint", pretrained / "last.pth", *ON_CPU]
        if fits:
            result("main_features", *words, "--output", tmp_path / f"x{ending}")
        else:
            with pytest.raises(OSError, match=rf"--output {tmp_path}/x{ending} .*0 MiB .*free"):
                result("main_features", *words, "--output", tmp_path / f"x{ending}")
