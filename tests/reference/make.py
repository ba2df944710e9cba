"""Writes the extracts beside it from ../shared/reference, whose README describes the fields: `python tests/reference/make.py`.

To stay below 3 MB in all, pixels are rounded to 1/65535 and weights to three bytes (2**-16 relative), which moves the
answers by at most half (target) or a tenth (prediction, gradients) of what tests/test_reference.py tolerates; large
answers are kept as every 61st value (61 shares no factor with any side, so every row, column and channel is met) and
their norm. The small low-pass cases are kept whole.

Of the hosts no pixel and no large weight is kept: the reference drew them from a seed, and torch draws them again.
A torch that draws other numbers fails every extract with a seed, and says so; ../shared/reference stays valid.
"""

import lzma
import math
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "reference"
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
ALIGNED = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2}]  # for 4-byte numbers
SEEDS = {"lsmae": 25, "convmae": 27, "convmae_lowpass": 28, "mff": 29, "mff_lowpass": 30}
LARGE = 1000


def sample(x: Tensor) -> dict[str, Tensor]:
    """What the extracts keep of an answer: its norm and, of a large one, every 61st value."""
    return {"norm": x.norm(), "values": x.flatten()[:: 61 if x.numel() > LARGE else 1].clone()}


def rounded(x: Tensor) -> Tensor:
    """Float32 with the last byte of the mantissa zero."""
    return (x.view(torch.int32) + 128 >> 8 << 8).view(torch.float32)


def pack(images: Tensor) -> Tensor:
    """Normalised images as pixels of 16 bits."""
    return ((images * STD + MEAN) * 65535).round().clamp(0, 65535).to(torch.uint16)


def unpack(pixels: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return (pixels.float() / 65535 - MEAN) / STD


def photos(seed: int, count: int, side: int) -> Tensor:
    """Normalised images of 1/f noise: a field that the channels share (0.24) and one of each (0.18) around grey."""
    fields = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))
    k = torch.fft.fftfreq(side)
    fields = torch.fft.ifft2(torch.fft.fft2(fields) / torch.hypot(k[:, None], k).clamp(min=1 / side)).real
    fields /= fields.std((2, 3), keepdim=True)
    return ((0.5 + 0.24 * fields[:, :1] + 0.18 * fields[:, 1:]).clamp(0, 1) - MEAN) / STD


def uniform(seed: int) -> Tensor:
    """The numbers in [0, 1) that weights are made of."""
    return torch.rand(2**20, generator=torch.Generator().manual_seed(seed))


def place(weight: Tensor, stream: Tensor) -> tuple[int, float, list[int]]:
    """Where `stream` has a weight, its largest value (Xavier's or that of torch's layers) and its shape."""
    fan_out, fan_in = weight.flatten(1).shape
    for bound in (math.sqrt(6 / (fan_in + fan_out)), 1 / math.sqrt(fan_in)):
        values = (weight.flatten() / bound + 1) / 2
        for start in ((stream - values[0]).abs() < 1e-6).nonzero().flatten().tolist():
            found = stream[start : start + len(values)]
            if len(found) == len(values) and (found - values).abs().max() < 1e-6:
                return start, bound, [*weight.shape]
    raise ValueError(f"this seed draws no weight of {[*weight.shape]} that begins with {values[0]:.6f}")


def drawn(start: int, bound: float, shape: list[int], stream: Tensor) -> Tensor:
    """The inverse of `place`."""
    return stream[start : start + math.prod(shape)].view(shape) * (2 * bound) - bound


def read(name: str) -> dict:
    """Content of an extract, with the images and weights that were packed or left to be drawn."""
    content = torch.load(BytesIO(lzma.decompress((HERE / f"{name}.pt.xz").read_bytes())), weights_only=True)
    if "pixels" in content:
        content["imgs"] = unpack(content["pixels"])
    if "seed" in content:
        content["imgs"] = photos(content["seed"], len(content["mask"]), content["cfg"]["img_size"])
        if not torch.isclose(content["imgs"].norm(), content["norm"], rtol=1e-5):
            raise RuntimeError(f"torch {torch.__version__} draws other numbers than {name}.pt.xz was made with")
        stream = uniform(content["seed"])
        for state in content["checkpoint"].values():
            state.update({k: drawn(*v, stream) for k, v in state.items() if not isinstance(v, Tensor)})
    return content


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


def extract_to_be_drawn(answers: dict, seed: int) -> dict:
    """`extract` without pixels, and with the places of large weights among the draws of `seed`."""
    content, stream = extract(answers), uniform(seed)
    del content["pixels"]
    content["checkpoint"] = {
        wrapper: {k: place(v, stream) if v.numel() > LARGE and "pos_embed" not in k else v for k, v in state.items()}
        for wrapper, state in answers["checkpoint"].items()
    }
    extras = {key: answers[key] for key in ("ids_restore", "radius", "fusion_weights") if key in answers}
    return content | extras | {"seed": seed, "norm": answers["imgs"].norm()}


def main() -> None:
    for name in ("mae", "pixmim"):
        write(name, extract(torch.load(SHARED / f"{name}.pt", weights_only=True)))
    for name, seed in SEEDS.items():
        write(name, extract_to_be_drawn(torch.load(SHARED / f"{name}.pt", weights_only=True), seed))
    cases = torch.load(SHARED / "lowpass.pt", weights_only=True)["cases"]
    write("lowpass", {"cases": {key: cases[key] for key in ("32x32_r10", "33x47_r9")}})


if __name__ == "__main__":
    main()
