"""`fastmeta` itself and `fastmeta info`."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import fastmeta
from fastmeta import backends
from fastmeta.cli import COMMANDS, main


def test_help_names_every_command():
    text = CliRunner().invoke(main, ["--help"]).output
    assert {"info", "verify", "train"} <= {command.name for command in COMMANDS}
    assert all(f"  {command.name} " in text for command in COMMANDS)


def test_info_prints_versions_and_backends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(main, ["info"])
    assert done.exit_code == 0
    lines = dict(line.split("  ", 1) for line in done.output.splitlines() if "  " in line)
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["fastmeta"] == fastmeta.__version__
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    for name in backends.NAMES:
        assert lines[f"backend {name}"] == (backends.get(name).missing() or "ready")


def test_info_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(backends.get("torch"), "missing", lambda: "no [reason] at all")
    assert "no [reason] at all" in CliRunner().invoke(main, ["info"]).output


def test_info_says_that_the_extension_is_missing(monkeypatch):
    from fastmeta.cli.info import instruction_sets

    monkeypatch.setitem(__import__("sys").modules, "fastmeta._C", None)
    monkeypatch.delattr(fastmeta, "_C", raising=False)
    assert "the extension is not there" in instruction_sets()


@pytest.mark.parametrize("arguments", [["no-such-command"], ["info", "--no-such-option"]])
def test_rejects_unknown_arguments(arguments):
    assert CliRunner().invoke(main, arguments).exit_code == 2
