"""What rules are made of: checks of numbers, keys, copies, and who refuses which rule."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from rule_loops import problem
from torch import nn

import fastmeta as fm
from fastmeta.backends import get
from fastmeta.backends._rules import described
from fastmeta.cases import Case
from fastmeta.verify.problems import problem_of

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = [fm.SGD(nesterov=True, momentum=0.9), fm.Adam(), fm.AdamW(clip_norm=1.0), fm.RMSProp(centered=True)]
RULES += [fm.Adagrad(), fm.Lion(clip_value=0.1)]
HALF = torch.tensor(0.5, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_rules_of_equal_numbers_are_one_cache_key(rule: fm.SGD) -> None:
    for other in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert other == rule
        assert hash(other) == hash(rule)
        assert repr(other) == repr(rule)
    assert rule.form is rule
    assert len({*RULES, *RULES}) == len(RULES)
    with pytest.raises(AttributeError, match="cannot be set, make a new rule"):
        rule.numbers = {}


def test_tensors_are_no_part_of_a_form() -> None:
    one, other = fm.SGD(momentum=HALF), fm.SGD(momentum=HALF.clone())
    assert one != other
    assert one.form == other.form
    assert one.form.tensors == {}
    assert one.learned == ("momentum",)
    assert one.form != fm.SGD(momentum=0.5)
    assert copy.deepcopy(one.form) == one.form
    assert pickle.loads(pickle.dumps(one.form)) == one.form
    assert repr(one.form) == "SGD(weight_decay=0.0, dampening=0.0, momentum)"
    assert fm.SGD(dampening=0.0) == fm.SGD()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.Adam(betas=(1.0, 0.9)), r"Adam: `betas\[0\]` must be finite, at least 0 and less than 1"),
        (lambda: fm.Adam(betas=(0.9, -0.1)), r"Adam: `betas\[1\]` must be finite, at least 0 and less"),
        (lambda: fm.AdamW(eps=-1e-8), "AdamW: `eps` must be finite and at least 0, got -1e-08"),
        (lambda: fm.RMSProp(alpha=1.0), "RMSProp: `alpha` must be finite, at least 0 and less than 1"),
        (lambda: fm.Lion(clip_norm=math.nan), "Lion: `clip_norm` must be finite and at least 0, got nan"),
        (lambda: fm.SGD(dampening=math.inf), "SGD: `dampening` must be finite, got inf"),
        (lambda: fm.SGD(nesterov=True), "SGD: `nesterov` needs a momentum and no dampening"),
        (
            lambda: fm.SGD(momentum=HALF.expand(2, 2)),
            r"must be a number or a tensor \(\) or \[K\], got \(2, 2\)",
        ),
    ],
)
def test_rejects_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.Adam(betas=0.9), "Adam: `betas` must be a pair of numbers or tensors, got 0.9"),
        (lambda: fm.Adam(eps="1"), "Adam: `eps` must be a number or a tensor, got str"),
        (lambda: fm.RMSProp(centered=1), "RMSProp: `centered` must be True or False, got 1"),
        (lambda: fm.Adagrad(initial_accumulator_value=HALF), "`initial_accumulator_value` must be a number"),
        (
            lambda: fm.SGD(momentum=torch.tensor(1)),
            "must be a number or a floating-point tensor, got torch.int64",
        ),
    ],
)
def test_rejects_types(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def run(**how: Any) -> fm.MetaGradient:
    net, params, data = problem()
    how = {"loss": "mse", "lr": 0.1, "steps": 2, **how}
    return fm.meta_gradient(net, params, tuple(data[:2]), tuple(data[2:]), **how)


def test_rejects_numbers_that_do_not_fit_the_call() -> None:
    with pytest.raises(TypeError, match=r"`update_rule`: momentum of SGD must be torch.float64, as the para"):
        run(update_rule=fm.SGD(momentum=HALF.float()))
    with pytest.raises(
        ValueError, match=r"betas\[1\] of Adam must be a number, \(\) or \[K\] = \(2,\), got \(3,\)"
    ):
        run(update_rule=fm.Adam(betas=(0.9, HALF.expand(3))))
    with pytest.raises(ValueError, match=r"`wrt` has 'rule', but no number of .* is a tensor"):
        run(update_rule=fm.Adam(), wrt="rule")
    with pytest.raises(ValueError, match=r"eps must (be finite|hold finite numbers), got nan|NaN"):
        run(update_rule=fm.Adam(eps=HALF * math.nan))
    with pytest.raises(
        TypeError, match=r"`update_rule` must be an update rule, such as fastmeta\.SGD, or None"
    ):
        run(update_rule="adam")


def test_no_steps_have_zeros_for_every_number() -> None:
    for backend in ("reference", "torch", "auto"):
        got = run(update_rule=fm.Adam(betas=(HALF, 0.9)), steps=0, wrt=("params", "rule"), backend=backend)
        assert got.rule is not None
        assert got.rule["beta1"].item() == 0


OWN = fm.CustomRule(lambda theta, gradient, state: (theta, state))
DESCRIBED = {
    "SGD with nesterov": fm.SGD(0.9, nesterov=True),
    "SGD with learned momentum": fm.SGD(momentum=HALF),
    "SGD with clip_norm": fm.SGD(clip_norm=1.0),
    "Lion": fm.Lion(),
    "CustomRule": OWN,
}


@pytest.mark.parametrize("words", DESCRIBED)
def test_rules_in_a_few_words(words: str) -> None:
    assert described(DESCRIBED[words]) == words


@pytest.mark.parametrize("backend", ["cpu", "cuda", "inductor", "triton"])
def test_backends_that_cannot_run_a_rule_say_so(backend: str) -> None:
    case = Case("rule", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh()), (2,))
    given = problem_of(case, torch.float64, 0)
    given.rule = OWN.form
    assert get(backend).refuses(given, frozenset({"params"})) == "the update rule is CustomRule"
    for rule in (fm.SGD(0.9, 0.1), fm.SGD(0.9, nesterov=True), fm.Lion(clip_norm=1.0)):
        given.rule = rule.form
        if backend != "inductor":  # it would compile now
            assert "update rule" not in get(backend).refuses(given, frozenset({"params"}))


def test_explain_says_why_the_torch_backend_runs_a_rule() -> None:
    net, _, episode = problem()
    maml = fm.MAML(
        net,
        loss="mse",
        inner_lr=0.1,
        inner_steps=2,
        update_rule=fm.CustomRule(lambda t, g, s: (t, s) if g["0.bias"].sum() < 9e9 else (g, s)),
    )
    said = maml.explain(*episode)
    assert said.backend == "torch"
    assert said.refused["cpu"] == "the update rule is CustomRule"
    assert said.refused["machine"].startswith("the update rule: its code reads a value of a tensor")
