"""Which parameters the inner loop adapts."""

from __future__ import annotations

from torch import nn

from fastmeta.ops.options import argument


def adapted_names(who: str, net: nn.Module, adapt: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names of the adapted parameters, in `net.named_parameters()` order.

    Args:
        who: the operator, for messages.
        net: the network.
        adapt: "all"; "head": the parameters of the last leaf module that has any; "body": all the others; or names.

    Raises:
        ValueError: a name that the network does not have, or nothing at all to adapt.
    """
    parameters = dict(net.named_parameters())
    if adapt == "all":
        return tuple(parameters)
    if isinstance(adapt, str):
        if adapt not in ("head", "body"):
            raise ValueError(
                f"{argument(who, 'adapt')} must be 'all', 'head', 'body' or names of parameters, got {adapt!r}"
            )
        leaves = [module for module in net.modules() if next(module.children(), None) is None]
        last = [leaf for leaf in leaves if next(leaf.parameters(), None) is not None][-1:]
        head = {id(parameter) for leaf in last for parameter in leaf.parameters()}
        names = tuple(name for name, value in parameters.items() if (id(value) in head) == (adapt == "head"))
    else:
        unknown = [name for name in adapt if name not in parameters]
        if unknown:
            raise ValueError(
                f"{argument(who, 'adapt')}: the network has no parameter {unknown[0]!r}; it has {', '.join(parameters)}"
            )
        names = tuple(name for name in parameters if name in adapt)
    if not names:
        raise ValueError(f"{argument(who, 'adapt')} leaves nothing to adapt, got {adapt!r}")
    return names
