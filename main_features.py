"""python main_features.py --checkpoint output/pixmim/last.pth --data_path DIR --output FILE.npy: features of images.

One vector per image, the class token or the mean of the patch tokens, or with --maps a map of all patch tokens.
"""

import argparse
import json
import os
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from models import ENCODERS, build_encoder
from util.args import (
    Parser,
    add_checkpoint_arguments,
    add_data_arguments,
    add_device_arguments,
    add_model_arguments,
    number,
    run_main,
)
from util.data.batches import eval_loader
from util.data.cache import is_cache
from util.data.folders import Folder, Source, list_images
from util.data.streams import is_stream
from util.data.tars import Tars, iter_files, local_tars
from util.data.transforms import eval_transform
from util.dist import init_world
from util.evaluate.encoder import encode_batches, features, load_encoder, patch_features, pooling, read_architecture
from util.evaluate.scores import print_result


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_arguments(parser, "folder of images, read recursively, or of tar shards")
    add_checkpoint_arguments(parser)
    add_model_arguments(parser, ENCODERS)
    add_device_arguments(parser)
    add = parser.add_argument_group("features").add_argument
    add("--output", required=True, metavar="FILE.npy|FILE.safetensors",
        help="file to write: float32 (N, D), with --maps (N, D, h, w); names of the images in FILE.json or the metadata")  # fmt: skip
    add("--maps", action="store_true", help="write the features of each patch instead of one vector per image")
    add("--batch_size", type=number(int, 1), default=256, help="images per forward pass")
    parser.set_defaults(amp="off")
    return parser


def find_images(data_path: str) -> tuple[Source, list[str]]:
    """(Images below a folder or in its tar shards, in the order of their names, the names)."""
    if is_stream(data_path) or is_cache(data_path):
        raise ValueError(
            f"--data_path {data_path}: streams and caches are not supported; use a folder of images or of tar shards"
        )
    paths = list_images(data_path) if Path(data_path).is_dir() else []
    if paths:
        names = [os.fsdecode(os.path.relpath(path, os.fsencode(data_path))) for path in paths]
        return Folder(np.array(paths), np.zeros(len(paths), np.int64), []), names
    tars = local_tars(data_path)
    if tars is None:
        raise ValueError(f"--data_path {data_path}: no images and no tar shards found")
    return tars, list_members(tars)


def list_members(tars: Tars) -> list[str]:
    """Name of each image: "SHARD: MEMBER"."""
    names: list[str] = []
    for shard, end in zip(tars.paths, tars.ends, strict=True):
        with tarfile.open(shard, "r:") as tar:
            members = {member.offset_data: member.name for member in iter_files(tar)}
        names += [f"{Path(shard).name}: {members[offset]}" for offset in tars.places[len(names) : end, 0]]
    return names


def write_features(path: Path, rows: Iterator[np.ndarray], names: list[str], metadata: dict) -> tuple[int, ...]:
    """Write the features and their names; returns the shape. An error leaves no file.

    A .npy is written batch by batch, a .safetensors is collected in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".npy":
            shape = write_rows(temporary, rows, len(names))
            path.with_suffix(".json").write_text(json.dumps(metadata | {"files": names}, indent=1) + "\n")
        else:
            from safetensors.numpy import save_file  # a dependency of timm; only this format needs it

            whole = np.concatenate([*rows])
            shape = whole.shape
            save_file({"features": whole}, temporary, metadata=metadata | {"files": json.dumps(names)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return shape


def write_rows(path: Path, rows: Iterator[np.ndarray], count: int) -> tuple[int, ...]:
    """Write batches of rows to a .npy with `count` rows; returns its shape."""
    first = next(rows)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, *first.shape[1:]))
    done = 0
    for batch in chain([first], rows):
        array[done : done + len(batch)] = batch
        done += len(batch)
    array.flush()
    return array.shape


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
    source, names = find_images(args.data_path)
    loader = eval_loader(args, world, source, eval_transform(args.input_size, args.crop_pct))
    batches = encode_batches(args, world, encoder, loader, patch_features if args.maps else features)
    pool = "token" if getattr(encoder, "global_pool", "avg") == "token" else "mean"
    metadata = {"checkpoint": args.checkpoint, "feature": "maps" if args.maps else pool}
    shape = write_features(output, (x.cpu().numpy() for x, _ in batches), names, metadata)
    print_result(world, {"output": str(output), "shape": shape})
    world.close()


if __name__ == "__main__":
    run_main(main)
