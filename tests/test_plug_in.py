"""docs/plug_in.md: its code runs and does what the page says, its diffs are those of the sources."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_models import perturb
from torch import nn
from torch.testing import assert_close

from main_pretrain import get_parser
from models import build_target
from models_pixmim import PixMIM, mask_from_noise
from util.args import resolve_defaults

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "plug_in.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict:
    """Names that the code of the page defines."""
    found: dict = {}
    for block in blocks("python"):
        exec(block, found)
    return found


def test_crop_returns_random_windows_of_the_resized_image(names):
    image = Image.effect_mandelbrot((300, 240), (-2, -1.5, 1, 1.5), 20)
    torch.manual_seed(0)
    windows = [names["crop"](image) for _ in range(8)]
    assert {(window.size, window.mode) for window in windows} == {((224, 224), "RGB")}
    assert len({window.tobytes() for window in windows}) > 1
    torch.manual_seed(0)
    assert [names["crop"](image).tobytes() for _ in range(8)] == [window.tobytes() for window in windows]


def test_low_pass_equals_the_target_of_pre_training(names):
    images = torch.randn(2, 3, 224, 224)
    target = build_target(resolve_defaults(get_parser().parse_args(["--data_path", "x"])))
    assert torch.equal(names["low_pass"](images), target(images))


def test_the_loss_of_the_example_target_is_that_of_grey_patches(names):
    """Second computation: patches of the grey image, each value standing for three channels."""
    torch.manual_seed(0)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    encoder = names["ENCODERS"]["last_two_vit_tiny"](img_size=(32, 32), patch_size=8)
    model = PixMIM(encoder, names["Grey"](), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    loss, prediction, mask = model(images, noise)
    grey = images.mean(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).transpose(2, 3).reshape(2, 16, 64)
    pixels = torch.stack([image[patches] for image, patches in zip(grey, mask.predict, strict=True)])
    pixels = (pixels - pixels.mean(2, keepdim=True)) / (
        pixels.var(2, unbiased=False, keepdim=True) * 192 / 191 + 1e-6
    ).sqrt()
    assert_close(loss, ((prediction.unflatten(2, (64, 3)) - pixels.unsqueeze(3)) ** 2).mean())


def test_the_example_host_trains_and_averages_its_last_two_layers(names):
    encoder = perturb(names["ENCODERS"]["last_two_vit_tiny"](img_size=(32, 32), patch_size=8))
    model = PixMIM(encoder, nn.Identity(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model(images, noise)[0].backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.blocks.parameters())
    outputs: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    tokens = encoder.encode(images, mask_from_noise(noise, 0.75, encoder.grid))
    assert_close(tokens, encoder.norm((outputs[-2] + outputs[-1]) / 2))


def test_added_lines_of_the_diffs_are_in_the_sources():
    source = ""
    shown = 0
    for line in "".join(blocks("diff")).splitlines():
        if file := re.match(r"--- ([\w/.]+)", line):
            source = (ROOT / file[1]).read_text()
        elif source and line.startswith("+") and line[1:].strip():
            assert line[1:].strip() in source, line
            shown += 1
    assert shown == 11
