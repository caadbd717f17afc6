"""One layer alone: its four functions on a backend against `torch.func` on its plain forward.

The layer stands in a network whose examples are the rows of the identity matrix and whose first
layers are linear without a bias: their weights W [I, N] then *are* the inputs of the layer, x =
W^T, and the gradients by them are its own dx. With z the output, y the targets and v a direction of
all parameters, the backend is asked for

    forward     z                                 task_forward
    vjp         J^T c                             its backward pass, for a random c
    vjp_step    J^T s                             what an inner step subtracts, with dz = s
    jvp         J^T J v                           v minus what the backward pass of an inner step
                                                  makes of v, with dz = 0
    jvp_of_vjp  d/dt J(theta + t v)^T s at t = 0  the same with dz = s, whose tangent is zero

The loss is smooth_l1, (z - y)^2 / 2 near the target and |z - y| - 1/2 far from it. At y = z its
gradient is zero, and the tangent of the gradient is the tangent of z. Far away its gradient s is
the sign of z - y, here at random, and the tangent of that is zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor, nn

from fastmeta import backends
from fastmeta.capture.capture import captured
from fastmeta.graph.program import Program
from fastmeta.layers.kind import Example
from fastmeta.layers.registry import KINDS
from fastmeta.losses import resolve
from fastmeta.problem import Batch, Problem, Result, Scratch
from fastmeta.update_rules import SGD
from fastmeta.verify import plain, rule, runs
from fastmeta.verify.quantities import Key
from fastmeta.verify.rule import DTYPES, Row

#: Tasks, each with parameters of its own, and examples of each.
TASKS, BATCH = 2, 3
#: The inner learning rate, a power of two: beside what it multiplies, theta and v are nothing.
RATE = 2.0**16
#: How far a target is from the output where the loss is linear.
FAR = 8.0
#: Seeds tried until all inputs stay ten times `rule.CLEAR` away from every kink.
SEEDS = 50

_WRT = frozenset({"params"})
_Params = dict[str, Tensor]


class ReadAgain(nn.Module):
    """A layer whose inputs are read once more after it, so that it adds to their gradients."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        """The layer's output and the inputs, one after the other: [N, O + I]."""
        return torch.cat([value.flatten(1) for value in (self.layer(*inputs), *inputs)], 1)


@lru_cache(maxsize=64)
def examples(kind: str) -> tuple[Example, ...]:
    """The examples of a record, and the first one of them with its inputs read again.

    Raises:
        ValueError: the record has none.
    """
    found = KINDS[kind].examples
    if not found:
        raise ValueError(f"the layer kind {kind} has no examples")
    first = found[0]
    again = Example(f"{first.label}, inputs read again", partial(_read_again, first.make), first.shapes)
    return (*found, again)


def _read_again(make: Callable[[], nn.Module]) -> nn.Module:
    return ReadAgain(make())


def few(kind: str) -> list[Example]:
    """The examples for a backend that is slow to test, since it is interpreted or compiles anew."""
    return [example for example in examples(kind) if not example.extra]


