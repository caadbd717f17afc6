"""The elementary functions of the cpu engine, in every instruction set that this processor has.

In float32 against PyTorch's float64, in float64 against mpmath: at most 2 units in the last place
over all binades, and the values of libm where there is nothing to round. All 2^32 numbers of
float32: `tests/sanitize/elementary.py`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mpmath
import pytest
import torch
from elementary_values import FUNCTIONS, MOST_ULP, Call, compute, ulp
from mpmath import mp
from torch import Tensor

from fastmeta import _C

pytestmark = [
    pytest.mark.skipif(os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"),
    pytest.mark.usefixtures("one_thread"),
]
ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64)

EXACT: dict[str, Callable[..., object]] = {
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "erf": mpmath.erf,
    "sqrt": mpmath.sqrt,
    "pow": mpmath.power,
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x / (1 + mpmath.exp(-_gelu_tanh_argument(x))),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "softplus": lambda x: x if x > 20 else mpmath.log1p(mpmath.exp(x)),
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
}
# Far out PyTorch's are right: zero, x or one.
FUNCTIONS_OF_TAILS = ("gelu", "gelu_tanh", "silu", "mish", "softplus", "elu", "sigmoid", "erf")


def _gelu_tanh_argument(x: object) -> object:
    return 2 * mpmath.sqrt(2 / mpmath.pi) * (x + mp.mpf("0.044715") * x**3)


def _runnable() -> list[str]:
    names = _C.instruction_sets()
    return names[: names.index(_C.instruction_set()) + 1]


# ---- what is asked, and the answers


@cache
def _arguments(dtype: torch.dtype) -> Tensor:
    """Numbers of both signs in all binades, the usual ones more densely, and those near which
    functions are zero."""
    draw = torch.Generator().manual_seed(0)
    double = dtype == torch.float64
    exponents = torch.arange(-1074, 1024) if double else torch.arange(-149, 128).repeat_interleave(40)
    binades = torch.ldexp(1 + torch.rand(len(exponents), generator=draw, dtype=torch.float64), exponents)
    usual = [(torch.rand(n, generator=draw, dtype=torch.float64)) * size for n, size in _SIZES[double]]
    turns = torch.arange(1, 200 if double else 4000, dtype=torch.float64) * (math.pi / 2)
    some = torch.cat([binades, *usual]).to(dtype)
    positive = torch.cat([some, turns.to(dtype), torch.tensor(_LANDMARKS, dtype=dtype)])
    return torch.cat([positive, -positive])


_SIZES = {
    True: [(300, 1), (300, 8), (200, 40), (200, 750)],
    False: [(5000, 1), (5000, 8), (5000, 40), (5000, 110)],
}
_LANDMARKS = (0.0, 1.0, 0.5, 2.0, 0.625, 1 / 3, 2 / 3, 20.0, math.inf, math.nan)


def _calls(name: str, dtype: torch.dtype) -> list[Tensor]:
    x = _arguments(dtype)
    if name != "pow":
        return [x]
    draw = torch.Generator().manual_seed(1)
    # powers that neither vanish nor overflow, and all pairs of special numbers
    size = torch.log(x.abs().double())
    most = 740 if dtype == torch.float64 else 100
    y = (2 * torch.rand(x.shape, generator=draw, dtype=torch.float64) - 1) * most / size
    special = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 2.5, 1e30, math.inf, math.nan], dtype=dtype)
    special = torch.cat([special, -special])
    pairs = torch.cartesian_prod(special, special)
    return [torch.cat([x, pairs[:, 0]]).contiguous(), torch.cat([y.to(dtype), pairs[:, 1]]).contiguous()]


def _twofold(value: object) -> tuple[float, float]:
    high = float(mp.mpf(value))
    return high, float(value - mp.mpf(high)) if math.isfinite(high) else 0.0


@cache
def _expected(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The function of what _calls has, as a number and what that lacks."""
    inputs = [x.double() for x in _calls(name, dtype)]
    high = FUNCTIONS[name][1](*inputs)
    low = torch.zeros_like(high)
    if dtype == torch.float32:
        return high, low
    usual = torch.stack([x.isfinite() & (x != 0) for x in inputs]).all(0) & high.isfinite()
    if name == "pow":
        usual &= inputs[0] > 0
    if name in FUNCTIONS_OF_TAILS:
        usual &= inputs[0].abs() < 800
    with mp.workprec(140):
        for i in usual.nonzero()[:, 0].tolist():
            high[i], low[i] = _twofold(EXACT[name](*(mp.mpf(x[i].item()) for x in inputs)))
    return high, low


