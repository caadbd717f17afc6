"""Fuzzer of the public interface: random networks and options in float64 against a plain autograd
loop.

    python tests/fuzz/public_api.py --calls 100000 --seed 0

Prints a reduced input for every fault, and at the end the number of calls and of faults.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from networks import CLASSES, INTEGER_INPUTS, NETWORKS, SMOOTH, build
from plain_loop import Meta, PlainLoss, batch_norms, custom, solve, uses_batch
from running import main
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

# Relative to the value itself, and to the largest of its sort: what a norm cancels is zero but for
# rounding. Where nothing else is left, rounding is that of data of size one.
RELATIVE, OF_LARGEST, ROUNDING = 1e-9, 1e-10, 1e-14
# Of float32: PyTorch's own error by the same loop, times this, plus a floor of some hundred
# roundings.
SINGLE_FACTOR, SINGLE_FLOOR = 10, 5e-5
# What cancels in float32 leaves some hundred roundings of its summands.
SINGLE_OF_LARGEST = 2e-5
# What is larger has diverged: in float32 its squares and fourth powers are about to overflow.
LARGEST = {"float32": 1e4, "float64": 1e12}
LOSSES = (
    "mse",
    "l1",
    "smooth_l1",
    "huber",
    "cross_entropy",
    "probabilities",
    "smoothed",
    "weighted",
    "ignoring",
    "bce_with_logits",
    "custom",
)
STRIDES = ("plain", "transposed", "expanded", "sliced", "flipped", "offset")
RATES = ("number", "scalar", "step", "dict", "task", "element", "row", "column", "all", "pattern")


@dataclass(frozen=True)
class Spec:
    """One input: everything that is drawn; a default is the simplest there is."""

    seed: int = 0
    net: str = "mlp"
    width: int = 2
    activation: str = "tanh"
    norm: str = "none"
    bias: bool = True
    depth: int = 1
    tasks: int = 1
    shots: int = 2
    queries: int = 2
    steps: int = 1
    loss: str = "mse"
    query_loss: str = ""
    reduction: str = "mean"
    weight_norm: str = "count"
    rates: str = "number"
    momentum: float = 0.0
    weight_decay: float = 0.0
    order: str = "second"
    adapt: str = "all"
    frozen: bool = False
    per_task: str = ""
    support_weights: str = ""
    query_weights: str = ""
    task_weights: bool = False
    per_step: bool = False
    step_weights: bool = False
    memory: str = "auto"
    chunk: int | None = None
    strides: str = "plain"
    param_strides: bool = False
    batch_stats: str = "task"
    dtype: str = "float64"
    backend: str = "auto"
    api: str = "meta_gradient"
    threads: int = 1
    no_input_gradients: bool = True


def draw(rng: random.Random) -> Spec:
    """A random input; half of the options are at their defaults, so that combinations stay
    readable."""

    def rarely(values: Any, default: Any, share: float = 0.3) -> Any:
        return rng.choice(values) if rng.random() < share else default

    net = rng.choice(("mlp", "mlp", "mlp", "residual", "conv1d", "conv2d", *NETWORKS))
    dtype = rarely(("float32",), "float64", 0.15)
    smooth = tuple(SMOOTH)
    return Spec(
        seed=rng.randrange(1 << 30),
        net=net,
        width=rng.choice((1, 2, 3, 5, 7, 8)) if rng.random() < 0.9 else rng.choice((16, 17, 33)),
        activation=rng.choice(
            smooth if dtype == "float32" else (*smooth, "relu", "leaky_relu", "elu", "prelu")
        ),
        norm=rarely(("batch", "batch_plain", "layer", "group"), "none", 0.4),
        bias=rng.random() < 0.8,
        depth=rng.choice((1, 1, 2)),
        tasks=rng.choice((1, 2, 3)),
        shots=rng.choice((1, 2, 3, 5)),
        queries=rng.choice((1, 2, 4)),
        steps=rng.choice((0, 1, 2, 2, 3)),
        loss=rarely(LOSSES, "mse", 0.6),
        query_loss=rarely(LOSSES, "", 0.1),
        reduction=rarely(("sum",), "mean", 0.15),
        weight_norm=rarely(("sum",), "count"),
        rates=rarely(RATES, "number", 0.6),
        momentum=rarely((0.5, 0.9), 0.0),
        weight_decay=rarely((0.1,), 0.0),
        order=rarely(("first",), "second"),
        adapt=rarely(("head", "body", "weights", "first"), "all"),
        frozen=rng.random() < 0.1,
        per_task=rarely(("all", "some"), ""),
        support_weights=rarely(("float", "zeros", "mask"), ""),
        query_weights=rarely(("float", "zeros", "mask"), ""),
        task_weights=rng.random() < 0.3,
        per_step=rng.random() < 0.15,
        step_weights=rng.random() < 0.2,
        memory=rarely(("store", "recompute"), "auto", 0.4),
        chunk=rarely((1, 2), None, 0.15),
        strides=rarely(STRIDES, "plain", 0.3),
        param_strides=rng.random() < 0.1,
        batch_stats=rarely(("running", "module"), "task", 0.3),
        dtype=dtype,
        backend=rng.choice(("auto", "auto", "auto", "auto", "torch", "reference")),
        api=rng.choice(
            ("meta_gradient", "meta_gradient", "MAML", "inner_sgd", "task_forward", "task_gradient", "adapt")
        ),
        threads=rng.choice((1, 1, 1, 2)),
        no_input_gradients=rng.random() < 0.5,
    )


class Refused(Exception):
    """This combination has no meaning: nothing is checked."""


@dataclass
class Drawn:
    """The tensors of an input, in its dtype, and the arguments that go with them."""

    net: nn.Module
    params: dict[str, Tensor]
    per_task: frozenset[str]
    adapted: list[str]
    adapt: Any
    lr: Any
    rates: Callable[[Any], dict[str, Tensor]]  # of `lr`, broadcasting to [K, T, *shape]
    support: tuple[Tensor, Tensor, Tensor | None]
    query: tuple[Tensor, Tensor, Tensor | None]
    task_weights: Tensor | None
    step_weights: tuple[float, ...] | None


def data_of(spec: Spec) -> Drawn:
    """The input that a spec stands for.

    Raises:
        Refused: it has no meaning.
    """
    net = build(spec.net, spec.width, spec.activation, spec.norm, spec.bias, spec.depth, spec.seed)
    g = torch.Generator().manual_seed(spec.seed)
    if spec.batch_stats == "module":
        for at, norm in enumerate(batch_norms(net)):
            norm.train(bool(spec.seed >> at & 1))
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    names = [name for name, _ in net.named_parameters()]
    if spec.frozen:
        dict(net.named_parameters())[names[0]].requires_grad_(False)
    free = [name for name, value in net.named_parameters() if value.requires_grad]
    adapt, adapted = _adapted(spec, net, names, free)
    if spec.net == "attention" and spec.adapt == "head":
        raise Refused("the last leaf that has parameters is not what the shell calls head")
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    per_task = frozenset(
        n for i, n in enumerate(names) if spec.per_task == "all" or (spec.per_task and i % 2 == 0)
    )
    params = {}
    for name, value in net.named_parameters():
        own = value.detach().clone()
        if name in per_task:
            own = own * (1 + 0.2 * normal(spec.tasks, *shapes[name]))
        params[name] = _strided(own, "transposed") if spec.param_strides else own
    _, example = NETWORKS[spec.net]

    def inputs(*lead: int) -> Tensor:
        if spec.net in INTEGER_INPUTS:
            return torch.randint(5, (*lead, *example), generator=g)
        return _strided(normal(*lead, *example), spec.strides)

    lead = (spec.tasks, spec.steps, spec.shots) if spec.per_step else (spec.tasks, spec.shots)
    out = (CLASSES, 2) if spec.net == "positions" else (CLASSES,)

    def target(loss: str, *lead: int) -> Tensor:
        if loss in ("cross_entropy", "smoothed", "weighted", "ignoring"):
            y = torch.randint(CLASSES, (*lead, *out[1:]), generator=g)
            if loss == "ignoring" and y[..., 0].numel():
                y.view(-1)[::3] = 1
                y.view(-1)[1::4] = -7
            return _strided(y, spec.strides)
        if loss == "probabilities":
            return normal(*lead, *out).softmax(len(lead))
        y = normal(*lead, *out)
        return _strided(y.sigmoid() if loss == "bce_with_logits" else y, spec.strides)

    def weights(sort: str, *lead: int) -> Tensor | None:
        if not sort:
            return None
        w = torch.rand(lead, generator=g, dtype=torch.float64) + 0.2
        if sort == "float":
            return _strided(w, spec.strides)
        keep = torch.rand(lead, generator=g) < 0.6
        keep[..., 0] = True
        return keep if sort == "mask" else w * keep

    query_loss = spec.query_loss or spec.loss
    support = inputs(*lead), target(spec.loss, *lead), weights(spec.support_weights, *lead)
    query = (
        inputs(spec.tasks, spec.queries),
        target(query_loss, spec.tasks, spec.queries),
        weights(spec.query_weights, spec.tasks, spec.queries),
    )
    lr, rates = _rates(spec, adapted, shapes, g)
    task_weights = (
        torch.rand(spec.tasks, generator=g, dtype=torch.float64) + 0.5 if spec.task_weights else None
    )
    step_weights = (
        tuple(0.0 if k == 1 else 0.3 + k for k in range(spec.steps + 1)) if spec.step_weights else None
    )
    _check_meaning(spec, net, (support, query))
    drawn = Drawn(
        net, params, per_task, adapted, adapt, lr, rates, support, query, task_weights, step_weights
    )
    return cast(drawn, dtype)


def cast(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    """The same input in a dtype; the module too."""

    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: to(item) for key, item in value.items()}
        return value

    if dtype == torch.float64:
        return drawn
    net = copy.deepcopy(drawn.net).to(dtype)
    support, query = tuple(map(to, drawn.support)), tuple(map(to, drawn.query))
    return Drawn(
        net,
        to(drawn.params),
        drawn.per_task,
        drawn.adapted,
        drawn.adapt,
        to(drawn.lr),
        drawn.rates,
        support,
        query,
        to(drawn.task_weights),
        drawn.step_weights,
    )


def _check_meaning(spec: Spec, net: nn.Module, sets: Any) -> None:
    of_batch = any(uses_batch(norm, spec.batch_stats) for norm in batch_norms(net))
    if spec.norm in ("group", "layer") and spec.width == 1:
        raise Refused("a norm of one value: zero but for rounding, where activations have their kinks")
    masks = "mask" in (spec.support_weights, spec.query_weights)
    if of_batch and (masks or 1 in (spec.shots, spec.queries)):
        raise Refused("a batch of one value a channel, or a mask beside batch norm")
    losses = {spec.loss, spec.query_loss or spec.loss}
    if "custom" in losses and (spec.support_weights or spec.query_weights):
        raise Refused("example weights need a loss with a name")
    if spec.per_step and spec.steps == 0:
        raise Refused("no step to have a support set of its own")
    if spec.net == "positions" and "ignoring" in losses:
        raise Refused("a task may have nothing left")
    for _, y, w in sets:
        if "ignoring" in losses and not y.is_floating_point():
            rows = (y != -7) if w is None else (y != -7) & (w != 0)
            if not rows.any(-1).all():
                raise Refused("all targets of a task are ignored")


def _adapted(spec: Spec, net: nn.Module, names: list[str], free: list[str]) -> tuple[Any, list[str]]:
    if spec.adapt == "all":
        return "all", free
    if spec.adapt in ("head", "body"):
        leaves = [module for module in net.modules() if not [*module.children()]]
        last = [leaf for leaf in leaves if [*leaf.parameters()]][-1]
        inside = {id(value) for value in last.parameters()}
        found = [
            n for n, v in net.named_parameters() if n in free and (id(v) in inside) == (spec.adapt == "head")
        ]
    elif spec.adapt == "weights":
        found = [name for name in names if name.endswith("weight")]
        if not found:
            raise Refused("no parameter called weight")
        return ["*weight"], found
    else:
        return (lambda name, value: name == names[0]), names[:1]
    if not found:
        raise Refused("nothing to adapt")
    return spec.adapt, found


def _rates(spec: Spec, adapted: list[str], shapes: dict[str, tuple[int, ...]], g: torch.Generator) -> Any:
    """`lr=` as a user gives it, and the function that makes full rates of it."""
    k, t = max(spec.steps, 1), spec.tasks

    def positive(*shape: int) -> Tensor:
        return 0.05 * (torch.rand(shape, generator=g, dtype=torch.float64) + 0.5)

    def full(value: Any, name: str) -> Tensor:
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        return value if value.dim() else value.reshape((1, 1, *[1] * len(shapes[name])))

    if spec.rates == "number":
        return 0.05, lambda lr: {name: full(lr, name) for name in adapted}
    if spec.rates == "scalar":
        return positive(), lambda lr: {name: full(lr, name) for name in adapted}
    if spec.rates == "step":
        return positive(spec.steps), lambda lr: {
            name: (lr if len(lr) else lr.new_zeros(1)).reshape(-1, 1, *[1] * len(shapes[name]))
            for name in adapted
        }
    if spec.rates == "pattern":
        others = {"*": 0.03} if len(adapted) > 1 else {}
        return {adapted[0]: positive(), **others}, lambda lr: {
            name: full(lr.get(name, 0.03), name) for name in adapted
        }
    forms = {
        "dict": lambda s: (1, 1, *[1] * len(s)),
        "task": lambda s: (1, t, *[1] * len(s)),
        "element": lambda s: (1, 1, *s),
        "row": lambda s: (1, 1, *s[:1], *[1] * (len(s) - 1)),
        "column": lambda s: (k, 1, *[1] * (len(s) - 1), *s[-1:]),
        "all": lambda s: (k, t, *s),
    }
    return {name: positive(*forms[spec.rates](shapes[name])) for name in adapted}, lambda lr: {
        name: full(lr[name], name) for name in adapted
    }


def _strided(value: Tensor, how: str) -> Tensor:
    """The same values in other memory."""
    if how == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "expanded" and value.dim() > 1:
        return value[:1].expand_as(value)
    if how == "sliced":
        wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] if value.dim() else 1, dtype=value.dtype)
        if not value.dim():
            return value
        wide[..., ::2] = value
        return wide[..., ::2]
    if how == "flipped" and value.is_floating_point():
        return torch._neg_view(-value)
    if how == "offset":
        return torch.cat([value.new_zeros(3), value.reshape(-1)])[3:].view(value.shape)
    return value


def losses_of(spec: Spec, name: str, dtype: torch.dtype) -> tuple[object, PlainLoss]:
    """A loss as fastmeta takes it, and by itself."""
    mean, norm = spec.reduction == "mean", spec.weight_norm
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=dtype)
    modules: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "mse": (nn.MSELoss, "mse", {}),
        "l1": (nn.L1Loss, "l1", {}),
        "smooth_l1": (nn.SmoothL1Loss, "smooth_l1", {"beta": 0.7}),
        "huber": (nn.HuberLoss, "huber", {"delta": 1.3}),
        "cross_entropy": (nn.CrossEntropyLoss, "cross_entropy", {}),
        "probabilities": (nn.CrossEntropyLoss, "cross_entropy", {}),
        "smoothed": (nn.CrossEntropyLoss, "cross_entropy", {"label_smoothing": 0.1}),
        "weighted": (nn.CrossEntropyLoss, "cross_entropy", {"weight": weight}),
        "ignoring": (nn.CrossEntropyLoss, "cross_entropy", {"ignore_index": -7}),
        "bce_with_logits": (nn.BCEWithLogitsLoss, "bce_with_logits", {}),
    }
    if name == "custom":
        return custom, PlainLoss("custom")
    module, kind, options = modules[name]
    plain = PlainLoss(kind, options, mean, norm)
    if name in ("mse", "l1", "cross_entropy") and mean:
        return {"mse": "mse", "l1": F.l1_loss, "cross_entropy": "cross_entropy"}[name], plain
    return module(reduction=spec.reduction, **options), plain


def leaf(value: Any, fresh: bool = True) -> Any:
    """A leaf of its own with the same values and strides; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_() if fresh else value
    if isinstance(value, dict):
        return {key: leaf(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(leaf(item) for item in value)
    return value


def truth(spec: Spec, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value and gradient that the call returns, by the plain loop."""
    d = cast(drawn, dtype) if dtype == torch.float32 else drawn
    params, lr, support, query = leaf(d.params), leaf(d.lr), leaf(d.support), leaf(d.query)
    plain = losses_of(spec, spec.loss, dtype)[1]
    query_plain = losses_of(spec, spec.query_loss or spec.loss, dtype)[1]
    (support_w, plain), (query_w, query_plain) = (
        _mask(support[2], plain, dtype),
        _mask(query[2], query_plain, dtype),
    )
    api = spec.api
    gradient = api == "task_gradient"
    if api in ("MAML", "adapt"):
        params = leaf({name: value.detach() for name, value in d.net.named_parameters()})
    needs_support, needs_query = api != "task_forward", api in ("MAML", "meta_gradient", "task_forward")
    if gradient:
        lr = -1.0
    rates = (
        (
            {
                name: torch.full((), -1.0, dtype=dtype).reshape(
                    (1, 1, *[1] * d.net.get_parameter(name).dim())
                )
                for name in d.adapted
            }
            if gradient
            else d.rates(lr)
        )
        if needs_support
        else {}
    )
    steps = 0 if api == "task_forward" else 1 if gradient else spec.steps
    meta = Meta(
        d.net,
        params,
        d.per_task if api not in ("MAML", "adapt") else frozenset(),
        (*support[:2], support_w) if needs_support else None,
        (query[0], query[1] if api != "task_forward" else None, query_w) if needs_query else None,
        plain,
        query_plain,
        rates,
        spec.tasks,
        steps,
        0.0 if gradient else spec.momentum,
        0.0 if gradient else spec.weight_decay,
        spec.order == "second" or gradient,
        spec.per_step and not gradient,
        d.step_weights if needs_query and api != "task_forward" else None,
        d.task_weights,
        spec.batch_stats,
    )
    answer = solve(meta)
    found: dict[str, Tensor] = {}
    if needs_query:
        found["output"] = answer.output
    if api in ("MAML", "meta_gradient"):
        objective = answer.mean(d.task_weights)
        found |= {"loss": objective, "task_losses": answer.task_losses}
    elif api == "task_forward":
        objective = (answer.output * cotangent(answer.output)).sum()
    else:
        values = answer.adapted
        if gradient:
            values = {n: values[n] - params[n] for n in d.adapted}
        found |= {f"value[{name}]": value for name, value in values.items()}
        objective = sum((value * cotangent(value)).sum() for value in values.values())
    sources = {f"params[{name}]": value for name, value in params.items()}
    sources |= {"lr": lr} if isinstance(lr, Tensor) else {}
    if isinstance(lr, dict):
        sources |= {f"lr[{key}]": value for key, value in lr.items() if isinstance(value, Tensor)}
    for role, batch in (("support", support), ("query", query)):
        for part, value in zip(("x", "y", "weights"), batch, strict=True):
            if isinstance(value, Tensor) and value.is_floating_point():
                sources[f"{role}_{part}"] = value
    wanted = {key: value for key, value in sources.items() if value.requires_grad}
    if isinstance(objective, Tensor) and objective.requires_grad:
        grads = torch.autograd.grad(objective, [*wanted.values()], allow_unused=True)
    else:
        grads = [None] * len(wanted)
    for (key, value), grad in zip(wanted.items(), grads, strict=True):
        found[f"d {key}"] = torch.zeros_like(value) if grad is None else grad
    return {key: value.detach() for key, value in found.items()}


def _mask(w: Tensor | None, plain: PlainLoss, dtype: torch.dtype) -> tuple[Tensor | None, PlainLoss]:
    if w is None or w.dtype != torch.bool:
        return w, plain
    return w.to(dtype), PlainLoss(plain.kind, plain.options, plain.mean, "sum")


def cotangent(value: Tensor) -> Tensor:
    """Fixed numbers of both signs in the shape of a value."""
    steps = torch.arange(value.numel(), dtype=torch.float64)
    return torch.sin(1.7 * steps + 0.3).reshape(value.shape).to(value.dtype)


def ours(spec: Spec, drawn: Drawn) -> dict[str, Tensor]:
    """The same by the library."""
    d = drawn
    dtype = getattr(torch, spec.dtype)
    loss, query_loss = (
        losses_of(spec, spec.loss, dtype)[0],
        losses_of(spec, spec.query_loss or spec.loss, dtype)[0],
    )
    params, lr, support, query = leaf(d.params), leaf(d.lr), leaf(d.support), leaf(d.query)
    if spec.no_input_gradients:
        support, query = [
            tuple(None if x is None else x.detach() for x in batch) for batch in (support, query)
        ]
    common = {"batch_stats": spec.batch_stats, "backend": spec.backend}
    inner = {
        "loss": loss,
        "steps": spec.steps,
        "order": spec.order,
        "adapt": d.adapt,
        "weight_norm": spec.weight_norm,
        "update_rule": fm.SGD(spec.momentum, spec.weight_decay),
        "memory": spec.memory,
        "support_per_step": spec.per_step,
        "task_chunk": spec.chunk,
        "lr": lr,
        **common,
    }
    api = spec.api
    found: dict[str, Tensor] = {}
    if api == "meta_gradient":
        sources = ["params", "lr"]
        if not spec.no_input_gradients:
            for role, batch in (("support", support), ("query", query)):
                sources += [
                    f"{role}_{part}"
                    for part, x in zip(("x", "y", "weights"), batch, strict=True)
                    if x is not None and x.is_floating_point()
                ]
        out = fm.meta_gradient(
            d.net,
            params,
            support[:2],
            query[:2],
            query_loss=query_loss,
            wrt=sources,
            step_weights=d.step_weights,
            task_weights=d.task_weights,
            support_weights=support[2],
            query_weights=query[2],
            **inner,
        )
        found = {"loss": out.loss, "task_losses": out.task_losses, "output": out.output}
        found |= {f"d params[{name}]": value for name, value in out.grads.items()}
        if isinstance(lr, dict):
            found |= {f"d lr[{key}]": out.lr[key] for key, value in lr.items() if isinstance(value, Tensor)}
        elif isinstance(lr, Tensor):
            found["d lr"] = out.lr
        return found | {f"d {name}": getattr(out, name) for name in sources if name not in ("params", "lr")}
    if api == "MAML":
        d.net.zero_grad()
        maml = fm.MAML(
            d.net,
            query_loss=query_loss,
            inner_lr=d.lr,
            inner_steps=spec.steps,
            step_weights=d.step_weights,
            **{k: v for k, v in inner.items() if k not in ("lr", "steps", "support_per_step")},
        )
        out = maml(*support[:2], *query[:2], d.task_weights, support[2], query[2], spec.per_step)
        if out.loss.requires_grad:
            out.loss.backward()
        found = {"loss": out.loss, "task_losses": out.task_losses, "output": out.output}
        found |= {
            f"d params[{name}]": value.grad
            for name, value in d.net.named_parameters()
            if value.grad is not None
        }
        return found | _gradients({"support": support, "query": query})
    if api == "adapt":
        d.net.zero_grad()
        maml = fm.MAML(
            d.net,
            inner_lr=d.lr,
            inner_steps=spec.steps,
            **{k: v for k, v in inner.items() if k not in ("lr", "steps", "support_per_step")},
        )
        values = maml.adapt(*support[:2], weights=support[2])
        sum((value * cotangent(value)).sum() for value in values.values()).backward()
        found = {f"value[{name}]": value for name, value in values.items()}
        found |= {
            f"d params[{name}]": value.grad
            for name, value in d.net.named_parameters()
            if value.grad is not None
        }
        return found | _gradients({"support": support})
    if api == "task_forward":
        output = fm.task_forward(d.net, params, query[0], task_chunk=spec.chunk, **common)
        (output * cotangent(output)).sum().backward()
        found = {"output": output}
        return found | _gradients({"query": query[:1]}) | _own(params)
    if api == "task_gradient":
        values = fm.task_gradient(
            d.net,
            params,
            *support[:2],
            loss=loss,
            adapt=d.adapt,
            weights=support[2],
            weight_norm=spec.weight_norm,
            **common,
        )
        sum((value * cotangent(value)).sum() for value in values.values()).backward()
        return (
            {f"value[{name}]": value for name, value in values.items()}
            | _gradients({"support": support})
            | _own(params)
        )
    values = fm.inner_sgd(d.net, params, *support[:2], weights=support[2], **inner)
    sum((value * cotangent(value)).sum() for value in values.values()).backward()
    found = {f"value[{name}]": value for name, value in values.items()} | _own(params)
    if isinstance(lr, Tensor):
        found["d lr"] = lr.grad
    elif isinstance(lr, dict):
        found |= {f"d lr[{key}]": value.grad for key, value in lr.items() if isinstance(value, Tensor)}
    return found | _gradients({"support": support})


def _own(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"d params[{name}]": value.grad for name, value in params.items() if value.grad is not None}


def _gradients(batches: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"d {role}_{part}": value.grad
        for role, batch in batches.items()
        for part, value in zip(("x", "y", "weights"), batch, strict=False)
        if isinstance(value, Tensor) and value.grad is not None
    }


def entries(net: nn.Module) -> list[tuple[int, str, int]]:
    """Every attribute of every submodule by identity; gradients are none of them."""
    return [
        (id(module), key, id(value))
        for module in net.modules()
        for place in (vars(module), module._parameters, module._buffers, module._modules)
        for key, value in place.items()
    ]


def check(spec: Spec) -> tuple[int, str]:
    """(calls made, what is wrong)."""
    warnings.simplefilter("ignore")
    try:
        drawn = data_of(spec)
    except Refused:
        return 0, ""
    if spec.api == "adapt" and spec.per_step:
        return 0, ""
    if spec.api in ("task_gradient",) and spec.per_step:
        return 0, ""
    drawn64 = data_of(_double(spec)) if spec.dtype == "float32" else drawn
    want = truth(spec, drawn64, torch.float64)
    if not all(float(value.norm()) < LARGEST[spec.dtype] for value in want.values()):
        return 0, ""  # diverged, or NaN
    single = truth(spec, drawn64, torch.float32) if spec.dtype == "float32" else None
    torch.set_num_threads(spec.threads)
    before = entries(drawn.net), torch.get_rng_state()
    results = []
    try:
        for _ in range(2):  # the second is a cached plan's
            results.append(ours(spec, drawn))
    except Exception as error:
        return len(results) + 1, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    if entries(drawn.net) != before[0]:
        return 2, "the module has changed"
    if not torch.equal(torch.get_rng_state(), before[1]):
        return 2, "the random state has changed"
    first, second = results
    for key, got in first.items():
        if got is None:
            return 2, f"{key} is None"
        if not torch.equal(got, second[key]):
            return 2, f"{key}: another result the second time"
    for key, got in first.items():
        problem = _compare(key, got, want, single)
        if problem:
            return 2, problem
    missing = [key for key in want if key not in first and not _may_miss(spec, key)]
    return 2, f"{missing[0]} is missing" if missing else ""


def _double(spec: Spec) -> Spec:
    return replace(spec, dtype="float64")


def _compare(key: str, got: Tensor, want: dict[str, Tensor], single: dict[str, Tensor] | None) -> str:
    if key not in want:
        return "" if not float(got.norm()) else f"{key} is not among what the loop returns"
    expected = want[key]
    if got.shape != expected.shape:
        return f"{key} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    size, off = float(expected.norm()), float((got.double() - expected).norm())
    largest = max(float(value.norm()) for name, value in want.items() if name[:2] == key[:2])
    allowed = RELATIVE * size + OF_LARGEST * largest + ROUNDING
    if single is not None:
        allowed = SINGLE_FACTOR * float((single[key].double() - expected).norm()) + SINGLE_FLOOR * (
            size + 0.1
        )
        allowed += SINGLE_OF_LARGEST * largest
    return (
        ""
        if off <= allowed
        else f"{key} is off by {off:.1e}, its size is {size:.1e}, allowed is {allowed:.1e}"
    )


def _may_miss(spec: Spec, key: str) -> bool:
    """What the loop gives and a call does not: gradients that were not asked for, or of what is no
    leaf there."""
    if key.startswith(("d support", "d query")):
        return True
    if key.startswith("d lr"):
        return spec.api in ("MAML", "adapt", "task_gradient", "task_forward")
    return key.startswith("d params") and (spec.api in ("MAML", "adapt") or spec.frozen)


if __name__ == "__main__":
    main("Random networks and options against a plain autograd loop.", draw, check)
