"""The parameters of a module, found again at every call for much less than `named_parameters()`
costs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastmeta.network.swap import LOCK


class ParameterTable:
    """`dict(module.named_parameters())`, kept until a parameter or a submodule is replaced, added
    or removed.

    `recurrent` says whether there is a recurrent layer in it: torch.compile does not walk over
    modules that have one.
    """

    __slots__ = (
        "_children",
        "_entries",
        "_module",
        "_module_views",
        "_parameter_views",
        "_places",
        "named",
        "recurrent",
    )

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._read()

    def current(self) -> dict[str, Tensor]:
        """name -> parameter, in `named_parameters()` order; not to be modified."""
        with LOCK:
            return self._current()

    def _current(self) -> dict[str, Tensor]:
        entries = [*chain.from_iterable(self._parameter_views)]
        if (
            self.modules_replaced()
            or len(entries) != len(self._entries)
            or not all(map(is_, entries, self._entries))
        ):
            self._read()
        return self.named

    def modules_replaced(self) -> bool:
        """Whether a submodule was replaced, added or removed since this was read."""
        children = [*chain.from_iterable(self._module_views)]
        return len(children) != len(self._children) or not all(map(is_, children, self._children))

    def without_modules(self) -> dict[str, Tensor]:
        """The same as torch.compile can trace it: parameters are what they are now, modules what
        they were."""
        return {name: own[key] for name, own, key in self._places}

    def _read(self) -> None:
        modules = list(self._module.modules())
        # views follow what becomes of their dicts, and are quicker to go through
        self._module_views = [module._modules.values() for module in modules]
        self._parameter_views = [module._parameters.values() for module in modules]
        self._children = [*chain.from_iterable(self._module_views)]
        self._entries = [*chain.from_iterable(self._parameter_views)]
        self.named: dict[str, Tensor] = dict(self._module.named_parameters())
        self._places: list[tuple[str, Mapping[str, Any], str]] = []
        for name in self.named:
            path, _, key = name.rpartition(".")
            self._places.append((name, self._module.get_submodule(path)._parameters, key))
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
