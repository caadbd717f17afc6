"""Fuzzer of the extension: `fastmeta._C` with plans and tensors of which one or two fields are
junk.

    python tests/fuzz/binding.py --calls 200000 --seed 0

It begins with valid calls of all layer kinds, as the library itself makes them. A call may answer,
or refuse with an error that names what was wrong. It is a fault if the process dies or hangs, if
another error comes out, if memory beside an output or an input was written to, or if a valid call
is not right afterwards.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
import signal
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from running import main
from torch import Tensor

from fastmeta import _C, backends
from fastmeta.backends.cpu import plan as plans
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify.problems import problem_of, wanted

REFUSALS = (TypeError, ValueError, MemoryError)
MEMORY = 8 << 30
SECONDS = 60  # of one call; a valid one takes milliseconds
GUARD = 64  # numbers before and behind every tensor
RUN = (
    *("tasks", "threads", "data", "rate", "adapted_grad", "adapted", "grad", "grad_offsets", "rate_grad"),
    *("support", "query", "others", "step_weights", "poison"),
)
#: Where outputs are; None: all items of the field.
OUTPUTS = {
    **dict.fromkeys(("adapted", "grad", "rate_grad")),
    **dict.fromkeys(("support", "query"), (4, 5, 6)),
    "others": (2, 3, 4, 6),
}
NUMBERS = (
    -(2**63),
    -(2**31),
    -5,
    -1,
    0,
    1,
    2,
    3,
    7,
    16,
    64,
    1000,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63,
    2**200,
)
OTHERS = (
    None,
    True,
    False,
    "",
    "relu",
    "conv2d",
    b"x",
    0.0,
    0.5,
    -1.5,
    1e300,
    float("nan"),
    float("inf"),
    [],
    (),
    {},
)
#: What may become of an entry, besides another value.
CHANGES = (
    "add",
    "subtract",
    "double",
    "drop",
    "repeat",
    "swap",
    "short",
    "long",
    "strided",
    "half",
    "integers",
)
CHANGES = (
    *CHANGES,
    "freed",
    "freed view",
    "shrunk",
    "zero",
    "meta",
    "sparse",
    "subclass",
    "expanded",
    "negated",
)


@dataclass(frozen=True)
class Spec:
    """One call: which valid one it begins with, and up to two changes (path, what it becomes)."""

    base: int = 0
    first: tuple[Any, ...] = ()
    second: tuple[Any, ...] = ()
    raw: str = ""  # something else than a plan and its run


class Strange(Tensor):
    pass


@lru_cache
def bases() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The arguments of valid plans and runs, on small networks of all layer kinds."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []

    class Recorder:
        MOST_THREADS = _C.MOST_THREADS

        NARROW_ROWS = _C.NARROW_ROWS

        def Plan(self, **given: Any) -> Any:
            plan = _C.Plan(**given)

            class Run:
                workspace_bytes = plan.workspace_bytes
                parameter_set_bytes = plan.parameter_set_bytes

                def run(self, *tensors: Any) -> int:
                    call = dict(zip(RUN, tensors, strict=True))
                    call["threads"] = 1 + len(found) % 3
                    dense = {
                        field: [t.contiguous() if isinstance(t, Tensor) else t for t in value]
                        if isinstance(value, list)
                        else value
                        for field, value in call.items()
                    }
                    found.append((given, dense))
                    return plan.run(*tensors)

            return Run()

    recorder, engine = Recorder(), plans._C
    plans._C = recorder  # type: ignore[assignment]
    try:
        kinds: dict[Any, int] = {}
        for case in VERIFICATION:
            problem = problem_of(case, torch.float64 if len(found) % 2 else torch.float32, 0)
            wrt = wanted(case, problem)
            if problem.program is None or backends.get("cpu").refuses(problem, wrt):
                continue
            sort = frozenset((layer.kind, layer.function) for layer in problem.program.layers)
            sort = (sort, wrt, case.operator, problem.steps)
            kinds[sort] = kinds.get(sort, 0) + 1
            if kinds[sort] < 2:
                backends.get("cpu").solve(problem, wrt, case.operator == "inner_sgd")
    finally:
        plans._C = engine
    return found


def draw(numbers: random.Random) -> Spec:
    """A call of random numbers."""
    if numbers.random() < 0.005:
        return Spec(
            raw=numbers.choice(("peak", "bandwidth", "new", "copy", "arguments")), first=(_value(numbers),)
        )
    base = numbers.randrange(len(bases()))
    changes = [_change(numbers, bases()[base]) for _ in range(1 if numbers.random() < 0.7 else 2)]
    return Spec(base, *changes)


def _change(numbers: random.Random, base: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Any, ...]:
    which = 0 if numbers.random() < 0.65 else 1
    at: Any = base[which]
    path: list[Any] = [which]
    while isinstance(at, (dict, list, tuple)) and len(at) and (len(path) == 1 or numbers.random() < 0.9):
        path.append(numbers.choice(list(at)) if isinstance(at, dict) else numbers.randrange(len(at)))
        at = at[path[-1]]
    what = numbers.choice(CHANGES) if numbers.random() < 0.5 else _value(numbers)
    return (tuple(path), what)


def _value(numbers: random.Random) -> tuple[Any]:
    return (numbers.choice(NUMBERS if numbers.random() < 0.7 else OTHERS),)


def changed(at: Any, path: tuple[Any, ...], what: Any) -> Any:
    """`at`, in which the entry at `path` has become something else."""
    if not path:
        return what[0] if isinstance(what, tuple) else _become(at, what)
    if isinstance(at, dict):
        if len(path) == 1 and what == "drop":
            return {key: value for key, value in at.items() if key != path[0]}
        return {key: changed(value, path[1:], what) if key == path[0] else value for key, value in at.items()}
    i = path[0]
    if not isinstance(at, (list, tuple)) or not isinstance(i, int) or i >= len(at):
        return at  # the first change has left nothing there
    items = list(at)
    if len(path) == 1 and what in ("drop", "repeat", "swap"):
        j = (i + 1) % len(items)
        if what == "swap":
            items[i], items[j] = items[j], items[i]
        else:
            items[i : i + 1] = [] if what == "drop" else [items[i]] * 2
    else:
        items[i] = changed(items[i], path[1:], what)
    return tuple(items) if isinstance(at, tuple) else items


def _become(at: Any, what: str) -> Any:
    if isinstance(at, Tensor):
        return _spoiled(at, what)
    if isinstance(at, (int, float)) and not isinstance(at, bool):
        return {"add": at + 1, "subtract": at - 1, "double": 2 * at}.get(what, at)
    if isinstance(at, list):
        return {"add": [*at, None], "subtract": at[:-1], "double": at * 2, "drop": [], "swap": at[::-1]}.get(
            what, at
        )
    return at


def _spoiled(t: Tensor, what: str) -> Any:
    if type(t) is not Tensor or t.layout != torch.strided or t.is_meta or not t.data_ptr():
        return t  # it is spoiled already
    if what in ("freed", "freed view", "shrunk"):
        flat = torch.zeros(t.numel() + 8, dtype=t.dtype)
        own = flat[8 * (what == "freed view") :][: t.numel()].view(t.shape)
        flat.untyped_storage().resize_(0 if what != "shrunk" else t.nbytes // 2)
        return own
    return {
        "short": lambda: t.flatten()[:-1],
        "long": lambda: torch.cat([t.flatten(), t.flatten()[:1]]),
        "strided": lambda: torch.stack([t, t], -1)[..., 0],
        "half": t.half,
        "integers": t.long,
        "zero": lambda: torch._efficientzerotensor(tuple(t.shape), dtype=t.dtype),
        "meta": lambda: t.to("meta"),
        "sparse": t.to_sparse,
        "subclass": lambda: t.as_subclass(Strange),
        "expanded": lambda: t.flatten()[:1].expand(t.numel()) if t.numel() else t,
        "negated": lambda: torch._neg_view(t),
    }.get(what, lambda: None)()


class Template:
    """A call's tensors one behind the other in one memory of each dtype, with numbers between them
    that nobody may touch."""

    def __init__(self, call: dict[str, Any]) -> None:
        self.call = call
        self.places: dict[tuple[str, int], tuple[torch.dtype, int, Tensor]] = {}
        sizes: dict[torch.dtype, int] = {}
        for field, value in call.items():
            for i, tensor in enumerate(value if isinstance(value, list) else ()):
                if isinstance(tensor, Tensor):
                    begin = sizes.get(tensor.dtype, 0) + GUARD
                    self.places[field, i] = (tensor.dtype, begin, tensor)
                    sizes[tensor.dtype] = begin + tensor.numel()
        self.memory = {dtype: torch.full((size + GUARD,), 77, dtype=dtype) for dtype, size in sizes.items()}
        self.guards = {
            dtype: torch.ones(memory.shape, dtype=torch.bool) for dtype, memory in self.memory.items()
        }
        for (field, i), (dtype, begin, tensor) in self.places.items():
            part = slice(begin, begin + tensor.numel())
            self.memory[dtype][part] = tensor.flatten()
            outputs = OUTPUTS.get(field, ())
            self.guards[dtype][part] = outputs is not None and i not in outputs


class Guarded:
    """A copy of a template, for one call."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.memory = {dtype: memory.clone() for dtype, memory in template.memory.items()}
        self.call = {
            field: list(value) if isinstance(value, list) else value for field, value in template.call.items()
        }
        self.outputs: list[Tensor] = []
        for (field, i), (dtype, begin, tensor) in template.places.items():
            own = self.memory[dtype][begin : begin + tensor.numel()].view(tensor.shape)
            self.call[field][i] = own
            if not template.guards[dtype][begin : begin + 1].all():
                self.outputs.append(own)

    def wrong(self) -> str:
        for dtype, memory in self.memory.items():
            kept = self.template.guards[dtype]
            if not _same(memory[kept], self.template.memory[dtype][kept]):
                return "memory that is no output was written to"
        return ""


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)


