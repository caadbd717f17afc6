"""The machine: both of its ways against the reference, what is traced anew, what it refuses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.machine.choice import forced
from fastmeta.cases.verification import VERIFICATION
from fastmeta.trace.lower import OPERATORS
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.usefixtures("one_thread")

#: Every option, and a case of each layer kind.
CASES = [case for case in VERIFICATION if case.label in ("tanh", "grid", "half_norms", "sequence")]
CASES += [case for case in VERIFICATION if case.label not in ("tanh", "wide", "wide_rows")][::6]
#: Why some do not run.
EXPECTED = ("of several sizes", "has no lowering", "nothing is run")


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_matches_reference_in_float64(lanes: bool) -> None:
    """One test, so that programs of one network are shared."""
    ran, wrong = 0, {}
    for case in CASES:
        problem = problem_of(case, torch.float64, 0)
        with forced(lanes):
            reason = backends.why_not("machine", problem, wanted(case, problem))
            if reason:
                assert any(part in reason for part in EXPECTED), (case.id, reason)
                continue
            found = runs.run(case, "machine", torch.float64, 0)
        errors = rule.errors(found, runs.truth(case, 0).tensors, torch.float64)
        wrong |= {f"{case.id} {name}": error for name, error in errors.items() if not error <= rule.FLOAT64}
        ran += 1
    assert wrong == {}
    assert ran > 90


class Gated(nn.Module):
    """Nothing that is captured: a split, an index, a buffer, a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(4, 1)
        self.register_buffer("scale", torch.tensor(2.0))
        self.power = 1

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inner(x).chunk(2, -1)
        return self.outer(a[:, [2, 0, 3, 1]].tanh() * b.sigmoid()) * self.scale**self.power


