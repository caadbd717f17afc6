"""fastmeta.network.functional: the module as a function, under fastmeta's conventions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from problems import error
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.network import elementary, elementary_cells
from fastmeta.network.functional import Conventions, call, check_batch_stats

F64 = {"dtype": torch.float64}


def params_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in net.named_parameters()}


def normed(*, tracked: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 13), nn.BatchNorm1d(13, track_running_stats=tracked), nn.Tanh(), nn.Linear(13, 2)
    )
    return net.double()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def derivatives(function, tensors: list[Tensor]) -> list[Tensor]:
    """Value, first and second derivatives along fixed directions."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(3)
    scalar = (value * torch.randn(value.shape, generator=generator, **F64)).sum()
    first = torch.autograd.grad(scalar, leaves, create_graph=True)
    along = sum((g * torch.randn(g.shape, generator=generator, **F64)).sum() for g in first)
    return [value, *first, *torch.autograd.grad(along, leaves, materialize_grads=True)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


NORMS = {
    "batch": (
        lambda x, w, b: elementary.batch_norm(x, None, None, w, b, 1e-5),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (7, 4, 3),
        (4,),
    ),
    "batch_running": (
        lambda x, w, b: elementary.batch_norm(x, w.detach(), w.detach() ** 2, w, b, 1e-5),
        lambda x, w, b: F.batch_norm(x, w.detach(), w.detach() ** 2, w, b, training=False),
        (7, 4, 3),
        (4,),
    ),
    "instance": (
        lambda x, w, b: elementary.instance_norm(x, None, None, w, b, 1e-5),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        (3, 4, 5),
        (4,),
    ),
    "layer": (
        lambda x, w, b: elementary.layer_norm(x, w.shape, w, b),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        (7, 4, 3),
        (4, 3),
    ),
    "group": (
        lambda x, w, b: elementary.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
        (3, 4, 5),
        (4,),
    ),
    "rms": (
        lambda x, w, b: elementary.rms_norm(x, w.shape, w) + b,
        lambda x, w, b: F.rms_norm(x, w.shape, w) + b,
        (7, 5),
        (5,),
    ),
}


@pytest.mark.parametrize("kind", NORMS)
def test_elementary_norm_matches_reference(kind: str) -> None:
    ours, theirs, shape, affine = NORMS[kind]
    tensors = [normal(*shape), 1 + 0.3 * normal(*affine, seed=1), normal(*affine, seed=2)]
    for found, expected in zip(derivatives(ours, tensors), derivatives(theirs, tensors), strict=True):
        assert error(found, expected) < 1e-12


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": normal(2, 1, 5, 6, seed=7) > -0.5},
    "float": {"attn_mask": normal(5, 6, seed=7)},
    "minus_infinity": {
        "attn_mask": torch.zeros(5, 6, **F64).masked_fill(normal(5, 6, seed=7) > 0.5, -math.inf)
    },
    "scale": {"scale": 0.3},
    "gqa": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_elementary_attention_matches_reference(options: dict) -> None:
    heads = 2 if "enable_gqa" in options else 4
    tensors = [normal(2, 4, 5, 3), normal(2, heads, 6, 3, seed=1), normal(2, heads, 6, 7, seed=2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = derivatives(lambda *t: F.scaled_dot_product_attention(*t, **options), tensors)
    found = derivatives(lambda *t: elementary.scaled_dot_product_attention(*t, **options), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-12


def test_query_without_keys_gets_zeros_not_nan() -> None:
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    tensors = [normal(2, 5, 3), normal(2, 6, 3, seed=1), normal(2, 6, 4, seed=2)]
    value, *rest = derivatives(
        lambda *t: elementary.scaled_dot_product_attention(*t, attn_mask=mask), tensors
    )
    assert torch.equal(value[:, 2], torch.zeros(2, 4, **F64))
    assert all(tensor.isfinite().all() for tensor in rest)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_elementary_cell_matches_reference(make: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    cell = make(3, 5, bias=bias).double()
    state = normal(7, 5, seed=1)
    state = (state, normal(7, 5, seed=2)) if make is nn.LSTMCell else state
    function = {nn.LSTMCell: torch.lstm_cell, nn.GRUCell: torch.gru_cell, nn.RNNCell: torch.rnn_tanh_cell}[
        make
    ]

    def last(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(out) if isinstance(out, tuple) else out

    tensors = [normal(7, 3), *params_of(cell).values()]
    ours = derivatives(lambda x, *ws: last(elementary_cells.CELLS[function](x, state, *ws)), tensors)
    theirs = derivatives(lambda x, *ws: last(function(x, state, *ws)), tensors)
    for found, expected in zip(ours, theirs, strict=True):
        assert error(found, expected) < 1e-12


LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm_projected_both_ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    "lstm_projected_no_bias": (nn.LSTM, {"proj_size": 3, "bias": False, "batch_first": True}),
    "gru_both_ways": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "gru_no_bias": (nn.GRU, {"bias": False}),
    "rnn_tanh": (nn.RNN, {"num_layers": 3}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_elementary_recurrent_layer_matches_reference(name: str) -> None:
    make, options = LAYERS[name]
    torch.manual_seed(0)
    layer = make(3, 4, **options).double()
    names = [key for key, _ in layer.named_parameters()]

    def run(decompose: bool, x: Tensor, *weights: Tensor) -> Tensor:
        with Conventions("task", decompose):
            output, state = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return torch.cat([t.flatten() for t in (output, *(state if isinstance(state, tuple) else (state,)))])

    tensors = [normal(5, 6, 3), *(value.detach() for value in layer.parameters())]
    want = derivatives(partial(run, False), tensors)
    for got, expected in zip(derivatives(partial(run, True), tensors), want, strict=True):
        assert error(got, expected) < 1e-12


def test_packed_sequences_stay_with_pytorch() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:  # [N, L, 3]
            lengths = torch.arange(x.shape[1], x.shape[1] - x.shape[0], -1)
            return self.core(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0]

    net, x = Packed().double(), normal(3, 5, 3)
    want = net(x)
    assert error(want, net.core(x)[1][0]) > 1e-3
    assert error(call(net, params_of(net), x, decompose=True), want) < 1e-12


@pytest.mark.parametrize("decompose", [False, True], ids=["fused", "decomposed"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm_uses_own_batch_and_leaves_buffers_alone(training: bool, decompose: bool) -> None:
    net = normed()
    net(normal(50, 3, seed=5) * 4 + 2)
    expected = net.train()(normal(7, 3))
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    output = call(net.train(training), params_of(net), normal(7, 3), decompose=decompose)
    assert error(output, expected) < 1e-12
    # net.train()(...) above moved them once; call must not
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("decompose", [False, True], ids=["fused", "decomposed"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_running_statistics_match_eval_mode(training: bool, decompose: bool) -> None:
    net = normed()
    net(normal(50, 3, seed=5) * 4 + 2)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    expected = net.eval()(normal(7, 3))
    output = call(
        net.train(training), params_of(net), normal(7, 3), batch_stats="running", decompose=decompose
    )
    assert error(output, expected) < 1e-12
    assert error(call(net, params_of(net), normal(7, 3)), expected) > 1e-2
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("decompose", [False, True], ids=["fused", "decomposed"])
def test_instance_norm_uses_own_statistics_unless_it_tracks_and_running(decompose: bool) -> None:
    tracking = nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double()
    tracking(normal(9, 4, 5, seed=5) * 3 + 1)
    x, params = normal(7, 4, 5), params_of(tracking)
    by_instance = F.instance_norm(x)
    tracking.eval()
    assert error(call(tracking, params, x, decompose=decompose), by_instance) < 1e-12
    assert error(call(tracking, params, x, batch_stats="running", decompose=decompose), tracking(x)) < 1e-12
    plain = nn.InstanceNorm1d(4).double().eval()
    assert error(call(plain, {}, x, batch_stats="running", decompose=decompose), by_instance) < 1e-12


@pytest.mark.parametrize("decompose", [False, True], ids=["fused", "decomposed"])
def test_rejects_batch_norm_of_one_value_per_channel(decompose: bool) -> None:
    net = normed().eval()
    with pytest.raises(ValueError, match="more than one value per channel"):
        call(net, params_of(net), normal(1, 3), decompose=decompose)


def test_tied_parameter_stands_once() -> None:
    net = Tied().double()
    params = {"first.weight": normal(4, 4, seed=1)}
    assert dict(net.named_parameters()).keys() == params.keys()
    x, weight = normal(7, 4), params["first.weight"]
    assert error(call(net, params, x), torch.tanh(x @ weight.T) @ weight.T) < 1e-12


def test_network_may_write_into_its_input() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    x = normal(7, 3).requires_grad_()
    before = x.detach().clone()
    call(net, params_of(net), x).sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.equal(x.grad == 0, before <= 0)


def test_recurrent_network_keeps_its_own_parameters() -> None:
    net = nn.Sequential(nn.LSTM(3, 5)).double()
    lstm = net[0]
    x = normal(4, 7, 3)
    expected = lstm(x)[0].detach()

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    last = Last()
    other = {name: 2 * value for name, value in params_of(last).items()}
    assert error(call(last, other, x), expected) > 1e-2
    assert error(lstm(x)[0].detach(), expected) < 1e-12


def test_native_fast_path_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).double().eval()
    x = normal(3, 4, 8)
    params = params_of(layer)
    expected = layer(x.clone().requires_grad_()).detach()

    def taken(*args: object, **kwargs: object) -> None:
        raise AssertionError("native fast path taken")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", taken)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="fast path"):
            layer(x)
        for decompose in (False, True):
            assert error(call(layer, params, x, decompose=decompose), expected) < 1e-12


def test_returns_what_the_module_does() -> None:
    net = nn.LSTM(3, 5).double()
    x = normal(4, 7, 3)
    output, (hidden, cell) = call(net, params_of(net), x)
    want, (want_hidden, want_cell) = net(x)
    for got, expected in ((output, want), (hidden, want_hidden), (cell, want_cell)):
        assert error(got, expected) < 1e-12


@pytest.mark.parametrize(
    "output", [None, (), "text", object(), [object()]], ids=["None", "empty", "text", "object", "list"]
)
def test_rejects_output_that_holds_no_tensor(output: object) -> None:
    net = nn.Linear(3, 5)
    net.forward = lambda x: output
    with pytest.raises(TypeError, match="must return a tensor, or a tuple, list or dict of tensors, got"):
        call(net, params_of(net), normal(7, 3))


def test_check_batch_stats_accepts_what_can_run() -> None:
    check_batch_stats(normed(tracked=False), "task")
    net = normed()
    net(normal(7, 3))
    check_batch_stats(net, "running")
    check_batch_stats(nn.InstanceNorm1d(3), "running")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (normed(), "1 .BatchNorm1d. has seen no batch yet"),
        (normed(tracked=False), "1 .BatchNorm1d. tracks none"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "has seen no batch yet"),
    ],
    ids=["unseen", "untracked", "instance"],
)
def test_rejects_running_statistics_that_are_not_there(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch_stats(net, "running")


def test_rejects_unknown_batch_stats() -> None:
    with pytest.raises(ValueError, match="`batch_stats` must be 'task', 'running' or 'module', got 'own'"):
        check_batch_stats(normed(), "own")
