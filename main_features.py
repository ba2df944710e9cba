"""python main_features.py --checkpoint FILE --data_path DIR --output FILE.npy: features of images.

One vector per image, the class token or the mean of the patch tokens, or with --maps a map of all patch tokens.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import util.args as cli
from models import ENCODERS, build_encoder
from util.data.batches import eval_loader
from util.data.ranges import resolve_pixels
from util.data.sources import indexed_source
from util.data.transforms import eval_transform
from util.dist import init_world
from util.evaluate.encoder import (
    encode_batches,
    features,
    load_encoder,
    patch_features,
    pool_name,
    pooling,
    read_architecture,
)
from util.evaluate.scores import print_result
from util.files import lock_file, printable, read_json, write_atomic, write_json
from util.meters import log_bad_images
from util.run import args_to_dict

# Flags that a continued call may change: they do not affect the features.
FREE = {
    "output", "data_path", "checkpoint", "origin", "num_workers", "batch_size", "device", "timeout_minutes", "on_bad_image",
    "verbose_data",
}  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    cli.add_data_arguments(parser, "folder of images, read recursively, tar or zip files, list or table", splits=False)
    cli.add_checkpoint_arguments(parser)
    cli.add_model_arguments(parser, ENCODERS)
    cli.add_device_arguments(parser)
    add = parser.add_argument_group("features").add_argument
    add("--output", required=True, metavar="FILE.npy|FILE.safetensors",
        help="file to write: float32 (N, D), with --maps (N, D, h, w); names of the images in FILE.json or the metadata. "
             "An unreadable image (--on_bad_image skip) has neither row nor name. After an interruption the same command continues")  # fmt: skip
    add("--maps", action="store_true", help="write the features of each patch instead of one vector per image")
    add("--batch_size", type=cli.number(int, 1), default=256, help="images per forward pass")
    parser.set_defaults(amp="off")
    return parser


def join_names(names: list[str]) -> bytes:
    """Names as bytes, by whose SHA-256 a continued call checks its images."""
    return "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")


def read_partial(side: Path, file: BinaryIO, names: list[str], key: dict) -> tuple[dict, Any]:
    """(What an interrupted call has done, from PATH.partial.json; SHA-256 of its rows in `file`, which is cut to them).

    {"done": 0, ...} if there is none that fits.
    """
    state = {"key": key, "done": 0, "unreadable": [], "size": 0, "start": 0, "row": None}
    if side.exists():
        try:
            found = read_json(side)
            done = hashlib.sha256(join_names(names[: found["done"]])).hexdigest()
            if found["key"] == key and found["names"] == done:
                file.truncate(found["size"])
                file.seek(found["start"])
                rows = hashlib.file_digest(file, "sha256")
                if rows.hexdigest() != found["rows"]:
                    raise ValueError(f"{side.with_suffix('')} is damaged")
                print(f"continues after {found['done']} of {len(names)} images", file=sys.stderr)
                return found, rows
            reason = f"{side} is of other flags or images"
        except KeyError:
            reason = f"{side} is of an earlier version"
        except ValueError as error:
            reason = str(error)
        print(printable(f"{reason}: starting from the first image"), file=sys.stderr)
    file.truncate(0)
    return state, hashlib.sha256()


def write_header(file: BinaryIO, shape: list[int]) -> None:
    """Write the header of a float32 .npy. NumPy pads it: the number of rows does not change its length."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})


def check_space(path: Path, size: int) -> None:
    """OSError if the disk has no room for so many bytes of features."""
    needed, free = size * (2 if path.suffix == ".safetensors" else 1), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"--output {path} needs {needed / 2**20:.0f} MiB ({'twice ' if needed > size else ''}its size), but {free / 2**20:.0f} MiB "
            "are free; choose another disk"
        )