# ---- the tests


@pytest.fixture(scope="module", params=_runnable() if hasattr(_C, "elementary") else [])
def values(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, torch.dtype], Tensor]:
    """All functions of all arguments in one instruction set."""
    folder = tmp_path_factory.mktemp(request.param)
    keys = [(name, dtype) for name in FUNCTIONS for dtype in DTYPES]
    calls: list[Call] = [(name, 0, FUNCTIONS[name][0], _calls(name, dtype)) for name, dtype in keys]
    if request.param == _C.instruction_set():
        return dict(zip(keys, map(compute, calls), strict=True))
    torch.save(calls, folder / "calls.pt")
    command = [
        sys.executable,
        ROOT / "tests/support/elementary_values.py",
        folder / "calls.pt",
        folder / "values.pt",
    ]
    environment = {**os.environ, "FASTMETA_CPU_ISA": request.param}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(keys, torch.load(folder / "values.pt"), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_most_two_units_in_the_last_place(
    values: dict[tuple[str, torch.dtype], Tensor], name: str, dtype: torch.dtype
) -> None:
    errors = ulp(values[name, dtype], *_expected(name, dtype))
    worst = int(errors.argmax())
    where = [x[worst].item() for x in _calls(name, dtype)]
    assert errors[worst] <= MOST_ULP, f"{name}{where}: {values[name, dtype][worst].item()}"


def test_a_comparison_finds_three_units() -> None:
    exact = torch.tensor([1.5, -1e-30, 3e38], dtype=torch.float64)
    found = exact.float()
    for _ in range(3):
        found = torch.nextafter(found, torch.full_like(found, math.inf))
    assert (ulp(found, exact) > MOST_ULP).all()
    odd = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1.0, 1e300], dtype=torch.float64)
    assert ulp(torch.tensor([0.0, 1.0, math.nan, math.inf, math.nan, 1.0]), odd).isinf().all()
    assert (ulp(odd.float(), odd) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_place_of_a_number_does_not_matter(name: str, dtype: torch.dtype) -> None:
    inputs = [x[:3000] for x in _calls(name, dtype)]
    whole = compute((name, 0, FUNCTIONS[name][0], inputs))
    for start in (1, 5, 2990):
        part = compute((name, 0, FUNCTIONS[name][0], [x[start:].contiguous() for x in inputs]))
        assert torch.equal(part.nan_to_num(nan=7.0), whole[start:].nan_to_num(nan=7.0))


def test_derivatives_are_those_of_autograd() -> None:
    x = torch.linspace(-6, 6, 997, dtype=torch.float64)
    for name in ("gelu", "gelu_tanh", "silu", "mish", "softplus", "elu", "tanh", "sigmoid", "sin"):
        constants, function = FUNCTIONS[name]
        constants = constants or (0, 0)
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), at)
        for order, expected in ((1, first.detach()), (2, second)):
            found = compute((name, order, constants, [x, function(x)]))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_refuses_what_is_not_an_array_of_one_size() -> None:
    x = torch.zeros(4)
    good: dict[str, object] = {
        "name": "exp",
        "order": 0,
        "is_double": False,
        "constants": [],
        "inputs": [x],
        "output": x.clone(),
    }
    for change in (
        {"name": "arctan"},
        {"order": 1},
        {"order": -1},
        {"is_double": True},
        {"constants": [1.0]},
        {"inputs": []},
        {"inputs": [x, x]},
        {"inputs": [None]},
        {"inputs": [torch.zeros(3)]},
        {"inputs": [torch.zeros(4, dtype=torch.float64)]},
        {"inputs": x},
        {"output": None},
        {"output": torch.zeros(8)[::2]},
        {"output": 3},
        {"name": "softplus"},
        {"name": "softplus", "constants": [1.0, 2.0], "order": 1},
        {"name": "softplus", "constants": [1.0, 2.0], "order": 3, "inputs": [x, x]},
    ):
        with pytest.raises((ValueError, TypeError), match=r"^elementary: "):
            _C.elementary(**{**good, **change})
    _C.elementary(**good)
