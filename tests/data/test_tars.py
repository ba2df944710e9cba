"""Tar shards: local ones give the batches of the folder that was packed, streams every image once; damaged shards."""

import io
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from argparse import Namespace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, PRETRAIN, assert_same, call, ended, one_rank, pretrain, ranks, records, spawn
from conftest import weights as weights_of

from util.data.archives import Archives, scan_archive
from util.data.batches import DevicePrefetcher, train_loader
from util.data.folders import Query, image_folder, list_images
from util.data.pixels import PixelOptions
from util.data.sources import expand_path, labelled_source, labelled_sources, open_sources
from util.data.streams import Stream
from util.data.transforms import pretrain_transform

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers


def pack(folder: Path, shards: Path, count: int, classes: bool = False) -> list[Path]:
    """Pack the images of a folder, in its order, in shards of equal size; with classes, a .cls for each."""
    images, names = [Path(os.fsdecode(path)) for path in list_images(folder)], sorted(os.listdir(folder))
    shards.mkdir(parents=True)
    paths = [shards / f"x-{n:02}.tar" for n in range(count)]
    for path, group in zip(paths, np.array_split(np.array(images), count), strict=True):
        with tarfile.open(path, "w") as tar:
            for image in group:
                inside = image.relative_to(folder)
                tar.add(image, str(inside))
                if classes:
                    add(tar, str(inside.with_suffix(".cls")), str(names.index(inside.parts[0])).encode())
    return paths


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def local(path) -> Archives:
    """The images that --data_path names, for pre-training."""
    source = open_sources(str(path), Query(), "--data_path")
    assert isinstance(source, Archives)
    return source


def epoch_of(source, tmp_path, epoch: int = 0, rank: int = 0, size: int = 1, **flags) -> list[dict]:
    """Batches of one rank in an epoch."""
    run = one_rank(tmp_path, rank, size, **flags)
    loader = train_loader(run, source, pretrain_transform("src", (16, 16), "bilinear"), flip=True, noise_length=4)
    loader.batch_sampler.start(epoch)
    return list(DevicePrefetcher(loader, CPU, loader.batch_sampler.parts))


@pytest.fixture
def shards(photos, tmp_path) -> list[Path]:
    """The 16 training images of `photos` in four shards of four."""
    return pack(photos / "train", tmp_path / "shards", 4)


