"""Tasks of different sizes, padded and masked, against each task by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_autograd import episodes, error, network
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 2
SIZES, QUERIES = (5, 1, 3), (4, 7, 2)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def _mask(sizes: tuple[int, ...], most: int) -> Tensor:
    return torch.arange(most) < torch.tensor(sizes)[:, None]


SUPPORT, QUERY = _mask(SIZES, 5), _mask(QUERIES, 7)


def _make(algorithm: type[nn.Module] = fm.MAML, net: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options}
    return algorithm(network() if net is None else net, **options)


def _alone(
    algorithm: type[nn.Module], sets: list[Tensor], **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, gradients): task by task, without its padding."""
    module, losses = _make(algorithm, **options), []
    for t in range(3):
        x, y, query_x, query_y = (tensor[t : t + 1] for tensor in sets)
        n, m = SIZES[t], QUERIES[t]
        out = module(x[:, :n], y[:, :n], query_x[:, :m], query_y[:, :m])
        (out.loss / 3).backward()
        losses.append(out.loss.detach())
    return losses, [value.grad for value in module.parameters()]


@BACKENDS
@pytest.mark.parametrize("padding", [0.0, 1e3])
@pytest.mark.parametrize("norm", ["count", "sum"])
def test_masked_tasks_are_as_if_alone(norm: str, padding: float, backend: str) -> None:
    sets = episodes()
    losses, gradients = _alone(fm.MAML, sets, backend=backend)
    for tensor, mask in zip(sets, (SUPPORT, SUPPORT, QUERY, QUERY), strict=True):
        tensor[~mask] = padding
    module = _make(backend=backend, weight_norm=norm)
    out = module(*sets, support_weights=SUPPORT, query_weights=QUERY)
    out.loss.backward()
    assert error(out.task_losses, torch.stack(losses)) < TOLERANCE
    assert all(error(p.grad, g) < TOLERANCE for p, g in zip(module.parameters(), gradients, strict=True))


@pytest.mark.parametrize("loss", ["cross_entropy", nn.MSELoss(reduction="sum")], ids=["classes", "sum"])
def test_losses_with_denominators_of_their_own(loss: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, _, query_x, _ = episodes()
    y, query_y = (torch.arange(3 * n).reshape(3, n) % 3 for n in (5, 7))
    if not isinstance(loss, str):
        y, query_y = (F.one_hot(target).double() for target in (y, query_y))
    sets = [x, y, query_x, query_y]
    losses, _ = _alone(fm.MAML, sets, net=net, loss=loss)
    out = _make(net=net, loss=loss)(*sets, support_weights=SUPPORT, query_weights=QUERY)
    assert error(out.task_losses, torch.stack(losses)) < TOLERANCE


@BACKENDS
@pytest.mark.parametrize("ignored", [-100, 0])
def test_masked_examples_may_have_any_class(ignored: int, backend: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, _, query_x, _ = episodes()
    y, query_y = (1 + torch.arange(3 * n).reshape(3, n) % 2 for n in (5, 7))
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 1.0, 2.0]).double(), label_smoothing=0.1, ignore_index=ignored
    )
    module = _make(net=net, loss=loss, backend=backend)
    want = module(x, y, query_x, query_y, support_weights=SUPPORT, query_weights=QUERY)
    wild, query_wild = y.masked_fill(~SUPPORT, 99), query_y.masked_fill(~QUERY, -7)
    got = module(x, wild, query_x, query_wild, support_weights=SUPPORT, query_weights=QUERY)
    assert torch.equal(got.task_losses, want.task_losses)
    assert (wild[~SUPPORT] == 99).all()
    with pytest.raises(ValueError, match="`support_y` must hold class indices"):
        module(x, wild, query_x, query_y, query_weights=QUERY)


