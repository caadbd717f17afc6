"""Clusters of blocks in the cuda backend: several blocks, each with its own shared memory, take one
task together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cuda_cases import FOUR, TWO, ptx
from torch import nn

import fastmeta as fm
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda import run as runs
from fastmeta.cases import Case
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU"),
]

EVERYTHING = {
    case.id: case
    for case in VERIFICATION
    if case.id
    in (
        "tied-T3-N7-M5-K3-mse-recompute",
        "residual-T3-N7-M5-K2-ce",
        "image-T3-N7-M5-K2-ce",
        "bn_mlp-T3-N7-M5-K3-ce-lr_element_step_task-mu0.9-wd0.05-recompute",
        "tanh-T3-N7-M5-K3-mse-lr_element_step_task-mu0.9-wd0.05-store",
        "tanh-T3-N7-M5-K2-ce-step_weights-weights_sqt-per_step-recompute",
        "tanh-T3-N7-M5-K3-mse-first-lr_per_step",
        "tanh-T3-N7-M5-K2-ce-inner_sgd-lr_head-weights_s-recompute",
    )
}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


def _plan(case: Case, dtype: torch.dtype = torch.float64) -> plans.Plan:
    problem = problem_of(case, dtype, 0)
    return runs.make_plan(problem, wanted(case, problem))


def _verify(case: Case, dtype: str) -> None:
    rows = verify_case(case, "cuda", dtype)
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []


def _room_for(case: Case, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that `ranks` of them are needed, and no fewer."""
    problem = problem_of(case, torch.float64, 0)
    size = 40_000
    while (size := size * 31 // 32) > 1000:
        chip = plans.Chip(size, cluster=4)
        if plans.make_plan(problem, wanted(case, problem), chip).ranks == ranks:
            monkeypatch.setattr(launches, "EMULATED", chip)
            return
    raise AssertionError(f"{case.id} never takes {ranks} ranks")


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", EVERYTHING.values(), ids=EVERYTHING)
def test_clusters_match_reference(
    case: Case, ranks: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", threads)
    _room_for(case, ranks, monkeypatch)
    plan = _plan(case)
    assert plan.workspace == plan.ranks * plan.areas["checkpoints"].size
    assert len({param.rank for param in plan.params}) > 1
    _verify(case, "float64")


@pytest.mark.parametrize(("case", "ranks"), [(TWO, 2), (FOUR, 4)], ids=["2", "4"])
def test_clusters_of_an_h100_match_reference(case: Case, ranks: int) -> None:
    plan = _plan(case, torch.float32)
    assert plan.ranks == ranks
    assert {area.space for name, area in plan.areas.items() if area.size and name != "checkpoints"} == {
        "shared"
    }
    assert "split" in {layer.multiply for layer in plan.layers}
    _verify(case, "float32")


@pytest.mark.parametrize("threads", ["1", "3"])
def test_largest_pieces_go_to_global_memory(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What even four blocks have no room for is there too, a share for each."""
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", threads)
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(1_500, cluster=4))
    for case in EVERYTHING.values():
        plan = _plan(case)
        assert plan.ranks == 4
        assert sum(area.space == "global" for area in plan.areas.values() if area.size) > 2
        _verify(case, "float64")


def test_no_two_parts_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and values of each rank, one after the other."""
    for case in EVERYTHING.values():
        for ranks in (2, 4):
            _room_for(case, ranks, monkeypatch)
            plan = _plan(case)
            for rank in range(ranks):
                params = sorted((p.at, p.at + p.rows * p.ld) for p in plan.params if p.rank == rank)
                assert all(end <= start for (_, end), (start, _) in pairwise(params))
                assert all(end <= plan.frozen + plan.set for _, end in params)
                for block in ("x", "d", "rx", "rd"):
                    places = [(getattr(v, block), v.rows * v.ld) for v in plan.values if v.rank == rank]
                    ends = sorted((at, at + size) for at, size in places if at >= 0)
                    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def test_older_devices_say_that_they_have_no_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(4_000))
    data = [torch.randn(2, 4, n) for n in (3, 13, 3, 13)]
    maml = fm.MAML(nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 13)), loss="mse", inner_lr=0.1,
                   inner_steps=2, backend="cuda")  # fmt: skip
    text = str(maml.explain(*data))
    assert "one block of" in text
    assert "in global memory" in text
    assert "clusters need compute capability 9.0" in text
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(4_000, cluster=4))
    text = str(maml.explain(*data))
    assert "a cluster of 4 blocks of 128 threads" in text
    assert "compute capability" not in text


@pytest.mark.skipif(bool(compiler.missing_compiler()), reason=compiler.missing_compiler())
def test_kernels_ask_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch need not: cuLaunchKernel takes the number of blocks from the kernel itself."""
    case = EVERYTHING["tied-T3-N7-M5-K3-mse-recompute"]
    alone = ptx(plans.source(_plan(case)), "compute_90")
    assert not any(word in alone for word in (b"mapa", b"barrier.cluster", b"reqnctapercluster"))
    _room_for(case, 2, monkeypatch)
    together = ptx(plans.source(_plan(case)), "compute_90")
    assert b".reqnctapercluster 2, 1, 1" in together
    assert all(word in together for word in (b"mapa.u64", b"barrier.cluster.arrive.release.aligned"))
    assert together.count(b"bar.sync") <= 1  # in the sums, which no cluster runs
