"""What the PyTorch peers share: the loss as a function, and the inner loop of one task as
torch.func writes it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from fastmeta.benchmark.peers import torch_modules
from fastmeta.cases import Case, Instance
from fastmeta.inputs import Tree, arguments, mapped

LossFunction = Callable[[Tensor, Tensor], Tensor]

_LOSSES: dict[str, LossFunction] = {
    "mse": F.mse_loss,
    "ce": F.cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
}


def loss_function(case: Case) -> LossFunction:
    """The loss of a case as a function of `torch.nn.functional`.

    Raises:
        ValueError: no peer has that loss.
    """
    if case.loss not in _LOSSES:
        raise ValueError(f"benchmark: a peer's loss must be one of {', '.join(_LOSSES)}, got {case.loss!r}")
    return _LOSSES[case.loss]


def leaves(made: Instance) -> dict[str, Tensor]:
    """The meta-parameters as fresh leaves."""
    return {name: value.detach().clone().requires_grad_() for name, value in made.params.items()}


def load(made: Instance) -> nn.Module:
    """The network with the meta-parameters in it."""
    made.net.load_state_dict(made.params, strict=False)
    return made.net


def episode(made: Instance) -> tuple[Tree, Tensor, Tree, Tensor]:
    """Support inputs and targets, query inputs and targets."""
    return made.support_x, made.support_y, made.query_x, made.query_y


def tasks(made: Instance) -> list[tuple[tuple[Tree, ...], Tensor, tuple[Tree, ...], Tensor]]:
    """The same of every task, inputs as the arguments of a network."""
    found = []
    for t in range(len(made.query_y)):
        support_x, support_y, query_x, query_y = (mapped(lambda leaf, t=t: leaf[t], x) for x in episode(made))
        found.append((arguments(support_x)[0], support_y, arguments(query_x)[0], query_y))
    return found


def functional_task(case: Case, net: nn.Module) -> Callable[..., Tensor]:
    """f(params, support_x, support_y, query_x, query_y) -> query loss of one task after its inner
    loop."""
    forward, loss = torch_modules.forward(net), loss_function(case)
    names = {name for name, _ in net.named_parameters() if case.adapts(name)}

    def on(adapted: dict[str, Tensor], fixed: dict[str, Tensor], x: Tree, y: Tensor) -> Tensor:
        return loss(forward({**adapted, **fixed}, x), y)

    def task(params: dict[str, Tensor], *data: Tree) -> Tensor:
        support_x, support_y, query_x, query_y = data
        adapted = {name: value for name, value in params.items() if name in names}
        fixed = {name: value for name, value in params.items() if name not in names}
        for _ in range(case.steps):
            gradients = grad(on)(adapted, fixed, support_x, support_y)
            adapted = {name: value - case.lr * gradients[name] for name, value in adapted.items()}
        return on(adapted, fixed, query_x, query_y)

    return task
