"""Flat meta-parameters: one leaf, views that are watched, unchanged checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from plain_autograd import episodes, error, network
from torch import nn

import fastmeta as fm


def _maml(**options: object) -> fm.MAML:
    return fm.MAML(network(), **{"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, **options})


def _whole(tensors: object) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("learn_lr", [None, "scalar", "tensor", "element"])
def test_flat_gradient_matches_separate_ones(learn_lr: str | None, backend: str) -> None:
    plain, maml = (_maml(learn_lr=learn_lr, backend=backend) for _ in range(2))
    flat = fm.flatten(maml)
    outs = [module(*episodes()) for module in (plain, maml)]
    for out in outs:
        out.loss.backward()
    assert flat.is_leaf
    assert flat.requires_grad
    # PyTorch's own products depend on how their operands are aligned in memory, the engine's do not
    allowed = 0.0 if backend == "cpu" else 1e-14
    assert error(outs[1].loss, outs[0].loss) <= allowed
    assert error(flat.grad, _whole(value.grad for value in plain.parameters())) <= allowed
    assert all(value.grad is None and not value.requires_grad for value in maml.parameters())


def test_training_matches_separate_parameters() -> None:
    plain, maml = _maml(learn_lr="tensor"), _maml(learn_lr="tensor")
    flat = fm.flatten(maml)
    optimizers = [
        torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True),
        torch.optim.Adam([flat], lr=1e-2, fused=True),
    ]
    for seed in range(5):
        for module, optimizer in zip((plain, maml), optimizers, strict=True):
            optimizer.zero_grad()
            module(*episodes(seed=seed)).loss.backward()
            optimizer.step()
    torch.testing.assert_close(flat.detach(), _whole(plain.parameters()), rtol=1e-12, atol=0)
    assert torch.equal(flat.detach(), _whole(maml.parameters()))


def test_gradients_accumulate_and_do_not_share_memory() -> None:
    maml = _maml()
    flat = fm.flatten(maml)
    first = maml(*episodes(seed=1)).loss
    second = maml(*episodes(seed=2)).loss
    first.backward()
    one = flat.grad.clone()
    second.backward()
    two = flat.grad - one
    flat.grad = None
    maml(*episodes(seed=2)).loss.backward()
    torch.testing.assert_close(flat.grad, two, rtol=1e-12, atol=1e-14)


def test_state_dict_is_unchanged_and_loads() -> None:
    plain, maml = _maml(), _maml()
    flat = fm.flatten(maml)
    assert list(maml.state_dict()) == list(plain.state_dict())
    other = fm.MAML(network(seed=4), loss="mse", inner_lr=0.1, inner_steps=2)
    maml.load_state_dict(other.state_dict())
    assert torch.equal(flat.detach(), _whole(other.parameters()))
    assert torch.equal(maml(*episodes()).loss, other(*episodes()).loss)


def test_flattening_twice_returns_the_same_vector() -> None:
    maml = _maml()
    flat = fm.flatten(maml)
    assert fm.flatten(maml) is flat


def test_frozen_parameters_stay_out() -> None:
    maml, plain = _maml(adapt="*"), _maml()
    maml.net[0].weight.requires_grad_(False)
    flat = fm.flatten(maml)
    assert flat.numel() == sum(value.numel() for value in maml.parameters()) - maml.net[0].weight.numel()
    maml(*episodes()).loss.backward()
    plain(*episodes()).loss.backward()
    assert torch.equal(flat.grad, _whole(value.grad for value in list(plain.parameters())[1:]))


def test_adaptation_is_differentiable_in_the_vector() -> None:
    maml, (x, y, query_x, query_y) = _maml(learn_lr="tensor"), episodes()
    flat = fm.flatten(maml)
    nn.functional.mse_loss(maml.predict(maml.adapt(x, y), query_x), query_y).backward()
    got, flat.grad = flat.grad, None
    maml(x, y, query_x, query_y).loss.backward()
    torch.testing.assert_close(got, flat.grad, rtol=1e-9, atol=1e-12)


def test_saving_the_module_keeps_the_views() -> None:
    maml = _maml()
    fm.flatten(maml)
    buffer = io.BytesIO()
    torch.save(maml, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(*episodes()).loss, maml(*episodes()).loss)


BROKEN = {
    "deepcopy": copy.deepcopy,
    "half": lambda maml: maml.double() if maml.net[0].weight.dtype == torch.float32 else maml.float(),
    "data": lambda maml: setattr(maml.net[0].weight, "data", maml.net[0].weight.data.clone()),
    "parameter": lambda maml: setattr(
        maml.net[0], "weight", nn.Parameter(maml.net[0].weight.detach().clone())
    ),
    "transposed": lambda maml: setattr(maml.net[2].weight, "data", maml.net[2].weight.data.t()),
    "pickle": lambda maml: pickle.loads(pickle.dumps(maml)),
    "layer": lambda maml: maml.net.__setitem__(0, nn.Linear(2, 13).double()),
    "assigned": lambda maml: maml.load_state_dict(
        {name: value.clone() for name, value in maml.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_rejects_parameters_that_left_the_vector(how: str) -> None:
    maml = _maml()
    flat = fm.flatten(maml)
    maml(*episodes())
    result = BROKEN[how](maml)
    broken = result if isinstance(result, fm.MAML) else maml
    dtype = next(broken.parameters()).dtype
    episode = episodes(dtype=dtype)
    for call in (lambda: broken(*episode), lambda: broken.adapt(*episode[:2])):
        with pytest.raises(
            RuntimeError, match=r"no longer views of the vector .* call fastmeta.flatten\(maml\) again"
        ):
            call()
    again = fm.flatten(broken)
    assert again is not flat
    broken(*episode).loss.backward()
    assert again.grad.shape == flat.shape
    assert flat.grad is None


def test_rejects_what_cannot_be_flat() -> None:
    with pytest.raises(TypeError, match=r"`maml` must be a fastmeta.MAML, got Linear"):
        fm.flatten(nn.Linear(1, 1))
    maml = _maml()
    maml.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of `maml` requires grad"):
        fm.flatten(maml)
    maml = _maml()
    maml.net[0].float()
    with pytest.raises(TypeError, match="one dtype and device"):
        fm.flatten(maml)
    assert maml._machinery.flat is None
    assert all(value.requires_grad for value in maml.parameters())
