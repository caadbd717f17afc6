"""One kind of call of the Triton backend: launches recorded once, run again and again, as a CUDA
graph if possible."""

from __future__ import annotations

import threading
from math import prod
from typing import Any
from weakref import ref

import torch
import triton
from torch import Tensor

from fastmeta.backends._copies import copy_together
from fastmeta.backends._losses import reads_channels
from fastmeta.backends._precision import asked_for
from fastmeta.backends._rules import gradients_of_numbers
from fastmeta.backends.triton import tune as tuning
from fastmeta.backends.triton.compile import compile_together
from fastmeta.backends.triton.network import build
from fastmeta.backends.triton.step import FUNCTIONS, KINDS, MetaStep
from fastmeta.bounded import Bounded
from fastmeta.graph.nodes import Graph
from fastmeta.problem import Gradients, Problem, Result, Scratch

__all__ = ["FUNCTIONS", "KINDS", "Job", "describe"]

POISON = False

#: memory="auto" keeps the activations of all steps while everything takes less than this share of
#: the device's memory, or, under the interpreter, this many bytes.
STORE_SHARE, STORE_BYTES = 0.25, 256 << 20

#: PyTorch captures one graph at a time.
_CAPTURING = threading.Lock()

#: Triton's interpreter changes Triton's own modules while it runs a kernel.
_INTERPRETING = threading.Lock()

#: What `torch.get_float32_matmul_precision()` means for the products of float32 numbers; see
#: `kernels.tile`.
PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def precision(dtype: torch.dtype) -> str:
    """How products are made now; float64 is always itself."""
    found = PRECISIONS[asked_for()] if dtype == torch.float32 else "ieee"
    return "bf16_rounded" if found == "bf16" and triton.knobs.runtime.interpret else found


def network(problem: Problem, wrt: frozenset[str]) -> Graph:
    """The analysed program of a problem."""
    if problem.program is None:
        raise ValueError(f"a plan needs a captured network: {problem.refused}")
    inputs = not wrt.isdisjoint({"support_x", "query_x"})
    return build(problem.program, inputs, reads_channels(problem))


def memory_limit(device: torch.device) -> int:
    """Bytes that a plan which stores activations may take."""
    if device.type != "cuda":
        return STORE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * STORE_SHARE)


def memory_mode(problem: Problem, wrt: frozenset[str], limit: int) -> str:
    """ "store" or "recompute": what "auto" stands for; known without allocating anything."""
    if problem.memory != "auto":
        return problem.memory
    dtype = next(iter(problem.params.values())).dtype
    step = MetaStep(problem, network(problem, wrt), wrt, "store", precision(dtype), torch.device("meta"))
    return "store" if step.memory.bytes <= limit else "recompute"


#: Plans at most, of all networks, and what their static tensors may take together.
_MOST_JOBS, _MOST_BYTES = 256, 1 << 30
_kept: dict[torch.device, Bounded[int, ref[Scratch]]] = {}


def keep(scratch: Scratch, job: Job) -> None:
    """Count the memory of a plan that is kept in `scratch`; what was not used for longest gives its
    own back."""
    device = job.device
    if device not in _kept:
        half = (
            torch.cuda.get_device_properties(device).total_memory // 2
            if device.type == "cuda"
            else _MOST_BYTES
        )
        _kept[device] = Bounded(_MOST_JOBS, half, _size, _give_back)
    key, of_device = id(scratch), _kept[device]
    of_device.put(key, ref(scratch, lambda _: of_device.drop(key)))


def used(scratch: Scratch, job: Job) -> None:
    """The plan in `scratch` is the one that was used last."""
    _kept[job.device].used(id(scratch))


def _size(kept: ref[Scratch]) -> int:
    scratch = kept()
    return 0 if scratch is None else int(scratch["triton"].step.memory.bytes)


def _give_back(kept: ref[Scratch]) -> None:
    scratch = kept()
    if scratch is not None:
        scratch.pop("triton", None)


