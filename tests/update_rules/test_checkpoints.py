"""memory="checkpoint": its schedule, its results, and what it keeps."""

from __future__ import annotations

import gc
import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rule_loops import problem
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends._checkpoints import ADVANCE, BACK, RESTORE, SAVE, advances, schedule, slots_for

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "sgd": fm.SGD(momentum=0.9, weight_decay=0.1),
    "adam": fm.Adam(eps=1e-3, betas=(0.9, 0.99), clip_norm=0.5),
}


@cache
def fewest(steps: int, slots: int) -> int:
    """By trying all places: steps run without a graph."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


def executed(steps: int, slots: int) -> tuple[int, int]:
    """(steps run without a graph, places used), each action checked."""
    now, saved, back, run = 0, {}, [], 0
    for kind, at, to in schedule(steps, slots):
        if kind == SAVE:
            assert now == at
            assert 0 <= to < slots
            saved[to] = now
        elif kind == RESTORE:
            assert saved[to] == at
            now = at
        elif kind == ADVANCE:
            assert now == at < to < steps
            run, now = run + to - at, to
        else:
            assert kind == BACK
            assert now == at == to
            back.append(at)
            now = -1  # gone
    assert back == list(reversed(range(steps)))
    return run, len(saved)


@given(st.integers(0, 400), st.integers(1, 40))
@example(1000, 31)
@example(3000, 7)
@settings(max_examples=60, deadline=None)
def test_schedule_goes_back_over_every_step_once(steps: int, slots: int) -> None:
    run, used = executed(steps, slots)
    assert run == advances(steps, slots)
    assert used <= min(slots, max(steps, 0))


@given(st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_schedule_runs_the_fewest_steps_again(steps: int, slots: int) -> None:
    assert executed(steps, slots)[0] == fewest(steps, slots)


def test_a_thousand_steps_keep_thirty_copies() -> None:
    slots = slots_for(1000, 8, None)
    assert slots == 31
    # with the one on the way back no step is run more than 3.5 times, "recompute" runs it twice
    assert advances(1000, slots) < 2500


@pytest.mark.parametrize(("limit", "slots"), [(None, 10), (10_000, 10), (850, 8), (100, 1)])
def test_fewer_copies_where_memory_is_limited(limit: int | None, slots: int) -> None:
    assert slots_for(100, 100, limit) == slots


def test_refuses_a_limit_below_one_copy() -> None:
    net, params, data = problem()
    # 27 numbers of 2 tasks, theta and two means
    with pytest.raises(
        ValueError, match=r"`memory_limit` must be at least 1296 bytes, one copy .*, got 1295"
    ):
        run(net, params, data, "adam", 5, "checkpoint", memory_limit=1295)
    run(net, params, data, "adam", 5, "checkpoint", memory_limit=1296)


def run(
    net: nn.Module,
    params: dict[str, Tensor],
    data: list[Tensor],
    rule: str,
    steps: int,
    memory: str,
    **how: Any,
) -> fm.MetaGradient:
    return fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.02, steps=steps,
        update_rule=RULES[rule], memory=memory,
        **{"wrt": ("params", "lr", "support_x", "query_x"), "backend": "torch", **how},
    )  # fmt: skip


def same(a: fm.MetaGradient, b: fm.MetaGradient, tolerance: float) -> None:
    pairs = [(a.task_losses, b.task_losses), (a.output, b.output)]
    pairs += [(a.grads[name], b.grads[name]) for name in b.grads]
    pairs += [
        (x, y) for x, y in ((a.lr, b.lr), (a.support_x, b.support_x), (a.query_x, b.query_x)) if y is not None
    ]
    for x, y in pairs:
        assert float((x - y).norm()) <= tolerance * float(y.norm())


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_those_of_recompute(rule: str, steps: int, order: str) -> None:
    """The same steps are run; sums over them are taken in another order."""
    given = problem()
    weights = [0.1] * (steps + 1)
    how = {"order": order, "step_weights": weights, "support_step_weights": [0.3] * steps}
    same(run(*given, rule, steps, "checkpoint", **how), run(*given, rule, steps, "recompute", **how), 1e-14)
    same(run(*given, rule, steps, "checkpoint", **how), run(*given, rule, steps, "store", **how), 1e-12)
    few = run(*given, rule, steps, "checkpoint", memory_limit=1300, **how)
    same(few, run(*given, rule, steps, "recompute", **how), 1e-14)


def test_inner_sgd_and_maml_take_it() -> None:
    net, params, (x, y, qx, qy) = problem()
    theta = {name: value.clone().requires_grad_() for name, value in params.items()}
    found = []
    for memory in ("checkpoint", "store"):
        how = {"loss": "mse", "lr": 0.02, "steps": 7, "update_rule": RULES["adam"], "memory": memory}
        adapted = fm.inner_sgd(net, theta, x, y, **how, backend="torch")
        found.append(torch.autograd.grad(sum(v.sin().sum() for v in adapted.values()), [*theta.values()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    maml = fm.MAML(
        net, loss="mse", inner_lr=0.02, inner_steps=9, update_rule=RULES["adam"], memory="checkpoint"
    )
    maml(x, y, qx, qy).loss.backward()
    for backend in ("torch", "cpu", "machine"):
        maml.backend = backend
        said = str(maml.explain(x, y, qx, qy))
        assert f"backend: {backend}" in said
        assert "memory: 3 copies of the adapted parameters and the state of the update rule" in said
        assert "in place of 9; each inner step is run 2.4 times on average" in said
        assert ("cost, memory='checkpoint'" in said) == (backend != "torch")


class Dropped(nn.Module):
    """Random numbers in the network, from torch and from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(x).tanh(), 0.3))


