"""`fastmeta bench --layer`: times of one kind's cases, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastmeta import backends
from fastmeta.benchmark import Protocol, layers, machine, write_csv
from fastmeta.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Protocol(rounds=1, block=1e-4, most=3)
BENCH = ["bench", "--layer", "linear", "--tasks", "2", "--threads", "1", "--quick"]


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limit", lambda threads: None)
    monkeypatch.setattr("fastmeta.cli.bench_layers.QUICK", FAST)


def _rows() -> list[layers.LayerRow]:
    return layers.run(["linear"], backend="torch", tasks=2, threads=1, protocol=FAST)


def test_times_forward_and_gradient_of_every_case() -> None:
    rows = _rows()
    assert {row.what for row in rows} == {"forward", "gradient"}
    assert len(rows) == 2 * len({row.case for row in rows})
    for row in rows:
        assert (row.status, row.backend, row.tasks, row.threads) == ("timed", "torch", 2, 1)
        assert row.calls == 3
        assert 0 < row.min_ms <= row.median_ms


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get("torch")
    solve = backend.solve

    def spoiled(problem, wrt, adapted):
        result = solve(problem, wrt, adapted)
        for gradient in (result.grads.params or {}).values():
            gradient *= 1.0001
        return result

    monkeypatch.setattr(backend, "solve", spoiled)
    rows = _rows()
    assert {row.status for row in rows} == {"wrong"}
    assert "d_params" in rows[0].reason
    assert {row.calls for row in rows} == {0}


def test_a_measurement_is_compared_with_itself(tmp_path: Path) -> None:
    rows = _rows()
    write_csv(tmp_path / "layers.csv", rows)
    layers.compare(rows, layers.read_csv(tmp_path / "layers.csv"))
    for row in rows:
        assert row.ratio == pytest.approx(1, rel=1e-4)
        assert row.ratio_of_minima == pytest.approx(1, rel=1e-4)


def test_rejects_a_base_of_other_rows() -> None:
    rows = _rows()
    others = [layers.LayerRow("linear", row.case, row.what, "torch", threads=1, tasks=3) for row in rows]
    with pytest.raises(ValueError, match="no row of the same case"):
        layers.compare(rows, others)


def test_writes_and_compares_files(tmp_path: Path) -> None:
    first = CliRunner().invoke(main, [*BENCH, "--out", str(tmp_path / "a")])
    assert first.exit_code == 0, first.output
    base = tmp_path / "a" / "layers.csv"
    done = CliRunner().invoke(main, [*BENCH, "--out", str(tmp_path / "b"), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert "ratio" in done.output
    assert all(row.status == "timed" for row in layers.read_csv(tmp_path / "b" / "layers.csv"))


def test_runs_the_same_command_in_the_tree_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @contextmanager
    def tree_of(commit: str, say: object) -> Iterator[Path]:
        asked.append(commit)
        yield tmp_path

    def run_in(tree: Path, arguments: list[str]) -> list[layers.LayerRow]:
        asked.extend(arguments)
        return layers.run(["linear"], tasks=2, threads=1, protocol=FAST)

    monkeypatch.setattr(layers, "tree_of", tree_of)
    monkeypatch.setattr(layers, "run_in", run_in)
    done = CliRunner().invoke(main, [*BENCH, "--out", str(tmp_path), "--base", "0dacff8"])
    assert done.exit_code == 0, done.output
    assert asked == ["0dacff8", "--layer=linear", "--backend=auto", "--tasks=2", "--threads=1", "--quick"]
    assert "base median" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "add", "--workload", "sinusoid"], "--layer goes with"),
        (["--base", "main"], "go with --layer"),
        (["--layer", "add", "--base", "no-such-commit", "--threads", "1"], "no-such-commit"),
    ],
)
def test_rejects_what_does_not_go_together(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments, "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert said in done.output.replace("\n", " ")


def test_rejects_another_file(tmp_path: Path) -> None:
    other = tmp_path / "bench.csv"
    other.write_text("workload,case\nsinusoid,x\n")
    with pytest.raises(ValueError, match="is no file of `fastmeta bench --layer`"):
        layers.read_csv(other)
