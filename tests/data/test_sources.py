"""--data_path of every kind: the images, names and classes that are read, and what is said of the rest."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, DEVICE, PRETRAIN, call, one_rank, pretrain, result, weights
from PIL import Image

import main_pretrain
from util.args import resolve_defaults
from util.data.batches import DevicePrefetcher, train_loader
from util.data.cache import Cache
from util.data.folders import Query, image_folder, list_images
from util.data.pixels import PixelOptions
from util.data.sources import indexed_source, labelled_sources, open_sources, pretrain_source
from util.data.transforms import pretrain_transform

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")


def relative(photos: Path, split: str = "") -> list[str]:
    """Names of the photos in the order of a folder, relative to it."""
    return [os.path.relpath(os.fsdecode(path), photos / split) for path in list_images(photos / split)]


def make_rows(photos: Path) -> list[tuple[str, str, str]]:
    """(path, class, split) of each photo."""
    return [(name, name.split("/")[1], name.split("/")[0]) for name in relative(photos)]


def make_list(photos: Path, folder: Path) -> Path:
    (folder / "photos").symlink_to(photos)
    lines = [f"photos/{name}" for name, _, split in make_rows(photos) if split == "train"]
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")  # of Windows
    return folder / "list.txt"


def make_csv(photos: Path, folder: Path, suffix: str = ".csv", delimiter: str = ",") -> Path:
    (folder / "photos").symlink_to(photos)
    with (folder / f"table{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["note", "Path", "Split", "Label"])
        writer.writerows([f"a,b;c {i}", f"photos/{row[0]}", row[2], row[1]] for i, row in enumerate(make_rows(photos)))
    return folder / f"table{suffix}"


def make_parquet(photos: Path, folder: Path) -> Path:
    """As Hugging Face's datasets write it: embedded bytes, numbers of classes, their names in the metadata."""
    rows, names = make_rows(photos), ["ant", "bee", "cat"]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {
            "image": [{"bytes": (photos / path).read_bytes(), "path": os.path.basename(path)} for path, _, _ in rows],
            "label": [names.index(label) for _, label, _ in rows],
            "split": [{"val": "validation"}.get(split, split) for _, _, split in rows],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, folder / "data.parquet", row_group_size=4)
    return folder / "data.parquet"


def make_hub_folder(photos: Path, folder: Path) -> Path:
    """The layout of a data set on the hub: data/train-00000-of-00002.parquet."""
    table = parquet.read_table(make_parquet(photos, folder))
    (folder / "hub" / "data").mkdir(parents=True)
    for split, first, last in (("train-0", 9, 18), ("train-1", 18, 25), ("validation-0", 0, 9)):
        order = {"train": range(16), "validation": range(16, 25)}[split.partition("-")[0]]
        rows = [order[i % 9 + (7 if first == 18 else 0)] for i in range(last - first)]
        rows = (
            [order[i] for i in range(9)]
            if split == "train-0"
            else [order[i] for i in range(9, 16)]
            if split == "train-1"
            else rows
        )
        parquet.write_table(table.take(rows).drop_columns("split"), folder / "hub" / "data" / f"{split}.parquet")
    return folder / "hub"


def make_zip(photos: Path, folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "photos.zip", "w", method) as archive:
        for name in reversed(relative(photos)):  # zip stores the order of the disk
            archive.write(photos / name, f"my photos/{name}")
        archive.writestr("my photos/train/.DS_Store", b"")
        archive.writestr("__MACOSX/my photos/train/ant/._0.JPG", b"")
        archive.writestr("my photos/licence.txt", b"")
    return folder / "photos.zip"


def make_shards(photos: Path, folder: Path) -> Path:
    """Shards in subfolders, members without labels in class folders."""
    for split in ("train", "val"):
        for number, half in enumerate(np.array_split(relative(photos, split), 2)):
            (folder / "shards" / split / str(number)).mkdir(parents=True)
            with tarfile.open(folder / "shards" / split / str(number) / "x.tar", "w") as tar:
                for name in half:
                    tar.add(photos / split / name, f"./{name}")
    return folder / "shards"


