"""mini-ImageNet, 100 classes of ImageNet with 600 images each, in its three usual layouts."""

from __future__ import annotations

import csv
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.data.files import data_root

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
#: Mean and standard deviation of ImageNet's channels, of values in 0 .. 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Types of the arrays in a pickle: plain numbers. Objects would be pointers.
_NUMBERS = {"f4", "f8"} | {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
_MODULES = ("multiarray", "numeric")


class MiniImageNet(Dataset[tuple[Tensor, int]]):
    """One split of mini-ImageNet from files that the user has; `Episodes` samples tasks from it.

    Three layouts are known, looked for in this order:
        mini-imagenet-cache-<split>.pkl     a dict of image_data [images, H, W, 3] uint8 and
                                            class_dict {name: numbers}
        <split>/<class>/*.jpg               a folder for each class; .jpeg and .png too
        <split>.csv and images/             columns filename and label

    Args:
        root: the folder, or one that holds it as `mini-imagenet`; None means the environment
            variable FASTMETA_DATA.
        split: "train" (64 classes), "val" (16) or "test" (20).
        size: height and width of the images; others are resized with Pillow's antialiasing LANCZOS
            filter.
        normalise: subtract ImageNet's mean and divide by its standard deviation; else values are in
            0 .. 1.

    Attributes:
        classes: names of the classes, sorted; a label is an index into it.
        targets: the label of every image.

    Returns:
        Item i is ([3, size, size] float32, label).

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: there is no data folder, or none of the layouts in it.
        ValueError: an argument is out of range, or a file does not hold what its layout says.

    Source: Vinyals et al. 2016, Matching Networks, section 4.1.2; split: Ravi and Larochelle 2017,
        section 5.1.
    """

    classes: list[str]
    targets: list[int]

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        split: str = "train",
        size: int = 84,
        normalise: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(
                f"MiniImageNet: `split` must be one of {', '.join(map(repr, SPLITS))}, got {split!r}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"MiniImageNet: `size` must be a positive int, got {size!r}")
        try:
            import PIL.Image  # noqa: F401  # a missing one shows here, not in a worker
        except ImportError as error:
            raise ImportError("MiniImageNet needs Pillow: pip install 'fastmeta[data]'") from error
        self.size, self.normalise = size, normalise
        self._images: Sequence[Any]  # paths, or arrays [H, W, 3]
        folder = data_root("MiniImageNet", root)
        if (folder / "mini-imagenet").is_dir():
            folder = folder / "mini-imagenet"
        pickled, table = folder / f"mini-imagenet-cache-{split}.pkl", folder / f"{split}.csv"
        if pickled.is_file():
            named = _from_pickle(pickled)
        elif (folder / split).is_dir():
            named = _from_folders(folder / split)
        elif table.is_file():
            named = _from_table(table)
        else:
            expected = f"{pickled.name}, {split}/ or {table.name}"
            raise FileNotFoundError(f"MiniImageNet: `root` must hold {expected}, {folder} has none of them")
        self.classes = sorted({name for _, name in named})
        number = {name: at for at, name in enumerate(self.classes)}
        self._images = [image for image, _ in named]
        self.targets = [number[name] for _, name in named]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image  # no attribute: a module would keep the data set from being sent to workers

        source = self._images[index]
        image = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
        image = image.convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
        if self.normalise:
            pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return pixels, self.targets[index]


def _from_pickle(path: Path) -> list[tuple[Any, str]]:
    with path.open("rb") as file:
        try:
            held = _NumbersOnly(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"MiniImageNet: {path} cannot be read: {error}") from error
    try:
        images = _plain(held["image_data"])
        numbered = [
            (int(number), str(name))
            for name, numbers in held["class_dict"].items()
            for number in _plain(numbers)
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"MiniImageNet: {path} must hold image_data and class_dict") from error
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
    ):
        raise ValueError(f"MiniImageNet: image_data of {path} must be [images, H, W, 3] uint8")
    for number, name in numbered:
        if not 0 <= number < len(images):
            raise ValueError(
                f"MiniImageNet: {path} gives {name} image {number}, and has {len(images)} images"
            )
    return [(images[number], name) for number, name in numbered]


def _from_folders(folder: Path) -> list[tuple[Any, str]]:
    named: list[tuple[Any, str]] = []
    for held in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        images = sorted(path for path in held.iterdir() if path.suffix.lower() in SUFFIXES)
        if not images:
            raise ValueError(f"MiniImageNet: {held} holds no image ({', '.join(SUFFIXES)})")
        named += [(path, held.name) for path in images]
    if not named:
        raise ValueError(f"MiniImageNet: {folder} holds no class")
    return named


def _from_table(table: Path) -> list[tuple[Any, str]]:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"filename", "label"} <= rows[0].keys():
        raise ValueError(f"MiniImageNet: {table} must have the columns filename and label, and a row")
    for number, row in enumerate(rows, 1):
        if not row["filename"] or not row["label"]:
            raise ValueError(f"MiniImageNet: row {number} of {table} must have a filename and a label")
    named = [(table.parent / "images" / row["filename"], row["label"]) for row in rows]
    for path, _ in named:
        if not path.is_file():
            raise FileNotFoundError(f"MiniImageNet: {table} names {path}, which is missing")
    return named


class _Type:
    """Stands for a NumPy dtype in a pickle, which says its byte order after its name."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in _NUMBERS:
            raise pickle.UnpicklingError(f"it holds an array of type {name!r}")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """Stands for a NumPy array in a pickle, which gives its values after it."""

    values: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, of, fortran, data = state
        self.fill(data, of, shape, "F" if fortran else "C")

    def fill(self, data: Any, of: _Type, shape: tuple[int, ...], order: Any) -> None:
        data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
        self.values = np.frombuffer(data, of.numpy).reshape(shape, order=order)


class _NumbersOnly(pickle.Unpickler):
    """Reads strings, numbers, lists, dicts and arrays of numbers, and refuses all else.

    Anything else in a pickle could run code.

    NumPy's own constructors are not called: they make arrays of pointers out of the bytes of a
    file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return self._type
        if (module, name) == ("numpy", "ndarray"):
            return None  # only ever an argument of _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        known = {"_reconstruct": self._reconstruct, "_frombuffer": self._frombuffer, "scalar": self._scalar}
        if name in known and module in (
            f"numpy.{core}.{of}" for core in ("core", "_core") for of in _MODULES
        ):
            return known[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    # Methods, not functions or classes: a pickle can set no attribute of them.

    def _type(self, name: str, *_: object) -> _Type:
        return _Type(name)

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")

    def _reconstruct(self, *_: object) -> _Array:
        return _Array()

    def _frombuffer(self, data: Any, of: _Type, shape: tuple[int, ...], order: str, *_: object) -> _Array:
        array = _Array()
        array.fill(data, of, shape, order)
        return array

    def _scalar(self, of: _Type, data: Any) -> int:
        array = _Array()
        array.fill(data, of, (), "C")
        return int(array.values)


def _plain(held: Any) -> Any:
    return held.values if isinstance(held, _Array) else held
