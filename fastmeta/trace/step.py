"""One task's inner step and query pass, recorded: which tensors go in, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.backends._inputs import each, parts_of, with_parts
from fastmeta.backends._twice import check_twice
from fastmeta.inputs import Form, Tree, flatten
from fastmeta.losses import Loss
from fastmeta.network.functional import call_then
from fastmeta.network.swap import Carried, Exchange
from fastmeta.problem import Batch, Problem
from fastmeta.trace import operators  # noqa: F401
from fastmeta.trace.ir import Buffer, Space
from fastmeta.trace.lower import OPERATORS, Lowering
from fastmeta.trace.passes.place import rounded
from fastmeta.trace.passes.tables import Few
from fastmeta.trace.program import Result, StepProgram, finished
from fastmeta.trace.record import NoReads, Recorder, Ref, UntraceableError

#: A result, or the number that it is, its shape, and where it goes.
Placed = tuple[Ref | float, tuple[int, ...], Space, int]
#: As csrc/cpu/machine/machine.h: where in OUTPUT and SEED the output begins.
OUTPUT_START = 16


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in its space; `gradient`: that of its gradient in `OTHER`, -1 for none."""

    name: str
    shape: tuple[int, ...]
    space: Space
    offset: int
    gradient: int = -1

    @property
    def size(self) -> int:
        """Elements."""
        return max(1, torch.Size(self.shape).numel()) if self.shape else 1


@dataclass(slots=True)
class Layout:
    """The inputs of one program."""

    slots: list[Slot] = field(default_factory=list)
    sizes: dict[Space, int] = field(default_factory=dict)
    others: int = 0  # elements of OTHER

    def add(self, name: str, shape: Sequence[int], space: Space, wanted: bool = False) -> Slot:
        """Give a tensor a place."""
        size = torch.Size(shape).numel()
        gradient = -1
        if wanted:
            gradient, self.others = self.others, self.others + rounded(size)
        slot = Slot(name, tuple(shape), space, self.sizes.get(space, 0), gradient)
        self.sizes[space] = slot.offset + rounded(size)
        self.slots.append(slot)
        return slot


@dataclass(slots=True)
class Sources:
    """Where the tensors that a module reads besides parameters are found at every call. Holds no
    module, so that it may be kept with one."""

    #: name -> (path of the module, name in it, whether it is a registered buffer)
    attributes: dict[str, tuple[str, str, bool]] = field(default_factory=dict)

    def value(self, net: nn.Module, name: str) -> Tensor:
        """One of them, as it is now."""
        path, key, buffer = self.attributes[name]
        module = net.get_submodule(path)
        found = module._buffers[key] if buffer else vars(module)[key]
        if not isinstance(found, Tensor):
            raise UntraceableError(f"`{name}` is a tensor no longer")
        return found


@dataclass(frozen=True, slots=True)
class Output:
    """What the network returns: its form, and of each leaf the shape, dtype and place in OUTPUT."""

    form: Form
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]  # from OUTPUT_START on
    size: int

    @property
    def plain(self) -> bool:
        """Whether it is one tensor, and nothing around it."""
        return self.form.kind is Tensor

    @classmethod
    def of(cls, output: Tree) -> Output:
        """Of one task."""
        leaves, form = flatten(output)
        offsets, size = [], 0
        for leaf in leaves:
            offsets.append(size)
            size += leaf.numel() if len(leaves) == 1 else rounded(leaf.numel())
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        return cls(form, shapes, tuple(leaf.dtype for leaf in leaves), tuple(offsets), size)


