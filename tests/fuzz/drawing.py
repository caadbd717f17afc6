"""The inputs of the fuzzer of the public interface: what is drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from networks import NETWORKS, SMOOTH

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


#: Update rules besides SGD with momentum and weight decay alone; "own" ones are in `inner_rules`.
RULES = (
    *("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"),
    *("momentum", "coordinates", "signed"),
)


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
    rule: str = ""
    rule_flag: bool = False
    rule_root: float = 0.05
    learned: str = ""
    clip: str = ""
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
    support_objective: bool = False
    memory: str = "auto"
    memory_limit: int = 0
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
        steps=rng.choice((0, 1, 2, 2, 3)) if rng.random() < 0.9 else rng.choice((4, 7)),
        loss=rarely(LOSSES, "mse", 0.6),
        query_loss=rarely(LOSSES, "", 0.1),
        reduction=rarely(("sum",), "mean", 0.15),
        weight_norm=rarely(("sum",), "count"),
        rates=rarely(RATES, "number", 0.6),
        rule=rarely(RULES, "", 0.5),
        rule_flag=rng.random() < 0.3,
        rule_root=rarely((0.0,), 0.05),
        learned=rarely(("some", "all", "step"), "", 0.6),
        clip=rarely(("value", "norm", "value, norm"), ""),
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
        support_objective=rng.random() < 0.2,
        memory=rarely(("store", "recompute", "checkpoint", "checkpoint"), "auto", 0.5),
        memory_limit=rarely((1, 2, 4), 0),
        chunk=rarely((1, 2), None, 0.15),
        strides=rarely(STRIDES, "plain", 0.3),
        param_strides=rng.random() < 0.1,
        batch_stats=rarely(("running", "module"), "task", 0.3),
        dtype=dtype,
        backend=rng.choice(("auto", "auto", "auto", "cpu", "machine", "torch", "reference")),
        api=rng.choice(
            ("meta_gradient", "meta_gradient", "MAML", "inner_sgd", "task_forward", "task_gradient", "adapt")
        ),
        threads=rng.choice((1, 1, 1, 2)),
        no_input_gradients=rng.random() < 0.5,
    )
