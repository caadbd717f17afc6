"""The short form of `tests/fuzz/command_line.py`."""

from __future__ import annotations

import json

import pytest
from commands import python

pytest.importorskip("PIL.Image", reason="Pillow not installed")


def test_hostile_arguments_end_in_one_sentence():
    script = """
import json
import command_line

report = command_line.fuzz(calls=100, seed=1)
print(json.dumps([report.calls, report.faults, [command_line.codes()[code] for code in (0, 2)]]))
"""
    calls, faults, (taken, refused) = json.loads(python("-c", script).splitlines()[-1])
    assert not faults
    assert calls >= 100
    # Neither all refused nor all taken.
    assert taken > 10
    assert refused > 10
