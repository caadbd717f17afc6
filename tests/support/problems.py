"""Problems for tests of backends, and the comparison of their results."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from fastmeta.losses import resolve
from fastmeta.problem import DIFFERENTIABLE, Batch, Problem, Result
from fastmeta.update_rules import SGD

EVERYTHING = frozenset(DIFFERENTIABLE)
TOLERANCE = 1e-9  # relative, float64


def mlp(inputs: int = 3, width: int = 13, outputs: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers with a smooth activation."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def make_problem(
    net: nn.Module,
    input_shape: tuple[int, ...] = (3,),
    *,
    tasks: int = 3,
    shots: int = 7,
    queries: int = 5,
    steps: int = 2,
    loss: object = "mse",
    rate_form: str = "scalar",
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    per_task: str = "",
    adapt: tuple[str, ...] | None = None,
    per_step: bool = False,
    weighted: bool = False,
    step_weights: bool = False,
    cotangents: bool = False,
    seed: int = 0,
    **options: object,
) -> Problem:
    """A problem with random data in the dtype of `net`.

    Args:
        net: the module.
        input_shape: one example.
        loss: anything `fastmeta.losses.resolve` takes; targets are drawn for it.
        rate_form: "scalar" | "step" | "task" | "element" | "all" (one per step, task and element).
        per_task: "" | "some" | "all": which parameters every task has its own of.
        adapt: names of the adapted parameters; None: all.
        weighted: weights on support and query examples and on tasks.
        step_weights: random weights on the query losses of all steps, the second one zero.
        cotangents: random `adapted_grad` and `output_grad`.
        options: further fields of `Problem`.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    own = {name for i, name in enumerate(params) if per_task == "all" or (per_task == "some" and i % 2 == 0)}
    shapes = {name: value.shape for name, value in params.items()}
    for name in own:
        params[name] = params[name] * (1 + 0.1 * normal(tasks, *shapes[name]))
    lead = (tasks, steps, shots) if per_step else (tasks, shots)
    support_x, query_x = normal(*lead, *input_shape), normal(tasks, queries, *input_shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        modes = [module.training for module in net.modules()]
        output_shape = tuple(net.eval()(normal(4, *input_shape)).shape[1:])
        for module, mode in zip(net.modules(), modes, strict=True):
            module.training = mode
    resolved = resolve(loss)

    def target(*lead: int) -> Tensor:
        if resolved.kind == "cross_entropy":
            shape = (*lead, *output_shape[1:])
            return torch.randint(output_shape[0], shape, generator=generator)
        return normal(*lead, *output_shape)

    def rate(shape: tuple[int, ...]) -> Tensor:
        ones = (1,) * len(shape)
        forms = {
            "scalar": (1, 1, *ones),
            "step": (max(steps, 1), 1, *ones),
            "task": (1, tasks, *ones),
            "element": (1, 1, *shape),
            "all": (max(steps, 1), tasks, *shape),
        }
        return lr * positive(*forms[rate_form])

    return Problem(
        net=net,
        params=params,
        per_task=frozenset(own),
        tasks=tasks,
        steps=steps,
        support=Batch(support_x, target(*lead), positive(*lead) if weighted else None, per_step),
        query=Batch(query_x, target(tasks, queries), positive(tasks, queries) if weighted else None),
        loss=resolved,
        query_loss=resolved,
        rates={name: rate(tuple(shape)) for name, shape in shapes.items() if adapt is None or name in adapt},
        rule=SGD(momentum=momentum, weight_decay=weight_decay),
        step_weights=tuple(0.0 if k == 1 else 0.3 + k for k in range(steps + 1)) if step_weights else None,
        task_weights=positive(tasks) if weighted else None,
        adapted_grad={name: normal(tasks, *shape) for name, shape in shapes.items()} if cotangents else None,
        output_grad=normal(tasks, queries, *output_shape) if cotangents else None,
        **options,  # type: ignore[arg-type]
    )


def tensors_of(result: Result) -> dict[str, Tensor]:
    """Every tensor of a result by a readable name."""
    found: dict[str, Tensor] = {}
    parts = {"task_losses": result.task_losses, "output": result.output, "adapted": result.adapted}
    parts |= {f.name: getattr(result.grads, f.name) for f in fields(result.grads)}
    for name, part in parts.items():
        if isinstance(part, dict):
            found |= {f"{name}[{key}]": value for key, value in part.items()}
        elif part is not None:
            found[name] = part
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, the plain distance where expected is zero."""
    size = float(expected.detach().norm())
    return float((found - expected).detach().norm()) / (size or 1.0)


def assert_same(found: Result, expected: Result, tolerance: float = TOLERANCE) -> None:
    """Both hold the same tensors, in shape, dtype and value."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        assert not ours[name].requires_grad, name
        off = error(ours[name], value)
        assert off <= tolerance, f"{name}: relative error {off:.2e}"
