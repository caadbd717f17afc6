"""The workloads that no layer program takes: their peers are right, and written down for JAX."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.benchmark import PEERS, Protocol, machine, orders
from fastmeta.benchmark.check import judge, seeds
from fastmeta.benchmark.peers import OURS
from fastmeta.capture.capture import captured
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS
from fastmeta.inputs import arguments, mapped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_attention() -> Iterator[None]:
    """As in the benchmark: attention that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


#: The smallest of each: one task, one step.
SMALLEST = {name: replace(WORKLOADS[name][0], tasks=1, steps=1) for name in sorted(NOT_CAPTURED)}
NETWORKS = ("lstm", "gru", "transformer", "gnn", "lora", "melu", "siren")


@pytest.mark.parametrize("name", NETWORKS)
def test_workloads_have_few_and_many_tasks_and_steps(name: str) -> None:
    cases = WORKLOADS[name]
    assert [(case.tasks, case.steps) for case in cases] == [(4, 1), (4, 5), (32, 1), (32, 5)]


def test_which_are_captured_is_known() -> None:
    for name, cases in WORKLOADS.items():
        case = cases[0]
        program = (
            None
            if case.ids or case.more_inputs
            else captured(case.make(), case.input_shape, torch.float32)[0]
        )
        assert (program is None) == (name in NOT_CAPTURED), name


@pytest.mark.parametrize("peer", [OURS, "fastmeta-maml", "torch.func", "autograd-loop"])
@pytest.mark.parametrize("name", SMALLEST)
def test_peers_match_the_reference(name: str, peer: str) -> None:
    case = replace(SMALLEST[name], steps=2)
    prepared = {seed: PEERS[peer].prepare(case, case.build(torch.float32, seed)) for seed in seeds(case)}
    verdict = judge(case, prepared, {seed: each.step() for seed, each in prepared.items()})
    assert verdict.right, verdict


@pytest.mark.parametrize("name", [name for name in SMALLEST if name != "transformer-wide"])
def test_jax_computes_the_same_network(name: str) -> None:
    jax = pytest.importorskip("jax")
    from fastmeta.benchmark.peers import jax_network

    case = SMALLEST[name]
    made = case.build(torch.float32, 0)
    params = {key: jax.numpy.asarray(value.numpy()) for key, value in made.params.items()}
    run = jax_network.forward(made.net, case.input_shape)
    x = mapped(lambda leaf: leaf[0], made.support_x)
    found = torch.tensor(run(params, mapped(lambda leaf: jax.numpy.asarray(leaf.numpy()), x)).tolist())
    torch.testing.assert_close(found, made.net(*arguments(x)[0]).detach(), rtol=1e-5, atol=1e-6)


def test_cost_of_a_network_that_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limit", lambda threads: None)
    monkeypatch.setitem(orders.WORKLOADS, "lora", (SMALLEST["lora"],))
    rows = orders.run(("lora",), protocol=Protocol(rounds=1, block=1e-4, most=3))
    assert [(row.memory, row.reason) for row in rows] == [("store", ""), ("recompute", "")]
    assert all(row.backend and row.first_call_s > 0 for row in rows)
    assert all(math.isnan(row.limit) for row in rows)  # the limits are those of cpu
