"""Tensors that require grad and that a network or a loss reads past its arguments, and the
gradients by them.

A learned weight in a closure, a loss network behind a lambda, a vector that another network has
made: `Watch` sees them as PyTorch's functions are called, and what it cannot see there it finds in
the autograd graph of what came out. Each gets a stand-in, a view of it, by which the gradient is
taken: nothing of the user's own graph is run, freed or told to a hook before the user's backward
pass is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from fastmeta.backends._random_state import RandomState
from fastmeta.inputs import Tree, leaves_of
from fastmeta.problem import Problem

R = TypeVar("R")
Key = int | tuple[Node, int]
_readers: WeakSet[nn.Module] = WeakSet()  # networks that were found to read something, or a loss on them
_PLAIN = (Tensor, nn.Parameter)
# Getters whose result depends on the tensor differentiably.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
# They are about a tensor, not about its values.
_ABOUT = frozenset(
    {
        "grad",
        "backward",
        "requires_grad_",
        "retain_grad",
        "register_hook",
        "register_post_accumulate_grad_hook",
    }
)
# They make a leaf of what was none.
_SWITCHES = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def key_of(tensor: Tensor) -> Key:
    """The same for all Python objects that are one tensor of an autograd graph."""
    return id(tensor) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def merged(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """(tensor, gradient) with one entry a tensor, its gradients added up in the order they come."""
    totals: dict[Key, tuple[Tensor, Tensor]] = {}
    for tensor, gradient in pairs:
        have = totals.get(key_of(tensor))
        totals[key_of(tensor)] = (tensor, gradient if have is None else have[1] + gradient)
    return list(totals.values())


class CapturedError(Exception):
    """What is read has to be watched."""


def rerun(problem: Problem, run: Callable[[Problem], R], start: RandomState | None = None) -> R:
    """`run(problem)`; if the network or a loss reads something past its arguments, from the start
    again and watched.

    Most read nothing, as the graphs of their losses show. Where one did, the next call watches at
    once.

    Args:
        problem: its `captures` say what is wanted.
        run: answers it.
        start: the random state.
    """
    if problem.captures is None:
        return run(problem)
    watched = replace(problem, captures=replace(problem.captures, watch=True))
    if problem.net in _readers:
        return run(watched)
    start = RandomState.of(problem) if start is None else start
    try:
        return run(problem)
    except CapturedError:
        pass
    _readers.add(problem.net)
    start.restore()
    return run(watched)


def leaves_behind(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor depends on."""
    watch = Watch([], 0, frozenset(), set())
    watch.reaches([tensor])
    return watch._leaves([])


