"""Writes the list of the engine's layer kinds, as the files csrc/cpu/layers/<kind>.h say it.

    python csrc/layer_kinds.py FOLDER

FOLDER then holds two headers: layer_kinds.h, the list as a macro, and layer_files.h, which includes
the file of every kind. They are written anew only where the list has changed, so that nothing else
is compiled again.
"""

from __future__ import annotations

import sys
from pathlib import Path

LAYERS = Path(__file__).parent / "cpu" / "layers"


def write(folder: Path) -> None:
    """The two headers in this folder.

    Args:
        folder: where they go; the compiler must look for headers there (-I).
    """
    kinds = sorted(path.stem for path in LAYERS.glob("*.h"))
    made = "// Made by csrc/layer_kinds.py.\n#pragma once\n\n"
    headers = {
        "layer_kinds.h": f"#define FM_LAYER_KINDS(X) {' '.join(f'X({kind})' for kind in kinds)}\n",
        "layer_files.h": "".join(f'#include "cpu/layers/{kind}.h"\n' for kind in kinds),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in headers.items():
        header = folder / name
        if not header.exists() or header.read_text() != made + text:
            header.write_text(made + text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
