"""Relatives of MAML that are MAML with an option fixed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from fastmeta.algorithms.maml import MAML
from fastmeta.ops.rates import Rates


class _Relative(MAML):
    """`MAML` with some options fixed."""

    fixed: ClassVar[dict[str, str]] = {}

    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        for name, value in self.fixed.items():
            if name in options:
                raise TypeError(
                    f"{self.who}: `{name}` is no argument, {self.who} is MAML with {name}={value!r}"
                )
        super().__init__(
            net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **{**options, **self.fixed}
        )


class FOMAML(_Relative):
    """First-order MAML: the meta-gradient is the query gradient at the adapted parameters.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `order`.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 5.2.
    """

    who = "FOMAML"
    fixed: ClassVar[dict[str, str]] = {"order": "first"}


class ANIL(_Relative):
    """Almost no inner loop: the inner loop adapts the head only, the last layer with parameters.

    The gradient of the body is exact through the adaptation of the head. For a head of several
    layers use `MAML` with `adapt=` their names.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `adapt`.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?" (2020), section 4.
    """

    who = "ANIL"
    fixed: ClassVar[dict[str, str]] = {"adapt": "head"}


class BOIL(_Relative):
    """Body only update in inner loop: everything adapts but the head, which the outer loop alone
    moves.

    For a head of several layers use `MAML` with `adapt=` the names of the others.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `adapt`.

    Source: Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning" (2021),
        section 3.
    """

    who = "BOIL"
    fixed: ClassVar[dict[str, str]] = {"adapt": "body"}


class MetaSGD(_Relative):
    """Meta-SGD: a learned inner learning rate, of any sign, for every scalar weight.

    Args:
        net, loss, inner_steps, ...: as in `fastmeta.MAML`, but `learn_lr`.
        inner_lr: where the rates start.

    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (2017),
        section 3.
    """

    who = "MetaSGD"
    fixed: ClassVar[dict[str, str]] = {"learn_lr": "element"}
