"""A few rounds of tests/soak_files.py: damaged files and full disks give the right result or one line that names the file."""

from collections import Counter

import pytest

from tests.soak_files import outcome, soak


@pytest.mark.slow
def test_damaged_files_and_full_disks_give_a_one_line_error_or_the_correct_result(photos, tmp_path):
    counts = sum(soak(photos, 10, 3, tmp_path).values(), Counter())
    assert counts["right"] + counts["line"] == counts.total() == 10


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (None, "", "hang"),
        (-9, "", "traceback"),
        (1, "Traceback (most recent call last):\nx: error: a.npy", "traceback"),
        (0, "left out: a.npy", "right"),
        (1, "x: error: a.npy is damaged", "line"),
        (1, "x: error: it is damaged", "line without the file"),
        (1, "x: error: a.npy\nx: error: a.npy", "line without the file"),
    ],
)
def test_command_outcomes_are_classified(status, text, found):
    assert outcome(status, text, "a.npy") == found