def make_nested(photos: Path, folder: Path) -> Path:
    """As ILSVRC2012_img_train.tar: one tar per class within a tar."""
    for split in ("train", "val"):
        (folder / "nested" / split).mkdir(parents=True)
        with tarfile.open(folder / "nested" / split / "ILSVRC2012_img.tar", "w") as outer:
            for kind in ("ant", "bee", "cat"):
                content = io.BytesIO()
                with tarfile.open(fileobj=content, mode="w") as tar:
                    for path in sorted((photos / split / kind).iterdir()):
                        tar.add(path, path.name)
                member = tarfile.TarInfo(f"{kind}.tar")
                member.size = len(content.getvalue())
                outer.addfile(member, io.BytesIO(content.getvalue()))
    return folder / "nested"


def make_upper_case(photos: Path, folder: Path) -> Path:
    (folder / "named").mkdir()
    (folder / "named" / "Train").symlink_to(photos / "train")
    (folder / "named" / "TEST").symlink_to(photos / "val")
    return folder / "named"


KINDS = {
    "folder": lambda photos, folder: photos,
    "Train, TEST": make_upper_case,
    "csv": make_csv,
    "csv of Excel": lambda photos, folder: make_csv(photos, folder, ".csv", ";"),
    "tsv": lambda photos, folder: make_csv(photos, folder, ".tsv", "\t"),
    "parquet": make_parquet,
    "hub": make_hub_folder,
    "zip": make_zip,
    "stored zip": lambda photos, folder: make_zip(photos, folder, zipfile.ZIP_STORED),
    "shards": make_shards,
    "nested tar": make_nested,
}


def pixels(source, i: int) -> np.ndarray:
    return np.dstack([np.asarray(band) for band in source.read(i, PixelOptions(3))])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_images_and_classes_of_the_folder(kind, photos, tmp_path, capsys):
    path = KINDS[kind](photos, tmp_path)
    for source, split in zip(labelled_sources([str(path)]), ("train", "val"), strict=True):
        names = relative(photos, split)
        assert source.classes == ["ant", "bee", "cat"]
        assert [source.classes[label] for label in source.labels] == [name.split("/")[0] for name in names]
        for i, name in enumerate(names):
            assert np.array_equal(pixels(source, i), np.asarray(Image.open(photos / split / name).convert("RGB")))
    lines = capsys.readouterr().out.splitlines()
    assert [f"{n} images, 3 classes" in line for n, line in zip((16, 9), lines, strict=True)] == [True, True]
    unlabelled = pretrain_source(Namespace(data_path=[str(path)], stream_samples=None))
    assert (len(unlabelled), unlabelled.classes, set(unlabelled.labels)) == (16, [], {0})  # without those of val
    assert len(indexed_source(Namespace(data_path=[str(path)]), None)) == 25  # features of all


