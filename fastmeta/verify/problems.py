"""From a case of the list to the problem that a backend solves."""

from __future__ import annotations

import torch

from fastmeta.capture.capture import captured
from fastmeta.cases import Case
from fastmeta.cases.rules import rule_of_case
from fastmeta.inputs import leaves_of
from fastmeta.losses import resolve
from fastmeta.ops.rates import plan_rates
from fastmeta.problem import DIFFERENTIABLE, Batch, Problem
from fastmeta.update_rules import SGD, UpdateRule


def problem_of(case: Case, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    """The problem of a case on a device, with the captured network."""
    made = case.build(dtype, seed).to(device)
    forward_only = case.operator == "task_forward"
    adapting = case.operator == "inner_sgd"
    loss = resolve(made.loss)
    query_loss = loss if made.query_loss is None else resolve(made.query_loss)
    support = Batch(made.support_x, made.support_y, made.support_weights, case.per_step)
    query = Batch(made.query_x, None if forward_only else made.query_y, made.query_weights)
    program, refused = (
        (None, "the network's inputs are not one tensor of floating-point numbers")
        if case.ids or case.more_inputs
        else captured(made.net, case.input_shape, dtype, case.batch_stats)
    )
    shapes = {name: tuple(value.shape) for name, value in made.net.named_parameters()}
    rates = plan_rates(
        "verify",
        made.rates,
        names=tuple(made.rates),
        shapes=shapes,
        steps=case.steps,
        tasks=case.tasks,
        device=next(iter(made.params.values())).device,
        dtype=dtype,
    )
    inner: UpdateRule = SGD(case.momentum, case.weight_decay)
    if case.rule:
        inner = rule_of_case(case.rule, dtype, next(iter(made.params.values())).device, case.steps)
    return Problem(
        net=made.net,
        params=made.params,
        per_task=made.per_task,
        tasks=case.tasks,
        steps=case.steps,
        support=None if forward_only else support,
        query=None if adapting else query,
        loss=None if forward_only else loss,
        query_loss=None if forward_only or adapting else query_loss,
        rates={} if forward_only else rates.spread(made.rates),
        rule=None if forward_only else inner.form,
        hyper={} if forward_only else dict(inner.tensors),
        order=case.order,
        step_weights=None if forward_only or adapting else made.step_weights,
        support_step_weights=None if forward_only or adapting else made.support_step_weights,
        task_weights=None if forward_only or adapting else made.task_weights,
        memory=case.memory,
        batch_stats=case.batch_stats,
        adapted_grad=made.adapted_grad,
        output_grad=made.output_grad,
        program=program,
        refused=refused,
    )


def wanted(case: Case, problem: Problem) -> frozenset[str]:
    """Everything that the problem can be differentiated by."""
    names = {"params"}
    if problem.rates:
        names.add("lr")
    if problem.hyper:
        names.add("rule")
    if case.wrt_inputs:
        for side, batch in (("support", problem.support), ("query", problem.query)):
            for part in ("x", "y", "weights"):
                tree = None if batch is None else getattr(batch, part)
                if tree is not None and any(leaf.is_floating_point() for leaf in leaves_of(tree)):
                    names.add(f"{side}_{part}")
    return frozenset(names) & frozenset(DIFFERENTIABLE)
