"""Every Triton kernel compiled ahead of time for three generations of GPUs: no GPU is needed to see
that it fits.

The launches are those that the workloads of the benchmark record. FASTMETA_EVERY_KERNEL=1 compiles
all of them;
otherwise one of each sort, the one with the largest tile, and for two of the three generations one
of each kernel: the one that reads and writes most, of kernels with tiles one for each precision.

Other processes do all of it, in which Triton's interpreter is off, whatever it is in this one.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from triton import JITFunction
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.compiler import CompilationError

from fastmeta import kernels
from fastmeta.backends.triton import compile as ahead
from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases import Case
from fastmeta.cases.convolutional import image_net
from fastmeta.cases.networks import grid
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS
from fastmeta.kernels import rule_numbers, update_rule
from fastmeta.kernels.elementwise import End, Finish, apply
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import Launch, named
from fastmeta.layers.registry import KINDS
from fastmeta.models import Siren
from fastmeta.verify.problems import problem_of, wanted

EVERYTHING = os.environ.get("FASTMETA_EVERY_KERNEL") == "1"
CAPABILITIES = sorted(ahead.SHARED)
_TILES = ("BM", "BN", "BO", "BI", "BR", "BC", "BG", "BLOCK")
#: What two launches of one sort share, besides the kernel.
_SORT = ("FINISH.mode", "KIND", "BACKWARD", "ADAPTIVE", "PRECISION", "FORM.kind")

_SIREN = Case("siren", partial(Siren, (2, 256, 256, 256, 3)), (2,), 16, 1024, 1024, 3, "mse", lr=0.01)
_DEEP = Case(
    "conv640",
    lambda: nn.Sequential(
        nn.Conv2d(320, 640, 3, padding=1), nn.BatchNorm2d(640), nn.LeakyReLU(0.1), nn.MaxPool2d(2)
    ),
    (320, 10, 10),
    4,
    5,
    75,
    1,
    "mse",
)

#: Of the list of cases, for layers that the workloads do not have.
_LABELS = (
    "residual_image joined gn_relu_pool gn1_plain bn_plain ln_last max_pool_3_2 avg_pool_3_2 adaptive".split()
)
#: Loss, its outputs, examples, dtype: tiles of other shapes than the workloads have, and all that a
#: loss can take.
_LOSSES: tuple[tuple[str, int | tuple[int, ...], int, torch.dtype], ...] = (
    ("ce_probabilities_everything", 5, 100, torch.float32),
    ("ce_sum", 5, 100, torch.float64),
    ("ce_sum", 20, 75, torch.float64),
    ("ce_masked_mean", (5, 7, 7), 25, torch.float32),
    ("ce_probabilities_everything", (5, 7, 7), 25, torch.float64),
    ("bce_weighted", 5, 400, torch.float32),
    ("bce", 784, 33, torch.float64),
)


def _launches(case: Case, precision: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    problem = problem_of(case, dtype, 0)
    names = wanted(case, problem)
    step = MetaStep(problem, runs.network(problem, names), names, "store", precision, torch.device("meta"))
    return step.emit.launches


def _verification(label: str) -> Case:
    return next(case for case in VERIFICATION if case.label == label)


def _losses() -> list[Any]:
    """Launches of losses alone: gradients in the inner loop, of the query, and tangents."""
    found = []
    for loss, outputs, examples, dtype in _LOSSES:
        make = partial(nn.Linear, 3, outputs) if isinstance(outputs, int) else partial(grid, outputs)
        case = Case(
            loss, make, (3,), 2, examples, examples, 1, loss, weighted="" if loss == "ce_sum" else "sqt"
        )
        found += [launch for launch in _launches(case, "ieee", dtype) if launch.kernel.__name__ == "loss"]
    return found


def _rules() -> list[Any]:
    """Launches of update rules alone: of the step in the middle, which reads and writes a state,
    and in float64 the adjoints of the two that take most registers."""
    found = []
    for case in VERIFICATION:
        if case.rule and case.steps == 3 and case.order == "second":
            found += _launches(case, "ieee")
            if case.rule in ("adam", "rmsprop"):
                own = _launches(case, "ieee", torch.float64)
                found += [launch for launch in own if launch.kernel.__name__ == "rule_back"]
    rules = (update_rule.__name__, rule_numbers.__name__)
    found = [launch for launch in found if launch.kernel.__module__ in rules]
    ends = ("FORM.first", "LAST")
    return [launch for launch in found if not any(launch.values().get(name) for name in ends)]


@lru_cache
def _sources() -> list[Any]:
    launches = _rules()
    for name, workload in WORKLOADS.items():
        if name not in NOT_CAPTURED:
            launches += _launches(workload[-1], "ieee")
    launches += _launches(_SIREN, "ieee") + _launches(_DEEP, "ieee")
    for rounded in ("tf32", "bf16"):
        launches += _launches(WORKLOADS["omniglot"][-1], rounded)
    for kind in KINDS.values():
        launches += _launches(next(iter(kind.cases())), "ieee")
    for label in _LABELS:
        launches += _launches(_verification(label), "ieee")
    for case in VERIFICATION:
        if case.label == "tanh" and not case.rule and (case.weighted == "sqt" or case.momentum):
            launches += _launches(case, "ieee")
    launches += _launches(_verification("bn_relu_pool"), "ieee", torch.float64)
    sources, losses = ahead.sources(launches), ahead.sources(_losses())
    if EVERYTHING:
        return list(dict.fromkeys([*sources, *losses]))
    largest: dict[object, tuple[int, Any]] = {}
    for source in sources:
        constants = source.known()
        double = "*fp64" in source.types.values()
        function = constants.get("FINISH.function")
        if (
            "BM" in constants and function != "sin"
        ):  # in an epilogue, the one that takes most registers stands for all
            function = None
        absent = frozenset(constants) & {
            "sums.partials",
            "w",
        }  # convolutions that sum nothing for a norm, norms without weight
        sort = (source.kernel, double, absent, function, *(str(constants.get(name)) for name in _SORT))
        size = prod(constants.get(name, 1) for name in _TILES)
        if sort not in largest or size > largest[sort][0]:
            largest[sort] = (size, source)
    return list(dict.fromkeys([*(source for _, source in largest.values()), *losses]))


def _described(source: Any) -> str:
    constants, names = source.known(), ("FINISH.function", *_SORT, *_TILES)
    return "-".join([source.kernel.__name__, *(str(constants[n]) for n in names if constants.get(n))])


def _hardest(sources: list[Any]) -> list[int]:
    """The indices of those with most tensors: one of every kernel, several where registers and
    shared memory are scarce, which is where there are tiles."""
    hardest: dict[object, tuple[int, int]] = {}
    for i, source in enumerate(sources):
        constants = source.known()
        sort: tuple[object, ...] = (source.kernel,)
        if not constants.keys().isdisjoint(_TILES[:-1]):
            double = "*fp64" in source.types.values()
            sort += (double, constants.get("PRECISION"), constants.get("BACKWARD"))
        tensors = sum(kind.startswith("*") for kind in source.types.values())
        hardest[sort] = max(hardest.get(sort, (0, 0)), (tensors, i))
    return [i for _, i in hardest.values()]


def _chosen(capability: int) -> list[int]:
    """What is compiled for a generation, as indices: kernels cannot be sent from process to
    process."""
    sources = _sources()
    return list(range(len(sources))) if capability == 90 or EVERYTHING else _hardest(sources)


def _usage(where: tuple[int, int]) -> tuple[str, ahead.Usage]:
    index, capability = where
    source = _sources()[index]
    return _described(source), ahead.compile_source(source, capability)


def _kernels() -> set[str]:
    """The functions of `fastmeta.kernels` that no other one calls: those that are launched."""
    modules = (
        import_module(f"{kernels.__name__}.{module.name}") for module in iter_modules(kernels.__path__)
    )
    found = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    text = "".join(re.sub(r"^def \w+", "", function.src) for function in found)
    return {function.__name__ for function in found if not re.search(rf"\b{function.__name__}\(", text)}


@pytest.fixture(scope="module")
def workers() -> Iterator[Executor]:
    """Two processes, which record the launches for themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit(capability: int, workers: Executor) -> None:
    """Nothing is spilled to memory, and a block's shared memory is there; no kernel is left out."""
    chosen = workers.submit(_chosen, capability).result()
    found = list(workers.map(_usage, [(i, capability) for i in chosen], chunksize=4))
    assert [f"{said}: {usage}" for said, usage in found if not usage.fits] == []
    assert {usage.kernel for _, usage in found} == workers.submit(_kernels).result()


