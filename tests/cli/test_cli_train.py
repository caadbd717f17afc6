"""`fastmeta train`: runs, checkpoints, interruption, results."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from click.testing import CliRunner
from training import checkpoint, rows, same_run, sinusoid

from fastmeta.cli import main
from fastmeta.cli.train.inner import RULES
from fastmeta.data import Sinusoid


@pytest.fixture
def interrupt_at(monkeypatch):
    """Sends a signal while an iteration draws its data."""
    draw = Sinusoid.__getitem__

    def arrange(iteration: int, number: int = signal.SIGINT) -> None:
        def draw_and_interrupt(self, index):
            if index == iteration and self.iterations > 1:
                monkeypatch.setattr(Sinusoid, "__getitem__", draw)
                os.kill(os.getpid(), number)
            return draw(self, index)

        monkeypatch.setattr(Sinusoid, "__getitem__", draw_and_interrupt)

    return arrange


def test_sinusoid_writes_metrics_result_and_plot(tmp_path):
    done = sinusoid(tmp_path, "--iterations", "5")
    assert done.exit_code == 0, done.output
    assert [row["iteration"] for row in rows(tmp_path / "metrics.csv")] == ["2", "4"]
    assert [row["steps"] for row in rows(tmp_path / "result.csv")] == ["0", "1", "2"]
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint(tmp_path)["iteration"] == 5
    assert "query MSE over 6 test tasks" in done.output


def test_training_lowers_the_loss(tmp_path):
    options = "--iterations 300 --log-every 100 --outer-lr 0.01 --tasks 25 --eval-tasks 200".split()
    assert sinusoid(tmp_path, *options).exit_code == 0
    losses = [float(row["loss"]) for row in rows(tmp_path / "metrics.csv")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, interrupt_at, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sinusoid(whole, "--iterations", "9").exit_code == 0
    interrupt_at(4, number)
    cut = sinusoid(parts, "--iterations", "9")
    assert cut.exit_code == 130
    assert "iteration 5 is saved" in " ".join(cut.output.split())
    assert checkpoint(parts)["iteration"] == 5
    resumed = sinusoid(parts, "--iterations", "9", "--resume")
    assert resumed.exit_code == 0, resumed.output
    same_run(whole, parts)


def test_resume_after_a_crash_equals_uninterrupted(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sinusoid(whole, "--iterations", "9").exit_code == 0
    draw = Sinusoid.__getitem__

    def fail_at_eight(self, index):
        if index == 8:
            raise OSError("the disk is gone")
        return draw(self, index)

    monkeypatch.setattr(Sinusoid, "__getitem__", fail_at_eight)
    assert isinstance(sinusoid(parts, "--iterations", "9").exception, OSError)
    monkeypatch.setattr(Sinusoid, "__getitem__", draw)
    # The last checkpoint is older than the last row of the metrics.
    assert checkpoint(parts)["iteration"] == 6
    assert rows(parts / "metrics.csv")[-1]["iteration"] == "8"
    assert sinusoid(parts, "--iterations", "9", "--resume").exit_code == 0
    same_run(whole, parts)


def test_resume_goes_on_past_the_end(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sinusoid(whole, "--iterations", "7").exit_code == 0
    assert sinusoid(parts, "--iterations", "3").exit_code == 0
    assert sinusoid(parts, "--iterations", "7", "--resume").exit_code == 0
    same_run(whole, parts)


def test_handlers_are_restored(tmp_path, interrupt_at):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt_at(1)
    sinusoid(tmp_path, "--iterations", "4")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_rejects_resume_without_checkpoint(tmp_path):
    done = sinusoid(tmp_path, "--resume")
    assert done.exit_code == 2
    assert "there is no checkpoint" in done.output


def test_rejects_resume_with_other_settings(tmp_path):
    sinusoid(tmp_path, "--iterations", "2")
    done = sinusoid(tmp_path, "--iterations", "4", "--resume", "--inner-lr", "0.5")
    assert done.exit_code == 2
    assert "--inner-lr was 0.01" in done.output
    assert checkpoint(tmp_path)["iteration"] == 2


def test_rejects_fewer_iterations_than_done(tmp_path):
    sinusoid(tmp_path, "--iterations", "4")
    assert "past --iterations 2" in sinusoid(tmp_path, "--iterations", "2", "--resume").output


def test_rejects_to_overwrite_a_run_silently(tmp_path):
    sinusoid(tmp_path, "--iterations", "4")
    assert sinusoid(tmp_path, "--iterations", "2").exit_code == 2
    assert checkpoint(tmp_path)["iteration"] == 4
    assert sinusoid(tmp_path, "--iterations", "2", "--overwrite").exit_code == 0
    assert checkpoint(tmp_path)["iteration"] == 2


@pytest.mark.parametrize("command", ["sinusoid", "omniglot"])
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--inner-lr nan", 2, "'--inner-lr': nan is not finite"),
        ("--inner-lr inf", 2, "'--inner-lr': inf is not finite"),
        ("--outer-lr nan", 2, "'--outer-lr': nan is not finite"),
        ("--outer-lr -1", 2, "'--outer-lr': -1.0 is not in the range x>=0"),
        ("--backend triton", 1, "backend 'triton' cannot run here: out of order"),
        ("--resume --overwrite", 2, "--overwrite begins anew: pass one"),
        ("--threads 3", 2, "'--threads': there are 2 cores, got 3"),
    ],
    ids=["inner-nan", "inner-inf", "outer-nan", "outer-negative", "backend", "resume-overwrite", "threads"],
)
def test_rejects_options(tmp_path, monkeypatch, command, options, code, message):
    monkeypatch.setattr("fastmeta.backends.triton.missing", lambda: "out of order")
    monkeypatch.setattr(sys.modules["fastmeta.cli.train.run"], "usable_cores", lambda: [0, 1])
    done = CliRunner().invoke(main, ["train", command, "--out", str(tmp_path / "run"), *options.split()])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()


def test_rejects_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    done = sinusoid(tmp_path / "file" / "run", "--iterations", "2")
    assert done.exit_code == 1
    assert "--out: cannot make the folder" in done.output
    monkeypatch.setattr("os.access", lambda path, mode: False)
    done = sinusoid(tmp_path / "run", "--iterations", "2")
    assert done.exit_code == 1
    assert "--out: cannot write into the folder" in done.output
    assert not list((tmp_path / "run").iterdir())


def test_rejects_a_backend_that_cannot_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmeta.backends.cpu.refuses", lambda problem, wrt: "not today")
    done = sinusoid(tmp_path, "--backend", "cpu")
    assert done.exit_code == 1
    assert "backend='cpu' cannot run this call: not today" in " ".join(done.output.split())


def test_rejects_a_loss_that_diverges(tmp_path):
    done = sinusoid(
        tmp_path, "--iterations", "4", "--inner-lr", "1e30", "--inner-steps", "3", "--outer-lr", "10"
    )
    assert done.exit_code == 1
    assert "try a smaller --inner-lr" in done.output
    assert "tasks diverged" in " ".join(done.output.split())


def test_tensorboard_writes_events(tmp_path):
    done = sinusoid(tmp_path, "--iterations", "4", "--tensorboard")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_rejects_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = sinusoid(tmp_path, "--iterations", "4", "--tensorboard")
    assert done.exit_code == 2
    assert "pip install 'fastmeta[tensorboard]'" in done.output


def test_says_that_there_is_no_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = sinusoid(tmp_path, "--iterations", "2")
    assert done.exit_code == 0
    assert "fastmeta[plot]" in done.output
    assert not (tmp_path / "adaptation.png").exists()


def test_diverged_tasks_are_counted():
    from fastmeta.cli.train.sinusoid import Errors

    mean, median, diverged = Errors(torch.tensor([[1.0, 2.0, 3.0, 1e6, float("nan")]])).row(0)
    assert diverged == 2
    assert median == 2.0
    assert not mean <= 1e6


@pytest.mark.parametrize("rule", ["adam", "lion"])
def test_inner_rules_train(tmp_path, rule):
    plain, other = tmp_path / "plain", tmp_path / "other"
    options = ("--iterations", "4", "--inner-steps", "2")
    assert sinusoid(plain, *options).exit_code == 0
    done = sinusoid(other, *options, "--inner-rule", rule)
    assert done.exit_code == 0, done.output
    mine, theirs = (rows(folder / "result.csv") for folder in (other, plain))
    assert mine[1]["mse_mean"] != theirs[1]["mse_mean"]
    assert all(float(row["mse_mean"]) < 100 for row in mine)


def test_inner_rules_are_rules():
    assert len({make() for make in RULES.values()}) == len(RULES)
