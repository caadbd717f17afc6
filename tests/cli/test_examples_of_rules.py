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
