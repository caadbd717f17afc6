"""The network with parameters of its own for every task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastmeta.inputs import Tree
from fastmeta.ops.checks import Tensors
from fastmeta.ops.differentiable import Operation, run
from fastmeta.ops.eager import eager
from fastmeta.ops.options import Options


@eager
def task_forward(
    net: nn.Module,
    params: Mapping[str, Tensor],
    x: Tree,
    *,
    batch_stats: str = "task",
    task_chunk: int | None = None,
    backend: str = "auto",
) -> Tree:
    """The network's output for all tasks at once.

    Args:
        net: the network; its parameters are not used, `params` are.
        params: every parameter by its name in `net.named_parameters()`: [*shape], shared by all
            tasks, or [T, *shape], one for each task.
        x: inputs [T, N, *in], of any dtype; or a tree of tensors, see `fastmeta.Inputs`.
        batch_stats: batch norm by "task", the task's own batch; by the "running" statistics; or
            "module": each norm as the module itself does it, by its batch after .train(), by its
            running statistics after .eval(). Running statistics are never moved, unlike by the
            module itself.
        task_chunk: at most so many tasks at a time on the `torch` backend; None: all.
        backend: "auto", or the name of one.

    Returns:
        The output [T, N, *out]; of a network that returns several tensors, what it returns.

    Derivatives: differentiable in `params`, `x` and whatever requires grad that the network reads
        besides; more than once by plain autograd, where `create_graph=True` asks for it.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: the backend named cannot run this call.
    """
    return forward("task_forward", net, params, x, batch_stats, backend, task_chunk)


def forward(
    who: str,
    net: nn.Module,
    params: Mapping[str, Tensor],
    x: Tree,
    batch_stats: str,
    backend: str,
    task_chunk: int | None = None,
) -> Tree:
    """`task_forward` under another name in messages."""
    options = Options(who, batch_stats=batch_stats, backend=backend, task_chunk=task_chunk)
    return run(Operation(options, net, params, Tensors(query_x=x)))
