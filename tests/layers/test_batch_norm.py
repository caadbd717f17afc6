"""Batch norm on the engine: whose statistics, and where plain vmap is silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.backends.cuda.compile import host_compiler
from fastmeta.network.functional import call

CPU = {"loss": "cross_entropy", "lr": 0.1, "steps": 2, "backend": "cpu"}

needs_compiler = pytest.mark.skipif(not host_compiler(), reason="no C++ compiler to stand in for a GPU")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)
    ).double()


def batches(seed: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 9, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (3, 9), generator=generator)
    return (x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])


def vmapped(net: nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The meta-gradient as functorch's own example computes it: vmap over tasks of grad through the
    affine norm."""
    (support_x, support_y), (query_x, query_y) = batches()

    def loss(theta, x, y):
        return F.cross_entropy(functional_call(net, theta, (x,)), y)

    def query_loss(theta, sx, sy, qx, qy):
        for _ in range(2):
            step = grad(loss)(theta, sx, sy)
            theta = {name: theta[name] - 0.1 * step[name] for name in theta}
        return loss(theta, qx, qy)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    losses = vmap(query_loss, (None, 0, 0, 0, 0))(leaves, support_x, support_y, query_x, query_y)
    grads = torch.autograd.grad(losses.mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def _error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    a, b = (torch.cat([grads[name].reshape(-1) for name in reference]) for grads in (ours, reference))
    return float((a - b).norm() / b.norm())


def test_vmap_baseline_is_wrong_where_ours_matches_reference() -> None:
    net = network()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    reference = fm.meta_gradient(net, params, *batches(), **{**CPU, "backend": "reference"}).grads
    ours, baseline = fm.meta_gradient(net, params, *batches(), **CPU).grads, vmapped(net, params)
    assert reference is not None
    assert ours is not None
    assert _error(ours, reference) < 1e-9
    # The day this fails PyTorch has mended pytorch/functorch#534, and the sentence in the README
    # can go.
    assert _error(baseline, reference) > 1e-4


def test_running_statistics_match_reference() -> None:
    net = network()
    with torch.no_grad():
        net(2 * torch.randn(50, 2, 4, 4, dtype=torch.float64) + 1)
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    wrt = ("params", "lr", "support_x", "query_x")
    results = []
    for backend in ("cpu", "reference"):
        options = {**CPU, "backend": backend, "batch_stats": "running", "wrt": wrt}
        results.append(fm.meta_gradient(net, params, *batches(), **options))
    ours, reference = results
    assert _error(ours.grads, reference.grads) < 1e-9
    for name in ("loss", "lr", "support_x", "query_x"):
        assert torch.allclose(getattr(ours, name), getattr(reference, name), rtol=1e-9, atol=1e-12), name
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    task = fm.meta_gradient(net, params, *batches(), **CPU)
    assert abs(float(task.loss - ours.loss)) > 1e-3
    # the statistics are read at every call
    net[1].running_mean += 1
    moved = fm.meta_gradient(net, params, *batches(), **{**CPU, "batch_stats": "running"})
    assert abs(float(moved.loss - ours.loss)) > 1e-6


@needs_compiler
def test_running_statistics_on_cuda_match_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "2")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)
    ).double()
    with torch.no_grad():
        net(2 * torch.randn(50, 4, dtype=torch.float64) + 1)
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
    options = {**CPU, "batch_stats": "running", "wrt": ("params", "lr", "support_x", "query_x")}
    ours, reference = (
        fm.meta_gradient(net, params, (x, y), (x.flip(1), y.flip(1)), **{**options, "backend": backend})
        for backend in ("cuda", "reference")
    )
    assert _error(ours.grads, reference.grads) < 1e-9
    for name in ("loss", "lr", "support_x", "query_x"):
        assert torch.allclose(getattr(ours, name), getattr(reference, name), rtol=1e-9, atol=1e-12), name
    net[2].running_var *= 2
    moved = fm.meta_gradient(net, params, (x, y), (x, y), **{**options, "backend": "cuda"})
    assert abs(float(moved.loss - ours.loss)) > 1e-6


def test_rejects_one_value_per_channel() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    params = dict(net.named_parameters())
    x, y = torch.randn(3, 1, 4), torch.zeros(3, 1, dtype=torch.int64)
    for backend in ("cpu", "cuda", "auto"):
        with pytest.raises(ValueError, match=r"`support_x`.*more than one value per channel"):
            fm.meta_gradient(net, params, (x, y), (x, y), **{**CPU, "backend": backend})


