"""Writes the extracts beside it from ../shared/reference, whose README describes the fields: `python tests/reference/make.py`.

To stay below 2 MB in all, pixels are rounded to 1/65535 and weights to three bytes (2**-16 relative), which moves the
answers by at most half (target) or a tenth (prediction, gradients) of what tests/test_reference.py tolerates; large answers are kept as every 61st value (61 shares no factor
with any side, so every row, column and channel is met) and their norm. The small low-pass cases are kept whole.
"""

import lzma
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "reference"
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
ALIGNED = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2}]  # for 4-byte numbers


def sample(x: Tensor) -> dict[str, Tensor]:
    """What the extracts keep of an answer: its norm and, of a large one, every 61st value."""
    return {"norm": x.norm(), "values": x.flatten()[:: 61 if x.numel() > 1000 else 1].clone()}


def rounded(x: Tensor) -> Tensor:
    """Float32 with the last byte of the mantissa zero."""
    return (x.view(torch.int32) + 128 >> 8 << 8).view(torch.float32)


def pack(images: Tensor) -> Tensor:
    """Normalised images as pixels of 16 bits."""
    return ((images * STD + MEAN) * 65535).round().clamp(0, 65535).to(torch.uint16)


def unpack(pixels: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return (pixels.float() / 65535 - MEAN) / STD


def read(name: str) -> dict:
    """Content of an extract."""
    return torch.load(BytesIO(lzma.decompress((HERE / f"{name}.pt.xz").read_bytes())), weights_only=True)


def write(name: str, content: dict) -> None:
    buffer = BytesIO()
    torch.save(content, buffer)
    (HERE / f"{name}.pt.xz").write_bytes(lzma.compress(buffer.getvalue(), filters=ALIGNED))


def extract(answers: dict) -> dict:
    """The part of a reference file that is kept."""
    (wrapper, state), *_ = answers["checkpoint"].items()
    content = {key: answers[key] for key in ("cfg", "noise", "mask", "loss")}
    content["checkpoint"] = {wrapper: {k: v if "pos_embed" in k else rounded(v) for k, v in state.items()}}
    content["pixels"] = pack(answers["imgs"])
    content["pred"] = sample(answers["pred"][answers["mask"]])
    content["grads"] = {key: sample(value) for key, value in answers["grads"].items()}
    return content | ({"target": sample(answers["target"])} if "target" in answers else {})


def main() -> None:
    for name in ("mae", "pixmim"):
        write(name, extract(torch.load(SHARED / f"{name}.pt", weights_only=True)))
    cases = torch.load(SHARED / "lowpass.pt", weights_only=True)["cases"]
    write("lowpass", {"cases": {key: cases[key] for key in ("32x32_r10", "33x47_r9")}})


if __name__ == "__main__":
    main()
