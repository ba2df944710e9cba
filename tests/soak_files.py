"""Damage every kind of file that the project writes, fill the disk in every tool: `python -m tests.soak_files --data_path DIR`.

DIR has train/<class>/ and val/<class>/. Each round damages one file, runs the tool that reads it and compares its result with that of
the whole file; every third round runs a tool on a full disk instead. Prints a table of counts. Exits with status 1 after a traceback
or a hang. As root a full disk is a small tmpfs, else a limit of the size of files (RLIMIT_FSIZE).
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from tests.conftest import DEVICE, FORKS, PRETRAIN, ended, spawn
from tests.soak import DAMAGES
from util.checkpoint.state import read_checkpoint
from util.files import content_hash
from util.formats.read import read_weights

VALUE = re.compile(rb'(?<=[:\[,] )(?:"[^"]*"|[-\d.e]+|true|false|null)')  # of JSON
VALUES = [b"null", b'"x"', b"[]", b"{}", b"-1", b"0", b"0.5", b"1e999", b"NaN", b"18446744073709551616"]
TARGETS = ["timm", "timm --folder", "mae", "mmpretrain", "hf", "mmseg", "detectron2", "onnx"]
COUNTED = ("right", "line", "line without the file", "differs", "traceback", "hang")


def replace_value(content: bytes) -> bytes:
    """Another value in JSON; other bytes at a random place elsewhere."""
    if found := [*VALUE.finditer(content)]:
        at, value = random.choice(found), random.choice(VALUES)
        return content[: at.start()] + value + content[at.end() :]
    at = random.randrange(len(content) + 1)
    return content[:at] + b"\xff\xfe" + content[at + 2 :]


KINDS: dict[str, Callable[[bytes], bytes]] = DAMAGES | {
    "zeroed": lambda content: bytes(len(content)),
    "garbage": lambda content: random.randbytes(max(8, len(content))),
    "not UTF-8": lambda content: content[: (at := random.randrange(len(content) + 1))] + b"\xff\xfe" + content[at:],
    "other value": replace_value,
    "deleted": lambda content: b"",
}


class Tool(NamedTuple):
    """A command that reads files, and what must not change."""

    files: str  # patterns, below the folder of the round
    command: list
    result: Callable[[str], object]  # of its output


def module(name: str, *words, limit: int | None = None) -> list:
    """Words of `python -m name words`, in which files are limited to so many bytes, as the fork server runs them."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " if limit else ""
    return ["-c", f"{limited}import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)", *words]


words = str.split  # of a command line


def run(command: list) -> tuple[int | None, str, str]:
    return ended(spawn(*command))


def last_line(out: str) -> object:
    return out.splitlines()[-1:]


