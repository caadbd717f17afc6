"""What `loss=` accepts and what it, its targets and its weights are refused for."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.losses import Loss, resolve

C = 5
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
FUNCTIONS = {
    "mse": (F.mse_loss, nn.MSELoss),
    "l1": (F.l1_loss, nn.L1Loss),
    "smooth_l1": (F.smooth_l1_loss, nn.SmoothL1Loss),
    "huber": (F.huber_loss, nn.HuberLoss),
    "cross_entropy": (F.cross_entropy, nn.CrossEntropyLoss),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """(output, target)"""
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_name_function_and_module_are_the_same_loss(name: str) -> None:
    function, module = FUNCTIONS[name]
    keys = {resolve(name).key, resolve(function).key, resolve(module()).key}
    assert keys == {Loss(name).key}


def test_a_loss_passes_through() -> None:
    loss = Loss("huber", beta=0.5, weight_norm="sum")
    assert resolve(loss) is loss
    copied = copy.deepcopy(loss)
    assert copied.key == loss.key
    assert copied is not loss


def test_custom_loss_is_called_as_given() -> None:
    output, target = pair(7, 3)
    loss = resolve(lambda z, y: (z - y).abs().max())
    assert loss.kind == "custom"
    assert loss(output, target) == (output - target).abs().max()


class _Twice(nn.MSELoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(output, target)


def _hooked() -> nn.Module:
    module = nn.MSELoss()
    module.register_forward_hook(lambda _, __, value: 2 * value)
    return module


def _overridden() -> nn.Module:
    module = nn.MSELoss()
    module.forward = lambda z, y: 2 * F.mse_loss(z, y)
    return module


@pytest.mark.parametrize("make", [_Twice, _hooked, _overridden])
def test_changed_modules_are_custom_losses(make: Callable[[], nn.Module]) -> None:
    output, target = pair(7, 3)
    loss = resolve(make())
    assert loss.kind == "custom"
    assert loss(output, target) == 2 * F.mse_loss(output, target)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nll", "loss must be one of 'mse', .* got 'nll'"),
        ("custom", "loss must be one of 'mse', .* got 'custom'"),
        (nn.MSELoss(reduction="none"), "mse: `reduction` must be 'mean' or 'sum', got 'none'"),
        (nn.SmoothL1Loss(beta=-1.0), "smooth_l1: `beta` must be finite and greater than zero, got -1.0"),
        (nn.HuberLoss(delta=0.0), "huber: `delta` must be finite and greater than zero, got 0.0"),
        (nn.HuberLoss(delta=float("nan")), "huber: `delta` must be finite and greater than zero, got nan"),
        (
            nn.CrossEntropyLoss(label_smoothing=1.5),
            "cross_entropy: `label_smoothing` must be from 0 to 1, got 1.5",
        ),
    ],
)
def test_rejects_losses_and_options(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(given)


def test_rejects_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match=r"write MSELoss\(\)"):
        resolve(nn.MSELoss)
    with pytest.raises(TypeError, match="must be a name, a function or a module, got int"):
        resolve(3)
    with pytest.raises(TypeError, match="huber: `delta` must be a Python number, got Tensor"):
        Loss("huber", beta=torch.tensor(1.0))
    with pytest.raises(ValueError, match="`weight_norm` must be 'count' or 'sum', got 'none'"):
        resolve("mse", weight_norm="none")
    with pytest.raises(ValueError, match="mse has no `weight`"):
        Loss("mse", weight=CLASS_WEIGHTS)


def test_rejects_weights_with_a_custom_loss() -> None:
    output, target = pair(7, 3)
    with pytest.raises(ValueError, match="custom loss: example weights need a loss with a name"):
        resolve(lambda z, y: (z - y).sum())(output, target, torch.ones(7))


def test_rejects_custom_losses_that_return_no_scalar() -> None:
    output, target = pair(7, 3)
    with pytest.raises(ValueError, match=r"must return a scalar tensor, got \(7, 3\)"):
        resolve(nn.MSELoss(reduction="none").forward)(output, target)
    with pytest.raises(ValueError, match="must return a scalar tensor, got float"):
        resolve(lambda z, y: 0.0)(output, target)


def test_rejects_weights_of_another_length() -> None:
    output, target = pair(7, 3)
    with pytest.raises(ValueError, match=r"mse: `weights` must be \(7,\), got \(6,\)"):
        resolve("mse")(output, target, torch.ones(6))


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "huber", "bce_with_logits"])
def test_rejects_targets_that_would_be_broadcast(name: str) -> None:
    output, target = pair(7, 1)
    with pytest.raises(
        ValueError, match=rf"target must be \(7, 1\).*\({name} broadcasts no target\), got \(7,\)"
    ):
        resolve(name)(output, target[:, 0])


F64, I64 = torch.float64, torch.int64


@pytest.mark.parametrize(
    ("loss", "shape", "dtype", "out_shape", "kind", "message"),
    [
        ("mse", (4, 7, 2), F64, (3,), ValueError, r"`y` must be \(4, 7, 3\), .* got \(4, 7, 2\)"),
        ("mse", (4, 7, 3), torch.float32, (3,), TypeError, "`y` must be torch.float64, .* got torch.float32"),
        ("bce_with_logits", (4, 7, 3), I64, (3,), TypeError, "`y` must be torch.float64, .* got torch.int64"),
        (
            "cross_entropy",
            (4, 7),
            torch.int32,
            (C,),
            TypeError,
            r"must be torch.int64 \(class indices .* torch.int32",
        ),
        (
            "cross_entropy",
            (4, 7),
            torch.bool,
            (C,),
            TypeError,
            r"must be torch.int64 \(class indices .* torch.bool",
        ),
        (
            "cross_entropy",
            (4, 7, 1),
            I64,
            (C,),
            ValueError,
            r"must be \(4, 7\) \(class indices .* got \(4, 7, 1\)",
        ),
        ("cross_entropy", (4, 7, 2), I64, (C, 3), ValueError, r"must be \(4, 7, 3\) \(class indices"),
        (
            "cross_entropy",
            (4, 7),
            F64,
            (C,),
            ValueError,
            r"must be \(4, 7, 5\) \(probabilities .* got \(4, 7\)",
        ),
        (
            "cross_entropy",
            (4, 7, C),
            torch.float32,
            (C,),
            TypeError,
            r"must be torch.float64 \(probabilities",
        ),
        (
            "cross_entropy",
            (4, 7),
            I64,
            (),
            ValueError,
            r"output must be \[C, ...\] for one example, got a scalar",
        ),
        (
            nn.CrossEntropyLoss(weight=torch.ones(3)),
            (4, 7),
            I64,
            (C,),
            ValueError,
            r"`weight` must be \(5,\), got \(3,\)",
        ),
        (
            nn.CrossEntropyLoss(ignore_index=0),
            (4, 7, C),
            F64,
            (C,),
            ValueError,
            "probabilities takes no `ignore_index`",
        ),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(7)),
            (4, 7),
            F64,
            (),
            ValueError,
            "`weight` must broadcast to",
        ),
        (nn.BCEWithLogitsLoss(weight=torch.ones(7, 1)), (4, 7, 3), F64, (3,), ValueError, r"got \(7, 1\)"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)),
            (4, 7, 3),
            F64,
            (3,),
            ValueError,
            "`pos_weight` must broad",
        ),
        (lambda z, y: z.sum(), (7, 4), I64, (3,), ValueError, r"`y` must begin with \(4, 7\), got \(7, 4\)"),
    ],
)
def test_rejects_targets(
    loss: object, shape: tuple, dtype: torch.dtype, out_shape: tuple, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        resolve(loss).check_target("`y`", torch.zeros(shape, dtype=dtype), (4, 7), out_shape, F64)


def test_rejects_class_indices_out_of_range() -> None:
    target = torch.tensor([[0, 4, -100], [1, 5, -1]])
    loss = resolve("cross_entropy")
    message = r"MAML: `support_y` must hold class indices in \[0, 5\) or ignore_index=-100, got 5 at \[1, 1\]"
    with pytest.raises(ValueError, match=message):
        loss.check_values("MAML: `support_y`", target, C)
    with pytest.raises(ValueError, match=r"got -100 at \[0, 2\]"):
        resolve(nn.CrossEntropyLoss(ignore_index=5)).check_values("`y`", target, C)
    with pytest.raises(ValueError, match="in \\[0, 0\\) or ignore_index=-100, got 0 at"):
        loss.check_values("`y`", target, 0)
    loss.check_values("`y`", target[:0], C)
