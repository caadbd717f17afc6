"""mini-ImageNet, 100 classes of ImageNet with 600 images each, in the layouts that it is passed around in."""

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
#: All that an array in a pickle is made of.
_SAFE = {
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric")
    for name in ("ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar")
} | {("_codecs", "encode")}


class MiniImageNet(Dataset[tuple[Tensor, int]]):
    """One split of mini-ImageNet from files that the user has; `Episodes` samples tasks from it.

    Three layouts are known, looked for in this order:
        mini-imagenet-cache-<split>.pkl     a dict of image_data [images, H, W, 3] uint8 and class_dict {name: numbers}
        <split>/<class>/*.jpg               a folder for each class; .jpeg and .png too
        <split>.csv and images/             columns filename and label

    Args:
        root: the folder, or one that holds it as `mini-imagenet`; None means the environment variable FASTMETA_DATA.
        split: "train" (64 classes), "val" (16) or "test" (20).
        size: height and width of the images; others are resized with Pillow's antialiasing LANCZOS filter.
        normalise: subtract ImageNet's mean and divide by its standard deviation; else values are in 0 .. 1.

    Attributes:
        classes: names of the classes, sorted; a label is a place in it.
        targets: the label of every image.

    Returns:
        Item i is ([3, size, size] float32, label).

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: there is no data folder, or none of the layouts in it.
        ValueError: an argument is out of range, or a file does not hold what its layout says.

    Source: Vinyals et al. 2016, Matching Networks, section 4.1.2; split: Ravi and Larochelle 2017, section 5.1.
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
            raise ValueError(f"MiniImageNet: `split` must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"MiniImageNet: `size` must be a positive int, got {size!r}")
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("MiniImageNet needs Pillow: pip install 'fastmeta[data]'") from error
        self._pillow, self.size, self.normalise = Image, size, normalise
        self._images: Sequence[Any]  # paths, or arrays [H, W, 3]
        folder = data_root("MiniImageNet", root)
        if (folder / "mini-imagenet").is_dir():
            folder = folder / "mini-imagenet"
        pickled, table = folder / f"mini-imagenet-cache-{split}.pkl", folder / f"{split}.csv"
        if pickled.is_file():
            named = self._from_pickle(pickled)
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
        source = self._images[index]
        image = self._pillow.open(source) if isinstance(source, Path) else self._pillow.fromarray(source)
        image = image.convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), self._pillow.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
        if self.normalise:
            pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return pixels, self.targets[index]

    def _from_pickle(self, path: Path) -> list[tuple[Any, str]]:
        with path.open("rb") as file:
            try:
                held = _ArraysOnly(file, encoding="latin1").load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
                raise ValueError(f"MiniImageNet: {path} cannot be read: {error}") from error
        try:
            images, classes = held["image_data"], held["class_dict"]
            named = [(images[int(number)], str(name)) for name, numbers in classes.items() for number in numbers]
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"MiniImageNet: {path} must hold image_data and class_dict that fit") from error
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"MiniImageNet: image_data of {path} must be [images, H, W, 3] uint8")
        return named


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
    named = [(table.parent / "images" / row["filename"], row["label"]) for row in rows]
    for path, _ in named:
        if not path.is_file():
            raise FileNotFoundError(f"MiniImageNet: {table} names {path}, which is missing")
    return named


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and NumPy arrays; anything else could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
