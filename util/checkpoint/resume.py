"""Finding the checkpoint to resume from, and checking that it fits the run."""

from pathlib import Path
from typing import NamedTuple

from util.checkpoint.state import OLDER, read_checkpoint
from util.run import Run, args_to_dict

# Flags that a resumed run may change: they alter where and how fast, not what is computed.
FREE = {
    "data_path", "output_dir", "resume", "overwrite", "num_workers", "device", "compile", "grad_checkpointing", "batch_size", "accum_iter",
    "effective_batch", "log_every", "save_every", "save_minutes", "on_full_disk", "image_every", "knn_every", "knn_path", "eval",
    "on_bad_image", "max_skipped", "replay", "timeout_minutes",
}  # fmt: skip


class Progress(NamedTuple):
    """How far a run has come."""

    epoch: int  # that is trained, from 0
    step: int  # steps done in it; after the last its evaluation follows
    losses: tuple[float, ...] = ()  # of the steps since the last log line, mean over the ranks; nan = skipped
    skipped: int = 0  # steps in a row without an update, up to that log line

    def within(self, epoch: int) -> "Progress":
        """Where to begin in this epoch."""
        return self if epoch == self.epoch else Progress(epoch, 0, (), self.skipped)


def candidates(run: Run) -> list[Path]:
    """What --resume may mean, the best first."""
    folder, asked = run.folder, run.args.resume
    if asked == "none":
        return []
    if asked == "auto":
        kept = sorted(folder.glob("epoch-*.pth"), reverse=True)
        return [path for path in (folder / "last.pth", folder / "previous.pth", *kept) if path.exists()]
    if not Path(asked).is_file():
        raise FileNotFoundError(f"--resume {asked}: there is no such file (auto and none are the other choices)")
    return [Path(asked)]


def newest(run: Run, steps: int) -> tuple[Path, dict, Progress] | None:
    """(file, content, progress) of the newest checkpoint that is whole, and old enough for --replay; None for a new run."""
    found = candidates(run)
    damaged = []
    for path in found:
        try:
            content = read_checkpoint(path)
            if "progress" not in content:
                raise ValueError(f"{path} holds weights, not a run")
        except ValueError as error:
            damaged.append(path)
            run.log.info(f"warning: {error}; the checkpoint before it is tried")
            continue
        progress = Progress(**{**content["progress"], "losses": tuple(content["progress"].get("losses", ()))})
        if content["format"] == OLDER:  # saved after an epoch's evaluation, which is done again now
            progress = Progress(progress.epoch - 1, steps)
        if run.args.replay and progress.epoch * steps + progress.step >= run.args.replay:
            continue
        return path, content, progress
    if damaged:
        names = " ".join(path.name for path in damaged)
        raise ValueError(
            f"--resume {run.args.resume}: damaged or foreign in {damaged[0].parent}: {names}; there is nothing else to go on from; "
            "--resume FILE takes a copy, --resume none --overwrite starts anew"
        )
    return None


def refuse_other(path: Path, content: dict, run: Run, data: list, steps: int) -> None:
    """ValueError for a checkpoint of a run that computes something else."""
    before, now = content["args"], args_to_dict(run.args)
    for flag in sorted((set(before) & set(now)) - FREE):
        if before[flag] != now[flag]:
            raise ValueError(
                f"{path} was trained with --{flag} {before[flag]}, not {now[flag]}; "
                "give the same flag, or another --output_dir for a new run"
            )
    if content["batch"] != run.batch:
        raise ValueError(
            f"{path} was trained with {content['batch']} samples a step, not {run.batch} (--batch_size x --accum_iter x ranks); "
            f"--effective_batch {content['batch']} keeps it on any number of ranks"
        )
    if content["origin"] != run.origin:
        raise ValueError(f"{path} began with other weights than --checkpoint has now; choose another --output_dir")
    (count, names), (count_now, names_now) = content.get("data", data), data
    if count != count_now or content.get("steps", steps) != steps:
        raise ValueError(
            f"{path} was trained on {count} images, --data_path {run.args.data_path} has {count_now} now; for one that is lost "
            "put an empty file of its name there (--on_bad_image skip)"
        )
    if names and names_now and names != names_now:
        raise ValueError(
            f"{path} was trained on as many images of other names than --data_path {run.args.data_path} has now"
        )
