"""Cases of convolutions, norms and pools: small images, odd sizes, every option of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.case import Case


def image_net(*layers: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int = 3) -> nn.Sequential:
    """The layers, and a linear head on what they make of an example of this shape."""
    body = nn.Sequential(*[make() for make in layers])
    with torch.no_grad():
        features = body.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*body.train(), nn.Flatten(), nn.Linear(features, outputs))


def _case(label: str, shape: tuple[int, ...], *layers: Callable[[], nn.Module], **options: object) -> Case:
    options = {"tasks": 2, "shots": 4, "queries": 3, "loss": "ce", **options}
    return Case(label, partial(image_net, *layers, shape=shape), shape, **options)  # type: ignore[arg-type]


_conv = partial(partial, nn.Conv2d)
_TANH = nn.Tanh


class ResidualImage(nn.Module):
    """A residual block with a shortcut of its own, the same convolution twice, means over the
    image, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        y = self.shared(torch.tanh(self.shared(y))) + self.shortcut(x)
        y = torch.cat([torch.tanh(y), x], dim=1)
        return self.head(torch.cat([y.mean((2, 3)), torch.tanh(self.shortcut(x)).mean((-2, -1))], 1))


class Joined(nn.Module):
    """Concats along every dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(5, 2, 3)
        self.head = nn.Linear(2 * 8 * 2 + 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.tanh(self.conv(x)), x], 1)  # [N, 5, 5, 4]
        z = torch.tanh(self.second(torch.cat([y, y], 2)))  # [N, 2, 8, 2]
        wide = torch.cat((z, z, z), dim=3).mean(dim=(2, 3))  # [N, 2]
        return self.head(torch.cat([z.flatten(1), wide, self.conv(x).mean((2, 3))], 1))


class Reshaped(nn.Module):
    """An image made of rows, and read again under another height and width: the numbers stay where
    they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.conv = nn.Conv2d(8, 6, 2, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * (4 + 4), 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(self.first(x).unflatten(1, (8, 1, 1))))  # [N, 6, 4, 4]
        flat = y.view(y.shape[0], 6, 2, 8)
        pooled = F.max_pool2d(self.norm(flat), 2)  # [N, 6, 1, 4]
        return self.head(torch.cat([F.adaptive_avg_pool2d(flat, (2, 2)).flatten(1), pooled.flatten(1)], 1))


