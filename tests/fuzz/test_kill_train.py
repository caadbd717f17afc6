"""The short form of `tests/fuzz/kill_train.py`."""

from __future__ import annotations

import os

import kill_train
import pytest

from fastmeta.cli.train import plots


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(monkeypatch):
    monkeypatch.setattr(plots, "_figure", lambda *given, **options: None)
    tally = kill_train.run(trials=3, seed=1, start=kill_train.by_fork)
    assert not tally.faults
    assert tally.trials == 3
    assert tally.kills >= 3
