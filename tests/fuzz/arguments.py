"""Fuzzer of arguments: every public function with hostile values in the places of one or two
arguments.

    python tests/fuzz/arguments.py --calls 200000 --seed 0

A call may answer, or refuse with an error of the usual sorts whose message names an argument. It is
a fault if the process dies or hangs, if another error comes out, if the network or PyTorch's global
state has changed, or if the same function is not right afterwards.
"""

from __future__ import annotations

import inspect
import random
import re
import resource
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hostile import SPOILED, SPOILED_DICTS, VALUES
from public_api import entries
from running import main
from torch import Tensor, nn

import fastmeta as fm

#: Errors that a call may end with. PyTorch's RuntimeError is none of them, unless there is not the
#: memory asked for.
REFUSALS = (TypeError, ValueError, fm.BackendUnavailable, FloatingPointError, MemoryError)
MEMORY = 12 << 30


@dataclass(frozen=True)
class Spec:
    """One call: of which function, and what stands in the places of up to two arguments."""

    target: str = "meta_gradient"
    first: str = ""
    first_value: str = ""
    second: str = ""
    second_value: str = ""
    backend: str = "auto"


def episode(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A right episode: T = 2, N = 3, M = 2, four inputs and three outputs."""
    g = torch.Generator().manual_seed(0)
    shapes = {"support_x": (2, 3, 4), "support_y": (2, 3, 3), "query_x": (2, 2, 4), "query_y": (2, 2, 3)}
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


def net() -> nn.Module:
    """4 -> 3, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _params(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


WEIGHTS = {
    "task_weights": torch.ones(2, dtype=torch.float64),
    "support_weights": torch.ones(2, 3, dtype=torch.float64),
    "query_weights": torch.ones(2, 2, dtype=torch.float64),
}
INNER = {"loss": "mse", "inner_lr": 0.1, "inner_steps": 2}
OF_MAML = {
    "query_loss": "mse",
    "order": "second",
    "adapt": "all",
    "learn_lr": None,
    "lr_per_step": False,
    "step_weights": None,
    "support_step_weights": None,
    "weight_norm": "count",
    "update_rule": None,
    "memory": "auto",
    "memory_limit": None,
    "task_chunk": None,
    "batch_stats": "task",
}
OF_OPERATORS = {
    "order": "second",
    "adapt": "all",
    "weight_norm": "count",
    "update_rule": None,
    "memory": "auto",
    "memory_limit": None,
    "task_chunk": None,
    "batch_stats": "task",
    "support_per_step": False,
}


@dataclass
class Target:
    """A public function: its right arguments, and how it is called with them."""

    arguments: Callable[[nn.Module], dict[str, Any]]
    call: Callable[..., Any]
    has_backend: bool = True


def _backward(out: Any) -> Any:
    """Run the backward pass of whatever a call returns."""
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        if loss.requires_grad:
            loss.backward()
        return loss.detach()
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    values = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    total = sum(value.sum() for value in values) if values else None
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    return total


def _algorithm(kind: Callable[..., Any], options: Mapping[str, Any]) -> Target:
    takes = kind if "support_x" in inspect.signature(kind.forward).parameters else fm.MAML
    names = [*inspect.signature(takes.forward).parameters][1:]

    def call(net: Any, **given: Any) -> Any:
        episode = {name: given.pop(name) for name in names if name in given}
        return _backward(kind(net, **given)(**episode))

    def arguments(network: nn.Module) -> dict[str, Any]:
        data = {**episode(), **WEIGHTS, "support_per_step": False}
        return {"net": network, **options, **{name: data[name] for name in names if name in data}}

    return Target(arguments, call)


def _adapt(net: Any, x: Any, y: Any, steps: Any, weights: Any, predict_x: Any, backend: str) -> Any:
    maml = fm.MAML(net, **INNER, backend=backend)
    adapted = maml.adapt(x, y, steps, weights)
    return _backward(maml.predict(adapted, predict_x))


def _predict(net: Any, adapted: Any, x: Any, backend: str) -> Any:
    return _backward(fm.MAML(net, **INNER, backend=backend).predict(adapted, x))


def _explain(net: Any, backend: str, **data: Any) -> Any:
    return str(fm.MAML(net, **INNER, backend=backend).explain(**data))


def _context_net(network: nn.Module) -> nn.Module:
    return nn.Sequential(fm.Context(2), nn.Linear(6, 3)).double()


def _features() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "support_features": torch.randn(2, 6, 3, generator=g, dtype=torch.float64),
        "support_y": torch.arange(6).remainder(2).expand(2, 6).clone(),
        "query_features": torch.randn(2, 4, 3, generator=g, dtype=torch.float64),
    }


def _head(function: Callable[..., Any], **options: Any) -> Target:
    def call(support_features: Any, support_y: Any, query_features: Any, **given: Any) -> Any:
        return _backward(function(support_features, support_y, query_features, **given))

    return Target(lambda network: {**_features(), **options}, call, has_backend=False)


def _maker(kind: Callable[..., Any], **options: Any) -> Target:
    """A class that is only made, or looked at in its first item."""

    def call(**given: Any) -> Any:
        made = kind(**given)
        return made[0] if hasattr(made, "__getitem__") else made

    return Target(lambda network: dict(options), call, has_backend=False)


TARGETS: dict[str, Target] = {
    "meta_gradient": Target(
        lambda network: {
            "net": network,
            "params": _params(network),
            **episode(),
            "loss": "mse",
            "query_loss": "mse",
            "lr": 0.1,
            "steps": 2,
            "step_weights": None,
            "wrt": ("params", "lr"),
            **OF_OPERATORS,
            **WEIGHTS,
        },
        lambda net, params, support_x, support_y, query_x, query_y, **given: fm.meta_gradient(
            net, params, (support_x, support_y), (query_x, query_y), **given
        ),
    ),
    "inner_sgd": Target(
        lambda network: {
            "net": network,
            "params": _params(network),
            "x": episode()["support_x"],
            "y": episode()["support_y"],
            "weights": WEIGHTS["support_weights"],
            "loss": "mse",
            "lr": 0.1,
            "steps": 2,
            **OF_OPERATORS,
        },
        lambda **given: _backward(fm.inner_sgd(**given)),
    ),
    "task_forward": Target(
        lambda network: {
            "net": network,
            "params": _params(network),
            "x": episode()["query_x"],
            "batch_stats": "task",
            "task_chunk": None,
        },
        lambda **given: _backward(fm.task_forward(**given)),
    ),
    "task_gradient": Target(
        lambda network: {
            "net": network,
            "params": _params(network),
            "x": episode()["support_x"],
            "y": episode()["support_y"],
            "loss": "mse",
            "adapt": "all",
            "weights": WEIGHTS["support_weights"],
            "weight_norm": "count",
            "batch_stats": "task",
        },
        lambda **given: _backward(fm.task_gradient(**given)),
    ),
    "MAML": _algorithm(fm.MAML, {**INNER, **OF_MAML}),
    "MetaSGD": _algorithm(fm.MetaSGD, INNER),
    "ANIL": _algorithm(fm.ANIL, INNER),
    "MAMLPlusPlus": _algorithm(
        fm.MAMLPlusPlus,
        {
            **INNER,
            "multi_step_epochs": 2,
            "first_order_epochs": 1,
            "per_step_norms": True,
            "learn_lr": "tensor",
            "lr_per_step": True,
        },
    ),
    "MetaCurvature": _algorithm(fm.MetaCurvature, INNER),
    "Reptile": _algorithm(fm.Reptile, {**INNER, "normalise": False, "weight_norm": "count", "adapt": "all"}),
    "IMAML": _algorithm(fm.IMAML, {**INNER, "proximal": 2.0, "cg_steps": 3, "cg_tolerance": 1e-5}),
    "CAVIA": Target(
        lambda network: {"net": _context_net(network), **INNER, "context": None, **episode()},
        _algorithm(fm.CAVIA, INNER).call,
    ),
    "adapt": Target(
        lambda network: {
            "net": network,
            "x": episode()["support_x"],
            "y": episode()["support_y"],
            "steps": None,
            "weights": WEIGHTS["support_weights"],
            "predict_x": episode()["query_x"],
        },
        _adapt,
    ),
    "predict": Target(
        lambda network: {"net": network, "adapted": _params(network), "x": episode()["query_x"]}, _predict
    ),
    "explain": Target(lambda network: {"net": network, **episode(), **WEIGHTS}, _explain),
    "ridge": _head(fm.heads.ridge, penalty=1.0, scale=1.0, shift=0.0, ways=None, support_weights=None),
    "logistic": _head(fm.heads.logistic, penalty=1.0, ways=None),
    "prototypes": _head(fm.heads.prototypes, ways=None),
    "SGD": _maker(
        fm.SGD, momentum=0.9, weight_decay=0.1, dampening=0.0, nesterov=True, clip_value=0.1, clip_norm=1.0
    ),
    "Adam": _maker(
        fm.Adam, betas=(0.9, 0.99), eps=1e-8, eps_root=1e-8, weight_decay=0.1, clip_value=0.1, clip_norm=1.0
    ),
    "RMSProp": _maker(
        fm.RMSProp,
        alpha=0.9,
        eps=1e-8,
        eps_root=0.0,
        weight_decay=0.1,
        momentum=0.5,
        centered=True,
        clip_value=0.1,
        clip_norm=1.0,
    ),
    "Adagrad": _maker(
        fm.Adagrad, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1, eps=1e-8, eps_root=0.0
    ),
    "Lion": _maker(fm.Lion, betas=(0.9, 0.99), weight_decay=0.1, clip_value=0.1, clip_norm=1.0),
    "CustomRule": _maker(fm.CustomRule, function=max, init=None),
    "Sinusoid": _maker(
        fm.data.Sinusoid, tasks=2, shots=2, query=2, iterations=3, seed=0, dtype=torch.float32
    ),
    "Episodes": Target(
        lambda network: {
            "data": torch.zeros(4, 5, 2),
            "ways": 2,
            "shots": 1,
            "query": 2,
            "tasks": 2,
            "iterations": 2,
            "seed": 0,
        },
        lambda data, **given: fm.data.Episodes(data, **given)[0],
        has_backend=False,
    ),
    "MLP": _maker(fm.models.MLP, widths=(4, 5, 3), batch_norm=False, flatten=False),
    "Siren": _maker(fm.models.Siren, widths=(2, 4, 1), omega_0=30.0),
}


def draw(rng: random.Random) -> Spec:
    """A function and one or two arguments of it."""
    target = rng.choice([*TARGETS, "meta_gradient", "MAML", "MAML", "inner_sgd", "task_forward"])
    right = TARGETS[target].arguments(net())
    first, second = rng.sample([*right], 2)
    if rng.random() < 0.6:
        return Spec(target, first, _drawn_value(rng, right[first]), backend=_backend(rng))
    values = _drawn_value(rng, right[first]), _drawn_value(rng, right[second])
    return Spec(target, first, values[0], second, values[1], _backend(rng))


def _backend(rng: random.Random) -> str:
    return rng.choice(("auto", "auto", "auto", "torch", "reference"))


def _drawn_value(rng: random.Random, right: Any) -> str:
    if isinstance(right, Tensor) and rng.random() < 0.7:
        return "spoiled: " + rng.choice([*SPOILED])
    if isinstance(right, dict) and rng.random() < 0.7:
        return "dict: " + rng.choice([*SPOILED_DICTS])
    return rng.choice([*VALUES])


def _value(name: str, right: Any) -> Any:
    sort, _, what = name.partition(": ")
    if sort == "spoiled":
        return SPOILED[what](right) if isinstance(right, Tensor) else right
    if sort == "dict" and what:
        return SPOILED_DICTS[what](right) if isinstance(right, dict) else right
    return VALUES[name]()


def global_state() -> dict[str, Any]:
    """Whatever of PyTorch's a call could leave changed."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "nn.Module": (nn.Module.__call__, nn.Module.__getattr__),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "saved tensor hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
    }


def check(spec: Spec) -> tuple[int, str]:
    """(calls made, what is wrong)."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    target, network = TARGETS[spec.target], net()
    arguments = target.arguments(network)
    network = arguments.get("net", network)
    names = {*arguments, "support", "query", "backend", "adapted"}
    for name, value in ((spec.first, spec.first_value), (spec.second, spec.second_value)):
        if name not in arguments or not value:
            if name or value:
                return 0, ""  # half of a change, on the way to a smaller one
            continue
        try:
            arguments[name] = _value(value, arguments[name])
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return 0, ""  # PyTorch does not make such a tensor
    if target.has_backend and "backend" not in arguments:
        arguments["backend"] = spec.backend
    before, state, random_state = entries(network), global_state(), torch.get_rng_state()
    values = [value.detach().clone() for value in network.parameters()]
    wrong = _called(target, arguments, names)
    if wrong:
        return 1, wrong
    changed = [name for name, value in global_state().items() if value != state[name]]
    if changed:
        return 1, f"PyTorch's {' and '.join(changed)} changed"
    if target.has_backend and not torch.equal(torch.get_rng_state(), random_state):
        return 1, "the random state has changed"
    if entries(network) != before:
        return 1, "the network has changed"
    if not all(map(torch.equal, values, network.parameters())):
        return 1, "values of parameters have changed"
    return 1, ""


def _called(target: Target, arguments: dict[str, Any], names: set[str]) -> str:
    try:
        target.call(**arguments)
    except REFUSALS as error:
        return _wrong_message(error, names)
    except RuntimeError as error:
        # what heads say of their arithmetic begins with the head's name
        known = ("allocate memory", "of the caller's own", "ridge: ", "logistic: ", "prototypes: ")
        if any(words in str(error) for words in known):
            return ""
        return f"{type(error).__name__}: {_first_line(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _wrong_message(error: BaseException, names: set[str]) -> str:
    message = str(error)
    words = set(re.findall(r"\w+", message))
    if isinstance(error, (MemoryError, fm.BackendUnavailable, FloatingPointError)) or words & names:
        return ""
    if "of the caller's own" in message:
        return ""
    return f"{type(error).__name__} names no argument: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


if __name__ == "__main__":
    main("Hostile values in the places of arguments.", draw, check)
