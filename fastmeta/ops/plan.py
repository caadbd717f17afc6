"""From an operator's arguments to a checked problem. What depends on no tensor's values is checked
once and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch.autograd import forward_ad

from fastmeta import backends
from fastmeta.backends._traced import functions_of, guarded
from fastmeta.bounded import Bounded
from fastmeta.capture.capture import captured, frozen_flags, guard_of
from fastmeta.capture.guards import Guard
from fastmeta.errors import BackendUnavailable
from fastmeta.graph.program import Program
from fastmeta.inputs import Tree, leaves_of
from fastmeta.losses import Loss
from fastmeta.network.functional import check_batch_stats
from fastmeta.network.renormalised import check_renormalised
from fastmeta.network.swap import LOCK
from fastmeta.ops.adapted import BY_GRAD, Adapted, adapted_now
from fastmeta.ops.capture_check import check_capture
from fastmeta.ops.checks import Shapes, Tensors, check_losses, check_tensors, check_wrt
from fastmeta.ops.failure import check_examples, diagnose
from fastmeta.ops.masks import check_layers, masked, without_masks
from fastmeta.ops.options import Options, argument, check_options
from fastmeta.ops.rates import RatePlan, Rates, plan_rates, rates_key
from fastmeta.ops.rule_numbers import NONE as NO_HYPER
from fastmeta.ops.rule_numbers import Hyper, bare, check_hyper, check_rule_wrt
from fastmeta.ordinary import all_known, all_plain, check_ordinary, lack_memory, plain, plain_tree, sorts
from fastmeta.problem import Batch, Captures, Problem, Result, Scratch
from fastmeta.undisturbed import asynchronous, undisturbed, undrawn

_FAKE = _TorchDispatchModeKey.FAKE
NOTHING: frozenset[str] = frozenset()
# A learning rate that changes at every step makes a new plan each time: keep the last few of a
# network.
_MOST_PLANS = 256
_engine = backends.get("cpu")
# These backends evaluate the module itself and need no program.
_RUN_THE_MODULE = ("torch", "reference")
_NATIVE = ("fastmeta.backends.cpu", "fastmeta.backends.machine")
# These trace the module, and have compared what they traced with it.
_TRACE = ("machine", "inductor")


@dataclass(slots=True)
class Plan:
    """What is known of a call before the values of its tensors are."""

    backend: ModuleType
    program: Program | None
    refused: str  # why there is no program
    shapes: Shapes
    rates: RatePlan
    order: (
        tuple[str, ...] | None
    )  # of the parameters, where it is not the network's own in what the user gave
    scratch: Scratch
    flags: tuple[bool, ...] | None  # which parameters require grad, where `adapt` asks
    native: bool = False  # the backend calls into nothing that has a global state to leave behind
    guard: Guard | None = None  # of a network that was traced: holds while the network does not change
    looks: bool = False  # the backend looks at the memory of all tensors itself, at every call
    losses: tuple[tuple[nn.Module, Guard], ...] = ()  # those of the user's own, and what they are of


@dataclass(slots=True)
class Call:
    """One call of an operator: its problem, and what it takes to say what is wrong with it."""

    options: Options
    tensors: Tensors
    plan: Plan
    problem: Problem
    lr: Rates  # as given
    wrt: frozenset[str]
    hyper: Hyper  # as given

    def solve(self, adapted: bool = False) -> Result:
        """The answer of the backend.

        Args:
            adapted: whether the adapted parameters are wanted.

        Raises:
            ValueError, TypeError: the network or the loss cannot take a tensor; the message names
                it.
        """
        if self.plan.native:
            return self._solve(adapted)
        return undrawn(self.plan.shapes.device, self._solve, adapted)

    def _solve(self, adapted: bool) -> Result:
        problem = self.problem
        try:
            return self.plan.backend.solve(problem, self.wrt, adapted)
        except Exception as error:
            if asynchronous(error):
                raise
            self.diagnose()
            raise

    def diagnose(self) -> None:
        """After an error: look for the argument that it comes from.

        Raises:
            ValueError, TypeError: names the argument.
        """
        problem, losses = self.problem, (self.problem.loss, self.problem.query_loss)
        given = self.options, problem.net, problem.params, self.tensors, self.plan.shapes, losses, self.lr
        diagnose(*given, self.hyper)


def mean_loss(result: Result, task_weights: Tensor | None) -> Tensor:
    """sum_t w_t loss_t / T, (): the mean where there are no weights."""
    if result.loss is not None:
        return result.loss
    task_losses = cast(Tensor, result.task_losses)
    if task_weights is None:
        return task_losses.mean()
    return torch.dot(task_losses, task_weights.detach()) / task_losses.shape[0]


class _Given(NamedTuple):
    """The arguments of `prepare`."""

    options: Options
    net: nn.Module
    params: Mapping[str, Tensor]
    tensors: Tensors
    loss: Loss | None
    query_loss: Loss | None
    lr: Rates
    wrt: frozenset[str]
    adapted_grad: dict[str, Tensor] | None
    output_grad: Tree
    prefer_flat: bool
    frozen: frozenset[str]
    captures: Captures | None
    hyper: Hyper


_plans: WeakKeyDictionary[nn.Module, Bounded[object, Plan]] = WeakKeyDictionary()


def prepare(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    loss: Loss | None,
    query_loss: Loss | None,
    lr: Rates,
    wrt: frozenset[str] = NOTHING,
    adapted_grad: dict[str, Tensor] | None = None,
    output_grad: Tree = None,
    prefer_flat: bool = False,
    frozen: frozenset[str] = NOTHING,
    captures: Captures | None = None,
    hyper: Hyper = NO_HYPER,
) -> Call:
    """Check one call and choose its backend.

    Args:
        options, net, params, tensors, loss, query_loss, lr: as the user gave them; no loss where
            there is no target.
        wrt: the gradients wanted.
        prefer_flat, frozen, captures: as in `Problem`.
        hyper: the tensors of the update rule by name, where it has any.
        adapted_grad, output_grad: cotangents, as in `Problem`; the operators' own, and not checked.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        RuntimeError: whatever is made now has no values, or a tangent that would be lost.
        BackendUnavailable: the backend asked for cannot run this.
    """
    # subclasses of tensors are taken off; those that cannot be are for the full check to refuse
    if not all_known(params, tensors, lr, adapted_grad, output_grad) or (hyper and not all_known(hyper)):
        params, tensors, lr, hyper = plain(params), plain(tensors), plain(lr), plain(hyper)
        adapted_grad, output_grad = plain(adapted_grad), plain_tree(output_grad)
        if not all_plain(params, tensors, lr, adapted_grad, output_grad, hyper):
            how = adapted_grad, output_grad, prefer_flat, frozen, captures, hyper
            given = _Given(options, net, params, tensors, loss, query_loss, lr, wrt, *how)
            return undisturbed(_first_call, given, [])
    if _get_dispatch_mode(_FAKE) is not None:
        raise RuntimeError(
            f"{options.who}: a FakeTensorMode is active, whose tensors have no values to compute with; leave "
            "it for this call"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{options.who}: forward-mode differentiation is active (torch.autograd.forward_ad, "
            "torch.func.jvp), which does not reach into fastmeta: leave it for this call, and differentiate "
            "by .backward() or torch.autograd.grad"
        )
    with LOCK:
        masks = masked(tensors)
        if masks:
            tensors, loss, query_loss = without_masks(options, net, params, tensors, loss, query_loss)
        how = adapted_grad, output_grad, prefer_flat, frozen, captures, hyper
        given = _Given(options, net, params, tensors, loss, query_loss, lr, wrt, *how)
        return _prepared(given, masks)


def _prepared(given: _Given, masks: list[str]) -> Call:
    (
        options,
        net,
        params,
        tensors,
        loss,
        query_loss,
        lr,
        wrt,
        adapted_grad,
        output_grad,
        prefer_flat,
        frozen,
        _,
        hyper,
    ) = given
    try:
        key = (
            options,
            options.steps.__class__,  # True == 1 == 1.0
            options.task_chunk.__class__,
            options.support_per_step.__class__,
            wrt,
            None if loss is None else loss.key if loss.plain else (loss.key, loss.learned),
            None
            if query_loss is None
            else query_loss.key
            if query_loss.plain
            else (query_loss.key, query_loss.learned),
            rates_key(lr),
            *params,
            sorts([*params.values(), *tensors]),
            adapted_grad is None,
            output_grad is None,
            prefer_flat,
            frozen,
            *masks,
        )
        if hyper:
            key = (*key, bare(hyper))
        plans = _plans.get(net)
        plan = None if plans is None else plans.get(key)
    except (
        Exception
    ) as error:  # an argument of any type was hashed or compared here: the full check will name it
        if asynchronous(error):
            raise
        return undisturbed(_first_call, given, masks)
    if plan is None:
        return undisturbed(_first_call, given, masks, key)
    if _changed(plan, net, options):
        return undisturbed(_first_call, given, masks, key)
    if plan.flags is not None and (flags := frozen_flags(net)) != plan.flags:
        key = (*key, flags)
        plan = plans.get(key) if plans is not None else None
        if plan is None or _changed(plan, net, options):
            return undisturbed(_first_call, given, masks, key)
    if options.batch_stats != "task":
        check_batch_stats(net, options.batch_stats)
    problem = _problem(plan, given)
    if not plan.looks and _lost_memory(problem, tensors):
        return undisturbed(_first_call, given, masks, key)
    return Call(options, tensors, plan, problem, lr, wrt, hyper)


def _changed(plan: Plan, net: nn.Module, options: Options) -> bool:
    """Whether the network is another one than the plan was made for."""
    if plan.guard is not None:
        return guard_of(net) is not plan.guard or not all(guard.holds(held) for held, guard in plan.losses)
    program, _ = captured(net, plan.shapes.input, plan.shapes.dtype, options.batch_stats)
    return program is not plan.program


def _lost_memory(problem: Problem, tensors: Tensors) -> bool:
    """Whether a tensor's storage was freed since the plan was made."""
    losses = [loss for loss in (problem.loss, problem.query_loss) if loss is not None]
    others = [problem.output_grad, *[weight for loss in losses for weight in (loss.weight, loss.pos_weight)]]
    others += problem.hyper.values()
    buffers = () if problem.batch_stats == "task" else problem.net.buffers()
    return lack_memory(problem.params, tensors, problem.rates, problem.adapted_grad, others, buffers)


