"""`batch_stats="module"`: every norm by its own .train() or .eval(), as the module itself does
it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain_autograd import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.backends.cuda.compile import host_compiler
from fastmeta.capture.capture import captured

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, STEPS, LR, TOLERANCE = 2, 2, 0.1, 1e-9
BACKENDS = ["reference", "torch", "cpu"]
needs_compiler = pytest.mark.skipif(not host_compiler(), reason="no C++ compiler to stand in for a GPU")


class Functional(nn.Module):
    """Batch norm by the function, with buffers of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, width))
        self.register_buffer("var", torch.linspace(0.5, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


def _seen(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        shape = (50, norm.num_features, *[3] * (1 if "2d" not in type(norm).__name__ else 2))
        norm.train()(2 * torch.randn(shape, dtype=torch.float64) + 1)
    return norm


def _vectors() -> nn.Sequential:
    first, second = (_seen(nn.BatchNorm1d(6).double()) for _ in range(2))
    untracked = nn.BatchNorm1d(6, track_running_stats=False).double()
    body = [nn.Linear(3, 6), first, nn.Tanh(), nn.Linear(6, 6), second, nn.Tanh(), untracked, nn.Tanh()]
    return nn.Sequential(*body, Functional(6), nn.Tanh(), nn.Linear(6, 2)).double()


def _images() -> nn.Sequential:
    norms = [_seen(nn.BatchNorm2d(4).double()), _seen(nn.BatchNorm2d(4, affine=False).double())]
    body = [nn.Conv2d(2, 4, 2), norms[0], nn.Tanh(), nn.Conv2d(4, 4, 2), norms[1], nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, 2)).double()


def _instance() -> nn.Sequential:
    norms = [_seen(nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double()) for _ in range(2)]
    body = [nn.Unflatten(1, (4, 3)), norms[0], nn.Tanh(), norms[1], nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(12, 2)).double()


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], list[int]]] = {
    "vectors": (_vectors, (3,), [1, 4, 6, 8]),  # the places of norms
    "images": (_images, (2, 4, 4), [1, 4]),
    "instance": (_instance, (12,), [1, 3]),
}


def _made(name: str, evaluated: int) -> tuple[nn.Sequential, list[Tensor]]:
    """The network, norms in eval mode where `evaluated` has a bit, and an episode."""
    make, shape, norms = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().train()
        sizes = [(TASKS, 5, *shape), (TASKS, 5, 2), (TASKS, 4, *shape), (TASKS, 4, 2)]
        episode = [torch.randn(size, dtype=torch.float64) for size in sizes]
    for bit, place in enumerate(norms):
        net[place].train(not evaluated >> bit & 1)
    return net, episode


def _plain(net: nn.Module, episode: list[Tensor]) -> list[Tensor]:
    """The meta-gradient of a loop over the module itself, its buffers given as copies that it may
    move."""
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    weight = dict(net.named_buffers())

    def run(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, {**theta, **{n: b.clone() for n, b in weight.items()}}, (x,))

    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*episode, strict=True):
        theta = dict(params)
        for _ in range(STEPS):
            grads = torch.autograd.grad(
                (run(theta, sx) - sy).square().mean(), list(theta.values()), create_graph=True
            )
            theta = {n: value - LR * g for (n, value), g in zip(theta.items(), grads, strict=True)}
        total = total + (run(theta, qx) - qy).square().mean() / TASKS
    return [total.detach(), *torch.autograd.grad(total, list(params.values()))]


def _ours(net: nn.Module, episode: list[Tensor], backend: str, **options: object) -> list[Tensor]:
    params = {name: value.detach() for name, value in net.named_parameters()}
    call = {"loss": "mse", "lr": LR, "steps": STEPS, "batch_stats": "module", "backend": backend, **options}
    got = fm.meta_gradient(net, params, tuple(episode[:2]), tuple(episode[2:]), **call)
    return [got.loss, *got.grads.values()]


