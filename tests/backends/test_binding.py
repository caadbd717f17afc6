"""The extension trusts nothing: it refuses what does not fit, by name, and writes to nothing but
outputs."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmeta import _C
from fastmeta.backends._native_rules import described_rule
from fastmeta.layers.functions import FUNCTIONS
from fastmeta.layers.registry import KINDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
import binding
from running import fuzz

LOSS = {"kind": "mse", "sum": False, "normalise_sum": False, "class_indices": False}
LOSS |= {"beta": 1.0, "label_smoothing": 0.0, "ignore_index": -100}
OPTIONS = dict.fromkeys(("support_per_step", "wants_rates", "wants_support_x", "wants_query_x"), False)
OPTIONS |= dict.fromkeys(("second_order", "store", "gradient"), True)
OPTIONS |= {
    "steps": 1,
    "support": 2,
    "query": 2,
    "schedule": [],
    "support_step_weights": [],
    "rule": described_rule(None),
    "loss": LOSS,
    "query_loss": LOSS,
}
FLAGS = (True, False, False, True, False, False, False)
#: linear, relu, linear: [N, 3] -> [N, 2]
PLAN: dict[str, Any] = {
    "is_double": True,
    "values": [
        (1, 3, 1, 1, False, False),
        (1, 4, 1, 1, False, True),
        (1, 4, 1, 1, False, True),
        (1, 2, 1, 1, False, True),
    ],
    "layers": [
        ("linear", "", [], [0], 1, [0], {}),
        ("elementwise", "relu", [], [1], 2, [], {}),
        ("linear", "", [], [2], 3, [1], {}),
    ],
    "params": [(4, 3, 1, *FLAGS), (2, 4, 1, *FLAGS)],
    "output": 3,
    "options": OPTIONS,
}


def doubles(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def run_arguments() -> dict[str, Any]:
    weights = lambda: [doubles(4, 3), doubles(2, 4)]  # noqa: E731
    batch = lambda: [doubles(5, 2, 3), doubles(5, 2, 2), None, None, None, None, None]  # noqa: E731
    return {
        "tasks": 5,
        "threads": 1,
        "data": weights(),
        "rate": [doubles(), doubles()],
        "adapted_grad": [],
        "adapted": [],
        "grad": weights(),
        "grad_offsets": [],
        "rate_grad": [],
        "support": batch(),
        "query": batch(),
        "others": [None, None, doubles(5), doubles(), None, None, None],
        "step_weights": [],
        "poison": False,
    }


def run(plan: dict[str, Any] | None = None, **given: Any) -> int:
    return _C.Plan(**{**PLAN, **(plan or {})}).run(**{**run_arguments(), **given})


def options(**given: Any) -> dict[str, Any]:
    return {"options": {**OPTIONS, **given}}


def loss(**given: Any) -> dict[str, Any]:
    return options(query_loss={**LOSS, **given})


def item(field: str, i: int, part: int, value: Any) -> dict[str, Any]:
    items = [list(entry) for entry in PLAN[field]]
    items[i][part] = value
    return {field: [tuple(entry) for entry in items]}


WRONG_PLANS: dict[str, dict[str, Any]] = {
    "is_double": {"is_double": 1},
    "values[1].rows": item("values", 1, 0, -1),
    "values[1].cols": item("values", 1, 1, 2**40),
    "values[2].width": item("values", 2, 3, 0),
    "values[2].channels": item("values", 2, 4, 1),
    "values[2].from_params": item("values", 2, 5, False),
    "values[0].from_params": item("values", 0, 5, True),
    "values[2] is written by no layer": {"layers": [PLAN["layers"][0], ("linear", "", [], [1], 3, [1], {})]},
    "values[4] is written by no layer": {"values": [*PLAN["values"], (1, 1, 1, 1, False, False)]},
    "layers[0].kind": item("layers", 0, 0, "conv3d"),
    "layers[1].function": item("layers", 1, 1, ""),
    "layers[0].function": item("layers", 0, 1, "relu"),
    "layers[0].constants": item("layers", 0, 2, [1.0]),
    "layers[1].inputs": item("layers", 1, 3, [2]),
    "layers[2].inputs": item("layers", 2, 3, [2, 1]),
    "layers[2].output": item("layers", 2, 4, 2),
    "layers[0].params[0]": item("layers", 0, 5, [-1]),
    "layers[1].params[0]": item("layers", 1, 5, [0]),
    "layers[0].fused.adds": item("layers", 0, 6, {"adds": [True]}),
    "layers[0].fused.adds must": item("layers", 0, 6, {"adds": []}),
    "layers[0].fused.relu_in": item("layers", 0, 6, {"relu_in": True}),
    "layers[1].fused.relu_in": item("layers", 1, 6, {"relu_in": True}),
    "layers[1].fused.relu_out": item("layers", 1, 6, {"relu_out": True}),
    "layers[2].fused.relu_out": item("layers", 2, 6, {"relu_out": True}),  # of two outputs
    "layers[2].fused.relu_out must": item("layers", 2, 6, {"relu_out": 1}),
    "layers[1].fused.bias_cancels": item("layers", 1, 6, {"bias_cancels": True}),
    "layers[0].fused.pool": item("layers", 0, 6, {"pool": (2, 2)}),
    "layers[0].fused.pool[0]": item("layers", 0, 6, {"pool": ("2", 2)}),
    "layers[2].fused.recomputes": item("layers", 2, 6, {"recomputes": 0}),
    "layers[2].fused.recomputes must": item("layers", 2, 6, {"recomputes": 2**40}),
    "layers[0].fused has an unknown entry": item("layers", 0, 6, {"relu": True}),
    "layers[0].fused must": item("layers", 0, 6, []),
    "layers[0] (linear)": {"params": PLAN["params"][::-1]},
    "params[0].taps": item("params", 0, 2, 2**40),
    "params[1].rows": item("params", 1, 0, 0),
    "params[0] has rows": item("params", 0, 3, False),
    "params[1].constant": item("params", 1, 4, True),
    "params[1] has a rate": {
        "params": [PLAN["params"][0], (2, 4, 1, True, *[False] * 3, True, False, False)]
    },
    "params[2] is read by no layer": {"params": [*PLAN["params"], (1, 4, 1, *FLAGS)]},
    "output": {"output": 4},
    "options.steps": options(steps=-1),
    "options.support": options(support=2**31),
    "options.query": options(query=-5),
    "options.rule must be a dict": options(rule=None),
    "is no update rule": options(rule={**described_rule(None), "kind": "sgdd"}),
    "must be finite": options(rule={**described_rule(None), "numbers": [float("nan")] * 12}),
    "is not on": options(rule={**described_rule(None), "learned": [True] * 12}),
    "options.gradient": options(gradient="yes"),
    "options lacks 'store'": {"options": {k: v for k, v in OPTIONS.items() if k != "store"}},
    "options.loss must be None": options(support=0, steps=0),
    "options.query_loss.kind": loss(kind="none"),
    "options.query_loss.beta": loss(kind="huber", beta=-1.0),
    "options.query_loss.label_smoothing": loss(kind="cross_entropy", label_smoothing=1.5),
    "options.query_loss.class_indices": loss(class_indices=True),
    "options.query_loss.ignore_index": loss(ignore_index=2**70),
}


def pooled(**fused: Any) -> dict[str, Any]:
    """conv2d, batch_norm that max-pools 2 x 2, reshape, linear: [N, 2, 4, 4] -> [N, 2]."""
    window = [3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    return {
        "values": [
            (16, 2, 4, 4, True, False),
            (16, 3, 4, 4, True, True),
            (4, 3, 2, 2, True, True),
            (1, 12, 1, 1, False, True),
            (1, 2, 1, 1, False, True),
        ],
        "layers": [
            ("conv2d", "", window, [0], 1, [0], {}),
            ("batch_norm", "", [1e-5], [1], 2, [-1] * 4, {"pool": (2, 2), "recomputes": 0, **fused}),
            ("reshape", "", [], [2], 3, [], {}),
            ("linear", "", [], [3], 4, [1], {}),
        ],
        "params": [(3, 18, 9, *FLAGS), (2, 12, 1, *FLAGS)],
        "output": 4,
    }


def test_takes_a_norm_with_its_neighbours() -> None:
    assert _C.Plan(**{**PLAN, **pooled()}).workspace_bytes > 0


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"pool": (3, 2)}, "does not make an image of the output's size"),
        ({"pool": (5, 5)}, "must be windows inside of the image"),
        ({"pool": (-2, 2)}, "must be windows inside of the image"),
        ({"pool": (0, 2)}, "must be windows inside of the image"),
        ({"pool": (0, 0)}, "a norm changes the shape"),
        ({"recomputes": 1}, "must be an earlier layer"),
        ({"recomputes": 3}, "must be an earlier layer"),
    ],
    ids=str,
)
def test_rejects_a_norm_that_takes_too_much(fused: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Plan(**{**PLAN, **pooled(**fused)})


def test_rejects_to_forget_what_somebody_reads() -> None:
    plan = {**PLAN, **pooled()}
    with pytest.raises(ValueError, match="excludes gradients of the network's input"):
        _C.Plan(**{**plan, **options(wants_query_x=True)})
    read_twice = [*plan["layers"]]
    read_twice[2] = ("reshape", "", [], [1], 3, [], {})
    read_twice[3] = ("linear", "", [], [3], 4, [1], {})
    values = [*plan["values"]]
    values[3] = (1, 48, 1, 1, False, True)
    params = [plan["params"][0], (2, 48, 1, *FLAGS)]
    with pytest.raises(ValueError, match=r"nobody else reads|read by no layer"):
        _C.Plan(**{**plan, "layers": read_twice, "values": values, "params": params})


@pytest.mark.parametrize(
    "actions",
    [
        [(3, 1, 1)],  # back over step 1 before anything was run
        [(0, 0, 0), (2, 0, 1), (3, 1, 1)],  # step 0 is left out
        [(0, 0, 0), (2, 0, 2), (3, 2, 2)],  # there is no step 2
        [(0, 0, 5), (2, 0, 1), (3, 1, 1), (1, 0, 5), (3, 0, 0)],  # a place too far
        [(0, 0, 0), (2, 0, 1), (3, 1, 1), (1, 0, 1), (3, 0, 0)],  # a place with nothing in it
        [(0, 0, 0), (2, 0, 1), (3, 1, 1), (1, 1, 0), (3, 0, 0)],  # another step is there
        [(0, 0, 0), (2, 0, 1), (3, 1, 1), (1, 0, 0), (3, 0, 0), (3, 0, 0)],
        [(0, 0, 0), (2, 0, 1), (3, 1, 1), (3, 0, 0)],  # there is no theta at hand after a way back
        [(4, 0, 0)],
        [(0, 0)],
        "save",
    ],
    ids=str,
)
def test_rejects_a_schedule_that_does_not_go_over_all_steps(actions: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"options.*schedule"):
        _C.Plan(**{**PLAN, **options(steps=2, store=False, schedule=actions)})
    good = [(0, 0, 0), (2, 0, 1), (3, 1, 1), (1, 0, 0), (3, 0, 0)]
    _C.Plan(**{**PLAN, **options(steps=2, store=False, schedule=good)})
    for other in ({"store": True}, {"gradient": False}):
        with pytest.raises(ValueError, match="schedule"):
            _C.Plan(**{**PLAN, **options(steps=2, **{"store": False, **other}, schedule=good)})


@pytest.mark.parametrize("named", WRONG_PLANS)
def test_rejects_a_plan_and_names_the_field(named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(named)):
        _C.Plan(**{**PLAN, **WRONG_PLANS[named]})


def replaced(field: str, i: int, value: Any) -> dict[str, Any]:
    items = run_arguments()[field]
    items[i] = value
    return {field: items}


def freed() -> Tensor:
    own = doubles(5)
    own.untyped_storage().resize_(0)
    return own


WRONG_RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "tasks must be from 1": lambda: {"tasks": 0},
    "tasks must be from 1 to 2^40": lambda: {"tasks": 2**50},
    "data[0] must hold 12 numbers": lambda: replaced("data", 0, doubles(11)),
    "support[0] must hold 12 numbers, got 30": lambda: {"tasks": 2},
    "threads": lambda: {"threads": 2**31 - 1},
    "data[1] must be a torch.Tensor or None, got int": lambda: replaced("data", 1, 4096),
    "data[1] must be a tensor": lambda: replaced("data", 1, None),
    "data must have 2 items": lambda: {"data": [doubles(4, 3)]},
    "data must be a list": lambda: {"data": None},
    "rate[0] must be a tensor": lambda: {"rate": []},
    "rate[1] must be torch.float64": lambda: replaced("rate", 1, torch.zeros(())),
    "grad[0] must be contiguous": lambda: replaced("grad", 0, doubles(3, 4).t()),
    "grad_offsets[1] lies outside": lambda: {"grad": [doubles(20)], "grad_offsets": [0, 13]},
    "rate_grad is for": lambda: {"rate_grad": [doubles(), doubles()]},
    "support[0], the inputs": lambda: {"support": []},
    "query[1], the targets": lambda: replaced("query", 1, None),
    "query[2] must hold 10 numbers": lambda: replaced("query", 2, doubles(3)),
    "query[4], the inputs' gradient": lambda: replaced("query", 4, doubles(5, 2, 3)),
    "others[0] has no memory": lambda: replaced("others", 0, freed()),
    "others[0] must be a dense tensor with memory": lambda: replaced("others", 0, doubles(5).to("meta")),
    "others[2], the task losses": lambda: replaced("others", 2, None),
    "step_weights must be steps + 1": lambda: {"step_weights": [1.0]},
    "step_weights must be finite": lambda: {"step_weights": [1.0, float("nan")]},
    "poison must be a bool": lambda: {"poison": None},
}


@pytest.mark.parametrize("named", WRONG_RUNS)
def test_rejects_tensors_and_names_the_field(named: str) -> None:
    assert run() == 0
    given = {**run_arguments(), **WRONG_RUNS[named]()}
    plan = _C.Plan(**PLAN)
    with pytest.raises((TypeError, ValueError), match=re.escape(named)):
        plan.run(**given)


def test_a_flat_gradient_matches_one_tensor_each() -> None:
    given = run_arguments()
    for tensors in (given["data"], given["rate"], given["support"][:2], given["query"][:2]):
        for tensor in tensors:
            tensor.copy_(torch.rand(tensor.shape))
    plan = _C.Plan(**PLAN)
    plan.run(**given)
    flat = torch.full((25,), 7.0, dtype=torch.float64)
    plan.run(**{**given, "grad": [flat], "grad_offsets": [9, 1]})
    assert torch.equal(flat[9:21].view(4, 3), given["grad"][0])
    assert torch.equal(flat[1:9].view(2, 4), given["grad"][1])
    assert flat[[0, 21, 22, 23, 24]].tolist() == [7.0] * 5


def test_rejects_plans_without_a_description() -> None:
    plan = _C.Plan(**PLAN)
    makers = (lambda: _C.Plan.__new__(_C.Plan), lambda: object.__new__(_C.Plan), lambda: copy.copy(plan))
    for make in (*makers, lambda: pickle.loads(pickle.dumps(plan)), _C.Plan):
        with pytest.raises(TypeError):
            make()


def test_rejects_junk_measurements() -> None:
    for call in (
        lambda: _C.fma_peak("float16", 1),
        lambda: _C.fma_peak("float32", 0),
        lambda: _C.fma_peak("float32", 2**40),
        lambda: _C.fma_peak("float32", 4 * (os.cpu_count() or 1) + 64),
        lambda: _C.cache_bandwidth(2**62, 1),
        lambda: _C.cache_bandwidth(0, 1),
    ):
        with pytest.raises(ValueError, match=r"fma_peak|cache_bandwidth"):
            call()


def test_says_how_much_memory_is_missing() -> None:
    width = 2**26
    inner = [(1, width, 1, 1, False, True)] * 2000
    values = [(1, 3, 1, 1, False, False), *inner, (1, 2, 1, 1, False, True)]
    layers: list[Any] = [("linear", "", [], [0], 1, [0], {})]
    layers += [("elementwise", "tanh", [], [i], i + 1, [], {}) for i in range(1, 2000)]
    plan = {"values": values, "layers": [*layers, ("linear", "", [], [2000], 2001, [1], {})], "output": 2001}
    params = [(width, 3, 1, *FLAGS), (2, width, 1, *FLAGS)]
    made = _C.Plan(**{**PLAN, **plan, "params": params})
    assert made.workspace_bytes > 2**40


# on one thread, since PyTorch's OpenMP threads hang in a forked child
@pytest.mark.usefixtures("one_thread")
def test_fuzzer_finds_no_fault() -> None:
    binding.prepare()
    report = fuzz(binding.draw, binding.check, 1500, seed=20)
    assert report.calls >= 1500
    assert report.faults == []


@pytest.mark.usefixtures("one_thread")
def test_fuzzer_notices_memory_that_is_written_to() -> None:
    binding.prepare()
    guarded = binding.Guarded(binding.template(0))
    assert guarded.wrong() == ""
    dtype, begin, tensor = binding.template(0).places["grad", 0]
    guarded.memory[dtype][begin + tensor.numel()] += 1
    assert guarded.wrong() != ""


# ---- what the extension says of itself


def test_kinds_and_functions_are_those_of_the_records() -> None:
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    assert set(_C.kinds()) == {path.stem for path in (csrc / "cpu" / "layers").glob("*.h")}
    for name, rules in _C.kinds().items():
        kind = KINDS[name]
        assert rules == (kind.inputs, *kind.constants, len(kind.params), kind.required), name
    assert set(_C.functions()) <= set(FUNCTIONS)
    assert len(_C.functions()) > 10


@pytest.mark.parametrize("function", _C.functions())
def test_takes_every_function_that_it_names(function: str) -> None:
    assert run(item("layers", 1, 1, function)) == 0


@pytest.mark.parametrize("function", ["no_function", "none", "adaptive"])
def test_rejects_what_is_no_function(function: str) -> None:
    with pytest.raises(ValueError, match=re.escape("layers[1].function")):
        _C.Plan(**{**PLAN, **item("layers", 1, 1, function)})


def test_only_average_pools_are_adaptive() -> None:
    image = (12, 2, 4, 3, True, False)
    plan = {
        "values": [image, (4, 2, 2, 2, True, False), (1, 8, 1, 1, False, False), (1, 2, 1, 1, False, True)],
        "params": [(2, 8, 1, *FLAGS)],
    }

    def made(kind: str, function: str, constants: list[float]) -> _C.Plan:
        layers = [(kind, function, constants, [0], 1, [], {}), ("reshape", "", [], [1], 2, [], {})]
        return _C.Plan(**{**PLAN, **plan, "layers": [*layers, ("linear", "", [], [2], 3, [0], {})]})

    assert made("avg_pool2d", "adaptive", []).workspace_bytes > 0
    with pytest.raises(ValueError, match=re.escape("layers[0] (avg_pool2d)")):
        made("avg_pool2d", "", [])
    with pytest.raises(ValueError, match=re.escape("layers[0].function")):
        made("max_pool2d", "adaptive", [2.0, 2.0, 2.0, 1.0, 0.0, 0.0])
