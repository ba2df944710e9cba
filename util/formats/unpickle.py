"""Loading of the content of a checkpoint file without executing code in it."""

import argparse
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from util.files import check_zip, pop_checksum

# Allow-list: objects that mmengine and mmcv pickle beside the weights (training history, configuration).
INERT = re.compile(
    r"(mmengine\.(logging|config)|mmcv\.utils)\..+|builtins\.getattr"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.multiarray\.(_reconstruct|scalar))"
)


class Placeholder:
    """Stand-in for a pickled object that is not needed; it discards arguments and state."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _refusal(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds {', '.join(names)}, code that unpickling would execute: refused; "
        'if you trust the file, save only {"model": model.state_dict()}'
    )


@contextmanager
def _report_broken_file(path: Path) -> Iterator[None]:
    """Context that converts any error into a one-line ValueError with the name of the file."""
    try:
        yield
    except Exception as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):  # in a file from before torch 1.6
            raise _refusal(path, [name[1]]) from error
        with path.open("rb") as file:
            found = f"{path.stat().st_size} bytes, beginning with {file.read(8)!r}; {type(error).__name__}"
        raise ValueError(f"{path} is not a readable checkpoint ({found}): copy or download it again") from error


def _check_old(path: Path) -> None:
    """ValueError for a broken file from before torch 1.6, which torch would parse for minutes."""
    with path.open("rb") as file:
        for _ in range(5):  # pickles: magic number, protocol, system, content, names of the storages that follow
            for _, value, _ in pickletools.genops(file):
                if isinstance(value, str | bytes) and len(value) > 2**12:
                    raise ValueError("a name is longer than 4096 bytes")


def _load_tensors(path: Path, zipped: bool) -> Any:
    """Content of a checked file. Before torch 1.6 it had no checksums: an inserted byte shifts its tensors."""
    with _report_broken_file(path), path.open("rb") as file:
        content = torch.load(path if zipped else file, map_location="cpu", weights_only=True)
        surplus = b"" if zipped else file.read(1)
    if surplus:
        raise ValueError(f"{path} is damaged, it has bytes after the last tensor: copy or download it again")
    return content


def load_content(path: Path) -> Any:
    """Content of a checkpoint file, without executing code in it.

    Objects on the allow-list become placeholders; ValueError for other objects and for broken files.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if path.suffix == ".onnx":
        raise ValueError(f"{path} is an ONNX graph without tensor names: use the checkpoint from which it was exported")
    if head.lstrip().startswith(b"<") and head[8:9] != b"{":  # safetensors may begin with a length like b" <"
        raise ValueError(f"{path} is a web page, not a checkpoint: download the file itself")
    with _report_broken_file(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # a dependency of timm; only this format needs it

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        check_zip(path) if zipped else _check_old(path)
        requested = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    refused = sorted(name for name in requested if name != "argparse.Namespace" and not INERT.fullmatch(name))
    if refused:
        raise _refusal(path, refused)
    placeholders = [(Placeholder, name) for name in requested if name != "argparse.Namespace"]
    with torch.serialization.safe_globals([argparse.Namespace, *placeholders]):
        content = _load_tensors(path, zipped)
    if isinstance(content, dict) and content.get("sha256") and not pop_checksum(content):
        raise ValueError(f"{path} is damaged, its checksum is wrong: copy it again, or use previous.pth or epoch-*.pth")
    return content
