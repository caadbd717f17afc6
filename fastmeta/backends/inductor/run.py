"""One kind of call: tensors are copied into static ones, and results are copied out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.backends import _inputs
from fastmeta.backends._copies import copy_together
from fastmeta.backends.inductor.pieces import Pieces
from fastmeta.backends.inductor.sweep import CompiledSweep
from fastmeta.inputs import Tree, mapped
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients, Problem, Result, Scratch

#: One capture at a time in a process: PyTorch's random state is part of one.
_CAPTURING = threading.Lock()
#: In the place of the module, which compiled code has no use for, and which it would keep alive.
_NO_NET = nn.Identity()


class Job:
    """All calls that differ in nothing but the values of tensors.

    On a GPU the whole sweep is one CUDA graph from the second call on: the first one loads the
    kernels, which no capture survives. Nothing that is returned is touched again. One call at a
    time; calls from other streams wait.

    To be made and run with gradients and inference mode off.
    """

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool, pieces: Pieces) -> None:
        self.wrt, self.adapted, self.pieces = wrt, adapted, pieces
        self.device = problem.device
        self.why_no_graph = "" if self.device.type == "cuda" else "there is no GPU"
        self._lock = threading.Lock()
        self._static = replace(_each(problem, _dense), net=_NO_NET, exchange=None)
        self._buffers = {name: _dense(value) for name, value in pieces.buffers.values(problem.net).items()}
        self._targets = self._tensors(self._static, self._buffers)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: Result | None = None
        self._calls = 0
        self._done = torch.cuda.Event() if self.device.type == "cuda" else None
        self._streams: set[Any] = set()

    def run(self, problem: Problem) -> Result:
        """Answer a problem."""
        with self._lock:
            if self._done is None:
                return self._run(problem)
            with torch.cuda.device(self.device):
                if torch.cuda.is_current_stream_capturing():  # a graph cannot be put into another
                    self._load(problem)
                    return _copied(self._sweep())
                stream = torch.cuda.current_stream()
                stream.wait_event(self._done)
                if stream not in self._streams:  # its memory is to outlive what runs there
                    self._streams.add(stream)
                    for tensor in self._targets:
                        tensor.record_stream(stream)
                result = self._run(problem)
                self._done.record(stream)
                return result

    def _run(self, problem: Problem) -> Result:
        self._load(problem)
        self._calls += 1
        if self._graph is None and self._calls > 1 and not self.why_no_graph:
            self._capture()
        if self._graph is None or self._captured is None:
            return _copied(self._sweep())
        self._graph.replay()
        return _copied(self._captured)

    def _load(self, problem: Problem) -> None:
        copy_together(self._targets, self._tensors(problem, self.pieces.buffers.values(problem.net)))

    def _sweep(self) -> Result:
        return CompiledSweep(self._static, self.wrt, self.pieces, self._buffers).run(self.adapted)

    def _capture(self) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            own = torch.cuda.Stream(self.device)
            # other threads may allocate meanwhile: their calls are not ours to forbid
            with _CAPTURING, torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
                captured = self._sweep()
        except RuntimeError as error:
            self.why_no_graph = f"capture failed: {str(error).splitlines()[0]}"
            torch.cuda.set_stream(current)  # which a capture that fails does not put back
            return
        self._graph, self._captured = graph, captured

    @staticmethod
    def _tensors(problem: Problem, buffers: dict[str, Tensor]) -> list[Tensor]:
        """All tensors of a call, in a fixed order."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        _each(problem, note)
        return [*found, *buffers.values()]


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _each(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """The same problem with `function(tensor)` in the place of every tensor that a call hands
    over, its step weights written out."""

    def batch(given: Batch | None) -> Batch | None:
        return None if given is None else _inputs.each(given, function)

    def loss(given: Loss | None) -> Loss | None:
        found = {} if given is None else {name: getattr(given, name) for name in ("weight", "pos_weight")}
        found = {name: function(value) for name, value in found.items() if value is not None}
        return replace(given, **found) if given is not None and found else given

    cotangents = problem.adapted_grad
    return replace(
        _inputs.with_step_weights(problem),
        params={name: function(value) for name, value in problem.params.items()},
        rates={name: function(value) for name, value in problem.rates.items()},
        hyper={name: function(value) for name, value in problem.hyper.items()},
        support=batch(problem.support),
        query=batch(problem.query),
        loss=loss(problem.loss),
        query_loss=loss(problem.query_loss),
        task_weights=None if problem.task_weights is None else function(problem.task_weights),
        adapted_grad=None
        if cotangents is None
        else {name: function(value) for name, value in cotangents.items()},
        output_grad=mapped(lambda leaf: None if leaf is None else function(leaf), problem.output_grad),
        scratch=Scratch(),
        captures=None,
    )


def _copied(result: Result) -> Result:
    """The same answer in memory of its own."""

    def tree(given: Tree) -> Tree:
        return mapped(lambda leaf: None if leaf is None else _dense(leaf), given)

    def named(given: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return None if given is None else {name: _dense(value) for name, value in given.items()}

    grads = Gradients(named(result.grads.params), named(result.grads.lr), named(result.grads.rule))
    for part in fields(Gradients):
        if part.name.startswith(("support_", "query_")):
            setattr(grads, part.name, tree(getattr(result.grads, part.name)))
    return Result(tree(result.task_losses), tree(result.output), named(result.adapted), grads)
