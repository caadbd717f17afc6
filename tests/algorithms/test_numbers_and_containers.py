"""Arguments that are of a sort that could be right, and are not: numbers beyond all floats, odd
containers, tensors of inference mode, functions that do not take what they are called with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

HUGE = 10**400  # no float is so large
INNER = {"loss": "mse", "inner_lr": 0.1, "inner_steps": 2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def episode() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 3, 3), (2, 3, 2)) * 2]


def features() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    return [x, torch.arange(6).remainder(2).expand(2, 6), x + 1]


NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "inner_lr": (lambda: fm.MAML(network(), **{**INNER, "inner_lr": HUGE}), "inner_lr"),
    "negative inner_lr": (lambda: fm.MAML(network(), **{**INNER, "inner_lr": -HUGE}), "inner_lr"),
    "inner_lr of one": (lambda: fm.MAML(network(), **{**INNER, "inner_lr": {"*": HUGE}}), "inner_lr"),
    "lr": (lambda: fm.inner_sgd(network(), start(), *episode()[:2], loss="mse", lr=HUGE, steps=1), "lr"),
    "step_weights": (lambda: fm.MAML(network(), **INNER, step_weights=[1, HUGE, 1]), "step_weights"),
    "momentum": (lambda: fm.SGD(momentum=HUGE), "momentum"),
    "weight_decay": (lambda: fm.SGD(weight_decay=HUGE), "weight_decay"),
    "beta": (lambda: fm.MAML(network(), **{**INNER, "loss": nn.SmoothL1Loss(beta=HUGE)}), "beta"),
    "delta": (lambda: fm.MAML(network(), **{**INNER, "loss": nn.HuberLoss(delta=HUGE)}), "delta"),
    "proximal": (lambda: fm.IMAML(network(), **INNER, proximal=HUGE), "proximal"),
    "cg_tolerance": (lambda: fm.IMAML(network(), **INNER, proximal=1.0, cg_tolerance=HUGE), "cg_tolerance"),
    "penalty": (lambda: fm.heads.ridge(*features(), penalty=HUGE), "penalty"),
    "scale": (lambda: fm.heads.ridge(*features(), scale=HUGE), "scale"),
    "penalty of logistic": (lambda: fm.heads.logistic(*features(), penalty=HUGE), "penalty"),
}


def start() -> dict[str, Tensor]:
    return dict(network().named_parameters())


@pytest.mark.parametrize("name", NUMBERS)
def test_rejects_numbers_beyond_all_floats(name: str) -> None:
    call, argument = NUMBERS[name]
    with pytest.raises(ValueError, match=rf"`{argument}`.* must be finite"):
        call()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("what", ["smooth_l1", "huber", "inner_lr", "weight_decay"])
def test_int_beyond_64_bits_is_its_float(what: str, backend: str) -> None:
    def loss(number: float) -> Tensor:
        losses = {"smooth_l1": nn.SmoothL1Loss(beta=number), "huber": nn.HuberLoss(delta=number)}
        options = {**INNER, "loss": losses.get(what, "mse"), "inner_steps": 1}
        options |= {"inner_lr": number} if what == "inner_lr" else {}
        rule = fm.SGD(weight_decay=number) if what == "weight_decay" else None
        return fm.MAML(network(), **options, update_rule=rule, backend=backend)(*episode()).loss

    assert torch.equal(loss(2**100), loss(2.0**100))


def test_int_beyond_64_bits_is_its_float_in_a_model_and_imaml() -> None:
    assert fm.models.Siren((2, 4, 1), omega_0=2**100)(torch.ones(3, 2)).isfinite().all()
    with torch.no_grad():
        losses = [
            fm.IMAML(network(), **INNER, proximal=p, cg_tolerance=1)(*episode()).loss
            for p in (2**100, 2.0**100)
        ]
    assert torch.equal(*losses) or torch.stack(losses).isnan().all()


def test_rejects_endless_step_weights() -> None:
    with pytest.raises(ValueError, match="`step_weights` must hold"):
        fm.MAML(network(), **INNER, step_weights=itertools.repeat(1.0))(*episode())


def test_step_weights_of_a_generator_are_those_of_the_list() -> None:
    weights = [0.5, 0.0, 1.0]
    losses = [
        fm.MAML(network(), **INNER, step_weights=given)(*episode()).loss for given in (weights, iter(weights))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("given", [(), ((),), (None, (1,))], ids=str)
@pytest.mark.parametrize("field", ["support_x", "support_y", "query_x", "query_y"])
def test_rejects_tuples_in_the_places_of_tensors(field: str, given: Any) -> None:
    fields = ["support_x", "support_y", "query_x", "query_y"]
    data = dict(zip(fields, episode(), strict=True)) | {field: given}
    with pytest.raises(TypeError, match=f"MAML: `{field}` must be a tensor, got tuple"):
        fm.MAML(network(), **INNER)(**data)


@pytest.mark.parametrize("field", ["x", "y", "weights"])
def test_operators_reject_tuples_in_the_places_of_tensors(field: str) -> None:
    x, y = episode()[:2]
    given = {"x": x, "y": y, "weights": None} | {field: ((),)}
    with pytest.raises(TypeError, match=f"inner_sgd: `{field}` must be a tensor, got tuple"):
        fm.inner_sgd(network(), start(), **given, loss="mse", lr=0.1, steps=1)
    with pytest.raises(TypeError, match="task_forward: `x` must be a tensor, got tuple"):
        fm.task_forward(network(), start(), ((),))


def test_rejects_what_cannot_be_iterated_although_it_says_so() -> None:
    support, query = episode()[:2], episode()[2:]
    script = torch.jit.script(nn.Linear(2, 2))
    for name in ("wrt", "step_weights", "adapt"):
        with pytest.raises(TypeError, match=f"`{name}` must"):
            fm.meta_gradient(
                network(), start(), support, query, loss="mse", lr=0.1, steps=1, **{name: script}
            )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("place", range(4))
def test_input_of_inference_mode_is_an_input_like_any_other(place: int, backend: str) -> None:
    want, got = network(), network()
    data = episode()
    fm.MAML(want, **INNER, backend=backend)(*data).loss.backward()
    with torch.inference_mode():
        data[place] = data[place].clone()
    fm.MAML(got, **INNER, backend=backend)(*data).loss.backward()
    for mine, theirs in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    adapted = fm.inner_sgd(
        got, dict(got.named_parameters()), *data[:2], loss="mse", lr=0.1, steps=2, backend=backend
    )
    sum(value.sum() for value in adapted.values()).backward()


def test_rejects_networks_of_inference_mode() -> None:
    with torch.inference_mode():
        net = network()
    with pytest.raises(ValueError, match="requires grad, but was made in torch"):
        fm.MAML(net, **INNER)(*episode())
    with torch.no_grad():
        assert fm.MAML(net, **INNER)(*episode()).loss.isfinite()


@pytest.mark.parametrize(
    "loss",
    [
        nn.Linear(2, 2).double(),
        torch.jit.script(nn.Linear(2, 2)),
        lambda output: output.sum(),
        lambda a, b, c: a.sum(),
    ],
)
def test_rejects_losses_that_do_not_take_output_and_target(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"loss: .* must take \(output, target\)"):
        fm.MAML(network(), **{**INNER, "loss": loss})(*episode())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "cpu"])
@pytest.mark.parametrize("field", ["support_y", "query_y"])
@pytest.mark.parametrize("spoil", [Tensor.bool, lambda y: y[..., 0]], ids=["dtype", "shape"])
def test_explain_names_the_target_that_does_not_fit(spoil: Any, field: str, backend: str) -> None:
    data = dict(zip(["support_x", "support_y", "query_x", "query_y"], episode(), strict=True))
    data[field] = spoil(data[field])
    maml = fm.MAML(network(), **INNER, backend=backend)
    with pytest.raises((TypeError, ValueError), match=f"MAML: `{field}` must be"):
        maml(**data)
    runs = {
        "auto": True,
        "cpu": True,
        "torch": field == "support_y",
        "reference": False,
    }  # the rest is not looked at
    if runs[backend]:
        with pytest.raises((TypeError, ValueError), match=f"MAML: `{field}` must be"):
            maml.explain(**data)


def test_error_of_a_loss_of_its_own_comes_out_as_it_is() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + None  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand"):
        fm.MAML(network(), **{**INNER, "loss": loss})(*episode())


@pytest.mark.parametrize("head", [fm.heads.ridge, fm.heads.logistic, fm.heads.prototypes])
def test_heads_take_negated_views(head: Callable[..., Tensor]) -> None:
    x, y, q = features()
    views = [torch._neg_view(-value) for value in (x, q)]
    assert torch.allclose(head(views[0], y, views[1]), head(x, y, q), rtol=1e-9)


@pytest.mark.parametrize("head", [fm.heads.ridge, fm.heads.logistic, fm.heads.prototypes])
def test_heads_reject_classes_that_memory_cannot_hold(head: Callable[..., Tensor]) -> None:
    x, y, q = features()
    with pytest.raises(ValueError, match="`support_y` must hold classes"):
        head(x, y + 2**62, q)


def test_episodes_reject_data_without_memory() -> None:
    data = torch.zeros(3, 5, 2)
    options = {"ways": 2, "shots": 1, "query": 2, "tasks": 2, "iterations": 1}
    freed = data.clone()
    freed.untyped_storage().resize_(0)
    for wrong in (data.to_sparse(), data.to("meta"), freed):
        with pytest.raises((TypeError, ValueError), match="Episodes: `data` must"):
            fm.data.Episodes(wrong, **options)
        with pytest.raises((TypeError, ValueError), match="Episodes: `data` must"):
            fm.data.Episodes((wrong, torch.arange(3)), **options)


def test_enormous_inputs_are_not_taken_for_a_wrong_capture() -> None:
    data = episode()
    data[0], data[2] = data[0] * 1e200, data[2] * 1e200
    net = nn.Linear(3, 2).double()
    params = dict(net.named_parameters())
    got, want = (fm.task_forward(net, params, data[0], backend=name) for name in ("cpu", "reference"))
    assert torch.allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("rate", [1e308, {"*": -1e39}], ids=["number", "entry"])
def test_rejects_a_rate_beyond_the_dtype_of_the_parameters(rate: object) -> None:
    with pytest.raises(ValueError, match=r"MAML: `inner_lr`.* must be finite in torch.float32"):
        fm.MAML(nn.Linear(4, 3), loss="mse", inner_lr=rate, inner_steps=1)
