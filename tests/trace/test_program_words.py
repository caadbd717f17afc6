"""Whatever numbers the machine is given, it refuses them or stays inside of its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.programs import Traced

from fastmeta import _C

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_numbers_make_the_machine_leave_its_memory() -> None:
    """Words of a program changed at random: refused, or run inside of the spaces."""
    generator = np.random.default_rng(0)
    traced = Traced(lambda a, b: (a @ b).tanh().sum(1) + a.amax(1), torch.randn(5, 7), torch.randn(7, 5))
    given = [torch.randn(3, 5, 7), torch.randn(3, 7, 5)]
    made = 0
    for lanes in (False, True):
        good = traced.description(lanes)
        for _ in range(1500):
            words = np.frombuffer(good["query"]["words"], np.int64).copy()
            for _ in range(generator.integers(1, 4)):
                at = generator.integers(len(words))
                words[at] = generator.choice(
                    [-1, 0, 1, 2, 7, 64, words[at] + 1, -words[at], 1 << 20, 1 << 45, -(1 << 62)]
                )
            bad = {**good, "query": {**good["query"], "words": words.tobytes()}}
            try:
                machine = _C.Machine(bad)
            except ValueError:
                continue
            made += 1
            output = torch.zeros(3, 5)
            machine.run(3, 1, *[[]] * 10, given, [], [None, None, None, None, output], [], False)
    assert made > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"theta": "x"}, "theta"),
        ({"query": None, "query_loss": True}, "no query set"),
        ({"steps": 2}, "no support set"),
        ({"momentum": float("nan")}, "momentum"),
        ({"adapted": [(0, 5, False, False, False, False)]}, "outside of theta"),
        ({"others": [(0, 1 << 40, False, -1, -1)]}, "cannot be"),
    ],
)
def test_rejects_descriptions(change: dict[str, Any], message: str) -> None:
    good = Traced(torch.tanh, torch.randn(3)).description(False)
    with pytest.raises((ValueError, TypeError), match=message):
        _C.Machine({**good, **change})
    with pytest.raises(ValueError, match="lacks"):
        _C.Machine({})
    with pytest.raises(TypeError):
        _C.Machine.run(_C.Machine.__new__(_C.Machine, good))
