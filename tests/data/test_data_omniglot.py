"""fm.data.Omniglot: official zip files, found, verified, read, inverted, rotated."""

import hashlib
import io
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from omniglot_files import official_root

from fastmeta.data import Episodes, Omniglot
from fastmeta.data import omniglot as module
from fastmeta.data.files import RemoteFile, fetch

Image = pytest.importorskip("PIL.Image", reason="Pillow not installed")


def write_zip(path: Path, characters: dict[str, int]) -> Path:
    """A zip file in the official layout: "alphabet/characterNN" -> number of drawings, ink in the
    top left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/", b"")
        for number, (character, drawings) in enumerate(characters.items()):
            for drawing in range(1, drawings + 1):
                image = Image.new("1", (105, 105), 1)
                # A mark on the grid of 28 pixels, 3.75 each, long enough for the inside of it to be
                # pure ink.
                image.paste(0, (0, 0, 45, 15 * drawing))
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                archive.writestr(f"{path.stem}/{character}/{number:04}_{drawing:02}.png", buffer.getvalue())
    return path


TWO = {"Mkhedruli/character02": 3, "Mkhedruli/character01": 3, "Angelic/character01": 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_zip(tmp_path / "images_background.zip", TWO)
    return tmp_path


def test_classes_are_sorted_and_ink_is_one(root):
    data = Omniglot(root)
    assert data.classes == ["Angelic/character01", "Mkhedruli/character01", "Mkhedruli/character02"]
    assert data.images.shape == (3, 3, 1, 28, 28)
    assert data.images.dtype == torch.float32
    assert data.images.min() == 0.0
    assert data.images.max() == 1.0
    for drawing in range(3):
        image = data.images[2, drawing, 0]
        rows, columns = 4 * (drawing + 1), 12
        assert (image[1 : rows - 4, 1 : columns - 4] == 1).all()
        assert (image[rows + 4 :] == 0).all()
        assert (image[:, columns + 4 :] == 0).all()
        assert abs(image.sum().item() / (rows * columns) - 1) < 0.02


def test_edges_are_grey(tmp_path):
    write_zip(tmp_path / "images_background.zip", {"A/character01": 1})
    image = Omniglot(tmp_path, size=20).images[0, 0, 0]
    assert image.shape == (20, 20)
    assert ((image > 0.05) & (image < 0.95)).any()


def test_original_size_is_exact(root):
    image = Omniglot(root, size=105).images[0, 0, 0]
    expected = torch.zeros(105, 105)
    expected[:15, :45] = 1
    assert torch.equal(image, expected)


def test_rotations_are_classes_of_their_own(root):
    data = Omniglot(root, rotations=(0, 90, 180, 270))
    upright = Omniglot(root).images
    assert data.images.shape == (12, 3, 1, 28, 28)
    assert data.classes[3:7] == [
        "Angelic/character01@90",
        "Mkhedruli/character01@90",
        "Mkhedruli/character02@90",
        "Angelic/character01@180",
    ]
    for turn in range(4):
        assert torch.equal(data.images[3 * turn : 3 * turn + 3], torch.rot90(upright, turn, (3, 4)))
    # Counter-clockwise: the mark goes from the top left to the bottom left.
    assert data.images[3, 0, 0, 27, 0] == 1.0


def test_alphabets_and_parts_choose_classes(root):
    write_zip(root / "omniglot" / "images_evaluation.zip", {"Atlantean/character01": 3})
    assert Omniglot(root, alphabets=["Angelic"]).classes == ["Angelic/character01"]
    both = Omniglot(root, parts=("background", "evaluation"), alphabets={"Angelic", "Atlantean"})
    assert both.classes == ["Angelic/character01", "Atlantean/character01"]


def test_root_comes_from_the_environment(root, monkeypatch):
    monkeypatch.setenv("FASTMETA_DATA", str(root))
    assert len(Omniglot().classes) == 3


def test_episodes_sample_from_it(root):
    data = Omniglot(root)
    sizes = {"ways": 2, "shots": 1, "query": 2, "tasks": 3, "iterations": 2}
    episode, expected = (Episodes(source, **sizes)[1] for source in (data, data.images))
    assert episode.query_x.shape == (3, 4, 1, 28, 28)
    assert all(torch.equal(a, b) for a, b in zip(episode, expected, strict=True))


def test_official_small_split():
    train, test = Omniglot.small_split(official_root())
    assert train.images.shape == (156 * 4, 20, 1, 28, 28)
    assert test.images.shape == (86, 20, 1, 28, 28)
    alphabets = [{name.partition("/")[0] for name in part.classes} for part in (train, test)]
    assert alphabets[0] == {"Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"}
    assert alphabets[1] == {"Balinese", "Early_Aramaic", "Korean"}
    for part in (train, test):
        assert len(set(part.classes)) == len(part.classes) == len(part.images)
        assert part.images.min() == 0.0
        assert part.images.max() == 1.0
        # Strokes are thin: little ink, but some in every drawing.
        assert 0.03 < part.images.mean() < 0.2
        assert part.images.amax((2, 3, 4)).min() > 0.5


def test_official_checksums():
    root = official_root()
    for part in ("background_small1", "background_small2"):
        path = module._locate(root, part, download=False)
        algorithm, digest = module.CHECKSUMS[part]
        assert hashlib.new(algorithm, path.read_bytes()).hexdigest() == digest


def serve(monkeypatch, source: Path, digest: str | None = None) -> None:
    """Let downloads of the background set come from the folder of `source`."""
    monkeypatch.setattr(module, "ADDRESS", source.parent.as_uri())
    right = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setitem(module.CHECKSUMS, "background", ("md5", digest or right))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_download_lands_in_the_omniglot_folder(tmp_path, monkeypatch):
    serve(monkeypatch, write_zip(tmp_path / "server" / "images_background.zip", TWO))
    root = tmp_path / "data"
    assert len(Omniglot(root, download=True).classes) == 3
    assert files(root) == [root / "omniglot" / "images_background.zip"]
    # Found from now on, with the server gone.
    (tmp_path / "server" / "images_background.zip").unlink()
    assert len(Omniglot(root, download=True).classes) == 3


def test_rejects_a_wrong_checksum_and_leaves_nothing(tmp_path, monkeypatch):
    serve(monkeypatch, write_zip(tmp_path / "server" / "images_background.zip", TWO), digest="0" * 32)
    root = tmp_path / "data"
    with pytest.raises(ValueError, match=r"Omniglot: the md5 of .* must be 0{32}, got [0-9a-f]{32}"):
        Omniglot(root, download=True)
    assert files(root) == []


def test_failed_download_replaces_nothing(tmp_path, monkeypatch):
    target = tmp_path / "data" / "images_background.zip"
    target.parent.mkdir()
    target.write_bytes(b"old")
    remote = RemoteFile((tmp_path / "missing.zip").as_uri(), "md5", "0" * 32)
    with pytest.raises(OSError, match="No such file"):
        fetch("Omniglot", remote, target)
    source = write_zip(tmp_path / "server" / "images_background.zip", TWO)
    with pytest.raises(ValueError, match="the md5 of"):
        fetch("Omniglot", remote._replace(url=source.as_uri()), target)
    assert files(target.parent) == [target]
    assert target.read_bytes() == b"old"


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"images_background\.zip is neither in .* pass `download=True`"
    ):
        Omniglot(tmp_path)
    assert files(tmp_path) == []


def test_rejects_no_root(monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="pass `root=` or set the environment variable FASTMETA_DATA"):
        Omniglot()


def test_rejects_missing_pillow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'fastmeta\[data\]'"):
        Omniglot(root)


def test_rejects_a_broken_zip_file(tmp_path):
    (tmp_path / "images_background.zip").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"images_background\.zip is not a zip file"):
        Omniglot(tmp_path)


def test_rejects_unequal_characters(tmp_path):
    write_zip(tmp_path / "images_background.zip", {"A/character01": 3, "A/character02": 2})
    with pytest.raises(ValueError, match="every character must have 3 drawings, A/character02 has 2"):
        Omniglot(tmp_path)


def test_rejects_an_alphabet_in_two_parts(root):
    write_zip(root / "images_evaluation.zip", {"Angelic/character01": 3, "Atlantean/character01": 3})
    parts = ("background", "evaluation")
    with pytest.raises(ValueError, match="got Angelic in background and evaluation"):
        Omniglot(root, parts=parts)
    assert Omniglot(root, parts=parts, alphabets=["Atlantean"]).classes == ["Atlantean/character01"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"parts": "foreground"},
        {"parts": ()},
        {"parts": ("background", "background")},
        {"alphabets": ["Klingon"]},
        {"alphabets": []},
        {"alphabets": "Angelic"},
        {"size": 0},
        {"size": 28.0},
        {"rotations": ()},
        {"rotations": (45,)},
        {"rotations": (0, 0)},
    ],
    ids=str,
)
def test_rejects_bad_arguments(root, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Omniglot: `{name}` must be"):
        Omniglot(root, **arguments)
