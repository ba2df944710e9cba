"""Features of images by an encoder, in a file with their names: class token, mean or map of the patches."""

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
    add_data_arguments(parser, "folder of images in whatever structure, all of which are taken, or of tar shards")
    add_checkpoint_arguments(parser)
    add_model_arguments(parser, ENCODERS)
    add_device_arguments(parser)
    add = parser.add_argument_group("features").add_argument
    add("--output", required=True, metavar="FILE.npy|FILE.safetensors",
        help="float32 (N, D), of maps (N, D, h, w); the names are in FILE.json, or in the metadata of the safetensors")  # fmt: skip
    add("--maps", action="store_true", help="features of each patch, instead of one vector for an image")
    add("--batch_size", type=number(int, 1), default=256, help="images in one forward pass")
    parser.set_defaults(amp="off")
    return parser


def images_of(data_path: str) -> tuple[Source, list[str]]:
    """All images below a folder or in its tar shards, in the order of their names, and these."""
    if is_stream(data_path) or is_cache(data_path):
        raise ValueError(f"--data_path {data_path}: features are of images that lie here, in a folder or in tar shards")
    paths = list_images(data_path) if Path(data_path).is_dir() else []
    if paths:
        names = [os.fsdecode(os.path.relpath(path, os.fsencode(data_path))) for path in paths]
        return Folder(np.array(paths), np.zeros(len(paths), np.int64), []), names
    tars = local_tars(data_path)
    if tars is None:
        raise ValueError(f"--data_path {data_path}: there is no image and no tar shard of images")
    return tars, tar_names(tars)


def tar_names(tars: Tars) -> list[str]:
    """SHARD: MEMBER of each image."""
    names: list[str] = []
    for shard, end in zip(tars.paths, tars.ends, strict=True):
        with tarfile.open(shard, "r:") as tar:
            members = {member.offset_data: member.name for member in iter_files(tar)}
        names += [f"{Path(shard).name}: {members[offset]}" for offset in tars.places[len(names) : end, 0]]
    return names


def write(path: Path, rows: Iterator[np.ndarray], names: list[str], about: dict) -> tuple[int, ...]:
    """Shape of what was written; a .npy grows on the disk, a .safetensors in memory. A failure leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".npy":
            shape = fill(temporary, rows, len(names))
            path.with_suffix(".json").write_text(json.dumps(about | {"files": names}, indent=1) + "\n")
        else:
            from safetensors.numpy import save_file  # timm brings it; no other format needs it

            whole = np.concatenate([*rows])
            shape = whole.shape
            save_file({"features": whole}, temporary, metadata=about | {"files": json.dumps(names)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return shape


def fill(path: Path, rows: Iterator[np.ndarray], count: int) -> tuple[int, ...]:
    """Write rows, as they come, to a .npy of `count` of them; returns its shape."""
    first = next(rows)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, *first.shape[1:]))
    done = 0
    for some in chain([first], rows):
        array[done : done + len(some)] = some
        done += len(some)
    array.flush()
    return array.shape


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    output = Path(args.output)
    if output.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"--output {output}: its name must end in .npy or .safetensors")
    if args.maps and args.pool:
        raise ValueError(f"--pool {args.pool} makes one vector of an image, --maps keeps its patches: choose one")
    world = init_world(args.device, args.amp)
    if world.size > 1:
        raise ValueError(f"main_features.py runs alone, not on {world.size} ranks: start it with python")
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool)).to(world.device).eval()
    source, names = images_of(args.data_path)
    loader = eval_loader(args, world, source, eval_transform(args.input_size))
    batches = encode_batches(args, world, encoder, loader, patch_features if args.maps else features)
    pool = "token" if getattr(encoder, "global_pool", "avg") == "token" else "mean"
    about = {"checkpoint": args.checkpoint, "feature": "maps" if args.maps else pool}
    shape = write(output, (x.cpu().numpy() for x, _ in batches), names, about)
    print_result(world, {"output": str(output), "shape": shape})
    world.close()


if __name__ == "__main__":
    run_main(main)
