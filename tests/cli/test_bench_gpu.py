"""`bench/gpu.py` without a GPU: it runs dry, and whatever hangs, dies or is wrong costs its own
line alone."""

from __future__ import annotations

import csv
import importlib
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

import fastmeta as fm

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in the processes that it starts
    for name in ("gpu", "gpu_timing", "cuda_meta_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu")


#: Does what its jobs' peers are called.
_WORKER = """
import json, os, sys, time
for job in json.load(sys.stdin):
    print(json.dumps({"begin": job}), flush=True)
    if job[2] == "hangs":
        time.sleep(60)
    if job[2] == "dies":
        os._exit(3)
    ours = {"case": job[0], "precision": "float32", "peer": job[2], "median_ms": len(job[2])}
    if job[2] == "gives up":
        print(json.dumps({"row": {**ours, "status": "broken"}}), flush=True)
        break
    print(json.dumps({"row": ours}), flush=True)
"""


def _jobs(*peers: str) -> list[tuple[str, str, str]]:
    return [("case", "highest", peer) for peer in peers]


def _command() -> tuple[str, ...]:
    return (sys.executable, "-c", _WORKER)


def test_what_hangs_or_dies_costs_its_own_line(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(bench, "LIMIT", 2.0)
    jobs, said = _jobs("fastmeta-triton", "hangs", "b", "dies", "c"), []
    rows = bench.timed(jobs, time.monotonic() + 60, tmp_path, said.append, _command())
    assert [row.status for row in rows] == ["timed", "stopped", "timed", "broken", "timed"]
    assert "more than 2 s" in rows[1].reason
    assert "ended with code 3" in rows[3].reason
    assert rows[2].ratio == 1 / len("fastmeta-triton")
    assert len(said) == 5
    with (tmp_path / "gpu.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["status"] for row in found] == [row.status for row in rows]
    assert {"device", "torch", "triton", "commit", "date", "roofline_share"} <= set(found[0])


def test_a_process_that_lost_the_device_is_replaced(bench: ModuleType, tmp_path: Path):
    rows = bench.timed(
        _jobs("a", "gives up", "b"), time.monotonic() + 60, tmp_path, lambda line: None, _command()
    )
    assert [row.status for row in rows] == ["timed", "broken", "timed"]


def test_what_does_not_fit_in_is_left_out(bench: ModuleType, tmp_path: Path):
    begin = time.monotonic()
    rows = bench.timed(_jobs("a", "hangs", "b"), begin + 3, tmp_path, lambda line: None, _command())
    assert time.monotonic() - begin < 20
    assert [row.status for row in rows] == ["timed", "stopped", "left out"]


def test_dry_run_says_what_is_missing_and_writes_all(bench: ModuleType, tmp_path: Path):
    peers = "--peer torch.func --peer fastmeta-triton --peer torch.func+graph".split()
    done = CliRunner().invoke(bench.main, ["--dry-run", "--out", str(tmp_path), *peers])
    assert done.exit_code == 0, done.output
    said = [line.split(",")[0] for line in done.output.splitlines()]
    assert [line for line in said if "exit code" in line] == [
        f"{stage}: exit code 0" for stage in bench.STAGES
    ]
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3
    status = {row["peer"]: row["status"] for row in rows}
    assert status["torch.func"] == "timed"
    assert status["fastmeta-triton"] == status["torch.func+graph"] == "missing"
    timed = next(row for row in rows if row["peer"] == "torch.func")
    assert float(timed["error"]) <= float(timed["allowed"])
    assert float(timed["p20_ms"]) <= float(timed["median_ms"]) <= float(timed["p80_ms"])
    assert float(timed["roofline_share"]) > 0


_SUMMARY = """
tests/a.py::test_b[x] FAILED [ 1%]
[gw3] [ 45%] FAILED tests/a.py::test_b[y]
[gw1] [ 50%] PASSED tests/a.py::test_c
[gw1] [ 50%] PASSED tests/a.py::test_d
SKIPPED [7] tests/b.py:3: conv2d has no kernels
FAILED tests/a.py::test_b[x] - RuntimeError: error 1 in line 2
FAILED tests/a.py::test_b[y] - RuntimeError: error 7 in line 9
"""


def test_failures_are_said_first_and_each_reason_once(bench: ModuleType, tmp_path: Path):
    program = ("-c", f"print({_SUMMARY!r}); raise SystemExit(1)")
    fine, said = bench._logged(tmp_path / "log.txt", 60, program)
    assert not fine
    assert said[0].startswith("exit code 1, 2 passed, 2 failed")
    assert said[1:] == [
        "  2 x RuntimeError: error 1 in line 2 (tests/a.py::test_b[x])",
        "  skipped 7 x conv2d has no kernels",
    ]


def test_tests_that_take_too_long_say_what_they_have_found(bench: ModuleType, tmp_path: Path):
    file = tmp_path / "test_long.py"
    file.write_text("import time\ndef test_wrong(): assert 1 == 2\ndef test_long(): time.sleep(60)\n")
    arguments = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, str(file))
    fine, said = bench._logged(tmp_path / "log.txt", 6, arguments)
    assert not fine
    assert said[0].startswith("stopped after 6 s, 0 passed, 1 failed")
    assert "1 x assert 1 == 2" in said[1]


_LOST = """
import pytest, torch

def gone():
    raise RuntimeError("an illegal memory access was encountered")

def test_breaks(monkeypatch):
    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, gone
    assert 1 == 2

@pytest.mark.parametrize("n", range(3))
def test_after(n):
    assert torch.cuda.synchronize is not gone
"""


def test_tests_go_on_in_another_process_when_the_device_is_lost(bench: ModuleType, tmp_path: Path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_lost.py").write_text(_LOST)
    tests = Path(__file__).parents[1]
    for path in ("conftest.py", "support/unchanged.py"):
        (tmp_path / Path(path).name).write_text((tests / path).read_text())
    arguments = "-m pytest -v -n 1 -p no:cacheprovider -c".split()
    _, said = bench._logged(tmp_path / "log.txt", 60, (*arguments, os.devnull, str(tmp_path)))
    assert said[0].startswith("exit code 1, 3 passed, 1 failed")
    assert "1 x assert 1 == 2" in "".join(said)


def test_a_wrong_gradient_is_not_timed(bench: ModuleType):
    row, key = bench.Row("case", "float32", "peer"), ("d_params", "w")
    ref = {key: torch.ones(3, dtype=torch.float64)}
    assert bench.timing.judge(row, [{key: ref[key] * (1 + 1e-7)}], [ref], (1e-7,))
    assert not bench.timing.judge(row, [{key: ref[key] * (1 + 1e-5)}], [ref], (1e-7,))
    assert not bench.timing.judge(row, [{key: ref[key] * math.nan}], [ref], (1e-7,))


@pytest.mark.parametrize(
    ("label", "queries"),
    # of two values batch norm leaves little but a sign
    [("conv4", 2), ("siren", 2), ("conv4-84", 2), ("mlp", 2), ("mlp-bn", 10), ("sinusoid", 2)],
)
def test_every_case_can_be_judged(
    bench: ModuleType, label: str, queries: int, monkeypatch: pytest.MonkeyPatch
):
    """What a row is compared with, and PyTorch's own error, are there for all networks."""
    monkeypatch.setattr(bench.timing, "SEEDS", 1)
    case = next(case for case in bench.timing.CASES.values() if case.label == label)
    case = replace(case, tasks=2, shots=min(case.shots, 5), queries=queries, steps=1)
    (own,) = bench.timing.own_errors(case, "highest")
    assert 0 < own < 1e-4


def test_long_calls_are_made_less_often(bench: ModuleType, monkeypatch: pytest.MonkeyPatch):
    assert len(bench.timing.clock(lambda: None, 20)) == 20
    monkeypatch.setattr(bench.timing, "LONG", 0.0)
    assert len(bench.timing.clock(lambda: None, 20)) == 5


def test_a_network_that_a_backend_refuses_is_missing(bench: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise fm.BackendUnavailable("conv2d has no kernels")

    monkeypatch.setattr(bench.timing, "_measure", refuse)
    row = bench.timing.measure(next(iter(bench.timing.DRY.values())), "highest", "torch.func")
    assert (row.status, row.reason) == ("missing", "conv2d has no kernels")


def test_traffic_is_what_the_launches_touch(bench: ModuleType):
    """At least all parameters of all steps once and the episode once; not the whole memory at every
    launch."""
    case = next(iter(bench.timing.DRY.values()))
    parameters = sum(p.numel() for p in case.make().parameters())
    found = bench.timing.traffic(case, "highest")
    least = 4 * case.tasks * (parameters * 3 + case.shots + case.queries)
    assert least < found < 40 * least


def test_cases_are_those_of_the_design(bench: ModuleType):
    found = [(case.label, case.tasks, case.steps) for case in bench.timing.CASES.values()]
    images = [("conv4", 32, 1), ("siren", 16, 3), ("sinusoid", 32, 5), ("conv4-84", 4, 5)]
    assert found == [
        *images,
        ("mlp", 32, 5),
        ("recommender", 32, 5),
        ("sinusoid", 1024, 5),
        ("mlp-bn", 32, 5),
        ("sinusoid", 32, 5),  # Adam inside
    ]


def test_ratios_are_to_each_of_ours(bench: ModuleType):
    rows = [
        bench.Row("case", "float32", peer, median_ms=m)
        for peer, m in (("torch.func", 12.0), (bench.timing.OURS[0], 3.0))
    ]
    rows.append(bench.Row("case", "float32", bench.timing.OURS[1], median_ms=2.0, device_ms=0.5))
    bench._compare(rows)
    assert (rows[0].ratio, rows[0].ratio_cuda, rows[0].per_device) == (4.0, 6.0, 24.0)
    alone = [bench.Row("case", "tf32", "torch.func", median_ms=1.0)]
    bench._compare(alone)
    assert math.isnan(alone[0].ratio)
