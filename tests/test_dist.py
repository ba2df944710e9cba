"""Distributed training: rank detection, sums and gathered values."""

import json
import re
from datetime import timedelta
from unittest.mock import MagicMock

import pytest
import torch
from conftest import CPU, PRETRAIN, ended, pretrain, ranks, spawn

from util import dist
from util.args import explain_error
from util.data.batches import default_workers
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


FAULTS = """
from resource import RUSAGE_SELF, getrusage
import torch
from util.dist import init_world
init_world("cpu", "off")
torch.ones(2**26)
before = getrusage(RUSAGE_SELF).ru_minflt
torch.ones(2**26 - 2**12)  # 65,532 pages; a block of the same size would need some more for its alignment
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again_without_page_faults():
    status, out, err = ended(spawn("-c", FAULTS))  # whose threads and memory are not those of other tests
    assert status == 0, err
    assert int(out) < 100


def test_rank_is_read_from_torchrun():
    assert rank_from_env({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (5, 8, 1)


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu7", "gpu7"), ("a1,b2", "a1"), ("node[03-07,12]", "node03"), ("n[1,4],m2", "n1")]
)
def test_rank_is_read_from_srun_and_all_tasks_use_the_same_master_address(nodes, first):
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456"}
    tasks = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 8)} for i in (3, 11)]
    assert [rank_from_env(task) for task in tasks] == [(3, 16, 3), (11, 16, 3)]
    ((address, port),) = {(task["MASTER_ADDR"], task["MASTER_PORT"]) for task in tasks}
    assert address == first
    assert 1024 <= int(port) < 32768


def test_steps_of_a_slurm_job_have_ports_of_their_own():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    steps = [step | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(i)} for job in range(500, 510) for i in range(4)]
    for each in steps:
        rank_from_env(each)
    assert len({each["MASTER_PORT"] for each in steps}) == len(steps)  # 40 of 12,000: collisions are rare


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


@pytest.mark.parametrize(
    ("gpus", "local_rank", "torchrun", "index"),
    [(8, 3, True, 3), (8, 3, False, 3), (1, 0, True, 0), (1, 3, False, 0), (1, 1, True, None), (4, 4, False, None)],
)
def test_each_local_rank_has_its_own_gpu(gpus, local_rank, torchrun, index, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if index is None:
        with pytest.raises(ValueError, match=rf"local rank {local_rank} .*{gpus} visible"):
            dist.choose_device("cuda", 8, local_rank)
    else:
        assert dist.choose_device("cuda", 8, local_rank) == torch.device("cuda", index)
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("cores", "local_ranks", "workers"), [(256, 8, 24), (96, 8, 12), (2, 8, 1), (4, 1, 4)])
def test_workers_of_a_rank_are_its_share_of_the_cores(cores, local_ranks, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("cores", "tasks", "node", "workers"),
    [(16, "8(x2),4", 2, 16), (64, "8(x2),4", 1, 8), (8, "8", 0, 8), (64, "1", 0, 24), (2, "8", 0, 2)],
)
def test_workers_of_a_rank_of_srun_are_its_share_of_the_cores_of_the_job(cores, tasks, node, workers, monkeypatch):
    """64 cores of the node belong to the job; srun may bind each task to its share of them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("SLURM_NODEID", str(node))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    assert dist.local_ranks() == {"8(x2),4": [8, 8, 4], "8": [8], "1": [1]}[tasks][node]
    assert default_workers() == workers


def test_rank_without_local_rank_is_refused_on_gpus(cuda, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"LOCAL_RANK\b"):
        dist.choose_device("cuda", 2, 0)


NCCL = """
import sys, time
import torch.distributed as torch_dist
import main_pretrain, util.checkpoint.saver as saver, util.run as run
from util.args import run_main

real, init_world = torch_dist.all_gather_object, run.init_world
# NCCL waits for a rank that has ended, gloo does not
torch_dist.all_gather_object = lambda values, value, group=None: real(values, value, group) if group else time.sleep(600)
run.init_world = lambda *args: init_world(*args)._replace(control=torch_dist.new_group(backend="gloo"))
main_pretrain.train_one_epoch = lambda *args: time.sleep(600)
def fail(*_):
    raise OSError("config.json: planted")
if sys.argv[1] == "fail":
    saver.write_config = fail
sys.argv = ["main_pretrain.py", *sys.argv[2:]]
run_main(main_pretrain.main)
"""


@pytest.mark.parametrize(("cause", "line"), [("folder", "--resume none: "), ("fail", "config.json")])
def test_an_error_of_rank_0_alone_ends_all_ranks_where_the_default_group_would_wait(cause, line, photos, tmp_path):
    folder = tmp_path / "run"
    if cause == "folder":
        pretrain(photos, folder, "--epochs", 1, "--warmup_epochs", 0)
    words = [*PRETRAIN, "--batch_size", 4, "--image_every", 0, "--data_path", photos, "--output_dir", folder]
    (zero, _, error), (one, _, other) = ranks(2, "-c", NCCL, cause, *words, "--resume", "none")
    assert (zero, one) == (1, 1), (error, other)
    assert line in error
    assert re.search("another rank .*--timeout_minutes", other)


def test_nccl_waits_longer_than_gloo(monkeypatch):
    monkeypatch.setattr(dist, "torch_dist", torch_dist := MagicMock())
    monkeypatch.setattr(dist, "rank_from_env", lambda: (1, 2, 1))
    monkeypatch.setattr(dist, "choose_device", lambda *_: torch.device("cuda", 1))
    monkeypatch.setattr(dist, "check_precision", lambda *_: None)
    monkeypatch.setattr(dist, "rendezvous_store", lambda *_: None)
    world = init_world("cuda", "bf16", timeout_minutes=30)
    assert torch_dist.init_process_group.call_args.kwargs["timeout"] == timedelta(minutes=60)
    assert torch_dist.new_group.call_args.kwargs == {"backend": "gloo", "timeout": timedelta(minutes=30)}
    world.gather("x")
    assert torch_dist.all_gather_object.call_args.kwargs["group"] == torch_dist.new_group.return_value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "[1] NCCL error: remote process exited or there was a network error\nLast error:\nx",
            "another rank .*--timeout_minutes.*network",
        ),
        (
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
            "another rank .*--timeout_minutes.*operation timeout",
        ),
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer",
            "another rank .*--timeout_minutes.*closed by peer",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage, NCCL version 2.27\nncclInvalidUsage: wrong.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000",
            "^NCCL .*Duplicate GPU .*rank 1 and rank 0",
        ),
        (
            "The server socket has failed to listen; port: 2901, EADDRINUSE, address already in use",
            "MASTER_PORT 2901 .*used",
        ),
    ],
)
def test_errors_of_other_ranks_and_of_nccl_are_distinguished(error, line, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "2901")
    assert re.search(line, explain_error(RuntimeError(error)))
