"""Every main on four ranks, with fewer validation images than ranks; collectives are those of every rank."""

import json

import pytest
from conftest import DEVICE, PRETRAIN, class_folders, ranks, result

STEPS = ["--epochs", 1, "--warmup_epochs", 0]
FIXED = ["--mixup", 0, "--cutmix", 0, "--drop_path", 0, "--aa", "none", "--reprob", 0]
MAINS = {
    "main_knn": ["--batch_size", 2],
    "main_linprobe": [*STEPS, "--effective_batch", 8],  # its batch norms see the images of a rank
    "main_finetune": [*STEPS, *FIXED, "--effective_batch", 8, "--batch_size", 1],  # two passes a step on four ranks
    "main_segment": [*STEPS, "--effective_batch", 4, "--short_side", 0, "--blr", 0.1],
}

COUNT = """
import sys
import main_pretrain
from util.dist import World
from util.evaluate.health import LossCheck

calls = []
for name in ("sum", "all_gather", "gather"):
    def count(self, value, real=getattr(World, name), name=name):
        calls.append(name)
        return real(self, value)
    setattr(World, name, count)
if sys.argv[1] == "planted":  # only rank 0 checks the loss
    LossCheck.after_epoch = lambda self, *_: self.run.world.gather(None)
sys.argv = ["main_pretrain.py", *sys.argv[2:]]
main_pretrain.main()
print(*calls)
"""


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """train/ with 2 classes of 6 and 5 images, val/ with 2 and 1."""
    folder = tmp_path_factory.mktemp("few")
    class_folders(folder / "train", {"ant": 6, "bee": 5}, seed=0)
    class_folders(folder / "val", {"ant": 2, "bee": 1}, seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("main", MAINS)
def test_four_ranks_with_three_images_to_evaluate_equal_one(main, few, masked, pretrained, tmp_path):
    data = masked if main == "main_segment" else few
    words = ["--checkpoint", pretrained / "last.pth", "--data_path", data, *DEVICE, *MAINS[main]]
    place = [[] if main == "main_knn" else ["--output_dir", tmp_path / name] for name in ("one", "four")]
    one = result(main, *words, *place[0])
    ends = ranks(4, f"{main}.py", *words, *place[1])
    assert [status for status, _, _ in ends] == [0] * 4, ends[0][2]
    found = json.loads(ends[0][1].splitlines()[-1])
    assert found.keys() == one.keys()
    assert found["n"] == 3
    numbers = [name for name, value in one.items() if isinstance(value, float) and main != "main_linprobe"]
    assert [found[x] for x in numbers] == pytest.approx([one[x] for x in numbers], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["none", "planted"])
def test_no_collective_is_called_by_rank_0_alone(planted, photos, tmp_path):
    words = [*PRETRAIN, "--epochs", 2, "--batch_size", 4, "--warmup_epochs", 1, "--image_every", 1, "--knn_every", 1]
    words += ["--timeout_minutes", 0.1, "--data_path", photos, "--output_dir", tmp_path]
    (zero, out, _), (one, other, _) = ranks(2, "-c", COUNT, planted, *words)
    same = (zero, one) == (0, 0) and out.splitlines()[-1].split() == other.split()
    assert same == (planted == "none")
