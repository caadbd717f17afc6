"""Where Omniglot's official files are, for tests that read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def official_root() -> Path:
    """Where the two small sets are, else the test is skipped."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    for folder in (Path(os.environ.get("FASTMETA_DATA") or beside), beside):
        for inside in (folder, folder / "omniglot"):
            if all((inside / f"images_background_small{n}.zip").is_file() for n in (1, 2)):
                return folder
    pytest.skip("Omniglot data not found")
