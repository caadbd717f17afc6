"""What passes between the operators and the backends: one checked problem in, one result out.

An operator (`fastmeta.ops`) checks what the user gave and writes it down as a `Problem`; a backend
(`fastmeta.backends`) answers with a `Result`. A backend may rely on everything said here.

The scalar whose gradients a backend returns is

    J = sum_t c_t * (sum_k s_k * Q_t(theta_{t,k}) + sum_k w_k * L_{t,k}(theta_{t,k}))
        + <adapted_grad, theta_K> + <output_grad, output>

with c_t = task_weights[t] / T (1 / T when `task_weights` is None), s_k = `step_weights[k]`, Q_t the
query loss of task t, w_k = `support_step_weights[k]` and L_{t,k} the support loss of its step k,
before the update. A term whose ingredients are absent (no query loss, no cotangent) is absent from
the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch import device as Device
from torch import dtype as Dtype

from fastmeta.inputs import Tree, first_leaf

if TYPE_CHECKING:
    from fastmeta.graph.program import Program
    from fastmeta.losses import Loss
    from fastmeta.network.swap import Exchange
    from fastmeta.update_rules import UpdateRule

#: Everything that a gradient can be asked for, besides nothing at all.
DIFFERENTIABLE = (
    "params",
    "lr",
    "rule",
    "support_x",
    "support_y",
    "support_weights",
    "query_x",
    "query_y",
    "query_weights",
)


#: memory="auto" stores activations while what they take (see `Problem.memory`) stays below this
#: many bytes.
STORE_AT_MOST = 256 << 20


class Scratch(dict[str, Any]):
    """A dict that can be referred to weakly."""


@dataclass(slots=True)
class Batch:
    """The support or the query sets of all tasks.

    `x` is [T, N, *in], or [T, K, N, *in] for a support set with `per_step`; `y` has the same
    leading dimensions and is None where no loss is asked for; `weights` is [T, N] or [T, K, N] or
    None.

    `x` and `y` may be trees of tensors instead, as `fastmeta.inputs` says. A backend that has a
    `program` gets one tensor for `x`, and one that has a loss with a name one tensor for `y`.
    """

    x: Tree
    y: Tree = None
    weights: Tensor | None = None
    per_step: bool = False

    @property
    def examples(self) -> int | None:
        """N, that of the first tensor of `x`; None where that has no dimension for it."""
        shape = first_leaf(self.x).shape[2 if self.per_step else 1 :]
        return shape[0] if shape else None


@dataclass(frozen=True, slots=True)
class Captures:
    """What is wanted of the tensors that require grad and that the network or a loss reads past its
    arguments.

    Backends that run a layer program need not look for any: a network or a loss that reads one does
    not get to them.
    """

    gradients: bool  # else only which they are; their gradients are then zeros
    # gives more of them, which require no grad themselves: the parts of a flattened module
    also: Callable[[], Sequence[Tensor]] | None = None
    known: tuple[Tensor, ...] = ()  # what an earlier evaluation has found
    watch: bool = False  # there is something to be found


@dataclass(slots=True, kw_only=True)
class Problem:
    """One batch of tasks, checked: T tasks, K = `steps` inner steps.

    Tensors share one device; floating-point tensors share the dtype of the parameters. They may be
    non-contiguous and may require grad: a backend detaches and never modifies them.
    """

    net: nn.Module
    params: dict[str, Tensor]  # every parameter of net: [*shape], or [T, *shape] if named in per_task
    per_task: frozenset[str]  # names of the parameters that every task has its own of
    tasks: int  # T >= 1
    steps: int  # K >= 0
    support: Batch | None = None  # None iff steps == 0 and nothing needs it
    query: Batch | None = None  # y is None: only the output is wanted
    loss: Loss | None = None  # support loss; None iff support is None
    query_loss: Loss | None = None  # None iff query is None or query.y is None
    rates: dict[str, Tensor] = field(default_factory=dict)
    # ^ adapted parameter name -> [K or 1, T or 1, *S] or [K or 1, T or 1, *1s], nothing in between,
    # K counted at least   1 when steps == 0; a parameter without an entry is not adapted
    rule: UpdateRule | None = None  # its `form`; None iff support is None
    hyper: dict[str, Tensor] = field(default_factory=dict)
    # ^ the learned numbers of the rule by name, () or [K]; of a rule of the user's own the
    #   parameters of its module
    order: str = "second"  # "second" | "first"
    step_weights: tuple[float, ...] | None = None  # K + 1 numbers; None: (0, ..., 0, 1)
    support_step_weights: tuple[float, ...] | None = None  # K numbers; None: all zero
    task_weights: Tensor | None = None  # [T]
    memory: str = (
        "auto"  # "auto" | "store" | "recompute": the activations of every inner step, of what runs at once;
        # "checkpoint": not even theta and the state of the rule of every step
    )
    memory_limit: int | None = None  # bytes that those of all tasks may take with "checkpoint"
    task_chunk: int | None = (
        None  # at most so many tasks at a time, where a backend runs all of them side by side
    )
    batch_stats: str = (
        "task"  # "task" | "running" | "module"; `program`, where there is one, was captured for it
    )
    adapted_grad: dict[str, Tensor] | None = None  # cotangents of theta_K: name -> [T, *shape], all names
    output_grad: Tree = None  # cotangent of the output at theta_K: [T, M, *out], or a tree
    program: Program | None = None  # the captured network, or None
    refused: str = ""  # why there is no program
    prefer_flat: bool = False  # whoever returns `Gradients.flat_params` may leave `Gradients.params` None
    autocast: Dtype | None = None  # what forward passes compute in; the `torch` backend's own
    scratch: Scratch = field(default_factory=Scratch)
    # ^ a place for what a backend derives from everything but values and strides of tensors: the
    # operators hand over   the same dict with every problem that differs from an earlier one in
    # those only (same `wrt` and `adapted` too)
    frozen: frozenset[str] = frozenset()  # parameters whose gradients nobody reads: they may be zeros
    captures: Captures | None = None  # None: nothing is wanted of captured tensors
    third: bool = False  # a third derivative is taken, which those of PyTorch's fused norms are not right in
    exchange: Exchange | None = None  # of net, where a backend that runs the module itself has made it

    @property
    def device(self) -> Device:
        """Where all tensors are."""
        return next(iter(self.params.values())).device


@dataclass(slots=True)
class Gradients:
    """Gradients of J, None where not asked for; shapes are those of the problem's own tensors.

    `params` holds every parameter (zeros where J does not depend on it), `lr` every entry of
    `rates`, `rule` every entry of `hyper`. The gradient by a tree is a tree of the same form, as
    `fastmeta.inputs` says.
    """

    params: dict[str, Tensor] | None = None
    lr: dict[str, Tensor] | None = None
    rule: dict[str, Tensor] | None = None
    support_x: Tree = None
    support_y: Tree = None
    support_weights: Tensor | None = None
    query_x: Tree = None
    query_y: Tree = None
    query_weights: Tensor | None = None
    flat_params: Tensor | None = (
        None  # if a backend has them so: params, in order, in one vector; see `prefer_flat`
    )
    captured: list[tuple[Tensor, Tensor]] | None = None  # (tensor, gradient), where `captures` asked for it


@dataclass(slots=True)
class Result:
    """The answer to a problem; all tensors are fresh, detached and own (or share among themselves)
    their memory."""

    # [T]: sum_k s_k Q_t(theta_k) + sum_k w_k L_{t,k}, without c_t; None without a query loss
    task_losses: Tensor | None = None
    output: Tree = None  # [T, M, *out] at theta_K, or a tree; None without a query
    adapted: dict[str, Tensor] | None = None  # every name -> [T, *shape]; None unless asked for
    grads: Gradients = field(default_factory=Gradients)
    loss: Tensor | None = None  # (): sum_t c_t task_losses[t], if the backend has it so
