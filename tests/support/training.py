"""Runs of `fastmeta train` in tests."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from click.testing import CliRunner

from fastmeta.cli import main

SMALL = "--tasks 3 --shots 4 --eval-tasks 6 --eval-steps 2 --log-every 2 --checkpoint-every 3".split()


def sinusoid(out: Path, *arguments: str):
    return CliRunner().invoke(main, ["train", "sinusoid", *SMALL, "--out", str(out), *arguments])


def resume(out: Path):
    return sinusoid(out, "--iterations", "9", "--resume")


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file without its times."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def same_run(one: Path, other: Path) -> None:
    a, b = checkpoint(one), checkpoint(other)
    assert a["iteration"] == b["iteration"]
    assert a["maml"].keys() == b["maml"].keys()
    assert all(torch.equal(a["maml"][name], b["maml"][name]) for name in a["maml"])
    (state_a,), (state_b,) = a["optimizer"]["state"].values(), b["optimizer"]["state"].values()
    assert all(torch.equal(state_a[name], state_b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert rows(one / "metrics.csv") == rows(other / "metrics.csv")
    assert rows(one / "result.csv") == rows(other / "result.csv")
