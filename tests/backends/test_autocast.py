"""Under the caller's autocast: honoured on the torch backend, off and said elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastmeta as fm

NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1)),
    "normed": lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1)),
}


def _episode(tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tasks, 8, 6, generator=generator)
    y = torch.randn(2, tasks, 8, 1, generator=generator)
    return x[0], y[0], x[1], y[1]


def _plain(net, episode, order, autocast, steps=2):
    """The query loss and its gradient by a loop, under autocast as a user would write it."""
    total = []
    for sx, sy, qx, qy in zip(*episode, strict=True):
        theta = dict(net.named_parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            for _ in range(steps):
                inner = F.mse_loss(torch.func.functional_call(net, theta, (sx,)).to(sy.dtype), sy)
                gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=order == "second")
                theta = {k: v - 0.1 * g for (k, v), g in zip(theta.items(), gradient, strict=True)}
            total.append(F.mse_loss(torch.func.functional_call(net, theta, (qx,)).to(qy.dtype), qy))
    loss = torch.stack(total).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_gradient_under_autocast_is_as_good_as_the_plain_loops(name, tasks, order):
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        net, episode = NETS[name](), _episode(tasks, seed)
        exact = _plain(copy.deepcopy(net).double(), [t.double() for t in episode], order, False)
        plain = _plain(net, episode, order, True).double()
        for memory in ("store", "recompute"):
            net.zero_grad()
            maml = fm.MAML(
                net, loss="mse", inner_lr=0.1, inner_steps=2, order=order, memory=memory, backend="torch"
            )
            with torch.autocast("cpu", torch.bfloat16):
                maml(*episode).loss.backward()
            found = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
            ours.append(float((found - exact).norm() / exact.norm()))
            theirs.append(float((plain - exact).norm() / exact.norm()))
    assert sum(ours) <= 2 * sum(theirs)
    assert min(ours) > 1e-4  # it was bfloat16: float32 is a thousand times closer


_seen_in: set[torch.dtype] = set()


class _Seen(nn.Module):
    """Notes what its products are computed in; a set of its own would be put back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x):
        y = self.linear(x)
        _seen_in.add(y.dtype)
        return y


def test_operators_backward_runs_under_the_autocast_of_the_forward():
    net, (x, y, _, _) = _Seen(), _episode(2, 0)
    params = dict(net.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        output = fm.task_forward(net, params, x, backend="torch")
        adapted = fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2, backend="torch")
    _seen_in.clear()
    (output.sum() + sum(value.sum() for value in adapted.values())).backward()
    assert _seen_in == {torch.bfloat16}
    _seen_in.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output.detach_()
        fm.task_forward(net, params, x, backend="torch").sum().backward()
    assert _seen_in == {torch.bfloat16}
    _seen_in.clear()
    output = fm.task_forward(net, params, x, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        output.sum().backward()
    assert _seen_in == {torch.float32}


def test_everything_returned_keeps_its_dtype():
    net, episode = nn.Linear(6, 1), _episode(2, 0)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        out = maml(*episode)
        adapted = maml.adapt(*episode[:2])
    assert {t.dtype for t in (*out, *adapted.values())} == {torch.float32}


def test_explain_says_what_autocast_does():
    net, episode = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), _episode(2, 0)
    for backend, line in (
        ("cpu", "autocast (bfloat16) is off inside the cpu backend; backend='torch' honours it"),
        ("reference", "autocast (bfloat16) is off inside the reference backend; backend='torch' honours it"),
        ("torch", "autocast: forward passes and losses compute in bfloat16"),
    ):
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert str(maml.explain(*episode)).count(line) == 1
        assert "autocast" not in str(maml.explain(*episode))


def test_autocast_leaves_other_backends_alone():
    net, episode = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), _episode(2, 0)
    for backend in ("cpu", "reference"):
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            inside = maml(*episode).loss
        assert torch.equal(inside, maml(*episode).loss)
