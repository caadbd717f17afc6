"""PyTorch's compiler: whether there is one, and a traced function compiled by it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from fastmeta.undisturbed import asynchronous

#: Parts of the names of operators that read or write by indices.
_INDEXING = ("index", "gather", "scatter", "embedding", "take", "put", "nll_loss")


class CompileError(Exception):
    """PyTorch's compiler failed; says why."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled function of flat tensors.

    Args:
        run: tensors, shaped and laid out as the example was -> tensors.
        operators: in the traced graph.
        seconds: that the compiler took.
    """

    run: Callable[..., Sequence[Tensor]]
    operators: int
    seconds: float


@cache
def unsupported() -> str:
    """Why PyTorch's compiler cannot be used by this process at all, "" if it can."""
    try:
        from torch._dynamo.eval_frame import check_if_dynamo_supported
        from torch._inductor import compile  # noqa: F401

        check_if_dynamo_supported()
    except (ImportError, RuntimeError) as error:
        return f"PyTorch's compiler is not there ({_first_line(error)})"
    return ""


def no_cpp_compiler() -> str:
    """Why nothing can be compiled for the CPU, "" if it can."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if any(map(shutil.which, wanted)):
        return ""
    return f"there is no C++ compiler ({' or '.join(wanted)}), which PyTorch's compiler needs"


def compiled(graph: fx.GraphModule, example: Sequence[Tensor]) -> Compiled:
    """A traced function, compiled.

    Args:
        graph: of tensors like `example`; returns a list of tensors.
        example: says shapes, strides, dtypes and the device.

    Raises:
        CompileError: the compiler failed.
    """
    operators = sum(node.op == "call_function" for node in graph.graph.nodes)
    start = time.perf_counter()
    try:
        run = _inductor(graph, example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if asynchronous(error):
            raise
        raise CompileError(f"PyTorch's compiler failed: {_first_line(error)}") from error
    return Compiled(run, operators, time.perf_counter() - start)


def _inductor(graph: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    from torch._inductor import compile

    # One CUDA graph holds all steps of a call: the compiler is not to make its own. An index out of
    # range ends the process if one of several threads finds it; with one thread it is an error.
    threads = 1 if any(map(_indexes, graph.graph.nodes)) else torch.get_num_threads()
    options: dict[str, Any] = {"triton.cudagraphs": False, "cpp.threads": threads}
    with torch.no_grad():
        run: Callable[..., Sequence[Tensor]] = compile(graph, list(example), options=options)
    return run


def _indexes(node: fx.Node) -> bool:
    """Whether an operator reads or writes by indices."""
    name = str(node.target)
    return node.op == "call_function" and any(part in name for part in _INDEXING)


def _first_line(error: Exception) -> str:
    message = str(error).strip() or "no message"
    return f"{type(error).__name__}: {message.splitlines()[0]}"
