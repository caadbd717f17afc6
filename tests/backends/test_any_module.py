"""Networks that no layer program takes, through the public interface, against the loop that
everybody writes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from plain_autograd import error, leaves, meta_losses
from tensors import drawn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.cases import Case
from fastmeta.cases.networks import Transformer
from fastmeta.verify import verify_case

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9
TASKS, SHOTS, QUERIES, TOKENS, INPUTS = 3, 4, 5, 5, 3


class Last(nn.Module):
    """The last output of a recurrent layer, through a head."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, I]
        return self.head(self.core(x)[0][:, -1])


class Cells(nn.Module):
    """A recurrent cell run by hand."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Pointer(nn.Module):
    """Masked self-attention and cross-attention, by the module and by the function, and an affine
    norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 6))
        self.embed = nn.Linear(INPUTS, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        attended, weights = self.attention(tokens, tokens, tokens, attn_mask=causal)
        tokens = self.norm(tokens + attended * weights.sum(-1, keepdim=True))
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
        query = self.query.expand(len(x), -1, -1)
        hidden = torch.arange(TOKENS).expand(len(x), -1) == 0
        return self.head(
            self.attention(query, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0].flatten(1)
        )


class Written(nn.Module):
    """Plain tensor code: parameters of its own, einsum, a loop, writing in place, gather and
    sort."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.5 * torch.randn(INPUTS, 6))
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.out = nn.Parameter(torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("nli,ih->nlh", x, self.mix)
        total = torch.zeros_like(hidden[:, 0])
        for step in range(x.shape[1]):
            total = torch.sin(total + self.scale * hidden[:, step])
        order = hidden.detach().mean(-1).argsort(1)  # [N, L]
        first = torch.gather(hidden, 1, order[:, :1, None].expand(-1, 1, 6))[:, 0]
        total = total.clone()
        total[:, 0] *= 2
        return (total + first) @ self.out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: Transformer(INPUTS, TOKENS, 8, 1),
    "decoder": lambda: Pointer(),
    "gru_cell": lambda: Cells(nn.GRUCell(INPUTS, 6)),
    "lstm_cell": lambda: Cells(nn.LSTMCell(INPUTS, 6)),
    "rnn_cell": lambda: Cells(nn.RNNCell(INPUTS, 6)),
    "gru": lambda: Last(nn.GRU(INPUTS, 6, batch_first=True), 6),
    "gru_both_ways": lambda: Last(nn.GRU(INPUTS, 4, 2, batch_first=True, bidirectional=True), 8),
    "lstm": lambda: Last(nn.LSTM(INPUTS, 6, 2, batch_first=True), 6),
    "lstm_projected": lambda: Last(nn.LSTM(INPUTS, 6, batch_first=True, proj_size=4), 4),
    "rnn": lambda: Last(nn.RNN(INPUTS, 6, batch_first=True), 6),
    "own_code": Written,
}


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    with torch.no_grad():
        for parameter in net.parameters():  # norms that are not the identity
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def _episode(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (SHOTS, TOKENS, INPUTS), (SHOTS, 1), (QUERIES, TOKENS, INPUTS), (QUERIES, 1)
    return drawn(*[(TASKS, *shape) for shape in shapes], seed=1, dtype=dtype)


@pytest.mark.parametrize(
    ("memory", "chunk"), [("store", None), ("recompute", 2)], ids=["store", "recompute_chunks"]
)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient_matches_the_plain_loop(
    name: str, backend: str, memory: str, chunk: int | None
) -> None:
    net, episode = _network(name), [tensor.requires_grad_() for tensor in _episode()]
    steps = 3 if name in ("transformer", "gru") else 2
    maml = fm.MAML(
        net,
        loss="mse",
        inner_lr=0.1,
        inner_steps=steps,
        learn_lr="element",
        memory=memory,
        task_chunk=chunk,
        backend=backend,
    )
    explanation = maml.explain(*episode)
    machine = backend == "auto" and name != "own_code"  # which sorts
    assert explanation.backend == ("machine" if machine else "torch")
    assert not [line for line in explanation.runs if "loop" in line]  # vectorised
    out = maml(*episode)
    wanted = [*net.parameters(), *maml.inner_lrs.parameters(), *episode]
    got = torch.autograd.grad(out.loss, wanted)

    params = leaves(net)
    rates = {key: torch.full_like(value, 0.1).requires_grad_() for key, value in params.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no double backward
        losses = meta_losses(net, params, episode, lambda key, _: rates[key], steps)
        want = torch.autograd.grad(losses.mean(), [*params.values(), *rates.values(), *episode])
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert error(ours.reshape(theirs.shape), theirs) < TOLERANCE, index


@pytest.mark.parametrize(("chunk", "backend"), [(None, "auto"), (None, "torch"), (1, "torch"), (2, "torch")])
def test_operators_in_chunks_match_the_plain_loop(chunk: int | None, backend: str) -> None:
    net, (x, y, query_x, _) = _network("transformer"), _episode()
    params, again = leaves(net), leaves(net)
    how = {"task_chunk": chunk, "backend": backend}
    adapted = fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2, **how)
    output = fm.task_forward(net, adapted, query_x, **how)
    with sdpa_kernel(SDPBackend.MATH):
        want = meta_losses(net, again, [x, y, query_x, torch.zeros(TASKS, QUERIES, 1).double()], 0.1, 2)
        grads = torch.autograd.grad(want.mean(), list(again.values()))
    got = torch.autograd.grad(output.square().mean(), list(params.values()))
    assert error(output.detach().square().mean((1, 2)), want.detach()) < TOLERANCE
    assert error(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in grads])) < TOLERANCE


CASES = [
    Case(
        "transformer", lambda: Transformer(3, 4, 8, 2), (4, 3), loss="ce", weighted="sqt", step_weights=True
    ),
    Case("gru", lambda: Last(nn.GRU(3, 6, batch_first=True), 6), (4, 3), momentum=0.5, weight_decay=0.1),
    Case("lstm", lambda: Last(nn.LSTM(3, 6, batch_first=True), 6), (4, 3), per_task="some", order="first"),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_verification_passes_on_the_torch_backend(case: Case, dtype: str) -> None:
    rows = verify_case(case, "torch", dtype)
    assert len(rows) > 5
    assert [str(row) for row in rows if not row.passed or row.skipped] == []


def test_dropout_of_a_transformer_is_the_same_on_the_way_back() -> None:
    torch.manual_seed(0)
    net = Transformer(INPUTS, TOKENS, 8, 1, dropout=0.3).double().train()
    episode = _episode()

    def run(memory: str) -> list[Tensor]:
        torch.manual_seed(3)
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, memory=memory)
        return list(torch.autograd.grad(maml(*episode).loss, list(net.parameters())))

    kept, state = run("store"), torch.get_rng_state()
    again = run("recompute")
    assert torch.equal(torch.get_rng_state(), state)
    # a graph that is kept needs no random state: a recompute with other masks would differ by far
    assert max(float((a - b).norm()) for a, b in zip(kept, again, strict=True)) < 1e-12


NO_EXTENSION = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NO_EXTENSION), "torch", "reference"])
def test_explain_says_where_chunks_have_no_use(backend: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    episode = [torch.randn(4, 5, size) for size in (2, 1, 2, 1)]
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, task_chunk=2, backend=backend)
    says = str(maml.explain(*episode))
    assert ("task_chunk=2 has no use here" in says) == (backend != "torch")
    assert ("tasks run 2 at a time" in says) == (backend == "torch")
