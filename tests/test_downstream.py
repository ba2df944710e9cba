"""The Python blocks of docs/downstream.md, run as they are written."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import CPU

from models_pixmim import ENCODERS
from util.convert import convert

PAGE = (Path(__file__).parents[1] / "docs" / "downstream.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def state(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Tensors of an encoder, which lies in the folder `pixmim_timm` as a timm folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(ENCODERS["vit_tiny"](img_size=64).state_dict(), "x.pth")
    convert(Path("x.pth"), Path("pixmim_timm"), "timm", folder=True)
    return torch.load("x.pth", weights_only=True)


def run_block(start: str) -> Namespace:
    """Names that a block of the page defines, and `lost`, its check."""
    names: dict = {}
    (block,) = [text for text in BLOCKS if text.startswith(start)]
    (check,) = [text for text in BLOCKS if "def lost" in text]
    exec(check + block, names)
    return Namespace(**names)


def assert_trains(model: torch.nn.Module, loss: torch.Tensor, unused: set[str]) -> None:
    """One backward step reaches every parameter but the unused ones."""
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == unused


@pytest.mark.filterwarnings("ignore")
def test_dpt_loses_no_tensor_and_trains_at_two_sizes(state):
    pytest.importorskip("segmentation_models_pytorch")
    page = run_block("import segmentation")
    assert page.lost(page.model, state, "encoder.model.") == []
    assert page.model.eval()(torch.randn(1, 3, 32, 96)).shape == (1, 150, 32, 96)
    out = page.model.train()(torch.randn(2, 3, 64, 64))
    assert_trains(page.model, out.square().mean(), {"encoder.model.norm.weight", "encoder.model.norm.bias"})


@pytest.mark.filterwarnings("ignore")
def test_faster_rcnn_loses_no_tensor_and_trains(state):
    page = run_block("import timm")
    assert page.lost(page.detector, state, "backbone.vit.") == []
    page.detector.transform.min_size, page.detector.transform.max_size = (64,), 96
    images, box = [torch.rand(3, 64, 96), torch.rand(3, 60, 64)], torch.tensor([[5.0, 5.0, 40.0, 50.0]], device=CPU)
    losses = page.detector.train()(images, [{"boxes": box, "labels": torch.tensor([n])} for n in (1, 2)])
    assert_trains(page.detector, sum(losses.values()), {"backbone.vit.norm.weight", "backbone.vit.norm.bias"})
    levels = page.detector.backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in levels.values()] == [(256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3)]
