"""One line of `bench/gpu.py`'s table after the other, in a process that can be stopped: a case, a
precision, a peer.

Reads the jobs to do as JSON from its input, writes JSON lines: {"begin": job}, then {"row": ...}.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton.step import MetaStep
from fastmeta.benchmark import cost
from fastmeta.benchmark.peers import Prepared
from fastmeta.benchmark.peers.autograd_loop import AutogradLoop
from fastmeta.benchmark.peers.jax_peers import JaxVmap
from fastmeta.benchmark.peers.ours import MetaGradientPeer
from fastmeta.benchmark.peers.torch_func import TorchCompile, TorchFunc
from fastmeta.cases import Case
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.errors import BackendUnavailable
from fastmeta.models import Siren
from fastmeta.verify import rule
from fastmeta.verify.problems import problem_of
from fastmeta.verify.quantities import relative_error

#: Workload, number of tasks, number of inner steps, queries.
_CHOSEN = (
    *(("omniglot", 32, 1, 75), ("sinusoid", 32, 5, 10), ("miniimagenet", 4, 5, 75), ("mlp", 32, 5, 75)),
    *(("recommender", 32, 5, 10), ("sinusoid", 1024, 5, 10), ("mlp-bn", 32, 5, 75)),
    ("sinusoid-adam", 32, 5, 10),
)
_SIREN = Case(
    "siren", partial(Siren, (2, 256, 256, 256, 3)), (2,), 16, 1024, 1024, 3, "mse", lr=0.01, wrt_inputs=False
)
_FOUND = [
    next(c for c in WORKLOADS[name] if (c.tasks, c.steps, c.queries) == (tasks, steps, queries))
    for name, tasks, steps, queries in _CHOSEN
]
CASES = {case.id: case for case in (_FOUND[0], _SIREN, *_FOUND[1:])}
#: What a run without a GPU goes through, to see that all else works.
DRY = {case.id: case for case in WORKLOADS["sinusoid"][:1]}
#: What is asked of PyTorch, and the same of JAX.
PRECISIONS = {"highest": "float32", "high": "tf32"}
_OF_JAX = {"highest": "highest", "high": "tensorfloat32"}
SEEDS = 3  # a case with kinks is judged by the median of so many
CALLS = 30
FEWEST, LONG = 5, 8.0  # calls at least; seconds after which they are enough
MOST_IN_A_LOOP = 64  # tasks of a peer that takes one after the other

Named = dict[Any, Tensor]


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Until the device has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Graphed:
    """A peer's step captured in a CUDA graph."""

    def __init__(self, peer: Any) -> None:
        self.peer, self.name = peer, f"{peer.name}+graph"

    def missing(self) -> str:
        return str(self.peer.missing()) if torch.cuda.is_available() else "there is no CUDA device"

    def version(self) -> str:
        return str(self.peer.version())

    def prepare(self, case: Case, made: Any) -> Prepared:
        inner = self.peer.prepare(case, made)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                inner.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = inner.step()

        def step() -> Any:
            graph.replay()
            return out

        return Prepared(step, inner.gradient)


class JaxOnce(JaxVmap):
    """`JaxVmap` in the precision asked for: what is compiled keeps the one it was compiled with."""

    def prepare(self, case: Case, made: Any) -> Prepared:
        import jax

        asked = _OF_JAX[torch.get_float32_matmul_precision()]
        if jax.config.jax_default_matmul_precision != asked:
            jax.config.update("jax_default_matmul_precision", asked)
            self._compiled.clear()
        return super().prepare(case, made)


TORCH = MetaGradientPeer("fastmeta-torch", "torch")
_ALL: tuple[Any, ...] = (
    MetaGradientPeer("fastmeta-triton", "triton"),
    MetaGradientPeer("fastmeta-cuda", "cuda"),
    TorchFunc(),
    Graphed(TorchFunc()),
    TORCH,
    JaxOnce(),
    AutogradLoop(),
    Graphed(AutogradLoop()),
    TorchCompile(),
    Graphed(TorchCompile()),
)
PEERS = {peer.name: peer for peer in _ALL}
OURS = ("fastmeta-triton", "fastmeta-cuda")