@pytest.mark.parametrize("weights", [None, [0.2] * 12], ids=["last", "every"])
def test_dropout_is_drawn_again(weights: list[float] | None) -> None:
    _, _, data = problem()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Dropped().double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    found = []
    for memory in ("checkpoint", "recompute"):
        torch.manual_seed(5)
        found.append(run(net, params, data, "adam", 11, memory, step_weights=weights))
        found.append(torch.rand(3))  # the state moves on as if every pass had run once
    assert torch.equal(found[1], found[3])
    same(found[0], found[2], 1e-12)


def test_keeps_no_more_copies_than_it_says() -> None:
    """Counted before the way back: tensors like one weight of all tasks."""
    net, params, data = problem()
    given = net, params, tuple(data[:2]), tuple(data[2:])
    counts: list[int] = []

    def counting(output: Tensor, target: Tensor) -> Tensor:
        kept = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (2, 5, 2)]
        counts.append(len({x.untyped_storage().data_ptr() for x in kept}))
        return (output - target).square().mean()

    most = {}
    for memory in ("recompute", "checkpoint"):
        counts.clear()
        how = {"loss": "mse", "lr": 0.02, "steps": 60, "memory": memory, "backend": "torch"}
        fm.meta_gradient(*given, query_loss=counting, **how)
        most[memory] = max(counts)
    assert most["recompute"] >= 60
    assert most["checkpoint"] <= 7 + 4  # 7 copies, and what is at hand


@pytest.mark.parametrize("backend", ["cpu", "machine"])
def test_the_engines_keep_a_few_copies_too(backend: str) -> None:
    """The memory of one thread, and the bits of every schedule."""
    net, params, data = problem()
    sizes, found = {}, []
    for memory in ("checkpoint", "recompute"):
        how = {"loss": "mse", "inner_lr": 0.02, "update_rule": RULES["adam"], "memory": memory}
        for steps in (10, 1000):
            said = str(fm.MAML(net, **how, inner_steps=steps, backend=backend).explain(*data))
            match = re.search(r"(\d+) KiB for each", said)
            assert match is not None
            sizes[memory, steps] = int(match[1])
    assert sizes["recompute", 1000] > 10 * sizes["checkpoint", 1000]
    assert sizes["checkpoint", 1000] < 8 * sizes["checkpoint", 10]
    for limit in (None, 20_000, 4_000):
        found.append(run(net, params, data, "adam", 40, "checkpoint", backend=backend, memory_limit=limit))
    for other in found[1:]:
        assert all(torch.equal(other.grads[name], value) for name, value in found[0].grads.items())
    with pytest.raises(ValueError, match=r"`memory_limit` must be at least \d+ bytes, one copy .*, got 100"):
        run(net, params, data, "adam", 40, "checkpoint", backend=backend, memory_limit=100)


def test_says_what_the_other_modes_keep() -> None:
    net, _, data = problem()
    for memory, rule, what in (
        ("recompute", "adam", "recompute: the adapted parameters, gradients and states of the rule of all 9"),
        ("recompute", "sgd", "recompute: the adapted parameters of all 9 inner steps, about"),
        ("store", "adam", "store: the graphs of all 9 inner steps, about"),
    ):
        how = {"loss": "mse", "inner_lr": 0.02, "update_rule": RULES[rule], "memory": memory}
        said = str(fm.MAML(net, **how, inner_steps=9, backend="torch").explain(*data))
        assert f"memory: {what}" in said
        # 27 numbers of 2 tasks: theta, the gradient, two means; of SGD with momentum theta and that
        size = {"adam": 4, "sgd": 2}[rule] * 27 * 2 * 8 * 9 / 1024
        assert (f"about {size:.0f} KiB; each is run 2 times" in said) == (memory == "recompute")


def test_rejects_limits_and_backends_without_it() -> None:
    net, params, data = problem()
    given = net, params, tuple(data[:2]), tuple(data[2:])
    with pytest.raises(fm.BackendUnavailable, match="memory='checkpoint'"):
        fm.meta_gradient(*given, loss="mse", lr=0.1, steps=3, memory="checkpoint", backend="inductor")
    with pytest.raises(
        ValueError, match=r"`memory_limit` goes with memory='checkpoint' alone, got 1000 and memory='auto'"
    ):
        fm.meta_gradient(*given, loss="mse", lr=0.1, steps=3, memory_limit=1000)
    with pytest.raises(TypeError, match=r"`memory_limit` must be an int or None, got 1.5"):
        fm.meta_gradient(*given, loss="mse", lr=0.1, steps=3, memory="checkpoint", memory_limit=1.5)
