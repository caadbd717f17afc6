"""`bench/long_unroll.py`: every way gives the same gradient, and says what it keeps."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from training import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command's module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("long_unroll")


@pytest.fixture
def in_this_process(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a process of its own is that of its imports."""
    monkeypatch.setattr(bench, "measure_alone", bench.measure)


@pytest.mark.usefixtures("in_this_process")
def test_all_ways_give_one_gradient_and_say_what_they_keep(bench: ModuleType, tmp_path: Path) -> None:
    done = CliRunner().invoke(bench.main, ["--steps", "150", "--repeats", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = {row["way"]: row for row in rows(tmp_path / "long_unroll.csv")}
    assert [*found] == [*bench.WAYS]
    assert all(float(row["difference"]) <= 1e-4 and float(row["median_s"]) > 0 for row in found.values())
    copies = {way: row["copies"] for way, row in found.items() if row["copies"]}
    torch_copies = {"recompute": "150", "checkpoint": "12", "checkpoint, 10 copies": "10"}
    assert copies == {**torch_copies, "recompute on cpu": "150", "checkpoint on cpu": "12"}
    runs = [float(found[way]["step_runs"]) for way in torch_copies]
    assert runs == sorted(runs)


@pytest.mark.usefixtures("in_this_process")
def test_a_gradient_that_differs_is_an_error(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = bench.gradient
    monkeypatch.setattr(
        bench, "gradient", lambda way, steps: right(way, steps) * (1.001 if way == "checkpoint" else 1)
    )
    options = ["--steps", "2", "--repeats", "1", "--way", "checkpoint", "--out", str(tmp_path)]
    assert CliRunner().invoke(bench.main, options).exit_code == 1


def test_a_run_is_made_in_a_process_of_its_own(bench: ModuleType, tmp_path: Path) -> None:
    bench.measure_alone("checkpoint", 4, tmp_path / "run.pt")
    seconds, _, gradient = torch.load(tmp_path / "run.pt")
    assert seconds > 0
    assert (gradient - bench.gradient("recompute", 4)).abs().max() < 1e-6
