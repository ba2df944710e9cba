"""Lists and tables of images: .txt, .csv, .tsv, .parquet; images stored in parquet files."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from util.data.folders import IMAGE, Folder, Query, Source, find_split, kind_of
from util.files import import_package, printable

DEFAULTS = {  # columns that are used if no flag names one, in any case
    "image": ("image", "file_name", "filename", "path", "filepath", "file", "image_path", "img"),
    "label": ("label", "class", "category", "target"),
    "split": ("split",),
}
TABLES = (".txt", ".csv", ".tsv")


def import_parquet() -> Any:
    return import_package("pyarrow.parquet", "a .parquet file")


def choose_columns(path: Path, names: Sequence[str], query: Query) -> dict[str, str]:
    """{image, label, split: column} of a table, without those that it lacks or that are not wanted."""
    chosen = {}
    for what, known in DEFAULTS.items():
        requested = getattr(query, f"{what}_column")
        by_name = {name.casefold(): name for name in reversed(names)}
        name = requested or next((by_name[name] for name in known if name in by_name), None)
        needed = what == "image" or (what == "label" and query.labelled)
        if (requested and requested not in names) or (needed and name is None):
            wanted = requested or f"of a known name, --{what}_column"
            raise ValueError(f"{path} has no column {wanted}; it has {' '.join(names)}")
        if name is not None and (needed or what == "split"):
            chosen[what] = name
    return chosen


def order_classes(labels: Iterable[str]) -> list[str]:
    """The classes in the order of their names, or of their numbers if all are numbers."""
    names = set(labels)
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def parse_list(text: str) -> Iterator[tuple[str, str]]:
    """(path, label) of each line. A label follows the last tab, or the last space after an image's extension."""
    for line in filter(str.strip, text.split("\n")):
        line = line.rstrip("\r")
        path, tab, label = line.rpartition("\t")
        if not tab and kind_of(line) != IMAGE:
            path, tab, label = line.rpartition(" ")
            tab = tab if kind_of(path) == IMAGE else ""
        yield (path.rstrip(), label.strip()) if tab else (line, "")