def _first_call(given: _Given, masks: Sequence[str] = (), key: object = None) -> Call:
    """The full check. The plan is kept under `key`, where there is one and the network is
    captured."""
    options, net, tensors, wrt = given.options, given.net, given.tensors, given.wrt
    check_options(options)
    _check_given(given)
    shapes = check_tensors(options, net, given.params, tensors)
    check_examples(options, net, given.params, tensors, shapes)
    check_wrt(options.who, wrt, tensors)
    check_rule_wrt(options.who, wrt, given.hyper)
    check_hyper(options.who, options.rule, given.hyper, options.steps, shapes.device, shapes.dtype)
    check_losses(options.who, tensors, given.loss, given.query_loss)
    for cotangent in (*leaves_of(given.output_grad), *(given.adapted_grad or {}).values()):
        check_ordinary(f"{options.who}: a gradient of its results", cotangent)
    for used in (given.loss, given.query_loss):
        if used is not None:
            used.check_tensors()
    check_batch_stats(net, options.batch_stats)
    names, frozen = Adapted(()) if tensors.support_x is None else adapted_now(options.who, net, options.adapt)
    if options.steps:
        check_renormalised(options.who, net, names)
    rates = plan_rates(
        options.who,
        given.lr,
        names=names,
        shapes=shapes.params,
        steps=options.steps,
        tasks=shapes.tasks,
        device=shapes.device,
        dtype=shapes.dtype,
        unused=frozen,
    )
    program, refused = _capture(options, net, tensors, shapes, (given.loss, given.query_loss))
    if program is not None:
        _check_targets(given, shapes, program.output_shape)
    own = tuple(shapes.params)
    given_order = None if own == tuple(given.params) else own
    plan = Plan(
        backend=backends,  # chosen below
        program=program,
        refused=refused,
        shapes=shapes,
        rates=rates,
        order=given_order,
        scratch=Scratch(),
        flags=None,
    )
    problem = _problem(plan, given)
    check_layers(options, masks, problem)
    try:
        plan.backend = backends.select(options.backend, problem, wrt)
    except BackendUnavailable:  # it may be the tensors that do not fit
        losses = given.loss, given.query_loss
        diagnose(options, net, problem.params, tensors, shapes, losses, given.lr, given.hyper)
        raise
    plan.native = plan.backend.__name__ in _NATIVE
    # the machine makes copies of buffers first
    plan.looks = plan.backend is _engine or (plan.native and next(net.buffers(), None) is None)
    name = plan.backend.__name__.rpartition(".")[2]
    if name in _TRACE:
        plan.guard = guard_of(net)
        plan.losses = tuple(map(guarded, functions_of(problem)))
    if plan.guard is not None or (program is not None and name not in _RUN_THE_MODULE):
        if plan.guard is None and (problem.steps or problem.query is not None):  # else nothing is run
            check_capture(plan.backend, problem)
        if key is not None:
            if names and options.adapt in BY_GRAD:
                plan.flags = frozen_flags(net)
            _plans.setdefault(net, Bounded(_MOST_PLANS)).put(key, plan)
    return Call(options, tensors, plan, problem, given.lr, wrt, given.hyper)


