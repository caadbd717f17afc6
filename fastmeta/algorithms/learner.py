"""What a meta-loss needs of the algorithm that it belongs to."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from fastmeta.algorithms.flat_parameters import FlatParameters
from fastmeta.algorithms.inner_rates import InnerRates
from fastmeta.losses import Loss
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors
from fastmeta.ops.plan import NOTHING, Call
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import Hyper
from fastmeta.problem import Captures


class Settings(Protocol):
    """Options of an algorithm that may change between two calls, as `MAML` has them."""

    loss: Loss
    query_loss: Loss
    on_divergence: str
    batch_stats: str


class Learner(Protocol):
    """An algorithm as `meta_loss` and `compiled` see it; `MAMLMachinery` is one.

    Attributes:
        who: the algorithm, as messages name it.
        net: the network.
        inner_lrs: the learning rates.
        flat: the vector of a flattened module, or None.
        handle: the number under which compiled code finds it.
    """

    who: str
    net: nn.Module
    inner_lrs: InnerRates
    flat: FlatParameters | None
    handle: int

    @property
    def module(self) -> Settings:
        """The module of the algorithm, which has its options as they are now."""

    def lr_of(self, rates: dict[str, Tensor]) -> Rates:
        """The rates as an operator takes them, from the learned ones by their keys."""

    def hyper_of(self, rates: dict[str, Tensor]) -> Hyper:
        """The tensors of the update rule as an operator takes them, from all that has keys."""

    def meta_parameters(self, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the network's parameters by name, the learned rates and the tensors of the update rule
        by key); not to be modified."""

    def traced_parameters(self) -> dict[str, Tensor]:
        """The network's parameters by name, while torch.compile traces."""

    def modules_replaced(self) -> bool:
        """Whether code that was compiled with `traced_parameters` may hold parameters that are
        gone."""

    def aliases(self) -> Aliases | None:
        """The parameters of a flattened module, which autograd knows as pieces of its vector."""

    def prepare(
        self,
        params: dict[str, Tensor],
        rates: dict[str, Tensor],
        tensors: Tensors,
        support_per_step: bool = False,
        wrt: frozenset[str] = NOTHING,
        captures: Captures | None = None,
    ) -> Call:
        """A call on these `meta_parameters`, checked and with its backend chosen."""
