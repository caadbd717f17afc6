"""From a problem to the engine's memory plan."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from fastmeta.backends._checkpoints import described as described_schedule
from fastmeta.backends._losses import reads_channels
from fastmeta.backends._native_rules import described_rule, states_of
from fastmeta.backends._rates import rate_form
from fastmeta.backends.cpu.network import CAPABILITIES, described
from fastmeta.graph.passes import annotate
from fastmeta.graph.program import Program
from fastmeta.layers.registry import kind_of
from fastmeta.losses import Loss
from fastmeta.problem import STORE_AT_MOST, Batch, Problem

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]


def used_params(program: Program) -> list[str]:
    """The parameters that some layer reads, in the program's order."""
    used = {name for layer in program.layers for name in layer.params if name is not None}
    return [name for name, _ in program.params if name in used]


def used_buffers(problem: Problem) -> list[str]:
    """The network's buffers that the engine reads: running statistics, where they are what a norm
    normalises by."""
    program = problem.program
    return [] if program is None else [name for name, _ in program.buffers]


def memory_mode(problem: Problem, wrt: frozenset[str]) -> str:
    """ "store", "recompute" or "checkpoint": what "auto" stands for."""
    if problem.memory == "checkpoint":
        return "checkpoint" if wrt and problem.steps else "recompute"
    if problem.memory != "auto":
        return problem.memory
    return "store" if make_plan(problem, wrt, "store").workspace_bytes <= STORE_AT_MOST else "recompute"


def make_plan(problem: Problem, wrt: frozenset[str], memory: str) -> _C.Plan:
    """The engine's plan for a problem with these gradients; `memory` is what `memory_mode` says."""
    program = problem.program
    if program is None:
        raise ValueError(f"a plan needs a captured network: {problem.refused}")
    shapes = dict(program.params)
    names, buffers = used_params(program), used_buffers(problem)
    shapes |= dict(program.buffers)
    index = {name: i for i, name in enumerate([*names, *buffers])}
    gradients = not wrt.isdisjoint({"support_x", "query_x"})
    graph = annotate(
        program, CAPABILITIES, output_channels=reads_channels(problem), input_gradients=gradients
    )
    values, layers, output = described(graph, index)
    matrices = {layer.params[0] for layer in program.layers if kind_of(layer).matrix}
    params = []
    for name in [*names, *buffers]:
        shape, matrix = shapes[name], name in matrices
        rate = rate_form(problem, name, shape)
        params.append(
            (
                shape[0] if matrix else 1,
                prod(shape[1:]) if matrix else prod(shape),
                prod(shape[2:]) if matrix else 1,
                matrix,
                name in buffers,
                name in problem.per_task,
                rate is not None,
                rate is not None and rate.element,
                rate is not None and rate.per_task,
                rate is not None and rate.per_step,
            )
        )
    return _C.Plan(
        is_double=problem.params[names[0]].dtype == torch.float64,
        values=values,
        layers=layers,
        params=params,
        output=output,
        options=_options(problem, wrt, memory),
    )


def checkpoint_bytes(problem: Problem) -> int:
    """What one copy of theta and the state of the rule takes, of all tasks that run at once."""
    own = int(make_plan(problem, frozenset(), "recompute").parameter_set_bytes)
    return min(torch.get_num_threads(), problem.tasks) * own * (1 + states_of(problem))


def _options(problem: Problem, wrt: frozenset[str], memory: str) -> dict[str, Any]:
    support, query = problem.support, problem.query
    return {
        "steps": problem.steps if support is not None else 0,
        "support": 0 if support is None else support.x.shape[2 if support.per_step else 1],
        "query": 0 if query is None else query.x.shape[1],
        "second_order": problem.order == "second",
        "store": memory == "store",
        "schedule": described_schedule(problem, checkpoint_bytes(problem)) if memory == "checkpoint" else [],
        "support_step_weights": list(problem.support_step_weights or ()) if support is not None else [],
        "gradient": bool(wrt),
        "support_per_step": support is not None and support.per_step,
        "wants_rates": "lr" in wrt and problem.steps > 0,
        "wants_support_x": "support_x" in wrt,
        "wants_query_x": "query_x" in wrt,
        "rule": described_rule(problem.rule),
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
