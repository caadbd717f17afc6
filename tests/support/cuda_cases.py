"""Cases of the cuda backend, and their PTX, for several tests."""

from functools import partial
from pathlib import Path

from fastmeta.backends.cuda import compile as compiler
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp

#: Too large for one block of an H100, and for two.
TWO = Case(
    "two",
    partial(mlp, (64, 96, 96, 64, 5), "tanh"),
    (64,),
    1,
    3,
    2,
    loss="ce",
    rates="element",
    wrt_inputs=False,
)
FOUR = Case(
    "four",
    partial(mlp, (64, 128, 128, 128, 5), "tanh"),
    (64,),
    1,
    3,
    2,
    loss="ce",
    rates="element",
    wrt_inputs=False,
)


def ptx(source: str, architecture: str) -> bytes:
    """What NVRTC makes of a generated source, for such as "compute_80"."""
    from cuda.bindings import nvrtc

    options = (
        f"-arch={architecture} -std=c++17 -default-device -I{Path(compiler.source_folder(), 'cuda')}".encode()
    )
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (done,) = nvrtc.nvrtcCompileProgram(program, len(options.split()), options.split())
    assert done == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = b" " * size
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text
