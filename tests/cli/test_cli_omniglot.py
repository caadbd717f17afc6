"""`fastmeta train omniglot` on made-up drawings."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from training import checkpoint, rows

from fastmeta.cli import main
from fastmeta.cli.train.omniglot import Accuracy

pytest.importorskip("PIL.Image")

SMALL = """--ways 3 --query 2 --tasks 2 --eval-episodes 5 --eval-query 2 --eval-steps 2
           --iterations 4 --log-every 2""".split()


def omniglot(data, out, *arguments):
    command = ["train", "omniglot", *SMALL, "--data", str(data), "--out", str(out), *arguments]
    return CliRunner().invoke(main, command)


def test_writes_metrics_result_and_plot(tmp_path, drawings):
    done = omniglot(drawings, tmp_path)
    assert done.exit_code == 0, done.output
    assert [row["iteration"] for row in rows(tmp_path / "metrics.csv")] == ["2", "4"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "metrics.csv"))
    assert [row["steps"] for row in rows(tmp_path / "result.csv")] == ["0", "1", "2"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "result.csv"))
    assert (tmp_path / "adaptation.png").exists()
    assert "5 episodes" in done.output


@pytest.mark.parametrize("model", ["mlp-bn", "conv4", "conv4-strided"])
def test_trains_every_model(tmp_path, drawings, model):
    done = omniglot(drawings, tmp_path, "--model", model, "--width", "4")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "episode.png").exists()
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "result.csv"))


def test_resumed_equals_uninterrupted(tmp_path, drawings):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert omniglot(drawings, whole).exit_code == 0
    assert omniglot(drawings, parts, "--iterations", "3").exit_code == 0
    assert omniglot(drawings, parts, "--iterations", "4", "--resume").exit_code == 0
    a, b = checkpoint(whole)["maml"], checkpoint(parts)["maml"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(whole / "result.csv") == rows(parts / "result.csv")


def test_accuracy_has_a_normal_interval():
    accuracy = Accuracy.over(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert accuracy.mean == 0.5
    assert accuracy.interval == pytest.approx(1.96 * 3**-0.5 / 2)
    assert str(accuracy) == "50.0 ± 56.6 %"


def test_rejects_a_missing_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    done = omniglot(tmp_path / "nowhere", tmp_path / "out")
    assert done.exit_code == 1
    assert "Omniglot" in done.output
    assert not isinstance(done.exception, OSError)


def test_rejects_damaged_data(tmp_path, drawings):
    name = "images_background_small1.zip"
    right = (drawings / name).read_bytes()
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "out").mkdir()
    (data / "images_background_small2.zip").symlink_to(drawings / "images_background_small2.zip")
    refused = 0
    for place in range(0, len(right), len(right) // 15):
        (data / name).write_bytes(right[:place] + b"\xa5" * 9 + right[place + 9 :])
        # --resume without a checkpoint, so that what passes for whole ends here too.
        done = omniglot(data, tmp_path / "out", "--resume")
        assert isinstance(done.exception, SystemExit), (place, done.exception)
        assert len(done.stderr.strip().splitlines()) <= 4
        refused += "Omniglot: " in done.stderr
    assert refused > 7


def test_rejects_more_ways_than_classes(tmp_path, drawings):
    done = omniglot(drawings, tmp_path, "--ways", "100")
    assert done.exit_code == 2
    assert "`ways` must be at most" in done.output