def _same(got: list[Tensor], want: list[Tensor]) -> bool:
    # a bias that a norm subtracts has the gradient zero but for rounding
    return all(
        error(g, w) < TOLERANCE or max(g.abs().max(), w.abs().max()) < 1e-14
        for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("evaluated", range(4))
@pytest.mark.parametrize("name", NETS)
def test_every_norm_does_what_its_module_does(name: str, evaluated: int) -> None:
    net, episode = _made(
        name, evaluated + 4 * (evaluated == 2) + 8 * (evaluated > 1) if name == "vectors" else evaluated
    )
    before = {n: b.clone() for n, b in net.named_buffers()}
    want = _plain(net, episode)
    for backend in BACKENDS if name != "instance" else BACKENDS[:2]:
        assert _same(_ours(net, episode, backend), want), backend
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


@needs_compiler
def test_norms_on_cuda_do_what_their_modules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    net, episode = _made("vectors", 0b1001)
    assert _same(_ours(net, episode, "cuda"), _plain(net, episode))


def test_flags_that_change_are_noticed_and_programs_say_what_is_read() -> None:
    net, episode = _made("images", 0)
    maml = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS, batch_stats="module")
    seen = []
    for place in (None, 1, 4, None):
        net.train()
        if place is not None:
            net[place].eval()
        maml.zero_grad()
        out = maml(*episode)
        out.loss.backward()
        assert _same([out.loss.detach(), *[p.grad for p in net.parameters()]], _plain(net, episode))
        program, _ = captured(net, (2, 4, 4), torch.float64, "module")
        seen.append([layer.params[2] for layer in program.layers if layer.kind == "batch_norm"])
        assert ("transductive" in str(maml.explain(*episode))) is (None in seen[-1])
    assert seen == [[None, None], ["1.running_mean", None], [None, "4.running_mean"], [None, None]]
    assert captured(net, (2, 4, 4), torch.float64)[0].buffers == ()
    net.eval()
    assert "transductive" not in str(maml.explain(*episode))
    running = _ours(net, episode, "cpu", batch_stats="running")
    assert all(torch.equal(a, b) for a, b in zip(_ours(net, episode, "cpu"), running, strict=True))
    net.train()
    task = _ours(net, episode, "cpu", batch_stats="task")
    assert all(torch.equal(a, b) for a, b in zip(_ours(net, episode, "cpu"), task, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_example_in_eval_mode(backend: str) -> None:
    """Only a norm over its batch needs more than one value."""
    net, episode = _made("vectors", 0b1011)
    net[6] = nn.Identity()
    one = [tensor[:, :1] for tensor in episode]
    assert _same(_ours(net, one, backend), _plain(net, one))
    net[1].train()
    with pytest.raises(ValueError, match="more than one value per channel"):
        _ours(net, one, backend)


def test_masks_look_at_the_norms_that_use_the_batch() -> None:
    net, episode = _made("vectors", 0b1011)
    net[6] = nn.Identity()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    results = [_ours(net, episode, backend, support_weights=mask) for backend in BACKENDS]
    assert all(_same(result, results[0]) for result in results[1:])
    for place, who in ((4, r"4 \(BatchNorm1d\)"), (8, "batch_norm")):
        net[place].train()
        for backend in BACKENDS:
            with pytest.raises(
                ValueError, match=rf"`support_weights` is a mask, but {who} normalises by the whole batch"
            ):
                _ours(net, episode, backend, support_weights=mask)
        net[place].eval()


def test_rejects_norms_in_eval_mode_that_have_seen_nothing() -> None:
    net, episode = _made("vectors", 0)
    net[1] = nn.BatchNorm1d(6).double()
    _ours(net, episode, "cpu")  # in training mode that is no matter
    net[1].eval()
    for backend in BACKENDS:
        with pytest.raises(
            ValueError, match=r"`batch_stats='module'` .* 1 \(BatchNorm1d\) has seen no batch yet"
        ):
            _ours(net, episode, backend)
    with pytest.raises(
        ValueError, match=r"`batch_stats` must be one of 'task', 'running', 'module', got 'own'"
    ):
        _ours(net, episode, "cpu", batch_stats="own")