class Files:
    """Every kind of file that the project writes, in `now`, with the tools that read them."""

    def __init__(self, data: Path, work: Path):
        self.images, self.now, self.whole = work / "images", work / "now", work / "whole"
        for split, count in (("train", 8), ("val", 4)):
            for kind in sorted((data / split).iterdir())[:3]:
                (self.images / split / kind.name).mkdir(parents=True)
                for path in sorted(kind.iterdir())[:count]:
                    with Image.open(path) as image:
                        image.convert("RGB").resize((40, 32)).save(self.images / split / kind.name / f"{path.stem}.png")
            (self.images / split / kind.name / "bad.png").write_bytes(b"x")
            (self.now / "tars" / split).mkdir(parents=True)
            with tarfile.open(self.now / "tars" / split / "all.tar", "w") as tar:
                tar.add(self.images / split, split)
        now, data_path = self.now, ["--data_path", self.images, "--on_bad_image", "skip"]
        checkpoint, common = now / "run" / "last.pth", [*DEVICE, "--on_bad_image", "skip"]
        trained = [*PRETRAIN, *words("--batch_size 8 --warmup_epochs 1 --save_every 1 --on_full_disk stop")]
        self.pretrain = ["main_pretrain.py", *trained, *words("--epochs 3 --image_every 1"), *data_path, "--output_dir"]
        knn = ["main_knn.py", "--checkpoint", checkpoint, *common]
        self.knn = [*knn, "--data_path", self.images]
        probe = ["main_linprobe.py", *DEVICE, *data_path]
        extract = words("--device cpu --num_workers 0 --batch_size 4 --output")
        self.features = ["main_features", "--checkpoint", checkpoint, *data_path, *extract]
        pack = words("--input_size 16 --tile 20 --shard_mib 0.02 --workers 0 --out")
        self.build = ["util.cache", "build", *data_path, *pack]
        on_cache = [
            "main_pretrain.py",
            *trained,
            *words("--epochs 1 --data_path"),
            now / "cache",
            "--output_dir",
            now / "c",
        ]
        cached = "cache/manifest.json cache/index.npy cache/tiles.npy cache/plan.json cache/shard-*.bin"
        run_files = (
            "config.json log.jsonl changes.diff bad_images.txt tensorboard/* last.pth previous.pth epoch-0001.pth .lock"
        )
        resumed = " ".join(f"run/{name}" for name in words(run_files))
        self.tools = {
            "resume": Tool(resumed, [*self.pretrain, now / "run"], lambda _: self.weights("run")),
            "debug_step.py": Tool("run/config.json run/last.pth run/epoch-0001.pth", ["debug_step.py", now / "run", 5], last_line),
            "curves": Tool("run/log.jsonl", module("util.plots.curves", now / "run", "--output", now / "x.png"), last_line),
            "report": Tool("results.jsonl", module("util.report", now / "results.jsonl"), str),
            "kNN --results": Tool("results.jsonl", [*self.knn, "--results", now / "results.jsonl"], last_line),
            "kNN --train_list": Tool("probe/train_list.txt", [*self.knn, "--train_list", now / "probe" / "train_list.txt"], last_line),
            "cache build": Tool("cache/plan.json cache/shard-*.npz", module(*self.build, now / "cache"),
                                lambda _: [path.read_bytes() for path in sorted((now / "cache").glob("[!mp]*.[bn]*[ny]"))]),
            "cache verify": Tool(cached, module("util.cache", "verify", now / "cache"), lambda _: self.weights("run")),
            "train on cache": Tool(cached, on_cache, lambda _: self.weights("c")),
            "features": Tool("x.npy.partial x.npy.partial.json", module(*self.features, now / "x.npy"),
                             lambda _: [(now / name).read_bytes() for name in ("x.npy", "x.json")]),
            "kNN on tars": Tool("tars/train/index.npz", [*knn, "--data_path", now / "tars"], last_line),
            "probe --eval": Tool("probe/classifier.pth", [*probe, "--eval", "--checkpoint", now / "probe" / "classifier.pth"], last_line),
        }  # fmt: skip
        for name, parts in (("mae.pth", ""), ("timm", "/*"), ("hf", "/*")):
            self.tools[f"convert {name}"] = Tool(
                f"{name}{parts}", module("util.convert", now / name, now / "back.pth", "--to", "mae"),
                lambda _: content_hash(read_weights(now / "back.pth").state),
            )  # fmt: skip
        short = words("--epochs 1 --warmup_epochs 0 --train_fraction 0.5 --batch_size 4 --checkpoint")
        self.prepare([*probe, *short, checkpoint])

    def weights(self, folder: str) -> str:
        content = read_checkpoint(self.now / folder / "last.pth")
        return content_hash([content["model"], content["optimizer"]])

    def prepare(self, probe: list) -> None:
        """Write the files, keep a copy of them, and the result of each tool on it."""
        now, last = self.now, self.now / "run" / "last.pth"
        convert = [module("util.convert", last, now / x, "--to", x.split(".")[0], *y) for x, *y in
                   (("mae.pth",), ("timm", "--folder"), ("hf",))]  # fmt: skip
        features = module(*self.features, now / "x.npy", limit=2500)
        tars, results = self.tools["kNN on tars"].command, self.tools["kNN --results"].command
        for command in ([*self.pretrain, now / "run"], *convert, [*probe, "--output_dir", now / "probe"], tars, results,
                        module(*self.build, now / "cache"), features):  # fmt: skip
            status, _, err = run(command)
            assert status == (command is features), err
        for old, new in (("0002", "last"), ("0001", "previous")):  # interrupted after the second epoch
            shutil.copy(now / "run" / f"epoch-{old}.pth", now / "run" / f"{new}.pth")
        (now / "run" / "epoch-0003.pth").unlink()
        (now / "run" / "changes.diff").touch()
        shutil.copytree(now, self.whole)
        self.results = {name: self.try_tool(tool)[1] for name, tool in self.tools.items()}

    def restore(self) -> None:
        shutil.rmtree(self.now)
        shutil.copytree(self.whole, self.now)

    def try_tool(self, tool: Tool, damage: tuple[Path, str] | None = None) -> tuple[str, object, str]:
        """(what happened, result or None, errors) of a tool after the damage of a file."""
        self.restore()
        if damage:
            path, kind = damage
            path.write_bytes(KINDS[kind](path.read_bytes()) if path.stat().st_size else b"x")
            if kind == "deleted":
                path.unlink()
        status, out, err = run(tool.command)
        assert damage or status == 0, err
        found = outcome(status, out + err, *([path.name, path.parent.name] if damage else []))
        return found, tool.result(out) if found == "right" else None, out[-2000:] + err


