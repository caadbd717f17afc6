"""The module as a function of one task's parameters, under fastmeta's own conventions.

This is what the `reference` and `torch` backends evaluate, and what a captured layer program is
compared with.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.inputs import NotATreeError, Tree, arguments, first_leaf, leaves_of, mapped
from fastmeta.network import elementary
from fastmeta.network.checkpoints import Plain
from fastmeta.network.elementary_cells import CELLS
from fastmeta.network.elementary_recurrent import LAYERS
from fastmeta.network.swap import Carried, Exchange
from fastmeta.network.twice import REPLACED

_BATCH_STATS = ("task", "running", "module")


class NotTensorsError(TypeError):
    """A network returned something else than tensors."""

    def __init__(self, got: str) -> None:
        super().__init__(f"the network must return a tensor, or a tuple, list or dict of tensors, got {got}")
        self.got = got


def call(
    net: nn.Module | Exchange,
    params: Mapping[str, Tensor],
    x: Tree,
    *,
    batch_stats: str = "task",
    decompose: bool = False,
    carried: Carried | None = None,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
) -> Tree:
    """The network's output for one task.

    Args:
        net: the module; its parameters, buffers and attributes are the same objects afterwards.
            Whoever calls it often gives an `Exchange` of it.
        params: name, as in `net.named_parameters()`, -> tensor [*shape]; parameters left out keep
            the module's own.
        x: inputs [N, *in], or a tree of inputs as `fastmeta.inputs` has them; the network may write
            into its input, it gets a copy.
        batch_stats: "task": batch and instance norms use the statistics of `x`, in train and in
            eval mode, and leave the running ones alone. "running": norms that track running
            statistics use those. "module": each norm as its module, or the code that calls it, says
            by `training`; the running ones are left alone too.
        decompose: compute norms, attention, embeddings and recurrent networks from elementary
            operators, so that vmap and double backward are right together however they nest
            (autograd over `vmap(grad)` of fused norms is silently wrong, pytorch/functorch#534).
        carried: the state, in buffers and attributes, that the task's last forward pass left the
            module in, to start from and to be replaced; None: the module's own state.
        forwards: name of a submodule -> what it runs in the place of its own forward.

    Returns:
        The output [N, *out], or the tree that the module returns.

    Derivatives: twice differentiable in `params` and `x` wherever the module is.

    Raises:
        TypeError: the module returns something else than tensors.
        ValueError: a norm over the task's own batch would see one value per channel.
    """
    exchange = net if isinstance(net, Exchange) else Exchange(net)
    return _tensors(_run(exchange, params, x, Conventions(batch_stats, decompose), carried, forwards))


def call_then(
    net: nn.Module | Exchange,
    params: Mapping[str, Tensor],
    x: Tree,
    then: Callable[[Tree], Tensor],
    *,
    batch_stats: str = "task",
    decompose: bool = False,
    carried: Carried | None = None,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[Tensor, Tree]:
    """(`then(output)`, output) for one task: a loss and what it is of.

    Args:
        net, params, x, batch_stats, decompose, carried, forwards: as in `call`.
        then: finds in buffers and attributes of the module what the forward pass has left there (a
            penalty, features), but the module's own parameters.
    """
    exchange = net if isinstance(net, Exchange) else Exchange(net)
    found: list[Tensor] = []

    def note(output: Any) -> None:
        found.append(then(_tensors(output)))

    output = _run(exchange, params, x, Conventions(batch_stats, decompose), carried, forwards, note)
    return found[0], output


def _tensors(output: Any) -> Tree:
    if isinstance(output, Tensor):
        return output
    try:
        leaves = leaves_of(output)
    except NotATreeError as error:
        raise NotTensorsError(str(error)) from None
    if not leaves:
        raise NotTensorsError(type(output).__name__)
    return output


def _run(
    exchange: Exchange,
    params: Mapping[str, Tensor],
    x: Tree,
    conventions: Conventions,
    carried: Carried | None = None,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
    then: Callable[[Any], None] | None = None,
) -> Any:
    def forward() -> Any:
        with ExitStack() as stack:
            if first_leaf(x).is_cuda and any(
                isinstance(module, nn.RNNBase) for module in exchange.net.modules()
            ):
                # cuDNN's recurrent networks have no double backward, the others have.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules and any(map(_compiled, exchange.net.modules())):
                # compiled code would be compiled again for every task's own parameters, or has
                # failed to be
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(conventions)
            return _output(exchange.net, mapped(torch.clone, x), forwards or {})

    return exchange.run(params, forward, carried, then)


def _output(net: nn.Module, x: Tree, forwards: Mapping[str, Callable[..., Any]]) -> Any:
    """What the module returns; to be called inside of an exchange, which puts the forwards back if
    this does not."""
    replaced = [(vars(net.get_submodule(name)), function) for name, function in forwards.items()]
    try:
        for attributes, function in replaced:
            attributes["forward"] = function
        args, kwargs = arguments(x)
        return net(*args, **kwargs)
    finally:
        for attributes, _ in replaced:
            attributes.pop("forward", None)


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def by_own_batch(batch_stats: str, training: bool) -> bool:
    """Whether a call of batch norm takes the statistics of its own batch.

    Args:
        batch_stats: as in `call`.
        training: as in `F.batch_norm`.
    """
    return batch_stats == "task" or (batch_stats == "module" and training)


def norms_by_batch(net: nn.Module, batch_stats: str) -> list[str]:
    """The batch norms of a network that take the statistics of their own batch, as messages name
    them."""
    return [
        f"{name or 'the network itself'} ({type(module).__name__})"
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and by_own_batch(batch_stats, module.training or module.running_mean is None)
    ]


def normalises_by_batch(
    net: nn.Module, params: Mapping[str, Tensor], x: Tree, batch_stats: str = "task"
) -> bool:
    """Whether the network's code calls batch norm over its own batch, by a module or not: it is run
    once.

    Arguments as in `call`.
    """
    conventions, found = Conventions(batch_stats, False), []
    plain = conventions.replacements[F.batch_norm]
    signature = inspect.signature(F.batch_norm)

    def noticed(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if by_own_batch(batch_stats, given.arguments["training"]):
            found.append(True)
        return plain(*args, **kwargs)

    conventions.replacements[F.batch_norm] = noticed
    with torch.no_grad():
        _run(Exchange(net), params, x, conventions)
    return bool(found)


def check_batch_stats(net: nn.Module, batch_stats: str) -> None:
    """Check that the norms of `net` can normalise as `batch_stats` says.

    Args:
        net: the module.
        batch_stats: "task" | "running" | "module".

    Raises:
        ValueError: an unknown value, or a norm is to use running statistics that it has not yet (or
            never will): it would silently normalise with mean 0 and variance 1.
    """
    if batch_stats not in _BATCH_STATS:
        raise ValueError(f"`batch_stats` must be 'task', 'running' or 'module', got {batch_stats!r}")
    if batch_stats == "task":
        return
    needs = (
        "`batch_stats='running'` needs"
        if batch_stats == "running"
        else "`batch_stats='module'` in eval mode needs"
    )
    for name, module in net.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if batch_stats == "module" and (module.training or module.running_mean is None):
            continue
        where = f"{name or 'the network itself'} ({type(module).__name__})"
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            # Instance norm tracks without counting batches, so look at the statistics themselves.
            mean, var = module.running_mean, module.running_var
            if mean is not None and var is not None and not mean.any() and bool((var == 1).all()):
                raise ValueError(f"{needs} running statistics, {where} has seen no batch yet")
        elif (
            module.running_mean is None
            or module.num_batches_tracked is None
            or (module.training and not module.track_running_stats)
        ):
            raise ValueError(f"{needs} running statistics, {where} tracks none")
        elif int(module.num_batches_tracked) == 0:
            raise ValueError(f"{needs} running statistics, {where} has seen no batch yet")


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller has set."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def own(tensor: Tensor, requires_grad: bool = False) -> Tensor:
    """A leaf with the values of `tensor` and no ties to the caller's graph; to be called inside
    `isolated`."""
    leaf = tensor.clone() if tensor.is_inference() else tensor
    return leaf.detach().requires_grad_(requires_grad and leaf.is_floating_point())


class Conventions(Plain):
    """Replaces norms, attention and recurrent networks wherever a module, or its own code, calls
    them.

    While it is active no native fast path is taken: the attention modules look for it with
    has_torch_function.
    """

    def __init__(self, batch_stats: str, decompose: bool) -> None:
        super().__init__()
        self.replacements: dict[Any, Callable[..., Any]] = {
            F.batch_norm: lambda *args, **kwargs: _batch_norm(batch_stats, decompose, *args, **kwargs),
            F.instance_norm: lambda *args, **kwargs: _instance_norm(batch_stats, decompose, *args, **kwargs),
        }
        self.replacements.update(_DECOMPOSED if decompose else _TWICE_DIFFERENTIABLE)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    batch_stats: str,
    decompose: bool,
    x: Tensor,  # [N, C, ...]
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    own_batch = by_own_batch(batch_stats, training)
    if own_batch and x.numel() == x.shape[1]:
        raise ValueError(
            "batch norm over the task's own batch needs more than one value per channel, got an input of "
            f"shape {tuple(x.shape)}; `batch_stats='running'` can take it"
        )
    if not own_batch and (running_mean is None or running_var is None):
        why = "batch_stats='running'" if batch_stats == "running" else "training=False"
        raise ValueError(f"batch norm with `{why}` needs running statistics, and a call of it has none")
    mean, var = (None, None) if own_batch else (running_mean, running_var)
    if decompose or _bias_alone(weight, bias):
        return elementary.batch_norm(x, mean, var, weight, bias, eps)
    weight, bias = _dense(weight), _dense(bias)
    return F.batch_norm(x, mean, var, weight, bias, training=own_batch, eps=eps)


def _instance_norm(
    batch_stats: str,
    decompose: bool,
    x: Tensor,  # [N, C, ...]
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    own_batch = by_own_batch(batch_stats, use_input_stats) or running_mean is None
    mean, var = (None, None) if own_batch else (running_mean, running_var)
    if decompose or _bias_alone(weight, bias):
        return elementary.instance_norm(x, mean, var, weight, bias, eps)
    weight, bias = _dense(weight), _dense(bias)
    return F.instance_norm(x, mean, var, weight, bias, use_input_stats=own_batch, eps=eps)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """PyTorch's batch norm reads a weight with a stride wrongly."""
    return None if tensor is None else tensor.contiguous()


def _bias_alone(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's fused norms have no right second derivative: batch norm's are off by 1e-3,
    the others raise."""
    return weight is None and bias is not None


def _fused_where_right(fused: Callable[..., Tensor], formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's norm, or the same formula out of elementary operators where its second derivative
    is not right."""
    signature = inspect.signature(fused)
    places = [*signature.parameters]
    at_weight, at_bias = places.index("weight"), places.index("bias")

    def given(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return args[at] if at < len(args) else kwargs.get(places[at])

    def norm(*args: Any, **kwargs: Any) -> Tensor:
        if not _bias_alone(given(at_weight, args, kwargs), given(at_bias, args, kwargs)):
            return fused(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return formula(*bound.args)

    return norm


def _with_math_attention(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` with PyTorch's own formula for attention: the fused kernels have no double
    backward."""

    def twice_differentiable(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)

    return twice_differentiable


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """PyTorch's, by the branch that returns the attention weights: it is made of elementary
    operators."""
    wanted = kwargs.get("need_weights", True)
    output, weights = F.multi_head_attention_forward(*args, **{**kwargs, "need_weights": True})
    return output, weights if wanted else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """PyTorch's fused one has a wrong second derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    **REPLACED,
    F.layer_norm: elementary.layer_norm,
    F.group_norm: elementary.group_norm,
    F.rms_norm: elementary.rms_norm,
    F.scaled_dot_product_attention: elementary.scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.embedding: elementary.embedding,
    **CELLS,
    **LAYERS,
}
_TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    **REPLACED,
    F.layer_norm: _fused_where_right(F.layer_norm, elementary.layer_norm),
    F.group_norm: _fused_where_right(F.group_norm, elementary.group_norm),
} | {
    func: _with_math_attention(func)
    for func in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
}
