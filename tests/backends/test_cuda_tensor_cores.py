"""Wide layers of the cuda backend: multiplied on tensor cores, here by what stands in for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from cuda_cases import ptx
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda import run as cuda_runs
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.verify import rule, runs, verify_case
from fastmeta.verify.problems import problem_of, wanted

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU"),
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


# ---- what the lanes hold, and how they round

EXPORTS = """
#include "emulate.h"
using namespace fm::cuda;
extern "C" __attribute__((visibility("default")))
void place(int what, int per, int lane, int reg, int part, int* to) {
  Place found;
  if (what == 2) found = place_in_c(lane, reg);
  else if (per == 1) found = what == 0 ? place_in_a<1>(lane, reg, part) : place_in_b<1>(lane, reg, part);
  else found = what == 0 ? place_in_a<2>(lane, reg, part) : place_in_b<2>(lane, reg, part);
  to[0] = found.row, to[1] = found.col;
}
extern "C" __attribute__((visibility("default"))) void round_all(int per, int n, const float* x, float* to) {
  for (int i = 0; i < n; ++i)
    to[i] = per == 1 ? float_of(round_to_tf32(x[i])) : part_of<2>(round_to_bf16(0, x[i]), 1);
}
extern "C" __attribute__((visibility("default"))) float sum(float c, const double* products) {
  double all[8];
  for (int i = 0; i < 8; ++i) all[i] = products[i];
  return cut_off_sum(c, all);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("fragments") / "exports.so"
    compiler.build_host(EXPORTS, ["-std=c++17", "-O1", "-fPIC", "-shared"], target)
    made = ctypes.CDLL(str(target))
    made.sum.restype, made.sum.argtypes = ctypes.c_float, [ctypes.c_float, ctypes.c_void_p]
    return made


def _isa(what: str, per: int, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element i: PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32, and "for
    mma.m16n8k16", .bf16."""
    group, thread = lane >> 2, lane % 4
    if what == "c":
        return group if i < 2 else group + 8, thread * 2 + (i & 1)
    if what == "a" and per == 1:
        return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4
    if what == "b" and per == 1:
        return thread if i == 0 else thread + 4, group
    if what == "a":
        column = thread * 2 + (i & 1)
        return group if i < 2 or 4 <= i < 6 else group + 8, column if i < 4 else column + 8
    row = thread * 2 + (i & 1)
    return row if i < 2 else row + 8, group


@pytest.mark.parametrize(
    ("what", "per", "registers"), [("a", 1, 4), ("b", 1, 2), ("a", 2, 4), ("b", 2, 2), ("c", 1, 4)]
)
def test_fragments_match_the_instruction_set(
    library: ctypes.CDLL, what: str, per: int, registers: int
) -> None:
    to = (ctypes.c_int * 2)()
    places = set()
    for lane in range(32):
        for register in range(registers):
            for part in range(per):
                library.place("abc".index(what), per, lane, register, part, to)
                assert tuple(to) == _isa(what, per, lane, register * per + part)
                places.add(tuple(to))
    assert len(places) == 32 * registers * per  # every element once


def tf32(x: Tensor) -> Tensor:
    """Rounded to eleven significant bits, ties away from zero, in the dtype of x."""
    mantissa, exponent = torch.frexp(x.double())
    steps = mantissa.abs() * 2**11
    rounded = (
        torch.where(x.isfinite(), torch.floor(steps + 0.5), steps).ldexp(exponent - 11).copysign(x.double())
    )
    return torch.where(x.isfinite(), rounded, x.double()).to(x.dtype)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@pytest.mark.parametrize(("per", "rounded"), [(1, tf32), (2, bf16)], ids=["tf32", "bf16"])
def test_rounding_is_the_hardware_s(
    library: ctypes.CDLL, per: int, rounded: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11])
    x = torch.cat([x, ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])]).contiguous()
    out = torch.empty_like(x)
    library.round_all(per, len(x), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out[:-1], rounded(x)[:-1])
    assert out[-1].isnan()


def test_sums_are_cut_off(library: ctypes.CDLL) -> None:
    """Never away from zero, and less than nine units of the largest term's last place from the
    truth."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        products = torch.rand(8, generator=generator, dtype=torch.float64)
        c = float(torch.rand((), generator=generator))
        found = library.sum(c, products.data_ptr())
        exact = c + float(products.sum())
        assert 0 <= exact - found < 9 * 2**-23 * max(c, float(products.max()), exact / 4)
    ones = torch.tensor([1.0, *[2.0**-24] * 7], dtype=torch.float64)
    assert library.sum(0.0, ones.data_ptr()) == 1.0


# ---- against the reference

WIDE = Case("wide", partial(mlp, (5, 65, 70, 3), "tanh"), (5,), wrt_inputs=False, rates="tensor")
HIGHEST = [
    WIDE,
    Case("64", partial(mlp, (64, 64, 64), "sin"), (64,), shots=9, queries=17, loss="ce", memory="recompute"),
    Case("rows", lambda: nn.Sequential(nn.Linear(66, 97), nn.GELU(), nn.Linear(97, 2)), (2, 66), tasks=2,
         shots=5),
    Case(
        "256", partial(mlp, (2, 256, 64, 2), "silu"), (2,), tasks=1, shots=3, queries=2, wrt_inputs=False,
        rates="element", momentum=0.9, weight_decay=0.05,
    ),
]  # fmt: skip


def _plan(case: Case, dtype: torch.dtype = torch.float32) -> plans.Plan:
    problem = problem_of(case, dtype, 0)
    return cuda_runs.make_plan(problem, wanted(case, problem))


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("case", HIGHEST, ids=lambda case: case.id)
def test_highest_precision_is_float32_s(case: Case, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that every backend is held to, on tensor cores."""
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", threads)
    assert "split" in {layer.multiply for layer in _plan(case).layers}
    rows = verify_case(case, "cuda", "float32")
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []


