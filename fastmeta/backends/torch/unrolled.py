"""The scalar J of a problem with its whole graph, for gradients that are differentiated again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured
from fastmeta.backends._rule_steps import rate_at
from fastmeta.backends._rule_tasks import start_of_all, step_of_all
from fastmeta.backends._sweep import stack
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.evaluation import Evaluation
from fastmeta.inputs import Tree
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Problem
from fastmeta.update_rules import SGD
from fastmeta.update_rules.rule import State


def unrolled(p: Problem, vectorised: bool, captured: Captured) -> Tensor:
    """J, (), from the tensors of `p` as they are; draws what `Sweep` draws, in its order.

    Args:
        p: its step weights written out.
        vectorised: tasks by vmap instead of a loop.
        captured: takes note of what else J depends on.

    Derivatives: any number of times, as far as those of the network go; with order="first" inner
        gradients are constants.
    """
    names = list(p.rates) if p.steps else []
    stacked = p.per_task | frozenset(names)
    theta = {name: stack(p, name) for name in names}
    state: State = start_of_all(p.rule, theta) if p.rule is not None and p.steps else None
    momentum: dict[str, Tensor] = {}
    terms: list[Tensor] = []

    def evaluated(theta: Mapping[str, Tensor], batch: Batch, loss: Loss | None) -> tuple[Tensor, Tree]:
        losses, output, _ = Evaluation(
            problem=p,
            params={**p.params, **theta},
            stacked=stacked,
            batch=batch,
            loss=loss,
            vectorised=vectorised,
        ).watched(captured)
        return losses, output

    def mean(losses: Tensor) -> Tensor:
        return (losses if p.task_weights is None else losses * p.task_weights).sum() / p.tasks

    for k, weight in enumerate(p.step_weights or ()):
        if p.query is not None and (weight or k == p.steps):
            losses, output = evaluated(theta, p.query, p.query_loss)
            if p.query_loss is not None and weight:
                terms.append(weight * mean(losses))
            if p.output_grad is not None and k == p.steps:
                terms += _inputs.products(output, p.output_grad)
        if k < p.steps:
            support, loss, rule = _inputs.inner_loop(p)
            theta = _inputs.varied(theta)
            losses, _ = evaluated(theta, tasks.step_of(support, k), loss)
            found = _inputs.gradients(
                [losses.sum()], [*theta.values()], create_graph=p.order == "second", retain_graph=True
            )
            if p.support_step_weights is not None and p.support_step_weights[k]:
                terms.append(p.support_step_weights[k] * mean(losses))
            rates = {name: rate_at(p, name, k) for name in names}
            if isinstance(rule, SGD) and rule.written:
                for name, g in zip(names, found, strict=True):
                    theta[name], momentum[name] = rule.update(theta[name], g, momentum.get(name), rates[name])
            else:
                by_name = dict(zip(names, found, strict=True))
                theta, state = step_of_all(p, rule, theta, by_name, state, rates, p.hyper, k)
    for name, cotangent in (p.adapted_grad or {}).items():
        terms.append((cotangent * theta.get(name, stack(p, name))).sum())
    return torch.stack(terms).sum() if terms else next(iter(p.params.values())).new_zeros(())
