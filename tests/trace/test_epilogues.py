"""Products with what follows them: one instruction, and the numbers of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.programs import Traced
from torch import Tensor

from fastmeta.backends.machine.choice import forced
from fastmeta.ops import meta_gradient
from fastmeta.trace.ir import Product

pytestmark = pytest.mark.usefixtures("one_thread")

gate = torch.ops.aten.threshold_backward

#: name -> (function, shapes, whether it is one instruction)
CASES: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]], bool]] = {
    "bias": (lambda a, b, c: a @ b + c, ((5, 7), (7, 20), (20,)), True),
    "bias of rows": (lambda a, b, c: c + a @ b, ((5, 7), (7, 20), (5, 1)), True),
    "sum across": (lambda a, b, c: a @ b + c.t(), ((5, 7), (7, 20), (20, 5)), True),
    "relu": (lambda a, b, c: (a @ b + c).relu(), ((13, 7), (7, 33), (33,)), True),
    "one row": (lambda a, b, c: (a @ b + c).relu(), ((1, 9), (9, 23), (23,)), True),
    "one column": (lambda a, b, c: (a @ b + c).relu(), ((23, 9), (9, 1), (1,)), True),
    "gate": (lambda a, b, c: gate(a @ b, c, 0.0), ((5, 7), (7, 20), (5, 20)), True),
    "gate across": (lambda a, b, c: gate(a @ b, c.t(), 0.0), ((5, 7), (7, 20), (20, 5)), False),
    "two": (lambda a, b, c, d: a @ b + c @ d, ((5, 7), (7, 20), (5, 3), (3, 20)), True),
    "two deep": (lambda a, b, c, d: a @ b + c @ d, ((10, 70), (70, 20), (10, 90), (90, 20)), True),
    "all": (
        lambda a, b, c, d, e, f: gate(a @ b + c @ d + e, f, 0.0),
        ((10, 70), (70, 20), (10, 9), (9, 20), (20,), (10, 20)),
        True,
    ),
    "batches": (
        lambda a, b, c: (torch.bmm(a, b) + c).relu(),
        ((3, 5, 7), (3, 7, 20), (3, 5, 20)),
        True,
    ),
    "rows of batches": (lambda a, b, c: (a @ b + c).relu(), ((3, 5, 7), (7, 20), (20,)), True),
    "read twice": (lambda a, b, c: (p := a @ b) + c + p.sum(0), ((5, 7), (7, 20), (20,)), False),
    "twice itself": (lambda a, b: (p := a @ b) + p, ((5, 7), (7, 20)), False),
    "relu, then a sum": (lambda a, b, c: (a @ b).relu() + c, ((5, 7), (7, 20), (20,)), False),
    "threshold": (lambda a, b, c: gate(a @ b, c, 0.5), ((5, 7), (7, 20), (5, 20)), False),
}


def _then_sine(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What is read as the result is of a later stage than all that comes before."""
    return lambda *tensors: torch.sin(function(*tensors))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_pytorch(name: str, lanes: bool, dtype: torch.dtype) -> None:
    function, shapes, _ = CASES[name]
    function = _then_sine(function)
    generator = torch.Generator().manual_seed(0)
    tasks = [torch.randn(19, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    traced = Traced(function, *[t[0].to(dtype) for t in tasks])
    expected = torch.stack([function(*[t[i] for t in tasks]) for i in range(19)])
    found = traced.by_machine(*[t.to(dtype) for t in tasks], lanes=lanes)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    interpreted = traced.interpreted(*[t[0].to(dtype) for t in tasks])
    torch.testing.assert_close(interpreted.double(), expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_is_one_instruction_where_it_can_be(name: str) -> None:
    function, shapes, one = CASES[name]
    traced = Traced(_then_sine(function), *[torch.randn(shape) for shape in shapes])
    steps = traced.program(False).instructions
    assert (len(steps) == 2 and isinstance(steps[0], Product)) == one


@pytest.mark.parametrize("lanes", [False, True])
def test_gate_and_relu_keep_nan(lanes: bool) -> None:
    """As PyTorch: relu of NaN is NaN, and a gate that is NaN is open."""
    nan = torch.full((4, 3), torch.nan)
    ones = torch.ones(4, 3)
    square = torch.eye(3).expand(17, 3, 3)
    relu = Traced(lambda a, b: (a @ b).relu(), ones, square[0])
    assert relu.by_machine(nan.expand(17, 4, 3), square, lanes=lanes).isnan().all()
    gated = Traced(lambda a, b, c: gate(a @ b, c, 0.0), ones, square[0], ones)
    open_gate = gated.by_machine(ones.expand(17, 4, 3), square, nan.expand(17, 4, 3), lanes=lanes)
    assert (open_gate == 1).all()


class _Tied(torch.nn.Module):
    """One weight twice: its gradient is a sum, and is read before it is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)
        self.b = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.out = torch.nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.w + self.b)
        return self.out(torch.relu(h @ self.w.t() + self.b))


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory": "recompute"},
        {"order": "first"},
        {"rule": (0.9, 0.0)},
        {"rule": (0.0, 0.1)},
        {"lr": "per parameter"},
        {"lr": "per element"},
        {"lr": "per task"},
        {"lr": "per step"},
        {"wrt": ("params", "lr")},
        {"step_weights": (0.1, 0.2, 0.7)},
    ],
    ids=str,
)
def test_updates_in_products_are_exact(lanes: bool, options: dict[str, object]) -> None:
    """The step of SGD and the sum of lambda that a product does itself, in every form of them."""
    from fastmeta import SGD

    torch.manual_seed(0)
    net = _Tied()
    params = dict(net.named_parameters())
    tasks = 11
    x, qx = (torch.randn(tasks, 5, 6, dtype=torch.float64) for _ in range(2))
    y, qy = (torch.randn(tasks, 5, 2, dtype=torch.float64) for _ in range(2))
    given = dict(options)
    form = given.pop("lr", "number")
    names = list(params)
    lr: object = {
        "number": 0.05,
        "per parameter": {name: 0.02 * (i + 1) for i, name in enumerate(names)},
        "per element": {name: torch.rand(1, 1, *p.shape, dtype=p.dtype) / 10 for name, p in params.items()},
        "per task": {
            name: torch.rand(1, tasks, *[1] * p.dim(), dtype=p.dtype) / 10 for name, p in params.items()
        },
        "per step": torch.tensor([0.05, 0.02], dtype=torch.float64),
    }[str(form)]
    if "rule" in given:
        momentum, decay = given.pop("rule")  # type: ignore[misc]
        given["update_rule"] = SGD(momentum, decay)

    def answer(backend: str) -> dict[str, Tensor]:
        found = meta_gradient(
            net,
            params,
            (x, y),
            (qx, qy),
            loss="mse",
            lr=lr,
            steps=2,
            backend=backend,
            **given,  # type: ignore[arg-type]
        )
        rates = found.lr if isinstance(found.lr, dict) else {"lr": found.lr}
        return {
            **(found.grads or {}),
            "losses": found.task_losses,
            **{k: v for k, v in rates.items() if v is not None},
        }

    expected = answer("reference")
    with forced(lanes):
        found = answer("machine")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)
