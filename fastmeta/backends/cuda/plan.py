"""What a specialisation of the CUDA kernels is: the network simplified, and a place for everything
in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from fastmeta.backends._losses import reads_channels
from fastmeta.backends._precision import asked_for
from fastmeta.backends._rates import rate_form
from fastmeta.backends._rules import NUMBERS, bits
from fastmeta.backends.cpu.plan import used_buffers, used_params
from fastmeta.backends.cuda.memory import WIDE, lay_out_params, odd, pad, place
from fastmeta.backends.cuda.network import simplify
from fastmeta.backends.cuda.tables import Param as Param
from fastmeta.backends.cuda.tables import Plan as Plan
from fastmeta.backends.cuda.tables import Rule as RuleTable
from fastmeta.backends.cuda.tables import braces
from fastmeta.backends.cuda.tables import source as source
from fastmeta.graph.program import Program
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Problem

#: What `torch.get_float32_matmul_precision()` means for the products of wide layers; see
#: csrc/cuda/spec.h.
PRODUCTS = {"highest": "split", "high": "tf32", "medium": "bf16"}


@dataclass(frozen=True, slots=True)
class Chip:
    """What a plan depends on of a GPU, besides the network and the call."""

    shared_bytes: int  # that a block can have
    cluster: int = 1  # blocks that can share theirs: 1, 2 or 4


def make_plan(problem: Problem, wrt: frozenset[str], chip: Chip) -> Plan:
    """The best plan for a kind of GPU.

    All in shared memory if anything fits: with every step's values or one's, all of theta_0 ..
    theta_K or one at a time; in one block, else in a cluster of as few as are enough. Of what is
    larger the largest pieces go to global memory, and as many blocks as possible share the work.
    """
    stores = {"store": (True,), "recompute": (False,), "auto": (True, False)}[problem.memory]
    for ranks in (1, 2, 4):
        if ranks > chip.cluster:
            break
        plans = [_draft(problem, wrt, store, keep, ranks) for keep in (True, False) for store in stores]
        for plan in plans:
            place(plan, chip.shared_bytes)
            if all(
                area.space == "shared"
                for name, area in plan.areas.items()
                if area.size and name != "checkpoints"
            ):
                return plan
    # theta_k is copied to shared memory step by step if one set fits, else read where it lies
    one_set = [plan for plan in plans if not plan.keep_all and plan.areas["theta"].space == "shared"]
    return one_set[-1] if one_set else plans[len(stores) - 1]


def _draft(problem: Problem, wrt: frozenset[str], store: bool, keep_all: bool, ranks: int) -> Plan:
    """A plan without places."""
    program = problem.program
    if program is None:
        raise ValueError(f"a plan needs a captured network: {problem.refused}")
    support, query = problem.support, problem.query
    steps = problem.steps if support is not None else 0
    first = next(iter(problem.params.values()))
    names = used_params(program) + used_buffers(problem)
    channels = reads_channels(problem)
    values, layers, output = simplify(program, names, channels)
    general = _general_rule(problem, wrt) if steps > 0 else RuleTable()
    rule = None if general.general else problem.rule
    flags = {
        "second_order": problem.order == "second" and bool(wrt) and steps > 0,
        "gradient": bool(wrt),
        "support_per_step": support is not None and support.per_step,
        "wants_params": "params" in wrt,
        "wants_rates": "lr" in wrt and steps > 0,
        "wants_support_x": "support_x" in wrt and problem.order == "second" and steps > 0,
        "wants_query_x": "query_x" in wrt,
        "momentum": rule is not None and rule.momentum != 0 and steps > 0,
        "weight_decay": rule is not None and rule.weight_decay != 0 and steps > 0,
        "step_weights": problem.step_weights is not None and problem.query_loss is not None,
        "positions": channels and values[output].rows > 1,
    }
    plan = Plan(
        values,
        layers,
        [],
        output,
        first.dtype.itemsize,
        steps,
        0 if support is None or steps == 0 else support.x.shape[2 if support.per_step else 1],
        0 if query is None else query.x.shape[1],
        flags,
        (_loss(problem.loss, support), _loss(problem.query_loss, query)),
        general,
        store,
        keep_all,
        ranks,
    )
    plan.params = [_param(problem, program, number, name, plan) for number, name in enumerate(names)]
    lay_out_params(plan)
    for layer in plan.layers:
        if layer.kind == "linear" and first.dtype == torch.float32:
            weight = plan.params[layer.weight]
            layer.multiply = PRODUCTS[asked_for()] if min(weight.rows, weight.cols) >= WIDE else "fma"
    return plan


def _param(problem: Problem, program: Program, number: int, name: str, plan: Plan) -> Param:
    params = dict(program.params)
    shape = params[name] if name in params else dict(program.buffers)[name]
    matrix = any(layer.kind == "linear" and layer.params[0] == name for layer in program.layers)
    rows, cols = (shape[0], prod(shape[1:])) if matrix else (1, prod(shape))
    vector = 16 // plan.itemsize
    ld = cols
    if cols < vector:
        vector = 1
    else:
        ld = pad(cols, vector)
        ld = odd(ld, vector) if rows > 1 else ld
    rate = rate_form(problem, name, shape) if plan.steps > 0 else None
    param = Param(
        name, rows, cols, ld, vector, name in problem.per_task, rate is not None, buffer=name not in params
    )
    if rate is not None:
        param.rate_element, param.rate_per_task, param.rate_per_step = rate
    param.tied = sum((layer.weight == number) + (layer.bias == number) for layer in plan.layers) > 1
    return param


def _general_rule(problem: Problem, wrt: frozenset[str]) -> RuleTable:
    """The table of a problem's rule."""
    rule = problem.rule
    if rule is None or rule.written:
        return RuleTable()
    wanted = rule.learned if "rule" in wrt else ()
    return RuleTable(
        True,
        rule.kind,
        bool(rule.options.get("nesterov")),
        bool(rule.options.get("centered")),
        bits(filter(rule.has, NUMBERS)),
        bits(rule.learned),
        bits(wanted),
        len(rule.state),
        by_norm=rule.has("clip_norm"),
    )


def _loss(loss: Loss | None, batch: Batch | None) -> str:
    if loss is None or batch is None or batch.y is None:
        return "{}"
    return braces(
        f"LossKind::{loss.kind}",
        loss.reduction == "sum",
        loss.weight_norm == "sum",
        loss.needs_class_indices(batch.y),
        float(loss.beta),
        float(loss.label_smoothing),
        loss.ignore_index,
    )
