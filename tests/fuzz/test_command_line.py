"""The short form of `tests/fuzz/command_line.py`."""

from __future__ import annotations

import command_line
import pytest

pytest.importorskip("PIL.Image", reason="Pillow not installed")


def test_hostile_arguments_end_in_one_sentence():
    report = command_line.fuzz(calls=100, seed=1)
    assert not report.faults
    assert report.calls >= 100
    # Neither all refused nor all taken.
    assert command_line.codes()[0] > 10
    assert command_line.codes()[2] > 10