def outcome(status: int | None, text: str, *names: str) -> str:
    """One of COUNTED; "right" if the tool has ended without an error."""
    if status is None:
        return "hang"
    if "Traceback" in text or status < 0:
        return "traceback"
    lines = [line for line in text.splitlines() if "error: " in line]
    if status == 0:
        return "right"
    return "line" if len(lines) == 1 and any(name in lines[0] for name in names) else "line without the file"


def damage_round(files: Files) -> tuple[str, str, str]:
    """(kind of file, what happened, details) of a damaged file."""
    pairs = [(name, pattern) for name, tool in files.tools.items() for pattern in tool.files.split()]
    name, pattern = random.choice(pairs)
    files.restore()
    path, kind = random.choice(sorted(files.now.glob(pattern))), random.choice([*KINDS])
    found, result, text = files.try_tool(files.tools[name], (path, kind))
    if found == "right" and result != files.results[name]:
        found = "line" if "damaged" in text else "differs"
    return f"{name}: {pattern}", found, f"{kind} {path.name}\n{text}"


def full_round(files: Files, disk: Path, mounted: bool) -> tuple[str, str, str]:
    """(tool, what happened, details) on a full disk. A file that was there must be whole: the old or the new one."""
    files.restore()
    last = files.now / "run" / "last.pth"
    commands = {
        f"convert --to {target}": ["util.convert", last, disk / "x", "--to", *target.split()] for target in TARGETS
    }
    commands |= {f"features {suffix}": [*files.features, disk / f"x.{suffix}"] for suffix in ("npy", "safetensors")}
    commands |= {
        "visualize": ["visualize", "--checkpoint", last, "--images", files.images / "val", "--device", "cpu", "--output", disk / "x.png"],
        "curves": ["util.plots.curves", files.now / "run", "--output", disk / "x.png"],
        "cache build": [*files.build, disk / "x"],
        "kNN --results": ["main_knn", *files.knn[1:], "--results", disk / "x.jsonl"],
        "kNN --layers_chart": ["main_knn", *files.knn[1:], "--layers", "all", "--layers_chart", disk / "x.png"],
        "pretrain": ["main_pretrain", *files.pretrain[1:], disk / "x"],
    }  # fmt: skip
    name = random.choice([*commands])
    path, old = commands[name][2] if name.startswith("convert") else commands[name][-1], b"old\n"
    may_exist = path.suffix or (name.startswith("convert") and "folder" not in name and "hf" not in name)
    free = random.choice([0, 4096, 16384, 65536, 262144])
    if may_exist:
        path.write_bytes(old)
    if mounted:
        with suppress(OSError), (disk / "filler").open("wb") as filler:
            filler.write(bytes(max(0, shutil.disk_usage(disk).free - free)))
    status, out, err = run(module(*commands[name], limit=None if mounted else max(1, free)))
    (disk / "filler").unlink(missing_ok=True)
    found, left = outcome(status, out + err, str(path)), [entry.name for entry in disk.iterdir()]
    if any("tmp" in name for name in left) or (may_exist and status and not path.read_bytes().startswith(old)):
        found = "differs"
    for entry in disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return f"full disk: {name}", found, f"{free} bytes free, left: {left}\n{out[-2000:]}{err}"


def soak(data: Path, rounds: int, seed: int, work: Path) -> dict[str, Counter]:
    """Counts of what happened, by kind of file."""
    random.seed(seed)
    torch.set_num_threads(1)
    files, disk, counts = Files(data, work), work / "disk", dict[str, Counter]()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    mounted = subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode == 0
    try:
        for turn in range(rounds):
            name, found, details = full_round(files, disk, mounted) if turn % 3 == 2 else damage_round(files)
            counts.setdefault(name, Counter())[found] += 1
            if found not in ("right", "line"):
                print(f"--- {turn} {name}: {found}: {details}", file=sys.stderr, flush=True)
    finally:
        FORKS.close()
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)
    return counts


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--rounds", type=int, default=300, help="damaged files and full disks")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        counts = soak(args.data_path, args.rounds, args.seed, Path(work))
    print(f"| file or tool | {' | '.join(COUNTED)} |\n| --- |{' --- |' * len(COUNTED)}")
    total = sum(counts.values(), Counter())
    for name, found in [*sorted(counts.items()), ("total", total)]:
        print(f"| {name} | {' | '.join(str(found[x] or '') for x in COUNTED)} |")
    sys.exit(1 if total["traceback"] or total["hang"] else 0)


if __name__ == "__main__":
    main()
