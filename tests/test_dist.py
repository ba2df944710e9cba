"""Distributed training: rank detection, sums and gathered values."""

import json
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from conftest import CPU, ranks

from util.dist import World, init_world, rank_from_env

SUMS = """
import json, torch
from util.dist import init_world
world = init_world("cpu", "off", timeout_minutes=1)
mine = torch.tensor([1.0, 10.0]) * (world.rank + 1)
print(json.dumps([world.sum(mine).tolist(), mine.tolist(), world.gather({"rank": world.rank}), world.is_main]))
world.close()
"""


def test_python_without_srun_runs_as_a_single_process_in_an_sbatch_job():
    assert rank_from_env({}) == (0, 1, 0)
    assert rank_from_env({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}) == (0, 1, 0)
    assert rank_from_env({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == (0, 1, 0)


def test_freed_memory_is_used_again_without_page_faults():
    init_world("cpu", "off")
    torch.ones(2**26)
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.ones(2**26 - 2**12)  # 65,532 pages; a block of the same size would need some more for its alignment
    assert getrusage(RUSAGE_SELF).ru_minflt - before < 100


def test_rank_is_read_from_torchrun():
    assert rank_from_env({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (5, 8, 1)


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu7", "gpu7"), ("a1,b2", "a1"), ("node[03-07,12]", "node03"), ("n[1,4],m2", "n1")]
)
def test_rank_is_read_from_srun_and_all_tasks_use_the_same_master_address(nodes, first):
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456"}
    tasks = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 8)} for i in (3, 11)]
    assert [rank_from_env(task) for task in tasks] == [(3, 16, 3), (11, 16, 3)]
    assert {(task["MASTER_ADDR"], task["MASTER_PORT"]) for task in tasks} == {(first, "23456")}


def test_torchrun_takes_precedence_over_slurm():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    assert rank_from_env(environ) == (1, 2, 1)


def test_sums_and_gathered_values_are_the_same_on_all_ranks():
    ends = ranks(2, "-c", SUMS)
    assert [status for status, _, _ in ends] == [0, 0], ends
    for rank, (_, out, _) in enumerate(ends):
        total, mine, gathered, is_main = json.loads(out)
        assert total == [3.0, 30.0]  # 1 + 2, 10 + 20
        assert mine == [1.0 + rank, 10.0 + 10 * rank]  # unchanged
        assert gathered == [{"rank": 0}, {"rank": 1}]
        assert is_main == (rank == 0)


def test_sum_and_gather_of_one_rank_return_its_own_values():
    world = World(0, 1, CPU)
    assert world.sum(torch.ones(2)).tolist() == [1, 1]
    assert world.gather("x") == ["x"]
    world.close()


def test_error_names_the_device_of_a_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cuda:3"):
        init_world("cuda:3", "bf16")
    assert init_world("auto", "bf16") == World(0, 1, CPU)


def test_error_names_an_unknown_device():
    with pytest.raises(ValueError, match="--device gpu"):
        init_world("gpu", "off")
