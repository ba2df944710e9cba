"""Scripts of docs/slurm.md, run with mock srun and scontrol commands."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PRETRAIN, ROOT, assert_same_run, ranks, weights

SRUN = """#!/bin/bash
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait $task || status=$?; done
exit $status
"""
EPOCHS = ["--epochs", "20", "--batch_size", "2", "--warmup_epochs", "1", "--image_every", "0", "--save_minutes", "10"]


def script(launcher: str, flags: list) -> str:
    """The script of docs/slurm.md with this launcher, changed to two ranks and these flags."""
    (found,) = (
        text
        for text in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/slurm.md").read_text(), re.S)
        if f"\n{launcher}" in text
    )
    text = re.sub(
        r"@recipes/\S+ --data_path \S+ --output_dir \S+ --effective_batch 4096", " ".join(map(str, flags)), found
    )
    assert text != found
    return text.replace("--nproc_per_node=8", "--nproc_per_node=2")


@pytest.mark.slow  # six interpreters
@pytest.mark.parametrize(("launcher", "receiver"), [("srun", "tasks"), (".venv/bin/torchrun", "script")])
def test_job_at_its_time_limit_is_requeued_and_equals_an_uninterrupted_run(launcher, receiver, photos, tmp_path):
    flags = [*PRETRAIN, *EPOCHS, "--effective_batch", 4, "--data_path", photos, "--output_dir", tmp_path / "run"]
    job, commands = tmp_path / "job.sh", tmp_path / "bin"
    commands.mkdir()
    job.write_text(script(launcher, flags))
    for name, text in {
        "srun": SRUN,
        "scontrol": f"#!/bin/bash\necho $* > {tmp_path}/requeued",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "OMP_NUM_THREADS": "1",
    }

    def submit(**more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", job], cwd=ROOT, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = submit()
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and '"step": 6,' in log.read_text()) and first.poll() is None:
        time.sleep(0.1)
    tasks = ["pkill", "-USR1", "-f", rf"^\.venv/bin/python main_pretrain\.py .*{tmp_path}"]
    subprocess.run(tasks if receiver == "tasks" else ["kill", "-USR1", str(first.pid)], check=True)
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 75, output
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    progress = weights(tmp_path / "run")["progress"]
    assert 6 <= progress["epoch"] * 4 + progress["step"] < 80
    assert ", saved; " in output
    restarted = submit(SLURM_RESTART_COUNT="1")
    output, _ = restarted.communicate(timeout=200)
    assert restarted.returncode == 0, output
    assert "resumed from" in output
    if not (uninterrupted := tmp_path.parent / "uninterrupted").exists():
        plain = [*flags[:-1], Path(uninterrupted)]
        assert [status for status, _, _ in ranks(2, "main_pretrain.py", *plain)] == [0, 0]
    assert_same_run(uninterrupted, tmp_path / "run")
