"""Omniglot, 50 alphabets of handwritten characters, read from the official zip files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from fastmeta.data.files import RemoteFile, data_root, find

ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"

#: Part of Omniglot -> checksum of its zip file.
CHECKSUMS = {
    "background": ("md5", "68d2efa1b9178cc56df9314c21c6e718"),
    "evaluation": ("md5", "6b91aef0f799c5bb55b94e3f2daec811"),
    "background_small1": ("sha256", "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
    "background_small2": ("sha256", "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"),
}

_Files = dict[str, list[str]]  # "alphabet/characterNN" -> names in the zip file, in drawer order


class Omniglot:
    """Drawings of characters in memory, class by class; `Episodes` samples tasks from it.

    A drawing becomes grey, is resized with Pillow's antialiasing LANCZOS filter, and is inverted as
    in the literature: 1 is ink, 0 is paper. A rotation by 90, 180 or 270 degrees,
    counter-clockwise, makes another class. Classes are sorted by rotation, then by part, then by
    name.

    Args:
        root: folder that holds the zip files, or holds a folder `omniglot` that does; None means
            the environment variable FASTMETA_DATA.
        parts: which zip files, one name or several: "background" (30 alphabets, 964 characters),
            "evaluation" (20, 659), "background_small1" (5, 136), "background_small2" (5, 156).
        alphabets: names of the alphabets to take; None means all of `parts`.
        size: height and width of the images, in pixels; the originals have 105.
        rotations: in degrees, from 0, 90, 180, 270.
        download: fetch missing files from the author's repository into root/omniglot, checksum
            verified.

    Attributes:
        images: [classes, 20, 1, size, size] float32 in 0 .. 1.
        classes: a name for each class: "alphabet/characterNN", with "@degrees" after it where
            rotated.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: there is no data folder, or a file is missing and `download` is false.
        OSError: a download failed.
        ValueError: an argument is out of range, an alphabet is unknown or in two of the `parts`, a
            download has a wrong checksum, or a zip file cannot be read.

    Source: Lake, Salakhutdinov, Tenenbaum 2015, Human-level concept learning through probabilistic
        program induction; rotations as classes: Santoro et al. 2016, section 4.
    """

    images: Tensor
    classes: list[str]

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        parts: str | Sequence[str] = "background",
        alphabets: Iterable[str] | None = None,
        size: int = 28,
        rotations: Sequence[int] = (0,),
        download: bool = False,
    ) -> None:
        parts = [parts] if isinstance(parts, str) else list(parts)
        _check(parts, size, rotations, alphabets)
        pillow = _pillow()
        folder = data_root("Omniglot", root)
        paths = [_locate(folder, part, download) for part in parts]
        held = [_contents(path) for path in paths]
        wanted = _choose(parts, held, alphabets)

        self.classes = []
        drawings = []
        for path, files in zip(paths, held, strict=True):
            with ZipFile(path) as archive:
                for character in sorted(files):
                    if _alphabet(character) in wanted:
                        self.classes.append(character)
                        drawings.append([_image(pillow, archive, name, size) for name in files[character]])
        _check_counts(self.classes, drawings)

        upright = (
            1.0 - torch.from_numpy(np.array(drawings)).unsqueeze(2).float() / 255.0
        )  # [C, 20, 1, size, size]
        self.images = torch.cat([torch.rot90(upright, angle // 90, (-2, -1)) for angle in rotations])
        self.classes = [f"{name}@{angle}" if angle else name for angle in rotations for name in self.classes]

    @classmethod
    def small_split(
        cls, root: str | os.PathLike[str] | None = None, *, size: int = 28, download: bool = False
    ) -> tuple[Omniglot, Omniglot]:
        """The split (train, test) of the two small background sets, with no alphabet in both.

        Meta-training: all of small2 in four rotations, 624 classes. Meta-testing: Balinese,
        Early_Aramaic and Korean of small1, upright, 86 classes. Arguments and errors are those of
        `Omniglot`.
        """
        train = cls(
            root, parts="background_small2", size=size, rotations=(0, 90, 180, 270), download=download
        )
        held_out = ("Balinese", "Early_Aramaic", "Korean")
        test = cls(root, parts="background_small1", alphabets=held_out, size=size, download=download)
        return train, test


def _check(
    parts: Sequence[str], size: int, rotations: Sequence[int], alphabets: Iterable[str] | None
) -> None:
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= CHECKSUMS.keys():
        known = ", ".join(CHECKSUMS)
        raise ValueError(f"Omniglot: `parts` must be one or several, each once, of {known}, got {parts!r}")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"Omniglot: `size` must be an integer, at least 1, got {size!r}")
    angles = list(rotations)
    if not angles or len(set(angles)) < len(angles) or not set(angles) <= {0, 90, 180, 270}:
        raise ValueError(
            f"Omniglot: `rotations` must be some, each once, of 0, 90, 180, 270, got {rotations!r}"
        )
    if isinstance(alphabets, str):
        raise ValueError(f"Omniglot: `alphabets` must be a list of names, got the string {alphabets!r}")


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Omniglot: reading drawings needs Pillow: pip install 'fastmeta[data]'") from error
    return Image


def _locate(folder: Path, part: str, download: bool) -> Path:
    remote = RemoteFile(f"{ADDRESS}/images_{part}.zip", *CHECKSUMS[part])
    return find("Omniglot", folder, "omniglot", remote, download)


def _contents(path: Path) -> _Files:
    """What a zip file holds: .../alphabet/characterNN/NNNN_MM.png."""
    try:
        with ZipFile(path) as archive:
            entries = sorted(archive.namelist())
    except BadZipFile as error:
        message = f"Omniglot: {path} is not a zip file ({error}); delete it and pass `download=True`"
        raise ValueError(message) from error
    files: _Files = {}
    for entry in entries:
        name = PurePosixPath(entry)
        if name.suffix == ".png" and len(name.parts) >= 3:
            files.setdefault("/".join(name.parts[-3:-1]), []).append(entry)
    if not files:
        raise ValueError(f"Omniglot: {path} has no drawings named alphabet/characterNN/NNNN_MM.png")
    return files


def _alphabet(character: str) -> str:
    return character.partition("/")[0]


def _choose(parts: Sequence[str], held: Sequence[_Files], alphabets: Iterable[str] | None) -> set[str]:
    """The alphabets to take: each is known, and in one part only, as a class may not come twice."""
    owner: dict[str, str] = {}
    wanted = None if alphabets is None else set(alphabets)
    for part, files in zip(parts, held, strict=True):
        for alphabet in {_alphabet(character) for character in files}:
            if alphabet in owner and (wanted is None or alphabet in wanted):
                both = f"{owner[alphabet]} and {part}"
                raise ValueError(f"Omniglot: `parts` must not share an alphabet, got {alphabet} in {both}")
            owner[alphabet] = part
    if wanted is None:
        return set(owner)
    if not wanted or not wanted <= owner.keys():
        known = ", ".join(sorted(owner))
        raise ValueError(f"Omniglot: `alphabets` must be some of {known}, got {sorted(wanted)}")
    return wanted


def _image(pillow: Any, archive: ZipFile, name: str, size: int) -> np.ndarray[Any, Any]:
    """One drawing as grey levels [size, size], uint8, 255 is paper."""
    try:
        with archive.open(name) as file, pillow.open(file) as image:
            # Grey first: Pillow resizes one-bit images by nearest neighbour, with any filter.
            grey = image.convert("L")
            return np.asarray(grey.resize((size, size), pillow.Resampling.LANCZOS))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may make zipfile, zlib and Pillow raise anything
        where = f"{name} in {archive.filename}"
        message = f"Omniglot: {where} cannot be read ({error}); delete the file, then download it"
        raise ValueError(message) from error


def _check_counts(classes: Sequence[str], drawings: Sequence[Sequence[Any]]) -> None:
    for name, images in zip(classes, drawings, strict=True):
        if len(images) != len(drawings[0]):
            raise ValueError(
                f"Omniglot: every character must have {len(drawings[0])} drawings, {name} has {len(images)}"
            )
