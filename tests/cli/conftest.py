"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import sinusoid

from fastmeta.cli.train import plots


def _without_plots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plots, "_figure", lambda *given, **options: None)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run draws, which is most of what a short one takes."""
    _without_plots(monkeypatch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of nine iterations, and one that was stopped after four, with a checkpoint after three
    before it."""
    folder = tmp_path_factory.mktemp("runs")
    whole, begun = folder / "whole", folder / "begun"
    with pytest.MonkeyPatch.context() as patch:
        _without_plots(patch)
        assert sinusoid(whole, "--iterations", "9").exit_code == 0
        assert sinusoid(begun, "--iterations", "4").exit_code == 0
    return whole, begun
