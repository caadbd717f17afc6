"""`fastmeta train omniglot` on made-up drawings."""

from __future__ import annotations

from zipfile import ZipFile

import pytest
import torch
from click.testing import CliRunner
from test_cli_train import checkpoint, rows

from fastmeta.cli import main
from fastmeta.cli.train.omniglot import Accuracy

pillow = pytest.importorskip("PIL.Image")

SMALL = """--ways 3 --query 2 --tasks 2 --eval-episodes 5 --eval-query 2 --eval-steps 2
           --iterations 4 --log-every 2""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Zip files named like the official ones: three alphabets, four characters each, four drawings each."""
    folder = tmp_path_factory.mktemp("omniglot")
    generator = torch.Generator().manual_seed(0)
    for part, alphabets in {"small1": ("Balinese", "Early_Aramaic", "Korean"), "small2": ("Sanskrit",)}.items():
        with ZipFile(folder / f"images_background_{part}.zip", "w") as archive:
            for alphabet in alphabets:
                for character in range(1, 5):
                    for drawing in range(1, 5):
                        pixels = torch.randint(0, 2, (105, 105), generator=generator, dtype=torch.uint8) * 255
                        name = f"{part}/{alphabet}/character{character:02}/{character:04}_{drawing:02}.png"
                        with archive.open(name, "w") as file:
                            pillow.fromarray(pixels.numpy()).convert("1").save(file, "png")
    return folder


def omniglot(data, out, *arguments):
    command = ["train", "omniglot", *SMALL, "--data", str(data), "--out", str(out), *arguments]
    return CliRunner().invoke(main, command)


def test_writes_metrics_result_and_plot(tmp_path, data):
    done = omniglot(data, tmp_path)
    assert done.exit_code == 0, done.output
    assert [row["iteration"] for row in rows(tmp_path / "metrics.csv")] == ["2", "4"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "metrics.csv"))
    assert [row["steps"] for row in rows(tmp_path / "result.csv")] == ["0", "1", "2"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "result.csv"))
    assert (tmp_path / "adaptation.png").exists()
    assert "5 episodes" in done.output


@pytest.mark.parametrize("model", ["mlp-bn", "conv4", "conv4-strided"])
def test_trains_every_model(tmp_path, data, model):
    done = omniglot(data, tmp_path, "--model", model, "--width", "4")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "episode.png").exists()
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows(tmp_path / "result.csv"))


def test_resumed_equals_uninterrupted(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert omniglot(data, whole).exit_code == 0
    assert omniglot(data, parts, "--iterations", "3").exit_code == 0
    assert omniglot(data, parts, "--iterations", "4", "--resume").exit_code == 0
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


def test_rejects_more_ways_than_classes(tmp_path, data):
    done = omniglot(data, tmp_path, "--ways", "100")
    assert done.exit_code == 2
    assert "`ways` must be at most" in done.output
