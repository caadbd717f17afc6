"""The `inductor` backend against the reference.

Most tests run what was traced as it is: everything of the backend but PyTorch's compiler, which
takes some ten seconds a network. Two networks are compiled.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from problems import EVERYTHING, assert_same, make_problem, mlp
from torch import Tensor, nn
from traced_programs import LinearNet, assert_right, data, gradient, run_as_traced

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends import inductor
from fastmeta.backends.inductor.run import _each
from fastmeta.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
FORWARD: frozenset[str] = frozenset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return run_as_traced(monkeypatch)


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def _wanted(problem: Problem) -> frozenset[str]:
    """Every gradient that there is."""
    wrt = set(EVERYTHING)
    for role, batch in (("support", problem.support), ("query", problem.query)):
        assert batch is not None
        wrt -= {f"{role}_y"} if not batch.y.is_floating_point() else set()
        wrt -= {f"{role}_weights"} if batch.weights is None else set()
    return frozenset(wrt)


def _check(problem: Problem, wrt: frozenset[str] | None = None) -> None:
    """Twice: the second call finds everything made."""
    wrt = _wanted(problem) if wrt is None else wrt
    assert backends.why_not("inductor", problem, wrt) == ""
    expected = backends.get("reference").solve(problem, wrt, True)
    first = inductor.solve(problem, wrt, True)
    again = inductor.solve(problem, wrt, True)
    assert_same(first, expected)
    assert_same(again, expected)


def _small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(3, 8, 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tasks": 1, "shots": 1, "per_task": "all", "rate_form": "element"},
        {"momentum": 0.9, "weight_decay": 0.1, "rate_form": "all"},
        {"weighted": True, "cotangents": True, "step_weights": True, "rate_form": "step"},
        {"per_step": True, "per_task": "some", "adapt": ("0.weight", "2.bias"), "weighted": True},
        {"order": "first", "step_weights": True, "momentum": 0.9, "cotangents": True},
        {"loss": "cross_entropy", "rate_form": "task"},
        {"loss": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5], dtype=torch.float64))},
        {"steps": 0, "cotangents": True},
        {"frozen": frozenset({"0.bias"}), "adapt": ("2.weight",), "memory": "recompute"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_matches_reference(traced: list[int], options: dict[str, Any]) -> None:
    problem = make_problem(_small(), **options)
    _check(problem, _wanted(problem) - ({"params"} if "frozen" in options else set()))
    assert len(traced) == (1 if problem.steps == 0 else 2 if problem.order == "first" else 3)


@pytest.mark.parametrize("wrt", [FORWARD, frozenset({"query_x"}), frozenset({"lr", "query_y"})], ids=sorted)
def test_matches_reference_in_what_is_asked_for(traced: list[int], wrt: frozenset[str]) -> None:
    _check(make_problem(_small()), wrt)
    assert len(traced) == (3 if "lr" in wrt else 2)  # the second order is traced where it is needed


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (_LSTM(), (4, 3)),
        (_Attention(), (3, 4)),
        (
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.GELU(), nn.Flatten(), nn.Linear(27, 2)),
            (1, 5, 5),
        ),
        (nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)), (3,)),
    ],
    ids=["lstm", "attention", "conv", "batch_norm"],
)
def test_networks_match_reference(traced: list[int], net: nn.Module, shape: tuple[int, ...]) -> None:
    _check(make_problem(net.double(), shape, tasks=2, weighted=True))


def test_compiled_mlp_matches_reference() -> None:
    problem = make_problem(
        _small(),
        momentum=0.9,
        rate_form="all",
        per_step=True,
        weighted=True,
        step_weights=True,
        per_task="some",
    )
    _check(problem)
    said = inductor.describe(problem, _wanted(problem))
    pieces = ("gradient", "Hessian-vector product", "query")
    assert [line.split(",")[0] for line in said[:3]] == [f"compiled: {piece}" for piece in pieces]
    assert all(line.endswith(" s") for line in said[:3])


def test_compiled_attention_matches_reference() -> None:
    # first order: the Hessian-vector product alone compiles for half a minute
    torch.manual_seed(0)
    problem = make_problem(_Attention().double(), (3, 4), tasks=2, order="first")
    _check(problem, frozenset({"params"}))


def test_compiled_integers_match_reference() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    x, (_, y) = torch.randint(0, 5, (2, 5, 2)), data()

    def by(backend: str, x: Tensor) -> list[Tensor]:
        found = fm.meta_gradient(net, params, (x, y), (x, y), loss="mse", lr=0.1, steps=1, backend=backend)
        return [found.task_losses, *found.grads.values()]

    for found, expected in zip(by("inductor", x), by("reference", x), strict=True):
        assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
    x[1, 2, 0] = 7  # out of range: an error, and the process lives
    with pytest.raises((ValueError, IndexError), match="out of range"):
        by("inductor", x)


def test_maml_trains_as_the_reference_does(traced: list[int]) -> None:
    x, y = data()
    found = []
    for backend in ("inductor", "reference"):
        net = _small()
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, learn_lr="tensor", backend=backend)
        optimiser = torch.optim.SGD(maml.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            maml(x, y, x, y).loss.backward()
            optimiser.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in maml.parameters()]))
    assert len(traced) == 3
    assert float((found[0] - found[1]).norm()) <= 1e-9 * float(found[1].norm())


def test_results_are_never_touched_again(traced: list[int]) -> None:
    class Same(LinearNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"given": x, "made": self.linear(x)}

    net, (x, _) = Same(), data()
    params = {name: value.detach() for name, value in net.named_parameters()}

    def outputs(x: Tensor) -> dict[str, Tensor]:
        return fm.task_forward(net, params, x, backend="inductor")  # type: ignore[return-value]

    first = outputs(x)
    kept = {name: value.clone() for name, value in first.items()}
    outputs(-x)
    assert all(torch.equal(first[name], value) for name, value in kept.items())
    assert torch.equal(first["given"], x)


# ---- what changes between two calls


def test_buffers_and_numbers_are_read_at_every_call(traced: list[int]) -> None:
    class Scaled(LinearNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.shift = torch.tensor(0.5, dtype=torch.float64)
            self.power = 1

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * self.scale) ** self.power + self.shift.sum()

    net = Scaled()
    assert_right(net)
    net.scale.mul_(3)
    net.shift = torch.tensor(0.7, dtype=torch.float64)
    assert_right(net)
    assert len(traced) == 3
    net.power = 2
    assert_right(net)
    assert len(traced) == 6
    net.shift = torch.tensor([0.7, 0.1], dtype=torch.float64)
    assert_right(net)
    assert len(traced) == 9


def test_what_a_loss_reads_is_followed(traced: list[int]) -> None:
    factor = [1.0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).mean() * factor[0]

    net = _small()
    assert_right(net, loss)
    factor[0] = 3.0
    assert_right(net, loss)


def test_static_tensors_are_given_back(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor._jobs, "_entries", 2)
    problems = [make_problem(_small(seed)) for seed in range(3)]
    for problem in problems:
        _check(problem)
    assert ["inductor" in problem.scratch for problem in problems] == [False, True, True]
    _check(problems[0])


def test_training_mode_is_followed(traced: list[int]) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double().eval()
    assert_right(net)
    net.train()
    with pytest.raises(fm.BackendUnavailable, match="draws random numbers"):
        gradient(net, "inductor")


def test_a_network_is_let_go(traced: list[int]) -> None:
    class Shifted(LinearNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    net = Shifted()
    assert_right(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_class_indices_out_of_range(traced: list[int]) -> None:
    problem = make_problem(_small(), loss="cross_entropy")
    wrt = frozenset({"params", "query_x"})
    expected = inductor.solve(problem, wrt, False)
    problem.query.y[1, 0] = 9  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="`query_y`"):
        inductor.solve(problem, wrt, False)
    # where nobody looks at values, as on a GPU, it makes its own task NaN
    pieces = inductor._pieces(problem, wrt)
    assert not isinstance(pieces, str)
    found = inductor._run(problem, wrt, False, pieces)
    assert found.task_losses is not None
    assert expected.task_losses is not None
    assert found.task_losses.isnan().tolist() == [False, True, False]
    assert torch.equal(found.task_losses[::2], expected.task_losses[::2])
    assert found.grads.query_x.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CUDA graphs are not run")
def test_cuda_graph_matches_reference() -> None:
    problem = make_problem(_small(), momentum=0.9, weighted=True, step_weights=True, cotangents=True)
    wrt = _wanted(problem)
    on_gpu = _moved(problem)
    on_gpu.net.cuda()
    assert backends.why_not("inductor", on_gpu, wrt) == ""
    expected = backends.get("reference").solve(on_gpu, wrt, True)
    for _ in range(4):
        assert_same(inductor.solve(on_gpu, wrt, True), expected)
    job = on_gpu.scratch["inductor"]
    assert job._graph is not None, job.why_no_graph
    # other values go through the same graph
    on_gpu.params = {name: value * 1.1 for name, value in on_gpu.params.items()}
    expected = backends.get("reference").solve(on_gpu, wrt, True)
    assert_same(inductor.solve(on_gpu, wrt, True), expected)


def _moved(problem: Problem) -> Problem:
    return _each(problem, lambda tensor: tensor.cuda())
