"""`bench/algorithms.py`: all rows, their order of magnitude on real drawings, and tasks that
diverge."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from omniglot_files import official_root
from training import rows

import fastmeta as fm
from fastmeta.data import Episode

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("PIL.Image", reason="Pillow not installed")
pytest.importorskip("matplotlib", reason="matplotlib not installed")

SMALL = "--iterations 2 --width 4 --ways 3 --query 2 --tasks 2 --test-tasks 5 --test-query 2".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command's module; its neighbour is imported as by a script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    for name in ("algorithms", "few_shot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("algorithms")


def run(bench: ModuleType, data: Path, out: Path, *arguments: str) -> str:
    done = CliRunner().invoke(bench.main, [*SMALL, "--data", str(data), "--out", str(out), *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def only(*names: str) -> list[str]:
    return [part for name in names for part in ("--algorithm", name)]


def test_writes_a_row_for_every_algorithm(bench: ModuleType, drawings: Path, tmp_path: Path) -> None:
    output = run(bench, drawings, tmp_path)
    found = rows(tmp_path / "algorithms.csv")
    assert [row["algorithm"] for row in found] == [*bench.ALGORITHMS]
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["interval95"]) >= 0 for row in found)
    assert all((row["iterations"], row["test_tasks"], row["diverged"]) == ("2", "5", "0") for row in found)
    assert {row["tested_on"] for row in found} == {"Balinese, Early_Aramaic, Korean"}
    assert all(name in output for name in bench.ALGORITHMS)
    assert (tmp_path / "algorithms.png").stat().st_size > 0


def test_every_algorithm_of_the_package_has_a_row(bench: ModuleType) -> None:
    classes = {name for name in fm.algorithms.__all__ if not name.endswith("Loss") and name != "Context"}
    heads = {name for name in fm.heads.__all__ if name.islower()}
    names = {name.replace("-", "").replace("++", "PlusPlus").lower() for name in bench.ALGORITHMS}
    assert names == {name.lower() for name in classes | heads}


def test_same_weights_and_episodes_give_the_same_rows(
    bench: ModuleType, drawings: Path, tmp_path: Path
) -> None:
    names = only("MAML", "Reptile", "ridge")
    for part in ("one", "other"):
        run(bench, drawings, tmp_path / part, *names, "--seeds", "2")
    one, other = (rows(tmp_path / part / "algorithms.csv") for part in ("one", "other"))
    assert one == other
    assert [(row["algorithm"], row["seed"]) for row in one] == [
        (name, seed) for seed in "01" for name in ("MAML", "Reptile", "ridge")
    ]
    assert one[:3] != one[3:]


def test_validation_keeps_to_the_training_set(bench: ModuleType, drawings: Path, tmp_path: Path) -> None:
    train, held = bench.split(drawings, validation=True)
    assert {name.partition("/")[0] for name in train.classes} == {"Sanskrit"}
    assert {name.partition("/")[0] for name in held.classes} == {"Greek", "Tagalog"}
    run(bench, drawings, tmp_path, *only("ANIL"), "--validation")
    assert rows(tmp_path / "algorithms.csv")[0]["tested_on"] == "Greek, Tagalog"


def test_a_training_that_diverges_is_named(
    bench: ModuleType, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_shot = sys.modules["few_shot"]
    monkeypatch.setitem(bench.ALGORITHMS, "MAML", few_shot._plain(fm.MAML, "", 3e38, 1, 1))
    output = run(bench, drawings, tmp_path, *only("MAML", "FOMAML"))
    diverged, other = rows(tmp_path / "algorithms.csv")
    assert (diverged["accuracy"], diverged["iterations"]) == ("", "0")
    assert "iteration 1: MAML: 2 of 2 tasks diverged" in diverged["notes"]
    assert "training ended at iteration 1" in output
    assert 0 <= float(other["accuracy"]) <= 1


def test_a_test_task_that_diverges_is_counted_named_and_wrong(bench: ModuleType) -> None:
    class Fake:
        def predict(self, episode: Episode) -> torch.Tensor:
            logits = torch.nn.functional.one_hot(episode.query_y, 3).float()  # everything right
            logits[episode.support_x[:, 0, 0] == 1, -1] = math.nan
            if (episode.support_x == 2).any():
                raise FloatingPointError("refused")
            return logits

    kinds = torch.tensor([0.0, 1.0, 0.0, 2.0])  # task 1 has NaN in one logit, task 3 is refused
    y = torch.arange(3).expand(4, 3)
    episode = Episode(kinds[:, None, None].expand(4, 3, 1), y, torch.zeros(4, 3, 1), y)
    outcome = bench.Outcome("MAML", 0)
    bench.evaluate(outcome, Fake(), [episode], 4)
    assert outcome.scores.tolist() == [1, 0, 1, 0]
    assert outcome.diverged == [1, 3]
    assert outcome.notes == ["2 of 4 test tasks diverged: tasks 1, 3"]
    assert outcome.row()[6:9] == [4, 2, "1 3"]


def test_systems_that_are_not_solved_are_counted(bench: ModuleType, drawings: Path, tmp_path: Path) -> None:
    learner = bench.ALGORITHMS["iMAML"].learner(bench.Budget(3, 4, 2, 0))
    learner.module.cg_tolerance, learner.module.cg_steps = 1e-6, 1
    data = fm.data.Episodes(
        fm.data.Omniglot.small_split(drawings)[0], ways=3, shots=1, query=2, tasks=2, iterations=2, seed=0
    )
    outcome = bench.Outcome("iMAML", 0)
    bench.train(outcome, learner, data)
    assert outcome.notes == ["4 of 4 linear systems of the training not solved to 1e-06"]


def test_learns_real_drawings(bench: ModuleType, tmp_path: Path) -> None:
    """Chance is 20 %, and 20 % is what a training that does nothing, or swaps labels, would
    leave."""
    options = "--iterations 40 --width 16 --ways 5 --query 5 --tasks 8 --test-tasks 60 --test-query 5".split()
    names = ("MAML", "prototypes")
    run(bench, official_root(), tmp_path, *options, *only(*names))
    with (tmp_path / "algorithms.csv").open(newline="") as file:
        found = {row["algorithm"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    assert found.keys() == {*names}
    assert min(found.values()) > 0.35, found
