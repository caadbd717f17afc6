"""What torch has been told to make by default changes nothing inside."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmeta as fm


@contextlib.contextmanager
def _device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "default-meta": lambda: _device("meta"),
    "float16": lambda: _dtype(torch.float16),
    "float64": lambda: _dtype(torch.float64),
}
_X, _Y = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
_CLASSES = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def _maml(net, backend, y, loss, **options):
    maml = fm.MAML(net, loss=loss, inner_lr=0.1, inner_steps=2, backend=backend, **options)
    return lambda: maml(_X, y, _X, y).loss, list(maml.parameters())


def _learned_rates(net, backend, y, loss):
    return _maml(net, backend, y, loss, learn_lr="element")


def _operators(net, backend, y, loss):
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    x = _X.clone().requires_grad_()

    def run():
        adapted = fm.inner_sgd(net, params, x, y, loss=loss, lr=0.1, steps=2, backend=backend)
        return fm.task_forward(net, adapted, x, backend=backend).square().mean()

    return run, [*params.values(), x]


def _reptile(net, backend, y, loss):
    reptile = fm.Reptile(net, loss=loss, inner_lr=0.1, inner_steps=2, backend=backend)
    return lambda: reptile(_X, y).loss, list(net.parameters())


def _imaml(net, backend, y, loss):
    imaml = fm.IMAML(net, loss=loss, inner_lr=0.1, inner_steps=2, proximal=50.0, backend=backend)
    return lambda: imaml(_X, y, _X, y).loss, list(net.parameters())


def _answer(make, backend, y, loss, context):
    run, leaves = make(_net(), backend, y, loss)
    with context():
        value = run()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("make", [_maml, _learned_rates, _operators, _reptile, _imaml])
def test_default_device_and_dtype_change_nothing(make, backend):
    loss, y = ("cross_entropy", _CLASSES) if make is _operators else ("mse", _Y)
    expected = _answer(make, backend, y, loss, contextlib.nullcontext)
    for context in CONTEXTS.values():
        for found, wanted in zip(_answer(make, backend, y, loss, context), expected, strict=True):
            assert found.device.type == "cpu"
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
def test_rejects_fake_tensor_mode(backend):
    maml = fm.MAML(_net(), loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
    for _ in range(2):
        with FakeTensorMode(), pytest.raises(RuntimeError, match=r"^MAML: a FakeTensorMode is active"):
            maml(_X, _Y, _X, _Y)
        maml(_X, _Y, _X, _Y)  # and the next call is right, with a plan and without
