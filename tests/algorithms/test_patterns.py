"""Parameters and learning rates by name patterns: `adapt=` and the keys of `inner_lr`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_autograd import episodes, error, leaves, meta_losses, network
from torch import Tensor, nn

import fastmeta as fm

TOLERANCE = 1e-9
STEPS = 2
NAMES = [name for name, _ in network().named_parameters()]


def _gradient(**options: Any) -> fm.MetaGradient:
    support_x, support_y, query_x, query_y = episodes()
    net = network()
    options = {"lr": 0.1, **options}
    params = dict(net.named_parameters())
    sets = (support_x, support_y), (query_x, query_y)
    return fm.meta_gradient(net, params, *sets, loss="mse", steps=STEPS, wrt=("params", "lr"), **options)


@pytest.mark.parametrize(
    ("adapt", "names"),
    [
        ("*", NAMES),
        ("*.bias", ["0.bias", "2.bias", "4.bias"]),
        ("0.weight", ["0.weight"]),
        (["4.*", "?.bias"], ["0.bias", "2.bias", "4.weight", "4.bias"]),
        ("[!4].*", NAMES[:4]),
        (lambda name, parameter: parameter.dim() == 2 and name != "4.weight", ["0.weight", "2.weight"]),
    ],
    ids=["all", "suffix", "name", "several", "class", "predicate"],
)
def test_adapt_selects_by_pattern(adapt: Any, names: list[str]) -> None:
    want = _gradient(adapt=names)
    got = _gradient(adapt=adapt)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], want.grads[name]) for name in NAMES)
    x, y = episodes()[:2]
    for algorithm in (fm.MAML, fm.Reptile):
        adapted = algorithm(network(), loss="mse", inner_lr=0.1, inner_steps=1, adapt=adapt).adapt(x, y)
        start = dict(network().named_parameters())
        moved = [
            name for name in NAMES if not torch.equal(adapted[name], start[name].expand_as(adapted[name]))
        ]
        assert moved == names


def test_a_name_goes_before_a_pattern_that_reads_it_otherwise() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("w[0]", nn.Parameter(torch.ones(1)))
            self.register_parameter("w0", nn.Parameter(torch.ones(1)))

        def forward(self, x: Tensor) -> Tensor:
            return x * self._parameters["w[0]"] * self._parameters["w0"]

    maml = fm.MAML(Odd(), loss="mse", inner_lr=0.1, inner_steps=1, adapt="w[0]")
    adapted = maml.adapt(torch.ones(1, 2, 1), torch.zeros(1, 2, 1))
    assert (adapted["w[0]"] != 1).all()
    assert (adapted["w0"] == 1).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_rates_by_pattern_and_their_gradients(backend: str) -> None:
    bias = torch.tensor([0.05, 0.2], dtype=torch.float64, requires_grad=True).reshape(2, 1, 1)
    first = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rest = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    bias.retain_grad()

    def rate(name: str, k: int) -> Tensor:
        return first if name == "0.bias" else bias[k, 0] if name.endswith("bias") else rest

    lr = {"*.bias": bias, "*": rest, "0.bias": first}
    got = _gradient(lr=lr, backend=backend)
    params = leaves(network())
    loss = meta_losses(network(), params, episodes(), rate, STEPS).mean()
    loss.backward()
    assert error(got.loss, loss.detach()) < TOLERANCE
    assert all(error(got.grads[name], params[name].grad) < TOLERANCE for name in NAMES)
    assert isinstance(got.lr, dict)
    assert got.lr.keys() == lr.keys()
    assert all(error(got.lr[key], given.grad) < TOLERANCE for key, given in lr.items())


def test_rates_by_pattern_are_differentiable_in_inner_sgd() -> None:
    x, y = episodes()[:2]
    found = []
    for keys in (["*.bias", "*.weight"], NAMES):
        rates = {
            end: torch.full((), 0.1, dtype=torch.float64, requires_grad=True) for end in ("bias", "weight")
        }
        lr = {key: rates[key.rpartition(".")[2]] for key in keys}
        net = network()
        params = dict(net.named_parameters())
        adapted = fm.inner_sgd(net, params, x, y, loss="mse", lr=lr, steps=STEPS)
        sum(value.sin().sum() for value in adapted.values()).backward()
        found.append([rate.grad for rate in rates.values()])
    assert all(error(got, want) < TOLERANCE for got, want in zip(*found, strict=True))


def test_an_algorithm_takes_rates_by_pattern() -> None:
    lr: dict[str, Any] = {"*.weight": 0.1, "*.bias": torch.tensor(0.03, dtype=torch.float64)}
    names = {name: lr[f"*.{name[2:]}"] for name in NAMES}
    for options in ({}, {"learn_lr": "tensor"}, {"learn_lr": "element", "lr_per_step": True}):
        by_pattern, by_name = (
            fm.MAML(network(), loss="mse", inner_lr=rates, inner_steps=STEPS, **options)
            for rates in (lr, names)
        )
        for maml in (by_pattern, by_name):
            maml(*episodes()).loss.backward()
        assert by_pattern.inner_lrs.keys() == by_name.inner_lrs.keys()
        for got, want in zip(by_pattern.parameters(), by_name.parameters(), strict=True):
            assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize(
    ("options", "sort", "message"),
    [
        (
            {"adapt": "blocks.*"},
            ValueError,
            r"`adapt`: the network has no parameter 'blocks\.\*'; it has 0\.weight, 0\.b",
        ),
        (
            {"adapt": "boddy"},
            ValueError,
            r"`adapt`: the network has no parameter 'boddy'; it has 0\.weight, 0\.bias",
        ),
        ({"adapt": ["*", "5.*"]}, ValueError, r"`adapt`: the network has no parameter '5\.\*'"),
        ({"adapt": lambda name, p: False}, ValueError, r"`adapt` leaves nothing to adapt.*has 0\.weight"),
        ({"adapt": 3}, TypeError, r"`adapt` must be 'all', 'head', 'body', names or glob patterns.*got 3"),
        ({"adapt": [3]}, TypeError, r"`adapt` must be .*got \[3\]"),
        ({"lr": {"*.weight": 0.1}}, ValueError, r"a rate for every adapted parameter, none for '0\.bias'"),
        (
            {"lr": {"*": 0.1, "5.*": 0.1}},
            ValueError,
            r"a rate for '5\.\*', which is not adapted; adapted: 0\.weight",
        ),
        ({"lr": {"*": 0.1, "4.*": 0.1}}, ValueError, r"a rate for '4\.\*', but keys before it name all"),
        (
            {"lr": {"*": 0.1, "4.*": 0.1}, "adapt": "body"},
            ValueError,
            r"a rate for '4\.\*', which is not adapted",
        ),
        ({"lr": {"*": float("nan")}}, ValueError, r"`lr`\['(\*|0\.weight)'\] must be finite"),
        (
            {"lr": {"*": torch.ones(1, 1, 1, 1).double()}},
            ValueError,
            r"`lr`\['(\*|0\.bias)'\] must be .*= \(2, [13], 13\)",
        ),
    ],
)
def test_rejects(options: dict[str, Any], sort: type[Exception], message: str) -> None:
    with pytest.raises(sort, match=message):
        _gradient(**options)
    known = {"lr": "inner_lr"}
    options = {"inner_lr": 0.1, **{known.get(name, name): value for name, value in options.items()}}
    with pytest.raises(sort, match=message.replace("`lr`", "`inner_lr`")):
        fm.MAML(network(), loss="mse", inner_steps=STEPS, **options)
