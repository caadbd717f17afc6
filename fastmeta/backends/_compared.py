"""What was traced, compared with the module itself on other numbers than it was traced with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from math import isfinite

import torch
from torch import Tensor

from fastmeta.inputs import Tree, leaves_of, mapped
from fastmeta.problem import Batch, Problem, Result, Scratch

#: Largest relative difference from the module itself that rounding explains.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}


def varied(problem: Problem, seed: int) -> Problem:
    """The same problem with its parameters and inputs moved, and the parameters of a rule of the
    user's own: a number that was baked in shows."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def noisy(tensor: Tensor, share: float) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor)
        return tensor.detach() + share * noise * tensor.detach().abs().mean()

    def batch(given: Batch | None) -> Batch | None:
        return None if given is None else replace(given, x=mapped(lambda x: noisy(x, 0.3), given.x))

    return replace(
        problem,
        params={name: noisy(value, 0.05) for name, value in problem.params.items()},
        support=batch(problem.support),
        query=batch(problem.query),
        hyper={name: noisy(value, 0.05) for name, value in problem.hyper.items()}
        if problem.rule is not None and problem.rule.kind == "custom"
        else problem.hyper,
        scratch=Scratch(),
        captures=None,
    )


def finite(result: Result) -> bool:
    """Whether the losses, the output and all gradients are."""
    return all(bool(expected.isfinite().all()) for _, _, expected in _pairs(result, result))


def difference(found: Result, expected: Result, dtype: torch.dtype) -> str:
    """What differs most, "" if nothing does by more than rounding.

    Args:
        found: by what was traced.
        expected: by the module itself.
        dtype: of the parameters.
    """
    pairs = list(_pairs(found, expected))
    sizes = [float(e.norm()) for what, _, e in pairs if what.startswith("the gradient")]
    floor = 1e-3 * max(filter(isfinite, sizes), default=0.0)  # NaN where a formula has it
    for what, f, e in pairs:
        if f is None or f.shape != e.shape:
            return f"{what} is missing"
        size, off = float(e.norm()), float((f - e).norm())
        if isfinite(size) and not off <= _TOLERANCE[dtype] * (size + floor) + 1e-12:
            return f"{what} by {off / size if size else off:.1e}"
    return ""


def _pairs(found: Result, expected: Result) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(what, that of what was traced, that of the module)."""
    groups: dict[str, tuple[Tree, Tree]] = {
        "the losses": (found.task_losses, expected.task_losses),
        "the output": (found.output, expected.output),
    }
    mine, theirs = found.grads, expected.grads
    named = {"what was adapted": (found.adapted, expected.adapted)}
    named |= {
        f"the gradient by {part}": (getattr(mine, part), getattr(theirs, part))
        for part in ("params", "lr", "rule")
    }
    for what, (own, of) in named.items():
        groups[what] = ([(own or {}).get(name) for name in of or {}], list((of or {}).values()))
    for part in ("support_x", "support_y", "support_weights", "query_x", "query_y", "query_weights"):
        groups[f"the gradient by {part}"] = (getattr(mine, part), getattr(theirs, part))
    for what, (f, e) in groups.items():
        leaves = leaves_of(e)
        own_leaves = leaves_of(f) if f is not None else [None] * len(leaves)
        for left, right in zip_longest(own_leaves, leaves):
            if right is not None:
                yield what, None if left is None else left.double(), right.double()
