"""The cases that every backend is verified on: small, not round, and together through every layer
and option. Those of one layer kind stand in its record."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastmeta.cases.case import RATES, Case
from fastmeta.cases.losses import LOSSES
from fastmeta.cases.networks import HalfNorms, grid, mlp, mlp_case, normed_rows, segments, sequence
from fastmeta.cases.rules import RULES
from fastmeta.layers.registry import KINDS

_SMOOTH = partial(Case, "tanh", partial(mlp, (3, 13, 13, 5), "tanh"), (3,))


def _shapes() -> Iterator[Case]:
    for widths in ((1, 16, 16, 1), (2, 48, 1), (5, 64, 64, 5), (5, 65, 17, 3), (7, 100, 20)):
        yield mlp_case(widths)
    yield mlp_case((1, 40, 40, 1), "relu", tasks=4, shots=10, queries=10, steps=5, lr=0.01)
    yield _SMOOTH(tasks=1)
    yield _SMOOTH(shots=1, queries=1)
    yield _SMOOTH(tasks=1, shots=1, queries=1, steps=1)
    yield _SMOOTH(tasks=18, shots=3, queries=2)
    yield _SMOOTH(shots=33, queries=21)
    for steps in (0, 1, 3):
        yield _SMOOTH(steps=steps)
    yield _SMOOTH(tasks=2, steps=50, lr=0.02, memory="recompute")


def _wide() -> Iterator[Case]:
    """A first layer wide enough for its weights' change to be kept as factors."""
    wide = partial(mlp_case, (300, 61, 13, 3), lr=0.003, wrt_inputs=False)
    yield wide()
    yield wide("relu", loss="ce", memory="recompute", steps=3)
    yield wide(tasks=18, shots=3, queries=2)
    yield wide(step_weights=True, weighted="sqt")
    yield wide(order="first")
    for own in ("all", "some"):
        yield wide(per_task=own, step_weights=True)
    for rates in ("tensor", "per_step", "zero"):
        yield wide(rates=rates, steps=3)
    for operator in ("inner_sgd", "task_forward"):
        yield wide(operator=operator, steps=2 if operator == "inner_sgd" else 0)
    yield Case("wide_rows", partial(mlp, (272, 64, 2), "tanh"), (3, 272), lr=0.003, wrt_inputs=False)


def _together() -> Iterator[Case]:
    """Several norms in one network."""
    yield Case("rows_normed", normed_rows, (6, 4))
    yield Case("half_norms", HalfNorms, (13,), loss="ce")


def _losses() -> Iterator[Case]:
    for name, loss in LOSSES.items():
        lr = 0.02 if name.endswith("_sum") else 0.1
        yield _SMOOTH(loss=name, kinks=loss.kinks, lr=lr)
        yield _SMOOTH(loss=name, kinks=loss.kinks, lr=lr, weighted="sqt", steps=1)
    for name in ("mse_masked_mean", "ce_masked_mean"):  # a task without weights
        yield _SMOOTH(loss=name, weighted="sq0")
    yield _SMOOTH(loss="mse", query_loss="huber", kinks=True)
    yield _SMOOTH(loss="bce", query_loss="ce")


def _positions() -> Iterator[Case]:
    """Cross-entropy over the channels of an output [C, d...]."""
    net = partial(Case, "grid", partial(grid, (5, 2, 2)), (3,))
    yield net(loss="ce_everything", weighted="sqt")
    yield net(loss="ce_probabilities_everything", weighted="sq", step_weights=True, per_step=True)
    yield net(loss="ce_masked_mean", weighted="sq0", memory="recompute")
    yield net(loss="ce_sum", query_loss="ce_probabilities", order="first", lr=0.02)
    yield Case("sequence", sequence, (6, 4), loss="ce_ignored", query_loss="bce_pos_weight")
    yield Case("segments", segments, (2, 4, 3), loss="ce_everything", shots=2, queries=2, weighted="s")


