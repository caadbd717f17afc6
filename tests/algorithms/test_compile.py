"""`torch.compile(fullgraph=True)` around forward and loss, or with backward inside, gives eager's
bits."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from plain_autograd import episodes, network
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends.cuda.compile import host_compiler
from fastmeta.cases.networks import Transformer

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
LEARNED = [None, "scalar", "tensor", "element"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _maml(**options: object) -> fm.MAML:
    return fm.MAML(
        network(dtype=torch.float32), **{"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, **options}
    )


def _leaves(maml: fm.MAML, flat: bool) -> list[Tensor]:
    return [fm.flatten(maml)] if flat else list(maml.parameters())


def _eager(maml: fm.MAML, leaves: list[Tensor], episode: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = maml(*episode).loss
    loss.backward()
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return loss.detach(), grads


def _equal(leaves: list[Tensor], grads: list[Tensor]) -> bool:
    return all(
        leaf.grad is not None and torch.equal(leaf.grad, grad)
        for leaf, grad in zip(leaves, grads, strict=True)
    )


@pytest.mark.parametrize("flat", [False, True], ids=["separate", "flat"])
@pytest.mark.parametrize("learn_lr", LEARNED)
def test_compiled_forward_matches_eager(learn_lr: str | None, flat: bool) -> None:
    maml, episode = _maml(learn_lr=learn_lr), episodes(dtype=torch.float32)
    leaves = _leaves(maml, flat)
    loss, grads = _eager(maml, leaves, episode)
    eager = maml(*episode)
    out = torch.compile(lambda *batch: maml(*batch), fullgraph=True)(*episode)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), loss)
    assert torch.equal(out.task_losses, eager.task_losses)
    assert torch.equal(out.output, eager.output)
    assert not out.task_losses.requires_grad
    assert not out.output.requires_grad
    assert _equal(leaves, grads)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace backward() itself",
)
@pytest.mark.parametrize("zero_grad", ["inside", "outside"])
@pytest.mark.parametrize("learn_lr", [None, "tensor"])
def test_compiled_step_with_backward_matches_eager(learn_lr: str | None, zero_grad: str) -> None:
    maml, episode = _maml(learn_lr=learn_lr), episodes(dtype=torch.float32)
    leaves = list(maml.parameters())
    loss, grads = _eager(maml, leaves, episode)

    def step(*batch: Tensor) -> Tensor:
        if zero_grad == "inside":
            maml.zero_grad()
        out = maml(*batch)
        out.loss.backward()
        return out.loss.detach()

    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for _ in range(2):
            maml.zero_grad()
            got = compiled(*episode)
            assert torch.equal(got, loss)
            assert _equal(leaves, grads)


def test_compiled_training_follows_eager() -> None:
    episode = episodes(dtype=torch.float32)
    eager, maml = _maml(), _maml()
    compiled = torch.compile(maml, fullgraph=True)
    for module, parameters in ((eager, eager.parameters()), (compiled, maml.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(*episode).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), maml.parameters(), strict=True))


def test_compiled_without_gradients_matches_eager() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    with torch.no_grad():
        got = torch.compile(maml, fullgraph=True)(*episode)
        want = maml(*episode)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_weights_and_classes_match_eager() -> None:
    net = nn.Sequential(nn.Linear(2, 13), nn.BatchNorm1d(13), nn.Linear(13, 3))
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=0.1, inner_steps=1)
    x, labels = episodes(dtype=torch.float32)[0], torch.randint(0, 3, (3, 5))
    weights = torch.tensor([1.0, 0.5, 2.0])
    buffers = copy.deepcopy(dict(net.named_buffers()))
    loss, grads = _eager(maml, list(maml.parameters()), [x, labels, x, labels, weights])
    out = torch.compile(maml, fullgraph=True)(x, labels, x, labels, task_weights=weights)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), loss)
    assert _equal(list(maml.parameters()), grads)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_each_copy_runs_its_own_parameters() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    other = copy.deepcopy(maml)
    with torch.no_grad():
        other.net[0].weight.mul_(2)
    forward = torch.compile(lambda module, *batch: module(*batch).loss, fullgraph=True)
    assert torch.equal(forward(maml, *episode), maml(*episode).loss)
    assert torch.equal(forward(other, *episode), other(*episode).loss)
    assert not torch.equal(forward(maml, *episode), forward(other, *episode))


class Signed(nn.Module):
    """Looks at values: no tracer follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin() if x.sum() > 0 else self.linear(x).cos()


