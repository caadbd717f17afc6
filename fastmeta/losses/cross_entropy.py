"""PyTorch's cross-entropy over dimension 1, from operators that differentiate twice under vmap.

Both functions return (values, shares), each [N, d...]: the loss of each position, and its share of
the denominator of the mean (None: one each).

The closed form, for one position with logits z, p = softmax(z), q_c = class_weight_c *
smoothed_target_c, weight w_n of its example and denominator D (1 for reduction "sum"):

    l      = -sum_c q_c log p_c
    dL/dz  = (p * sum_c q_c - q) * w_n / D
    R dL/dz = p * (Rz - <p, Rz>) * (sum_c q_c) * w_n / D

More in docs/losses.md.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def of_indices(
    output: Tensor,  # [N, C, d...]
    target: Tensor,  # [N, d...], int64
    weight: Tensor | None,  # [C]
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Targets are class indices. An ignored position has loss and share zero."""
    log_p = F.log_softmax(output, 1)  # [N, C, d...]
    ignored = target == ignore_index  # [N, d...]
    index = target.masked_fill(ignored, 0)
    # gather, not a product with one-hot rows: 0 * log 0 is NaN where a logit is masked with -inf
    values = -log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    share = values.new_ones(values.shape) if weight is None else weight[index]
    if weight is not None:
        values = share * values
    if label_smoothing:
        weighted = log_p if weight is None else log_p * _along_classes(weight, output)
        values = (1 - label_smoothing) * values - label_smoothing / output.shape[1] * weighted.sum(1)
    return values.masked_fill(ignored, 0), share.masked_fill(ignored, 0)


def of_probabilities(
    output: Tensor,  # [N, C, d...]
    target: Tensor,  # [N, C, d...]
    weight: Tensor | None,  # [C]
    label_smoothing: float,
) -> tuple[Tensor, None]:
    """Targets are probabilities. As in PyTorch, the mean's denominator has no class weights."""
    log_p = F.log_softmax(output, 1)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / output.shape[1]
    if weight is not None:
        target = target * _along_classes(weight, output)
    return -(log_p * target).sum(1), None


def _along_classes(weight: Tensor, output: Tensor) -> Tensor:
    """[C] -> [C, 1...], to broadcast against [N, C, d...]."""
    return weight.reshape(-1, *[1] * (output.dim() - 2))
