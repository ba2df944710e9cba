"""Atomic file writes, and checksums that detect damaged files."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def printable(text: object) -> str:
    """Text on one line: control characters, of which a terminal would obey some, as in a Python literal.

    Names of images and tensors are foreign. Bytes that are not UTF-8 (surrogates) become escapes as well.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def import_package(name: str, what: str, package: str = "") -> Any:
    """An optional module; ValueError with the line that installs its package if it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = package or name.split(".")[0]
        raise ValueError(f"{what} needs the package {package}: pip install {package}") from error


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    opened = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not supported by some network file systems
        os.fsync(opened)
    os.close(opened)


def lock_file(opened: int, message: str) -> None:
    """Lock an open file until it is closed or this process ends; ValueError if another process holds the lock."""
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(message) from error
    except OSError:  # a file system without locks
        pass


def write_failure(path: Path, error: OSError | RuntimeError) -> OSError:
    """The error of a file that could not be written, with its path, reason and errno.

    torch and NumPy report a full disk without errno.
    """
    number = getattr(error, "errno", None)
    reason = str(error).split("\n")[0] + ("" if number else ": the disk may be full")
    failure = OSError(f"{path} cannot be written ({reason}); the previous file is unchanged")
    failure.errno = number or errno.ENOSPC
    return failure


def write_atomic(path: Path, fill: bytes | Callable[[BinaryIO], Any]) -> Path:
    """Write bytes, or whatever `fill(file)` writes, to `path`; the old file is replaced once the new one is on disk.

    OSError with the path, the reason and its errno if that fails; the old file is then unchanged.
    """
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
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_failure(path, error) from error
    sync_folder(path.parent)
    return path


def write_json(path: Path, content: dict) -> None:
    """Write a file that `read_json` reads, with the `content_hash` of what is in it."""
    plain = json.loads(json.dumps(content))
    write_atomic(path, (json.dumps(plain | {"sha256": content_hash(plain)}, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """The dictionary in a file of `write_json`; ValueError with its path if it is damaged. Earlier files have no checksum."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or ("sha256" in content and not pop_checksum(content)):
            raise ValueError("its checksum is wrong")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({printable(error)})") from error
    return content


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, also while other processes do; what was left of an incomplete last line is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{start}{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def link_atomic(source: Path, path: Path) -> None:
    """Hard-link a file that is never modified under a second name; copy it if the file system has no links."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:
        with source.open("rb") as file:
            write_atomic(path, lambda copy: shutil.copyfileobj(file, copy))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def pop_checksum(content: dict) -> bool:
    """Remove `sha256` from the content of a file; True if it is the hash of the rest."""
    return content.pop("sha256", None) == content_hash(content)


def check_zip(path: Path) -> None:
    """ValueError if a checksum inside a torch.save file is wrong, which torch.load ignores, or if it would inflate."""
    with zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:  # torch compresses nothing
            raise ValueError("its members are larger than the file")
        if broken := parts.testzip():
            raise ValueError(f"the checksum of its member {broken} is wrong")
