"""The torch backend against the reference: every gradient, every option, any module."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from problems import EVERYTHING, assert_same, error, make_problem, mlp, tensors_of
from torch import Tensor, nn

from fastmeta.backends import reference
from fastmeta.backends import torch as backend
from fastmeta.problem import Batch, Problem

torch.manual_seed(0)

OPTIONS = {
    "plain": {},
    "no_steps": {"steps": 0, "cotangents": True},
    "one_step": {"steps": 1},
    "three_steps": {"steps": 3, "rate_form": "step"},
    "first_order": {"order": "first", "rate_form": "element", "weight_decay": 0.2},
    "first_order_momentum": {
        "order": "first",
        "steps": 3,
        "momentum": 0.5,
        "weight_decay": 0.2,
        "rate_form": "all",
    },
    "momentum": {"steps": 3, "momentum": 0.6, "weight_decay": 0.2, "rate_form": "all", "step_weights": True},
    "rates_task": {"rate_form": "task"},
    "rates_element": {"rate_form": "element"},
    "own_parameters": {"per_task": "all", "cotangents": True},
    "some_own_parameters": {"per_task": "some", "adapt": ("0.weight", "0.bias"), "cotangents": True},
    "some_own_no_steps": {"per_task": "some", "steps": 0, "cotangents": True},
    "head": {"adapt": ("2.weight", "2.bias"), "cotangents": True, "steps": 3},
    "nothing_adapted": {"adapt": (), "cotangents": True},
    "step_weights": {"step_weights": True, "steps": 3},
    "weighted": {"weighted": True, "step_weights": True},
    "per_step": {"per_step": True, "weighted": True, "rate_form": "step", "steps": 3, "cotangents": True},
    "cross_entropy": {"loss": "cross_entropy", "weighted": True},
    "custom_loss": {"loss": lambda output, target: (output - target).abs().pow(3).mean()},
    "one_task": {"tasks": 1, "cotangents": True, "step_weights": True},
    "one_example": {"shots": 1, "queries": 1},
    "one_of_each": {"tasks": 1, "shots": 1, "queries": 1, "steps": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_matches_reference(options: dict) -> None:
    problem = make_problem(mlp(), **options)
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))
    assert not [note for note in backend.notes(problem) if "loop" in note]


@pytest.mark.parametrize("chunk", [1, 2], ids=["one_at_a_time", "two_at_a_time"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chunks_of_tasks_match_reference(options: dict, chunk: int) -> None:
    problem = make_problem(mlp(), task_chunk=chunk, memory=("store", "recompute")[chunk - 1], **options)
    found = backend.solve(problem, EVERYTHING, True)
    assert_same(found, reference.solve(problem, EVERYTHING, True))
    assert list(found.grads.params) == list(problem.params)
    assert list(found.adapted) == list(problem.params)


class Recurrent(nn.Module):
    """A recurrent cell run by hand, or a whole recurrent layer."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        layer = kind in (nn.LSTM, nn.GRU)
        self.core = kind(3, 6, batch_first=True) if layer else kind(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, 3]
        if isinstance(self.core, (nn.LSTM, nn.GRU)):
            return self.head(self.core(x)[0][:, -1])
        state = None
        for step in x.unbind(1):
            state = self.core(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def conv(norm: nn.Module) -> nn.Module:
    block = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, bias=False), norm, nn.Softplus(), nn.MaxPool2d(2))
    return nn.Sequential(block, nn.Flatten(), nn.Linear(45, 3))


def dense(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 13, bias=False), norm, nn.Tanh(), nn.Linear(13, 2))


def transformer(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, activation="gelu", **options)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 2))