def _check_given(given: _Given) -> None:
    """Every set that is used has inputs, and targets if there is a loss on it."""
    sets = {"support": given.loss is not None, "query": given.query_loss is not None}
    if not any(sets.values()):
        needed = ["query_x"]
    else:
        needed = [f"{part}_{which}" for part, used in sets.items() if used for which in ("x", "y")]
    for field in needed:
        if getattr(given.tensors, field) is None:
            raise TypeError(f"{argument(given.options.who, field)} must be a tensor, got None")


def _problem(plan: Plan, given: _Given) -> Problem:
    options, net, params, tensors, loss, query_loss, lr, _, adapted_grad, output_grad, prefer_flat = given[
        :11
    ]
    support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights = tensors
    shapes = plan.shapes
    if plan.order is not None:
        params = {name: params[name] for name in plan.order}
    return Problem(
        net=net,
        params=params,  # type: ignore[arg-type]
        per_task=shapes.per_task,
        tasks=shapes.tasks,
        steps=options.steps,
        support=None
        if support_x is None
        else Batch(support_x, support_y, support_weights, options.support_per_step),
        query=None if query_x is None else Batch(query_x, query_y, query_weights),
        loss=loss,
        query_loss=query_loss,
        rates=plan.rates.spread(lr),
        rule=None if support_x is None else options.rule,
        hyper=given.hyper,
        order=options.order,
        step_weights=options.step_weights,
        support_step_weights=options.support_step_weights,
        task_weights=task_weights,
        memory=options.memory,
        memory_limit=options.memory_limit,
        task_chunk=options.task_chunk,
        batch_stats=options.batch_stats,
        adapted_grad=adapted_grad,
        output_grad=output_grad,
        program=plan.program,
        refused=plan.refused,
        prefer_flat=prefer_flat,
        scratch=plan.scratch,
        frozen=given.frozen,
        captures=given.captures,
    )


