"""Torch's CUDA build on fakecuda.c, in place of the driver and NVIDIA's libraries: runs the tests of on_fakecuda.py."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NAMES = r" [TUW] ((?:__)?cu(?:da|blas|fft|rand|sparse|solver|dnn|[A-Z])\w*|nccl\w+)"
EFFECTS = {  # what functions do whose name matches, before they return 0
    r"Launch\w*Kernel|[gG]emm|LtMatmul$|cufftXtExec": "fake_launches++;",
    r"Synchronize$": "fake_waits++;",
    r"Create|cuCtxGetCurrent": "*handle = malloc(64);",
}


def names_of(*words) -> set[str]:
    """Names of CUDA that nm lists."""
    return set(re.findall(NAMES, subprocess.run(["nm", *words], capture_output=True, text=True, check=True).stdout))


def build(folder: Path) -> Path:
    """A library with all functions of CUDA that torch and triton need; preloaded, it is what they find."""
    root = Path(torch.__file__).parents[1]
    triton = root / "triton/backends/nvidia"
    gcc = ["gcc", "-w", "-O1", "-fPIC", f"-I{triton}/include"]  # -w: most of its functions ignore their arguments
    subprocess.run([*gcc, "-c", HERE / "fakecuda.c", "-o", folder / "answers.o"], check=True)
    needed = set.union(*(names_of("-Du", path) for path in (root / "torch/lib").glob("lib*.so")))
    needed |= set(re.findall(r"\bcu[A-Z]\w+", (triton / "driver.c").read_text()))
    lines = ["#include <stdlib.h>", "extern _Atomic long fake_launches, fake_waits;"]
    for name in sorted(needed - names_of(folder / "answers.o")):
        effect = next((code for pattern, code in EFFECTS.items() if re.search(pattern, name)), "")
        lines.append(f"int {name}(void **handle) {{ {effect} return 0; }}")
    (folder / "rest.c").write_text("\n".join(lines))
    library = folder / "libcuda.so.1"
    parts = ["-o", library, folder / "answers.o", folder / "rest.c"]
    subprocess.run([*gcc, "-shared", f"-Wl,-soname,{library.name}", *parts], check=True)
    return library


@pytest.mark.slow
@pytest.mark.timeout(900)  # Inductor compiles the model
@pytest.mark.skipif(
    not (
        shutil.which("gcc")
        and shutil.which("nm")
        and (torch.version.cuda or "").startswith("13")
        and find_spec("triton")
    ),
    reason="needs gcc, nm and torch for CUDA 13 with triton, whose headers are used",
)
def test_training_on_a_fake_cuda(tmp_path):
    words = ["-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", HERE / "on_fakecuda.py"]
    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    places = caches | {"LD_PRELOAD": str(build(tmp_path)), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment = os.environ | places | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    print(*re.findall("^counted: .*", found.stdout, re.M), found.stdout.splitlines()[-1], sep="\n")