class Alone(nn.Module):
    """[N, N], the identity -> a layer's output, of inputs that are parameters."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.shapes = example.shapes
        self.inputs = nn.ModuleList(nn.Linear(BATCH, prod(shape), bias=False) for shape in example.shapes)
        self.layer = example.make()

    def forward(self, x: Tensor) -> Tensor:
        """[N, N] -> [N, *out]."""
        fed = zip(self.inputs, self.shapes, strict=True)
        return self.layer(
            *(feed(x) if len(shape) == 1 else feed(x).unflatten(1, shape) for feed, shape in fed)
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """An example with numbers, in float64, of one seed that keeps clear of all kinks."""

    net: Alone
    program: Program
    params: _Params  # name -> [T, *shape]
    cotangent: Tensor  # c: [T, N, *out]
    signs: Tensor  # s: [T, N, *out]
    direction: _Params  # v: name -> [T, *shape]
    truth: dict[Key, Tensor]

    def task(self, t: int) -> _Params:
        """The parameters of a task, and the buffers."""
        return {**{n: p[t] for n, p in self.params.items()}, **dict(self.net.named_buffers())}


@lru_cache(maxsize=512)
def probe(example: Example) -> Probe:
    """The numbers of an example and what `torch.func` says of its plain forward.

    Raises:
        ValueError: it is not captured, or no seed keeps clear of its kinks.
    """
    for seed in range(SEEDS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = Alone(example).to(torch.float64)
        found = _drawn(net, torch.Generator().manual_seed(seed))
        if all(_distance(found, t) > 10 * rule.CLEAR for t in range(TASKS)):
            found.truth.update(_truth(found))
            return found
    raise ValueError(f"{example.label}: of {SEEDS} seeds none keeps clear of the kinks")


def _drawn(net: Alone, generator: torch.Generator) -> Probe:
    program, refused = captured(net, (BATCH,), torch.float64, "module")
    if program is None:
        raise ValueError(f"not captured: {refused}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params: _Params = {}
    for name, value in net.named_parameters():
        own = normal(TASKS, *value.shape)
        # norms begin at weights of one, others near zero
        params[name] = own if name.startswith("inputs.") else value.detach() + 0.3 * own
    out = (TASKS, BATCH, *program.output_shape)
    direction = {name: normal(*value.shape) for name, value in params.items()}
    return Probe(net, program, params, normal(*out), normal(*out).sign(), direction, {})


def _eye() -> Tensor:
    return torch.eye(BATCH, dtype=torch.float64)


def _distance(of: Probe, t: int) -> float:
    return plain.kink_distance(of.program, of.task(t), _eye())


def _truth(of: Probe) -> dict[Key, Tensor]:
    """The four functions by `torch.func`."""
    found: dict[Key, list[Tensor]] = {}

    def note(group: str, values: _Params) -> None:
        for name, value in values.items():
            found.setdefault((group, name), []).append(value.detach())

    for t in range(TASKS):
        rest = of.task(t)
        params = {name: rest.pop(name) for name in of.params}
        along = {name: value[t] for name, value in of.direction.items()}
        f = _forward(of.program, rest)
        z, vjp = torch.func.vjp(f, params)[:2]
        tangent = torch.func.jvp(f, (params,), (along,))[1]
        note("forward", {"": z})
        note("vjp", vjp(of.cotangent[t])[0])
        note("vjp_step", vjp(of.signs[t])[0])
        note("jvp", vjp(tangent)[0])
        note("jvp_of_vjp", torch.func.jvp(_backward(f, of.signs[t]), (params,), (along,))[1])
    return {key: torch.stack(values) for key, values in found.items()}


def _forward(program: Program, buffers: _Params) -> Callable[[_Params], Tensor]:
    return lambda params: plain.run(program, {**params, **buffers}, _eye())


def _backward(f: Callable[[_Params], Tensor], dz: Tensor) -> Callable[[_Params], _Params]:
    return lambda params: torch.func.vjp(f, params)[1](dz)[0]


def problems(
    of: Probe, dtype: torch.dtype, device: str, order: Tensor | None = None
) -> Iterator[tuple[str, Problem]]:
    """What a backend is asked, by name.

    Args:
        of: the example and its numbers.
        dtype: float32 or float64.
        device: where the backend runs.
        order: of the examples; None: as they are.
    """
    order = torch.arange(BATCH) if order is None else order

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    def ordered(tensor: Tensor) -> Tensor:
        return cast(tensor[:, order])

    net = copy.deepcopy(of.net).to(device, dtype)
    program, refused = captured(net, (BATCH,), dtype, "module")
    params = {name: cast(value) for name, value in of.params.items()}
    x = ordered(_eye().expand(TASKS, BATCH, BATCH))
    shared = Problem(
        net=net,
        params=params,
        per_task=frozenset(params),
        tasks=TASKS,
        steps=0,
        batch_stats="module",
        program=program,
        refused=refused,
    )
    yield "forward", replace(shared, query=Batch(x), output_grad=ordered(of.cotangent), scratch=Scratch())
    z = of.truth["forward", ""]
    rate = torch.tensor(RATE, device=device, dtype=dtype)
    step = replace(
        shared,
        steps=1,
        loss=resolve(nn.SmoothL1Loss(reduction="sum")),
        rates={n: rate.reshape((1, 1, *[1] * (p.dim() - 1))) for n, p in params.items()},
        rule=SGD(),
        adapted_grad={n: cast(v) for n, v in of.direction.items()},
        scratch=Scratch(),
    )
    yield "jvp", replace(step, support=Batch(x, ordered(z)))
    yield "jvp_of_vjp", replace(step, support=Batch(x, ordered(z - FAR * of.signs)))


def answers(of: Probe, backend: str, dtype: torch.dtype, order: Tensor | None = None) -> dict[Key, Tensor]:
    """The quantities of `Probe.truth` from what a backend answers; its workspace and outputs are
    full of NaN before each call, where it can do that."""
    module = backends.get(backend)
    found: dict[Key, Tensor] = {}
    for name, problem in problems(of, dtype, backends.device(backend), order):
        with runs.poisoned(module):
            result = module.solve(problem, _WRT, name != "forward")
        if name == "forward":
            found.update(_forward_answers(result, order))
        else:
            found.update(_step_answers(name, problem, result))
    return {key: value.cpu() for key, value in found.items()}


def _forward_answers(result: Result, order: Tensor | None) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {("vjp", n): value for n, value in (result.grads.params or {}).items()}
    if result.output is not None:
        output = result.output if order is None else result.output[:, order.argsort()]
        found["forward", ""] = output
    return found


def _step_answers(name: str, problem: Problem, result: Result) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    if name == "jvp_of_vjp":
        for param, value in (result.adapted or {}).items():
            found["vjp_step", param] = (problem.params[param] - value) / RATE
    for param, value in (result.grads.params or {}).items():
        found[name, param] = ((problem.adapted_grad or {})[param] - value) / RATE
    return found


@lru_cache(maxsize=512)
def _own_errors(example: Example) -> dict[str, float]:
    """PyTorch's own float32 errors: the largest of three runs of the reference, the default one,
    one without oneDNN, one with the examples in another order."""
    of = probe(example)
    found = [answers(of, "reference", torch.float32)]
    with runs.without_onednn():
        found.append(answers(of, "reference", torch.float32))
    found.append(answers(of, "reference", torch.float32, torch.arange(BATCH).roll(1)))
    measured = [rule.errors(run, of.truth, torch.float32) for run in found]
    return {name: max(errors[name] for errors in measured) for name in measured[0]}


def verify_example(kind: str, example: Example, backend: str, dtype: str) -> list[Row]:
    """The four functions of one layer on one backend in one dtype, a row a quantity.

    Args:
        kind: the layer kind that the example is of.
        example: the layer.
        backend: a name of `backends.NAMES`.
        dtype: "float64" or "float32".
    """
    name = f"{kind} {example.label}"
    of, sort = probe(example), DTYPES[dtype]
    for _, problem in problems(of, sort, backends.device(backend)):
        if reason := backends.why_not(backend, problem, _WRT):
            return [Row(name, backend, dtype, "", math.nan, math.nan, math.nan, reason, skipped=True)]
    try:
        errors = rule.errors(answers(of, backend, sort), of.truth, sort)
    except Exception as error:  # a backend that breaks has failed; the others still count
        why = f"{type(error).__name__}: {error}"
        return [Row(name, backend, dtype, "", math.nan, math.nan, math.nan, why)]
    if sort == torch.float64:
        return rule.float64_rows(name, backend, errors)
    return rule.float32_rows(name, backend, [rule.Sample(errors, _own_errors(example), clear=True)])
