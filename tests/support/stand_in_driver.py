"""When a library of the tests can stand in for the driver of a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from fastmeta.backends.cuda import compile as compiler

STAND_IN = [
    pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a driver"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this build of PyTorch would take the stand-in for a GPU"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is loaded by its name on Linux"),
]
