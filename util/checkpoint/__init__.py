"""Saving, resuming and stopping runs.

resume         Finding the checkpoint to resume from, and checking that it fits the run.
saver          Saving, resuming and stopping a run.
state          Checkpoint files with a checksum.
stop           Stop requests: signals, and agreement of the ranks.
writer         The thread that writes checkpoints while training continues.
"""
