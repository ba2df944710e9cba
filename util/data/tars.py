"""Uncompressed tar shards on this machine, read at random through an index."""

import os
import re
import secrets
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.data.decode import EXTENSIONS, read_image
from util.data.folders import Source, list_images

OPEN = 128  # shards that a process holds open


NAMES = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)  # compressed ones are found to be refused


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def is_stream(data_path: str) -> bool:
    return re.match(r"pipe:|[a-z][a-z0-9]+://", data_path) is not None


def webdataset() -> Any:
    """The package, which only streams and lists of shards in braces need."""
    try:
        import webdataset
    except ImportError as error:
        raise ValueError("--data_path: streams and {..} need the package webdataset: pip install webdataset") from error
    return webdataset


def expand(data_path: str) -> list[str]:
    """x-{00..99}.tar -> its shards."""
    if "{" not in data_path:
        return [data_path]
    webdataset()
    from braceexpand import braceexpand  # webdataset requires it

    return list(braceexpand(data_path))


def regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files of a tar, without links and devices; it remembers none of them."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def scan(path: Path) -> np.ndarray:
    """(offset, size, label or -1) of each image of a shard, (N, 3) int64, in its order; only headers are read."""
    images, labels = [], {}
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise ValueError(f"--data_path: {path} is compressed and cannot be read at random; unpack it to a .tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in regular(tar):
                    stem, extension = os.path.splitext(member.name)
                    if extension.lower() == ".cls":
                        labels[stem] = class_number(tar, member, path)
                    elif extension.lower() in EXTENSIONS:
                        images.append((member.offset_data, member.size, stem))
                file.seek(tar.offset)
                if file.read(512) != bytes(512):  # tarfile takes what is no header for the end
                    raise tarfile.ReadError(f"no member and no end at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"--data_path: {path} is no whole tar: {error}; copy or pack this shard again") from error
    if not images:
        raise ValueError(f"--data_path: {path} holds no image ({' '.join(EXTENSIONS)})")
    # x.cls is the class of x.jpg and of x.seg.png
    rows = [(o, size, labels.get(stem, labels.get(re.sub(r"\.[^/]*$", "", stem), -1))) for o, size, stem in images]
    return np.array(rows, np.int64)


def class_number(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file: Any = tar.extractfile(member)
    text = file.read(32)
    if not re.fullmatch(rb"\s*\d{1,6}\s*", text):
        raise ValueError(f"--data_path: {path}: {member.name!r} holds {text!r}, not the number of a class")
    return int(text)


def load_index(file: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """Shard -> ([bytes, mtime in ns], rows as of `scan`); nothing where the index is missing or damaged."""
    try:
        with np.load(file) as index:  # arrays only: NumPy unpickles nothing unless it is told to
            rows = np.split(index["rows"], np.cumsum(index["counts"])[:-1])
            return dict(zip(index["shards"].tolist(), zip(index["states"].tolist(), rows, strict=True), strict=True))
    except Exception:  # a foreign or half-written zip raises everything from OSError to struct.error
        return {}


def save_index(file: Path, known: dict[str, tuple[list[int], np.ndarray]]) -> None:
    states, rows = zip(*known.values(), strict=True)
    temporary = file.with_name(f".index-{secrets.token_hex(4)}.npz")  # ranks and hosts may write at the same time
    try:
        np.savez(temporary, shards=list(known), states=states, counts=[len(r) for r in rows], rows=np.concatenate(rows))
        temporary.replace(file)
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): shards are indexed at every start", file=sys.stderr)


def indexed(paths: Sequence[Path]) -> list[np.ndarray]:
    """Rows of each shard; index.npz beside the first is made, and renewed for the shards that changed."""
    folder, wanted = paths[0].parent, {}
    known = load_index(folder / "index.npz")
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data_path: there is no shard {path}; copy it there or name fewer") from error
        name, state = os.path.relpath(path, folder), [status.st_size, status.st_mtime_ns]
        before, rows = known.get(name, (None, None))
        wanted[name] = (state, rows if rows is not None and before == state else scan(path))
    if any(rows is not known.get(name, (None, None))[1] for name, (_, rows) in wanted.items()):
        others = {name: entry for name, entry in known.items() if (folder / name).exists()}
        save_index(folder / "index.npz", others | wanted)
    return [wanted[os.path.relpath(path, folder)][1] for path in paths]


class Tars(Source):
    """Uncompressed shards on this machine, read at random: batches are those of the folder that was packed."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.files: dict[int, Any] = {}  # open ones, the last used last
        rows = indexed(self.paths)
        self.ends = np.cumsum([len(r) for r in rows])  # (S,) images up to the end of each shard
        self.places = np.concatenate([r[:, :2] for r in rows])  # (N, 2) offset and size
        labels = np.concatenate([r[:, 2] for r in rows])
        labelled = labels.min() >= 0
        self.labels = labels if labelled else np.zeros_like(labels)
        self.classes = [str(n) for n in range(labels.max() + 1)] if labelled else []

    def __getstate__(self) -> dict:
        return vars(self) | {"files": {}}  # each process opens its own

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        while vars(self).get("files"):  # a shard that could not be indexed leaves an object without
            self.files.popitem()[1].close()

    def name(self, i: int) -> str:
        shard, offset = self.paths[np.searchsorted(self.ends, i, "right")], self.places[i, 0]
        with suppress(OSError, tarfile.TarError), tarfile.open(shard, "r:") as tar:
            return next(f"{shard}: {m.name}" for m in regular(tar) if m.offset_data == offset)
        return f"{shard}: byte {offset}"

    def read(self, i: int, in_chans: int) -> list[Image.Image]:
        shard = int(np.searchsorted(self.ends, i, "right"))
        file = self.files.pop(shard, None) or self.paths[shard].open("rb", buffering=0)
        self.files[shard] = file
        if len(self.files) > OPEN:
            self.files.pop(next(iter(self.files))).close()
        offset, size = self.places[i].tolist()
        return read_image(BytesIO(os.pread(file.fileno(), size, offset)), in_chans)


def local_tars(data_path: str, split: str | None = None, classes: Sequence[str] | None = None) -> Tars | None:
    """Shards of DIR/split, or, unlabelled, of DIR/train, DIR, a .tar or {..} of them; None if there are none."""
    folder = Path(data_path) / (split or "train")
    if split is None and not folder.is_dir():
        folder = Path(data_path)
    if folder.is_dir():
        found = (path for path in folder.iterdir() if NAMES.fullmatch(path.name) and path.is_file())
        paths = sorted(found, key=lambda path: path.stem)  # dog before dog-house, as the folders they were
        if paths and list_images(folder):
            raise ValueError(
                f"--data_path: {folder} holds {paths[0].name} as well as image files; move one kind elsewhere"
            )
    else:
        paths = [Path(path) for path in expand(data_path)] if split is None and NAMES.fullmatch(data_path) else []
    if not paths:
        return None
    tars = Tars(paths)
    if split and not tars.classes:
        raise ValueError(f"--data_path: the shards of {folder} lack a .cls, the number of its class, beside each image")
    if classes is not None:
        if len(tars.classes) > len(classes):
            raise ValueError(f"--data_path: {folder} has class {tars.classes[-1]}, train has 0 to {len(classes) - 1}")
        tars.classes = list(classes)
    return tars
