"""The answer to a drawn input, by the plain loop and by the library."""

from __future__ import annotations

from typing import Any

import torch
from building import Drawn, cast, losses_of
from drawing import Spec
from inner_rules import library_rule, plain_rule
from plain_loop import Meta, PlainLoss, solve
from torch import Tensor

import fastmeta as fm


def leaf(value: Any, fresh: bool = True) -> Any:
    """A leaf of its own with the same values and strides; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_() if fresh else value
    if isinstance(value, dict):
        return {key: leaf(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(leaf(item) for item in value)
    return value


def truth(spec: Spec, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value and gradient that the call returns, by the plain loop."""
    d = cast(drawn, dtype) if dtype == torch.float32 else drawn
    params, lr, support, query = leaf(d.params), leaf(d.lr), leaf(d.support), leaf(d.query)
    plain = losses_of(spec, spec.loss, dtype)[1]
    query_plain = losses_of(spec, spec.query_loss or spec.loss, dtype)[1]
    (support_w, plain), (query_w, query_plain) = (
        _mask(support[2], plain, dtype),
        _mask(query[2], query_plain, dtype),
    )
    api = spec.api
    gradient = api == "task_gradient"
    if api in ("MAML", "adapt"):
        params = leaf({name: value.detach() for name, value in d.net.named_parameters()})
    needs_support, needs_query = api != "task_forward", api in ("MAML", "meta_gradient", "task_forward")
    if gradient:
        lr = -1.0
    rates = (
        (
            {
                name: torch.full((), -1.0, dtype=dtype).reshape(
                    (1, 1, *[1] * d.net.get_parameter(name).dim())
                )
                for name in d.adapted
            }
            if gradient
            else d.rates(lr)
        )
        if needs_support
        else {}
    )
    steps = 0 if api == "task_forward" else 1 if gradient else spec.steps
    rule = plain_rule(spec, dtype) if has_rule(spec) else None
    meta = Meta(
        d.net,
        params,
        d.per_task if api not in ("MAML", "adapt") else frozenset(),
        (*support[:2], support_w) if needs_support else None,
        (query[0], query[1] if api != "task_forward" else None, query_w) if needs_query else None,
        plain,
        query_plain,
        rates,
        spec.tasks,
        steps,
        0.0 if gradient else spec.momentum,
        0.0 if gradient else spec.weight_decay,
        rule,
        spec.order == "second" or gradient,
        spec.per_step and not gradient,
        d.step_weights if needs_query and api != "task_forward" else None,
        d.support_step_weights if needs_query and api != "task_forward" else None,
        d.task_weights,
        spec.batch_stats,
    )
    answer = solve(meta)
    found: dict[str, Tensor] = {}
    if needs_query:
        found["output"] = answer.output
    if api in ("MAML", "meta_gradient"):
        objective = answer.mean(d.task_weights)
        found |= {"loss": objective, "task_losses": answer.task_losses}
    elif api == "task_forward":
        objective = (answer.output * cotangent(answer.output)).sum()
    else:
        values = answer.adapted
        if gradient:
            values = {n: values[n] - params[n] for n in d.adapted}
        found |= {f"value[{name}]": value for name, value in values.items()}
        objective = sum((value * cotangent(value)).sum() for value in values.values())
    sources = {f"params[{name}]": value for name, value in params.items()}
    sources |= {"lr": lr} if isinstance(lr, Tensor) else {}
    if isinstance(lr, dict):
        sources |= {f"lr[{key}]": value for key, value in lr.items() if isinstance(value, Tensor)}
    sources |= {} if rule is None else {f"rule[{key}]": value for key, value in rule.learned().items()}
    for role, batch in (("support", support), ("query", query)):
        for part, value in zip(("x", "y", "weights"), batch, strict=True):
            if isinstance(value, Tensor) and value.is_floating_point():
                sources[f"{role}_{part}"] = value
    wanted = {key: value for key, value in sources.items() if value.requires_grad}
    if isinstance(objective, Tensor) and objective.requires_grad:
        grads = torch.autograd.grad(objective, [*wanted.values()], allow_unused=True)
    else:
        grads = [None] * len(wanted)
    for (key, value), grad in zip(wanted.items(), grads, strict=True):
        found[f"d {key}"] = torch.zeros_like(value) if grad is None else grad
    return {key: value.detach() for key, value in found.items()}


def has_rule(spec: Spec) -> bool:
    """Whether the call takes an update rule."""
    return spec.api not in ("task_forward", "task_gradient")


def memory_limit(spec: Spec, drawn: Drawn) -> int | None:
    """Bytes of a few copies of theta and a state of three times its size, of all tasks."""
    if spec.memory != "checkpoint" or not spec.memory_limit:
        return None
    one = sum(value.numel() * value.element_size() for value in drawn.params.values())
    return spec.memory_limit * 4 * spec.tasks * one


def _mask(w: Tensor | None, plain: PlainLoss, dtype: torch.dtype) -> tuple[Tensor | None, PlainLoss]:
    if w is None or w.dtype != torch.bool:
        return w, plain
    return w.to(dtype), PlainLoss(plain.kind, plain.options, plain.mean, "sum")


def cotangent(value: Tensor) -> Tensor:
    """Fixed numbers of both signs in the shape of a value."""
    steps = torch.arange(value.numel(), dtype=torch.float64)
    return torch.sin(1.7 * steps + 0.3).reshape(value.shape).to(value.dtype)


