"""`fastmeta verify`: the table and the exit code."""

from __future__ import annotations

import math
import re

import pytest
from click.testing import CliRunner

from fastmeta import backends
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cli import main
from fastmeta.verify import Row

# `fastmeta.cli.verify` is the command; this is the module that it is in.
MODULE = "fastmeta.cli.verify"


def row(error: float = 1e-12, skipped: bool = False, note: str = "") -> Row:
    return Row("some-case", "torch", "float64", "params 0.weight", error, math.nan, 1e-9, note, skipped)


@pytest.fixture
def verify(monkeypatch):
    """Runs the command on one case with rows made up."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*rows: Row, arguments: tuple[str, ...] = ()):
        import sys

        monkeypatch.setattr(sys.modules[MODULE], "run_case", lambda case, backend, dtype: list(rows))
        one = ["verify", "--case", VERIFICATION[0].id, "--backend", "torch", "--dtype", "float64"]
        return CliRunner().invoke(main, [*one, *arguments])

    return run


def test_passes_a_right_backend():
    case = VERIFICATION[0].id
    done = CliRunner().invoke(
        main, ["verify", "--case", case, "--backend", "torch", "--dtype", "float64", "--all"]
    )
    assert done.exit_code == 0, done.output
    assert "0 failed" in done.output


def test_fails_on_one_wrong_quantity(verify):
    done = verify(row(), row(error=1e-3), row())
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "FAILED some-case torch float64 params 0.weight: error 1.00e-03" in done.output


def test_fails_on_nan(verify):
    assert verify(row(), row(error=math.nan)).exit_code == 1


def test_fails_when_nothing_ran(verify):
    done = verify(row(skipped=True, note="too [wide] for it"))
    assert done.exit_code == 1
    assert "too [wide] for it" in done.output


def test_shows_the_worst_of_a_quantity_or_all(verify):
    rows = (row(1e-13), row(3e-11), row(1e-12))
    assert "3.0e-11" in verify(*rows).output
    assert "1.00e-13" not in verify(*rows).output
    assert "1.00e-13" in verify(*rows, arguments=("--all",)).output


def test_lists_the_cases():
    done = CliRunner().invoke(main, ["verify", "--list"])
    assert done.output.splitlines() == [case.id for case in VERIFICATION]


def test_rejects_a_case_that_is_not_there():
    done = CliRunner().invoke(main, ["verify", "--case", "no such case"])
    assert done.exit_code == 2
    assert "no such case" in done.output


def test_rejects_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(backends.get("torch"), "missing", lambda: "out of order")
    done = CliRunner().invoke(main, ["verify", "--backend", "torch"])
    assert done.exit_code == 1
    assert "out of order" in done.output


def test_verifies_layers_alone():
    done = CliRunner().invoke(main, ["verify", "--layer", "add", "--backend", "torch", "--dtype", "float64"])
    assert done.exit_code == 0, done.output
    assert re.search(r"torch +float64 +jvp .*passed", done.output)


def test_lists_layers_and_chooses_among_them():
    done = CliRunner().invoke(main, ["verify", "--layer", "add", "--layer", "concat", "--list"])
    assert "add vectors" in done.output.splitlines()
    assert "concat rows" in done.output.splitlines()
    done = CliRunner().invoke(main, ["verify", "--layer", "add", "--case", "concat", "--list"])
    assert done.exit_code == 2


def test_fails_on_a_wrong_layer(monkeypatch):
    import sys

    monkeypatch.setattr(
        sys.modules[MODULE], "run_layer", lambda kind, example, name, dtype: [row(error=1e-3)]
    )
    done = CliRunner().invoke(main, ["verify", "--layer", "add", "--backend", "torch"])
    assert done.exit_code == 1
    assert "FAILED" in done.output