@dataclass(slots=True)
class Row:
    """One peer on one case."""

    case: str
    precision: str
    peer: str
    status: str = "timed"  # "timed" | "wrong" | "broken" | "stopped" | "left out" | "missing"
    reason: str = ""
    error: float = float("nan")  # of the meta-gradient against float64
    allowed: float = float("nan")
    first_call_s: float = float("nan")
    median_ms: float = float("nan")
    min_ms: float = float("nan")
    p20_ms: float = float("nan")
    p80_ms: float = float("nan")
    device_ms: float = float("nan")  # of fastmeta's kernels alone: a CUDA graph of one call, replayed
    ratio: float = float("nan")  # to fastmeta-triton
    ratio_cuda: float = float("nan")  # to fastmeta-cuda
    per_device: float = float("nan")  # to fastmeta-cuda's time on the device
    tflops: float = float("nan")
    roofline_ms: float = float("nan")
    roofline_share: float = float("nan")
    peak_mib: float = float("nan")
    tuning: str = ""
    peer_version: str = ""


# ---- right?


@cache
def references(case: Case) -> list[Named]:
    """By seed, the meta-gradient in float64, by the torch backend on the same device."""
    refs = []
    for seed in range(SEEDS if case.kinks else 1):
        prepared = TORCH.prepare(case, case.build(torch.float64, seed).to(device()))
        refs.append(_named(prepared.gradient(prepared.step())))
    return refs


@cache
def own_errors(case: Case, precision: str) -> tuple[float, ...]:
    """By seed, PyTorch's own error in a precision, which is set: that of the torch backend, since
    `torch.func` takes no batch norm with running statistics."""
    found = []
    for seed, ref in enumerate(references(case)):
        prepared = TORCH.prepare(case, case.build(torch.float32, seed).to(device()))
        found.append(relative_error(_named(prepared.gradient(prepared.step())), ref, list(ref)))
    return tuple(found)


def _named(gradients: dict[str, Tensor]) -> Named:
    return {("d_params", name): value.detach().double().cpu() for name, value in gradients.items()}


def judge(row: Row, outs: list[Named], refs: list[Named], own: tuple[float, ...]) -> bool:
    """Fill in the error; whether it is within twice PyTorch's own."""
    row.error = statistics.median(relative_error(o, r, list(r)) for o, r in zip(outs, refs, strict=True))
    row.allowed = rule.FACTOR * statistics.median(own) + rule.FLOOR
    return row.error <= row.allowed


# ---- how fast?


def on_device(step: Callable[[], Any], replays: int = 20, samples: int = 15) -> float:
    """Milliseconds of one call in a CUDA graph that is replayed, by events around so many replays:
    the median."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(samples + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / replays)
    return statistics.median(times[3:])


def clock(step: Callable[[], Any], calls: int = CALLS) -> list[float]:
    """Milliseconds of calls, each finished before the next begins; the first three are dropped.
    Fewer where they are long."""
    times: list[float] = []
    begin = time.perf_counter()
    for i in range(calls + 3):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
        if len(times) >= FEWEST and time.perf_counter() - begin > LONG:
            break
    return sorted(times)


@cache
def peak_flops(precision: str) -> float:
    """Of PyTorch's own large matrix product in a precision, which is set."""
    n = 8192 if torch.cuda.is_available() else 256
    a, b = (torch.randn(n, n, device=device()) for _ in range(2))
    return float(2 * n**3 / (1e-3 * clock(lambda: a @ b, 10)[0]))


@cache
def bandwidth() -> float:
    """Bytes a second that a copy within device memory reads and writes."""
    source = torch.empty(2**28 if torch.cuda.is_available() else 2**20, device=device())
    target = torch.empty_like(source)
    return float(2 * source.nbytes / (1e-3 * clock(lambda: target.copy_(source), 10)[0]))


