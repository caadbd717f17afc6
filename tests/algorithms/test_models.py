"""The models: shapes, sizes, initialisation, and that the engine runs them as the reference
does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmeta as fm
from fastmeta.capture.capture import captured

MODELS = {
    "MLP": (lambda: fm.models.MLP((784, 256, 128, 64, 64, 5), flatten=True), (1, 28, 28), 5),
    "MLP-BN": (lambda: fm.models.MLP((6, 9, 3), batch_norm=True), (6,), 3),
    "Conv4": (lambda: fm.models.Conv4(5), (1, 28, 28), 5),
    "Conv4-strided": (lambda: fm.models.Conv4(5, form="strided"), (1, 28, 28), 5),
    "Conv4-mini": (lambda: fm.models.Conv4(5, in_channels=3, width=32, image_size=84), (3, 84, 84), 5),
    "ResNet12": (lambda: fm.models.ResNet12(5, widths=(4, 6, 8, 10)), (3, 32, 32), 5),
    "Siren": (lambda: fm.models.Siren((2, 64, 64, 3)), (2,), 3),
}
#: Worked out by hand: weights, biases and two numbers for each normalised channel.
SIZES = {
    "MLP": 784 * 256 + 256 + 256 * 128 + 128 + 128 * 64 + 64 + 64 * 64 + 64 + 64 * 5 + 5,
    "MLP-BN": 6 * 9 + 9 + 2 * 9 + 9 * 3 + 3,
    "Conv4": (9 * 64 + 3 * 9 * 64 * 64) + 4 * 3 * 64 + 64 * 5 + 5,
    "Conv4-strided": (9 * 64 + 3 * 9 * 64 * 64) + 4 * 3 * 64 + 64 * 5 + 5,
    "Conv4-mini": (9 * 3 * 32 + 3 * 9 * 32 * 32) + 4 * 3 * 32 + 32 * 25 * 5 + 5,
    "ResNet12": sum(9 * (a * b + 2 * b * b) + a * b + 4 * 2 * b for a, b in ((3, 4), (4, 6), (6, 8), (8, 10)))
    + 55,
    "Siren": 2 * 64 + 64 + 64 * 64 + 64 + 64 * 3 + 3,
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_sizes(name: str) -> None:
    make, shape, outputs = MODELS[name]
    net = make()
    assert net(torch.rand(2, *shape)).shape == (2, outputs)
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[name]
    program, reason = captured(net, shape, torch.float32)
    assert program is not None, reason
    assert program.output_shape == (outputs,)


SMALL = {
    "MLP-BN": MODELS["MLP-BN"],
    "Conv4": (lambda: fm.models.Conv4(3, width=5, image_size=16), (1, 16, 16), 3),
    "Conv4-strided": (lambda: fm.models.Conv4(3, width=5, image_size=17, form="strided"), (1, 17, 17), 3),
    "ResNet12": (lambda: fm.models.ResNet12(3, widths=(2, 3, 4, 5)), (3, 16, 16), 3),
    "Siren": (lambda: fm.models.Siren((2, 9, 9, 3)), (2,), 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_second_order_matches_reference(name: str) -> None:
    torch.manual_seed(0)
    make, shape, ways = SMALL[name]
    net = make().double()
    params = {key: value.detach() for key, value in net.named_parameters()}
    sets = [(torch.rand(2, n, *shape, dtype=torch.float64), torch.randint(ways, (2, n))) for n in (5, 4)]
    options = {"loss": "cross_entropy", "lr": 0.01, "steps": 2}
    ours, reference = (
        fm.meta_gradient(net, params, *sets, backend=b, **options).grads for b in ("cpu", "reference")
    )
    a, b = (torch.cat([grads[key].reshape(-1) for key in params]) for grads in (ours, reference))
    assert float((a - b).norm() / b.norm()) < 1e-9


def test_initialisation() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 784)
    hidden = fm.models.MLP((784, 400, 400, 400, 10)).layers[:-1](x)
    assert 0.5 < float(hidden.square().mean()) < 2  # He: the size of the signal stays
    conv = fm.models.Conv4(5).blocks[1][0]
    assert float(conv.weight.abs().max()) <= (6 / (9 * 128)) ** 0.5
    assert float(conv.weight.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    siren = fm.models.Siren((2, 256, 256, 3), omega_0=20.0)
    assert float(siren.layers[0].linear.weight.abs().max()) <= 1 / 2
    assert float(siren.layers[1].linear.weight.std()) == pytest.approx(
        (6 / 256) ** 0.5 / 20 / 3**0.5, rel=0.03
    )
    resnet = fm.models.ResNet12(5)
    norms = [module for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 16
    assert all(bool((norm.weight == 1).all()) for norm in norms)


REJECTED = {
    "MLP: `widths` must be a sequence": lambda: fm.models.MLP(5),
    "MLP: `widths` must be inputs and outputs at least, got": lambda: fm.models.MLP((3,)),
    "MLP: `widths` must be positive": lambda: fm.models.MLP((3, 0, 2)),
    "Conv4: `ways` must be an int": lambda: fm.models.Conv4(2.5),
    "Conv4: `image_size` must be at least 16": lambda: fm.models.Conv4(5, image_size=12),
    "Conv4: `form` must be one of": lambda: fm.models.Conv4(5, form="pooled"),
    "ResNet12: `widths` must be four": lambda: fm.models.ResNet12(5, widths=(1, 2)),
    "ResNet12: `widths` must be a sequence": lambda: fm.models.ResNet12(5, widths=64),
    "Siren: `widths` must be inputs, hidden": lambda: fm.models.Siren((2, 3)),
    "Siren: `omega_0` must be a number": lambda: fm.models.Siren((2, 3, 1), omega_0="30"),
    "Siren: `omega_0` must be finite and positive, got inf": lambda: fm.models.Siren(
        (2, 3, 1), omega_0=float("inf")
    ),
    "Siren: `omega_0` must be finite and positive, got 0": lambda: fm.models.Siren((2, 3, 1), omega_0=0.0),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects_bad_arguments(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        REJECTED[message]()
