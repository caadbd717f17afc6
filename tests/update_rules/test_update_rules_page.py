"""The code of docs/update-rules.md runs, and its tables hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastmeta as fm
from fastmeta.backends._checkpoints import advances, slots_for

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")
PAGE = (Path(__file__).parents[2] / "docs" / "update-rules.md").read_text()


def test_blocks_run() -> None:
    names: dict[str, object] = {"print": lambda *said: [*map(str, said)]}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(block, names)
    maml = names["maml"]
    assert isinstance(maml, fm.MAML)
    assert all(value.grad is not None for value in maml.parameters())
    assert len(blocks) == 5


def test_table_of_checkpoints_holds() -> None:
    rows = re.findall(
        r"^\| ([\d,]+)(, limited to \d+ copies)? \| (\d+) \| ([\d.]+) times \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 4
    for steps, limited, copies, times in rows:
        count = int(steps.replace(",", ""))
        assert slots_for(count, 1, int(copies) if limited else None) == int(copies)
        assert f"{1 + advances(count, int(copies)) / count:.1f}" == times


def test_table_of_rules_has_all() -> None:
    rules = set(re.findall(r"^\| `fm\.(\w+)` \|", PAGE, re.MULTILINE))
    assert rules == {"SGD", "Adam", "AdamW", "RMSProp", "Adagrad", "Lion", "CustomRule"}