class Product(torch.autograd.Function):
    """x w^T of rounded operands, and so are its derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.rounded = rounded
        return rounded(x.float()).to(x.dtype) @ rounded(w.float()).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return Product.apply(g, w.T, ctx.rounded), Product.apply(g.T, x.T, ctx.rounded), None


class RoundedLinear(nn.Linear):
    """A linear layer as tensor cores multiply, with sums in float64."""

    rounded: Any

    def forward(self, x: Tensor) -> Tensor:
        wide = min(self.weight.shape) >= 64
        product = Product.apply(x, self.weight, self.rounded) if wide else F.linear(x, self.weight)
        return product + self.bias


def _rounded_mlp(
    sizes: tuple[int, ...], activation: str, rounded: Callable[[Tensor], Tensor]
) -> nn.Sequential:
    net = mlp(sizes, activation)
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.__class__ = RoundedLinear
            layer.rounded = rounded
    return net


@pytest.mark.parametrize(("setting", "rounded"), [("high", tf32), ("medium", bf16)], ids=["high", "medium"])
def test_lower_precision_rounds_operands_and_nothing_else(
    setting: str, rounded: Callable[[Tensor], Tensor], precision: Callable[[str], None]
) -> None:
    """Errors are at most twice those of PyTorch with the same operands rounded, as in every other
    comparison."""
    precision(setting)
    like = replace(WIDE, label=setting, make=partial(_rounded_mlp, (5, 65, 70, 3), "tanh", rounded))
    ours, theirs = [], []
    for seed in range(5):
        truth = runs.truth(WIDE, seed).tensors
        problem = problem_of(like, torch.float64, seed)
        reference = backends.get("reference").solve(problem, wanted(like, problem), False)
        theirs.append(rule.errors(runs.quantities(reference), truth, torch.float32))
        ours.append(rule.errors(runs.run(WIDE, "cuda", torch.float32, seed), truth, torch.float32))
    for name in ours[0]:
        error, own = (median(sample[name] for sample in samples) for samples in (ours, theirs))
        assert error <= rule.FACTOR * own + rule.FLOOR, (name, error, own)
    assert median(sample["output"] for sample in ours) > 20 * rule.FLOOR  # it was rounded


# ---- which layers


def test_thin_layers_and_float64_use_no_tensor_cores(precision: Callable[[str], None]) -> None:
    hows = {"highest": "split", "high": "tf32", "medium": "bf16"}
    for setting, how in hows.items():
        precision(setting)
        assert [layer.multiply for layer in _plan(WIDE).layers] == ["fma", how, "fma"]
        assert {layer.multiply for layer in _plan(WIDE, torch.float64).layers} == {"fma"}
        thin = Case("thin", partial(mlp, (5, 63, 63, 3), "tanh"), (5,))
        assert {layer.multiply for layer in _plan(thin).layers} == {"fma"}


def test_explanation_says_how_products_are_made(precision: Callable[[str], None]) -> None:
    data = [torch.randn(2, 4, 3), torch.randn(2, 4, 64), torch.randn(2, 4, 3), torch.randn(2, 4, 64)]
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64))
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, backend="cuda")
    assert "tensor cores for layers 64-64, operands split into two numbers of TF32" in str(
        maml.explain(*data)
    )
    assert "others: float32 multiply-adds" in str(maml.explain(*data))
    precision("medium")
    assert "operands rounded to bfloat16" in str(maml.explain(*data))
    assert "no tensor cores" in str(maml.double().explain(*[part.double() for part in data]))


def test_precision_is_the_user_s_at_every_call(precision: Callable[[str], None]) -> None:
    problem = problem_of(WIDE, torch.float32, 0)
    results = []
    for setting in ("highest", "high", "highest"):
        precision(setting)
        results.append(backends.get("cuda").solve(problem, frozenset({"params"}), False).output)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_rounding_that_was_asked_for_is_no_wrong_capture(precision: Callable[[str], None]) -> None:
    """The check of a captured network is exact, whatever the user asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    data = [torch.randn(2, 4, 64) for _ in range(4)]
    precision("medium")
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, backend="cuda")
    assert maml(*data).loss.isfinite()


INSTRUCTIONS = {"highest": "m16n8k8", "high": "m16n8k8", "medium": "m16n8k16"}


@pytest.mark.skipif(bool(compiler.missing_compiler()), reason=compiler.missing_compiler())
@pytest.mark.parametrize("setting", INSTRUCTIONS)
def test_tensor_instructions_are_there(setting: str, precision: Callable[[str], None]) -> None:
    precision(setting)
    case = replace(WIDE, order="first", make=partial(mlp, (64, 64), "tanh"), input_shape=(64,))
    text = ptx(plans.source(_plan(case)), "compute_80")
    kinds = {
        shape for shape in INSTRUCTIONS.values() if b"mma.sync.aligned.%b.row.col" % shape.encode() in text
    }
    assert kinds == {INSTRUCTIONS[setting]}
