"""A small first convolution that the norm behind it computes again and again, through sums over
patches.

That its gradients are right in every option: the `first_` cases of `fastmeta.cases`, in
test_cases.py.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases import Case
from fastmeta.cases.convolutional import image_net
from fastmeta.verify.problems import problem_of

pytestmark = pytest.mark.usefixtures("one_thread")

_CONV, _NORM = partial(nn.Conv2d, 1, 6, 3, padding=1), partial(nn.BatchNorm2d, 6)
_TAIL = (nn.ReLU, partial(nn.MaxPool2d, 2))


class Viewed(nn.Module):
    """The norm reads the image under another height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = _CONV(), _NORM(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).flatten(2).unflatten(2, (4, 16))).mean((2, 3)))


class Twice(nn.Module):
    """The convolution's output is read by another layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = _CONV(), _NORM(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((self.norm(y) + y).mean((2, 3)))


def _step(make: Any, shape: tuple[int, ...], wrt: str = "params") -> MetaStep:
    problem = problem_of(Case("net", make, shape, 3, 7, 5, 1, "ce", wrt_inputs=False), torch.float32, 0)
    names = frozenset(wrt.split())
    return MetaStep(problem, runs.network(problem, names), names, "store", "ieee", torch.device("meta"))


def _net(*layers: Any, shape: tuple[int, ...] = (1, 8, 8)) -> partial[nn.Sequential]:
    return partial(image_net, *layers, shape=shape)


def _kernels(step: MetaStep) -> set[str]:
    return {launch.kernel.__name__ for launch in step.emit.launches}


def test_nothing_of_the_size_of_the_image_is_kept():
    images = {3 * examples * 8 * 8 * 6 for examples in (7, 5)}
    step = _step(_net(_CONV, _NORM, *_TAIL), (1, 8, 8))
    assert images.isdisjoint(tensor.numel() for tensor in step.memory.made)
    assert "patch_norm" in _kernels(step)
    usual = _step(_net(_CONV, _NORM, *_TAIL), (1, 8, 8), "params support_x")
    assert images <= {tensor.numel() for tensor in usual.memory.made}


@pytest.mark.parametrize(
    ("make", "shape", "wrt"),
    [
        (_net(_CONV, _NORM, *_TAIL), (1, 8, 8), "params query_x"),
        (_net(_CONV, nn.ReLU, _NORM), (1, 8, 8), "params"),
        (_net(partial(nn.AvgPool2d, 2), _CONV, _NORM), (1, 8, 8), "params"),
        (_net(partial(nn.Conv2d, 4, 6, 3), _NORM, nn.Tanh, shape=(4, 5, 5)), (4, 5, 5), "params"),
        (_net(_CONV, partial(nn.GroupNorm, 2, 6)), (1, 8, 8), "params"),
        (Twice, (1, 8, 8), "params"),
        (Viewed, (1, 8, 8), "params"),
    ],
    ids=["input_gradient", "relu_between", "not_first", "36_numbers", "group_norm", "two_readers", "viewed"],
)
def test_other_convolutions_are_kept(make: Any, shape: tuple[int, ...], wrt: str):
    kernels = _kernels(_step(make, shape, wrt))
    assert "product" in kernels
    assert not any(name.startswith("patch_") for name in kernels)


def _error(net: nn.Module, x: Tensor, backend: str) -> float:
    """Of the meta-gradient in float32, against float64."""
    y = torch.arange(x.shape[1]).expand(x.shape[0], -1) % 3

    def gradient(dtype: torch.dtype, which: str) -> Tensor:
        own = net.to(dtype)
        params = {name: value.detach() for name, value in own.named_parameters()}
        batch = (x.to(dtype), y)
        out = fm.meta_gradient(
            own, params, batch, batch, loss="cross_entropy", lr=0.05, steps=1, backend=which
        )
        return torch.cat([g.double().flatten() for g in out.grads.values()])

    ref = gradient(torch.float64, "reference")
    return float((gradient(torch.float32, backend) - ref).norm() / ref.norm())


def _smooth_images() -> Tensor:
    """Neighbouring pixels are nearly equal, as in photographs."""
    torch.manual_seed(0)
    steps = torch.randn(1, 4, 1, 10, 10)
    return steps.cumsum(-1).cumsum(-2)


def _edges(net: nn.Sequential) -> nn.Sequential:
    """The first channel answers to second differences alone, where W^T Z W cancels."""
    with torch.no_grad():
        net[0].weight[0, 0] = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return net


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["smooth", "far_from_zero"])
def test_as_exact_as_pytorch_where_sums_cancel(offset: float):
    """Of several networks, the median: a single error is a matter of luck."""
    errors: dict[str, list[float]] = {"triton": [], "reference": []}
    x = _smooth_images() + offset
    for seed in range(3):
        torch.manual_seed(seed)
        valid = partial(nn.Conv2d, 1, 6, 3)
        net = _edges(image_net(valid, _NORM, nn.Tanh, partial(nn.AvgPool2d, 4), shape=(1, 10, 10)))
        for backend, found in errors.items():
            found.append(_error(net, x, backend))
    assert median(errors["triton"]) <= 2 * median(errors["reference"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["image", "weight", "bias"])
def test_what_is_not_finite_reaches_every_gradient(place: str, value: float):
    torch.manual_seed(0)
    net = image_net(_CONV, _NORM, nn.Tanh, partial(nn.AvgPool2d, 3), shape=(1, 4, 4))
    params = {name: param.detach().clone() for name, param in net.named_parameters()}
    x, y = torch.randn(1, 2, 1, 4, 4), torch.arange(2).expand(1, 2)
    {"image": x, "weight": params["0.weight"], "bias": params["0.bias"]}[place].flatten()[-1] = value
    out = fm.meta_gradient(
        net, params, (x, y), (x, y), loss="cross_entropy", lr=0.1, steps=1, backend="triton"
    )
    assert out.loss.isnan()
    assert all(out.grads[name].isnan().any() for name in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flat_images_far_from_zero_vary_by_nothing(dtype: torch.dtype):
    """<p^2> - <p>^2 would be rounding alone, beside which eps is nothing."""
    torch.manual_seed(0)
    net = image_net(partial(nn.Conv2d, 1, 6, 3), _NORM, nn.Tanh, shape=(1, 4, 4)).to(dtype)
    params = dict(net.named_parameters())
    y = torch.arange(2).expand(1, 2)

    def loss(gray: float) -> Tensor:
        batch = (torch.full((1, 2, 1, 4, 4), gray, dtype=dtype), y)
        given = {"loss": "cross_entropy", "lr": 0.1, "steps": 1, "backend": "triton"}
        return fm.meta_gradient(net, params, batch, batch, **given).loss

    assert torch.equal(loss(0.0), loss(1e5 + 0.1))


def test_bits_do_not_depend_on_the_call():
    torch.manual_seed(0)
    net = image_net(_CONV, _NORM, *_TAIL, shape=(1, 8, 8))
    params = dict(net.named_parameters())
    x, y = torch.randn(2, 4, 1, 8, 8), torch.arange(4).expand(2, 4) % 3

    def grads() -> list[Tensor]:
        out = fm.meta_gradient(
            net, params, (x, y), (x, y), loss="cross_entropy", lr=0.1, steps=1, backend="triton"
        )
        return list(out.grads.values())

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))
