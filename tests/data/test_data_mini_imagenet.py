"""mini-ImageNet in the layouts that users have, made small by the tests."""

from __future__ import annotations

import csv
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmeta as fm
from fastmeta.data.mini_imagenet import MEAN, STD

pillow = pytest.importorskip("PIL.Image")

CLASSES, EACH = ("n01", "n02", "n03"), 4


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(CLASSES) * EACH, 84, 84, 3), dtype=np.uint8)


def make(root: Path, layout: str) -> Path:
    images = pixels()
    if layout == "pickle":
        numbers = {name: list(range(EACH * at, EACH * (at + 1))) for at, name in enumerate(CLASSES)}
        (root / "mini-imagenet-cache-train.pkl").write_bytes(
            pickle.dumps({"image_data": images, "class_dict": numbers})
        )
        return root
    rows = []
    for at, image in enumerate(images):
        name = CLASSES[at // EACH]
        folder = root / "train" / name if layout == "folders" else root / "images"
        folder.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(image).save(folder / f"{name}_{at:04}.png")
        rows.append({"filename": f"{name}_{at:04}.png", "label": name})
    if layout == "table":
        with (root / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["filename", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return root


@pytest.mark.parametrize("layout", ["pickle", "folders", "table"])
def test_layouts_hold_the_same_images(tmp_path: Path, layout: str) -> None:
    data = fm.data.MiniImageNet(make(tmp_path, layout), normalise=False)
    assert data.classes == list(CLASSES)
    assert data.targets == [0] * EACH + [1] * EACH + [2] * EACH
    want = torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(torch.stack([image for image, _ in data]), want)
    image, label = fm.data.MiniImageNet(tmp_path, size=20)[5]
    assert image.shape == (3, 20, 20)
    assert label == 1
    normal = fm.data.MiniImageNet(tmp_path)[0][0]
    assert torch.allclose(
        normal * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1), want[0], atol=1e-6
    )


def test_episodes_sample_tasks(tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    make(tmp_path / "mini-imagenet", "folders")
    data = fm.data.MiniImageNet(tmp_path, normalise=False)
    episodes = fm.data.Episodes(data, ways=2, shots=1, query=3, tasks=2, iterations=2)
    episode = episodes[0]
    assert episode.support_x.shape == (2, 2, 3, 84, 84)
    assert episode.query_y.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert torch.equal(episode.query_x, episodes[0].query_x)


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_rejects_pickles_that_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"image_data": Attack()}))
    with pytest.raises(ValueError, match="cannot be read: it asks for"):
        fm.data.MiniImageNet(tmp_path)
    assert not (tmp_path / "attacked").exists()


class Pointers:
    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"A" * 8)


@pytest.mark.parametrize("attack", [Pointers(), np.zeros(1, "V8"), np.array([object], dtype=object)])
def test_rejects_pickles_that_make_pointers(tmp_path: Path, attack: object) -> None:
    for held in ({"image_data": attack}, {"image_data": pixels(), "class_dict": {"n01": attack}}):
        (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(held))
        with pytest.raises(ValueError, match="cannot be read"):
            fm.data.MiniImageNet(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numbers", [list, np.array, lambda numbers: list(np.array(numbers, ">i4"))])
def test_reads_every_protocol(tmp_path: Path, protocol: int, numbers) -> None:
    held = {"image_data": pixels(), "class_dict": {"n01": numbers([3, 1])}}
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(held, protocol=protocol))
    data = fm.data.MiniImageNet(tmp_path, normalise=False)
    want = torch.from_numpy(pixels()[[3, 1]]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(torch.stack([image for image, _ in data]), want)


def test_reads_strings_of_python_2(tmp_path: Path) -> None:
    image = bytes(range(256))[-48:]
    quoted = "".join(f"\\x{byte:02x}" for byte in image)
    text = (
        "(dS'image_data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI4\nI4\nI3\nt"
        "cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'" + quoted + "'\ntb"
        "sS'class_dict'\n(dS'n01'\n(lI0\nass."
    )
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(text.encode("ascii"))
    data = fm.data.MiniImageNet(tmp_path, size=4, normalise=False)
    want = torch.tensor(list(image)).reshape(4, 4, 3).permute(2, 0, 1).float() / 255
    assert torch.equal(data[0][0], want)


@pytest.mark.parametrize("layout", ["pickle", "folders"])
def test_can_be_sent_to_workers(tmp_path: Path, layout: str) -> None:
    data = fm.data.MiniImageNet(make(tmp_path, layout))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[5][0], data[5][0])
    assert copy.targets == data.targets


def test_rejects_damaged_files(tmp_path: Path) -> None:
    pickled = tmp_path / "mini-imagenet-cache-train.pkl"
    for content in (b"", b"version https://example.org", b"I1x\n.", pickle.dumps(pixels())[:1000]):
        pickled.write_bytes(content)
        with pytest.raises(ValueError, match=r"mini-imagenet-cache-train\.pkl cannot be read"):
            fm.data.MiniImageNet(tmp_path)
    for number in (-1, 12):
        pickled.write_bytes(pickle.dumps({"image_data": pixels(), "class_dict": {"n01": [0, number]}}))
        with pytest.raises(ValueError, match=f"gives n01 image {number}, and has 12 images"):
            fm.data.MiniImageNet(tmp_path)
    (tmp_path / "val.csv").write_text("filename,label\na.png\n")
    with pytest.raises(ValueError, match=r"row 1 of .*val\.csv must have a filename and a label"):
        fm.data.MiniImageNet(tmp_path, split="val")


def test_rejects_what_is_no_mini_imagenet(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`root` must hold mini-imagenet-cache-train\.pkl, train/ or train\.csv"
    ):
        fm.data.MiniImageNet(tmp_path)
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'val', 'test', got 'dev'"):
        fm.data.MiniImageNet(tmp_path, split="dev")
    with pytest.raises(ValueError, match="`size` must be a positive int, got 0"):
        fm.data.MiniImageNet(tmp_path, size=0)
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image"):
        fm.data.MiniImageNet(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\nmissing.png,n01\n")
    with pytest.raises(FileNotFoundError, match="which is missing"):
        fm.data.MiniImageNet(tmp_path, split="test")
    broken = {"image_data": np.zeros((2, 4, 4)), "class_dict": {"n01": [0, 1]}}
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(broken))
    with pytest.raises(ValueError, match=r"must be \[images, H, W, 3\] uint8"):
        fm.data.MiniImageNet(tmp_path, split="val")
