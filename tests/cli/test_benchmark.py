"""The benchmark: peers are right or not timed, and the rows say what happened."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.benchmark import PEERS, Protocol, Row, engine, inner_memory, machine, orders, run, write_csv
from fastmeta.benchmark.check import Verdict, judge
from fastmeta.benchmark.cost import flops
from fastmeta.benchmark.peers import NOOP, OURS, Prepared
from fastmeta.benchmark.timing import measure
from fastmeta.cases import Case
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

NO_EXTENSION = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)
FAST = Protocol(rounds=1, block=1e-4, most=3)
SINUSOID = WORKLOADS["sinusoid"][1]
#: Compiling takes minutes; `fastmeta bench` itself checks these.
SLOW = {"torch.compile", "jax-vmap", "jax-loop"}


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The limit, and the choice of attention, would hold for the rest of the test process."""
    monkeypatch.setattr(machine, "limit", lambda threads: None)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize(
    "case", [SINUSOID, WORKLOADS["mlp"][0], WORKLOADS["recommender"][0]], ids=lambda case: case.id
)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in SLOW | {NOOP}])
def test_peer_matches_reference(name: str, case: Case) -> None:
    peer = PEERS[name]
    if peer.missing():
        pytest.skip(peer.missing())
    prepared = peer.prepare(case, case.build(torch.float32, 0))
    verdict = judge(case, {0: prepared}, {0: prepared.step()})
    assert verdict.right, verdict
    # What a peer returns must not depend on its earlier calls.
    assert judge(case, {0: prepared}, {0: prepared.step()}).error == pytest.approx(
        verdict.error, rel=0.5, abs=1e-7
    )


def _spoiled(monkeypatch: pytest.MonkeyPatch, step: Callable[[Prepared], object]) -> Row:
    peer = PEERS["autograd-loop"]
    prepare = peer.prepare

    def spoiled(*arguments: object) -> Prepared:
        prepared = prepare(*arguments)
        return Prepared(lambda: step(prepared), prepared.gradient)

    monkeypatch.setattr(peer, "prepare", spoiled)
    (row,) = run("sinusoid", tasks=[4], steps=[1], peers=["autograd-loop"], protocol=FAST)
    return row


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _spoiled(monkeypatch, lambda peer: tuple(gradient * 1.0001 for gradient in peer.step()))
    assert row.status == "wrong"
    assert "1.0e-04" in row.reason
    assert row.calls == 0
    assert math.isnan(row.median_ms)


def test_a_broken_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _spoiled(monkeypatch, lambda peer: 1 / 0)
    assert row.status == "broken"
    assert "ZeroDivisionError" in row.reason
    assert row.calls == 0


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PEERS["higher"], "missing", lambda: "not installed: higher")
    rows = run("sinusoid", tasks=[4], steps=[1], peers=["higher", "autograd-loop"], protocol=FAST)
    assert [(row.peer, row.status) for row in rows] == [("higher", "missing"), ("autograd-loop", "timed")]
    assert rows[0].reason == "not installed: higher"
    assert rows[1].calls == 3


def test_blocks_take_turns_and_drop_their_first_calls() -> None:
    calls: list[str] = []
    peers = {name: Prepared(lambda name=name: calls.append(name), lambda _: {}) for name in "ab"}
    times = measure(peers, Protocol(rounds=2, block=1.0, most=5))
    assert "".join(calls) == ("a" * 8 + "b" * 8) * 2
    assert [len(entry.total) for entry in times.values()] == [10, 10]


def test_flops_match_the_formula() -> None:
    f, f1 = 40 + 1600 + 40, 40
    assert flops(SINUSOID) == 2 * 4 * (10 * 5 * (9 * f - 5 * f1) + 10 * (3 * f - f1))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_other_work_is_seen() -> None:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with machine.OtherWork() as work:
            time.sleep(1.0)
    finally:
        other.kill()
        other.wait()
    assert work.cores > 0.2


def test_rejects_a_workload_without_such_a_case() -> None:
    with pytest.raises(ValueError, match="sinusoid has no case with tasks"):
        run("sinusoid", tasks=[5])


@pytest.mark.parametrize("threads", [0, 10_000])
def test_rejects_more_threads_than_cores(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`threads` must be 1 to"):
        machine.limit(threads)


def test_csv_holds_a_line_a_row(tmp_path: Path) -> None:
    rows = [
        Row("sinusoid", "a", OURS, median_ms=0.5, facts={"isa": "avx2"}),
        Row(
            "sinusoid", "a", "higher", status="missing", reason="not installed, higher", facts={"isa": "avx2"}
        ),
    ]
    write_csv(tmp_path / "bench.csv", rows)
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["peer"] for line in lines] == [OURS, "higher"]
    assert [line["median_ms"] for line in lines] == ["0.5", ""]
    assert [line["isa"] for line in lines] == ["avx2", "avx2"]
    assert lines[1]["reason"] == "not installed, higher"


