"""Recurrent cells out of elementary operators: PyTorch's own have no vmap. Signatures are those of
`torch.*_cell`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm_step(
    gates_x: Tensor,  # [N, 4 H], W_ih x + b_ih
    state: Sequence[Tensor],  # h [N, H or the size of its projection] and c [N, H]
    w_hh: Tensor,  # [4 H, H]
    b_hh: Tensor | None = None,  # [4 H]
    w_hr: Tensor | None = None,  # [R, H], the projection of h
) -> tuple[Tensor, Tensor]:
    """(h, c) after one step of an LSTM that has met its input."""
    hidden, memory = state
    write, keep, candidate, read = (gates_x + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    memory = keep.sigmoid() * memory + write.sigmoid() * candidate.tanh()
    hidden = read.sigmoid() * memory.tanh()
    return hidden if w_hr is None else F.linear(hidden, w_hr), memory


def gru_step(
    gates_x: Tensor,  # [N, 3 H]
    state: Sequence[Tensor],  # h [N, H] alone
    w_hh: Tensor,  # [3 H, H]
    b_hh: Tensor | None = None,  # [3 H]
) -> tuple[Tensor]:
    """(h,) after one step of a gated recurrent unit that has met its input."""
    (hidden,) = state
    reset_x, update_x, new_x = gates_x.chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hidden, w_hh, b_hh).chunk(3, -1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return ((1 - update) * new + update * hidden,)


def elman_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor]]:
    """The step of an Elman network with this activation."""

    def step(
        gates_x: Tensor,  # [N, H]
        state: Sequence[Tensor],  # h [N, H] alone
        w_hh: Tensor,  # [H, H]
        b_hh: Tensor | None = None,  # [H]
    ) -> tuple[Tensor]:
        (hidden,) = state
        return (activation(gates_x + F.linear(hidden, w_hh, b_hh)),)

    return step


def lstm_cell(
    x: Tensor,  # [N, I]
    state: Sequence[Tensor],  # h and c, [N, H] each
    w_ih: Tensor,  # [4 H, I]
    w_hh: Tensor,  # [4 H, H]
    b_ih: Tensor | None = None,  # [4 H]
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, c) after one step of an LSTM."""
    return lstm_step(F.linear(x, w_ih, b_ih), state, w_hh, b_hh)


def _cell(step: Callable[..., tuple[Tensor]]) -> Callable[..., Tensor]:
    """The cell whose state is h alone; G gates."""

    def cell(
        x: Tensor,  # [N, I]
        hidden: Tensor,  # [N, H]
        w_ih: Tensor,  # [G H, I]
        w_hh: Tensor,  # [G H, H]
        b_ih: Tensor | None = None,  # [G H]
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return step(F.linear(x, w_ih, b_ih), (hidden,), w_hh, b_hh)[0]

    return cell


#: PyTorch's function -> the same out of elementary operators.
CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: _cell(gru_step),
    torch.rnn_tanh_cell: _cell(elman_step(torch.tanh)),
    torch.rnn_relu_cell: _cell(elman_step(torch.relu)),
}
