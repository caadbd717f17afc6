"""The parameters of a module, found again at every call for much less than `named_parameters()` costs."""

from __future__ import annotations

from operator import is_

from torch import Tensor, nn


class ParameterTable:
    """`dict(module.named_parameters())`, kept until a parameter or a submodule is replaced, added or removed."""

    __slots__ = ("_children", "_entries", "_module", "_module_dicts", "_parameter_dicts", "named")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._read()

    def current(self) -> dict[str, Tensor]:
        """name -> parameter, in `named_parameters()` order; not to be modified."""
        children = [child for own in self._module_dicts for child in own.values()]
        entries = [entry for own in self._parameter_dicts for entry in own.values()]
        if (
            len(children) != len(self._children)
            or len(entries) != len(self._entries)
            or not all(map(is_, children, self._children))
            or not all(map(is_, entries, self._entries))
        ):
            self._read()
        return self.named

    def _read(self) -> None:
        modules = list(self._module.modules())
        self._module_dicts = [module._modules for module in modules]
        self._parameter_dicts = [module._parameters for module in modules]
        self._children = [child for own in self._module_dicts for child in own.values()]
        self._entries = [entry for own in self._parameter_dicts for entry in own.values()]
        self.named: dict[str, Tensor] = dict(self._module.named_parameters())
