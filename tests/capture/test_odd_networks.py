"""Networks that few people bring: right on every backend that runs the module, or refused in one
sentence."""

from __future__ import annotations

import math

import pytest
import torch
from odd_networks import Through, check, episode_of, ours, plain, tensors
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import fastmeta as fm

BACKENDS = ("torch", "reference")


def _energy(net, z):
    return net.linear(z).tanh().sum()


TRANSFORMS = {
    "grad": lambda net, x: torch.func.grad(lambda z: _energy(net, z))(x),
    "vmap": lambda net, x: torch.func.vmap(lambda z: net.linear(z).tanh())(x),
    "vmap-grad": lambda net, x: torch.func.vmap(torch.func.grad(lambda z: _energy(net, z)))(x),
    "jvp": lambda net, x: torch.func.jvp(lambda z: net.linear(z).tanh(), (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda net, x: torch.func.vmap(torch.func.jacrev(lambda z: net.linear(z).tanh()))(x),
    "hessian": lambda net, x: torch.func.vmap(torch.func.hessian(lambda z: _energy(net, z)))(x),
}


class _Transformed(Through):
    def __init__(self, transform):
        super().__init__(None, 3)
        self.transform = transform

    def forward(self, x):
        return self.transform(self, x).flatten(1).mean(1, keepdim=True)


@pytest.mark.parametrize("memory", ["auto", "store", "recompute"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_inside_a_forward_matches_plain_loop(name, memory):
    net, episode = _Transformed(TRANSFORMS[name]), episode_of(4)
    check(ours(net, episode, "torch", memory=memory), plain(net, *episode))


def _distances(p, same):
    def function(h):
        return torch.cdist(h, h[:2] if same else h[:2] * 1.1, p=p)

    return function


def _own_distances(p, same):
    def function(h):
        difference = h.unsqueeze(1) - (h[:2] if same else h[:2] * 1.1)
        zero = (difference == 0).all(-1)
        apart = torch.where(zero.unsqueeze(-1), torch.ones_like(difference), difference)
        if p == math.inf:
            return torch.where(zero, 0.0, apart.abs().amax(-1))
        return torch.where(zero, 0.0, apart.abs().pow(p).sum(-1).pow(1 / p))

    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_distances_match_elementary_operators(p, same, backend):
    episode = episode_of(4)
    wanted = plain(Through(_own_distances(p, same)), *episode)
    check(ours(Through(_distances(p, same)), episode, backend), wanted)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


def _ctc(h):
    scores = h.reshape(-1, 4, 4).transpose(0, 1).log_softmax(-1)
    size = torch.full((h.shape[0],), 4)
    return F.ctc_loss(scores, torch.ones(len(h), 2, dtype=torch.int64), size, size // 2, reduction="none")[
        :, None
    ]


ONCE = {
    "Once": Once.apply,
    "ctc_loss": _ctc,
    "pdist": lambda h: F.pdist(h).expand(h.shape[0], -1),
    "multi_margin_loss": lambda h: F.multi_margin_loss(
        h, torch.zeros(len(h), dtype=torch.int64), reduction="none"
    )[:, None],
}


@pytest.mark.parametrize("memory", ["auto", "store", "recompute"])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONCE)
def test_rejects_second_order_without_second_derivative(name, backend, tasks, memory):
    net, episode = Through(ONCE[name]), [t[:tasks] for t in episode_of(4)]
    with pytest.raises(NotImplementedError, match=rf"`{name}`.* has no second derivative .*order='first'"):
        ours(net, episode, backend, memory=memory)
    if memory == "auto":
        check(ours(net, episode, backend, order="first"), plain(net, *episode, order="first"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_second_order_of_a_loss_without_second_derivative(backend):
    def loss(output, target):
        return Once.apply(output - target).square().mean()

    with pytest.raises(NotImplementedError, match=r"`Once`, marked once_differentiable, .*order='first'"):
        ours(nn.Linear(4, 1).double(), episode_of(4), backend, loss=loss)


def _layouts(p):
    order = range(p.dim() - 1, -1, -1)
    found = {"expanded": p[:1].expand_as(p), "reversed": p.permute(*order).contiguous().permute(*order)}
    if p.dim() == 4:
        found["channels-last"] = p.contiguous(memory_format=torch.channels_last)
    if p.dim() == 5:
        found["channels-last"] = p.contiguous(memory_format=torch.channels_last_3d)
    return found


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 4)),
    "grouped": (lambda: nn.Conv2d(2, 4, (2, 1), groups=2), (2, 3, 4)),
    "strided": (lambda: nn.Conv2d(2, 3, 2, stride=2, dilation=2), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 2, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 2, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_in_other_layouts_match_contiguous_ones(name, backend):
    make, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Tanh(), nn.Flatten(1), nn.LazyLinear(1)).double()
    x = tensors(2, 3, *shape)
    net(x[0])
    y = tensors(2, 3, 1)

    def answer(params, x):
        found = fm.meta_gradient(
            net,
            params,
            (x, y),
            (x, y),
            loss="mse",
            lr=0.1,
            steps=1,
            wrt=("params", "support_x"),
            backend=backend,
        )
        return [found.loss, *found.grads.values(), found.support_x]

    own = {name: value.detach() for name, value in net.named_parameters()}
    for layout in ("expanded", "reversed", "channels-last"):
        strided = {key: _layouts(value).get(layout, value) for key, value in own.items()}
        dense = {key: value.clone(memory_format=torch.contiguous_format) for key, value in strided.items()}
        wanted = answer(dense, x)
        check(answer(strided, x.transpose(1, -1).contiguous().transpose(1, -1)), wanted)
        if layout != "reversed":
            continue
        per_task = {key: value.unsqueeze(0).expand(2, *value.shape) for key, value in strided.items()}
        found = answer(per_task, x)
        check([found[0], *(g.sum(0) for g in found[1:-1]), found[-1]], wanted)


def _base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()


def _failing(graph, inputs):
    raise RuntimeError("no compiler here")


def _compiled_in_place():
    net = _base()
    net.compile(backend=_failing)
    return net


class _Holds(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside, self.last = inside, nn.Linear(1, 1).double()

    def forward(self, x):
        return self.last(self.inside(x))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(_base(), backend=_failing),
        lambda: torch.compile(_base(), backend="eager"),
        _compiled_in_place,
        lambda: _Holds(torch.compile(_base(), backend=_failing)),
    ],
    ids=["failed", "compiled", "in-place", "inside"],
)
def test_compiled_network_matches_its_own(make, backend):
    episode, net = episode_of(4), make()
    plain = _Holds(_base()) if isinstance(net, _Holds) else _base()
    if isinstance(net, _Holds):
        plain.last.load_state_dict(net.last.state_dict())
    check(ours(net, episode, backend), ours(plain, episode, "reference"))


class _TwoInputs(nn.Linear):
    def forward(self, x, z):
        return super().forward(x) + z


class _KeywordOnly(nn.Linear):
    def forward(self, *, x):
        return super().forward(x)


class _Returns(nn.Linear):
    def forward(self, x):
        return self.wrap(super().forward(x))


def _returning(wrap):
    net = _Returns(4, 1).double()
    net.wrap = wrap
    return net


REFUSED = {
    "scripted": (lambda: torch.jit.script(_base()), "it is a TorchScript module.*pass the Python module"),
    "traced": (lambda: torch.jit.trace(_base().eval(), torch.ones(2, 4).double()), "TorchScript module"),
    "scripted-inside": (lambda: _Holds(torch.jit.script(_base())), "its `inside` is a TorchScript module"),
    "data-parallel": (lambda: nn.DataParallel(_base()), "it is a DataParallel.*pass what it wraps"),
    "complex": (
        lambda: nn.Linear(4, 1, dtype=torch.complex128),
        "must be floating point, got torch.complex128",
    ),
    "two-inputs": (lambda: _TwoInputs(4, 1).double(), "`net` must take one tensor, _TwoInputs.forward .*'z'"),
    "keyword-only": (lambda: _KeywordOnly(4, 1).double(), "`net` must take one tensor"),
    "tuple": (
        lambda: _returning(lambda y: (y, y)),
        "`net`: the network's output must be one tensor for mse, got tuple; a function",
    ),
    "dict": (
        lambda: _returning(lambda y: {"y": y}),
        "`net`: the network's output must be one tensor for mse, got dict; a function",
    ),
    "none": (lambda: _returning(lambda y: None), "`net` must return a tensor, .* _Returns returned NoneType"),
    "array": (
        lambda: _returning(lambda y: (y, y.detach().numpy())),
        r"`net` must return a tensor, .* _Returns returned ndarray at \[1\]",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", REFUSED)
def test_rejects_networks_that_cannot_be_called(name, backend):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=f"^MAML: .*{message}"):
        fm.MAML(make(), loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)(*episode_of(4))