@pytest.mark.parametrize("kind", ["list", *KINDS])
def test_training_on_every_kind_equals_training_on_the_folder(kind, photos, pretrained, tmp_path):
    path = (KINDS | {"list": make_list})[kind](photos, tmp_path)
    flags = ["--epochs", 2, "--save_every", 1, "--image_every", 1, "--num_workers", 0]
    theirs, ours = weights(pretrained)["model"], weights(pretrain(path, tmp_path / "run", *flags))["model"]
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["csv", "parquet", "zip", "shards"])
def test_cache_and_worker_processes_give_the_batches_of_the_folder(kind, photos, tmp_path):
    path = KINDS[kind](photos, tmp_path)
    call("util.cache", "build", "--data_path", path, "--out", tmp_path / "cache", "--input_size", 16, "--workers", 1)

    def batches(source, workers: int) -> list[np.ndarray]:
        run = one_rank(tmp_path, batch_size=4, num_workers=workers)
        loader = train_loader(run, source, pretrain_transform("src", (16, 16), "bilinear"), flip=True)
        loader.batch_sampler.start(1)
        return [batch["images"].numpy() for batch in DevicePrefetcher(loader, CPU, loader.batch_sampler.parts)]

    expected = batches(image_folder(str(photos)), 0)
    direct = pretrain_source(Namespace(data_path=[str(path)], stream_samples=None))
    for source, workers in ((Cache(tmp_path / "cache"), 0), (direct, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(expected, batches(source, workers), strict=True))


@pytest.mark.parametrize("kind", ["csv", "parquet", "zip", "nested tar"])
def test_knn_and_features_of_a_kind_equal_those_of_the_folder(kind, photos, pretrained, tmp_path):
    path, flags = KINDS[kind](photos, tmp_path), ["--checkpoint", pretrained / "last.pth", *DEVICE]
    assert result("main_knn", *flags, "--data_path", path) == result("main_knn", *flags, "--data_path", photos)
    for name, data in (("ours", path), ("theirs", photos)):
        result("main_features", *flags, "--data_path", data, "--output", tmp_path / f"{name}.npy")
    ours, theirs = (np.load(tmp_path / f"{name}.npy") for name in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("main", ["main_linprobe", "main_finetune"])
def test_probe_and_fine_tuning_read_tables(main, photos, pretrained, tmp_path):
    flags = ["--checkpoint", pretrained / "last.pth", "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 2, *DEVICE]
    theirs = result(main, *flags, "--data_path", photos, "--output_dir", tmp_path / "theirs")
    table = make_csv(photos, tmp_path)
    assert result(main, *flags, "--data_path", table, "--output_dir", tmp_path / "ours") == theirs
    few = ["--train_fraction", 0.5, "--output_dir", tmp_path / "few"]
    once = result(main, *flags, "--data_path", table, *few)
    again = ["--train_list", tmp_path / "few" / "train_list.txt", "--output_dir", tmp_path / "again"]
    assert result(main, *flags, "--data_path", table, *again) == once


# --------------------------------------------------------------------------------------------------- what is left out


def test_system_files_are_ignored_and_never_classes(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "ant/._1.png", "ant/notes.txt", "loose.png"):
        shutil.copy(photos / "train" / "ant" / "1.png", tmp_path / "photos" / "train" / name)
    for name in ("__MACOSX", "@eaDir", ".Trash-1000", ".thumbnails", ".ipynb_checkpoints", "ant/.hidden"):
        shutil.copytree(photos / "train" / "ant", tmp_path / "photos" / "train" / name)
    train, _ = labelled_sources([str(tmp_path / "photos")], Namespace(verbose_data=True))
    assert (len(train), train.classes) == (16, ["ant", "bee", "cat"])
    assert [train.relative_name(i) for i in range(16)] == relative(photos, "train")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"--data_path {tmp_path}/photos/train: ")]
    assert "16 images, 3 classes, .png 10 .jpg 6, " in line
    assert re.search(r"left out: 10 .*\(\.DS_Store\), 1 \.txt \(notes\.txt\), 1 .*\(loose\.png\)$", line)
    assert any(re.match(rf"left out \(.*\): {tmp_path}/photos/train/ant/\.hidden$", line) for line in lines)
    assert "class ant: 6 images" in lines
    assert sum(line.startswith("left out (") for line in lines) == 11


def test_summary_line_states_the_image_sizes_of_a_sample(tmp_path, capsys):
    for name, size in (("a.png", (30, 20)), ("b.jpg", (7, 9)), ("c.jpg", (40, 40))):
        Image.new("RGB", size).save(tmp_path / name)
    pretrain_source(Namespace(data_path=[str(tmp_path)], stream_samples=None))
    assert capsys.readouterr().out == (
        f"--data_path {tmp_path}: 3 images, .jpg 2 .png 1, 7 x 9 to 40 x 40 pixels (3 read)\n"
    )


def test_a_folder_with_mostly_ignored_files_is_an_error(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.jp3", "b.jp3", "x.jp3"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"--data_path: .* 1 images \(\.jpg .*left out: 3 \.jp3 \(a\.jp3\)"):
        open_sources(str(tmp_path), Query(), "--data_path")
    (tmp_path / "list.txt").write_text("a.png\n")
    assert len(open_sources(str(tmp_path / "list.txt"), Query(), "--data_path")) == 1


def test_val_path_sets_another_folder_of_validation_images(photos, tmp_path):
    args = Namespace(val_path=[str(photos / "val")])
    train, val = labelled_sources([str(photos / "train")], args)
    assert (len(train), len(val), val.classes) == (16, 9, train.classes)
    with pytest.raises(FileNotFoundError, match=f"--val_path: .*no folder {tmp_path}/none"):
        labelled_sources([str(photos / "train")], Namespace(val_path=[str(tmp_path / "none")]))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train").symlink_to(photos / "train")
    with pytest.raises(FileNotFoundError, match=f"--data_path: .*no folder {tmp_path}/only/val; .*--val_path"):
        labelled_sources([str(tmp_path / "only")])


def test_errors_name_the_flag_of_the_images(photos, tmp_path):
    for name in ("train", "val"):
        shutil.copytree(photos / name / "ant", tmp_path / "one" / name / "ant")
    words = [*PRETRAIN, "--data_path", photos, "--output_dir", tmp_path / "run", "--knn_every", 1]
    with pytest.raises(ValueError, match=r"\(--knn_path: .*/one/train .*one class"):
        call("main_pretrain", *words, "--knn_path", tmp_path / "one")
    with pytest.raises(ValueError, match=r"\(--val_path: .*/one/val/ant .*class folders"):
        call("main_pretrain", *words, "--val_path", tmp_path / "one" / "val" / "ant")


# --------------------------------------------------------------------------------------------------- several and patterns


def test_several_paths_are_joined_and_their_shares_printed(photos, tmp_path, capsys):
    table = make_csv(photos, tmp_path)
    source = pretrain_source(Namespace(data_path=[str(photos / "val"), str(table)], stream_samples=None))
    assert [pixels(source, i).shape for i in (8, 9)] == [
        pixels(image_folder(str(photos / "val")), 8).shape,
        pixels(image_folder(str(photos)), 0).shape,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"; (\S+%)", line)[1] for line in lines] == ["36.0%", "64.0%"]
    assert source.name(9) == f"{tmp_path}/photos/train/ant/0.JPG"
    train, _ = labelled_sources([str(photos), str(table)])
    assert np.array_equal(train.labels, np.tile(image_labels := train.labels[:16], 2))
    assert np.bincount(image_labels).tolist() == [6, 5, 5]


def test_classes_of_several_paths_are_joined_by_name(photos, tmp_path):
    for name in ("bee", "dog"):
        shutil.copytree(photos / "train" / "cat", tmp_path / "more" / name)
    args = Namespace(val_path=[str(photos / "val")])
    train, val = labelled_sources([str(photos / "train"), str(tmp_path / "more")], args)
    assert train.classes == val.classes == ["ant", "bee", "cat", "dog"]
    assert np.bincount(train.labels).tolist() == [6, 10, 5, 5]
    assert np.bincount(val.labels).tolist() == [4, 3, 2]


@pytest.mark.parametrize("words", [["{0}/*.tar"], ["{0}/x-{{00..01}}.tar"], ["{0}/x-00.tar", "{0}/x-01.tar"], ["{0}"]])
def test_patterns_are_expanded_with_and_without_quotes(words, photos, tmp_path, capsys):
    for number, names in enumerate(np.array_split(relative(photos, "train"), 2)):
        with tarfile.open(tmp_path / f"x-0{number}.tar", "w") as tar:
            for name in names:
                tar.add(photos / "train" / name, name)
    source = pretrain_source(Namespace(data_path=[word.format(tmp_path) for word in words], stream_samples=None))
    assert source.digest() == image_folder(str(photos)).digest()  # a run can go on after packing
    assert capsys.readouterr().out.startswith(f"--data_path 2 archives in {tmp_path}: 16 images, ")


def test_images_can_be_named_by_a_pattern(photos, tmp_path):
    source = pretrain_source(Namespace(data_path=[f"{photos}/train/*/1.png"], stream_samples=None))
    assert [Path(source.name(i)).parent.name for i in range(len(source))] == ["ant", "bee", "cat"]
    with pytest.raises(FileNotFoundError, match=r"--data_path: no file .*/1\.pngx"):
        pretrain_source(Namespace(data_path=[f"{photos}/train/*/1.pngx"], stream_samples=None))


def test_a_cache_or_a_stream_cannot_be_joined_with_other_images(photos, tmp_path):
    call("util.cache", "build", "--data_path", photos, "--out", tmp_path / "c", "--input_size", 16, "--workers", 1)
    with pytest.raises(ValueError, match=r"--data_path: .*/c .*cache .*together"):
        pretrain_source(Namespace(data_path=[str(tmp_path / "c"), str(photos)], stream_samples=None))


def test_a_checkpoint_of_an_earlier_version_has_one_path(photos):
    args = resolve_defaults(main_pretrain.get_parser().parse_args(["--data_path", str(photos)]))
    assert args.data_path == [str(photos)]
    one = Namespace(**vars(args) | {"data_path": str(photos)})
    assert pretrain_source(one).digest() == pretrain_source(args).digest()


# ---------------------------------------------------------------------------------------------------------- lists, tables


def test_lines_of_a_list_may_have_labels_and_spaces(photos, tmp_path):
    names = ["my photo 1.png", "b.png", "c 2.JPG", "plain"]
    for i, name in enumerate(names):
        shutil.copy(
            photos / "train" / "ant" / f"{3 * i}.JPG" if i < 2 else photos / "val" / "ant" / "0.JPG", tmp_path / name
        )
    (tmp_path / "list.txt").write_text("my photo 1.png 10\nb.png 9\nc 2.JPG 10\nplain\t9\n")
    source = open_sources(str(tmp_path / "list.txt"), Query(labelled=True), "--data_path")
    assert [source.relative_name(i) for i in range(4)] == names
    assert (source.classes, source.labels.tolist()) == (["9", "10"], [1, 0, 1, 0])  # in the order of the numbers


def test_missing_files_are_counted_and_named_before_the_first_step(photos, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(
        f"gone/0.png\n{photos}/val/ant/1.png\ngone.png\n" + f"{photos}/val/bee/0.JPG\n" * 6
    )
    words = ["--data_path", tmp_path / "list.txt", "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=rf"list\.txt: 2 of 9 .*{tmp_path}/gone/0\.png; .*--verbose"):
        call("main_pretrain", *PRETRAIN, *words)
    lines = call(
        "main_pretrain", *PRETRAIN, *words, "--on_bad_image", "skip", "--batch_size", 9, "--epochs", 1, "--verbose_data"
    )
    assert lines[:2] == [f"missing: {tmp_path}/gone/0.png", f"missing: {tmp_path}/gone.png"]
    assert re.search(r"left out: 2 missing.*\(0\.png\)", lines[2])


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("x.csv", "id,picture\n1,a.png\n", {}, r"x\.csv .*--image_column; .*id picture"),
        ("x.csv", "id,picture\n1,a.png\n", {"image_column": "pic"}, r"column pic; .*id picture"),
        ("x.csv", "image,kind\na.png,z\n", {"labelled": True}, r"x\.csv .*--label_column; .*image kind"),
        ("x.csv", "image,label\na.png,\n", {"labelled": True}, r"a\.png .*no label"),
        ("x.csv", "image,label\na.png\nb.png,1\n", {"labelled": True}, r"x\.csv: line 2 .*few columns"),
        ("x.csv", f"image,{'x' * 200_000}\na.png,1\n", {}, r"x\.csv: line 1 .*quotes"),
        ("x.csv", "image,label\na.png,3\nb.png,3\n", {"labelled": True}, r"x\.csv .*one class"),
        (
            "x.csv",
            "image,split\na.png,dev\n",
            {"whole": False},
            r"x\.csv .*train \(--split_column\); --val_path",
        ),
        ("x.csv", "image,split\na.png,val\n", {"split_column": "part"}, "column part; .*image split"),
        ("x.csv", "image\n", {}, r"x\.csv .*no image"),
        ("x.txt", "\n\n", {}, r"x\.txt .*no image"),
        ("x.txt", "a.png\n", {"labelled": True}, r"a\.png .*no label"),
        ("x.parquet", "PAR1", {}, r"--data_path: .*[Pp]arquet"),
    ],
)
def test_invalid_tables_are_refused(name, content, flags, message, photos, tmp_path):
    for image in ("a.png", "b.png"):
        shutil.copy(photos / "train" / "ant" / "1.png", tmp_path / image)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_sources(str(tmp_path / name), Query(**flags), "--data_path")
    assert "\n" not in str(error.value)


def test_one_image_has_no_classes(photos):
    image = photos / "val" / "ant" / "1.png"
    for paths in ([image], [photos / "train"]):
        with pytest.raises(ValueError, match=r"^--(data|val)_path: .*class folders$"):
            labelled_sources([str(path) for path in paths], Namespace(val_path=[str(image)]))


def test_a_parquet_of_paths_and_other_columns(photos, tmp_path):
    rows = [row for row in make_rows(photos) if row[2] == "train"]
    columns = {"where": [str(photos / row[0]) for row in rows], "species": [row[1] for row in rows]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    query = Query(labelled=True, image_column="where", label_column="species")
    source = open_sources(str(tmp_path / "x.parquet"), query, "--data_path")
    assert source.digest() == image_folder(str(photos)).digest()
    assert np.bincount(source.labels).tolist() == [6, 5, 5]


def test_parquet_summary_states_row_group_size(photos, tmp_path, capsys):
    path = make_parquet(photos, tmp_path)
    source = open_sources(str(path), Query("val"), "--data_path")
    assert "9 images, " in (line := capsys.readouterr().out)
    assert re.search("row group, .*4 images", line)
    assert source.name(1) == f"{path}: row 17"
    table = parquet.read_table(path)
    broken = table.slice(0, 2).to_pylist()
    broken[1]["image"] = {"bytes": None, "path": None}
    parquet.write_table(pyarrow.Table.from_pylist(broken, table.schema), path)
    with pytest.raises(ValueError, match=r"column image .*empty"):
        open_sources(str(path), Query(), "--data_path").read(1, PixelOptions(3))


# --------------------------------------------------------------------------------------------------------------- archives


def add(tar: tarfile.TarFile, name: str, content: bytes = b"") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_one_image_of_each_sample_is_chosen_by_its_key(photos, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for sample, name in (("1", "ant/1.png"), ("2", "bee/1.png")):
            add(tar, f"v1.0/{sample}.input.PNG", (photos / "train" / name).read_bytes())
            add(tar, f"v1.0/{sample}.seg.png", (photos / "train" / "cat" / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"x\.tar: .*input\.png seg\.png; .*--tar_key input\.png"):
        open_sources(str(tmp_path / "x.tar"), Query(), "--data_path")
    source = open_sources(str(tmp_path / "x.tar"), Query(tar_key="input.png"), "--data_path")
    assert [source.name(i).rpartition("/")[2] for i in range(len(source))] == ["1.input.PNG", "2.input.PNG"]
    assert len(open_sources(str(tmp_path / "x.tar"), Query(tar_key="*"), "--data_path")) == 4
    with pytest.raises(ValueError, match=r"--tar_key image\.png.*v1\.0/1\.input\.PNG"):
        open_sources(str(tmp_path / "x.tar"), Query(tar_key="image.png"), "--data_path")


def test_compressed_tars_are_streamed_for_pretraining_only(photos, tmp_path, capsys):
    pytest.importorskip("webdataset")
    for number, names in enumerate(np.array_split(relative(photos, "train"), 2)):
        with tarfile.open(tmp_path / f"{number}.tar{('.gz', '.xz')[number]}", f"w:{('gz', 'xz')[number]}") as tar:
            for name in names:
                tar.add(photos / "train" / name, f"{name.replace('/', '-').partition('.')[0]}.input.png")
                add(tar, f"{name.replace('/', '-').partition('.')[0]}.seg.png", b"no image")
    out = pretrain(tmp_path, tmp_path / "run", "--tar_key", "input.png", "--num_workers", 0)
    assert len(weights(out)["model"])
    source = pretrain_source(Namespace(data_path=[str(tmp_path)], stream_samples=None, tar_key="input.png"))
    source.start_epoch(0)
    source.prefetch(range(16))
    shapes = sorted(pixels(source, i).shape for i in range(16))
    assert shapes == sorted(pixels(image_folder(str(photos)), i).shape for i in range(16))
    assert re.search("16 images, .*every epoch", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"--data_path: .*0\.tar\.gz .*gunzip"):
        labelled_sources([str(tmp_path)])
    (tmp_path / "0.tar.gz").write_bytes((tmp_path / "0.tar.gz").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"--data_path: .*0\.tar\.gz .*complete"):
        pretrain_source(Namespace(data_path=[str(tmp_path)], stream_samples=None))


def test_a_bad_member_is_named_by_archive_and_member(photos, tmp_path):
    path = make_nested(photos, tmp_path) / "train" / "ILSVRC2012_img.tar"
    content = path.read_bytes()
    image = (photos / "train" / "bee" / "1.png").read_bytes()
    path.write_bytes(content.replace(image, bytes(len(image))))
    with pytest.raises(ValueError, match=rf"^{path}: bee/1\.png .*read"):
        pretrain(tmp_path / "nested", tmp_path / "run")


def test_zip_bombs_are_bounded_and_damaged_zips_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
        archive.writestr("b.png", b"small")
    declared = zlib.decompressobj(-15)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    where = content.index(b"PK\1\2") + 24
    content[where : where + 4] = (1000).to_bytes(4, "little")  # declares 1000 of a million bytes
    (tmp_path / "y.zip").write_bytes(content)
    source = open_sources(str(tmp_path / "y.zip"), Query(), "--data_path")
    assert [len(source.content(i).getvalue()) for i in range(2)] == [1000, 5]
    assert declared
    monkeypatch.setattr("util.data.archives.MAX_BYTES", 1000)
    os.utime(tmp_path / "x.zip", ns=(0, 0))
    assert len(open_sources(str(tmp_path / "x.zip"), Query(), "--data_path")) == 1
    (tmp_path / "z.zip").write_bytes(content[:400])
    with pytest.raises(ValueError, match=r"--data_path: .*z\.zip .*complete"):
        open_sources(str(tmp_path / "z.zip"), Query(), "--data_path")


def test_an_encrypted_zip_is_refused(photos, tmp_path):
    path = make_zip(photos, tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"photos\.zip .* is encrypted"):
        open_sources(str(path), Query(), "--data_path")


def test_zip_of_info_zip_is_read(photos, tmp_path):
    if shutil.which("zip") is None:
        pytest.skip("zip is not installed")
    subprocess.run(["zip", "-qr", tmp_path / "x.zip", "train"], cwd=photos, check=True)
    assert open_sources(str(tmp_path / "x.zip"), Query(), "--data_path").digest() == image_folder(str(photos)).digest()