def _data(tasks: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (draw(tasks, 5, 3), draw(tasks, 5, 1)), (draw(tasks, 4, 3), draw(tasks, 4, 1))


def _net(dtype: torch.dtype = torch.float64) -> Gated:
    torch.manual_seed(0)
    return Gated().to(dtype)


def _run(net: nn.Module, backend: str = "machine", tasks: int = 3, **options: Any) -> fm.MetaGradient:
    support, query = _data(tasks, next(net.parameters()).dtype)
    given = {"loss": "mse", "lr": 0.1, "steps": 3, "backend": backend, **options}
    return fm.meta_gradient(net, dict(net.named_parameters()), support, query, **given)


def _same(a: fm.MetaGradient, b: fm.MetaGradient, tolerance: float = 1e-12) -> None:
    assert float((a.task_losses - b.task_losses).norm()) <= tolerance * float(b.task_losses.norm())
    for name, expected in b.grads.items():
        assert float((a.grads[name] - expected).norm()) <= tolerance * (1 + float(expected.norm())), name


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(lanes: bool, dtype: torch.dtype) -> None:
    net = _net(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with forced(lanes):
            results.append(_run(net, tasks=37))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert torch.equal(other.task_losses, results[0].task_losses)
        assert all(torch.equal(other.grads[n], g) for n, g in results[0].grads.items())


@pytest.mark.parametrize("tasks", [1, 7, 8, 16, 17, 33])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_both_ways_agree_at_any_number_of_tasks(tasks: int, memory: str) -> None:
    net, expected = _net(), None
    expected = _run(net, "torch", tasks)
    for lanes in (False, True):
        with forced(lanes):
            _same(_run(net, tasks=tasks, memory=memory), expected)


def test_values_of_parameters_and_buffers_are_read_at_every_call() -> None:
    net = _net()
    for change in (lambda: None, lambda: net.scale.mul_(1.7), lambda: net.inner.weight.data.mul_(0.5)):
        change()
        _same(_run(net), _run(net, "torch"))
    net.scale = torch.tensor(0.3, dtype=torch.float64)
    _same(_run(net), _run(net, "torch"))


def test_a_changed_network_is_traced_anew() -> None:
    net = _net()
    first = _run(net)
    net.power = 2
    _same(_run(net), _run(net, "torch"))
    net.power = 1
    assert torch.equal(_run(net).task_losses, first.task_losses)
    net.outer = nn.Linear(4, 1, bias=False).double()
    _same(_run(net), _run(net, "torch"))


_FACTOR = 1.0


def test_a_changed_loss_is_traced_anew() -> None:
    global _FACTOR
    net, power = _net(), 2

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return _FACTOR * (output - target).abs().pow(power).mean()

    for factor, exponent in ((1.0, 2), (3.0, 2), (3.0, 3)):
        _FACTOR, power = factor, exponent
        _same(_run(net, loss=loss), _run(net, "torch", loss=loss))


def test_losses_that_are_new_at_every_call_are_left_to_torch() -> None:
    net = _net()
    names = []
    for _ in range(12):
        maml = fm.MAML(net, loss=lambda a, b: F.smooth_l1_loss(a, b), inner_lr=0.1, inner_steps=1)
        names.append(maml.explain(*_data()[0], *_data()[1]).backend)
    assert names[0] == "machine"
    assert names[-1] == "torch"


class Bakes(Gated):
    """A number of the host's, made of the input where no operator shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.abs(np.from_dlpack(x.detach())).mean())


class Shows(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.tolist()


_NUMBER = torch.tensor(2.0, dtype=torch.float64)


class Global(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * _NUMBER


class Reads(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Draws(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class Keeps(Gated):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y = y if self.last is None else y + self.last
        self.last = y.detach()
        return y


_OUTSIDE = torch.full((1,), 2.0, dtype=torch.float64)


class Outside(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * _OUTSIDE


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Bakes, "differs from the module"),
        (Shows, "reads a value"),
        (Global, "none of its arguments"),
        (Reads, "reads a value"),
        (Draws, "draws random numbers"),
        (Keeps, "carries `net.last`"),
        (Outside, "none of its arguments"),
    ],
)
def test_refuses_what_a_program_cannot_hold(kind: type[Gated], reason: str) -> None:
    net = kind().double()
    with pytest.raises(fm.BackendUnavailable, match=reason):
        _run(net)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1)
    said = maml.explain(*_data()[0], *_data()[1])
    assert said.backend == "torch"
    assert reason in said.refused["machine"]


def test_refuses_hooks() -> None:
    net = _net()
    net.inner.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(fm.BackendUnavailable, match="hooks"):
        _run(net)


def test_the_module_stays_what_it_was() -> None:
    net = _net()
    before = {name: (id(value), value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    _run(net)
    after = net.state_dict(keep_vars=True)
    assert all(
        id(after[name]) == at and torch.equal(after[name], value) for name, (at, value) in before.items()
    )


def test_explain_says_how_it_runs() -> None:
    support, query = _data()
    maml = fm.MAML(_net(), loss="mse", inner_lr=0.1, inner_steps=2)
    said = maml.explain(*support, *query)
    assert said.backend == "machine"
    assert "a task a thread" in str(said)
    assert said.cost["recompute"] > said.cost["store"] > 0
    with forced(True):
        assert "a task in every lane" in str(
            fm.MAML(_net(), loss="mse", inner_lr=0.1, inner_steps=2).explain(*support, *query)
        )


def test_a_class_out_of_range_is_named() -> None:
    net = nn.Sequential(Gated(), nn.Linear(1, 3)).double()
    (x, _), (query, _) = _data()
    y = torch.randint(0, 3, (3, 5))
    fine = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (x, y),
        (query, y[:, :4]),
        loss="cross_entropy",
        lr=0.1,
        steps=1,
        backend="machine",
    )
    assert fine.loss.isfinite()
    y[1, 2] = 3
    with pytest.raises(ValueError, match="class indices"):
        fm.meta_gradient(
            net,
            dict(net.named_parameters()),
            (x, y),
            (query, y[:, :4] % 3),
            loss="cross_entropy",
            lr=0.1,
            steps=1,
            backend="machine",
        )


@pytest.mark.parametrize("rule", [None, fm.Adam(), fm.RMSProp(momentum=0.5)], ids=repr)
def test_query_losses_of_all_steps_count_where_no_gradient_is_wanted(rule: fm.UpdateRule | None) -> None:
    options: dict[str, Any] = {"steps": 4, "lr": 0.02, "step_weights": [0.5, 2.0, 0.0, 1.0, 0.25], "wrt": ()}
    net = _net()
    got, want = (_run(net, backend, update_rule=rule, **options) for backend in ("machine", "reference"))
    torch.testing.assert_close(got.task_losses, want.task_losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.output, want.output, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lr", [0.05, 50.0])
def test_a_wrong_program_is_found_also_where_the_steps_diverge(
    lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call is compared at rates at which there is something to compare."""
    wrong = OPERATORS["tanh"]
    monkeypatch.setitem(OPERATORS, "tanh", lambda low, x: low.map("mul", wrong(low, x), 1.01))
    with pytest.raises(fm.BackendUnavailable, match="its step program differs from the module"):
        _run(_net(), "machine", steps=30, lr=lr)
