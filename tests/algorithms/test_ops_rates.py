"""Inner learning rates in every form, and their gradients in the same form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain_autograd import MSE, adapt, episodes, error, leaves, network
from torch import Tensor
from torch.func import functional_call

import fastmeta as fm

TASKS, STEPS = 3, 2
TOLERANCE = 1e-9


def _dict(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.05 + 0.1 * torch.rand(shape(tuple(value.shape)), generator=generator, dtype=torch.float64)
        for name, value in network().named_parameters()
    }


FORMS = {
    "number": 0.1,
    "int": 1,
    "tensor": torch.tensor(0.1, dtype=torch.float64),
    "step": torch.tensor([0.1, 0.03], dtype=torch.float64),
    "dict": _dict(lambda shape: ()),
    "dict_full_ones": _dict(lambda shape: (1, 1, *[1] * len(shape))),
    "dict_step": _dict(lambda shape: (STEPS, 1, *[1] * len(shape))),
    "dict_task": _dict(lambda shape: (1, TASKS, *[1] * len(shape))),
    "dict_element": _dict(lambda shape: (1, 1, *shape)),
    "dict_all": _dict(lambda shape: (STEPS, TASKS, *shape)),
    "dict_numbers": {
        name: 0.1 if index % 2 else torch.tensor(0.05, dtype=torch.float64)
        for index, (name, _) in enumerate(network().named_parameters())
    },
}


def _rate(lr: object, name: str, k: int, t: int) -> Tensor | float:
    """What a form means, written out: the rate of one parameter at one step of one task."""
    if isinstance(lr, dict):
        lr = lr[name]
        if isinstance(lr, Tensor) and lr.dim():
            return lr[k % lr.shape[0]][t % lr.shape[1]]
        return lr
    return lr[k] if isinstance(lr, Tensor) and lr.dim() else lr


def _leaf(lr: object) -> object:
    if isinstance(lr, dict):
        return {name: _leaf(rate) for name, rate in lr.items()}
    return lr.detach().clone().requires_grad_() if isinstance(lr, Tensor) else lr


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_rates_in_every_form_match_autograd(form: str, backend: str) -> None:
    net, episode = network(), episodes(TASKS)
    params, lr = leaves(net), _leaf(FORMS[form])
    number = (
        None
        if isinstance(lr, (dict, Tensor))
        else torch.tensor(float(lr), dtype=torch.float64, requires_grad=True)
    )
    losses = []
    for t, (support_x, support_y, query_x, query_y) in enumerate(zip(*episode, strict=True)):
        given = lr if number is None else number
        theta = adapt(
            net,
            params,
            support_x,
            support_y,
            lambda name, k, t=t, given=given: _rate(given, name, k, t),
            STEPS,
        )
        losses.append(MSE(functional_call(net, theta, (query_x,)), query_y))
    entries = lr if isinstance(lr, dict) else {"": lr if number is None else number}
    tensors = {name: rate for name, rate in entries.items() if isinstance(rate, Tensor)}
    want = dict(
        zip(tensors, torch.autograd.grad(torch.stack(losses).mean(), list(tensors.values())), strict=True)
    )
    got = fm.meta_gradient(
        net,
        params,
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss="mse",
        lr=lr,
        steps=STEPS,
        wrt=("lr",),
        backend=backend,
    )
    found = got.lr if isinstance(lr, dict) else {"": got.lr}
    assert list(found) == list(entries)
    for name, gradient in want.items():
        assert error(found[name], gradient) < TOLERANCE
    for name in entries.keys() - want.keys():  # a number in a dict
        assert found[name].shape == ()
        assert found[name].isfinite()


def test_rates_at_zero_have_a_gradient() -> None:
    net, episode = network(), episodes()
    got = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss="mse",
        lr=0.0,
        steps=1,
        wrt=("lr",),
    )
    params = leaves(net)
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        parts = [
            MSE(functional_call(net, params, (x,)), y)
            for x, y in ((support_x, support_y), (query_x, query_y))
        ]
        grads = [torch.autograd.grad(part, list(params.values()), retain_graph=True) for part in parts]
        total -= sum((a * b).sum() for a, b in zip(*grads, strict=True)) / 3
    assert error(got.lr, total) < TOLERANCE


def _call(lr: object, steps: int = STEPS, adapt_names: object = "all") -> fm.MetaGradient:
    net, episode = network(), episodes(TASKS)
    return fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss="mse",
        lr=lr,
        steps=steps,
        adapt=adapt_names,
    )


def _rejected() -> dict[str, tuple[object, type[Exception], str]]:
    whole = _dict(lambda shape: ())
    first = next(iter(whole))
    return {
        "nan": (float("nan"), ValueError, r"`lr` must be finite, got nan"),
        "inf": (float("inf"), ValueError, r"`lr` must be finite, got inf"),
        "text": ("0.1", TypeError, r"`lr` must be a number or a tensor, got str"),
        "bool": (True, TypeError, r"`lr` must be a number or a tensor, got bool"),
        "wrong_steps": (
            torch.ones(3, dtype=torch.float64),
            ValueError,
            r"`lr` must be .* \[K\] = \(2,\), got \(3,\)",
        ),
        "float32": (
            torch.tensor(0.1),
            TypeError,
            r"`lr` must be torch.float64, as the parameters, got torch.float32",
        ),
        "missing": (
            {first: 0.1},
            ValueError,
            r"`lr` must have a rate for every adapted parameter, none for '0.bias'",
        ),
        "unexpected": (
            {**whole, "9.weight": 0.1},
            ValueError,
            r"`lr` has a rate for '9.weight', which is not adapted",
        ),
        "nan_entry": (
            {**whole, first: float("nan")},
            ValueError,
            r"`lr`\['0.weight'\] must be finite, got nan",
        ),
        "vector_entry": (
            {**whole, first: torch.ones(2, dtype=torch.float64)},
            ValueError,
            r"`lr`\['0.weight'\] must be",
        ),
        "shape_entry": (
            {**whole, first: torch.ones(1, 2, 13, 2, dtype=torch.float64)},
            ValueError,
            r"with K, T, \*S = \(2, 3, 13, 2\), got \(1, 2, 13, 2\)",
        ),
    }


@pytest.mark.parametrize("case", _rejected())
def test_rejects_rates(case: str) -> None:
    lr, sort, message = _rejected()[case]
    with pytest.raises(sort, match=message):
        _call(lr)


def test_a_rate_seen_before_is_still_checked() -> None:
    good = _call(0.1)
    with pytest.raises(ValueError, match="must be finite"):
        _call(float("nan"))
    assert torch.equal(_call(0.1).loss, good.loss)
    assert not torch.equal(_call(0.2).loss, good.loss)


def test_adapting_part_of_the_network_takes_its_rates_only() -> None:
    names = ["4.weight", "4.bias"]
    want = _call(0.1, adapt_names="head")
    got = _call(dict.fromkeys(names, 0.1), adapt_names=names)
    assert torch.equal(got.loss, want.loss)
    assert not torch.equal(_call(0.1, adapt_names="body").loss, want.loss)
    with pytest.raises(ValueError, match=r"no parameter '5\.weight'"):
        _call(0.1, adapt_names=["5.weight"])
    with pytest.raises(ValueError, match="leaves nothing to adapt"):
        _call(0.1, adapt_names=[])
