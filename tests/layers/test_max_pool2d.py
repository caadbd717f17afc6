"""Max-pooling where PyTorch's conventions show: ties and NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

POOLS = [nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2, ceil_mode=True)]


def flat_background(*shape: int) -> Tensor:
    """Drawings: mostly exact zeros, as in Omniglot."""
    x = torch.randn(*shape, dtype=torch.float64)
    return torch.where(torch.rand(shape, dtype=torch.float64) < 0.04, x, 0.0)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_ties_match_reference(pool: nn.Module, memory: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(3)
    ).double()
    net(torch.zeros(1, 1, 7, 7, dtype=torch.float64))
    params = {name: value.detach() for name, value in net.named_parameters()}
    support, query = ((flat_background(2, n, 1, 7, 7), torch.randint(3, (2, n))) for n in (4, 3))
    pooled = torch.tanh(F.conv2d(support[0][0], params["0.weight"], params["0.bias"], padding=1))
    windows = pooled.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    top = windows.topk(2).values
    assert int((top[..., 0] == top[..., 1]).sum()) > 20  # real ties, with a gradient through them
    options = {
        "loss": "cross_entropy",
        "lr": 0.1,
        "steps": 2,
        "memory": memory,
        "wrt": ("params", "support_x"),
    }
    ours, reference = (
        fm.meta_gradient(net, params, support, query, backend=b, **options) for b in ("cpu", "reference")
    )
    for name, value in reference.grads.items():
        assert torch.allclose(ours.grads[name], value, rtol=1e-9, atol=1e-12), name
    assert torch.allclose(ours.support_x, reference.support_x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_nan_and_infinity_match_reference(pool: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 7, bias=False), pool)
    x = torch.randn(1, 5, 2, 7, 7)
    x[0, 0, 0, 3, 3] = torch.nan
    x[0, 1] = -torch.inf
    x[0, 2, 1] = torch.inf
    params = {"0.weight": torch.eye(7)}
    ours = fm.task_forward(net, params, x, backend="cpu")
    reference = fm.task_forward(net, params, x, backend="reference")
    assert torch.equal(ours.isnan(), reference.isnan())
    assert torch.equal(ours.nan_to_num(7.0), reference.nan_to_num(7.0))
