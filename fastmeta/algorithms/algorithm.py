"""What all algorithms have in common: a module that shows what a user may touch, and its machinery,
one private object."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any
from weakref import ref

from torch import Tensor, nn

from fastmeta.algorithms.inner_rates import InnerRates
from fastmeta.algorithms.rule_tensors import RuleTensors
from fastmeta.inputs import Tree
from fastmeta.losses import Loss
from fastmeta.ops.adapted import adapted_names
from fastmeta.ops.eager import eager
from fastmeta.ops.options import check_rule
from fastmeta.ops.rule_numbers import NONE, Hyper
from fastmeta.ops.task_forward import forward as task_forward
from fastmeta.update_rules import UpdateRule


class Algorithm(nn.Module):
    """A network, a loss and K inner steps; the base class of all algorithms.

    Options that are plain attributes may be changed between two calls.

    Attributes:
        net: the network.
        loss: of the support sets, resolved.
        inner_steps: K.
        adapts: `adapt=`; what a predicate chose.
        inner_lrs: the learning rates; learned ones are parameters.
        inner_rule: the tensors of the update rule; those given as parameters are parameters.
        update_rule, batch_stats, backend: as given.
    """

    #: The algorithm, as messages name it.
    who = ""

    net: nn.Module
    loss: Loss
    inner_steps: int
    adapts: str | tuple[str, ...]
    inner_lrs: InnerRates
    update_rule: UpdateRule
    inner_rule: RuleTensors
    batch_stats: str
    backend: str
    _machinery: Machinery

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted parameters, as the network is frozen now."""
        return self._machinery.names

    @eager
    def predict(self, adapted: Mapping[str, Tensor], x: Tree) -> Tree:
        """The network's output with adapted parameters.

        Args:
            adapted: what `adapt` returns.
            x: inputs [T, M, *in], or a tree of tensors, see `fastmeta.Inputs`.

        Returns:
            [T, M, *out]; of a network that returns several tensors, what it returns.

        Derivatives: as `fastmeta.task_forward`, where gradients are on.
        """
        return self._machinery.predict(adapted, x)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "update_rule":  # whose tensors are to be found at once
            self.inner_rule = RuleTensors(check_rule(self.who, value))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has machinery of its own
        return {**self.__dict__, "_machinery": copy(self._machinery)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._machinery.bind(self)


class Machinery:
    """What the methods of an algorithm share and a user has no business with.

    It does not keep its module alive, so that a module is freed as soon as nobody holds it.

    Args:
        module: whose machinery this is, all of its options and submodules set.
    """

    def __init__(self, module: Any) -> None:
        self.bind(module)

    def bind(self, module: Any) -> None:
        """Belong to `module`, which is new, or a copy."""
        self._module = ref(module)
        self.who: str = module.who
        self.net: nn.Module = module.net
        self.inner_lrs: InnerRates = module.inner_lrs

    @property
    def module(self) -> Any:
        """The module, for its options as they are now.

        Raises:
            RuntimeError: it is gone.
        """
        module = self._module()
        if module is None:
            raise RuntimeError(f"{self.who}: the module that this belongs to is gone")
        return module

    @property
    def loss(self) -> Loss:
        """Of the support sets."""
        return self.module.loss

    @property
    def hyper(self) -> Hyper:
        """The tensors of the update rule by name."""
        module = self.module
        return module.inner_rule.values() if module.update_rule.learns else NONE

    @property
    def names(self) -> tuple[str, ...]:
        """As `Algorithm.names`."""
        return adapted_names(self.who, self.net, self.module.adapts)

    def predict(self, adapted: Mapping[str, Tensor], x: Tree) -> Tree:
        """As `Algorithm.predict`."""
        module = self.module
        return task_forward(f"{self.who}.predict", self.net, adapted, x, module.batch_stats, module.backend)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # `bind` makes the rest
