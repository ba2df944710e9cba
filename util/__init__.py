"""Everything the scripts share, one room per subject.

args           The command line: recipes, the flags that mains share, and the one line that a user's mistake deserves.
cache          Build and verify packed caches of resized images: `python -m util.cache build | verify`.
convert        Convert checkpoints between repositories: `python -m util.convert IN OUT`.
crop           SimpleResizedCrop, the crop of PixMIM: resize the short side, crop a window at most 4 pixels out of it, flip.
dist           Who else takes part in this run: rank, number of ranks, device.
files          Files that are there as a whole or not at all, whenever the process or the machine dies, and what tells that they still are.
log            What a run tells: lines or a progress bar, log.jsonl, TensorBoard. Only the rank that leads writes.
lr_sched       The learning rate as a pure function of progress.
meters         Speed, memory and losses of a run between two log lines.
rng            Counter-based randomness: every draw is a function of (seed, epoch, sample index) or of (seed, step, rank).
run            From arguments to a run: the ranks joined, the folder prepared, the configuration written.
checkpoint/    Saving, resuming and stopping runs.
data/          From --data_path to batches on the device.
evaluate/      What pre-trained encoders are worth.
formats/       Weight files of this project and of other repositories.
plots/         Image grids and charts.
"""
