"""The examples of update rules show what they say they show."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def _example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_metagradients_find_wrong_labels_and_leaving_them_out_helps(tmp_path: Path) -> None:
    found = _example("data_weights")["main"](out=tmp_path)
    assert found.auc > 0.95
    nothing, worst, at_random, _ = (loss for loss, _ in found.test.values())
    assert worst < 0.85 * nothing
    assert at_random > 0.95 * nothing
    assert {path.name for path in tmp_path.iterdir()} == {"weights.csv", "weights.png"}


def test_metagradient_of_data_weights_is_that_of_autograd() -> None:
    *_, difference = _example("data_weights")["compare"](steps=40)
    assert difference < 1e-4


def test_lstm_beats_tuned_adam_on_new_tasks(tmp_path: Path) -> None:
    lstm, adam = _example("learned_optimizer")["main"](50, restarts=1, count=16, seed=1, out=tmp_path)
    assert lstm < 0.97 * adam
    assert {path.name for path in tmp_path.iterdir()} == {"losses.csv", "losses.png"}


def test_learned_schedule_beats_the_best_constant_rate(tmp_path: Path) -> None:
    found = _example("learned_schedule")["main"](100, seeds=1, count=8, out=tmp_path)
    assert found["learned"].item() < 0.85 * found["constant"].item()
    assert found["learned"].item() < 1.02 * min(found["cosine"].item(), found["linear"].item())
    assert {path.name for path in tmp_path.iterdir()} == {"rates.csv", "rates.png"}


def test_learned_strengths_of_augmentation_are_near_the_best_of_a_grid(tmp_path: Path) -> None:
    grid = {"shifts": (0.0, 0.2, 0.4), "warps": (0.0, 0.08, 0.16)}
    found = _example("learned_augmentation")["main"](20, out=tmp_path, **grid)
    assert found.validation["learned"] < 1.03 * found.validation["grid"]
    assert found.validation["learned"] < 0.97 * found.validation["none"]
    assert found.test["learned"].mean() < 0.95 * found.test["none"].mean()
    assert {path.name for path in tmp_path.iterdir()} == {"strengths.csv", "strengths.png"}


def test_learned_weights_of_sources_lower_the_loss_on_other_docstrings(tmp_path: Path) -> None:
    found = _example("character_model")["main"](60, rounds=5, out=tmp_path, repeats=2)
    assert found.weights["docstrings"] > 2
    assert max(found.weights["backwards"], found.weights["shuffled"]) < 0.3
    equal, learned, alone = found.losses.values()
    assert learned < equal - 0.1
    assert learned < alone + 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"weights.csv", "weights.png"}


def test_checkpoints_give_the_metagradient_of_sources_that_recomputing_gives() -> None:
    seconds, difference = _example("character_model")["compare"](steps=12)
    assert {"recompute", "checkpoint"} < {*seconds}
    assert difference < 1e-4