@cache
def template(base: int) -> Template:
    """Of a valid call."""
    return Template(bases()[base][1])


@lru_cache(maxsize=256)
def expected(base: int) -> list[Tensor]:
    """What a valid call answers."""
    guarded = Guarded(template(base))
    _C.Plan(**bases()[base][0]).run(**guarded.call)
    return guarded.outputs


def prepare() -> None:
    """Make what all children share, before there are any."""
    for base in range(len(bases())):
        template(base)


_checked = 0


def check(spec: Spec) -> tuple[int, str]:
    """Make one call, and now and then a valid one after it."""
    global _checked
    _checked += 1
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which has terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    wrong = _raw(spec.raw, spec.first[0][0]) if spec.raw and spec.first else _junk(spec)
    if not wrong and _checked % 25 == 0:
        expect = expected(spec.base)
        guarded = Guarded(template(spec.base))
        _C.Plan(**bases()[spec.base][0]).run(**guarded.call)
        if not all(map(_same, guarded.outputs, expect)):
            wrong = "a valid call was not right afterwards"
    return 1, wrong


def _junk(spec: Spec) -> str:
    description = bases()[spec.base][0]
    changes = [change for change in (spec.first, spec.second) if change]
    for (which, *path), what in changes:
        description = changed(description, tuple(path), what) if which == 0 else description
    try:
        plan = _C.Plan(**description)
    except REFUSALS as error:
        return _unclear(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    guarded = Guarded(template(spec.base))
    call = guarded.call
    for (which, *path), what in changes:
        call = changed(call, tuple(path), what) if which == 1 else call
    moved = any(
        what in ("swap", "repeat", "add", "double", "drop") for _, what in changes
    )  # inputs may be outputs now
    try:
        plan.run(**call)
    except REFUSALS as error:
        return guarded.wrong() or _unclear(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if moved else guarded.wrong()


def _raw(what: str, value: Any) -> str:
    try:
        if what == "peak":
            _C.fma_peak(*((value, 1) if isinstance(value, str) else ("float32", value)))
        elif what == "bandwidth":
            _C.cache_bandwidth(value if value != 1 else 1024, 1)
            _C.cache_bandwidth(1024, value)
        elif what == "new":
            for make in (lambda: _C.Plan.__new__(_C.Plan), lambda: object.__new__(_C.Plan)):
                try:
                    plan = make()
                except TypeError:
                    continue
                return f"a plan without a description: {plan.workspace_bytes}"
        elif what == "copy":
            plan = _C.Plan(**bases()[0][0])
            for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
                try:
                    copied = attempt(plan)
                except TypeError:
                    continue
                copied.run(*[value] * len(RUN))
        else:
            _C.Plan(*[value] * 6)
    except REFUSALS as error:
        return "" if what == "copy" else _unclear(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _unclear(error: Exception) -> str:
    known = ("Plan", "fma_peak", "cache_bandwidth", "std::bad_alloc", "the plan needs")
    return (
        ""
        if str(error).startswith(known)
        else f"an error that names nothing: {type(error).__name__}: {error}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare()
    main("Fuzzer of the extension.", draw, check)