def _unlike_triton() -> list[str]:
    """Arguments that `source` specialises in another way than Triton at run time."""
    found = []
    for launch in _launches(_verification("bn_relu_pool"), "ieee"):
        one = ahead.source(launch)
        types, known = one.types, one.known()
        aligned = {one._name(path) for path in one.aligned}
        for parameter in launch.kernel.params:
            if parameter.is_constexpr:
                continue
            value, specialize = launch.arguments[parameter.name], not parameter.do_not_specialize
            kind, special = native_specialize_impl(BaseBackend, value, False, specialize, True)
            own, facts = dict(named({parameter.name: kind})), dict(named({parameter.name: special}))
            found += [
                f"{launch.kernel.__name__}: {name}"
                for name, kind in own.items()
                if kind != types[name]
                or (kind == "constexpr") != (name in known)
                or (facts[name] == "D") != (name in aligned)
            ]
    return found


def test_launches_are_specialised_as_at_run_time(workers: Executor) -> None:
    assert workers.submit(_unlike_triton).result() == []


def _complaints() -> list[str]:
    """What is said of an element-wise layer with an unknown function, in each of its modes."""
    said = []
    for mode in ("forward", "backward", "tangent", "sideways"):
        function = "relu" if mode == "sideways" else "no_such_function"
        x = torch.empty(16, device="meta")
        end, finish = End(x, None, x, x, None), Finish(mode, False, function)
        arguments = {"source": x, "end": end, "size": 16, "FINISH": finish, "BLOCK": 16}
        try:
            ahead.compile_source(ahead.source(Launch(apply, 1, arguments, 4, 1)), 90)
        except CompilationError as error:
            while error.__cause__ is not None:
                error = error.__cause__
            said.append(str(error).splitlines()[-1])
    return said


