"""Checkpoint files with a checksum."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.files import check_zip, checksum_matches, content_hash, link_atomic, sync_folder, write_atomic

FORMAT, OLDER = "pixmim-2", "pixmim-1"


def on_host(content: Any) -> Any:
    """A copy in the host's memory that training does not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, dict):
        return {key: on_host(value) for key, value in content.items()}
    return type(content)(map(on_host, content)) if isinstance(content, list | tuple) else content


def write_checkpoint(path: Path, content: dict) -> Path:
    """A file that `read` gives back, or OSError and the file before it."""
    content = {"format": FORMAT, **content}
    return write_atomic(path, partial(torch.save, content | {"sha256": content_hash(content)}))


def read_checkpoint(path: Path) -> dict:
    """Content of one of our own checkpoints; ValueError if a bit of it changed since it was written."""
    try:
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and content.get("format") in (FORMAT, OLDER)
        if ours and content["format"] == FORMAT and not checksum_matches(content):
            raise ValueError("its checksum differs")
    except Exception as error:  # what a damaged file makes the reader do is not foreseeable
        if isinstance(error, OSError) and error.filename:  # the disk's fault
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not ours:
        raise ValueError(f"{path} is no checkpoint of this project's runs; --resume takes last.pth or epoch-NNNN.pth")
    return content


def store_checkpoint(folder: Path, content: dict, kept: str | None) -> None:
    """last.pth, the one before as previous.pth, and perhaps a third name that is kept; one of them is always whole."""
    new = write_checkpoint(folder / ".new.pth", content)
    if kept:
        link_atomic(new, folder / kept)
    if (folder / "last.pth").exists():
        os.replace(folder / "last.pth", folder / "previous.pth")
    os.replace(new, folder / "last.pth")
    sync_folder(folder)