def test_command_writes_table_csv_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Protocol", lambda: FAST)
    arguments = [
        "bench",
        "--workload",
        "sinusoid",
        "--tasks",
        "4",
        "--peers",
        f"{OURS},autograd-loop",
        "--quick",
    ]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "autograd-loop" in result.output
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 1 + 2 * 2
    pytest.importorskip("matplotlib")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_memory_of_the_torch_backend_grows_by_checkpoints_alone() -> None:
    rows = inner_memory.run(("recompute",), steps=(2, 6)) + inner_memory.run(("autograd loop",), steps=(6,))
    assert [row.reason for row in rows] == [""] * 3
    few, many, loop = (row.peak_mib for row in rows)
    checkpoints = rows[1].checkpoints_mib - rows[0].checkpoints_mib
    assert checkpoints == pytest.approx(4 * 4 * 68_869 * 4 / 2**20)
    assert 0.7 * checkpoints < many - few < 1.4 * checkpoints
    assert loop > many + checkpoints


def test_memory_of_a_wrong_result_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(0, "1e6 0.5 1e-6", ""), (1, "", "Traceback\nMemoryError: all of it")])
    monkeypatch.setattr(inner_memory.machine, "facts", dict)
    monkeypatch.setattr(
        inner_memory.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, *next(answers)),
    )
    wrong, broken = inner_memory.run(("store",), steps=(1, 5))
    assert wrong.reason == "error 5.0e-01 against the float64 reference, allowed 1.0e-06"
    assert broken.reason == "MemoryError: all of it"
    assert math.isnan(wrong.peak_mib)
    assert math.isnan(broken.peak_mib)


@NO_EXTENSION
def test_orders_are_timed_if_right(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = orders.run(("sinusoid",), most_tasks=4, protocol=FAST)
    assert [(row.memory, row.limit) for row in rows] == [("store", 3.0), ("recompute", 4.0)] * 2
    assert all(row.ratio == row.second_ms / row.first_ms for row in rows)
    f, f1 = 40 + 1600 + 40, 40
    assert rows[2].by_flops == pytest.approx(
        (50 * (9 * f - 5 * f1) + 10 * (3 * f - f1)) / (60 * (3 * f - f1))
    )
    monkeypatch.setattr(orders.check, "judge", lambda *_: Verdict(0.5, 1e-6))
    rows = orders.run(("sinusoid",), most_tasks=4, protocol=FAST)
    assert {row.reason for row in rows} == {
        "first: error 5.0e-01 against the float64 reference, allowed 1.0e-06"
    }
    assert all(math.isnan(row.ratio) for row in rows)


@NO_EXTENSION
@pytest.mark.parametrize("reason", ["", "wrong"])
def test_cost_writes_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    peaks = [
        inner_memory.MemoryRow("a case", "recompute", steps, 10.5 + steps, 1.0, reason=reason)
        for steps in (1, 5)
    ]
    monkeypatch.setattr(inner_memory, "run", lambda **_: peaks)
    monkeypatch.setattr(sys.modules["fastmeta.cli.cost"], "QUICK", FAST)
    result = CliRunner().invoke(main, ["cost", "--workload", "sinusoid", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == (1 if reason else 0), result.output
    assert "11.5" in result.output
    assert "15.5" in result.output
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 1 + 2
    assert len((tmp_path / "orders.csv").read_text().splitlines()) == 1 + 2 * 2


def test_a_peer_that_cannot_run_a_network_is_missing() -> None:
    peers = ["fastmeta-cpu", "fastmeta-torch", "autograd-loop"]
    rows = run("melu", tasks=[4], steps=[1], peers=peers, protocol=FAST)
    assert [(row.peer, row.status) for row in rows] == [
        ("fastmeta-cpu", "missing"),
        ("fastmeta-torch", "timed"),
        ("autograd-loop", "timed"),
    ]
    assert math.isnan(rows[1].gflops)
    assert [row.backend for row in rows] == ["", "torch", ""]


def test_command_rejects_an_unknown_peer() -> None:
    result = CliRunner().invoke(main, ["bench", "--peers", "learn2learn"])
    assert result.exit_code == 2
    assert "no peer is called learn2learn" in result.output