def write_rows(path: Path, encode: Callable[[int], Iterator], names: list[str], key: dict) -> list[int]:
    """Write all rows to PATH.partial, a .npy, after those of an interrupted call; returns the unreadable images.

    `encode(first)` yields (rows, their images, number of images done). PATH.partial.json describes what is written.
    """
    partial, side = (path.with_name(f"{path.name}.partial{suffix}") for suffix in ("", ".json"))
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        lock_file(file.fileno(), f"--output {path}: another process is writing it")
        state, written = read_partial(side, file, names, key)
        digest = hashlib.sha256(join_names(names[: state["done"]]))
        seconds = 0.5 if sys.stderr.isatty() else 30
        with tqdm(total=len(names), initial=state["done"], unit="image", mininterval=seconds, file=sys.stderr) as bar:
            for rows, used, done in encode(state["done"]):
                if state["row"] is None:
                    state["row"] = rows.shape[1:]
                    check_space(path, rows[:1].nbytes * len(names))
                    write_header(file, [0, *state["row"]])
                    state["start"] = file.tell()
                file.seek(0, os.SEEK_END)
                file.write(content := rows.tobytes())
                written.update(content)
                file.flush()
                os.fsync(file.fileno())
                state["unreadable"] += sorted({*range(state["done"], done)} - {*used})
                digest.update(join_names(names[state["done"] : done]))
                state |= {"done": done, "names": digest.hexdigest(), "rows": written.hexdigest(), "size": file.tell()}
                write_json(side, state)
                bar.update(done - bar.n)
            if state["row"] is None:
                raise ValueError("--data_path: no image can be read")
            bar.update(len(names) - bar.n)
        unreadable = [*state["unreadable"], *range(state["done"], len(names))]
        write_header(file, [len(names) - len(unreadable), *state["row"]])
    return unreadable


def write_features(path: Path, encode: Callable[[int], Iterator], names: list[str], key: dict, metadata: dict) -> dict:
    """Write the features and their names, from where an interrupted call of the same flags ended.

    Returns the shape, and the number of unreadable images if there are any; these have neither a row nor a name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, side = (path.with_name(f"{path.name}.partial{suffix}") for suffix in ("", ".json"))
    unreadable = set(write_rows(path, encode, names, key))
    left_out = {"unreadable": [names[i] for i in sorted(unreadable)]} if unreadable else {}
    lists = {"files": [name for i, name in enumerate(names) if i not in unreadable]} | left_out
    whole = np.load(partial, mmap_mode="r")
    if path.suffix == ".npy":
        write_atomic(path.with_suffix(".json"), (json.dumps(metadata | lists, indent=1) + "\n").encode())
        os.replace(partial, path)
    else:
        from safetensors.numpy import save  # a dependency of timm; only this format needs it

        texts = {name: json.dumps(listed) for name, listed in lists.items()}
        write_atomic(path, save({"features": np.asarray(whole)}, metadata=metadata | texts))
        partial.unlink()
    side.unlink()
    return {"shape": whole.shape} | ({"unreadable": len(unreadable)} if unreadable else {})


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    output = Path(args.output)
    if output.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"--output {output}: its name must end in .npy or .safetensors")
    if args.maps and args.pool:
        raise ValueError(f"--pool {args.pool} gives one vector per image, --maps all patches: choose one")
    world = init_world(args.device, args.amp)
    if world.size > 1:
        raise ValueError(f"main_features.py supports one rank, not {world.size}: start it with python, not torchrun")
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool)).to(world.device).eval()
    source = indexed_source(args, split=None)
    args = resolve_pixels(args, source)
    names = [source.relative_name(i) for i in range(len(source))]
    metadata = {"checkpoint": args.checkpoint, "feature": "maps" if args.maps else pool_name(encoder)}

    def encode(first: int) -> Iterator[tuple[np.ndarray, list[int], int]]:
        loader = eval_loader(args, world, source, eval_transform(args.input_size, args.crop_pct), first)
        rows = 0
        for x, batch in encode_batches(args, world, encoder, loader, patch_features if args.maps else features):
            rows += len(x)
            yield x.cpu().numpy(), batch["index"].tolist(), first + rows + len(loader.bad)
        log_bad_images(world, [loader])

    key = {name: value for name, value in args_to_dict(args).items() if name not in FREE}
    key |= {"weights": args.origin and args.origin["sha256"]}
    try:
        found = write_features(output, encode, names, key, metadata)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        remedy = "free disk space, then the same command continues"
        raise OSError(f"--output {output}: {error.strerror}; {remedy}") from error
    print_result(world, {"output": str(output)} | found, args)
    world.close()


if __name__ == "__main__":
    cli.run_main(main)