def test_unknown_functions_and_modes_do_not_compile(workers: Executor) -> None:
    assert workers.submit(_complaints).result() == [
        "value: no such function",
        "second: no such function",
        "first: no such function",
        "finish: no such mode",
    ]


def test_an_argument_that_is_not_there_cannot_vary() -> None:
    @varies("m")
    def kernel(M):
        pass

    with pytest.raises(TypeError, match=r"kernel has no arguments \{'m'\}"):
        jit(kernel)


def test_large_windows_of_a_recomputed_convolution_fit():
    """Unrolled, the nine pixels of these windows spilled 32 KB of a thread."""
    first = (partial(nn.Conv2d, 1, 70, 5), partial(nn.BatchNorm2d, 70), nn.ReLU, partial(nn.MaxPool2d, 3))
    net = partial(image_net, *first, shape=(1, 28, 28))
    case = Case("first", net, (1, 28, 28), 8, 5, 15, 1, "ce", wrt_inputs=False)
    launches = [launch for launch in _launches(case, "ieee") if launch.kernel.__name__ == "patch_products"]
    usages = [ahead.compile_source(source, 90) for source in ahead.sources(launches)]
    assert usages
    assert all(usage.fits for usage in usages)


def test_a_spill_or_too_much_shared_memory_does_not_fit():
    assert ahead.Usage("k", 90, 64, 0, 1 << 16).fits
    assert not ahead.Usage("k", 90, 255, 8, 0).fits
    assert not ahead.Usage("k", 80, 64, 0, 200 << 10).fits
