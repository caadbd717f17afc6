"""`bench/sinusoid.py`: rows beside the reference, resumed runs, tasks that diverge."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner, Result
from training import checkpoint, rows

from fastmeta.cli.train import reported
from fastmeta.cli.train.sinusoid import Errors

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("matplotlib", reason="matplotlib not installed")

SMALL = "--iterations 4 --tasks 3 --test-tasks 6".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    monkeypatch.delitem(sys.modules, "sinusoid", raising=False)
    return importlib.import_module("sinusoid")


def run(bench: ModuleType, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(bench.main, [*SMALL, "--out", str(out), *arguments])


def test_writes_mean_median_and_reference(bench: ModuleType, tmp_path: Path) -> None:
    done = run(bench, tmp_path)
    assert done.exit_code == 0, done.output
    found = rows(tmp_path / "sinusoid.csv")
    assert [(row["setting"], row["seed"], row["steps"]) for row in found] == [
        (name, seed, steps)
        for name in ("MAML, 1 step", "MAML, 5 steps", "FOMAML")
        for seed in "01"
        for steps in ("0", "1", "5", "10")
    ]
    assert all(float(row["mse_mean"]) > 0 and float(row["mse_median"]) > 0 for row in found)
    assert [row["reference"] for row in found if row["setting"] == "FOMAML"] == [
        "4.39",
        "0.545",
        "0.195",
        "0.152",
    ] * 2
    assert (tmp_path / "sinusoid.png").stat().st_size > 0
    assert "4.39" in done.output


def test_all_reported_settings_can_be_run(bench: ModuleType) -> None:
    assert {*bench.SETTINGS.values()} == {*reported.SINUSOID}


def test_resumed_equals_uninterrupted(bench: ModuleType, tmp_path: Path) -> None:
    only = ("--setting", "FOMAML", "--seeds", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(bench, whole, *only).exit_code == 0
    assert run(bench, parts, *only, "--iterations", "2").exit_code == 0
    assert run(bench, parts, *only, "--resume").exit_code == 0
    a, b = checkpoint(whole / "FOMAML-0")["maml"], checkpoint(parts / "FOMAML-0")["maml"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(whole / "sinusoid.csv") == rows(parts / "sinusoid.csv")


def test_test_tasks_that_diverge_are_counted_and_named(bench: ModuleType) -> None:
    mse = torch.ones(11, 4)
    mse[10, 1], mse[10, 3] = 1e6, torch.nan
    outcome = bench.Outcome("FOMAML", 0, 4, 0.0, Errors(mse))
    last = dict(zip(bench.COLUMNS, [*outcome.rows()][-1], strict=True))
    assert (last["steps"], last["mse_median"], last["diverged"], last["diverged_tasks"]) == (
        10,
        1.0,
        2,
        "1 3",
    )
    assert math.isnan(last["mse_mean"])
    assert last["mse_mean_of_rest"] == 1.0
    cells = {column.header: [*column.cells] for column in bench.table([outcome, outcome], "").columns}
    assert cells["diverged"] == ["0", "0", "0", "4"]
    assert cells["mean"] == ["1.000 ± 0.000"] * 3 + ["nan"]
    assert cells["without diverged"] == ["1.000 ± 0.000"] * 4


def test_a_training_that_diverges_fails_after_the_others(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = bench.experiment

    def diverges(setting: reported.Setting, *arguments: object, **options: object) -> object:
        if setting.first_order:
            return fine(setting, *arguments, **options)
        raise click.ClickException("2 of 3 tasks diverged")

    monkeypatch.setattr(bench, "experiment", diverges)
    done = run(bench, tmp_path, "--seeds", "1")
    assert done.exit_code == 1
    assert "MAML, 5 steps, seed 0: 2 of 3 tasks diverged" in done.output
    assert {row["setting"] for row in rows(tmp_path / "sinusoid.csv")} == {"FOMAML"}
