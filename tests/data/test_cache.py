"""The packed cache: training inputs equal to those of the images, resumed builds, refused flags and damaged files."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, PRETRAIN, assert_same, call, class_folders, ended, one_rank, pretrain, smooth, spawn, weights

import main_pretrain
from util.args import resolve_defaults
from util.cache import PackDataset
from util.data.batches import DevicePrefetcher, train_loader
from util.data.cache import Cache, is_cache
from util.data.folders import image_folder
from util.data.pixels import PixelOptions
from util.data.sources import pretrain_source
from util.data.transforms import pretrain_transform
from util.files import read_json, write_json

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers
BUILD = ["--workers", 1, "--shard_mib", 0.004]  # two images of 16 x 24 pixels per shard


def build(images: Path, out: Path, *words) -> list[str]:
    return call("util.cache", "build", "--data_path", images, "--out", out, "--input_size", 16, 24, *BUILD, *words)


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory) -> Path:
    """Cache of the photos. Copy it before you change it."""
    out = tmp_path_factory.mktemp("packed") / "cache"
    build(photos, out)
    return out


def epoch(source, tmp_path, epoch: int = 0, **flags) -> list[dict]:
    """Every batch of an epoch."""
    run = one_rank(tmp_path, batch_size=4, **flags)
    crop = pretrain_transform("src", (16, 24), "bilinear")
    loader = train_loader(run, source, crop, flip=True, noise_length=6)
    loader.batch_sampler.start(epoch)
    return list(DevicePrefetcher(loader, CPU, loader.batch_sampler.parts))


# ------------------------------------------------------------------------------------------------------- equal batches


@pytest.mark.parametrize("payload", ["raw", "zstd"])
def test_batches_equal_those_of_the_images_bit_for_bit(payload, photos, tmp_path):
    build(photos, tmp_path / "cache", "--payload", payload)
    for number, workers in product(range(3), (0, 2)):
        online, packed = (
            epoch(source, tmp_path, number, num_workers=workers)
            for source in (image_folder(str(photos)), Cache(tmp_path / "cache"))
        )
        assert len(online) == 4
        for a, b in zip(online, packed, strict=True):
            assert_same(a, b)


def test_training_on_a_cache_equals_training_on_the_images(pretrained, photos, tmp_path):
    call("util.cache", "build", "--data_path", photos, "--out", tmp_path / "cache", "--input_size", 16, *BUILD)
    pretrain(tmp_path / "cache", tmp_path / "run", "--knn_every", 2, "--knn_path", photos)
    assert_same(weights(pretrained)["model"], weights(tmp_path / "run")["model"])


def test_zstd_is_exact_and_smaller_than_raw_and_jpeg_is_lossy_and_smaller_still(photos, tmp_path):
    sizes = {}
    for payload in ("raw", "zstd", "jpeg"):
        call("util.cache", "build", "--data_path", photos, "--out", tmp_path / payload, "--input_size", 96, "--workers", 1,
             "--payload", payload)  # fmt: skip
        sizes[payload] = sum(path.stat().st_size for path in (tmp_path / payload).glob("*.bin"))
    assert sizes["raw"] > sizes["zstd"] > sizes["jpeg"]
    for i in range(16):
        exact, near = (Cache(tmp_path / payload).read(i, PixelOptions(3)).astype(int) for payload in ("zstd", "jpeg"))
        assert 0 < np.abs(exact - near).mean() < 2  # grey levels
        assert np.array_equal(exact, Cache(tmp_path / "raw").read(i, PixelOptions(3)))


@pytest.mark.parametrize("in_chans", [1, 5])
def test_images_of_one_or_five_channels_are_packed(in_chans, tmp_path):
    if in_chans == 1:
        class_folders(tmp_path / "images", {"a": 4}, seed=0)
    else:
        (tmp_path / "images").mkdir()
        rng = np.random.default_rng(0)
        for i in range(4):
            np.save(tmp_path / "images" / f"{i}.npy", rng.integers(0, 256, (20 + i, 30, 5), np.uint8))
    build(tmp_path / "images", tmp_path / "cache", "--in_chans", in_chans)
    flags = {"in_chans": in_chans}
    for a, b in zip(
        *(epoch(s, tmp_path, **flags) for s in (image_folder(str(tmp_path / "images")), Cache(tmp_path / "cache"))),
        strict=True,
    ):
        assert a["images"].shape == (4, 16, 24, in_chans)
        assert torch.equal(a["images"], b["images"])


def test_each_process_opens_each_shard_once(packed):
    first, second = Cache(packed), pickle.loads(pickle.dumps(Cache(packed)))
    assert len(first.shard_digests) == 8
    for i in [*range(16), 0]:
        assert np.array_equal(first.read(i, PixelOptions(3)), second.read(i, PixelOptions(3)))
    assert len(first.files) == len(second.files) == 8


def test_threads_do_not_share_a_buffer(packed):
    alone, shared = Cache(packed), Cache(packed)
    expected = [alone.read(i, PixelOptions(3)).copy() for i in range(16)]

    def read(turn: int) -> bool:
        i = turn % 16
        return np.array_equal(shared.read(i, PixelOptions(3)), expected[i])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the default, 5 ms, lets a reading thread wait for the GIL that long
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(2000)))
    finally:
        sys.setswitchinterval(interval)


def test_raises_the_limit_of_open_files_or_refuses_too_many_shards(packed, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 100))
    with pytest.raises(ValueError, match=r"--data_path .* 8 shards.* 100 .*--shard_mib"):
        Cache(packed)
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert len(Cache(packed)) == 16
    assert limits == [(264, 1000)]


# ------------------------------------------------------------------------------------------------------------ the build


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(event: int, *args) -> None:
    """Build a cache in this process, which is killed when it flushes or renames a file for the event-th time."""
    events = []

    def count(real, *given):
        events.append(real)
        if len(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    os.replace, os.fsync = partial(count, os.replace), partial(count, lambda _: None)
    build(*args)


def test_a_killed_build_resumes_and_gives_the_same_cache(packed, photos, tmp_path):
    out, fork = tmp_path / "cache", multiprocessing.get_context("fork")
    for kill in range(5):  # a shard has 5 events: data flushed, renamed, index flushed, renamed, folder flushed
        before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.npz")}
        process = fork.Process(target=kill_at, args=(3 + 5 + kill + 1, photos, out))  # after the plan and a whole shard
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        assert before == {path: path.stat().st_mtime_ns for path in before}
        assert len([*out.glob("shard-*.npz")]) > len(before)
    build(photos, out)
    for name, content in files(packed).items():
        if not name.endswith(".npz"):  # zip files hold the time
            assert files(out)[name] == content, name


def test_building_again_rewrites_only_damaged_shards(packed, tmp_path, photos):
    out = shutil.copytree(packed, tmp_path / "cache")
    whole = files(out)
    build(photos, out)
    assert files(out) == whole
    (out / "shard-00002.bin").write_bytes(b"x")
    build(photos, out)
    assert files(out)["shard-00002.bin"] == whole["shard-00002.bin"]


@pytest.mark.parametrize(
    "damage", [b"", b"PK", lambda x: bytes(len(x)), lambda x: x[:-9], lambda x: x[:90] + b"\0" * 40 + x[130:]]
)
def test_a_damaged_index_of_a_shard_is_named_and_its_shard_built_again(damage, packed, photos, tmp_path):
    out = shutil.copytree(packed, tmp_path / "cache")
    (out / "manifest.json").unlink()
    part = out / "shard-00001.npz"
    part.write_bytes(damage if isinstance(damage, bytes) else damage(part.read_bytes()))
    lines = build(photos, out)
    assert any(f"{part} is damaged (" in line for line in lines)
    for name, content in files(packed).items():
        if not name.endswith(".npz"):
            assert files(out)[name] == content


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[]", b"{}", b"[" * 10**5, b'{"images_per_shard": "x"}'])
def test_a_damaged_plan_is_named(content, packed, photos, tmp_path):
    out = shutil.copytree(packed, tmp_path / "cache")
    (out / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{out}/plan\.json .*damaged"):
        build(photos, out)


def change_value(path: Path, name: str, value: object) -> None:
    """Change a value in a JSON file, but not its checksum."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def test_a_changed_value_in_a_plan_or_manifest_is_named(packed, photos, tmp_path):
    out = shutil.copytree(packed, tmp_path / "cache")
    change_value(out / "manifest.json", "crop_interpolation", "bicubic")
    with pytest.raises(ValueError, match=r"manifest\.json .*checksum"):
        Cache(out)
    change_value(out / "plan.json", "images_per_shard", 3)
    with pytest.raises(ValueError, match=r"plan\.json .*checksum"):
        build(photos, out)


