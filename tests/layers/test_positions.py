"""Cross-entropy over the channels of outputs [N, C, d...]: sequences and segmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import EVERYTHING, assert_same, error, make_problem
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.cuda import compile as compiler
from fastmeta.capture.capture import captured
from fastmeta.cases.networks import grid, segments, sequence
from fastmeta.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=F64)


class Shared(nn.Module):
    """The output, an image, is also read by a layer before it; the network's own input is added to
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return torch.tanh(self.second(y)) + y + x


def _pooled(norm: nn.Module) -> nn.Sequential:
    """The output is what a norm with a relu and a max-pool behind it writes."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2))


def _rows() -> nn.Sequential:
    """Without the last function all classes would share a bias: its gradient would be rounding
    errors."""
    return nn.Sequential(*sequence(), nn.Tanh())


#: Name -> network, shape of an example; on `cuda`, which has no convolutions, those of the first
#: row.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "grid": (lambda: grid((5, 2, 2)), (3,)), "rows": (_rows, (6, 4)), "one": (lambda: grid((5, 1)), (3,)),
    "segments": (segments, (2, 5, 3)),
    "shared": (Shared, (3, 4, 3)),
    "pooled": (lambda: _pooled(nn.BatchNorm2d(4)), (2, 6, 6)),
    "pooled group": (lambda: _pooled(nn.GroupNorm(2, 4)), (2, 6, 6)),
    "pixel": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), (2, 3, 3)),
    "mean": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(2)), (2, 6, 6)),
}  # fmt: skip
LINEAR = ("grid", "rows", "one")


def _problem(name: str, **options: object) -> Problem:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().to(F64)
    problem = make_problem(net, shape, **{"loss": "cross_entropy", "shots": 4, "queries": 3, **options})  # type: ignore[arg-type]
    program, refused = captured(net, shape, F64)
    return replace(problem, program=program, refused=refused)


def _compare(backend: str, problem: Problem) -> None:
    run = backends.get(backend)
    sides = {"support": problem.support, "query": problem.query}
    parts = {name: name.partition("_") for name in EVERYTHING - {"params", "lr", "rule"}}
    wrt = {"params", "lr"} | {
        name for name, (side, _, part) in parts.items() if _is_float(getattr(sides[side], part))
    }
    assert run.refuses(problem, frozenset(wrt)) == ""
    found, wanted = (
        backend.solve(problem, frozenset(wrt), True) for backend in (run, backends.get("reference"))
    )
    assert_same(replace(found, loss=None), wanted)


def _is_float(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


@pytest.mark.parametrize("name", NETWORKS)
def test_cpu_matches_reference(name: str) -> None:
    _compare("cpu", _problem(name, weighted=True, step_weights=True))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU")
def test_cuda_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    _compare("cuda", _problem(name, weighted=True, step_weights=True))


@pytest.mark.parametrize("name", ["segments", "rows"])
def test_cotangents_of_an_output_match_reference(name: str) -> None:
    """Adapted by such a loss, the network's output alone is wanted, and differentiated."""
    problem = _problem(name, cotangents=True)
    problem = replace(problem, query=replace(problem.query, y=None), query_loss=None)
    _compare("cpu", problem)


LOSSES = {
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "probabilities": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
}


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_meta_gradient_matches_plain_autograd(name: str, backend: str) -> None:
    """A loop that calls PyTorch's own loss, in value and in every gradient."""
    torch.manual_seed(1)
    net, loss, lr = segments().to(F64), LOSSES[name], 0.05
    tasks, examples, size = 2, 3, (4, 3)
    x, query_x = torch.randn(2, tasks, examples, 2, *size, dtype=F64, requires_grad=True).unbind()
    x, query_x = x.detach().requires_grad_(), query_x.detach().requires_grad_()
    if name == "probabilities":
        y, query_y = torch.randn(2, tasks, examples, 5, *size, dtype=F64).softmax(3).unbind()
        y, query_y = y.clone().requires_grad_(), query_y.clone().requires_grad_()
    else:
        y, query_y = torch.randint(5, (2, tasks, examples, *size)).unbind()
    params = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    inputs = {"support_x": x, "query_x": query_x} | (
        {"support_y": y, "query_y": query_y} if name == "probabilities" else {}
    )
    losses = []
    for t in range(tasks):
        theta = params
        for _ in range(2):
            inner = loss(functional_call(net, theta, (x[t],)), y[t])
            gradient = torch.autograd.grad(inner, [*theta.values()], create_graph=True)
            theta = {name: value - lr * g for (name, value), g in zip(theta.items(), gradient, strict=True)}
        losses.append(loss(functional_call(net, theta, (query_x[t],)), query_y[t]))
    want = torch.autograd.grad(torch.stack(losses).mean(), [*params.values(), *inputs.values()])
    out = fm.meta_gradient(
        net,
        params,
        (x, y),
        (query_x, query_y),
        loss=loss,
        lr=lr,
        steps=2,
        wrt=("params", *inputs),
        backend=backend,
    )
    assert error(out.task_losses, torch.stack(losses)) < 1e-9
    found = [*out.grads.values(), *(getattr(out, name) for name in inputs)]
    assert max(error(a, b) for a, b in zip(found, want, strict=True)) < 1e-9


def test_auto_takes_the_engine() -> None:
    """Dense targets need no vmap: a segmentation net runs on kernels."""
    net = segments()
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=0.1, inner_steps=1)
    x, y = torch.randn(2, 3, 2, 6, 5), torch.randint(5, (2, 3, 6, 5))
    assert maml.explain(x, y, x, y).backend == "cpu"
    out = maml(x, y, x, y)
    assert out.output.shape == (2, 3, 5, 6, 5)
    adapted = maml.adapt(x, y)
    own = {name: value[1] for name, value in adapted.items()}
    assert error(out.output[1], functional_call(net, own, (x[1],))) < 1e-5
    assert error(out.task_losses[1], F.cross_entropy(out.output[1], y[1])) < 1e-5


def test_rejects_classes_out_of_range_at_any_position() -> None:
    maml = fm.MAML(segments(), loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend="cpu")
    x, y = torch.randn(2, 3, 2, 6, 5), torch.randint(5, (2, 3, 6, 5))
    wrong = y.clone()
    wrong[1, 2, 5, 4] = 5
    for support, query in ((wrong, y), (y, wrong)):
        with pytest.raises(ValueError, match=r"must hold class indices in \[0, 5\).*got 5 at \[1, 2, 5, 4\]"):
            maml(x, support, x, query)


def test_same_bits_on_any_number_of_threads() -> None:
    maml = fm.MAML(segments(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend="cpu")
    x, y = torch.randn(2, 3, 2, 24, 20), torch.randint(5, (2, 3, 24, 20))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        maml.zero_grad()
        out = maml(x, y, x, y)
        out.loss.backward()
        found.append([out.task_losses, *(p.grad.clone() for p in maml.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
