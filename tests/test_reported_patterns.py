"""Usage patterns of public bug reports, and what they bring up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastmeta as fm
from tests.plain_autograd import MSE, episodes, error, network

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("auto", "torch", "reference")
STEPS, RATE, TOLERANCE = 2, 0.1, 1e-9


def maml(net: nn.Module, **options: Any) -> fm.MAML:
    return fm.MAML(net, **{"loss": "mse", "inner_lr": RATE, "inner_steps": STEPS, **options})


def _moved(net: nn.Module, episode: list[Tensor], backend: str) -> dict[str, Callable[[], object]]:
    """Calls of which one thing has a tangent."""
    x, y, query_x, query_y = episode
    one = torch.ones((), dtype=torch.float64)
    dual = lambda t: forward_ad.make_dual(t.detach(), torch.ones_like(t))  # noqa: E731
    params = dict(net.named_parameters())
    return {
        "params": lambda: fm.task_forward(net, {name: dual(p) for name, p in params.items()}, x, backend=backend),
        "support_x": lambda: maml(net, backend=backend)(dual(x), y, query_x, query_y),
        "query_y": lambda: maml(net, backend=backend)(x, y, query_x, dual(query_y)),
        "lr": lambda: fm.inner_sgd(net, params, x, y, loss="mse", lr=dual(one), steps=1, backend=backend),
        "loss": lambda: maml(net, loss=lambda o, t, w=dual(one): w * MSE(o, t), backend=backend)(*episode),
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["params", "support_x", "query_y", "lr", "loss"])
def test_rejects_forward_mode_by_name(which: str, backend: str, grad: bool) -> None:
    net, episode = network(), episodes()
    maml(net, backend=backend)(*episode)  # a plan is known
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        call = _moved(net, episode, backend)[which]
        with pytest.raises(RuntimeError, match="forward-mode differentiation is active"):
            call()


def test_rejects_inference_tensors_by_name() -> None:
    net, episode = network(), episodes()
    params = dict(net.named_parameters())
    with torch.inference_mode():
        made = episode[0].clone()
        other = network()
    calls: dict[str, Callable[[], object]] = {
        "MAML: `support_x`": lambda: maml(net)(made, *episode[1:]),
        "MAML: `query_x`": lambda: maml(net)(*episode[:2], made, episode[1]),
        "MAML.adapt: `x`": lambda: maml(net).adapt(made, episode[1]),
        "inner_sgd: `x`": lambda: fm.inner_sgd(net, params, made, episode[1], loss="mse", lr=RATE, steps=STEPS),
        "task_forward: `x`": lambda: fm.task_forward(net, params, made),
        "MAML: `params`['0.weight']": lambda: maml(other)(*episode),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value).startswith(f"{name} was made in inference mode")
        with torch.no_grad():
            call()