def test_a_shard_of_other_images_is_built_again(packed, photos, tmp_path):
    out = shutil.copytree(packed, tmp_path / "cache")
    shutil.copy(out / "shard-00002.npz", out / "shard-00001.npz")
    shutil.copy(out / "shard-00002.bin", out / "shard-00001.bin")
    assert any(re.search(r"shard-00001\.npz .*other images", line) for line in build(photos, out))
    assert files(out)["index.npy"] == files(packed)["index.npy"]


def test_workers_exit_if_the_builder_is_killed_while_they_start(monkeypatch):
    """torch would let such a worker wait for ever; `init_worker` is told the process that started it."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(os, "setpgrp", lambda: None)
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda _: None)
    seen = {}
    monkeypatch.setattr("util.cache.DataLoader", lambda *_, **options: seen.update(options) or [])
    assert list(PackDataset.pack(Namespace(tile=None), np.arange(3), 2)) == []
    seen["worker_init_fn"](0)  # its parent is not this process
    assert ended == [1]


@pytest.mark.parametrize(
    ("flags", "key"),
    [(["--crop_interpolation", "bicubic"], "crop_interpolation"), (["--payload", "zstd"], "payload")],
)
def test_refuses_to_resume_a_build_with_other_flags(flags, key, packed, photos):
    with pytest.raises(ValueError, match=rf"--out {packed} .*{key} "):
        build(photos, packed, *flags)


def test_refuses_to_build_over_other_images_or_other_files(packed, tmp_path):
    class_folders(tmp_path / "images", {"a": 3}, seed=0)
    with pytest.raises(ValueError, match=r"--out .*images 16, not 3"):
        build(tmp_path / "images", packed)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"--out .*/taken .*empty"):
        build(tmp_path / "images", tmp_path / "taken")


def test_refuses_a_disk_that_is_too_small_before_it_writes_a_shard(photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"--out .*0\.00 GiB.*--input_size or --payload"):
        build(photos, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_gives_one_line_and_keeps_finished_shards(packed, photos, tmp_path):
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "from util import args, cache; args.run_main(cache.main)"
    )
    words = ["build", "--data_path", photos, "--out", tmp_path / "cache", "--input_size", 16, 24, *BUILD]
    grown = ["--shard_mib", 0.007]  # five images of 1,152 to 1,500 bytes: some shards exceed the limit
    status, _, err = ended(spawn("-c", limit, *words, *grown))
    assert status == 1, err
    assert f"--out {tmp_path}/cache" in err
    assert "[Errno 27]" in err  # file too large
    assert err.count("\n") == 1
    build(photos, tmp_path / "cache", *grown)
    assert len(Cache(tmp_path / "cache")) == 16


def test_a_bad_image_stops_the_build_or_is_replaced_as_in_training(tmp_path):
    class_folders(tmp_path / "images", {"a": 5, "b": 4}, seed=0)
    for name in ("a/0.JPG", "a/1.png", "b/3.JPG"):  # the first two, and the last
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a/0\.JPG .*--on_bad_image skip"):
        build(tmp_path / "images", tmp_path / "cache")
    lines = build(tmp_path / "images", tmp_path / "cache", "--on_bad_image", "skip")
    assert [line.split(": ")[1].rpartition("/")[2] for line in lines if line.startswith("skipped")] == [
        "0.JPG",
        "1.png",
        "3.JPG",
    ]
    online, packed = (
        epoch(source, tmp_path, on_bad_image="skip")
        for source in (image_folder(str(tmp_path / "images")), Cache(tmp_path / "cache"))
    )
    for a, b in zip(online, packed, strict=True):
        assert torch.equal(a["images"], b["images"])


def test_refuses_a_folder_of_bad_images(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"--data_path {tmp_path}: .*cannot identify"):
        build(tmp_path, tmp_path / "cache", "--on_bad_image", "skip")


# --------------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop", "rrc"], "--crop rrc"),
        (["--input_size", "32"], r"--input_size \[32, 32\]: .* \[16, 24\]"),
        (["--crop_interpolation", "bicubic"], "--crop_interpolation bicubic: .* bilinear"),
        (["--in_chans", "1", "--mean", "0", "--std", "1"], "--in_chans 1: .* 3;"),
        (["--knn_every", "1"], "--data_path: .* cache; .*--knn_path"),
    ],
)
def test_refuses_flags_that_need_other_pixels(flags, message, packed, tmp_path):
    words = [*PRETRAIN, "--input_size", "16", "24", *flags, "--data_path", packed, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=message):
        call("main_pretrain", *words)


def test_refuses_kNN_on_a_cache(packed, pretrained):
    with pytest.raises(ValueError, match=rf"--data_path: {packed} .*cache"):
        call("main_knn", "--checkpoint", pretrained / "last.pth", "--data_path", packed, "--device", "cpu")


def spoil(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    write_json(path, read_json(path) | changes)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def far_index(folder: Path, offset: int = 2**40) -> None:
    index = np.load(folder / "index.npy")
    index["offset"][3] = offset
    np.save(folder / "index.npy", index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: spoil(f, "shard-00001.bin", b"x"), r"shard-00001\.bin .*\b1 bytes"),
        (lambda f: (f / "shard-00004.bin").unlink(), r"shard-00004\.bin .*no bytes"),
        (lambda f: spoil(f, "index.npy", b""), "damaged cache"),
        (lambda f: spoil(f, "index.npy", (f / "index.npy").read_bytes().replace(b"  ", b" (", 1)), "damaged cache"),
        (lambda f: spoil(f, "index.npy", (f / "index.npy").read_bytes()[:-30]), "damaged cache"),
        (lambda f: np.save(f / "index.npy", np.array([Bomb()], object)), "damaged cache: .*Python objects"),
        (lambda f: np.save(f / "index.npy", np.load(f / "index.npy")[:5]), "has .5,. entries"),
        (far_index, r"index\.npy .*beyond"),
        (lambda f: far_index(f, 0), r"checksum .*index\.npy"),
        (lambda f: spoil(f, "manifest.json", b"{"), "damaged cache"),
        (lambda f: spoil(f, "manifest.json", b"[" * 10**5), "damaged cache"),
        (lambda f: manifest(f, payload="webp"), "'pixmim-cache-1' with 'webp'"),
        (lambda f: far_index(f, 2**64 - 8), r"index\.npy .*beyond"),
        (lambda f: manifest(f, format="pixmim-cache-9"), "'pixmim-cache-9' .* not 'pixmim-cache-1'"),
        (lambda f: manifest(f, shards=[{"bytes": 0, "sha256": "", "name": "/etc/passwd"}]), r"shard-00000\.bin has"),
    ],
)
def test_errors_name_the_damage_of_a_cache_and_its_content_is_not_executed(
    damage, message, packed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(packed, tmp_path / "cache")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Cache(folder)
    assert not (tmp_path / "exploded").exists()


def test_verify_names_a_shard_with_a_flipped_bit(packed, tmp_path):
    assert "16 images in 8 shards" in call("util.cache", "verify", packed)[-1]
    folder = shutil.copytree(packed, tmp_path / "cache")
    content = bytearray((folder / "shard-00003.bin").read_bytes())
    content[100] ^= 1
    spoil(folder, "shard-00003.bin", content)
    with pytest.raises(ValueError, match=r"damaged: shard-00003\.bin;"):
        call("util.cache", "verify", folder)


def test_verify_names_an_index_with_a_changed_offset(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "cache")
    index = np.load(folder / "index.npy")
    index["offset"][1] -= 1
    np.save(folder / "index.npy", index)
    with pytest.raises(ValueError, match=r"checksum .*index\.npy"):
        call("util.cache", "verify", folder)


def test_packs_a_very_wide_image(tmp_path):
    image = smooth(np.random.default_rng(0), 30, 20)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    image.resize((9000, 2)).save(tmp_path / "images" / "b.png")  # 72,000 pixels wide at 16 px
    build(tmp_path / "images", tmp_path / "cache")
    assert Cache(tmp_path / "cache").read(1, PixelOptions(3)).shape == (16, 72000, 3)


def test_refuses_to_resume_with_files_of_other_sizes_and_the_same_names(tmp_path):
    class_folders(tmp_path / "images", {"a": 4}, seed=0)
    build(tmp_path / "images", tmp_path / "cache")
    class_folders(tmp_path / "others", {"a": 4}, seed=1)
    with pytest.raises(ValueError, match=r"--out .*files .*, not "):
        build(tmp_path / "others", tmp_path / "cache")


def test_a_missing_zstandard_package_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path / "images", {"a": 2}, seed=0)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    words = ["--data_path", tmp_path / "images", "--out", tmp_path / "cache", "--payload", "zstd", "--workers", 1]
    with pytest.raises(ValueError, match=r"--payload zstd .*pip install zstandard"):
        call("util.cache", "build", *words)


def test_a_shard_deleted_after_opening_gives_one_line(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "cache")
    source = Cache(folder)
    (folder / "shard-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*shard-00002\.bin[^\n]*$"):
        epoch(source, tmp_path, num_workers=2)


def test_another_manifest_json_does_not_make_a_folder_a_cache(tmp_path):
    class_folders(tmp_path, {"a": 2}, seed=0)
    (tmp_path / "manifest.json").write_text('{"name": "my data"}')
    assert not is_cache(tmp_path)


def test_data_path_recognises_a_cache(packed, photos):
    words = ["--data_path", str(packed), "--input_size", "16", "24"]
    args = resolve_defaults(main_pretrain.get_parser().parse_args(words))
    assert isinstance(pretrain_source(args), Cache)
    assert not is_cache(photos)
