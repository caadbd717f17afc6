"""Recurrent cells out of elementary operators: PyTorch's own have no vmap. Signatures are those of `torch.*_cell`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm_cell(
    x: Tensor,  # [N, I]
    state: Sequence[Tensor],  # h and c, [N, H] each
    w_ih: Tensor,  # [4 H, I]
    w_hh: Tensor,  # [4 H, H]
    b_ih: Tensor | None = None,  # [4 H]
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, c) after one step of an LSTM."""
    hidden, memory = state
    gates = F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)  # [N, 4 H]
    write, keep, candidate, read = gates.chunk(4, -1)
    memory = keep.sigmoid() * memory + write.sigmoid() * candidate.tanh()
    return read.sigmoid() * memory.tanh(), memory


def gru_cell(
    x: Tensor,  # [N, I]
    hidden: Tensor,  # [N, H]
    w_ih: Tensor,  # [3 H, I]
    w_hh: Tensor,  # [3 H, H]
    b_ih: Tensor | None = None,  # [3 H]
    b_hh: Tensor | None = None,
) -> Tensor:
    """h after one step of a gated recurrent unit."""
    reset_x, update_x, new_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hidden, w_hh, b_hh).chunk(3, -1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (1 - update) * new + update * hidden


def _elman_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        x: Tensor,  # [N, I]
        hidden: Tensor,  # [N, H]
        w_ih: Tensor,  # [H, I]
        w_hh: Tensor,  # [H, H]
        b_ih: Tensor | None = None,  # [H]
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return activation(F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh))

    return cell


#: PyTorch's function -> the same out of elementary operators.
CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: _elman_cell(torch.tanh),
    torch.rnn_relu_cell: _elman_cell(torch.relu),
}