def _options() -> Iterator[Case]:
    for memory in ("store", "recompute"):
        yield _SMOOTH(memory=memory, steps=3)
        yield _SMOOTH(memory=memory, steps=3, rates="element_step_task", momentum=0.9, weight_decay=0.05)
        yield _SMOOTH(memory=memory, step_weights=True, per_step=True, weighted="sqt", loss="ce", lr=0.3)
    for rates in RATES:
        yield _SMOOTH(rates=rates)
        yield _SMOOTH(rates=rates, order="first", steps=3)
    yield _SMOOTH(rates="head", momentum=0.5)
    yield _SMOOTH(order="first", steps=0)
    yield _SMOOTH(order="first", step_weights=True, momentum=0.7, weight_decay=0.1)
    yield _SMOOTH(momentum=0.9, steps=3)
    yield _SMOOTH(weight_decay=0.1, steps=3)
    yield _SMOOTH(weighted="s")
    yield _SMOOTH(weighted="q", step_weights=True)
    yield _SMOOTH(weighted="t")
    yield _SMOOTH(per_step=True, steps=3)
    for own in ("all", "some"):
        yield _SMOOTH(per_task=own)
        yield _SMOOTH(per_task=own, rates="element", order="first")
    yield mlp_case(
        (3, 13, 13, 5), "relu", weighted="sqt", rates="element", momentum=0.5, step_weights=True, loss="ce"
    )


def _operators() -> Iterator[Case]:
    for operator in ("inner_sgd", "task_forward"):
        for own in ("", "all", "some"):
            yield _SMOOTH(operator=operator, per_task=own, steps=2 if operator == "inner_sgd" else 0)
    yield _SMOOTH(operator="inner_sgd", order="first", momentum=0.9)
    yield _SMOOTH(operator="inner_sgd", rates="head", weighted="s", loss="ce", memory="recompute")
    yield _SMOOTH(
        operator="inner_sgd", rates="element_step_task", momentum=0.9, weight_decay=0.1, per_step=True
    )
    yield _SMOOTH(operator="inner_sgd", steps=0)


def _rules() -> Iterator[Case]:
    for rule in RULES:
        yield _SMOOTH(rule=rule, steps=3, lr=0.02)
    adam = partial(_SMOOTH, rule="adam", lr=0.02)
    yield adam(order="first", steps=3, step_weights=True)
    yield adam(rates="element_step_task", per_step=True, weighted="sqt", memory="recompute")
    yield adam(rates="head", per_task="some", loss="ce")
    yield adam(operator="inner_sgd", memory="store", steps=3)


def _unrolls() -> Iterator[Case]:
    """Support losses in the objective, and checkpoints."""
    for order in ("second", "first"):
        for memory in ("store", "recompute", "checkpoint"):
            yield _SMOOTH(
                support_losses=True, order=order, memory=memory, weighted="sqt", step_weights=True, steps=3
            )
        yield _SMOOTH(support_losses=True, order=order, per_step=True, rates="element_step_task", loss="ce")
        yield _SMOOTH(support_losses=True, order=order, rates="head", per_task="some", momentum=0.5)
        yield mlp_case((300, 61, 13, 3), lr=0.003, support_losses=True, order=order, wrt_inputs=False)
    grids = partial(Case, "grid", partial(grid, (5, 2, 2)), (3,), support_losses=True)
    yield grids(loss="ce_probabilities_everything", weighted="s")
    yield mlp_case((3, 13, 13, 5), "relu", support_losses=True, tasks=18)
    kept = partial(_SMOOTH, memory="checkpoint", steps=6)
    yield kept(rates="element_step_task", per_step=True, step_weights=True)
    yield kept(rates="per_step", per_task="all", tasks=18, shots=3)
    yield kept(rule="adam", lr=0.02, support_losses=True, weighted="t")
    yield kept(rule="rmsprop", lr=0.02, order="first", rates="head")
    yield kept(operator="inner_sgd", momentum=0.9)
    yield mlp_case((300, 61, 13, 3), lr=0.003, memory="checkpoint", steps=4, wrt_inputs=False)
    yield Case("segments", segments, (2, 4, 3), shots=2, queries=2, steps=4, memory="checkpoint")


def _unique(cases: Iterator[Case]) -> tuple[Case, ...]:
    """Without the repetitions that crossing options leaves."""
    known: dict[str, Case] = {}
    for case in cases:
        if known.setdefault(case.id, case) != case:
            raise ValueError(f"case list: two different cases are called {case.id}")
    return tuple(known.values())


def _all() -> Iterator[Case]:
    for kind in KINDS.values():
        yield from kind.cases()
    for family in (_shapes, _wide, _together, _losses, _positions, _options, _operators, _rules, _unrolls):
        yield from family()


VERIFICATION: tuple[Case, ...] = _unique(_all())
