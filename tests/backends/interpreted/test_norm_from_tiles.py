"""A batch norm whose statistics, and those of its tangent, come from the tiles of the convolution
before it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import fastmeta as fm
from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases import Case
from fastmeta.cases.convolutional import image_net
from fastmeta.kernels.channel_sums import merged, statistics
from fastmeta.kernels.conv2d import product
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.usefixtures("one_thread")

_CONV = partial(nn.Conv2d, 1, 3, 3, padding=1)
_NORM, _RELU, _POOL = partial(nn.BatchNorm2d, 3), nn.ReLU, partial(nn.MaxPool2d, 4)


def _case(*layers: object, shape: tuple[int, ...] = (1, 9, 9), **options: object) -> Case:
    options = {"tasks": 2, "shots": 7, "queries": 4, "steps": 1, "loss": "ce", **options}
    return Case("net", partial(image_net, *layers, shape=shape), shape, **options)  # type: ignore[arg-type]


def _launches(case: Case, dtype: torch.dtype = torch.float32) -> list:
    problem = problem_of(case, dtype, 0)
    names = wanted(case, problem)
    net = runs.network(problem, names)
    return MetaStep(problem, net, names, "store", "ieee", torch.device("meta")).emit.launches


#: The support's rows are 36 or 37 tiles, of which the last is not full: two chunks. The queries'
#: are one.
_SIDES = {"float32": 9, "float64": 13}


@pytest.mark.parametrize("dtype", _SIDES)
def test_several_chunks_match_reference(dtype: str):
    side = _SIDES[dtype]
    case = _case(_CONV, _NORM, nn.Tanh, partial(nn.AvgPool2d, 4), shape=(1, side, side))
    chunks = {x.arguments["chunks"] for x in _launches(case, getattr(torch, dtype)) if x.kernel is merged}
    assert chunks == {1, 2}
    assert [str(row) for row in verify_case(case, "triton", dtype) if not row.passed] == []


def test_the_image_is_not_read_for_statistics():
    for tail in ((nn.Tanh,), (_RELU, _POOL)):
        launches = _launches(_case(_CONV, _NORM, *tail))
        assert not any(launch.kernel is statistics for launch in launches)
        modes = [
            x.arguments["FINISH"].mode
            for x in launches
            if x.kernel is product and x.arguments["sums"].partials is not None
        ]
        assert modes.count("forward") == 2  # the inner step, the query
        assert modes.count("tangent") == 1


@pytest.mark.parametrize(
    "layers",
    [
        (_CONV, _RELU, _NORM),
        (_CONV, partial(nn.AvgPool2d, 3), _NORM),
        (partial(nn.BatchNorm2d, 1), _CONV),
        (_CONV, partial(nn.GroupNorm, 1, 3)),
    ],
    ids=["relu", "pool", "input", "group"],
)
def test_other_producers_leave_it_to_the_norm(layers: tuple):
    launches = _launches(_case(*layers))
    assert any(launch.kernel is statistics for launch in launches)
    assert all(x.arguments["sums"].partials is None for x in launches if x.kernel is product)


def test_running_statistics_need_no_sums():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    net(x[0])
    params = dict(net.named_parameters())
    outs = [
        fm.task_forward(net, params, x, batch_stats="running", backend=b) for b in ("triton", "reference")
    ]
    assert torch.allclose(*outs, rtol=1e-9, atol=1e-12)


def test_a_large_mean_costs_no_digits():
    """E[x^2] - E[x]^2 would lose all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    with torch.no_grad():
        net[0].bias.fill_(3000.0)
    x = torch.randn(2, 4, 1, 9, 9)

    def out(dtype: torch.dtype, backend: str) -> torch.Tensor:
        params = {name: value.to(dtype) for name, value in net.named_parameters()}
        return fm.task_forward(net.to(dtype), params, x.to(dtype), backend=backend).detach().double()

    ref = out(torch.float64, "reference")
    own, found = (float((out(torch.float32, b) - ref).norm() / ref.norm()) for b in ("reference", "triton"))
    assert found <= 2 * own + 1e-6
