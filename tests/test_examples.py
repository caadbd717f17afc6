"""The examples run, and what they train gets better."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["sinusoid", "learned_rates"])
def test_example_lowers_its_loss(name: str) -> None:
    first, last = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](400)
    assert last < 0.9 * first


@pytest.mark.parametrize("head", ["ridge", "logistic", "prototypes"])
def test_closed_form_heads_lower_their_loss(head: str) -> None:
    first, last = runpy.run_path(str(EXAMPLES / "closed_form_heads.py"))["main"](head, 200)
    assert last < 0.9 * first
