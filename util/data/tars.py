"""Local, uncompressed tar shards, read at random through an index."""

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
from util.data.pixels import PixelOptions

MAX_OPEN = 128  # shards that a process keeps open
TAR_NAME = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)  # compressed ones get an error of their own
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def import_webdataset() -> Any:
    """The optional package, which only streams and lists in braces need."""
    try:
        import webdataset
    except ImportError as error:
        raise ValueError("--data_path: streams and {..} need the package webdataset: pip install webdataset") from error
    return webdataset


def expand_braces(data_path: str) -> list[str]:
    """x-{00..99}.tar -> its 100 shards."""
    if "{" not in data_path:
        return [data_path]
    import_webdataset()
    from braceexpand import braceexpand  # a dependency of webdataset

    return list(braceexpand(data_path))


def iter_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Regular files of a tar, in its order. The tar's list of members is emptied to save memory."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def scan_shard(path: Path) -> np.ndarray:
    """(N, 3) int64: offset, size and label (-1 = none) of each image of a shard in its order. Reads headers only."""
    images, labels = [], {}
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise ValueError(f"--data_path: {path} is compressed and cannot be read at random; unpack it to a .tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in iter_files(tar):
                    stem, extension = os.path.splitext(member.name)
                    if extension.lower() == ".cls":
                        labels[stem] = read_label(tar, member, path)
                    elif extension.lower() in EXTENSIONS:
                        images.append((member.offset_data, member.size, stem))
                file.seek(tar.offset)
                if file.read(512) != bytes(512):  # tarfile takes any invalid header for the end
                    raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"--data_path: {path} is not a complete tar: {error}; copy or pack it again") from error
    if not images:
        raise ValueError(f"--data_path: {path} holds no image ({' '.join(EXTENSIONS)})")
    # x.cls is the class of x.jpg and of x.seg.png
    rows = [(o, size, labels.get(stem, labels.get(re.sub(r"\.[^/]*$", "", stem), -1))) for o, size, stem in images]
    return np.array(rows, np.int64)


def read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file: Any = tar.extractfile(member)
    text = file.read(32)
    if not re.fullmatch(rb"\s*\d{1,6}\s*", text):
        raise ValueError(f"--data_path: {path}: {member.name!r} holds {text!r}, not a class number")
    return int(text)


def load_index(file: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """{shard: ([bytes, mtime in ns], rows of `scan_shard`)}; empty if the index is missing or damaged."""
    try:
        with np.load(file) as index:  # allow_pickle is off by default
            rows = np.split(index["rows"], np.cumsum(index["counts"])[:-1])
            return dict(zip(index["shards"].tolist(), zip(index["states"].tolist(), rows, strict=True), strict=True))
    except Exception:  # a damaged zip raises everything from OSError to struct.error
        return {}


def save_index(file: Path, index: dict[str, tuple[list[int], np.ndarray]]) -> None:
    states, rows = zip(*index.values(), strict=True)
    temporary = file.with_name(f".index-{secrets.token_hex(4)}.npz")  # ranks and hosts may write at the same time
    try:
        np.savez(temporary, shards=list(index), states=states, counts=[len(r) for r in rows], rows=np.concatenate(rows))
        temporary.replace(file)
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): every start indexes the shards anew", file=sys.stderr)


def index_shards(paths: Sequence[Path]) -> list[np.ndarray]:
    """Rows of `scan_shard` for each shard, cached in index.npz beside the first; new and changed shards are scanned."""
    folder, wanted = paths[0].parent, {}
    known = load_index(folder / "index.npz")
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data_path: there is no shard {path}; copy it there or list fewer") from error
        name, state = os.path.relpath(path, folder), [status.st_size, status.st_mtime_ns]
        before, rows = known.get(name, (None, None))
        wanted[name] = (state, rows if rows is not None and before == state else scan_shard(path))
    if any(rows is not known.get(name, (None, None))[1] for name, (_, rows) in wanted.items()):
        others = {name: entry for name, entry in known.items() if (folder / name).exists()}
        save_index(folder / "index.npz", others | wanted)
    return [wanted[os.path.relpath(path, folder)][1] for path in paths]


class Tars(Source):
    """Images of local shards. Batches equal those of the folder that was packed."""

    def __init__(self, paths: Sequence[Path]):
        self.files: dict[int, Any] = {}  # open shards, the last used last
        self.paths = list(paths)
        rows = index_shards(self.paths)
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
        while self.files:
            self.files.popitem()[1].close()

    def name(self, i: int) -> str:
        shard, offset = self.paths[np.searchsorted(self.ends, i, "right")], self.places[i, 0]
        with suppress(OSError, tarfile.TarError), tarfile.open(shard, "r:") as tar:
            return next(f"{shard}: {m.name}" for m in iter_files(tar) if m.offset_data == offset)
        return f"{shard}: byte {offset}"

    def read(self, i: int, options: PixelOptions) -> list[Image.Image]:
        shard = int(np.searchsorted(self.ends, i, "right"))
        file = self.files.pop(shard, None) or self.paths[shard].open("rb", buffering=0)
        self.files[shard] = file
        if len(self.files) > MAX_OPEN:
            self.files.pop(next(iter(self.files))).close()
        offset, size = self.places[i].tolist()
        return read_image(BytesIO(os.pread(file.fileno(), size, offset)), options)


def local_tars(data_path: str, split: str | None = None, classes: Sequence[str] | None = None) -> Tars | None:
    """Labelled shards of DIR/split; without split those of DIR/train, DIR, a .tar or a list in braces; None if none."""
    folder = Path(data_path) / (split or "train")
    if split is None and not folder.is_dir():
        folder = Path(data_path)
    if folder.is_dir():
        found = (path for path in folder.iterdir() if TAR_NAME.fullmatch(path.name) and path.is_file())
        paths = sorted(found, key=lambda path: path.stem)  # dog before dog-house, as for class folders
        if paths and list_images(folder):
            raise ValueError(f"--data_path: {folder} holds {paths[0].name} and image files; move one kind elsewhere")
    else:
        paths = [Path(path) for path in expand_braces(data_path)] if not split and TAR_NAME.fullmatch(data_path) else []
    if not paths:
        return None
    tars = Tars(paths)
    if split and not tars.classes:
        raise ValueError(f"--data_path: the shards of {folder} need beside each image a .cls with its class number")
    if classes is not None:
        if len(tars.classes) > len(classes):
            raise ValueError(f"--data_path: {folder} has class {tars.classes[-1]}, train has 0 to {len(classes) - 1}")
        tars.classes = list(classes)
    return tars
