"""Recurrent layers as loops over elementary cells: PyTorch's own have no vmap. Signatures are those
of `torch.lstm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.network.elementary_cells import elman_step, gru_step, lstm_step

#: One step: (W_ih x + b_ih [N, G H], state, w_hh, b_hh, ...) -> state; the first tensor of a state
#: is the output.
Step = Callable[..., "tuple[Tensor, ...]"]


def _layer(native: Any, step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """The layer whose step is `step`, in place of PyTorch's `native`, which keeps packed
    sequences."""

    def layer(
        input: Tensor,  # [L, N, I], or [N, L, I] with batch_first
        hx: Tensor | Sequence[Tensor],  # h, or h and c: [layers * directions, N, H]
        params: Sequence[Tensor],  # w_ih, w_hh (, b_ih, b_hh) (, w_hr) of every layer and direction
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        start = [part.unbind() for part in ((hx,) if isinstance(hx, Tensor) else hx)]
        final: list[tuple[Tensor, ...]] = []
        x = input.transpose(0, 1) if batch_first else input
        for depth in range(num_layers):
            outputs = []
            for direction in range(directions):
                at = depth * directions + direction
                state = tuple(part[at] for part in start)
                weights = params[at * each : (at + 1) * each]
                output, state = _direction(step, x, state, weights, has_biases, backwards=direction == 1)
                outputs.append(output)
                final.append(state)
            x = torch.cat(outputs, -1)
            if depth < num_layers - 1:
                x = F.dropout(x, dropout, train)
        return x.transpose(0, 1) if batch_first else x, *map(torch.stack, zip(*final, strict=True))

    def dispatch(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        # the form for packed sequences has the weights one place later
        packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
        return (native if packed else layer)(*args, **kwargs)

    return dispatch


def _direction(
    step: Step, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], bias: bool, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(outputs [L, N, H], the last state) of one layer over x [L, N, I] in one direction."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if bias else (None, None)
    projection = rest[2 if bias else 0 :]
    gates = F.linear(x, w_ih, b_ih).unbind()  # one product for all steps
    outputs = []
    for gates_x in reversed(gates) if backwards else gates:
        state = step(gates_x, state, w_hh, b_hh, *projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


#: PyTorch's function -> the same out of elementary operators.
LAYERS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _layer(torch.lstm, lstm_step),
    torch.gru: _layer(torch.gru, gru_step),
    torch.rnn_tanh: _layer(torch.rnn_tanh, elman_step(torch.tanh)),
    torch.rnn_relu: _layer(torch.rnn_relu, elman_step(torch.relu)),
}
