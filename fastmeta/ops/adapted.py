"""Which parameters the inner loop adapts."""

from __future__ import annotations

from torch import nn

from fastmeta.ops.options import argument
from fastmeta.ops.patterns import matching


def adapted_names(who: str, net: nn.Module, adapt: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names of the adapted parameters, in `net.named_parameters()` order.

    Args:
        who: the operator, for messages.
        net: the network.
        adapt: "all"; "head": the parameters of the last leaf module that has any; "body": all the others; or names and
            glob patterns of names.

    Raises:
        ValueError: a name or a pattern that no parameter of the network has, or nothing at all to adapt.
    """
    parameters = dict(net.named_parameters())
    if adapt == "all":
        return tuple(parameters)
    if adapt in ("head", "body"):
        leaves = [module for module in net.modules() if next(module.children(), None) is None]
        last = [leaf for leaf in leaves if next(leaf.parameters(), None) is not None][-1:]
        head = {id(parameter) for leaf in last for parameter in leaf.parameters()}
        names = tuple(name for name, value in parameters.items() if (id(value) in head) == (adapt == "head"))
    else:
        chosen: set[str] = set()
        for pattern in (adapt,) if isinstance(adapt, str) else adapt:
            found = matching(pattern, parameters)
            if not found:
                raise ValueError(
                    f"{argument(who, 'adapt')}: the network has no parameter {pattern!r}; it has "
                    f"{', '.join(parameters)}; 'all', 'head' and 'body' stand for many of them"
                )
            chosen.update(found)
        names = tuple(name for name in parameters if name in chosen)
    if not names:
        raise ValueError(
            f"{argument(who, 'adapt')} leaves nothing to adapt, got {adapt!r}; the network has {', '.join(parameters)}"
        )
    return names