@dataclass(frozen=True, slots=True)
class Traced:
    """A recorded pass: inputs, and results with their places."""

    layout: Layout
    results: tuple[Placed, ...]
    last_stage: int
    output: Output

    @property
    def adapted(self) -> dict[int, tuple[int, ...]]:
        """Shapes of the adapted parameters, by their places in THETA."""
        return {slot.offset: slot.shape for slot in self.layout.slots if slot.space == Space.THETA}

    def lowered(self, dtype: torch.dtype, rows: bool, few: Few | None = None) -> StepProgram:
        """The program.

        Args:
            dtype: of what it computes with.
            rows: as of `finished`.
            few: small tables in place of some adapted parameters.

        Raises:
            UntraceableError: an operator has no lowering.
        """
        sizes = dict(self.layout.sizes)
        inputs: dict[str, tuple[Buffer, int]] = {}
        for slot in self.layout.slots:
            inputs[slot.name] = (Buffer(slot.size, slot.space, slot.offset), 0)
            sizes[slot.space] = max(sizes.get(slot.space, 0), slot.offset + rounded(slot.size))
        low = Lowering(dtype, inputs)
        refs = [ref for ref, *_ in self.results if isinstance(ref, Ref)]
        operands = iter(low.run(refs))
        results = [
            Result(next(operands) if isinstance(ref, Ref) else float(ref), shape, space, offset)
            for ref, shape, space, offset in self.results
        ]
        if self.layout.others:
            sizes[Space.OTHER] = self.layout.others
        return finished(low.build, results, sizes, self.last_stage, rows, self.adapted, few)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a step's program has to give besides the gradient.

    Args:
        adapted: names of the adapted parameters, in the order of theta.
        fixed: of the others, those whose gradient is wanted.
        data: as `wrt` names it, "support_x" and so on: what of the set a gradient is wanted by.
        second: the Hessian-vector product.
        loss: of the support set: its value, and its gradient times a seed among the products.
        gradient: any at all.
    """

    adapted: tuple[str, ...]
    fixed: frozenset[str]
    data: frozenset[str]
    second: bool
    gradient: bool
    loss: bool = False


class Tracer:
    """Records the passes of one problem.

    Args:
        problem: its tensors detached, on the CPU.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.exchange = Exchange(problem.net)
        self.sources = _sources(problem.net, self.exchange)
        self.dtype = next(iter(problem.params.values())).dtype

    def support(self, wanted: Wanted) -> Traced:
        """The gradient of one inner step, and what the way back over it needs of it."""
        p = self.problem
        if p.support is None or p.loss is None:
            raise ValueError("there is no support set")
        return _Pass(self, "support", p.support, p.loss, wanted).step()

    def query(self, wanted: Wanted, output_grad: bool) -> Traced:
        """The query loss, the output, and the gradient of both by their cotangents."""
        p = self.problem
        if p.query is None:
            raise ValueError("there is no query set")
        return _Pass(self, "query", p.query, p.query_loss, wanted).query(output_grad)


