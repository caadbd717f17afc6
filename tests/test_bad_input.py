"""Bad input to the public API: an error that names the argument, and nothing modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm

T, N, M, C = 4, 7, 5, 3
BACKENDS = ("cpu", "torch")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 13), nn.Tanh(), nn.Linear(13, C))


def _good() -> dict[str, Any]:
    return {
        "support_x": torch.randn(T, N, 2),
        "support_y": torch.randint(0, C, (T, N)),
        "query_x": torch.randn(T, M, 2),
        "query_y": torch.randint(0, C, (T, M)),
    }


def _classes(value: int) -> Callable[[Tensor], Tensor]:
    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[1, 2] = value
        return y

    return change


# what is changed, how, and what the message must name
TENSORS: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "too-few-dimensions": ("support_x", lambda x: x.reshape(-1), "support_x"),
    "wrong-width": ("support_x", lambda x: torch.randn(T, N, 3), "support_x"),
    "wrong-query-width": ("query_x", lambda x: torch.randn(T, M, 3), "query_x"),
    "other-number-of-tasks": ("query_x", lambda x: x[:2], "query_x|support_x"),
    "zero-tasks": ("support_x", lambda x: x[:0], "support_x|tasks"),
    "no-support-examples": ("support_x", lambda x: x[:, :0], "support_x"),
    "no-query-examples": ("query_x", lambda x: x[:, :0], "query_x"),
    "other-dtype": ("support_x", lambda x: x.double(), "support_x"),
    "other-device": ("support_x", lambda x: x.to("meta"), "support_x"),
    "not-a-tensor": ("support_x", lambda x: x.tolist(), "support_x"),
    "class-too-large": ("support_y", _classes(C), "support_y"),
    "class-negative": ("query_y", _classes(-1), "query_y"),
    "classes-in-int32": ("support_y", lambda y: y.int(), "support_y"),
    "targets-of-other-shape": ("query_y", lambda y: y[:, :2], "query_y"),
    "task-weights": ("task_weights", lambda _: torch.ones(T + 1), "task_weights"),
    "support-weights": ("support_weights", lambda _: torch.ones(T, N + 1), "support_weights"),
    "query-weights": ("query_weights", lambda _: torch.ones(M), "query_weights"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", TENSORS)
def test_rejects_tensors(what: str, backend: str) -> None:
    field, change, named = TENSORS[what]
    episode = _good()
    episode[field] = change(episode.get(field))
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend=backend)
    before = {name: value.clone() for name, value in maml.state_dict().items()}
    kept = {name: x.clone() for name, x in episode.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    with pytest.raises((ValueError, TypeError), match=named):
        maml(**episode)
    assert all(torch.equal(value, before[name]) for name, value in maml.state_dict().items())
    assert all(torch.equal(episode[name], x) for name, x in kept.items())
    assert all(p.grad is None for p in maml.parameters())
    good = maml(**_good())  # and the next call is as good as ever
    assert torch.isfinite(good.loss)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-rate": ({"inner_lr": float("nan")}, "inner_lr"),
    "infinite-rate": ({"inner_lr": float("inf")}, "inner_lr"),
    "negative-steps": ({"inner_steps": -1}, "steps"),
    "fractional-steps": ({"inner_steps": 1.5}, "steps"),
    "order": ({"order": "third"}, "order"),
    "memory": ({"memory": "disk"}, "memory"),
    "no-tasks-at-a-time": ({"task_chunk": 0}, "`task_chunk` must be at least 1, got 0"),
    "half-a-task-at-a-time": ({"task_chunk": 0.5}, "`task_chunk` must be an int or None, got 0.5"),
    "true-tasks-at-a-time": ({"task_chunk": True}, "`task_chunk` must be an int or None, got True"),
    "backend": ({"backend": "gpu"}, "backend"),
    "adapt": ({"adapt": ["no.such.weight"]}, "adapt"),
    "step-weights": ({"step_weights": [1.0]}, "step_weights"),
    "loss": ({"loss": "no_such_loss"}, "loss"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_rejects_options(what: str) -> None:
    changed, named = OPTIONS[what]
    options = {"loss": "cross_entropy", "inner_lr": 0.1, "inner_steps": 2, **changed}
    with pytest.raises((ValueError, TypeError), match=named):
        fm.MAML(_net(), **options)(**_good())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_a_target_that_would_be_broadcast(backend: str) -> None:
    net = nn.Sequential(nn.Linear(2, 13), nn.Tanh(), nn.Linear(13, 1))
    x, y = torch.randn(T, N, 2), torch.randn(T, N)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, backend=backend)
    with pytest.raises(ValueError, match=r"support_y.*broadcast"):
        maml(x, y, x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_rate_tensors_that_are_not_finite(backend: str) -> None:
    net, episode = _net(), _good()
    batch = ((episode["support_x"], episode["support_y"]), (episode["query_x"], episode["query_y"]))
    params, nan = dict(net.named_parameters()), torch.tensor(float("nan"))
    options = {"loss": "cross_entropy", "backend": backend}
    with pytest.raises(ValueError, match=r"meta_gradient: `lr` must hold finite numbers, got nan"):
        fm.meta_gradient(net, params, *batch, lr=nan, steps=1, **options)
    with pytest.raises(ValueError, match=r"MAML: `inner_lr`\['0.weight'\] must hold finite numbers, got nan"):
        fm.MAML(net, inner_lr={"0.weight": nan, "*": 0.1}, inner_steps=1, **options)(**episode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_a_sparse_tensor_after_a_good_one(backend: str) -> None:
    episode = _good()
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend=backend)
    maml(**episode)
    with pytest.raises(TypeError, match="`support_x` must be a dense tensor"):
        maml(**{**episode, "support_x": episode["support_x"].to_sparse()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_not_contiguous_match_their_copies(backend: str) -> None:
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend=backend)
    episode = _good()
    want = maml(**episode).loss
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in episode.items()}
    assert not strided["support_x"].is_contiguous()
    assert torch.equal(maml(**strided).loss, want)


def test_a_module_without_parameters_runs_or_says_why() -> None:
    x = torch.randn(T, N, C)
    y = torch.randn(T, N, C)
    with pytest.raises(ValueError, match="parameter"):
        fm.MAML(nn.Sequential(nn.ReLU()), loss="mse", inner_lr=0.1, inner_steps=1)(x, y, x, y)
