"""Which parameters the inner loop adapts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastmeta.ops.options import argument
from fastmeta.ops.patterns import matching

#: Values of `adapt=` that leave out parameters which require no grad.
BY_GRAD = ("all", "head", "body")


class Adapted(NamedTuple):
    """What `adapt=` means for a network as it is now; names in `net.named_parameters()` order."""

    names: tuple[str, ...]
    frozen: tuple[str, ...] = ()  # left out for requiring no grad alone


def adapted_names(who: str, net: nn.Module, adapt: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names of the adapted parameters; arguments and errors are those of `adapted_now`."""
    return adapted_now(who, net, adapt).names


def adapted_now(who: str, net: nn.Module, adapt: str | tuple[str, ...]) -> Adapted:
    """The adapted parameters, as far as the network is not frozen.

    Args:
        who: the operator, for messages.
        net: the network: its own parameters are asked whether they require grad, whatever tensors a
            call is about.
        adapt: "all"; "head": the parameters of the last leaf module that has any; "body": all the
            others; these three without those that require no grad. Or names and glob patterns of
            names, frozen or not.

    Raises:
        ValueError: a name or a pattern that no parameter of the network has, or nothing at all to
            adapt.
    """
    parameters = dict(net.named_parameters())
    if adapt in BY_GRAD:
        meant = _by_place(net, str(adapt), parameters)
        names = tuple(name for name in meant if _trains(parameters[name]))
        if meant and not names:
            which = f"all of {', '.join(meant[:8])}{', ...' * (len(meant) > 8)}"
            raise ValueError(
                f"{argument(who, 'adapt')}={adapt!r} means parameters that require grad, and {which} are "
                f"frozen (requires_grad=False); unfreeze what shall adapt, or name it: adapt='*' takes "
                "frozen parameters too"
            )
        found = Adapted(names, tuple(name for name in meant if name not in names))
    else:
        found = Adapted(_by_name(who, adapt, parameters))
    if not found.names:
        raise ValueError(
            f"{argument(who, 'adapt')} leaves nothing to adapt, got {adapt!r}; "
            f"the network has {', '.join(parameters)}"
        )
    return found


def mark_as_trained(parameter: Tensor) -> None:
    """Count a parameter as one that requires grad though it does not: a vector that it is a view of
    does."""
    parameter.fastmeta_trains = True  # type: ignore[attr-defined]


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad or hasattr(parameter, "fastmeta_trains")


def _by_place(net: nn.Module, adapt: str, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    if adapt == "all":
        return tuple(parameters)
    leaves = [module for module in net.modules() if next(module.children(), None) is None]
    last = [leaf for leaf in leaves if next(leaf.parameters(), None) is not None][-1:]
    head = {id(parameter) for leaf in last for parameter in leaf.parameters()}
    return tuple(name for name, value in parameters.items() if (id(value) in head) == (adapt == "head"))


def _by_name(who: str, adapt: str | tuple[str, ...], parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    chosen: set[str] = set()
    for pattern in (adapt,) if isinstance(adapt, str) else adapt:
        found = matching(pattern, parameters)
        if not found:
            raise ValueError(
                f"{argument(who, 'adapt')}: the network has no parameter {pattern!r}; it has "
                f"{', '.join(parameters)}; 'all', 'head' and 'body' stand for many of them"
            )
        chosen.update(found)
    return tuple(name for name in parameters if name in chosen)