class _Pass:
    """One recording."""

    def __init__(self, tracer: Tracer, role: str, sets: Batch, loss: Loss | None, wanted: Wanted) -> None:
        self.tracer, self.wanted, self.dtype = tracer, wanted, tracer.dtype
        self.recorder = Recorder(OPERATORS)
        self.layout = Layout()
        p = tracer.problem
        self.params: dict[str, Tensor] = {}
        self.leaves: list[Tensor] = []
        self.others: list[tuple[Slot, Tensor]] = []
        for name in wanted.adapted:
            slot = self.layout.add(f"theta.{name}", _shape(p, name), Space.THETA)
            self.params[name] = self._leaf(slot, one_task(p, name), True)
            self.leaves.append(self.params[name])
        for name in p.params:
            if name not in self.params:
                slot = self.layout.add(f"fixed.{name}", _shape(p, name), Space.FIXED, name in wanted.fixed)
                self.params[name] = self._other(slot, one_task(p, name))
        copies: dict[int, Tensor] = {}
        for name in tracer.sources.attributes:
            value = tracer.sources.value(p.net, name)
            space = Space.FIXED if value.is_floating_point() else Space.INTS
            slot = self.layout.add(f"buffer.{name}", tuple(value.shape), space)
            copies[id(value)] = self._other(slot, value)
        self.carried = Carried()
        self.carried.copies = copies
        self.loss = loss
        if loss is not None:
            weights: dict[str, Any] = {}
            for name in ("weight", "pos_weight"):
                value = getattr(loss, name)
                if value is not None:
                    slot = self.layout.add(f"loss.{name}", tuple(value.shape), Space.FIXED)
                    weights[name] = self._other(slot, value.to(self.dtype))
            self.loss = replace(loss, **weights) if weights else loss
        batch = each(sets, lambda tensor: tensor[0, 0] if sets.per_step else tensor[0])
        if loss is None:
            batch = Batch(batch.x)
        leaves = {}
        for name, value in parts_of(batch, role).items():
            space = Space.BATCH if value.is_floating_point() else Space.INTS
            wants = value.is_floating_point() and name.partition("/")[0] in wanted.data
            leaves[name] = self._other(self.layout.add(name, tuple(value.shape), space, wants), value)
        self.batch = with_parts(batch, role, leaves)

    def _leaf(self, slot: Slot, value: Tensor, grad: bool) -> Tensor:
        value = value.detach().clone(memory_format=torch.contiguous_format)
        self.recorder.register(value, slot.name)
        return value.requires_grad_(grad)

    def _other(self, slot: Slot, value: Tensor) -> Tensor:
        leaf = self._leaf(slot, value, slot.gradient >= 0)
        if slot.gradient >= 0:
            self.others.append((slot, leaf))
        return leaf

    def step(self) -> Traced:
        """Run the gradient of an inner step, and what the way back over it needs of it."""
        wanted = self.wanted
        directions = []
        if wanted.second:
            for name, leaf in zip(wanted.adapted, self.leaves, strict=True):
                slot = self.layout.add(f"direction.{name}", tuple(leaf.shape), Space.DIRECTION)
                directions.append(self._leaf(slot, torch.ones_like(leaf, requires_grad=False), False))
        seed = self._seed() if wanted.loss and wanted.gradient else None
        back = wanted.second or seed is not None
        with torch.set_grad_enabled(True), self.recorder, NoReads(self.recorder):
            value, returned = self._evaluated()
            found = list(_grad([value], self.leaves, None, wanted.second))
            ends: list[tuple[Tensor, Tensor]] = []
            if wanted.second:
                if any(g is not None and g.requires_grad for g in found):
                    check_twice(value.reshape(1), [g for g in found if g is not None])
                pairs = zip(found, directions, strict=True)
                ends = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
            if seed is not None and value.requires_grad:
                ends.append((value, seed))
            products = self._by_everything(ends)
        offsets = self._theta_offsets()
        results = self._results(found, self.leaves, [Space.GRAD] * len(self.leaves), offsets)
        if wanted.loss:
            results.append((self.recorder.ref(value.detach()), (), Space.OUTPUT, 0))
        if back:
            results += self._gradients(products, Space.CURVATURE)
        return Traced(self.layout, tuple(results), 2 if back else 1, Output.of(returned))

    def query(self, output_grad: bool) -> Traced:
        """Run the loss and the output, and their gradients by their cotangents."""
        wanted = self.wanted
        seed = self._seed() if wanted.gradient else None
        with torch.set_grad_enabled(True), self.recorder, NoReads(self.recorder):
            value, returned = self._evaluated()
            outputs, out = flatten(returned)[0], Output.of(returned)
            ends = [] if seed is None or value is None else [(value, seed)]
            if wanted.gradient and output_grad:
                for at, leaf in enumerate(outputs):
                    if leaf.requires_grad:
                        place = OUTPUT_START + out.offsets[at]
                        slot = Slot(f"seed.output.{at}", tuple(leaf.shape), Space.SEED, place)
                        self.layout.slots.append(slot)
                        ends.append((leaf, self._leaf(slot, torch.zeros_like(leaf), False)))
            found = self._by_everything(ends) if wanted.gradient else []
        results: list[Placed] = []
        if value is not None:
            results.append((self.recorder.ref(value.detach()), (), Space.OUTPUT, 0))
        for leaf, shape, offset in zip(outputs, out.shapes, out.offsets, strict=True):
            results.append((self.recorder.ref(leaf.detach()), shape, Space.OUTPUT, OUTPUT_START + offset))
        if wanted.gradient:
            results += self._gradients(found, Space.GRAD)
        return Traced(self.layout, tuple(results), 1, out)

    def _seed(self) -> Tensor:
        """The cotangent of the loss."""
        slot = Slot("seed.loss", (), Space.SEED, 0)
        self.layout.slots.append(slot)
        return self._leaf(slot, torch.ones((), dtype=self.dtype), False)

    def _by_everything(self, ends: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Gradients of the sum of <end, cotangent>."""
        return gradients(ends, [*self.leaves, *(leaf for _, leaf in self.others)])

    def _theta_offsets(self) -> list[int]:
        at_theta = {slot.name: slot.offset for slot in self.layout.slots if slot.space == Space.THETA}
        return [at_theta[f"theta.{name}"] for name in self.wanted.adapted]

    def _gradients(self, found: Sequence[Tensor | None], space: Space) -> list[Placed]:
        """Gradients by all adapted parameters, in `space`, and by everything else."""
        everything = [*self.leaves, *(leaf for _, leaf in self.others)]
        spaces = [space] * len(self.leaves) + [Space.OTHER] * len(self.others)
        offsets = [*self._theta_offsets(), *(slot.gradient for slot, _ in self.others)]
        return self._results(found, everything, spaces, offsets)

    def _results(
        self,
        found: Sequence[Tensor | None],
        leaves: Sequence[Tensor],
        spaces: Sequence[Space],
        offsets: Sequence[int],
    ) -> list[Placed]:
        found = [*found] or [None] * len(leaves)
        return [
            (0.0 if g is None else self.recorder.ref(g.detach()), tuple(leaf.shape), space, offset)
            for g, leaf, space, offset in zip(found, leaves, spaces, offsets, strict=True)
        ]

    def _evaluated(self) -> tuple[Any, Tree]:
        used, batch, p = self.loss, self.batch, self.tracer.problem

        def value_of(output: Tree) -> Any:
            return None if used is None or batch.y is None else used(output, batch.y, batch.weights)

        return call_then(
            self.tracer.exchange,
            self.params,
            batch.x,
            value_of,
            batch_stats=p.batch_stats,
            decompose=True,
            carried=self.carried,
        )


def _grad(
    ends: Sequence[Tensor], leaves: Sequence[Tensor], by: Sequence[Any] | None, create: bool
) -> Sequence[Tensor | None]:
    ends = list(ends)
    if not ends or not leaves or not any(end.requires_grad for end in ends):
        return [None] * len(leaves)
    return torch.autograd.grad(
        ends, list(leaves), by, create_graph=create, retain_graph=True, allow_unused=True
    )


def gradients(ends: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of the sum of <end, cotangent>; None where it does not depend on a leaf."""
    ends = [(end, by) for end, by in ends if end.requires_grad]
    return list(_grad([end for end, _ in ends], leaves, [by for _, by in ends], False))


def one_task(problem: Problem, name: str) -> Tensor:
    """A parameter of the first task."""
    value = problem.params[name]
    return value[0] if name in problem.per_task else value


def _shape(problem: Problem, name: str) -> tuple[int, ...]:
    return tuple(one_task(problem, name).shape)


def _sources(net: nn.Module, exchange: Exchange) -> Sources:
    """Buffers and plain tensors of a module that a forward pass could read.

    Raises:
        UntraceableError: one is where it cannot be found again at the next call.
    """
    copied = dict(exchange._copied)
    sources = Sources()
    seen: dict[int, str] = {}
    for prefix, module in net.named_modules():
        for buffers, values in ((True, module._buffers), (False, vars(module))):
            for key, value in values.items():
                if isinstance(value, Tensor) and id(value) in copied and id(value) not in seen:
                    name = f"{prefix}.{key}" if prefix else key
                    sources.attributes[name] = (prefix, key, buffers)
                    seen[id(value)] = name
    if len(seen) != len(copied):
        raise UntraceableError("it holds tensors in a list or dict of its own")
    return sources


def not_traced(error: Exception) -> str:
    """Why there is no program, after `error`."""
    if isinstance(error, UntraceableError):
        return str(error)
    message = str(error).strip() or "no message"
    return f"{type(error).__name__}: {message.splitlines()[0]}"
