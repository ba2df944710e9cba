"""Images in local tar and zip files, read at random through an index."""

import json
import os
import re
import secrets
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util.data.decode import EXTENSIONS
from util.data.folders import IMAGE, SPLITS, LeftOut, Query, Source, digest_names, find_split, kind_of, label_by_folder

MAX_OPEN = 128  # archives that a process keeps open
MAX_BYTES = 2**30  # of an inflated image
MAX_KEYS = 8  # a tar with more endings per sample holds file names with dots


class Scan(NamedTuple):
    """The images of an archive, in its order."""

    rows: np.ndarray  # (N, 4) int64: offset, stored bytes, bytes after inflation (0 = not deflated), class (-1 = none)
    names: np.ndarray  # (N,) bytes: paths within the archive
    left_out: LeftOut


class Member(NamedTuple):
    name: str
    offset: int
    stored: int  # bytes
    inflated: int = 0  # bytes; 0 = not deflated
    number: int = -1  # content of a .cls


def iter_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Regular files of a tar, in its order. The tar's list of members is emptied to save memory."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            member.name = member.name.removeprefix("./")
            yield member


def tar_members(file: Any, folder: str = "") -> Iterator[Member]:
    """Files of a tar that starts at the position of the file. `folder`: the name of a tar within a tar."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in iter_files(tar):
            name, number = folder + member.name, -1
            if name.lower().endswith(".tar") and not folder:
                file.seek(member.offset_data)
                yield from tar_members(file, f"{name[:-4]}/")
                continue
            if name.lower().endswith(".cls"):
                content: Any = tar.extractfile(member)
                text = content.read(32)
                number = int(text) if re.fullmatch(rb"\s*\d{1,6}\s*", text) else -1
            yield Member(name, member.offset_data, member.size, 0, number)
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes any invalid header for the end
            raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")


def folder_order(name: str) -> list[tuple[bool, str]]:
    """Sort key that gives the order of `list_files`: in each folder first the files, then the folders."""
    *folders, last = name.split("/")
    return [*((True, folder) for folder in folders), (False, last)]


def zip_members(file: Any) -> Iterator[Member]:
    """Files of a zip, in the order of the folder that was packed."""
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda member: folder_order(member.filename)):
            if member.is_dir():
                continue
            method = member.compress_type
            if member.flag_bits & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{member.filename} is encrypted or of compression {method}")
            file.seek(member.header_offset)
            start = member.header_offset + 30 + sum(struct.unpack("<26x2H", file.read(30)))  # lengths of name and extra
            inflated = member.file_size if method == zipfile.ZIP_DEFLATED else 0
            yield Member(member.filename, start, member.compress_size, inflated)


def scan_archive(path: Path) -> Scan:
    """The images of a tar or zip. Reads headers and the small files with class numbers only."""
    images: list[Member] = []
    numbers: dict[str, int] = {}  # name without extension -> class number
    left_out: LeftOut = {}
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) in (b"PK\3\4", b"PK\5\6")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for member in zip_members(file) if is_zip else tar_members(file):
                kind = kind_of(member.name) if member.inflated <= MAX_BYTES else f"larger than {MAX_BYTES} bytes"
                if member.offset + member.stored > size:
                    raise zipfile.BadZipFile(f"{member.name} ends beyond it")
                if kind == IMAGE:
                    images.append(member)
                elif kind == ".cls":
                    numbers[member.name[:-4]] = member.number
                else:
                    left_out[kind] = left_out.get(kind, (0, ""))[0] + 1, left_out.get(kind, (0, member.name))[1]
    except (tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} is not a complete tar or zip: {error}; copy or pack it again") from error
    if not images:
        raise ValueError(f"{path} holds no image ({' '.join(EXTENSIONS)})")
    # x.cls is the class of x.jpg and of x.seg.png
    stems = [os.path.splitext(image.name)[0] for image in images]
    labels = [numbers.get(x, numbers.get(re.sub(r"\.[^/]*$", "", x), -1)) for x in stems]
    rows = [(*image[1:4], label) for image, label in zip(images, labels, strict=True)]
    names = [image.name.encode(errors="surrogateescape") for image in images]
    return Scan(np.array(rows, np.int64), np.array(names), left_out)


def load_index(file: Path) -> dict[str, tuple[list[int], Scan]]:
    """{archive: ([bytes, mtime in ns], its scan)}; empty if the index is missing, damaged or of an earlier version."""
    try:
        with np.load(file) as index:  # allow_pickle is off by default
            ends = np.cumsum(index["counts"])[:-1]
            left_out = [{kind: (n, name) for kind, (n, name) in json.loads(text).items()} for text in index["left_out"]]
            rows, names = (np.split(index[key], ends) for key in ("members", "names"))
            scans = [Scan(*parts) for parts in zip(rows, names, left_out, strict=True)]
            return dict(zip(index["shards"].tolist(), zip(index["states"].tolist(), scans, strict=True), strict=True))
    except Exception:  # a damaged zip raises everything from OSError to struct.error
        return {}


def save_index(file: Path, index: dict[str, tuple[list[int], Scan]]) -> None:
    states, scans = zip(*index.values(), strict=True)
    rows, names, left_out = zip(*scans, strict=True)
    temporary = file.with_name(f".index-{secrets.token_hex(4)}.npz")  # ranks and hosts may write at the same time
    arrays = {"states": states, "counts": [len(r) for r in rows], "left_out": [json.dumps(x) for x in left_out]}
    try:
        np.savez(temporary, shards=list(index), members=np.concatenate(rows), names=np.concatenate(names), **arrays)
        temporary.replace(file)
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): every start indexes the shards anew", file=sys.stderr)


def index_archives(paths: Sequence[Path]) -> list[Scan]:
    """The scan of each archive, cached in index.npz beside the first; new and changed archives are scanned."""
    folder, wanted = paths[0].parent, {}
    known = load_index(folder / "index.npz")
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no shard {path}; copy it there or list fewer") from error
        name, state = os.path.relpath(path, folder), [status.st_size, status.st_mtime_ns]
        before, scan = known.get(name, (None, None))
        wanted[name] = (state, scan if scan is not None and before == state else scan_archive(path))
    if any(scan is not known.get(name, (None, None))[1] for name, (_, scan) in wanted.items()):
        others = {name: entry for name, entry in known.items() if (folder / name).exists()}
        save_index(folder / "index.npz", others | wanted)
    return [wanted[os.path.relpath(path, folder)][1] for path in paths]


def sample_key(name: str) -> tuple[str, str]:
    """(sample, its part) as WebDataset splits names: a/x.input.jpg -> (a/x, input.jpg)."""
    folder, slash, base = name.rpartition("/")
    stem, _, key = base.partition(".")
    return folder + slash + stem, key.lower()


def has_key(name: str, tar_key: str | None) -> bool:
    """True if --tar_key chooses this member."""
    return tar_key is None or fnmatch(sample_key(name)[1], tar_key.lower())


def check_keys(path: Path, names: list[str]) -> None:
    """ValueError if the samples of a tar have several images each."""
    parts = [sample_key(name) for name in names]
    keys = sorted({key for _, key in parts})
    if len({sample for sample, _ in parts}) < len({*parts}) and len(keys) <= MAX_KEYS:
        raise ValueError(
            f"{path}: a sample has several images: {' '.join(keys)}; choose one, such as --tar_key {keys[0]}, or all by "
            "--tar_key '*'"
        )


class Archives(Source):
    """Images of local tars and zips. Batches equal those of the folder that was packed."""

    def __init__(self, paths: Sequence[Path], query: Query = Query()):  # noqa: B008
        self.files: dict[int, int] = {}  # descriptors of open archives, the last used last
        self.archives = list(paths)
        self.root = str(self.archives[0].parent)
        self.place = str(paths[0]) if len(paths) == 1 else f"{len(paths)} archives in {self.root}"
        scans = index_archives(self.archives)
        self.left_out: LeftOut = {}
        for path, scan in zip(paths, scans, strict=True):
            for kind, (count, example) in scan.left_out.items():
                before = self.left_out.get(kind, (0, example))
                self.left_out[kind] = before[0] + count, before[1]
            if query.tar_key is None and path.suffix.lower() == ".tar":
                check_keys(path, [os.fsdecode(name) for name in scan.names.tolist()])
        self.archive = np.repeat(np.arange(len(scans)), [len(scan.names) for scan in scans])  # (N,)
        self.rows = np.concatenate([scan.rows for scan in scans])
        self.paths = np.concatenate([scan.names for scan in scans])
        if query.tar_key is not None:
            chosen = [has_key(os.fsdecode(name), query.tar_key) for name in self.paths.tolist()]
            self.keep(np.flatnonzero(chosen), f"images without --tar_key {query.tar_key}")
        self.choose_split(query)

    def keep(self, indices: np.ndarray, others: str) -> None:
        """Leave out all but these images, for this reason."""
        if not len(indices):
            raise ValueError(f"{self.place} holds only {others}, such as {os.fsdecode(self.paths[0])}")
        if len(indices) < len(self.paths):
            lost = np.delete(np.arange(len(self.paths)), indices)
            self.left_out[others] = len(lost), os.fsdecode(self.paths[lost[0]])
        self.archive, self.rows, self.paths = self.archive[indices], self.rows[indices], self.paths[indices]

    def choose_split(self, query: Query) -> None:
        """Keep the images of the wanted split, a folder in the archives, and set the labels."""
        names, known = self.paths.tolist(), {name for names in SPLITS.values() for name in names}
        tops = {name.split(b"/", 1)[0] for name in names}
        while len(tops) == 1 and all(b"/" in name for name in names) and os.fsdecode(min(tops)).casefold() not in known:
            names = [name.split(b"/", 1)[1] for name in names]  # a folder that holds everything
            tops = {name.split(b"/", 1)[0] for name in names}
        if query.split and (split := find_split(map(os.fsdecode, tops), query)):
            start = os.fsencode(f"{split}/")
            inside = np.flatnonzero([name.startswith(start) for name in names])
            self.keep(inside, f"images outside {split}/")
            names = [names[i][len(start) :] for i in inside]
        elif query.split and not query.whole:
            raise FileNotFoundError(f"{self.place} has no folder {query.split}/; --val_path names validation images")
        self.labels, self.classes = np.zeros(len(names), np.int64), []
        if query.labelled:
            self.set_labels(names)

    def set_labels(self, names: list[bytes]) -> None:
        """Labels of the .cls files if there are any, else by the first folder of each name."""
        numbers = self.rows[:, 3]
        if numbers.max() >= 0:
            self.labels, self.classes = numbers, [str(n) for n in range(numbers.max() + 1)]
        else:
            self.labels, self.classes = label_by_folder(names)
        if self.labels.min() < 0:
            raise ValueError(
                f"{self.name(int(self.labels.argmin()))} has no class: each image needs a .cls with its class number "
                "beside it, or all lie in one folder per class"
            )

    def __getstate__(self) -> dict:
        return vars(self) | {"files": {}}  # each process opens its own

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])

    def location(self, i: int) -> tuple[str, str]:
        return str(self.archives[self.archive[i]]), f": {os.fsdecode(self.paths[i])}"

    def digest(self) -> str:
        return digest_names([b"archive/" + name for name in self.paths.tolist()])  # that of the folder that was packed

    def sizes(self) -> np.ndarray:
        return self.rows[:, 1]

    def content(self, i: int) -> BytesIO:
        number = int(self.archive[i])
        file = self.files.pop(number) if number in self.files else os.open(self.archives[number], os.O_RDONLY)
        self.files[number] = file
        if len(self.files) > MAX_OPEN:
            os.close(self.files.pop(next(iter(self.files))))
        offset, stored, inflated, _ = self.rows[i].tolist()
        data = os.pread(file, stored, offset)
        return BytesIO(zlib.decompressobj(-15).decompress(data, inflated) if inflated else data)
