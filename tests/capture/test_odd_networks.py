"""Networks that few people bring: right on every backend that runs the module, or refused in one
sentence."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import fastmeta as fm

BACKENDS = ("torch", "reference")


def _tensors(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _plain(net, sx, sy, qx, qy, loss=F.mse_loss, order="second", steps=2, swap=torch.func.functional_call):
    """The mean query loss and its gradients, by a loop."""
    losses = []
    for task in zip(sx, sy, qx, qy, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(steps):
            inner = loss(swap(net, theta, (task[0],)), task[1])
            gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=order == "second")
            theta = {k: v - 0.1 * g for (k, v), g in zip(theta.items(), gradient, strict=True)}
        losses.append(loss(swap(net, theta, (task[2],)), task[3]))
    mean = torch.stack(losses).mean()
    return [mean.detach(), *torch.autograd.grad(mean, list(net.parameters()))]


def _ours(net, episode, backend, **options):
    net.zero_grad()
    maml = fm.MAML(net, **{"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, "backend": backend, **options})
    loss = maml(*episode).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def _check(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


class _Through(nn.Module):
    """A linear layer and a function of what it gives."""

    def __init__(self, function, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(4, width).double(), function

    def forward(self, x):
        return self.function(self.linear(x)).flatten(1).mean(1, keepdim=True)


def _episode(*shape, seed=0):
    x = _tensors(2, 2, 4, *shape, seed=seed)
    y = _tensors(2, 2, 4, 1, seed=seed + 1)
    return x[0], y[0], x[1], y[1]


# ---- torch.func inside a forward


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


class _Transformed(_Through):
    def __init__(self, transform):
        super().__init__(None, 3)
        self.transform = transform

    def forward(self, x):
        return self.transform(self, x).flatten(1).mean(1, keepdim=True)


@pytest.mark.parametrize("memory", ["auto", "store", "recompute"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_inside_a_forward_matches_plain_loop(name, memory):
    net, episode = _Transformed(TRANSFORMS[name]), _episode(4)
    _check(_ours(net, episode, "torch", memory=memory), _plain(net, *episode))


# ---- embeddings


class _Looked(nn.Module):
    def __init__(self, table, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.options = table(5, 3, **options).double(), options
        self.linear = nn.Linear(3, 1).double()

    def forward(self, x):
        return self.linear(self.table(x).reshape(len(x), -1, 3).mean(1)).tanh()


def _indices():
    x = torch.randint(0, 5, (2, 2, 4, 3), generator=torch.Generator().manual_seed(0))
    y = _tensors(2, 2, 4, 1)
    return x[0], y[0], x[1], y[1]


def _one_hot_swap(net, theta, x):
    """The network by products with one-hot matrices, without any embedding."""
    (x,) = x
    weight, options = theta["table.weight"], net.options
    one_hot = F.one_hot(x, 5).double()
    if "max_norm" in options:
        sizes = weight.detach().norm(2, 1, keepdim=True)
        scale = torch.where(sizes > options["max_norm"], options["max_norm"] / (sizes + 1e-7), 1.0)
        weight = weight + (weight * scale - weight).detach()
    if options.get("scale_grad_by_freq"):
        share = weight / one_hot.sum((0, 1)).clamp_min(1).unsqueeze(1)
        weight = share + (weight - share).detach()
    if isinstance(net.table, nn.Embedding):
        if options.get("padding_idx") is not None:
            keep = torch.arange(5).ne(options["padding_idx"]).unsqueeze(1)
            weight = torch.where(keep, weight, weight.detach())
        rows = (one_hot @ weight).mean(1)
    else:
        used = x.ne(options.get("padding_idx", -1)).double()
        rows = one_hot @ weight
        if options["mode"] == "max":
            rows = rows.masked_fill(used.unsqueeze(-1) == 0, -math.inf).amax(1)
            rows = rows.masked_fill(used.sum(1, keepdim=True) == 0, 0.0)
        else:
            rows = (used.unsqueeze(-1) * rows).sum(1)
            rows = rows / used.sum(1, keepdim=True).clamp_min(1) if options["mode"] == "mean" else rows
    return torch.tanh(rows @ theta["linear.weight"].T + theta["linear.bias"])


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("table", "options"),
    [
        (nn.Embedding, {"sparse": True}),
        (nn.Embedding, {"scale_grad_by_freq": True}),
        (nn.Embedding, {"padding_idx": 1, "scale_grad_by_freq": True}),
        (nn.EmbeddingBag, {"mode": "sum"}),
        (nn.EmbeddingBag, {"mode": "mean", "padding_idx": 1}),
        (nn.EmbeddingBag, {"mode": "max", "padding_idx": 1}),
        (nn.EmbeddingBag, {"mode": "mean", "sparse": True}),
        (nn.EmbeddingBag, {"mode": "sum", "scale_grad_by_freq": True}),
    ],
    ids=str,
)
def test_embedding_matches_one_hot_products(table, options, backend, tasks):
    net, episode = _Looked(table, **options), [t[:tasks] for t in _indices()]
    wanted = _plain(net, *episode, swap=_one_hot_swap)
    _check(_ours(net, episode, backend), wanted)
    assert not any(p.grad.is_sparse for p in net.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("table", "options"), [(nn.Embedding, {}), (nn.EmbeddingBag, {"mode": "sum"})], ids=str
)
def test_renormalised_embedding_that_is_not_adapted_matches_one_hot_products(table, options, backend):
    net, episode = _Looked(table, max_norm=0.5, **options), _indices()
    before = copy.deepcopy(net.state_dict())
    losses = []
    for sx, sy, qx, qy in zip(*episode, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(2):
            head = [theta["linear.weight"], theta["linear.bias"]]
            inner = F.mse_loss(_one_hot_swap(net, theta, (sx,)), sy)
            weight, bias = torch.autograd.grad(inner, head, create_graph=True)
            theta = {**theta, "linear.weight": head[0] - 0.1 * weight, "linear.bias": head[1] - 0.1 * bias}
        losses.append(F.mse_loss(_one_hot_swap(net, theta, (qx,)), qy))
    mean = torch.stack(losses).mean()
    wanted = [mean.detach(), *torch.autograd.grad(mean, list(net.parameters()))]
    _check(_ours(net, episode, backend, adapt="head"), wanted)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_rejects_adapting_a_renormalised_embedding(table, backend):
    net = _Looked(table, max_norm=0.5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"`adapt` has 'table\.weight', which \w+\(max_norm=0\.5\).*adapt the other"
    ):
        _ours(net, _indices(), backend)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_offsets_match_torch(mode, last):
    from fastmeta.network.twice import embedding_bag

    weight, indices = _tensors(5, 3).requires_grad_(), torch.tensor([0, 1, 1, 4, 2, 3, 1])
    offsets = torch.tensor([0, 2, 2, 5, *([7] if last else [])])
    options = {"mode": mode, "include_last_offset": last, "padding_idx": 1}
    if mode == "sum":
        options["per_sample_weights"] = _tensors(7, seed=1).requires_grad_()
    leaves = [weight, *([options["per_sample_weights"]] if mode == "sum" else [])]
    answers = []
    for function in (embedding_bag, F.embedding_bag):
        output = function(indices, weight, offsets, **options)
        gradient = torch.autograd.grad(output.square().sum(), leaves)
        answers.append([output.detach(), *gradient])
    _check(*answers)


# ---- second derivatives


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
    episode = _episode(4)
    wanted = _plain(_Through(_own_distances(p, same)), *episode)
    _check(_ours(_Through(_distances(p, same)), episode, backend), wanted)


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
    net, episode = _Through(ONCE[name]), [t[:tasks] for t in _episode(4)]
    with pytest.raises(NotImplementedError, match=rf"`{name}`.* has no second derivative .*order='first'"):
        _ours(net, episode, backend, memory=memory)
    if memory == "auto":
        _check(_ours(net, episode, backend, order="first"), _plain(net, *episode, order="first"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_second_order_of_a_loss_without_second_derivative(backend):
    def loss(output, target):
        return Once.apply(output - target).square().mean()

    with pytest.raises(NotImplementedError, match=r"`Once`, marked once_differentiable, .*order='first'"):
        _ours(nn.Linear(4, 1).double(), _episode(4), backend, loss=loss)


# ---- convolutions with weights in other layouts


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
    x = _tensors(2, 3, *shape)
    net(x[0])
    y = _tensors(2, 3, 1)

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
        _check(answer(strided, x.transpose(1, -1).contiguous().transpose(1, -1)), wanted)
        if layout != "reversed":
            continue
        per_task = {key: value.unsqueeze(0).expand(2, *value.shape) for key, value in strided.items()}
        found = answer(per_task, x)
        _check([found[0], *(g.sum(0) for g in found[1:-1]), found[-1]], wanted)


# ---- wrappers and signatures


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
    episode, net = _episode(4), make()
    plain = _Holds(_base()) if isinstance(net, _Holds) else _base()
    if isinstance(net, _Holds):
        plain.last.load_state_dict(net.last.state_dict())
    _check(_ours(net, episode, backend), _ours(plain, episode, "reference"))


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
    "tuple": (lambda: _returning(lambda y: (y, y)), "`net` must return one tensor, _Returns returned tuple"),
    "dict": (lambda: _returning(lambda y: {"y": y}), "`net` must return one tensor, _Returns returned dict"),
    "none": (lambda: _returning(lambda y: None), "`net` must return one tensor, _Returns returned NoneType"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", REFUSED)
def test_rejects_networks_that_cannot_be_called(name, backend):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=f"^MAML: .*{message}"):
        fm.MAML(make(), loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)(*_episode(4))
