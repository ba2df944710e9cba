"""Checkpoint files: written atomically with a checksum, read without executing anything in them."""

import os
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from util.files import check_zip, content_hash, link_atomic, pop_checksum, sync_folder, write_atomic

FORMAT, FORMAT_1 = "pixmim-2", "pixmim-1"


class NotARun(ValueError):
    """An undamaged file that holds weights, but not the state of a run."""

    def __init__(self, path: Path):
        super().__init__(f"{path} holds weights, not a run")


def copy_to_host(content: Any) -> Any:
    """Nested copy in which every tensor is a contiguous copy in host memory, from a GPU in pinned memory."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format)
        if isinstance(value, dict):
            return {key: copy(part) for key, part in value.items()}
        return type(value)(map(copy, value)) if isinstance(value, list | tuple) else value

    copied = copy(content)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # one wait for all tensors
    return copied


def write_checkpoint(path: Path, content: dict) -> Path:
    """Write a file that `read_checkpoint` reads; OSError leaves the previous file unchanged."""
    content = {"format": FORMAT, **content}
    return write_atomic(path, partial(torch.save, content | {"sha256": content_hash(content)}))


def read_checkpoint(path: Path, mmap: bool = False) -> dict:
    """Content of a checkpoint of this project; ValueError if it is damaged, NotARun if it is foreign.

    `mmap`: its tensors are pages of the file, which the ranks of a node share.
    """
    try:
        with path.open("rb") as file:
            old = file.read(2) == b"\x80\x02"  # a file of torch before 1.6
        if old or path.suffix == ".safetensors":
            raise NotARun(path)
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        ours = isinstance(content, dict) and content.get("format") in (FORMAT, FORMAT_1)
        if ours and content["format"] == FORMAT and not pop_checksum(content):
            raise ValueError("its checksum is wrong")
    except NotARun:
        raise
    except UnpicklingError as error:  # an undamaged file with objects that this project does not save
        raise NotARun(path) from error
    except Exception as error:  # torch raises many types of errors for damaged files
        if isinstance(error, OSError) and error.filename:  # the file cannot be read at all
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not ours:
        raise NotARun(path)
    return content


def store_checkpoint(folder: Path, content: dict, permanent: str | None) -> None:
    """Write last.pth, keep the old one as previous.pth, link it as `permanent`. At any moment one file is complete."""
    new = write_checkpoint(folder / ".new.pth", content)
    if permanent:
        link_atomic(new, folder / permanent)
    if (folder / "last.pth").exists():
        os.replace(folder / "last.pth", folder / "previous.pth")
    os.replace(new, folder / "last.pth")
    sync_folder(folder)
