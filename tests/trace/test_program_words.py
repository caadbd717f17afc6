"""Whatever numbers the machine is given, it refuses them or stays inside of its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.programs import Traced

from fastmeta import _C
from fastmeta.backends._native_rules import described_rule
from fastmeta.trace.ir import Space

INTS = int(Space.INTS)

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
            others = [None, None, None, None, output, None, None]
            machine.run(3, 1, *[[]] * 10, given, [], [], [], others, [], False)
    assert made > 50


#: An adapted parameter of four rows of four numbers, of which a task needs two.
TABLE: dict[str, Any] = {"theta": 32, "adapted": [(0, 8, *[False] * 4)], "tables": [(0, 4, 4, 2)]}


#: A program that does nothing.
NOTHING = {"sizes": np.zeros(len(Space), np.int64).tobytes(), "words": b"", "stages": b""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"theta": "x"}, "theta"),
        ({"query": None, "query_loss": True}, "no query set"),
        ({"steps": 2}, "no support set"),
        ({"rule": {**described_rule(None), "kind": "sgdd"}}, "no update rule"),
        ({"rule": {**described_rule(None), "numbers": [float("nan")] * 12}}, "finite"),
        ({"rule": {**described_rule(None), "learned": [True] * 12}}, "not on"),
        ({"rule": {**described_rule(None), "on": [True]}}, "on"),
        ({"schedule": [(0, 0, 0)]}, "all steps"),
        ({"schedule": [(7, 0, 0)]}, "no action"),
        ({"support_step_weights": [1.0]}, "one for each step"),
        ({"support_step_weights": [float("inf")]}, "finite"),
        ({"adapted": [(0, 5, False, False, False, False)]}, "outside of theta"),
        ({"others": [(0, 1 << 40, False, -1, -1, -1)]}, "cannot be"),
        ({"rule_fixed": 1}, "cannot be"),
        ({"traced_rule": {"entries": [(0, 4, False, -1)]}}, "larger than its memory"),
        ({"traced_rule": {**NOTHING, "entries": []}, "gradient": True}, "back"),
        ({"traced_rule": {**NOTHING, "entries": [(0, 4, False, -1)]}}, "outside"),
        ({"tables": [(0, 4, 4, 2)]}, "of no adapted parameter"),
        ({**TABLE, "tables": [(0, 4, 4, 3)]}, "a size that cannot be"),
        ({**TABLE, "tables": [(0, 1, 4, 2)]}, "cannot be"),
        ({**TABLE, "tables": [(0, 4, 4, 2)] * 2}, "twice"),
        ({**TABLE, "adapted": [(0, 8, False, True, False, False)]}, "rate for each element"),
        ({**TABLE, "adapted": [(0, 8, *[False] * 4), (16, 8, *[False] * 4)]}, "come last"),
        ({**TABLE, "per_step": True}, "set for each step"),
    ],
)
def test_rejects_descriptions(change: dict[str, Any], message: str) -> None:
    good = Traced(torch.tanh, torch.randn(3)).description(False)
    if "traced_rule" in change:
        change = {**change, "traced_rule": {**good["query"], **change["traced_rule"]}}
    with pytest.raises((ValueError, TypeError), match=message):
        _C.Machine({**good, **change})
    with pytest.raises(ValueError, match="lacks"):
        _C.Machine({})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, False, 0, []), "of no table"),
        ((0, False, 15, [0, 1]), "outside of its space"),
        ((0, False, 0, [16]), "outside of its space"),
        ((0, False, 0, [-1]), "outside of its space"),
    ],
)
def test_rejects_indices_of_rows(row: tuple[int, bool, int, list[int]], message: str) -> None:
    good = Traced(torch.tanh, torch.randn(3)).description(False)
    sizes = np.frombuffer(good["query"]["sizes"], np.int64).copy()
    sizes[INTS] = 16
    query = {
        **good["query"],
        "sizes": sizes.tobytes(),
        "numbered": [(*row[:3], np.array(row[3], np.int64).tobytes())],
    }
    with pytest.raises(ValueError, match=message):
        _C.Machine({**good, **TABLE, "query": query})


@pytest.mark.parametrize("lanes", [False, True])
def test_more_rows_than_there_is_room_for_are_an_error(lanes: bool) -> None:
    good = Traced(torch.tanh, torch.randn(3)).description(lanes)
    sizes = np.frombuffer(good["query"]["sizes"], np.int64).copy()
    sizes[INTS] = 32
    places = np.arange(3)
    query = {
        **good["query"],
        "sizes": sizes.tobytes(),
        "numbered": [(0, False, 16, places.tobytes())],
        "entries": [*good["query"]["entries"], (0, 3, True, -1)],
    }
    machine = _C.Machine({**good, **TABLE, "query": query})
    table, rate = torch.randn(4, 4), torch.tensor(0.1)
    for ids, outcome in (([0, 1, 0], 0), ([3, 1, 2], 1)):
        given = [torch.randn(2, 3), torch.tensor([ids, ids])]
        output = torch.zeros(2, 3)
        lists = [[table], [rate], [], [], [], [], [], [], [], [], given, [], [], []]
        assert machine.run(2, 1, *lists, [None, None, None, None, output, None, None], [], True) == outcome
    with pytest.raises(TypeError):
        _C.Machine.run(_C.Machine.__new__(_C.Machine, good))
