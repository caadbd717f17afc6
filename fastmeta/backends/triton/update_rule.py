"""The inner steps by an update rule that is not plain SGD with momentum, as launches: the algorithm
of csrc/cpu/update_rule_steps.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.backends._rules import NUMBERS, bits, gradients_of_numbers, plain_numbers
from fastmeta.kernels import reduce, update_rule
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.rule_numbers import make_rows
from fastmeta.kernels.update_rules.numbers import ROW, Form
from fastmeta.problem import Problem
from fastmeta.update_rules import UpdateRule

_CLIPS = ("clip_value", "clip_norm")


class UpdateRuleSteps:
    """The static tensors of a rule, and its launches. Gradient and state of every step are kept
    where a gradient is wanted.

    Args:
        state: the `StepState` that it is a part of.
        problem: what is asked.
        rule: that of the problem.
    """

    def __init__(self, state: Any, problem: Problem, rule: UpdateRule) -> None:
        self.state, self.rule = state, rule
        new, tasks, size, steps = state.memory.new, state.tasks, state.layout.size, state.steps
        wrt = state.wrt
        self.learned = [name for name in NUMBERS if name in problem.hyper]
        self.wanted = self.learned if "rule" in wrt else []
        kept = steps if wrt else 1
        count = len(rule.state)
        self.gradients = new(kept, tasks, size)
        self.states = new(max(kept - 1, 1), count, tasks, size)  # after steps 0, 1, ...
        plain = torch.tensor(plain_numbers(rule), dtype=torch.float64, device="cpu")
        self.plain = plain.to(state.memory.device)
        self.given = new(steps, len(NUMBERS)) if self.learned else None
        self.rows = new(steps, ROW)
        programs = blocks(size, update_rule.BLOCK)
        by_norm = rule.has("clip_norm")
        self.squares = new(kept, tasks, programs) if by_norm else None
        # v is read by the Hessian-vector product, and by clipping on the way back
        self.wants_v = state.second or any(name in _CLIPS for name in self.wanted)
        self.mbar = new(count, tasks, size) if wrt else None
        self.dots = new(tasks, programs) if by_norm and self.wants_v else None
        self.parts = self.total = self.ranges = None
        if self.wanted:
            self.parts = new(tasks * programs, steps * len(NUMBERS))
            self.total = new(steps * len(NUMBERS))
            self.ranges = new(reduce.RANGES, steps * len(NUMBERS))

    # ---- what a call gives and gets

    def targets(self) -> list[Tensor]:
        """Where the learned numbers go, [K] each."""
        return [self.given[:, NUMBERS.index(name)] for name in self.learned]  # type: ignore[index]

    def sources(self, problem: Problem) -> list[Tensor]:
        """What goes there."""
        return [problem.hyper[name].expand(self.state.steps) for name in self.learned]

    def gradients_of_numbers(self, problem: Problem) -> dict[str, Tensor]:
        """Fresh copies of the gradients of the learned numbers."""
        rows = None if self.total is None else self.total.view(self.state.steps, len(NUMBERS))
        return gradients_of_numbers(problem, rows)

    # ---- launches

    def start(self, unused: bool) -> None:
        """The numbers of all steps.

        Args:
            unused: some parameters have no gradient, which stays zero.
        """
        emit = self.state.emit
        make_rows(emit, self.plain, self.given, bits(self.learned), self.rows)
        if unused:
            emit.zero(self.gradients)
        if self.parts is not None:
            emit.zero(self.parts)

    def gradient(self, k: int) -> Tensor:
        """[T, P], where the gradient of step k goes."""
        return self.gradients[k if self.state.wrt else 0]

    def step(self, k: int) -> None:
        """theta_{k+1} and the state after step k."""
        state = self.state
        after = () if state.wrt and k == state.steps - 1 else self._after(k)
        out = state.thetas[k]
        update_rule.emit_step(state.emit, state.tasks, self._place(k), out, after, self._form(k, ()))

    def back(self, k: int) -> None:
        """Back through step k but for what passes through the gradient: lambda becomes that of
        theta_k, v dJ/dg_k; the gradients of rates and of numbers."""
        state = self.state
        by_rate = state.updates[0] if state.wants_rates else None
        parts = None
        if self.parts is not None:
            parts = self.parts[:, k * len(NUMBERS) : (k + 1) * len(NUMBERS)]
        update_rule.emit_back(
            state.emit,
            state.tasks,
            self._place(k),
            state.lam,
            list(self.mbar),  # type: ignore[arg-type]
            state.v,
            by_rate,
            parts,
            self.dots,
            k == state.steps - 1,
            self._form(k, self.wanted),
        )

    def finish(self) -> None:
        """Sums of the gradients of numbers over all tasks."""
        if self.parts is not None:
            reduce.over_tasks(self.state.emit, self.parts, self.ranges, self.total)  # type: ignore[arg-type]

    def _after(self, k: int) -> list[Tensor]:
        return list(self.states[k if self.state.wrt else 0])

    def _place(self, k: int) -> update_rule.Place:
        state = self.state
        squares = None if self.squares is None else self.squares[k if state.wrt else 0]
        before = self._after(k - 1) if k else ()
        return update_rule.Place(
            state.theta_rows(k),
            self.gradient(k),
            squares,
            state.rates_of(k),
            state.index,
            self.rows[k],
            update_rule.states(before),
        )

    def _form(self, k: int, wanted: list[str] | tuple[str, ...]) -> Form:
        rule, options = self.rule, self.rule.options
        return Form(
            kind=rule.kind,
            nesterov=bool(options.get("nesterov")),
            centered=bool(options.get("centered")),
            momentum=rule.has("momentum"),
            weight_decay=rule.has("weight_decay"),
            eps_root=rule.has("eps_root"),
            clip_value=rule.has("clip_value"),
            clip_norm=rule.has("clip_norm"),
            states=len(rule.state),
            learned=bits(wanted),
            first=k == 0,
        )