class Captured:
    """What one problem's network and losses read, and the sums of the gradients by it.

    Args:
        problem: its `captures` say what is wanted.
        keep: whether one gradient of everything is taken at the end, by `inputs`.
    """

    def __init__(self, problem: Problem, keep: bool = False) -> None:
        self.wanted = problem.captures
        self._keep = keep
        self._kept: list[Watch] = []
        self._start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._totals: dict[Key, tuple[Tensor, Tensor]] = {}
        # a graph does not show tensors that require no grad; the network has no use for its own
        also = None if self.wanted is None else self.wanted.also
        losses = [loss.kind for loss in (problem.loss, problem.query_loss) if loss is not None]
        aside = also is not None and "custom" in losses
        self._watches = self.wanted is not None and (self.wanted.watch or aside or bool(self.wanted.known))
        self._also = frozenset(map(id, also())) if aside and also is not None else frozenset()
        self._known = set(map(key_of, () if self.wanted is None else self.wanted.known))

    def __len__(self) -> int:
        return len(self._totals)

    def evaluated(
        self, evaluate: Callable[[], tuple[Tensor, Tree]], ours: Iterable[Tree]
    ) -> tuple[Tensor, Tree, Watch]:
        """(loss, output, what was read).

        Args:
            evaluate: gives a loss and an output.
            ours: what the network and the loss are given: trees of tensors.

        Raises:
            CapturedError: something was read, and nobody watched; see `rerun`.
        """
        (loss, output), watch = self.watched(evaluate, ours)
        return loss, output, watch

    def watched(
        self, evaluate: Callable[[], tuple[Tree, ...]], ours: Iterable[Tree]
    ) -> tuple[tuple[Tree, ...], Watch]:
        """(what `evaluate` gives, what was read); the rest as of `evaluated`."""
        given = _leaves(ours) if self.wanted is not None else []
        watch = Watch(given, self._start, self._also, self._known)
        if self.wanted is None:
            return evaluate(), watch
        if not self._watches:
            found = evaluate()
            if watch.reaches(_leaves(found)):
                raise CapturedError
            return found, watch
        with watch:
            found = evaluate()
        watch.follow(_leaves(found))
        self._note(watch)
        return found, watch

    def _note(self, watch: Watch) -> None:
        """What `watch` has found has a gradient, if only of zeros."""
        if self._keep:
            self._kept.append(watch)
        for tensor in watch.tensors:
            self._totals.setdefault(key_of(tensor), (tensor, torch.zeros_like(tensor, requires_grad=False)))

    def add(self, watch: Watch, gradients: Sequence[Tensor]) -> None:
        """Add the gradients by `watch.inputs`, which were noted."""
        for tensor, gradient in zip(watch.tensors, gradients, strict=True):
            self._totals[key_of(tensor)][1].add_(gradient)

    @property
    def inputs(self) -> list[Tensor]:
        """What the gradients that `add_kept` takes are by."""
        if any(watch.through for watch in self._kept):
            for watch in self._kept:
                watch.by_leaves()
        return [*self._kept_inputs()]

    def add_kept(self, gradients: Iterable[Tensor]) -> None:
        """Add the gradients by `inputs`."""
        for tensor, gradient in zip(self._kept_inputs().values(), gradients, strict=True):
            self._totals.setdefault(key_of(tensor), (tensor, torch.zeros_like(gradient)))[1].add_(gradient)

    def _kept_inputs(self) -> dict[Tensor, Tensor]:
        """Each of them once, and what it stands for."""
        return {x: t for watch in self._kept for x, t in zip(watch.inputs, watch.tensors, strict=True)}

    def pairs(self) -> list[tuple[Tensor, Tensor]] | None:
        """(tensor, gradient) of everything found; None: nothing was looked for."""
        return None if self.wanted is None else list(self._totals.values())


def _leaves(trees: Iterable[Tree]) -> list[Tensor]:
    """The tensors of several trees."""
    return [leaf for tree in trees for leaf in leaves_of(tree)]


