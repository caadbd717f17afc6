"""The losses of the case list, each with the kind of target that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmeta.losses import Loss, resolve

IGNORED = -100  # PyTorch's default ignore_index


@dataclass(frozen=True)
class LossCase:
    """A loss as a user gives it, and its target: "float", "binary", "probabilities", "classes" or
    "masked"."""

    make: Callable[[], nn.Module | Loss | str]
    target: str
    kinks: bool = False


def _class_weights(classes: int) -> Tensor:
    return torch.linspace(0.5, 1.5, classes)


#: Name -> loss. Those with class weights have five classes.
LOSSES: dict[str, LossCase] = {
    "mse": LossCase(lambda: "mse", "float"),
    "mse_sum": LossCase(lambda: nn.MSELoss(reduction="sum"), "float"),
    "l1": LossCase(lambda: "l1", "float", kinks=True),
    "smooth_l1": LossCase(lambda: nn.SmoothL1Loss(beta=0.7), "float", kinks=True),
    "huber": LossCase(lambda: nn.HuberLoss(delta=0.6), "float", kinks=True),
    "ce": LossCase(lambda: "cross_entropy", "classes"),
    "ce_sum": LossCase(lambda: nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "ce_smoothed": LossCase(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), "classes"),
    "ce_weighted": LossCase(lambda: nn.CrossEntropyLoss(weight=_class_weights(5)), "classes"),
    "ce_ignored": LossCase(lambda: nn.CrossEntropyLoss(), "masked"),
    "ce_everything": LossCase(
        lambda: nn.CrossEntropyLoss(weight=_class_weights(5), label_smoothing=0.2, ignore_index=IGNORED),
        "masked",
    ),
    "ce_probabilities": LossCase(lambda: nn.CrossEntropyLoss(), "probabilities"),
    "ce_probabilities_everything": LossCase(
        lambda: nn.CrossEntropyLoss(weight=_class_weights(5), label_smoothing=0.2), "probabilities"
    ),
    "ce_masked_mean": LossCase(lambda: resolve(nn.CrossEntropyLoss(), weight_norm="sum"), "masked"),
    "mse_masked_mean": LossCase(lambda: resolve("mse", weight_norm="sum"), "float"),
    "bce": LossCase(lambda: "bce_with_logits", "binary"),
    "bce_pos_weight": LossCase(lambda: nn.BCEWithLogitsLoss(pos_weight=_class_weights(5)), "binary"),
    "bce_weighted": LossCase(
        lambda: nn.BCEWithLogitsLoss(weight=_class_weights(5), pos_weight=_class_weights(5).flip(0)), "binary"
    ),
}


def draw_target(
    kind: str, lead: tuple[int, ...], output: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Targets of one kind for examples [*lead] with outputs [*output]: [*lead, *output], or [*lead,
    *output[1:]] for classes, which an output [C, d...] has one of at each position."""
    if kind == "float":
        return torch.randn(*lead, *output, generator=generator)
    if kind == "binary":
        return torch.rand(*lead, *output, generator=generator)
    if kind == "probabilities":
        return torch.randn(*lead, *output, generator=generator).softmax(len(lead))
    classes = torch.randint(output[0], (*lead, *output[1:]), generator=generator)
    if kind == "masked":
        # Every third example or position, never the first: a task with nothing left has the loss
        # nan, as in PyTorch.
        classes[..., 1::3] = IGNORED
    return classes
