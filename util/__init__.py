"""Modules and packages that the scripts share.

args           The command line: recipes, the flags that the scripts share, and errors as one line.
cache          Build and verify packed caches of resized images: `python -m util.cache build | verify`.
convert        Convert checkpoints between repositories: `python -m util.convert IN OUT`.
crop           SimpleResizedCrop, the crop of PixMIM: resize the short side, pad by 4 reflected pixels, crop a random window, flip.
dist           Distributed set-up: rank, number of ranks and device, from torchrun, srun or a single process.
files          Atomic file writes, and checksums that detect damaged files.
log            Log of a run: lines or a progress bar, log.jsonl, TensorBoard. Only rank 0 writes.
lr_sched       Schedules over the epochs: learning rate, image size.
meters         Speed, memory and losses of a run: collected at every step, logged every --log_every steps.
report         One table of all recorded results: `python -m util.report OUTPUT...`.
rng            Counter-based random numbers: functions of (seed, epoch, sample index) or of (seed, step, rank).
run            A run: ranks joined, output folder prepared, configuration recorded.
checkpoint/    Saving, resuming and stopping runs.
data/          From --data_path to batches on the device.
evaluate/      Evaluation of pre-trained encoders.
formats/       Weight files of this project and of other repositories.
plots/         Image grids and charts.
"""