def ours(spec: Spec, drawn: Drawn) -> dict[str, Tensor]:
    """The same by the library."""
    d = drawn
    dtype = getattr(torch, spec.dtype)
    loss, query_loss = (
        losses_of(spec, spec.loss, dtype)[0],
        losses_of(spec, spec.query_loss or spec.loss, dtype)[0],
    )
    params, lr, support, query = leaf(d.params), leaf(d.lr), leaf(d.support), leaf(d.query)
    if spec.no_input_gradients:
        support, query = [
            tuple(None if x is None else x.detach() for x in batch) for batch in (support, query)
        ]
    rule, learned = library_rule(spec, dtype)
    common = {"batch_stats": spec.batch_stats, "backend": spec.backend}
    inner = {
        "loss": loss,
        "steps": spec.steps,
        "order": spec.order,
        "adapt": d.adapt,
        "weight_norm": spec.weight_norm,
        "update_rule": rule,
        "memory": spec.memory,
        "memory_limit": memory_limit(spec, d),
        "support_per_step": spec.per_step,
        "task_chunk": spec.chunk,
        "lr": lr,
        **common,
    }
    api = spec.api
    found: dict[str, Tensor] = {}
    if api == "meta_gradient":
        sources = ["params", "lr", *(["rule"] if learned else [])]
        if not spec.no_input_gradients:
            for role, batch in (("support", support), ("query", query)):
                sources += [
                    f"{role}_{part}"
                    for part, x in zip(("x", "y", "weights"), batch, strict=True)
                    if x is not None and x.is_floating_point()
                ]
        out = fm.meta_gradient(
            d.net,
            params,
            support[:2],
            query[:2],
            query_loss=query_loss,
            wrt=sources,
            step_weights=d.step_weights,
            support_step_weights=d.support_step_weights,
            task_weights=d.task_weights,
            support_weights=support[2],
            query_weights=query[2],
            **inner,
        )
        found = {"loss": out.loss, "task_losses": out.task_losses, "output": out.output}
        found |= {f"d params[{name}]": value for name, value in out.grads.items()}
        if isinstance(lr, dict):
            found |= {f"d lr[{key}]": out.lr[key] for key, value in lr.items() if isinstance(value, Tensor)}
        elif isinstance(lr, Tensor):
            found["d lr"] = out.lr
        found |= {f"d rule[{name}]": value for name, value in (out.rule or {}).items()}
        of_data = [name for name in sources if name not in ("params", "lr", "rule")]
        return found | {f"d {name}": getattr(out, name) for name in of_data}
    if api == "MAML":
        d.net.zero_grad()
        maml = fm.MAML(
            d.net,
            query_loss=query_loss,
            inner_lr=d.lr,
            inner_steps=spec.steps,
            step_weights=d.step_weights,
            support_step_weights=d.support_step_weights,
            **{k: v for k, v in inner.items() if k not in ("lr", "steps", "support_per_step")},
        )
        out = maml(*support[:2], *query[:2], d.task_weights, support[2], query[2], spec.per_step)
        if out.loss.requires_grad:
            out.loss.backward()
        found = {"loss": out.loss, "task_losses": out.task_losses, "output": out.output}
        found |= {
            f"d params[{name}]": value.grad
            for name, value in d.net.named_parameters()
            if value.grad is not None
        }
        return found | _by_rule(learned) | _gradients({"support": support, "query": query})
    if api == "adapt":
        d.net.zero_grad()
        maml = fm.MAML(
            d.net,
            inner_lr=d.lr,
            inner_steps=spec.steps,
            **{k: v for k, v in inner.items() if k not in ("lr", "steps", "support_per_step")},
        )
        values = maml.adapt(*support[:2], weights=support[2])
        sum((value * cotangent(value)).sum() for value in values.values()).backward()
        found = {f"value[{name}]": value for name, value in values.items()}
        found |= {
            f"d params[{name}]": value.grad
            for name, value in d.net.named_parameters()
            if value.grad is not None
        }
        return found | _by_rule(learned) | _gradients({"support": support})
    if api == "task_forward":
        output = fm.task_forward(d.net, params, query[0], task_chunk=spec.chunk, **common)
        (output * cotangent(output)).sum().backward()
        found = {"output": output}
        return found | _gradients({"query": query[:1]}) | _own(params)
    if api == "task_gradient":
        values = fm.task_gradient(
            d.net,
            params,
            *support[:2],
            loss=loss,
            adapt=d.adapt,
            weights=support[2],
            weight_norm=spec.weight_norm,
            **common,
        )
        sum((value * cotangent(value)).sum() for value in values.values()).backward()
        return (
            {f"value[{name}]": value for name, value in values.items()}
            | _gradients({"support": support})
            | _own(params)
        )
    values = fm.inner_sgd(d.net, params, *support[:2], weights=support[2], **inner)
    sum((value * cotangent(value)).sum() for value in values.values()).backward()
    found = {f"value[{name}]": value for name, value in values.items()} | _own(params)
    if isinstance(lr, Tensor):
        found["d lr"] = lr.grad
    elif isinstance(lr, dict):
        found |= {f"d lr[{key}]": value.grad for key, value in lr.items() if isinstance(value, Tensor)}
    return found | _by_rule(learned) | _gradients({"support": support})


def _by_rule(learned: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"d rule[{name}]": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in learned.items()
        if value.requires_grad
    }


def _own(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"d params[{name}]": value.grad for name, value in params.items() if value.grad is not None}


def _gradients(batches: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"d {role}_{part}": value.grad
        for role, batch in batches.items()
        for part, value in zip(("x", "y", "weights"), batch, strict=False)
        if isinstance(value, Tensor) and value.grad is not None
    }
