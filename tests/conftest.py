"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from unchanged import watched

_FAILED: list[str] = []

#: Files that take a minute or more. They come first, so that at the end no worker has one of them
#: alone while the others wait.
_LONG = (
    "test_cuda_races", "test_triton_interpreted", "test_fuzzers", "test_interrupted", "test_cuda_backend",
    "test_examples_of_rules", "test_maml_plus_plus",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the rest as it was."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what failed."""
    if report.failed:
        _FAILED.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """A process for which the GPU does nothing more, since a kernel broke it, would fail all tests
    that it is given: one of several makes way for another."""
    if nodeid in _FAILED and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: on tensors this small, more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded() -> None:
    """The global generator begins where it always does."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Omniglot's small sets, made up: files named like the official ones, three alphabets each,
    four characters in an alphabet, four drawings of a character."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow not installed")
    folder = tmp_path_factory.mktemp("omniglot")
    generator = torch.Generator().manual_seed(0)
    alphabets = {
        "small1": ("Balinese", "Early_Aramaic", "Korean"),
        "small2": ("Greek", "Sanskrit", "Tagalog"),
    }
    for part, names in alphabets.items():
        with ZipFile(folder / f"images_background_{part}.zip", "w") as archive:
            for alphabet in names:
                for character in range(1, 5):
                    for drawing in range(1, 5):
                        pixels = torch.randint(0, 2, (105, 105), generator=generator, dtype=torch.uint8) * 255
                        name = f"{part}/{alphabet}/character{character:02}/{character:04}_{drawing:02}.png"
                        with archive.open(name, "w") as file:
                            pillow.fromarray(pixels.numpy()).convert("1").save(file, "png")
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_changed() -> Iterator[None]:
    """Every public call in every test leaves modules and torch's global state as they were."""
    with watched():
        yield