@pytest.mark.parametrize("algorithm", [fm.MetaCurvature, fm.IMAML, fm.FOMAML])
def test_relatives_take_masks(algorithm: type[nn.Module]) -> None:
    options = {"proximal": 2.0, "cg_tolerance": 1e-12} if algorithm is fm.IMAML else {}
    sets = episodes()
    losses, gradients = _alone(algorithm, sets, **options)
    module = _make(algorithm, **options)
    out = module(*sets, support_weights=SUPPORT, query_weights=QUERY)
    out.loss.backward()
    assert error(out.task_losses, torch.stack(losses)) < TOLERANCE
    assert all(error(p.grad, g) < TOLERANCE for p, g in zip(module.parameters(), gradients, strict=True))


def test_a_mask_for_every_step_and_for_inner_sgd() -> None:
    net, (x, y, _, _) = network(), episodes()
    params = dict(net.named_parameters())
    sets = x[:, None].repeat(1, STEPS, 1, 1), y[:, None].repeat(1, STEPS, 1, 1)
    masks = SUPPORT[:, None].repeat(1, STEPS, 1)
    options: dict[str, Any] = {"loss": "mse", "lr": LR, "steps": STEPS}
    got = fm.inner_sgd(net, params, *sets, weights=masks, support_per_step=True, **options)
    for t, n in enumerate(SIZES):
        want = fm.inner_sgd(net, params, x[t : t + 1, :n], y[t : t + 1, :n], **options)
        assert all(error(got[name][t].detach(), want[name][0].detach()) < TOLERANCE for name in params)


def _normed(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), norm, nn.Linear(4, 1)).double()


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.linear(x), None, None, training=True)


def test_rejects_masks_where_a_layer_uses_the_batch() -> None:
    sets = episodes()
    for field, mask in (("support_weights", SUPPORT), ("query_weights", QUERY)):
        for net, layer in (
            (_normed(nn.BatchNorm1d(4)), r"1 \(BatchNorm1d\)"),
            (_Functional().double(), "batch_norm"),
        ):
            module = _make(net=net)
            module(*sets)
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=f"MAML: `{field}` is a mask, but {layer} normalises by the whole"
                ):
                    module(*sets, **{field: mask})
    net = _normed(nn.BatchNorm1d(4))
    net(sets[0].flatten(0, 1))
    assert _make(net=net, batch_stats="running")(*sets, support_weights=SUPPORT).loss.isfinite()
    assert _make(net=_normed(nn.LayerNorm(4)))(*sets, support_weights=SUPPORT).loss.isfinite()


def test_rejects_masks() -> None:
    module, sets = _make(), episodes()
    nothing = SUPPORT.clone()
    nothing[1] = False
    for options, message in (
        ({"support_weights": nothing}, r"MAML: `support_weights` leaves no example of tasks \[1\]"),
        ({"support_weights": SUPPORT[:, :3]}, r"MAML: `support_weights` must be .* = \(3, 5\), got \(3, 3\)"),
        ({"query_weights": QUERY[0]}, r"MAML: `query_weights` must be \[T, M\]"),
        ({"task_weights": SUPPORT[:, 0]}, r"MAML: `task_weights` must be torch.float64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            module(*sets, **options)
    module = _make(loss=lambda output, target: (output - target).square().mean())
    with pytest.raises(ValueError, match="example weights need a loss with a name"):
        module(*sets, support_weights=SUPPORT)


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.MetaCurvature, fm.Reptile])
def test_adaptation_takes_a_mask(algorithm: type[nn.Module]) -> None:
    module, (x, y, _, _) = _make(algorithm), episodes()
    got = module.adapt(x, y, weights=SUPPORT)
    for t, n in enumerate(SIZES):
        want = module.adapt(x[t : t + 1, :n], y[t : t + 1, :n])
        assert all(
            error(got[name][t].detach(), value[0].detach()) < TOLERANCE for name, value in want.items()
        )
    with pytest.raises(ValueError, match=rf"{algorithm.__name__}\.adapt: `weights` must be"):
        module.adapt(x, y, weights=SUPPORT[:2])