@pytest.fixture
def server(tmp_path):
    """URL of tmp_path on a local web server."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http by curl, which is not installed")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))  # seconds until it notices a shutdown
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


# --------------------------------------------------------------------------------------------------------------- local


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_batches_equal_those_of_the_folder_that_was_packed(photos, shards, tmp_path, size, workers):
    folder, packed = image_folder(str(photos)), local(shards[0].parent)
    for rank in range(size):
        sizes = {"rank": rank, "size": size, "batch_size": 8 // size}
        theirs = epoch_of(folder, tmp_path, 3, **sizes)
        assert len(theirs) == 2
        assert_same(epoch_of(packed, tmp_path, 3, **sizes, num_workers=workers), theirs)


def test_labels_equal_those_of_the_class_folders(photos, tmp_path):
    for split in ("train", "val"):
        pack(photos / split, tmp_path / "packed" / split, 2, classes=True)
    for folder, packed in zip(labelled_sources(str(photos)), labelled_sources(str(tmp_path / "packed")), strict=True):
        assert packed.classes == ["0", "1", "2"]
        assert packed.labels.tolist() == folder.labels.tolist()
        for i in range(len(folder)):
            assert_same(
                np.array(packed.read(i, PixelOptions(3))[0]).tolist(),
                np.array(folder.read(i, PixelOptions(3))[0]).tolist(),
            )


def test_a_run_with_knn_on_shards_equals_the_run_on_the_folder(photos, tmp_path):
    for split in ("train", "val"):
        pack(photos / split, tmp_path / "packed" / split, 2, classes=True)
    folder = pretrain(photos, tmp_path / "a", "--knn_every", 1)
    packed = pretrain(tmp_path / "packed", tmp_path / "b", "--knn_every", 1, "--image_every", 1)
    assert_same(weights_of(packed)["model"], weights_of(folder)["model"])
    assert records(packed, "knn_top1") == records(folder, "knn_top1")


def test_links_and_other_files_in_a_shard_are_ignored(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        array = io.BytesIO()
        np.save(array, np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
        add(tar, "../../up.NPY", array.getvalue())
        add(tar, "notes.json", b"{}")
    source = local(tmp_path / "x.tar")
    assert len(source) == 1
    assert source.name(0) == f"{tmp_path}/x.tar: ../../up.NPY"
    assert np.array_equal(np.dstack(source.read(0, PixelOptions(3))).ravel(), np.arange(60))
    assert source.classes == []


def test_members_of_a_sample_share_its_class_if_their_names_have_more_dots(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"a.cls": b"2\n", "a.seg.png": b"", "b.1.png": b"", "b.1.cls": b"0"}.items():
            add(tar, f"v1.0/{name}", content)
    source = Archives([tmp_path / "x.tar"], Query(labelled=True))
    assert source.labels.tolist() == [2, 0]
    assert source.classes == ["0", "1", "2"]


def test_errors_name_shard_and_member_of_a_bad_image(photos, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "bad.png").write_bytes(b"no image")
    (shard,) = pack(tmp_path / "data", tmp_path / "shards", 1)
    with pytest.raises(ValueError, match=f"{shard}: a/bad.png "):
        epoch_of(Archives([shard]), tmp_path, batch_size=1)


def test_spawned_workers_open_a_limited_number_of_shards_themselves(shards, monkeypatch):
    monkeypatch.setattr("util.data.archives.MAX_OPEN", 2)
    source = Archives(shards)
    first = [np.array(source.read(i, PixelOptions(3))[0]) for i in range(16)]
    assert len(source.files) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert copy.files == {}
    assert all(np.array_equal(np.array(copy.read(i, PixelOptions(3))[0]), first[i]) for i in reversed(range(16)))


def test_the_index_is_saved_and_updated_for_changed_shards_only(photos, shards, monkeypatch):
    scanned = []
    monkeypatch.setattr("util.data.archives.scan_archive", lambda path: scanned.append(path) or scan_archive(path))
    whole = Archives(shards).rows.tolist()
    assert scanned == shards
    assert Archives(shards).rows.tolist() == whole
    assert Archives(shards[1:3]).rows.tolist() == whole[4:12]
    assert scanned == shards
    os.utime(shards[2], ns=(0, 0))
    shards[3].unlink()
    assert Archives(shards[:3]).rows.tolist() == whole[:12]
    assert scanned[4:] == [shards[2]]
    (shards[0].parent / "index.npz").write_bytes(b"damaged")
    assert Archives(shards[:3]).rows.tolist() == whole[:12]
    assert scanned[5:] == shards[:3]
    with np.load(shards[0].parent / "index.npz", allow_pickle=False) as index:
        assert index["shards"].tolist() == [path.name for path in shards[:3]]
    assert len(list(shards[0].parent.iterdir())) == 4  # no temporary file is left


def test_warns_if_the_index_cannot_be_written(shards, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "savez", refuse)
    assert len(Archives(shards)) == 16
    assert re.search(r"index\.npz .*Permission denied", capsys.readouterr().err)


def truncate(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: truncate(path, path.stat().st_size // 3), "--data_path: .*x-01.tar "),
        (lambda path: truncate(path, Archives([path]).rows[3, :2].sum() // 512 * 512 + 512), "x-01.tar .*byte"),
        (lambda path: path.write_bytes(b""), "x-01.tar .*empty file"),
        (lambda path: path.write_bytes(b"<html>not here</html>" * 100), "--data_path: .*x-01.tar "),
        (lambda path: tarfile.open(path, "w").close(), "x-01.tar .*no image"),
        (lambda path: path.unlink(), "--data_path: .*x-01.tar; "),
    ],
    ids=["cut in an image", "cut between images", "empty", "html", "no image", "missing"],
)
def test_errors_name_a_damaged_or_missing_shard(shards, spoil, message):
    spoil(shards[1])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        local(shards[0].parent / "x-{00..03}.tar")


def test_labels_are_needed_for_classifiers_only(tmp_path, shards):
    with tarfile.open(shards[0], "w") as tar:
        for name in ("a.png", "b.png"):
            add(tar, name, b"")
        add(tar, "a.cls", b"7")
        add(tar, "b.cls", b"ant")
    assert local(shards[0]).classes == []
    with pytest.raises(ValueError, match=r"--data_path: .*x-00\.tar: b\.png .*\.cls"):
        labelled_source(str(shards[0]), "train", args=Namespace(val_path=["x"]))


def test_refuses_class_numbers_that_train_lacks(tmp_path):
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "x.tar", "w") as tar:
        add(tar, "a.png", b"")
        add(tar, "a.cls", b"3")
    with pytest.raises(ValueError, match=r"--data_path: .*/val/x\.tar .*\['3'\]"):
        labelled_source(str(tmp_path), "val", ["0", "1", "2"])
    named = labelled_source(str(tmp_path), "val", ["ant", "bee", "cat", "dog"])  # as a classifier of folders has them
    assert (named.labels.tolist(), named.classes) == ([3], ["ant", "bee", "cat", "dog"])


def test_refuses_a_folder_of_images_and_tars(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "ILSVRC2012_img_train.tar").touch()
    for split in (None, "train"):
        with pytest.raises(ValueError, match=r"--data_path: .*/train .*ILSVRC2012_img_train\.tar"):
            open_sources(str(tmp_path / "photos"), Query(split or "train", labelled=split is not None), "--data_path")


# -------------------------------------------------------------------------------------------------------------- streams


def stream(shards: list[Path], samples: int = 16) -> Stream:
    return Stream(expand_path(f"pipe:cat {shards[0].parent}/x-{{00..{len(shards) - 1:02}}}.tar"), samples, 0)


@pytest.fixture
def plain(tmp_path) -> list[Path]:
    """Four shards of four images of one colour each: no crop changes them."""
    (tmp_path / "plain").mkdir()
    for n in range(16):
        pixels = np.full((16, 16, 3), 10 * n, np.uint8)
        np.save(tmp_path / "plain" / f"{n:02}.npy", pixels)
    return pack(tmp_path / "plain", tmp_path / "shards", 4)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_every_image_of_an_epoch_is_seen_once(plain, tmp_path, monkeypatch, size, workers):
    epochs = []
    for epoch in (0, 1, 1):
        colours, numbers = [], []
        for rank in range(size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(size))
            batches = epoch_of(stream(plain), tmp_path, epoch, rank, size, batch_size=2, num_workers=workers)
            assert all(batch.keys() == {"images", "flip", "noise", "label", "index"} for batch in batches)
            colours += [int(c) for batch in batches for c in batch["images"][:, 0, 0, 0]]
            numbers += [int(i) for batch in batches for i in batch["index"]]
        assert sorted(colours) == [10 * n for n in range(16)]
        assert sorted(numbers) == list(range(16))
        epochs.append(colours)
    assert epochs[1] == epochs[2] != epochs[0]


def test_persistent_workers_read_one_epoch_after_another(plain, tmp_path):
    run = one_rank(tmp_path, batch_size=4, num_workers=2)
    loader = train_loader(run, stream(plain), pretrain_transform("src", (16, 16), "bilinear"), flip=True)
    for epoch in range(3):
        loader.batch_sampler.start(epoch)
        assert sorted(int(c) // 10 for batch in loader for c in batch["images"][:, 0, 0, 0]) == list(range(16))


def test_an_epoch_longer_than_the_shards_reads_them_again(plain, tmp_path):
    batches = epoch_of(stream(plain, 32), tmp_path)
    assert sorted(int(c) // 10 for batch in batches for c in batch["images"][:, 0, 0, 0]) == sorted([*range(16)] * 2)


def test_a_bad_image_of_a_stream_stops_the_run_or_is_replaced(plain, tmp_path):
    with tarfile.open(plain[0], "a") as tar:
        add(tar, "bad.png", b"no image")
    with pytest.raises(ValueError, match=r"cat .*x-00\.tar: bad\.png "):
        epoch_of(stream(plain, 17), tmp_path, batch_size=17)
    batches = epoch_of(stream(plain, 17), tmp_path, batch_size=17, on_bad_image="skip")
    assert len(batches[0]["images"]) == 17


@pytest.mark.parametrize("way", ["pipe", "http"])
def test_pretraining_reads_a_stream_with_two_workers(shards, server, tmp_path, way):
    url = {"pipe": f"pipe:cat {shards[0].parent}", "http": f"{server}/shards"}[way] + "/x-{00..03}.tar"
    flags = ["--stream_samples", 16, "--num_workers", 2, "--image_every", 1]
    once = pretrain(url, tmp_path / "once", *flags)
    assert len(records(once)) == 4
    again = pretrain(url, tmp_path / "again", *flags)
    assert_same(weights_of(again)["model"], weights_of(once)["model"])


def test_a_streamed_run_resumed_between_epochs_equals_the_unbroken_one(shards, tmp_path):
    url, flags = f"pipe:cat {shards[0].parent}/x-{{00..03}}.tar", ["--stream_samples", 16, "--save_every", 1]
    whole = pretrain(url, tmp_path / "whole", *flags)
    again = pretrain(url, tmp_path / "again", *flags, "--resume", whole / "epoch-0001.pth")
    assert_same(weights_of(again)["model"], weights_of(whole)["model"])


def test_two_ranks_read_a_stream(shards, tmp_path):
    flags = ["--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, "--image_every", 0, "--num_workers", 2]
    url = f"pipe:cat {shards[0].parent}/x-{{00..03}}.tar"
    paths = ["--data_path", url, "--stream_samples", 16, "--output_dir", tmp_path / "out"]
    for status, _, err in ranks(2, "main_pretrain.py", *PRETRAIN, *flags, *paths):
        assert (status, err) == (0, "")
    assert len(records(tmp_path / "out")) == 2


@pytest.mark.parametrize("way", ["pipe", "http"])
@pytest.mark.parametrize("end", [None, 0, 1500, 2 * 1536])  # a header and a member take 1536 bytes
def test_a_missing_or_truncated_shard_ends_the_stream_with_its_name(plain, server, tmp_path, way, end):
    if end is None:
        plain[2].unlink()
    else:
        truncate(plain[2], end)
    url = {"pipe": f"pipe:cat {plain[0].parent}", "http": f"{server}/shards"}[way] + "/x-{00..03}.tar"
    with pytest.raises(ValueError, match=r"--data_path: \S+ ?\S+x-02\.tar ") as caught:
        epoch_of(Stream(expand_path(url), 16, 0), tmp_path)
    assert "\n" not in str(caught.value)
    assert ("status" in str(caught.value)) == (end is None)


def test_a_command_that_fails_after_a_complete_shard_ends_the_stream(plain, tmp_path):
    source = Stream([f"pipe:cat {plain[0]}; exit 3"], 16, 0)
    assert source.name(5) == "image 5 of the stream"  # nothing has been read in this process
    with pytest.raises(ValueError, match=r"exit 3 .* status 3"):
        epoch_of(source, tmp_path)


def test_a_missing_shard_ends_the_run_with_one_line(plain, tmp_path):
    plain[1].unlink()
    paths = [
        "--data_path",
        f"pipe:cat {plain[0].parent}/x-{{00..03}}.tar 2> /dev/null",
        "--output_dir",
        tmp_path / "out",
    ]
    flags = ["--stream_samples", 16, "--batch_size", 8, "--num_workers", 2]
    status, _, err = ended(spawn("main_pretrain.py", *PRETRAIN, *flags, *paths))
    assert status == 1
    assert err.startswith(f"main_pretrain.py: error: --data_path: pipe:cat {plain[1]} 2> /dev/null ")
    assert err.count("\n") == 1


def test_refuses_too_few_shards_and_shards_without_images(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as five:
        five.setenv("RANK", "0")
        five.setenv("WORLD_SIZE", "5")
        with pytest.raises(ValueError, match=r"--data_path: 4 shards .* 5 ranks x 1 workers; .*--num_workers"):
            epoch_of(stream(plain), tmp_path)
    with tarfile.open(plain[0], "w") as tar:
        add(tar, "notes.txt", b"")
    with pytest.raises(ValueError, match=r"--data_path: .*x-00\.tar .*no image"):
        epoch_of(stream(plain[:1]), tmp_path)


def test_refuses_a_stream_without_its_length_and_for_knn(plain, tmp_path):
    words = ["--data_path", f"pipe:cat {plain[0]}", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"--data_path: pipe:cat .*--stream_samples"):
        call("main_pretrain", *PRETRAIN, *words)
    with pytest.raises(ValueError, match=r"--data_path: pipe:cat .*--knn_path"):
        call("main_pretrain", *PRETRAIN, *words, "--stream_samples", 16, "--knn_every", 1)


def test_a_missing_webdataset_package_is_named(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        stream(plain)
    with pytest.raises(ValueError, match="pip install webdataset"):
        local(plain[0].parent / "x-{00..03}.tar")
    assert len(local(plain[0].parent)) == 16  # not needed for a folder


def test_a_pickled_stream_reads_the_same_images(plain):
    source = stream(plain)
    source.start_epoch(0)
    source.prefetch([3, 1])
    copy = pickle.loads(pickle.dumps(source))
    copy.start_epoch(0)
    copy.prefetch([3, 1])
    assert copy.prefetched == source.prefetched