class Stems(nn.Module):
    """Several first convolutions with norms, the last of which reads its image under another height
    and width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.second_norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)
        self.third, self.third_norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.head = nn.Linear(5 + 3 + 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first_norm(self.first(x))).mean((2, 3))
        z = torch.tanh(self.second_norm(self.second(x))).mean((2, 3))
        flat = self.third_norm(self.third(x).view(x.shape[0], 2, 2, 8))
        return self.head(torch.cat([y, z, F.avg_pool2d(torch.tanh(flat), (1, 8)).flatten(1)], 1))


def convolutions() -> Iterator[Case]:
    """conv2d and conv1d."""
    yield _case("conv", (2, 5, 5), _conv(2, 6, 3, padding=1), _TANH, _conv(6, 7, 3), _TANH)
    yield _case(
        "conv_gray", (1, 7, 6), _conv(1, 9, 3, padding=1), _TANH, _conv(9, 4, 3, stride=2, padding=1), _TANH
    )
    yield _case("conv_rgb", (3, 6, 5), _conv(3, 5, (2, 3), stride=(2, 1), padding=(1, 2)), _TANH, loss="mse")
    yield _case(
        "conv_wide", (3, 6, 5), _conv(3, 70, 3, padding=1), _TANH, _conv(70, 17, 1, bias=False), _TANH
    )
    yield _case(
        "conv_large",
        (5, 7, 7),
        _conv(5, 33, 5, padding=2, stride=3),
        _TANH,
        _conv(33, 2, 3, padding=1),
        _TANH,
    )
    yield _case(
        "conv_point", (3, 1, 1), _conv(3, 5, 3, padding=1), _TANH, _conv(5, 2, 1), _TANH, shots=1, queries=1
    )
    wide = (
        _conv(2, 18, 3, padding=1),
        _TANH,
        _conv(18, 20, 3, padding=1),
        _TANH,
        _conv(20, 17, 3, padding=2),
        _TANH,
    )
    yield _case("conv_winograd", (2, 9, 8), *wide)
    yield _case(
        "conv_winograd", (2, 7, 9), *wide, shots=3, steps=3, memory="recompute", rates="element", momentum=0.5
    )
    yield _case(
        "conv_winograd_valid", (20, 10, 9), _conv(20, 16, 3, bias=False), _TANH, shots=5, order="first"
    )
    yield _case(
        "conv1d", (2, 9), partial(nn.Conv1d, 2, 4, 3), _TANH, partial(nn.Conv1d, 4, 3, 4, stride=2, padding=1)
    )
    conv = partial(
        _case, "conv", (2, 5, 5), _conv(2, 6, 3, padding=1), _TANH, _conv(6, 7, 3, stride=2), _TANH
    )
    yield conv(memory="recompute", steps=3)
    yield conv(rates="element_step_task", momentum=0.9, weight_decay=0.1)
    yield conv(per_task="all", step_weights=True, weighted="sqt")
    yield conv(per_task="some", order="first", rates="tensor")
    yield conv(operator="inner_sgd", rates="head")
    yield conv(operator="task_forward", steps=0, per_task="some")
    yield conv(tasks=18, shots=2, queries=1, per_step=True)


def norms() -> Iterator[Case]:
    """batch_norm, layer_norm, group_norm and instance_norm."""
    for name, norm in (
        ("bn", partial(nn.BatchNorm2d, 6)),
        ("bn_plain", partial(nn.BatchNorm2d, 6, affine=False)),
        ("gn2", partial(nn.GroupNorm, 2, 6)),
        ("gn1_plain", partial(nn.GroupNorm, 1, 6, affine=False)),
        ("in", partial(nn.InstanceNorm2d, 6, affine=True)),
        ("ln", partial(nn.LayerNorm, (6, 4, 9))),
        ("ln_last", partial(nn.LayerNorm, 9)),
    ):
        net = partial(_case, name, (2, 4, 9), _conv(2, 6, 3, padding=1), norm, _TANH, _conv(6, 3, 3), _TANH)
        yield net()
        yield net(rates="element", momentum=0.5, memory="recompute", per_task="some")
    yield _case(
        "bn_input",
        (20,),
        partial(nn.BatchNorm1d, 20),
        partial(nn.Linear, 20, 17),
        partial(nn.BatchNorm1d, 17),
        _TANH,
    )
    yield _case(
        "ln_input",
        (2, 21),
        partial(nn.LayerNorm, (2, 21)),
        partial(nn.Linear, 21, 7),
        partial(nn.LayerNorm, 7),
    )
    plain = (
        partial(nn.BatchNorm2d, 2, affine=False),
        _TANH,
        partial(nn.InstanceNorm2d, 2),
        _conv(2, 4, 2),
        _TANH,
    )
    yield _case("plain_input", (2, 4, 3), *plain)
    bn = partial(
        _case, "bn_one", (2, 9, 8), _conv(2, 6, 3, padding=1, bias=False), partial(nn.BatchNorm2d, 6), _TANH
    )
    yield bn(shots=1, queries=1, tasks=1)
    yield bn(order="first", step_weights=True)
    yield bn(operator="inner_sgd", weighted="s", loss="ce")
    yield bn(operator="task_forward", steps=0)
    for name, norm in (("bn", partial(nn.BatchNorm2d, 6)), ("gn", partial(nn.GroupNorm, 3, 6))):
        relu = partial(
            _case,
            f"{name}_relu",
            (2, 6, 5),
            _conv(2, 6, 3, padding=1),
            norm,
            nn.ReLU,
            _conv(6, 3, 3),
            kinks=True,
        )
        yield relu()
        yield relu(memory="recompute", rates="element")
        yield relu(shots=3, steps=1, per_task="some", step_weights=True)


def pooled_norms() -> Iterator[Case]:
    """A norm, a relu and a max-pool over windows side by side, which the engine runs as one."""
    for name, norm in (("bn", partial(nn.BatchNorm2d, 6)), ("gn", partial(nn.GroupNorm, 3, 6))):
        for tail, more in (("relu_pool", (nn.ReLU,)), ("pool", ())):
            layers = (_conv(2, 6, 3, padding=1), norm, *more, partial(nn.MaxPool2d, 2), _conv(6, 4, 2), _TANH)
            net = partial(_case, f"{name}_{tail}", (2, 7, 6), *layers, kinks=True)
            yield net()
            yield net(memory="recompute", rates="element", steps=3)
            yield net(shots=3, steps=1, per_task="some", step_weights=True)
    wide = (partial(nn.BatchNorm2d, 2), nn.ReLU, partial(nn.MaxPool2d, (3, 2)), _conv(2, 4, 2), _TANH)
    yield _case("bn_relu_pool_input", (2, 8, 7), *wide, kinks=True)


def first_layers() -> Iterator[Case]:
    """A convolution of the input behind which a norm stands, where nobody asks for the input's
    gradient: a backend may compute it again and again instead of keeping it."""
    gray = (_conv(1, 6, 3, padding=1), partial(nn.BatchNorm2d, 6))
    pooled = (nn.ReLU, partial(nn.MaxPool2d, 2), _conv(6, 4, 2), _TANH)
    for tail in (pooled, (_TANH, _conv(6, 4, 3, stride=2), _TANH)):
        label = "first_bn_relu_pool" if tail is pooled else "first_bn"
        net = partial(_case, label, (1, 7, 6), *gray, *tail, wrt_inputs=False, kinks=tail is pooled)
        yield net()
        yield net(memory="recompute", rates="element", momentum=0.5, steps=3)
        yield net(per_task="some", step_weights=True, weighted="sqt")
    net = partial(_case, "first_bn", (1, 7, 6), *gray, _TANH, wrt_inputs=False)
    yield net(operator="inner_sgd", rates="head")
    yield net(operator="task_forward", steps=0)
    yield net(order="first", per_step=True, tasks=3)
    strided = (
        _conv(3, 18, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        partial(nn.BatchNorm2d, 18, affine=False),
    )
    yield _case("first_rgb", (3, 6, 5), *strided, _TANH, wrt_inputs=False)
    wide = (_conv(1, 20, 2), partial(nn.BatchNorm2d, 20), nn.ReLU, partial(nn.MaxPool2d, (3, 2)))
    yield _case("first_pool_3_2", (1, 8, 6), *wide, wrt_inputs=False, kinks=True)
    yield Case("first_stems", Stems, (1, 4, 4), 2, 4, 3, loss="ce", wrt_inputs=False)
    yield _case(
        "first_gn", (1, 7, 6), gray[0], partial(nn.GroupNorm, 3, 6), *pooled, wrt_inputs=False, kinks=True
    )


def pools() -> Iterator[Case]:
    """max_pool2d, avg_pool2d, adaptive means and concat; the windows of a smooth network have no
    ties."""
    yield _case("max_pool", (2, 6, 7), _conv(2, 5, 3, padding=1), _TANH, partial(nn.MaxPool2d, 2), kinks=True)
    yield _case(
        "max_pool_3_2",
        (2, 7, 7),
        _conv(2, 5, 3, padding=1),
        partial(nn.MaxPool2d, 3, 2, 1),
        _TANH,
        kinks=True,
    )
    yield _case(
        "max_pool_ceil",
        (3, 5, 5),
        partial(nn.MaxPool2d, 2, 1),
        partial(nn.MaxPool2d, 2, 2, ceil_mode=True),
        kinks=True,
    )
    yield _case("avg_pool", (2, 6, 7), _conv(2, 5, 3, padding=1), _TANH, partial(nn.AvgPool2d, 2))
    yield _case(
        "avg_pool_3_2", (2, 6, 7), partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True), _conv(2, 5, 2), _TANH
    )
    yield _case(
        "avg_pool_inside",
        (2, 5, 5),
        partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False),
        _conv(2, 5, 2),
        _TANH,
    )
    yield _case(
        "avg_pool_divisor", (2, 5, 5), _conv(2, 5, 2), _TANH, partial(nn.AvgPool2d, 3, 1, divisor_override=7)
    )
    yield _case(
        "adaptive", (2, 7, 5), _conv(2, 5, 3, padding=1), _TANH, partial(nn.AdaptiveAvgPool2d, (3, 2))
    )
    yield _case(
        "pool1d",
        (2, 11),
        partial(nn.Conv1d, 2, 4, 3),
        _TANH,
        partial(nn.AvgPool1d, 3, 2),
        partial(nn.MaxPool1d, 2),
        kinks=True,
    )
    yield Case("residual_image", ResidualImage, (2, 5, 4), 2, 4, 3, loss="ce")
    yield Case(
        "residual_image", ResidualImage, (2, 5, 4), 2, 4, 3, loss="ce", memory="recompute", rates="element"
    )
    yield Case("joined", Joined, (2, 5, 4), 2, 4, 3, loss="ce")
    yield Case("reshaped_image", Reshaped, (5,), 2, 4, 3, loss="ce", kinks=True)
