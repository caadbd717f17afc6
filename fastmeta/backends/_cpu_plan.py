"""From a problem to the engine's memory plan."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from fastmeta.losses import Loss
from fastmeta.network.program import Program
from fastmeta.problem import Batch, Problem

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

#: memory="auto" stores activations while the scratch memory of a running task stays below this.
STORE_AT_MOST = 256 << 20


def used_params(program: Program) -> list[str]:
    """The parameters that some layer reads, in the program's order."""
    used = {name for layer in program.layers for name in layer.params if name is not None}
    return [name for name, _ in program.params if name in used]


def rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """An example's shape as rows of its last dimension."""
    return (prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def memory_mode(problem: Problem, wrt: frozenset[str]) -> str:
    """ "store" or "recompute": what "auto" stands for."""
    if problem.memory != "auto":
        return problem.memory
    return "store" if make_plan(problem, wrt, "store").workspace_bytes <= STORE_AT_MOST else "recompute"


def make_plan(problem: Problem, wrt: frozenset[str], memory: str) -> _C.Plan:
    """The engine's plan for a problem with these gradients; `memory` is "store" or "recompute"."""
    program = problem.program
    if program is None:
        raise ValueError(f"a plan needs a captured network: {problem.refused}")
    shapes = dict(program.params)
    names = used_params(program)
    index = {name: i for i, name in enumerate(names)}
    values = [rows_and_cols(program.value_shape(i)) for i in range(len(program.layers) + 1)]
    layers = []
    for i, layer in enumerate(program.layers):
        c0, c1, *_ = (*layer.constants, 0.0, 0.0)
        in0, in1, *_ = (*layer.inputs, -1)
        weight, bias, *_ = (*(index.get(name or "", -1) for name in layer.params), -1, -1)
        layers.append((layer.kind, layer.function, c0, c1, in0, in1, i + 1, weight, bias))
    params = []
    for name in names:
        shape = shapes[name]
        rate = problem.rates.get(name)
        element = rate is not None and rate.shape[2:].numel() > 1
        params.append(
            (
                shape[0] if len(shape) == 2 else 1,
                shape[-1],
                len(shape) == 2,
                name in problem.per_task,
                rate is not None,
                element,
                rate is not None and rate.shape[1] > 1,
                rate is not None and rate.shape[0] > 1,
            )
        )
    return _C.Plan(
        problem.params[names[0]].dtype == torch.float64,
        values,
        layers,
        params,
        program.output,
        _options(problem, wrt, memory),
    )


def _options(problem: Problem, wrt: frozenset[str], memory: str) -> dict[str, Any]:
    support, query, rule = problem.support, problem.query, problem.rule
    return {
        "steps": problem.steps if support is not None else 0,
        "support": 0 if support is None else support.x.shape[2 if support.per_step else 1],
        "query": 0 if query is None else query.x.shape[1],
        "second_order": problem.order == "second",
        "store": memory == "store",
        "gradient": bool(wrt),
        "support_per_step": support is not None and support.per_step,
        "wants_rates": "lr" in wrt and problem.steps > 0,
        "wants_support_x": "support_x" in wrt,
        "wants_query_x": "query_x" in wrt,
        "momentum": rule.momentum if rule is not None else 0.0,
        "weight_decay": rule.weight_decay if rule is not None else 0.0,
        "loss": _loss(problem.loss, support),
        "query_loss": _loss(problem.query_loss, query),
    }


def _loss(loss: Loss | None, batch: Batch | None) -> dict[str, Any] | None:
    if loss is None or batch is None or batch.y is None:
        return None
    return {
        "kind": loss.kind,
        "sum": loss.reduction == "sum",
        "normalise_sum": loss.weight_norm == "sum",
        "class_indices": loss.needs_class_indices(batch.y),
        "beta": loss.beta,
        "label_smoothing": loss.label_smoothing,
        "ignore_index": loss.ignore_index,
    }