@pytest.mark.parametrize(
    ("rows", "backend"), [(1, "cpu"), (700, "cpu"), pytest.param(700, "cuda", marks=needs_compiler)]
)
def test_large_means_do_not_cancel(rows: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * rows, 2))
    params = dict(net.named_parameters())
    x = 1000 + torch.randn(1, 2, 3, 4, rows)
    ours = fm.task_forward(net, params, x, backend=backend)
    exact = fm.task_forward(
        net.double(), {n: p.double() for n, p in params.items()}, x.double(), backend="reference"
    )
    assert float((ours - exact).norm() / exact.norm()) < 1e-3


class SharedMatrix(nn.Module):
    """The weight of a linear layer scales a norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.layer_norm(x, (3, 4), self.body.weight)).flatten(1))


def test_a_matrix_shared_with_a_norm_runs_elsewhere() -> None:
    net = SharedMatrix()
    params = dict(net.named_parameters())
    x, y = torch.randn(3, 5, 3, 4), torch.randint(2, (3, 5))
    with pytest.raises(
        fm.BackendUnavailable, match=r"`body\.weight` belongs to layer_norm and is the weight of another"
    ):
        fm.meta_gradient(net, params, (x, y), (x, y), **CPU)
    out = fm.meta_gradient(net, params, (x, y), (x, y), **{**CPU, "backend": "auto"})
    assert out.loss.isfinite()


@pytest.mark.parametrize("norm", [F.layer_norm, F.group_norm, F.batch_norm], ids=lambda norm: norm.__name__)
def test_second_derivatives_of_a_bias_alone_match_finite_differences(norm: Callable[..., Tensor]) -> None:
    """PyTorch's own raise, and batch norm's are wrong."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if norm is F.batch_norm:
                return norm(x, None, None, None, self.bias, training=True)
            return norm(x, (4,) if norm is F.layer_norm else 2, bias=self.bias)

    net = Biased()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, bias: torch.tanh(call(net, {"bias": bias}, x)), (x, bias))


# ---- what may change, or be strange, between calls


def _features() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        net(torch.randn(20, 4, dtype=torch.float64))
    return net


def _episode() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, x[..., :3].clone(), x.flip(1), x[..., 1:].clone()


@pytest.mark.parametrize(
    "statistics", [torch.zeros(0), torch.zeros(2), torch.zeros(9), torch.zeros(3, 6)], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=needs_compiler)])
def test_rejects_running_statistics_of_another_shape_after_a_call(
    backend: str, statistics: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    net = _features()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, batch_stats="running", backend=backend)
    maml(*_episode())
    net[1].running_var = statistics.double()
    with pytest.raises(ValueError, match=f"running_var should contain 6 elements not {statistics.numel()}"):
        maml(*_episode())


def test_rejects_running_statistics_that_are_not_used() -> None:
    net = _features()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, batch_stats="running")
    maml(*_episode())
    net[1].track_running_stats = False
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) tracks none"):
        maml(*_episode())


def test_weights_with_a_stride_match_reference() -> None:
    net = _features()
    support_x, support_y, query_x, query_y = _episode()
    params = {name: value.detach() for name, value in net.named_parameters()}
    dense = torch.linspace(0.5, 2, 18, dtype=torch.float64).reshape(6, 3).T  # [T, 6]
    losses = [
        fm.meta_gradient(
            net,
            {**params, "1.weight": weight},
            (support_x, support_y),
            (query_x, query_y),
            loss="mse",
            lr=0.1,
            steps=2,
            backend=backend,
        ).loss
        for backend in ("reference", "torch", "cpu")
        for weight in (dense, dense.contiguous())
    ]
    assert all(torch.allclose(loss, losses[0], rtol=1e-9) for loss in losses)


class Functional(nn.Module):
    """Batch norm that no module tells of, in code that can be captured or not."""

    def __init__(self, captured: bool) -> None:
        super().__init__()
        self.body, self.captured = nn.Linear(4, 3), captured

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.body(x), None, None, training=True)
        return y if self.captured else y.cumsum(1)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("captured", [True, False])
def test_rejects_masks_with_a_batch_norm_that_is_no_module(captured: bool, backend: str) -> None:
    maml = fm.MAML(Functional(captured).double(), loss="mse", inner_lr=0.1, inner_steps=1, backend=backend)
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="is a mask, but batch_norm normalises by the whole batch"):
        maml(*_episode(), support_weights=mask)


def test_explanation_says_what_normalises_by_the_batch() -> None:
    for net, said in ((Functional(True), True), (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), False)):
        maml = fm.MAML(net.double(), loss="mse", inner_lr=0.1, inner_steps=1)
        assert ("transductive" in str(maml.explain(*_episode()))) == said