def traffic(case: Case, precision: str) -> int:
    """Bytes that fastmeta's launches read and write, each tensor of a launch once: what layer by
    layer must move."""
    problem, names = problem_of(case, torch.float32, 0), frozenset({"params"})
    products = runs.PRECISIONS[precision]
    step = MetaStep(problem, runs.network(problem, names), names, "store", products, torch.device("meta"))
    given = (value for launch in step.emit.launches for value in launch.arguments.values())
    return sum(value.numel() * value.element_size() for value in given if isinstance(value, Tensor))


@cache
def roofline_ms(case: Case, precision: str) -> float:
    """Time that arithmetic and memory, at the rates measured in this run, cannot fall below layer
    by layer."""
    return 1e3 * max(cost.flops(case) / peak_flops(precision), traffic(case, precision) / bandwidth())


def suits(case: str, peer: str) -> bool:
    """Whether a peer is to be timed on a case."""
    return not peer.startswith(AutogradLoop.name) or (CASES | DRY)[case].tasks <= MOST_IN_A_LOOP


def measure(case: Case, precision: str, name: str) -> Row:
    """One row; what breaks is said in it."""
    peer = PEERS[name]
    row = Row(case.id, PRECISIONS[precision], name, peer_version=peer.version(), reason=peer.missing())
    if row.reason:
        row.status = "missing"
        return row
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        _measure(row, peer, case, precision)
    except BackendUnavailable as error:  # not for this network
        row.status, row.reason = "missing", str(error)[:300]
    except Exception as error:  # a peer that breaks is reported; the others still count
        row.status, row.reason = "broken", f"{type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc()
    return row


def lost() -> bool:
    """Whether the device does nothing more for this process: so it is after an access to memory
    that is not there."""
    try:
        wait()
    except RuntimeError:
        return True
    return False


def _measure(row: Row, peer: Any, case: Case, precision: str) -> None:
    refs, own = references(case), own_errors(case, precision)
    outs, first, made = [], None, None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for seed in range(len(refs)):
        instance = case.build(torch.float32, seed).to(device())
        start = time.perf_counter()
        prepared = peer.prepare(case, instance)
        out = prepared.step()
        wait()
        if first is None:
            first, made, row.first_call_s = prepared, instance, time.perf_counter() - start
        outs.append(_named(prepared.gradient(out)))
    if first is None or made is None or not judge(row, outs, refs, own):
        row.status = "wrong"
        return
    times = clock(first.step)
    row.median_ms, row.min_ms = statistics.median(times), times[0]
    row.p20_ms, row.p80_ms = times[len(times) // 5], times[4 * len(times) // 5]
    row.tflops = cost.flops(case) / row.median_ms / 1e9
    if torch.cuda.is_available():
        row.peak_mib = torch.cuda.max_memory_allocated() / 2**20
        if row.peer in OURS:
            row.device_ms = on_device(first.step)
    row.roofline_ms = roofline_ms(case, precision)
    row.roofline_share = row.roofline_ms / row.median_ms
    if row.peer == "fastmeta-triton":
        row.tuning = _tuning(case, made)


def _tuning(case: Case, made: Any) -> str:
    """What `explain()` says about it."""
    from fastmeta import MAML

    maml = MAML(made.net, loss=made.loss, inner_lr=case.lr, inner_steps=case.steps, backend="triton")
    said = str(maml.explain(made.support_x, made.support_y, made.query_x, made.query_y))
    return next((line.strip() for line in said.splitlines() if "tuning:" in line), "")


@contextlib.contextmanager
def _stdout_for_lines() -> Iterator[Callable[[Any], None]]:
    """Lines go to the real output; whatever else prints, to the error output."""
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        yield lambda value: print(json.dumps(value), file=lines, flush=True)


def main() -> None:
    """Do the jobs."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    with _stdout_for_lines() as write:
        for job in json.load(sys.stdin):
            case, precision, peer = job
            write({"begin": job})
            row = measure((CASES | DRY)[case], precision, peer)
            write({"row": asdict(row)})
            if row.status == "broken" and lost():
                break  # what is left is for another process


if __name__ == "__main__":
    main()
