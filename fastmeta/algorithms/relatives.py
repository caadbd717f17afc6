"""Relatives of MAML that are MAML with an option fixed."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmeta.algorithms.maml import MAML
from fastmeta.ops.rates import Rates


class FOMAML(MAML):
    """First-order MAML: the meta-gradient is the query gradient at the adapted parameters.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `order`.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 5.2.
    """

    who = "FOMAML"

    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        options = _with(self.who, options, order="first")
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options)


class ANIL(MAML):
    """Almost no inner loop: the inner loop adapts the head only, the last layer with parameters.

    The gradient of the body is exact through the adaptation of the head. For a head of several
    layers use `MAML` with `adapt=` their names.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `adapt`.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?" (2020), section 4.
    """

    who = "ANIL"

    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        options = _with(self.who, options, adapt="head")
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options)


class BOIL(MAML):
    """Body only update in inner loop: everything adapts but the head, which the outer loop alone
    moves.

    For a head of several layers use `MAML` with `adapt=` the names of the others.

    Args:
        net, loss, inner_lr, inner_steps, ...: as in `fastmeta.MAML`, but `adapt`.

    Source: Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning" (2021),
        section 3.
    """

    who = "BOIL"

    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        options = _with(self.who, options, adapt="body")
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options)


class MetaSGD(MAML):
    """Meta-SGD: a learned inner learning rate, of any sign, for every scalar weight.

    Args:
        net, loss, inner_steps, ...: as in `fastmeta.MAML`, but `learn_lr`.
        inner_lr: where the rates start.

    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (2017),
        section 3.
    """

    who = "MetaSGD"

    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        options = _with(self.who, options, learn_lr="element")
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options)


def _with(who: str, options: dict[str, Any], **fixed: str) -> dict[str, Any]:
    """`options` with those that an algorithm fixes.

    Raises:
        TypeError: one of these was given.
    """
    for name, value in fixed.items():
        if name in options:
            raise TypeError(f"{who}: `{name}` is no argument, {who} is MAML with {name}={value!r}")
    return {**options, **fixed}