def _capture(
    options: Options, net: nn.Module, tensors: Tensors, shapes: Shapes, losses: tuple[Loss | None, ...]
) -> tuple[Program | None, str]:
    for x in (tensors.support_x, tensors.query_x):
        if x is not None and not isinstance(x, Tensor):
            return None, f"the network's input is no single tensor, but {type(x).__name__}"
        if x is not None and not x.is_floating_point():
            return None, f"the network's input is {x.dtype}"
    for loss in losses:
        if loss is not None and loss.learned:
            return None, f"`{loss.learned}` of the loss {loss.kind} requires grad"
    if options.backend in _RUN_THE_MODULE:
        return None, f"backend={options.backend!r} runs the module itself"
    return captured(net, shapes.input, shapes.dtype, options.batch_stats)


def _check_targets(given: _Given, shapes: Shapes, output: tuple[int, ...]) -> None:
    """The targets against the output; without a program the losses do so when they meet it."""
    who, tensors = given.options.who, given.tensors
    for field, target, loss, lead in (
        ("support_y", tensors.support_y, given.loss, shapes.support),
        ("query_y", tensors.query_y, given.query_loss, shapes.query),
    ):
        if target is not None and loss is not None:
            loss.check_target(argument(who, field), target, lead, output, shapes.dtype)
