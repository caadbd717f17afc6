"""Whatever tile is chosen, the bits are the same."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton import tune as tuning
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases import Case
from fastmeta.cases.convolutional import image_net
from fastmeta.kernels.launch import Launch
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.usefixtures("one_thread")

_LAYERS = (
    partial(nn.Conv2d, 2, 33, 3, padding=1),
    nn.Tanh,
    partial(nn.Conv2d, 33, 20, 2, bias=False),
    nn.Tanh,
)
_CASE = Case(
    "net", partial(image_net, *_LAYERS, shape=(2, 5, 4)), (2, 5, 4), 2, 3, 2, 1, "ce", wrt_inputs=False
)


def _sorts(dtype: torch.dtype) -> list[Launch]:
    """A launch of each kind of kernel with each kind of epilogue."""
    problem = problem_of(_CASE, dtype, 0)
    names = wanted(_CASE, problem)
    step = MetaStep(problem, runs.network(problem, names), names, "store", "ieee", torch.device("cpu"))
    found: dict[object, Launch] = {}
    for launch in step.emit.launches:
        if launch.choices:
            given = launch.values()
            pair, bias = (given.get("x1") is None, given.get("bias.to.at") is None)
            sort = (launch.kernel, given.get("FINISH.mode"), pair, bias, given.get("BACKWARD"))
            found.setdefault(sort, launch)
    return list(found.values())


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element's sum in one order, as on a GPU: what NumPy's BLAS takes depends on the tile's
    shape on some CPUs."""

    def dot(a: np.ndarray, b: np.ndarray, dtype: object = None) -> np.ndarray:
        total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
        for k in range(a.shape[-1]):
            total += a[..., k, None].astype(dtype) * b[..., k, None, :].astype(dtype)
        return total

    monkeypatch.setattr(np, "matmul", dot)


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_choices_give_the_same_bits(dtype: torch.dtype):
    sorts = _sorts(dtype)
    assert len(sorts) >= 8
    shapes = 0
    for launch in sorts:
        expected = tuning._outputs(launch)
        assert expected
        assert all(not value.isnan().any() for value in expected.values())
        for choice in launch.choices:
            if any(
                launch.arguments[name] != size for name, size in choice.tiles
            ):  # the interpreter knows no warps
                shapes += 1
                assert tuning._same(tuning._outputs(launch.chosen(choice)), expected), (launch.kernel, choice)
    assert (shapes > 8) == (dtype == torch.float32)


def test_other_bits_are_seen():
    launch = _sorts(torch.float32)[0]
    found = tuning._outputs(launch)
    assert tuning._same(found, tuning._outputs(launch))
    other = {name: value.clone() for name, value in found.items()}
    first = next(iter(other.values())).view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(torch.inf))
    assert not tuning._same(found, other)
