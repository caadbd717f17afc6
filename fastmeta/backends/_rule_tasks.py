"""One inner step of all tasks: at once, by vmap, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import leaves_behind
from fastmeta.backends._random_state import preserved_for
from fastmeta.bounded import Known
from fastmeta.inputs import Form, flatten, leaves_of, mapped
from fastmeta.network.functional import Conventions, own
from fastmeta.problem import Problem
from fastmeta.undisturbed import asynchronous
from fastmeta.update_rules import CustomRule, UpdateRule
from fastmeta.update_rules.rule import Named, Number, State

#: Largest relative difference between vmap and the loop that rounding explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Sorts of problems of one network that something is remembered of.
_MOST_SORTS = 256
_vmapped: Known[int, bool] = Known(_MOST_SORTS)


def start_of_all(rule: UpdateRule, theta: Named) -> State:
    """The state of all tasks before the first step: theta and what comes are [T, ...]."""
    if not isinstance(rule, CustomRule):
        return rule.init(theta)
    tasks = next(iter(theta.values())).shape[0]
    each = [rule.init({name: value[t] for name, value in theta.items()}) for t in range(tasks)]
    return mapped(lambda *leaves: torch.stack(leaves), each[0], *each[1:])


def through_start(rule: UpdateRule, theta: Named, sbar: Sequence[Tensor]) -> dict[str, Tensor]:
    """What of dJ/dtheta_0 comes from the state before the first step, where `init` makes that of
    theta; {} where it does not.

    Args:
        rule: the rule.
        theta: theta_0, [T, *shape] throughout.
        sbar: dJ by the floating-point leaves of the state, [T, ...] each.
    """
    if not isinstance(rule, CustomRule):
        return {}
    leaves = {name: own(value, True) for name, value in theta.items()}
    with torch.enable_grad():
        state = [x for x in leaves_of(start_of_all(rule, leaves)) if x.is_floating_point()]
    pairs = [(x, by) for x, by in zip(state, sbar, strict=True) if x.requires_grad]
    if not pairs:
        return {}
    found = _inputs.gradients([x for x, _ in pairs], [*leaves.values()], [by for _, by in pairs])
    return dict(zip(leaves, found, strict=True))


def step_of_all(
    p: Problem,
    rule: UpdateRule,
    theta: Named,
    g: Named,
    state: State,
    rates: Named,
    hyper: Mapping[str, Tensor],
    k: int,
) -> tuple[Named, State]:
    """One inner step of all tasks: (theta', state').

    Args:
        p: the problem.
        rule: its rule.
        theta, g, state: [T, ...] each.
        rates: [T or 1, *(S or 1s)].
        hyper: as in a `Problem`.
        k: the step.
    """
    numbers = rule.at_step(hyper, k)
    if rule.elementwise:
        return rule.step(theta, g, state, rates, numbers, k)
    tasks = next(iter(theta.values())).shape[0]
    shared = {name: rate[0] for name, rate in rates.items() if rate.shape[0] != tasks or tasks == 1}
    own_rates = {name: rate for name, rate in rates.items() if name not in shared}
    given, form = flatten((theta, g, state, own_rates))
    step = _OneTask(p, rule, form, shared, numbers, k)
    if tasks == 1 or (isinstance(rule, CustomRule) and not _is_vmapped(step, rule, given)):
        found = step.looped(given)
    else:
        found = step.vmapped(given)
    return step.built(found)


def step_of_one(
    p: Problem,
    rule: UpdateRule,
    theta: Named,
    g: Named,
    state: State,
    rates: Named,
    hyper: Mapping[str, Tensor],
    k: int,
) -> tuple[Named, State]:
    """`step_of_all` of one task: no tensor has a dimension for tasks."""
    numbers = rule.at_step(hyper, k)
    if not isinstance(rule, CustomRule):
        return rule.step(theta, g, state, rates, numbers, k)
    with Conventions("module", decompose=p.third):
        return rule.step(theta, g, state, rates, numbers, k)


def check_reads(p: Problem) -> None:
    """Check that a rule of the user's own reads no tensor that requires grad but its arguments and
    its parameters: that one's gradient would be missing.

    Runs one step of the first task; draws nothing from the random state.

    Raises:
        ValueError: it does.
    """
    rule = p.rule
    if not isinstance(rule, CustomRule) or not p.steps:
        return
    first = {name: p.params[name][0] if name in p.per_task else p.params[name] for name in p.rates}
    # copies: what is modified in place is refused, and is the user's
    theta, g = ({name: own(value.detach().clone(), True) for name, value in first.items()} for _ in range(2))
    rates = {name: own(rate[0, 0]) for name, rate in p.rates.items()}
    hyper = {name: own(value, True) for name, value in p.hyper.items()}
    with preserved_for(p):
        state = rule.init(theta)
        check_start(state, theta)
        moved, after = step_of_one(p, rule, theta, g, state, rates, hyper, 0)
    known = {id(tensor) for group in (theta, g, hyper) for tensor in group.values()}
    for output in (*moved.values(), *leaves_of(after)):
        for leaf in _leaves(output):
            if id(leaf) not in known:
                raise ValueError(
                    f"CustomRule: `function` reads a tensor {tuple(leaf.shape)} that requires grad and is "
                    "none of its arguments; make it a parameter of an nn.Module that is the function, or "
                    "detach it"
                )


def check_start(state: State, theta: Named) -> None:
    """Check that the state before the first step depends on theta alone: other gradients through
    `init` would be missing.

    Raises:
        ValueError: it depends on something else that requires grad.
    """
    known = {id(value) for value in theta.values()}
    for start in leaves_of(state):
        for leaf in _leaves(start):
            if id(leaf) not in known:
                raise ValueError(
                    f"CustomRule: `init` reads a tensor {tuple(leaf.shape)} that requires grad and is not "
                    "theta; it would get no gradient: detach it"
                )


def _leaves(output: Tensor) -> list[Tensor]:
    return leaves_behind(output) if output.grad_fn is not None else [output] * output.requires_grad


class _OneTask:
    """The step of one task as a function of a list of tensors, and its ways over all tasks."""

    def __init__(
        self,
        p: Problem,
        rule: UpdateRule,
        form: Form,
        shared: Named,
        numbers: Mapping[str, Number],
        k: int,
    ) -> None:
        self.p, self.rule, self.form, self.shared, self.numbers, self.k = p, rule, form, shared, numbers, k
        self.out: Form | None = None

    def built(self, found: Sequence[Tensor]) -> tuple[Named, State]:
        """(theta', state') out of the list that comes."""
        if self.out is None:
            raise RuntimeError("no task was run")
        moved, after = self.out.build(found)
        return moved, after

    def looped(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One task after the other."""
        columns = zip(*[leaf.unbind() for leaf in given], strict=True)
        return tuple(map(torch.stack, zip(*[self._step(False, column) for column in columns], strict=True)))

    def vmapped(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All tasks side by side."""
        return torch.func.vmap(lambda *leaves: self._step(True, leaves), randomness="different")(*given)

    def _step(self, vectorised: bool, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        theta, g, state, rates = self.form.build(leaves)
        given = theta, g, state, {**self.shared, **rates}, self.numbers, self.k
        if isinstance(self.rule, CustomRule):
            with Conventions("module", decompose=vectorised or self.p.third):
                found = self.rule.step(*given)
        else:
            found = self.rule.step(*given)
        tensors, self.out = flatten(found)
        return tuple(tensors)


def _is_vmapped(step: _OneTask, rule: CustomRule, given: Sequence[Tensor]) -> bool:
    """Whether vmap runs a rule of the user's own, as the loop does in value and derivative: looked
    at once, on two tasks."""
    training = () if rule.module is None else tuple(module.training for module in rule.module.modules())
    key = hash((rule, training, step.form, tuple((leaf.shape[1:], leaf.dtype) for leaf in given)))
    known = _vmapped.get(step.p.net, key)
    return _vmapped.put(step.p.net, key, _agree(step, given)) if known is None else known


def _agree(step: _OneTask, given: Sequence[Tensor]) -> bool:
    loop, vmap = _derivatives(step, step.looped, given), None
    try:
        vmap = _derivatives(step, step.vmapped, given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if asynchronous(error):
            raise
    if loop is None or vmap is None:
        return False
    for expected, found in zip(loop, vmap, strict=True):
        off = float((expected - found).norm())
        if not off <= _TOLERANCE.get(expected.dtype, 0.05) * float(expected.norm()):
            return False
    return True


def _derivatives(
    step: _OneTask, run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], given: Sequence[Tensor]
) -> list[Tensor] | None:
    """What a step gives for two tasks, and a vector-Jacobian product; None if it draws random
    numbers."""
    leaves: list[Any] = [own(leaf[:2], True) for leaf in given]
    numbers = step.numbers
    learned = {n: own(v, True) if isinstance(v, Tensor) else v for n, v in numbers.items()}
    generator = torch.Generator("cpu").manual_seed(0)
    step.numbers = learned
    try:
        with preserved_for(step.p) as before, torch.enable_grad():
            found = [leaf for leaf in run(leaves) if leaf.is_floating_point()]
            if not before.anew().same_as(before):
                return None
    finally:
        step.numbers = numbers
    directions = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x) for x in found
    ]
    by = [leaf for leaf in (*leaves, *learned.values()) if isinstance(leaf, Tensor)]
    by = [leaf for leaf in by if leaf.is_floating_point()]
    return [*found, *_inputs.gradients(found, by, directions)]
