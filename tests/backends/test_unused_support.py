"""K = 0: the support set is not run, so that nothing may be refused because of it."""

import pytest
import torch
from torch import nn

import fastmeta as fm

BACKENDS = ("auto", "cpu", "torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_one_unused_example_before_batch_norm_matches_plain_module(loss, backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    support_x, query_x = torch.randn(2, 1, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    support_y, query_y = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    if loss == "mse":
        support_y, query_y = torch.randn_like(support_x), torch.randn_like(query_x)
    maml = fm.MAML(net, loss=loss, inner_lr=0.1, inner_steps=0, backend=backend)
    out = maml(support_x, support_y, query_x, query_y)
    out.loss.backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    function = nn.functional.mse_loss if loss == "mse" else nn.functional.cross_entropy
    expected = sum(function(net(x), y) for x, y in zip(query_x, query_y, strict=True)) / 2
    expected.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        found, torch.cat([p.grad.flatten() for p in net.parameters()]), rtol=1e-9, atol=1e-12
    )
    maml.explain(support_x, support_y, query_x, query_y)
    adapted = maml.adapt(support_x, support_y)
    assert all(torch.equal(adapted[name][1], p) for name, p in net.named_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_one_used_example_before_batch_norm(backend):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = torch.randn(2, 1, 3)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, backend=backend)
    with pytest.raises((ValueError, fm.BackendUnavailable), match="one value per channel"):
        maml(x, x, torch.randn(2, 5, 3), torch.randn(2, 5, 3))
