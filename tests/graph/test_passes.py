"""What the graph passes decide, on small networks, for what each backend's kernels can do."""

from __future__ import annotations

import pytest
import torch
from capturing import program_of
from torch import Tensor, nn

from fastmeta.backends.cuda.network import CAPABILITIES as CUDA
from fastmeta.graph.nodes import Graph
from fastmeta.graph.passes import Capabilities, annotate

pytest.importorskip("fastmeta._C", reason="the extension is not built")
pytest.importorskip("triton", reason="Triton is not installed")

from fastmeta.backends.cpu.network import CAPABILITIES as CPU
from fastmeta.backends.triton.network import CAPABILITIES as TRITON

ALL = {"cpu": CPU, "cuda": CUDA, "triton": TRITON}
PLAIN = Capabilities(padded=True)


def graph_of(net: nn.Module, shape: tuple[int, ...], can: Capabilities = PLAIN, **options: bool) -> Graph:
    return annotate(program_of(net, shape), can, **options)


def kinds(graph: Graph) -> list[str]:
    return [node.function or node.kind for node in graph.nodes]


def convolutional(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), *between, nn.Flatten(), nn.LazyLinear(5))


def made(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net(torch.zeros(2, *shape))
    return net


CONV4 = (nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))


def test_without_capabilities_every_layer_is_a_node() -> None:
    graph = graph_of(made(convolutional(*CONV4), (1, 4, 4)), (1, 4, 4))
    # the reshape between channels-last and PyTorch's order is a node too
    assert kinds(graph) == ["conv2d", "batch_norm", "relu", "max_pool2d", "reshape", "linear"]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(2, ceil_mode=True)])
def test_cpu_takes_relu_and_pool_into_the_norm(pool: nn.Module) -> None:
    net = made(convolutional(nn.BatchNorm2d(3), nn.ReLU(), pool), (1, 5, 5))
    graph = graph_of(net, (1, 5, 5), CPU)
    norm = graph.nodes[1]
    assert norm.epilogue is not None
    assert norm.recomputes is graph.nodes[0]
    inside = pool.stride == pool.kernel_size and not pool.ceil_mode
    assert norm.pool == ((2, 2) if inside else None)
    rest = ["reshape", "linear"] if inside else ["max_pool2d", "reshape", "linear"]
    assert kinds(graph) == ["conv2d", "batch_norm", *rest]


def test_triton_pools_before_the_relu() -> None:
    net = made(convolutional(*CONV4), (1, 4, 4))
    graph = graph_of(net, (1, 4, 4), TRITON, input_gradients=True)
    assert kinds(graph) == ["conv2d", "batch_norm", "relu", "reshape", "linear"]
    conv, norm, relu = graph.nodes[:3]
    assert norm.pool == (2, 2)
    assert norm.epilogue is relu
    assert relu.in_forward
    assert not relu.in_backward
    assert norm.sums_from is conv
    assert norm.recomputes is None  # gradients of the input go through the convolution


def test_recomputes_only_what_one_norm_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    for can in (CPU, TRITON):
        assert all(node.recomputes is None for node in graph_of(Twice(), (1, 5, 5), can).nodes)


def test_cpu_joins_relus_between_wide_linear_layers() -> None:
    for width, joined in ((3, True), (2, False)):  # of two outputs each is an inner product
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        assert kinds(graph_of(net, (4,), CPU)) == (
            ["linear", "linear"] if joined else ["linear", "relu", "linear"]
        )
    last = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    assert kinds(graph_of(last, (4,), CPU)) == ["linear", "relu"]


def test_cuda_absorbs_activations_that_the_loss_does_not_read() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2), nn.Sigmoid())
    graph = graph_of(net, (4,), CUDA)
    assert kinds(graph) == ["linear", "layer_norm", "linear", "sigmoid"]
    assert [node.epilogue.function for node in graph.nodes if node.epilogue] == ["gelu", "tanh"]
    assert all(node.before is not None for node in graph.nodes if node.epilogue)


def test_folds_affine_functions_where_kernels_take_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3.0 * (self.linear(x) + 0.5) - 1.0)

    folded, plain = graph_of(Scaled(), (4,), TRITON), graph_of(Scaled(), (4,))
    assert kinds(plain) == ["linear", "affine", "affine", "affine", "sin"]
    assert kinds(folded) == ["linear", "sin"]
    assert (folded.nodes[1].scale, folded.nodes[1].shift) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("norm", "cancels"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.GroupNorm(2, 4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_of_channels_cancels_the_bias_before_it(norm: nn.Module, cancels: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm)
    assert graph_of(net, (1, 5, 5), CPU).nodes[0].bias_cancels == cancels
    assert not graph_of(net, (1, 5, 5)).nodes[0].bias_cancels


@pytest.mark.parametrize("padded", [False, True])
def test_views_vanish_where_nothing_moves(padded: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten(), nn.Tanh())
    graph = graph_of(net, (6,), Capabilities(padded=padded))
    # padded rows of another length lie elsewhere
    assert kinds(graph) == (
        ["linear", "reshape", "linear", "reshape", "tanh"] if padded else ["linear", "linear", "tanh"]
    )
    same = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 6)), nn.Linear(6, 4))
    assert kinds(graph_of(same, (6,), Capabilities(padded=padded))) == ["linear", "linear"]


def test_the_input_is_read_as_its_only_reader_wants_it() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for can in ALL.values():
        assert kinds(graph_of(net, (3, 2, 2), can)) == ["linear"]
    image = nn.Sequential(nn.Conv2d(3, 4, 2))
    assert kinds(graph_of(image, (3, 2, 2), CPU)) == ["conv2d", "reshape"]  # of the output
    assert kinds(graph_of(image, (3, 2, 2), CUDA)) == ["reshape", "conv2d", "reshape"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y


@pytest.mark.parametrize("name", ALL)
def test_one_reader_writes_a_gradient_and_the_others_add(name: str) -> None:
    graph = graph_of(Residual(), (4,), ALL[name])
    first, second, add = graph.nodes
    # backward: add comes first and hands on to both of its inputs, then `second` adds
    assert (add.adds, second.adds, first.adds) == ([False, False], [True], [False])
    assert (add.last, second.last, first.last) == ([True, False], [True], [True])
    assert [graph.from_params[v] for v in (0, first.output, second.output, add.output)] == [False] + [
        True
    ] * 3


def test_dead_reorders_and_unused_parameters_are_left_out() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    graph = graph_of(Unused(), (4,))
    assert kinds(graph) == ["linear"]
    assert {graph.params[p] for p in graph.used} == {"used.weight", "used.bias"}
