"""From what the user passes as `loss=` to a `Loss`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from fastmeta.losses.loss import Loss

_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    F.mse_loss: "mse",
    F.l1_loss: "l1",
    F.smooth_l1_loss: "smooth_l1",
    F.huber_loss: "huber",
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "bce_with_logits",
}

# Loss module -> (kind, its attributes besides `reduction` and the fields of `Loss` that they are).
_MODULES: dict[type[nn.Module], tuple[str, dict[str, str]]] = {
    nn.MSELoss: ("mse", {}),
    nn.L1Loss: ("l1", {}),
    nn.SmoothL1Loss: ("smooth_l1", {"beta": "beta"}),
    nn.HuberLoss: ("huber", {"delta": "beta"}),
    nn.CrossEntropyLoss: (
        "cross_entropy",
        {"weight": "weight", "label_smoothing": "label_smoothing", "ignore_index": "ignore_index"},
    ),
    nn.BCEWithLogitsLoss: ("bce_with_logits", {"weight": "weight", "pos_weight": "pos_weight"}),
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def resolve(loss: object, *, weight_norm: str = "count") -> Loss:
    """The `Loss` that `loss` means.

    Args:
        loss: a name ("mse", "l1", "smooth_l1", "huber", "cross_entropy", "bce_with_logits"); the
            function of `torch.nn.functional` or the module of `torch.nn` of that loss; any other
            callable f(output [N, *out], target) -> scalar, called for one task at a time, possibly
            under `torch.func.vmap`; or a `Loss`, which is returned as it is, with its own
            `weight_norm`. A loss module of PyTorch is read once, here; one that was subclassed or
            has hooks is just a callable. A callable gets the output as the network returns it,
            tuples and dicts of tensors too, and the target as it was given.
        weight_norm: "count" or "sum", see `Loss`.

    A callable may read tensors that require grad, its own parameters or any others: they get their
    gradients. In the network it finds what the forward pass has just left in attributes and buffers
    (a penalty, features). But the parameters that it finds there are the meta-parameters, where the
    inner loop starts, and not the adapted ones. For weight decay of those use
    `fastmeta.SGD(weight_decay=)`.

    Raises:
        ValueError: an unknown name, an option that is not supported, or a module whose parameters
            have no shape yet; the message names it.
        TypeError: not a loss at all.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(weight_norm, str):
        raise TypeError(f"`weight_norm` must be 'count' or 'sum', got {weight_norm!r}")
    if isinstance(loss, str):
        return _named(loss, weight_norm)
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class {loss.__name__}: write {loss.__name__}()")
    if not callable(loss):
        raise TypeError(f"loss must be a name, a function or a module, got {type(loss).__name__}")
    if isinstance(loss, nn.Module):
        return _from_module(loss, weight_norm)
    try:
        name = _FUNCTIONS.get(loss)
    except TypeError as error:
        raise TypeError(f"loss must be hashable, got {loss!r}; wrap it in a function") from error
    return _named(name, weight_norm) if name else Loss("custom", function=loss, weight_norm=weight_norm)


@lru_cache
def _named(name: str, weight_norm: str) -> Loss:
    return Loss(name, weight_norm=weight_norm)


def _from_module(module: nn.Module, weight_norm: str) -> Loss:
    lazy = [name for name, value in module.named_parameters() if is_lazy(value)]
    if lazy:
        raise ValueError(f"loss must be initialised, {lazy[0]!r} has no shape yet: call it once before")
    # a hook, or a `forward` set on the instance, may do anything
    changed = "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
    if type(module) not in _MODULES or changed:
        return Loss("custom", function=module, weight_norm=weight_norm)
    kind, attributes = _MODULES[type(module)]
    options = {field: getattr(module, attribute) for attribute, field in attributes.items()}
    if kind == "smooth_l1" and options["beta"] == 0:
        kind, options = "l1", {}
    return Loss(kind, reduction=str(module.reduction), weight_norm=weight_norm, **options)
