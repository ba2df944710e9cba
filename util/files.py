"""Files that are there as a whole or not at all, whenever the process or the machine dies, and what tells that they still are."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        os.fsync(opened)
    os.close(opened)


def write_atomic(path: Path, fill: bytes | Callable[[BinaryIO], Any]) -> Path:
    """Put bytes, or what `fill(file)` writes, at `path`; the file before it stays until the new one is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(fill):
                fill(file)
            else:
                file.write(fill)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        raise OSError(f"{path} cannot be written ({reason}); the file before it is untouched") from error
    sync_folder(path.parent)
    return path


def link_atomic(source: Path, path: Path) -> None:
    """Give the bytes of a file that is never rewritten a second name; a copy where the file system has no links."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:
        with source.open("rb") as file:
            write_atomic(path, lambda copy: shutil.copyfileobj(file, copy))


def content_hash(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add([str(value.dtype), *value.shape, *value.stride(), value.storage_offset()])
            digest.update(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().data)
        elif isinstance(value, dict | list | tuple):
            digest.update(b"%d items;" % len(value))
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()


def checksum_matches(content: dict) -> bool:
    """Take the sha256 out of a checkpoint of ours; False if the rest is not what it was made of."""
    return content.pop("sha256", None) == content_hash(content)


def check_zip(path: Path) -> None:
    """ValueError for a file of torch.save in which a bit changed: torch does not look at the checksums of a zip."""
    with zipfile.ZipFile(path) as parts:
        if broken := parts.testzip():
            raise ValueError(f"the checksum of {broken} in it differs")
