"""The ground truth: one task after the other, the inner loop written out, autograd through all of
it.

Nothing here is clever, on purpose. Every other backend is compared with this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.backends._captured import Captured, rerun
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._inputs import (
    check_class_indices,
    check_rates,
    detached,
    gradients,
    inner_loop,
    products,
    put_parts,
    varied,
    wanted_parts,
    with_graph,
)
from fastmeta.backends._rule_tasks import check_reads, step_of_one
from fastmeta.backends._twice import check_twice, named_in
from fastmeta.inputs import Tree, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import call, call_then, isolated
from fastmeta.network.swap import Carried
from fastmeta.problem import Batch, Gradients, Problem, Result
from fastmeta.update_rules.rule import State


def missing() -> str:
    """Why this backend cannot run anything here: it always can."""
    return ""


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`: it can run any."""
    return ""


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem` by a loop over tasks; keeps the graphs of all tasks and steps at once."""
    return rerun(problem, lambda problem: _solve(problem, wrt, adapted))


def _solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    with isolated(problem.device), named_in(problem):
        p = detached(problem, requires_grad=True)
        check_rates(p)
        check_class_indices(p)
        check_reads(p)
        if wrt or p.steps:
            carries_state(p)
        captured = Captured(p, keep=True)
        answers = [_one_task(p, t, captured) for t in range(p.tasks)]
        objective = _objective(p, answers)
        result = Result(grads=_gradients(p, objective, wrt))
        captured.add_kept(gradients([objective], captured.inputs, retain_graph=True))
        result.grads.captured = captured.pairs()
        if p.query is not None:
            outputs = [output for _, output, _ in answers]
            result.output = mapped(lambda *tasks: torch.stack(tasks).detach(), *outputs)
        if p.query_loss is not None:
            result.task_losses = torch.stack([loss for loss, _, _ in answers]).detach().to(_zero(p))
        if adapted:
            result.adapted = {
                name: torch.stack([theta[name] for _, _, theta in answers]).detach() for name in p.params
            }
        return result


def objective(problem: Problem) -> tuple[Tensor, Captured]:
    """J with its graph, from the tensors of `problem` as they are, and what else it depends on;
    draws as `solve`."""

    def unrolled(p: Problem) -> tuple[Tensor, Captured]:
        captured = Captured(p, keep=True)
        return _objective(p, [_one_task(p, t, captured) for t in range(p.tasks)]), captured

    with isolated(problem.device):
        return rerun(with_graph(problem), unrolled)


def _one_task(p: Problem, t: int, captured: Captured) -> tuple[Tensor, Tree, dict[str, Tensor]]:
    """(task loss, as `Result.task_losses` has it, output at theta_K, theta_K) of task t; zeros in
    place of what is not asked for."""
    theta = {name: value[t] if name in p.per_task else value for name, value in p.params.items()}
    inner = _start(p, theta)
    state = Carried()
    query_loss: Tensor = _zero(p)
    output: Tree = None
    for k, weight in enumerate(p.step_weights or ()):
        if p.query is not None and (weight or k == p.steps):
            loss = p.query_loss if weight else None
            value, output = _evaluated(p, theta, _examples(p.query, (t,)), loss, captured, state)
            query_loss = query_loss + weight * value
        if k < p.steps:
            theta, inner, value = _inner_step(p, t, k, theta, inner, captured, state)
            if p.support_step_weights is not None and p.support_step_weights[k]:
                query_loss = query_loss + p.support_step_weights[k] * value
    return query_loss, output, theta


def _evaluated(
    p: Problem,
    theta: Mapping[str, Tensor],
    examples: tuple[Any, Any, Any],
    loss: Loss | None,
    captured: Captured,
    state: Carried,
) -> tuple[Tensor, Tree]:
    """(loss, output) of one task; the loss zero where there is none."""
    x, y, weights = examples

    def evaluate() -> tuple[Tensor, Tree]:
        net = p.exchange or p.net
        how: dict[str, Any] = {"batch_stats": p.batch_stats, "decompose": p.third, "carried": state}
        if loss is None:
            return _zero(p), call(net, theta, x, **how)
        return call_then(net, theta, x, lambda output: loss(output, y, weights), **how)

    value, output, _ = captured.evaluated(evaluate, [*theta.values(), *examples])
    return value, output


def _inner_step(
    p: Problem,
    t: int,
    k: int,
    theta: Mapping[str, Tensor],
    inner: State,
    captured: Captured,
    state: Carried,
) -> tuple[dict[str, Tensor], State, Tensor]:
    """(theta_{k+1}, the state of the rule, the support loss at theta_k) of task t; parameters
    without a rate stay as they are."""
    support, loss, rule = inner_loop(p)
    theta = {**theta, **varied({name: theta[name] for name in p.rates})}
    value, _ = _evaluated(
        p, theta, _examples(support, (t, k) if support.per_step else (t,)), loss, captured, state
    )
    adapted = [theta[name] for name in p.rates]
    # what the module keeps may lead back into this graph
    gradient = gradients([value], adapted, create_graph=p.order == "second", retain_graph=True)
    if t == k == 0 and p.order == "second":
        check_twice(value, gradient)
    rates: dict[str, Tensor] = {}  # [*(S or 1s)]
    for name, rate in p.rates.items():
        rate = rate[k if rate.shape[0] > 1 else 0]  # [T or 1, *(S or 1s)]
        rates[name] = rate[t if rate.shape[0] > 1 else 0]
    if not rule.written:
        before = {name: theta[name] for name in p.rates}
        by_name = dict(zip(p.rates, gradient, strict=True))
        moved, inner = step_of_one(p, rule, before, by_name, inner, rates, p.hyper, k)
        return {**theta, **moved}, inner, value
    theta, momentum = dict(theta), dict(inner)
    for name, g in zip(p.rates, gradient, strict=True):
        momentum[name] = rule.momentum * momentum[name] + g + rule.weight_decay * theta[name]
        theta[name] = theta[name] - rates[name] * momentum[name]
    return theta, momentum, value


def _start(p: Problem, theta: Mapping[str, Tensor]) -> State:
    """The state of the rule before the first step."""
    adapted = {name: theta[name] for name in p.rates}
    if p.rule is None or p.rule.written or not p.steps:
        return {name: torch.zeros_like(value) for name, value in adapted.items()}
    return p.rule.init(adapted)


def _examples(batch: Batch, at: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """x [N, *in], y [N, ...] and weights [N] of one task (and step), or None."""
    x, y, weights = (mapped(lambda t: t[at], tree) for tree in (batch.x, batch.y, batch.weights))
    return x, y, weights


def _objective(p: Problem, answers: Sequence[tuple[Tensor, Tree, dict[str, Tensor]]]) -> Tensor:
    """The scalar J of `fastmeta.problem`."""
    objective = _zero(p)
    for t, (query_loss, output, theta) in enumerate(answers):
        objective = objective + (1 if p.task_weights is None else p.task_weights[t]) / p.tasks * query_loss
        if p.adapted_grad is not None:
            for name, cotangent in p.adapted_grad.items():
                objective = objective + (cotangent[t] * theta[name]).sum()
        if p.output_grad is not None:
            for term in products(output, mapped(lambda cotangent, t=t: cotangent[t], p.output_grad)):
                objective = objective + term
    return objective


def _zero(p: Problem) -> Tensor:
    return next(iter(p.params.values())).detach().new_zeros(())


def _gradients(p: Problem, objective: Tensor, wrt: frozenset[str]) -> Gradients:
    """The gradients of J asked for."""
    grads = Gradients()
    if "params" in wrt:
        grads.params = dict(
            zip(p.params, gradients([objective], [*p.params.values()], retain_graph=True), strict=True)
        )
    if "lr" in wrt:
        grads.lr = dict(
            zip(p.rates, gradients([objective], [*p.rates.values()], retain_graph=True), strict=True)
        )
    if "rule" in wrt:
        grads.rule = dict(
            zip(p.hyper, gradients([objective], [*p.hyper.values()], retain_graph=True), strict=True)
        )
    data = wanted_parts(p, wrt)
    put_parts(grads, p, {n: gradients([objective], [x], retain_graph=True)[0] for n, x in data.items()})
    return grads