class LastOutput(nn.Module):
    """A recurrent layer, whose modules torch.compile does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def _any_module(kind: str) -> tuple[nn.Module, list[Tensor]]:
    """A network that no layer program takes, and an episode for it."""
    torch.manual_seed(0)
    nets: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: Transformer(3, 4, 8, 1),
        "transformer_dropout": lambda: Transformer(3, 4, 8, 1, dropout=0.3),
        "gru": LastOutput,
        "looks_at_values": Signed,
    }
    x, y, query_x, query_y = episodes(dtype=torch.float32)
    if kind != "looks_at_values":
        x, query_x = torch.randn(3, 5, 4, 3), torch.randn(3, 7, 4, 3)
    return nets[kind](), [x, y, query_x, query_y]


@pytest.mark.parametrize("kind", ["transformer", "transformer_dropout", "gru", "looks_at_values"])
def test_any_module_compiled_follows_eager(kind: str) -> None:
    net, episode = _any_module(kind)
    options = {"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, "task_chunk": 2, "learn_lr": "tensor"}
    maml = fm.MAML(net, **options)
    eager = copy.deepcopy(maml)
    assert maml.explain(*episode).backend == ("machine" if kind in ("transformer", "gru") else "torch")
    compiled = torch.compile(lambda *batch: maml(*batch), fullgraph=True)
    for module, call in ((eager, eager), (maml, compiled)):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            out = call(*episode)
            out.loss.backward()
            optimizer.step()
        module.last = out
    assert torch.isfinite(maml.last.loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maml.last, eager.last, strict=True))
    assert _equal(list(maml.parameters()), [parameter.grad for parameter in eager.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(maml.parameters(), eager.parameters(), strict=True))


def test_two_calls_in_a_graph_draw_two_masks() -> None:
    net, episode = _any_module("transformer_dropout")
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1)
    first, second = torch.compile(lambda *batch: (maml(*batch).loss, maml(*batch).loss), fullgraph=True)(
        *episode
    )
    assert not torch.equal(first, second)


def test_replaced_parts_of_a_recurrent_network_are_noticed() -> None:
    net, episode = _any_module("gru")
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1)
    compiled = torch.compile(lambda *batch: maml(*batch).loss, fullgraph=True)
    compiled(*episode)
    net.head.weight = nn.Parameter(2 * net.head.weight.detach())
    assert torch.equal(compiled(*episode), maml(*episode).loss)
    net.head = nn.Linear(4, 1)
    with pytest.raises(RuntimeError, match="modules of `net` were replaced"):
        compiled(*episode)
    assert torch.equal(compiled(*episode), maml(*episode).loss)


def test_operators_break_the_graph_and_are_right() -> None:
    net, (x, y, query_x, query_y) = network(), episodes()
    params = {name: value.detach() for name, value in net.named_parameters()}

    def function(scale: Tensor) -> Tensor:
        return (
            fm.meta_gradient(net, params, (x, y), (query_x, query_y), loss="mse", lr=0.1, steps=1).loss
            * scale
        )

    two = torch.tensor(2.0, dtype=torch.float64)
    assert torch.equal(torch.compile(function)(two), function(two))


@pytest.mark.skipif(not host_compiler(), reason="no C++ compiler to stand in for a GPU")
def test_outputs_of_the_operator_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which PyTorch will not allow; the sums of a launch stand side by side."""
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    maml = _maml(backend="cuda")
    support_x, support_y, query_x, query_y = episodes(dtype=torch.float32)
    leaves = [parameter.detach() for parameter in maml.parameters()]
    outputs = torch.ops.fastmeta.meta_loss(
        leaves,
        support_x,
        support_y,
        None,
        query_x,
        query_y,
        None,
        None,
        False,
        True,
        maml._machinery.handle,
        0,
    )
    assert outputs[3].numel() == sum(leaf.numel() for leaf in leaves)
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == len(outputs)


def test_rejects_inputs_that_require_grad_while_compiling() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    episode[0].requires_grad_()
    with pytest.raises(
        Exception, match=r"`support_x` requires grad, which is not supported under torch.compile"
    ):
        torch.compile(maml, fullgraph=True)(*episode)
