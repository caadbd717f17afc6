"""Recurrent networks and others that go along a sequence [N, S, I]."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.architectures.small import small

INPUTS, WIDTH = 3, 4


class Last(nn.Module):
    """The last output of a recurrent layer through a linear head."""

    def __init__(self, core: nn.RNNBase, width: int = WIDTH) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.core(x)[0]
        return self.head(out[:, -1])


class FinalStates(nn.Module):
    """The final hidden and cell states of a bidirectional LSTM of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(INPUTS, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.core(x)
        return self.head(torch.cat([*h, *c], -1))


class CellLoop(nn.Module):
    """An `nn.LSTMCell` in a loop, an output for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUTS, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype, device=x.device)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class MinimalGated(nn.Module):
    """A recurrence with one gate, in plain tensor code (Zhou et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(INPUTS + WIDTH, WIDTH)
        self.candidate = nn.Linear(INPUTS + WIDTH, WIDTH)
        self.start = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(len(x), -1)
        for token in x.unbind(1):
            f = torch.sigmoid(self.gate(torch.cat([token, h], -1)))
            new = torch.tanh(self.candidate(torch.cat([token, f * h], -1)))
            h = (1 - f) * h + f * new
        return self.head(h)


class TiedLanguageModel(nn.Module):
    """Token ids through a GRU to logits by the embedding's own weight (Press, Wolf, 2017)."""

    def __init__(self, vocabulary: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.core = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.Linear(WIDTH, vocabulary)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.core(self.embedding(ids))
        return self.decoder(out[:, -1])


class EncoderDecoder(nn.Module):
    """A GRU reads, another writes three steps, attending to what was read (Bahdanau et al.,
    2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(INPUTS, WIDTH, batch_first=True)
        self.cell = nn.GRUCell(WIDTH + 1, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, 1)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        read, h = self.encoder(x)
        state, y, outputs = h[0], x.new_zeros(len(x), 1), []
        for _ in range(3):
            scores = self.score(torch.tanh(self.query(state)[:, None] + self.key(read)))  # [N, S, 1]
            context = (scores.softmax(1) * read).sum(1)
            state = self.cell(torch.cat([context, y], -1), state)
            y = self.out(state)
            outputs.append(y)
        return torch.cat(outputs, -1)


class CausalConv(nn.Module):
    """A dilated causal convolution [N, C, S], residual (Bai et al., "TCN", 2018)."""

    def __init__(self, inputs: int, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(inputs, width, 3, dilation=dilation)
        self.skip = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(F.pad(x, (self.pad, 0))) + self.skip(x))


class Tcn(nn.Module):
    """Causal convolutions of growing dilation, the last time step through a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(CausalConv(INPUTS, WIDTH, 1), CausalConv(WIDTH, WIDTH, 2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.transpose(1, 2))[..., -1])


class WaveNet(nn.Module):
    """Gated causal convolutions with residual and skip connections (van den Oord et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(INPUTS, WIDTH, 1)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=d) for d in (1, 2))
        self.mixes = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 1) for _ in (1, 2))
        self.head = nn.Conv1d(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2))
        total = torch.zeros_like(x)
        for dilation, conv, mix in zip((1, 2), self.convs, self.mixes, strict=True):
            value, gate = conv(F.pad(x, (dilation, 0))).chunk(2, 1)
            residual, skip = mix(torch.tanh(value) * torch.sigmoid(gate)).chunk(2, 1)
            x, total = x + residual, total + skip
        return self.head(torch.tanh(total))[:, 0]


class StateSpace(nn.Module):
    """A diagonal linear recurrence with learned decays (Gupta et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.randn(WIDTH))
        self.into, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        decay = torch.exp(-F.softplus(self.log_decay))
        drive = self.into(x)
        state, states = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            state = decay * state + drive[:, t]
            states.append(state)
        return self.out(F.gelu(torch.stack(states, 1)))


class RunningMean(nn.Module):
    """Every position sees the mean of all before it, by a cumulative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(2 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        return self.out(torch.cat([h, h.cumsum(1) / count[:, None]], -1))


class NeuralOde(nn.Module):
    """Euler steps of a learned vector field (Chen et al., 2018)."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.field = nn.Sequential(nn.Linear(INPUTS + 1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, INPUTS))
        self.head = nn.Linear(INPUTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.steps):
            time = torch.full_like(x[:, :1], i / self.steps)
            x = x + self.field(torch.cat([x, time], -1)) / self.steps
        return self.head(x)


_SEQUENCE = (4, INPUTS)

CASES = (
    small("lstm", lambda: Last(nn.LSTM(INPUTS, WIDTH, batch_first=True)), _SEQUENCE),
    small("gru", lambda: Last(nn.GRU(INPUTS, WIDTH, batch_first=True)), _SEQUENCE, loss="ce"),
    small("rnn_tanh", lambda: Last(nn.RNN(INPUTS, WIDTH, batch_first=True)), _SEQUENCE),
    small("gru_two_layers", lambda: Last(nn.GRU(INPUTS, WIDTH, 2, batch_first=True)), _SEQUENCE),
    small("lstm_both_ways", FinalStates, (3, INPUTS)),
    small(
        "lstm_projected",
        lambda: Last(nn.LSTM(INPUTS, WIDTH, batch_first=True, proj_size=2), 2),
        _SEQUENCE,
    ),
    small("lstm_cell", CellLoop, _SEQUENCE),
    small("minimal_gated", MinimalGated, _SEQUENCE),
    small("tied_language_model", TiedLanguageModel, (4,), loss="ce", ids=5),
    small("encoder_decoder", EncoderDecoder, _SEQUENCE),
    small("tcn", Tcn, (5, INPUTS), kinks=True),
    small("wavenet", WaveNet, (5, INPUTS)),
    small("state_space", StateSpace, _SEQUENCE),
    small("running_mean", RunningMean, _SEQUENCE),
    small("neural_ode", partial(NeuralOde), (INPUTS,)),
)
