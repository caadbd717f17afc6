"""The Triton backend on a GPU: against the reference, graph against launches, bits, and who owns
what."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.models import Conv4
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import quantities, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

_BY_LABEL = {case.label: case for case in reversed(VERIFICATION)}
RULES = [case for case in VERIFICATION if case.rule]
CASES = list(dict.fromkeys([*_BY_LABEL.values(), *RULES, *VERIFICATION[::5]]))
SMALL = Case("conv4", partial(Conv4, 5, width=24, image_size=20), (1, 20, 20), 5, 3, 4, 2, "ce", kinks=True)


def _solve(case: Case, dtype: torch.dtype = torch.float32, calls: int = 1) -> list[dict]:
    """The results of several calls of one plan; from the second on they come from a CUDA graph."""
    problem = problem_of(case, dtype, 0, "cuda")
    return [
        quantities(backends.get("triton").solve(problem, wanted(case, problem), False)) for _ in range(calls)
    ]


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, label="recomputed", wrt_inputs=False),
        replace(WORKLOADS["sinusoid"][3], wrt_inputs=True),
        replace(SMALL, tasks=33),
        RULES[3],
    ],
    ids=lambda c: c.id,
)
def test_graph_gives_the_bits_of_the_launches(case: Case) -> None:
    first, *others = _solve(case, calls=4)
    again = _solve(case)[0]
    for other in (*others, again):
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_the_second_call_is_a_graph() -> None:
    problem = problem_of(SMALL, torch.float32, 0, "cuda")
    for _ in range(3):
        backends.get("triton").solve(problem, wanted(SMALL, problem), False)
    job = problem.scratch["triton"]
    assert job.graph is not None, job.why_no_graph


def test_tuning_changes_no_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTMETA_TUNE", raising=False)
    tuned, again = _solve(SMALL)[0], _solve(SMALL)[0]
    assert list(tmp_path.glob("*.json"))
    monkeypatch.setenv("FASTMETA_TUNE", "0")
    plain = _solve(SMALL)[0]
    assert all(torch.equal(tuned[key], plain[key]) and torch.equal(again[key], plain[key]) for key in plain)


def test_a_replay_reads_rates_parameters_and_data_anew() -> None:
    problem = problem_of(SMALL, torch.float64, 0, "cuda")
    wrt = wanted(SMALL, problem)
    for _ in range(3):
        kept = backends.get("triton").solve(problem, wrt, False)
    before = {key: value.clone() for key, value in quantities(kept).items()}
    other = problem_of(SMALL, torch.float64, 1, "cuda")
    other.rates = {name: rate * 1.5 for name, rate in other.rates.items()}
    other.scratch = problem.scratch
    found = quantities(backends.get("triton").solve(other, wrt, False))
    assert all(torch.equal(before[key], value) for key, value in quantities(kept).items())  # not overwritten
    ref = quantities(backends.get("reference").solve(other, wrt, False))
    assert relative_error(found, ref, list(ref)) <= 1e-9


def test_calls_from_two_streams_do_not_mix() -> None:
    problems = [problem_of(SMALL, torch.float64, seed, "cuda") for seed in (0, 1)]
    wrt = wanted(SMALL, problems[0])
    problems[1].scratch = problems[0].scratch
    refs = [quantities(backends.get("reference").solve(p, wrt, False)) for p in problems]
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i in range(8):
        with torch.cuda.stream(streams[i % 2]):
            outs.append(backends.get("triton").solve(problems[i % 2], wrt, False))
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        assert relative_error(quantities(out), refs[i % 2], list(refs[i % 2])) <= 1e-9


def test_auto_takes_cuda_tensors_and_trains() -> None:
    torch.manual_seed(0)
    # the cuda backend has no layer norm
    net = nn.Sequential(nn.Linear(2, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 1)).cuda()
    maml = fm.MAML(net, loss="mse", inner_lr=0.05, inner_steps=2)
    x = torch.randn(4, 10, 2, device="cuda")
    episode = (x, x.sum(-1, keepdim=True), x, x.sum(-1, keepdim=True))
    assert maml.explain(*episode).backend == "triton"
    optimiser = torch.optim.Adam(maml.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        out = maml(*episode)
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_tf32_only_when_asked_for() -> None:
    wide = Case(
        "wide", partial(mlp, (64, 128, 128, 8), "tanh"), (64,), 4, 32, 32, 2, "mse", lr=0.01, wrt_inputs=False
    )
    exact = _solve(wide)[0]
    torch.set_float32_matmul_precision("high")
    try:
        rough = _solve(wide)[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    ref = _solve(wide, torch.float64)[0]
    keys = [key for key in ref if key[0] == "d_params"]
    errors = [relative_error(out, ref, keys) for out in (exact, rough)]
    assert errors[0] < 1e-5 < errors[1] < 1e-2


# Last, since there are many, and each compiles its kernels.
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpu_matches_reference(case: Case, dtype: str) -> None:
    rows = verify_case(case, "triton", dtype)
    assert not any(row.skipped for row in rows), rows[0].note
    assert [str(row) for row in rows if not row.passed] == []
