"""What all heads refuse, and the conditions under which all of them work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmeta import heads

T, N, M, D, C = 3, 7, 5, 4, 3
HEADS = {"ridge": heads.ridge, "logistic": heads.logistic, "prototypes": heads.prototypes}
EVERY = pytest.mark.parametrize("head", HEADS)


def _good() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "support_features": torch.randn(T, N, D),
        "support_y": torch.arange(N).repeat(T, 1) % C,
        "query_features": torch.randn(T, M, D),
    }


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[1] = value
        return x

    return change


# what is changed, how, and what the message must say
REJECTED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "not-a-tensor": (
        "support_features",
        lambda x: x.tolist(),
        "`support_features` must be a tensor, got list",
    ),
    "too-few-dimensions": ("support_features", lambda x: x[0], r"`support_features` must be \[T, N, D\]"),
    "no-examples": ("support_features", lambda x: x[:, :0], r"`support_features` must be .* not empty"),
    "half-precision": ("support_features", lambda x: x.half(), "`support_features` must be torch.float32 or"),
    "support-nan": (
        "support_features",
        _with(float("nan")),
        r"`support_features` must be finite, got nan at \[0, 0, 1\]",
    ),
    "query-inf": (
        "query_features",
        _with(float("inf")),
        r"`query_features` must be finite, got inf at \[0, 0, 1\]",
    ),
    "query-width": ("query_features", lambda x: x[..., :2], r"`query_features` must be .* T = 3 and D = 4"),
    "query-tasks": ("query_features", lambda x: x[:2], r"`query_features` must be .* T = 3 and D = 4"),
    "query-dtype": (
        "query_features",
        lambda x: x.double(),
        "`query_features` must be torch.float32, as `support",
    ),
    "query-device": ("query_features", lambda x: x.to("meta"), "`query_features` must be on cpu"),
    "labels-list": ("support_y", lambda y: y.tolist(), "`support_y` must be a tensor, got list"),
    "labels-int32": ("support_y", lambda y: y.int(), "`support_y` must be torch.int64"),
    "labels-shape": (
        "support_y",
        lambda y: y[:, :2],
        r"`support_y` must be \[T, N\] = \(3, 7\), got \(3, 2\)",
    ),
    "labels-device": ("support_y", lambda y: y.to("meta"), "`support_y` must be on cpu"),
    "label-negative": (
        "support_y",
        _with(-1),
        r"`support_y` must hold classes from 0 on, got -1 at \[0, 1\]",
    ),
    "ways-few": ("ways", lambda _: 2, r"`support_y` must hold classes from 0 on below 2, got 2 at \[0, 2\]"),
    "ways-zero": ("ways", lambda _: 0, "`ways` must be positive, got 0"),
    "ways-float": ("ways", lambda _: 3.0, "`ways` must be an int, got 3.0"),
    "weights-list": ("support_weights", lambda _: [1.0], "`support_weights` must be a tensor, got list"),
    "weights-shape": (
        "support_weights",
        lambda _: torch.ones(N),
        r"`support_weights` must be \[T, N\] = \(3, 7\)",
    ),
    "weights-dtype": (
        "support_weights",
        lambda _: torch.ones(T, N).bool(),
        "`support_weights` must be torch.float32",
    ),
    "weights-nan": (
        "support_weights",
        lambda _: _with(float("nan"))(torch.ones(T, N)),
        "`support_weights` must be finite",
    ),
    "weights-negative": (
        "support_weights",
        lambda _: _with(-2.0)(torch.ones(T, N)),
        r"`support_weights` must not be negative, got -2.0 at \[0, 1\]",
    ),
    "weights-zero": (
        "support_weights",
        lambda _: torch.eye(T, N)[[0, 1, 1]] * torch.tensor([[1], [0], [1]]),
        r"tasks \[1\]",
    ),
}


@EVERY
@pytest.mark.parametrize("what", REJECTED)
def test_rejects_tensors(head: str, what: str) -> None:
    field, change, message = REJECTED[what]
    episode = _good()
    episode[field] = change(episode.get(field))
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        HEADS[head](**episode)
    assert str(raised.value).startswith(f"{head}: ")


FACTORS: dict[str, tuple[Any, str]] = {
    "nan": (float("nan"), "must be finite"),
    "string": ("1", "must be a number or a tensor, got '1'"),
    "shape": (torch.ones(T + 1), r"must be \(\) or \[T\] = \(3,\), got \(4,\)"),
    "dtype": (torch.ones((), dtype=torch.float64), "must be torch.float32"),
}


@pytest.mark.parametrize(
    ("head", "name"), [("ridge", "penalty"), ("logistic", "penalty"), ("prototypes", "scale")]
)
@pytest.mark.parametrize("what", FACTORS)
def test_rejects_hyperparameters(head: str, name: str, what: str) -> None:
    value, message = FACTORS[what]
    with pytest.raises((TypeError, ValueError), match=f"{head}: `{name}` {message}"):
        HEADS[head](**_good(), **{name: value})


@pytest.mark.parametrize("head", ["ridge", "logistic"])
@pytest.mark.parametrize(
    "penalty", [0, -1.0, torch.tensor([1.0, 0.0, 1.0])], ids=["zero", "negative", "of-one-task"]
)
def test_rejects_a_penalty_that_is_not_positive(head: str, penalty: float | Tensor) -> None:
    with pytest.raises(ValueError, match=f"{head}: `penalty` must be positive"):
        HEADS[head](**_good(), penalty=penalty)


@EVERY
def test_rejects_features_that_overflow(head: str) -> None:
    episode = _good()
    episode["support_features"][1] *= 1e30
    episode["query_features"][1] *= 1e30
    with pytest.raises(RuntimeError, match=rf"{head}: .*tasks \[1\]"):
        HEADS[head](**episode)


@EVERY
def test_ways_may_exceed_the_classes_at_hand(head: str) -> None:
    episode = _good()
    if head == "prototypes":
        episode["support_y"][:, 0] = C
    assert HEADS[head](**episode, ways=C + 1).shape == (T, M, C + 1)


@EVERY
def test_gradients_are_optional(head: str) -> None:
    episode = _good()
    want = HEADS[head](**episode)
    assert not want.requires_grad
    episode["support_features"].requires_grad_()
    with torch.inference_mode():
        assert torch.equal(HEADS[head](**episode), want)
    assert torch.equal(HEADS[head](**episode).detach(), want)


@EVERY
def test_autocast_changes_nothing(head: str) -> None:
    want = HEADS[head](**_good())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = HEADS[head](**_good())
    assert torch.equal(got, want)
