"""Embeddings that renormalise their own weight in place."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def check_renormalised(who: str, net: nn.Module, adapted: Collection[str]) -> None:
    """Refuse to adapt a weight that is renormalised at every lookup.

    Where it is not adapted its rows are renormalised as they are read, which is the same. An inner
    step would begin at the renormalised weight, and that is a state of the module.

    Args:
        who: the operator, for messages.
        net: the module.
        adapted: names of the parameters that inner steps change.

    Raises:
        ValueError: `net` has one.
    """
    names = {
        id(parameter): name for name, parameter in net.named_parameters()
    }  # of a tied one the first name
    for module in net.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            name = names.get(id(module.weight))
            if name in adapted:
                raise ValueError(
                    f"{who}: `adapt` has {name!r}, which {type(module).__name__}(max_norm={module.max_norm}) "
                    "renormalises in place at every lookup: adapt the other parameters, or leave "
                    "max_norm=None"
                )