class Job:
    """All calls that differ in nothing but the values of tensors.

    A call copies its tensors into static ones, runs the launches and copies the results out:
    nothing that is returned is touched again, and it does not matter where the tensors of the next
    call lie. One call at a time; calls from other streams wait.
    """

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool) -> None:
        first = next(iter(problem.params.values()))
        self.wrt, self.adapted, self.device = wrt, adapted, first.device
        self.precision = precision(first.dtype)
        self.mode = memory_mode(problem, wrt, memory_limit(self.device))
        self.step = MetaStep(problem, network(problem, wrt), wrt, self.mode, self.precision, self.device)
        self.tuning = self._compile()
        self.targets: list[Tensor] = []  # views for what is copied in, and of the parameters' gradients
        self.found: list[Tensor] = []
        self.lock = threading.Lock() if self.device.type == "cuda" else _INTERPRETING
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        # streams that the static tensors are known to be used on
        self.streams: set[Any] = (
            {torch.cuda.current_stream(self.device)} if self.device.type == "cuda" else set()
        )
        self.why_no_graph = "" if self.device.type == "cuda" else "there is no GPU"
        self.done = torch.cuda.Event() if self.device.type == "cuda" else None

    def _compile(self) -> tuning.Report:
        """Time what there is to choose, while nothing is in the launches' memory yet, and compile
        what is launched."""
        emit, report = self.step.emit, tuning.Report(tuning.off(self.device))
        if self.device.type != "cuda":
            return report
        with torch.cuda.device(self.device):
            if not report.off:
                file = tuning.file_for(self.device)
                emit.launches, report = tuning.tune(emit.launches, tuning.OnDevice(), file)
            compile_together(emit.launches)
        return report

    def run(self, problem: Problem) -> Result:
        """Answer a problem."""
        with self.lock:
            if self.device.type != "cuda":
                return self._run(problem)
            with torch.cuda.device(self.device):
                if self.done is None or torch.cuda.is_current_stream_capturing():
                    return self._run(problem)
                stream = torch.cuda.current_stream()
                stream.wait_event(self.done)
                self._lend(stream)
                result = self._run(problem)
                self.done.record(stream)
                return result

    def _lend(self, stream: torch.cuda.Stream) -> None:
        """Once this job is gone its memory is given to nobody before `stream` has done with it."""
        if stream not in self.streams:
            self.streams.add(stream)
            for tensor in self.step.tensors():
                tensor.record_stream(stream)

    def _run(self, problem: Problem) -> Result:
        if POISON:
            self.step.memory.spoil()
        self._load(problem)
        self._launch()
        return self._result(problem)

    # ---- in

    def _load(self, problem: Problem) -> None:
        if not self.targets:
            self.targets = self._targets(problem)
        copy_together(self.targets, self._sources(problem))

    def _targets(self, problem: Problem) -> list[Tensor]:
        """The static tensors that a call fills, in PyTorch's layout."""
        step, layout = self.step, self.step.layout
        found = [layout.view(step.theta0, p) for p in range(len(layout.names))]
        found += [layout.rate_view(step.rates, layout.names.index(name)) for name in problem.rates]
        found += step.buffers
        for batch in (step.support, step.query):
            found += [] if batch is None else batch.targets()
        if step.task_weights is not None:
            found.append(step.task_weights)
        if step.output_grad is not None:
            found.append(step.output_grad.movedim(-1, 2) if step.channels else step.output_grad)
        if step.lam is not None and problem.adapted_grad is not None:
            found += [layout.view(step.lam, p) for p in range(len(layout.names))]
        if step.rule is not None:
            found += step.rule.targets()
        return found

    def _sources(self, problem: Problem) -> list[Tensor]:
        """What goes there."""
        step, names = self.step, self.step.layout.names
        found = [problem.params[name] for name in names]
        found += problem.rates.values()
        found += [problem.net.get_buffer(name) for name in step.net.params[len(names) :]]
        for batch, given, loss in (
            (step.support, problem.support, problem.loss),
            (step.query, problem.query, problem.query_loss),
        ):
            found += [] if batch is None or given is None else batch.sources(given, loss)
        if problem.task_weights is not None:
            found.append(problem.task_weights)
        if problem.output_grad is not None:
            found.append(problem.output_grad)
        if step.lam is not None and problem.adapted_grad is not None:
            found += [problem.adapted_grad[name] for name in names]
        if step.rule is not None:
            found += step.rule.sources(problem)
        return found

    # ---- launches

    def _launch(self) -> None:
        self.calls += 1
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            # The first call compiles the kernels, which no capture survives; a call of its own
            # shows what is slow.
            if self.graph is None and self.calls > 1 and not self.why_no_graph:
                self._capture()
            if self.graph is not None:
                self.graph.replay()
                return
        # a graph cannot be launched into the user's own: there go the launches
        for launch in self.step.emit.launches:
            launch.run()

    def _capture(self) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # A stream of its own: the one that PyTorch would take belongs to the first device that
            # captured anything.
            # Other threads may allocate meanwhile: their calls are not ours to forbid.
            own = torch.cuda.Stream(self.device)
            with _CAPTURING, torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
                for launch in self.step.emit.launches:
                    launch.run()
        except RuntimeError as error:
            self.why_no_graph = f"capture failed: {error}"
            torch.cuda.set_stream(current)  # which a capture that fails does not put back
            return
        self.graph = graph

    # ---- out

    def _result(self, problem: Problem) -> Result:
        step = self.step
        result = Result(grads=self._gradients(problem))
        if step.query is not None and step.output is not None and problem.query is not None:
            shape = list(problem.program.output_shape)  # type: ignore[union-attr]
            if step.channels:
                shape.append(shape.pop(0))
            output = step.output.view(problem.tasks, step.query.examples, *shape)
            output = output.movedim(-1, 2) if step.channels else output
            result.output = output.clone(memory_format=torch.contiguous_format)
        if step.losses is not None and step.loss is not None:
            result.task_losses, result.loss = step.losses.clone(), step.loss.clone()
        if self.adapted:
            result.adapted = self._adapted(problem)
        return result

    def _adapted(self, problem: Problem) -> dict[str, Tensor]:
        step, layout = self.step, self.step.layout
        found = {}
        for p, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
            moved = step.thetas is not None and layout.adapted[p] and step._moves(p)
            rows = step.thetas[-1] if moved else step.theta0  # type: ignore[index]
            value = layout.view(rows, p)
            found[name] = value.expand(step.tasks, *shape).clone(memory_format=torch.contiguous_format)
        return found

    def _gradients(self, problem: Problem) -> Gradients:
        step, layout, grads = self.step, self.step.layout, Gradients()
        if "params" in self.wrt and step.total is not None and step.lam is not None:
            sizes = [prod(problem.params[name].shape) for name in layout.names]
            flat = torch.empty(sum(sizes), dtype=step.memory.dtype, device=self.device)
            pieces = dict(zip(layout.names, flat.split(sizes), strict=True))
            grads.params = {name: pieces[name].view(problem.params[name].shape) for name in layout.names}
            if not self.found:
                rows = [step.lam if name in problem.per_task else step.total for name in layout.names]
                self.found = [layout.view(row, p) for p, row in enumerate(rows)]
            copy_together([*grads.params.values()], self.found)
            grads.flat_params = flat
        if "lr" in self.wrt:
            grads.lr = {name: self._rate_gradient(name, rate) for name, rate in problem.rates.items()}
        if "rule" in self.wrt:
            grads.rule = (
                gradients_of_numbers(problem, None)
                if step.rule is None
                else step.rule.gradients_of_numbers(problem)
            )
        for batch in (step.support, step.query):
            if batch is not None:
                batch.deliver(grads)
        if step.support is None and problem.support is not None:  # no inner step: nothing depends on it
            for part in ("x", "y", "weights"):
                tensor = getattr(problem.support, part)
                if f"support_{part}" in self.wrt and tensor is not None and tensor.is_floating_point():
                    setattr(grads, f"support_{part}", torch.zeros_like(tensor))
        return grads

    def _rate_gradient(self, name: str, rate: Tensor) -> Tensor:
        step, layout = self.step, self.step.layout
        if not step.wants_rates or step.rate_sums is None or step.rate_total is None:
            return torch.zeros_like(rate)
        p = layout.names.index(name)
        if rate.shape[1] > 1:
            found = layout.rate_view(step.rate_sums, p)  # [K or 1, T, *]
        else:
            found = layout.rate_view(step.rate_total, p).unsqueeze(1)
        if rate.shape[0] == 1 and found.shape[0] > 1:  # others have one a step
            found = found.sum(0, keepdim=True)
        return found.clone(memory_format=torch.contiguous_format)

    def fits(self, problem: Problem, wrt: frozenset[str], adapted: bool) -> bool:
        """Whether nothing that is fixed has changed for a problem of the same shapes and
        options."""
        first = next(iter(problem.params.values()))
        same = self.wrt == wrt and self.adapted == adapted and self.device == first.device
        return same and self.precision == precision(first.dtype)