NETWORKS = {
    "batch_norm": (lambda: dense(nn.BatchNorm1d(13)), (3,)),
    "layer_norm": (lambda: dense(nn.LayerNorm(13)), (3,)),
    "rms_norm": (lambda: dense(nn.RMSNorm(13)), (3,)),
    "conv_batch_norm": (lambda: conv(nn.BatchNorm2d(5)), (2, 6, 6)),
    "conv_group_norm": (lambda: conv(nn.GroupNorm(1, 5)), (2, 6, 6)),
    "conv_instance_norm": (lambda: conv(nn.InstanceNorm2d(5, affine=True)), (2, 6, 6)),
    "transformer": (transformer, (4, 8)),
    "transformer_norm_first": (lambda: transformer(norm_first=True), (4, 8)),
    "lstm_cell": (lambda: Recurrent(nn.LSTMCell), (4, 3)),
    "gru_cell": (lambda: Recurrent(nn.GRUCell), (4, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_module_matches_reference(name: str, training: bool) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double().train(training)
    # an affine part that is not the identity
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    buffers = {key: buffer.clone() for key, buffer in net.named_buffers()}
    problem = make_problem(net, shape, momentum=0.3, cotangents=True, step_weights=True)
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    assert backend.notes(problem) == []


def test_running_statistics_match_reference() -> None:
    net = dense(nn.BatchNorm1d(13)).double()
    net(3 * torch.randn(50, 3, dtype=torch.float64) + 1)
    own = make_problem(net)
    problem = make_problem(net, batch_stats="running")
    found = backend.solve(problem, EVERYTHING, True)
    assert_same(found, reference.solve(problem, EVERYTHING, True))
    assert error(found.output, backend.solve(own, EVERYTHING, True).output) > 1e-2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("solver", [backend, reference], ids=["torch", "reference"])
def test_modes_without_gradients_change_nothing(solver: object, mode: type) -> None:
    net = dense(nn.BatchNorm1d(13)).double()
    options = {"weighted": True, "cotangents": True, "per_task": "some", "momentum": 0.3}
    expected = solver.solve(make_problem(net, **options), EVERYTHING, True)
    with mode():
        found = solver.solve(make_problem(net, **options), EVERYTHING, True)
        assert_same(found, expected, tolerance=0.0)
    assert not found.grads.support_x.is_inference()


def test_autocast_changes_nothing_of_the_reference() -> None:
    problem = make_problem(mlp(dtype=torch.float32))
    expected = reference.solve(problem, EVERYTHING, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(reference.solve(problem, EVERYTHING, True), expected, tolerance=0.0)


@pytest.mark.parametrize("solver", [backend, reference], ids=["torch", "reference"])
def test_results_own_their_memory_and_inputs_stay_as_they_are(solver: object) -> None:
    net = nn.Sequential(nn.Tanhshrink(), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    net = nn.Sequential(nn.ReLU(inplace=True), net)
    for options in (
        {"steps": 0},
        {"steps": 2, "weighted": True},
        {"per_task": "all", "adapt": ("1.2.bias",)},
    ):
        problem = make_problem(net, cotangents=True, **options)
        for tensor in problem.params.values():
            tensor.requires_grad_()
        batches = (problem.support, problem.query)
        inputs = [t for b in batches for t in (b.x, b.y, b.weights) if t is not None]
        inputs += [*problem.params.values(), *problem.rates.values(), problem.output_grad, *net.parameters()]
        inputs += [*problem.adapted_grad.values()]
        before = [tensor.detach().clone() for tensor in inputs]
        for tensor in tensors_of(solver.solve(problem, EVERYTHING, True)).values():
            tensor.fill_(torch.nan)
        for tensor, value in zip(inputs, before, strict=True):
            assert torch.equal(tensor.detach(), value)


def test_only_what_is_asked_for_is_returned_and_right() -> None:
    problem = make_problem(mlp(), weighted=True, momentum=0.5, adapt=("0.weight", "2.bias"))
    everything = tensors_of(reference.solve(problem, EVERYTHING, False))
    assert tensors_of(backend.solve(problem, frozenset(), False)).keys() == {"task_losses", "output"}
    for name in EVERYTHING:
        found = tensors_of(backend.solve(problem, frozenset({name}), False))
        wanted = {key for key in everything if key.split("[")[0] in (name, "task_losses", "output")}
        assert found.keys() == wanted
        for key in wanted:
            assert error(found[key], everything[key]) < 1e-9, key


def test_without_query_set_matches_reference() -> None:
    problem = make_problem(mlp(), cotangents=True, steps=3)
    problem.query = problem.query_loss = problem.output_grad = None
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))


def test_task_forward_matches_reference() -> None:
    whole = make_problem(mlp(), per_task="some", cotangents=True)
    query = Batch(whole.query.x)
    problem = Problem(
        net=whole.net,
        params=whole.params,
        per_task=whole.per_task,
        tasks=3,
        steps=0,
        query=query,
        output_grad=whole.output_grad,
    )
    found = backend.solve(problem, EVERYTHING, False)
    assert found.task_losses is None
    assert_same(found, reference.solve(problem, EVERYTHING, False))


@pytest.mark.parametrize("padding", [None, -2])
def test_integer_inputs_match_reference(padding: int | None) -> None:
    net = nn.Sequential(nn.Embedding(9, 4, padding_idx=padding), nn.Flatten(), nn.Linear(12, 2)).double()
    problem = make_problem(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).double())
    problem.net, problem.params = net, {name: value.detach() for name, value in net.named_parameters()}
    problem.rates = {
        name: torch.full((1,) * (value.dim() + 2), 0.2).double() for name, value in problem.params.items()
    }
    for batch in (problem.support, problem.query):
        batch.x = torch.randint(9, batch.x.shape)
        batch.x[0, 0, 0] = 7  # the row of padding
    found = backend.solve(problem, EVERYTHING, True)
    assert found.grads.support_x is None
    assert_same(found, reference.solve(problem, EVERYTHING, True))


def test_non_contiguous_tensors_match_reference() -> None:
    problem = make_problem(mlp(), per_step=True, per_task="all", weighted=True)
    expected = reference.solve(problem, EVERYTHING, True)
    for batch in (problem.support, problem.query):
        batch.x = batch.x.transpose(0, 1).contiguous().transpose(0, 1)
        batch.y = batch.y[..., :1].expand_as(batch.y) * 0 + batch.y.transpose(0, 1).contiguous().transpose(
            0, 1
        )
    problem.params = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in problem.params.items()
    }
    assert_same(backend.solve(problem, EVERYTHING, True), expected)


def test_float32_matches_float64_reference() -> None:
    problem = make_problem(dense(nn.BatchNorm1d(13)).float(), steps=2)
    double = make_problem(dense(nn.BatchNorm1d(13)).double(), steps=2)
    double.params = {name: value.double() for name, value in problem.params.items()}
    for ours, theirs in ((problem.support, double.support), (problem.query, double.query)):
        theirs.x, theirs.y = ours.x.double(), ours.y.double()
    double.rates = {name: rate.double() for name, rate in problem.rates.items()}
    found, expected = (
        tensors_of(s.solve(p, EVERYTHING, True)) for s, p in ((backend, problem), (reference, double))
    )
    assert backend.notes(problem) == []
    for name, value in expected.items():
        assert error(found[name].double(), value) < 1e-5, name


@pytest.mark.parametrize("solver", [backend, reference], ids=["torch", "reference"])
def test_rejects_class_index_out_of_range(solver: object) -> None:
    problem = make_problem(mlp(outputs=4), loss="cross_entropy")
    problem.query.y[2, 1] = -1
    with pytest.raises(
        ValueError, match=r"`query_y` must hold class indices in \[0, 4\).*got -1 at \[2, 1\]"
    ):
        solver.solve(problem, EVERYTHING, False)


def test_network_is_not_kept_alive() -> None:
    net = mlp()
    problem = make_problem(net, loss="cross_entropy")
    backend.solve(problem, EVERYTHING, True)
    alive = ref(net)
    del net, problem
    gc.collect()
    assert alive() is None
