"""The tensors of an algorithm's update rule: learned numbers, and the parameters of a learned
optimiser."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastmeta.update_rules import CustomRule, UpdateRule

#: What a learned number is called among the learned rates of an algorithm, before its own name.
PREFIX = "rule."


class RuleTensors(nn.Module):
    """The tensors of a rule, where `parameters()`, `.to()` and checkpoints of an algorithm find
    them.

    Numbers given as `nn.Parameter` are parameters here, by their names ("beta1"); other tensors
    that require no grad are buffers that no checkpoint holds; those that do are used as they are,
    and their gradients go where they come from. A module that is a rule is `function`.

    Args:
        rule: the rule.
    """

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self._others: dict[str, Tensor] = {}
        self._names = tuple(rule.tensors)
        self.custom = isinstance(rule, CustomRule)
        if isinstance(rule, CustomRule) and rule.module is not None:
            self.function = rule.module
        for name, value in rule.tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif value.requires_grad:
                self._others[name] = value
            else:
                self.register_buffer(name, value.clone(), persistent=False)

    def values(self) -> dict[str, Tensor]:
        """The tensors by name, as operators take them."""
        if self.custom:
            module = self._modules.get("function")
            return {} if module is None else dict(module.named_parameters())
        return {
            name: self._others[name] if name in self._others else getattr(self, name) for name in self._names
        }


def with_prefix(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that they have among learned rates."""
    return {f"{PREFIX}{name}": value for name, value in values.items()}


def without_prefix(rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `rates` that belong to the rule, by their own names."""
    at = len(PREFIX)
    return {key[at:]: value for key, value in rates.items() if key.startswith(PREFIX)}