_SAID = {
    "ieee": "float32 products are exact to float32 (IEEE multiply-adds)",
    "tf32": "float32 products are rounded to TF32 (ten bits), "
    "as torch.set_float32_matmul_precision('high') allows",
    "bf16": "float32 products are rounded to bfloat16, "
    "as torch.set_float32_matmul_precision('medium') allows",
}
_SAID["bf16_rounded"] = _SAID["bf16"]


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """What runs, known without running or allocating anything."""
    first = next(iter(problem.params.values()))
    used = precision(first.dtype)
    mode = memory_mode(problem, wrt, memory_limit(first.device))
    step = MetaStep(problem, network(problem, wrt), wrt, mode, used, torch.device("meta"))
    names = [
        "conv2d(recomputed) " * (node.recomputes is not None) + (node.function or node.kind)
        for node in step.net.nodes
    ]
    said = _SAID[used] if first.dtype == torch.float32 else "float64"
    where = (
        _how_launched(problem.scratch.get("triton"))
        if first.device.type == "cuda"
        else "Triton's interpreter"
    )
    return [
        f"kernels: {' '.join(names)} ({len(step.emit.launches)} launches, {where})",
        f"precision: {said}",
        f"memory: {mode}, {step.memory.bytes / 2**20:.1f} MiB for all tasks",
        str(_tuning(problem, wrt, step)),
    ]


def _how_launched(job: Job | None) -> str:
    """Of calls on a GPU."""
    if job is not None and job.why_no_graph:
        return f"launched one by one: {job.why_no_graph}"
    return "one CUDA graph from the second call on"


def _tuning(problem: Problem, wrt: frozenset[str], step: MetaStep) -> tuning.Report:
    """What was tuned for calls like this one, or would be."""
    job, device = problem.scratch.get("triton"), next(iter(problem.params.values())).device
    if job is not None and job.fits(problem, wrt, job.adapted):
        return job.tuning
    reason = tuning.off(device)
    return tuning.Report(reason) if reason else tuning.look(step.emit.launches, tuning.file_for(device))