def read_text(path: Path, query: Query) -> dict[str, list[str]]:
    """{image, label, split: values} of a .txt, .csv or .tsv."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if path.suffix.lower() == ".txt":
        return columns_of(("image", "label"), parse_list(text))
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = next(reader, [])
        chosen = choose_columns(path, names, query)
        pick = [names.index(name) for name in chosen.values()]
        return columns_of(tuple(chosen), ([row[place] for place in pick] for row in reader if row))
    except (IndexError, csv.Error) as error:
        raise ValueError(f"{path}: line {reader.line_num} has too few columns or wrong quotes") from error


def columns_of(names: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """{name: values} of rows."""
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=False))


def split_rows(path: Path, splits: Sequence[str] | None, count: int, query: Query) -> np.ndarray:
    """Rows of the wanted split; all rows if the table has no such split and belongs to it as a whole."""
    name = find_split(set(splits), query) if splits and query.split else None
    if name is None and query.split and not query.whole:
        raise ValueError(f"{path} has no split {query.split} (--split_column); --val_path names validation images")
    return np.arange(count) if name is None else np.flatnonzero(np.array(splits) == name)


def set_labels(source: Source, labels: Sequence[str] | None, names: Sequence[str] | None) -> None:
    """Set the labels: numbers of `names` if there are any, else names or numbers of classes."""
    if labels is None or "" in labels:
        missing = source.name(list(labels).index("")) if labels else source.place
        raise ValueError(f"{missing} has no label; kNN and classifiers need one for each image")
    source.classes = list(names or order_classes(labels))
    number = {str(i): i for i in range(len(names))} if names else {name: i for i, name in enumerate(source.classes)}
    if unknown := set(labels) - set(number):
        raise ValueError(f"{source.place} has the label {min(unknown)}, but {len(number)} names of classes")
    source.labels = np.array([number[label] for label in labels])


def missing_files(paths: Sequence[bytes]) -> list[int]:
    """Indices of paths that do not exist. Each folder is listed once: a stat per file takes long on network disks."""
    listed: dict[bytes, set[bytes]] = {}
    missing = []
    for i, (folder, name) in enumerate(map(os.path.split, paths)):
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.append(i)
    return missing


def table_of_paths(path: Path, columns: dict[str, list[str]], query: Query) -> Folder:
    """The image files that a table lists. ValueError for files that do not exist, without --on_bad_image skip."""
    names = columns.get("image", [])
    rows = split_rows(path, columns.get("split"), len(names), query)
    if not len(rows):
        raise ValueError(f"{path} lists no image")
    folder = os.fsencode(path.parent)
    paths = [os.path.join(folder, os.fsencode(names[i])) for i in rows.tolist()]
    source = Folder(paths, path.parent)
    source.place = str(path)
    if missing := missing_files(paths):
        lines = "".join(f"missing: {printable(os.fsdecode(paths[i]))}\n" for i in missing) if query.verbose_data else ""
        print(lines, end="")
        text = f"{len(missing)} of {len(paths)} files do not exist, such as {os.fsdecode(paths[missing[0]])}"
        if query.on_bad_image == "stop" or len(missing) == len(paths):
            raise ValueError(f"{path}: {text}; paths start in the folder of {path.name}; --verbose_data lists them")
        source.left_out["missing, replaced by other images"] = len(missing), os.fsdecode(paths[missing[0]])
    if len(rows) < len(names):
        others = np.delete(np.arange(len(names)), rows)
        source.left_out["of other splits"] = len(others), names[int(others[0])]
    if query.labelled:
        set_labels(source, [columns["label"][i] for i in rows.tolist()] if "label" in columns else None, None)
    return source


class Embedded(Source):
    """Images stored in a column of parquet files, as Hugging Face writes them. Reading one reads its row group."""

    def __init__(self, files: Sequence[Path], column: str, metadata: Sequence[Any], rows: np.ndarray):
        self.files, self.column, self.rows = list(files), column, rows  # rows: (N,) in all files together
        groups = [(f, g, m.row_group(g).num_rows) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
        self.groups = np.array(groups)  # (G, 3) file, row group in it, rows
        self.ends = np.cumsum(self.groups[:, 2])
        self.bytes = [m.row_group(g).total_byte_size for m in metadata for g in range(m.num_row_groups)]
        self.loaded: tuple[int, Any] = (-1, None)  # (row group, its images)
        self.paths, self.labels, self.classes = np.zeros(0, "S1"), np.zeros(len(rows), np.int64), []
        self.root, self.left_out = str(files[0].parent), {}
        self.place = str(files[0]) if len(files) == 1 else f"{len(files)} parquet files in {self.root}"

    def __getstate__(self) -> dict:
        return vars(self) | {"loaded": (-1, None)}

    def close(self) -> None:
        self.loaded = (-1, None)

    def find(self, i: int) -> tuple[int, int]:
        """(row group, row in it) of image i."""
        group = int(np.searchsorted(self.ends, self.rows[i], "right"))
        return group, int(self.rows[i] - self.ends[group] + self.groups[group, 2])

    def location(self, i: int) -> tuple[str, str]:
        file = int(self.groups[self.find(i)[0], 0])
        before = int(self.groups[self.groups[:, 0] < file, 2].sum())
        return str(self.files[file]), f": row {self.rows[i] - before}"

    def content(self, i: int) -> bytes | BytesIO:
        group, row = self.find(i)
        if self.loaded[0] != group:
            file, number, _ = self.groups[group].tolist()
            with import_parquet().ParquetFile(self.files[file]) as opened:
                self.loaded = group, opened.read_row_group(number, [self.column], use_threads=False).column(0)
        value = self.loaded[1][row].as_py()
        inside = value if isinstance(value, dict) else {"bytes": value}
        if inside.get("bytes") is None and inside.get("path"):
            return os.path.join(os.fsencode(self.root), os.fsencode(inside["path"]))
        if inside.get("bytes") is None:
            raise ValueError(f"column {self.column} is empty")
        return BytesIO(inside["bytes"])

    def digest(self) -> str:
        facts = [[file.name for file in self.files], self.groups.tolist(), self.bytes]
        return hashlib.sha256(repr(facts).encode(errors="surrogateescape") + self.rows.tobytes()).hexdigest()

    def sizes(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)  # part of the digest

    def summary(self) -> str:
        largest, mib = int(self.groups[:, 2].max()), max(self.bytes) / 2**20
        return (
            f"{super().summary()}; reading an image reads its row group, up to {largest} images, {mib:.1f} MiB: for training, "
            "pack them first by util.cache or unpack them"
        )


def class_names(schema: Any, column: str) -> list[str] | None:
    """Names of the classes, which Hugging Face's datasets keep in the metadata of a parquet file."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return about.get("info", {}).get("features", {}).get(column, {}).get("names")


def open_parquet(files: Sequence[Path], query: Query) -> Source:
    """The images in parquet files, or the image files whose paths they hold."""
    parquet, columns = import_parquet(), {}
    schema = parquet.read_schema(files[0])
    chosen = choose_columns(files[0], schema.names, query)
    of_paths = str(schema.field(chosen["image"]).type) in ("string", "large_string")
    small = [name for what, name in chosen.items() if what != "image" or of_paths]
    metadata = [parquet.read_metadata(file) for file in files]
    for file in files:
        if missing := set(chosen.values()) - set(parquet.read_schema(file).names):
            raise ValueError(f"{file} lacks the column {min(missing)}, which {files[0].name} has")
    tables = [parquet.read_table(file, columns=small, use_threads=False) for file in files]
    for what, name in chosen.items():
        if name in small:
            values = [value for table in tables for value in table.column(name).to_pylist()]
            columns[what] = ["" if value is None else str(value) for value in values]
    if of_paths:
        return table_of_paths(files[0], columns, query)
    rows = split_rows(files[0], columns.get("split"), sum(m.num_rows for m in metadata), query)
    if not len(rows):
        raise ValueError(f"{files[0]} holds no image")
    source = Embedded(files, chosen["image"], metadata, rows)
    if query.labelled:
        set_labels(source, [columns["label"][i] for i in rows.tolist()], class_names(schema, chosen["label"]))
    return source