class Watch(TorchFunctionMode):
    """Notes what one evaluation reads.

    `tensors` are what was read, `inputs` what the gradient by each of them is to be taken by.
    `through` says whether that runs the user's own graph, which must then be retained.

    Args:
        ours: what the network and the loss are given.
        start: nodes of the graph with lower numbers, which are those of one thread, are the user's
            own.
        also: ids of tensors to be noted although they require no grad.
        known: what is the user's own whatever number it has: autograd may evaluate backward on
            another thread. Grows.
    """

    def __init__(self, ours: Sequence[Tensor], start: int, also: frozenset[int], known: set[Key]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.through = False
        self._start = start
        self._ours = ours
        self._given = {id(tensor) for tensor in ours}
        self._also, self._known = also, known
        self._stand_ins: dict[int, Tensor] = {}
        self._roots: list[Node] = []
        self._made: list[Tensor] = []  # leaves of the network's own; kept, so that their ids stay theirs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and not _is_about(func):
            args = self._with_stand_ins(args)
            if kwargs and "out" not in kwargs:
                kwargs = self._with_stand_ins(kwargs)
        if func in _SWITCHES and not args[0].requires_grad:
            self._make(args[0])
        result = func(*args, **kwargs)
        if kwargs.get("requires_grad"):
            self._make(result)
        return result

    def reaches(self, outputs: Iterable[Tensor]) -> bool:
        """Whether `outputs` depend on a leaf that was not given, past what was seen."""
        self._roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
        return bool(self._leaves([stand_in.grad_fn for stand_in in self.inputs]))

    def follow(self, outputs: Iterable[Tensor]) -> None:
        """Find what reached `outputs` unseen, in the graph; to be called once, after the
        evaluation."""
        if self.reaches(outputs):
            self.by_leaves()

    def by_leaves(self) -> None:
        """Take gradients by leaves of the user's graph: where some path to one was not seen, those
        that were seen, or what was made of it, would count twice."""
        if self.through:
            return
        detached = [pair for pair in zip(self.tensors, self.inputs, strict=True) if not pair[0].requires_grad]
        leaves = self._leaves([])
        self.tensors = [tensor for tensor, _ in detached] + leaves
        self.inputs = [stand_in for _, stand_in in detached] + leaves
        self.through = True

    def _leaves(self, stop: Iterable[Node | None]) -> list[Tensor]:
        """The leaves that the outputs depend on, but for those given and those behind `stop`."""
        own = self._given | {id(leaf) for leaf in self._made} | {id(stand_in) for stand_in in self.inputs}
        seen = {tensor.grad_fn for tensor in self._ours} | set(stop)
        pending = [root for root in self._roots if root not in seen]
        found = []
        while pending:
            for node, _ in pending.pop().next_functions:
                if node is None or node in seen:
                    continue
                seen.add(node)
                if type(node).__name__ == "AccumulateGrad":
                    if id(node.variable) not in own:  # type: ignore[attr-defined]
                        found.append(node.variable)  # type: ignore[attr-defined]
                else:
                    pending.append(node)
        return found

    def _make(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._made.append(result)
            self._given.add(id(result))

    def _with_stand_ins(self, value: Any) -> Any:
        """`value` with everything in it replaced that was captured."""
        if type(value) in _PLAIN:
            return self._stand_in(value) if value.requires_grad or id(value) in self._also else value
        if type(value) is tuple or type(value) is list:
            return type(value)([self._with_stand_ins(entry) for entry in value])
        if type(value) is dict:
            return {key: self._with_stand_ins(entry) for key, entry in value.items()}
        return value

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if (known := self._stand_ins.get(id(tensor))) is not None:
            return known
        node = tensor.grad_fn
        if id(tensor) in self._given or _wrapped(tensor) or tensor.layout != torch.strided:
            return tensor
        if node is not None and key_of(tensor) not in self._known and self._is_ours(node):
            return tensor
        self._known.add(key_of(tensor))
        stand_in = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        if _wrapped(stand_in):  # inside a transform of the network's own, whose end it would not survive
            return tensor
        self.tensors.append(tensor)
        self.inputs.append(stand_in)
        self._stand_ins[id(tensor)] = stand_in
        return stand_in

    def _is_ours(self, node: Node) -> bool:
        """Whether a node was made here: by its number, or, since threads count apart, by where it
        leads."""
        if node._sequence_nr() >= self._start:
            return True
        nodes = {tensor.grad_fn for tensor in (*self._ours, *self.inputs)}
        seen, pending = {node}, [node]
        while pending:
            for following, _ in pending.pop().next_functions:
                if following is None or following in seen:
                    continue
                seen.add(following)
                if following in nodes or id(getattr(following, "variable", None)) in self._given:
                    return True
                pending.append(following)
        return False


def _is_about(func: Any) -> bool:
    """Whether a function is to get its arguments as they are."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VIEWS
    # what works in place; in a graph it is found all the same
    in_place = name[:3] == "__i" and name != "__iter__" if name[-2:] == "__" else name[-1:] == "_"
    return in_place or name in _ABOUT or name == "__set__"
