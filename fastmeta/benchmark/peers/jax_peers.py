"""JAX: `jit(vmap)` over tasks, and a Python loop over a jitted task. The network is its layer
program, or written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmeta.benchmark.peers import jax_network, plain_torch
from fastmeta.benchmark.peers.peer import Prepared, installed_version, not_installed, sgd_alone
from fastmeta.cases import Case, Instance

Params = dict[str, Any]


class JaxVmap:
    """`jit(grad(mean(vmap(inner loop))))`: one compiled function for all tasks."""

    name = "jax-vmap"

    def __init__(self) -> None:
        self._compiled: dict[Case, Any] = {}

    def missing(self) -> str:
        return not_installed("jax")

    def version(self) -> str:
        return installed_version("jax")

    def prepare(self, case: Case, made: Instance) -> Prepared:
        sgd_alone(case)
        import jax

        if case not in self._compiled:  # another seed is the same function
            task = _task(case, made.net)

            def objective(params: Params, *episode: Any) -> Any:
                return jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(params, *episode).mean()

            self._compiled[case] = jax.jit(jax.value_and_grad(objective))
        function = self._compiled[case]
        params, episode = _arrays(made)
        return Prepared(
            lambda: jax.block_until_ready(function(params, *episode)), lambda out: _tensors(out[1])
        )


class JaxLoop(JaxVmap):
    """`jit(grad(inner loop))` of one task, called for one task after the other; the sum is jitted
    too."""

    name = "jax-loop"

    def prepare(self, case: Case, made: Instance) -> Prepared:
        sgd_alone(case)
        import jax

        if case not in self._compiled:
            self._compiled[case] = jax.jit(jax.value_and_grad(_task(case, made.net)))
        one = self._compiled[case]
        add = jax.jit(lambda total, more: jax.tree.map(jax.numpy.add, total, more))
        scale = jax.jit(lambda total: jax.tree.map(lambda value: value / case.tasks, total))
        params, episode = _arrays(made)
        tasks = [jax.tree.map(lambda leaf, t=t: leaf[t], episode) for t in range(case.tasks)]

        def step() -> Any:
            total = one(params, *tasks[0])
            for data in tasks[1:]:
                total = add(total, one(params, *data))
            return jax.block_until_ready(scale(total))

        return Prepared(step, lambda out: _tensors(out[1]))


def _task(case: Case, net: nn.Module) -> Callable[..., Any]:
    import jax

    forward = jax_network.forward(net, case.input_shape)
    loss = _loss(case)

    def on(adapted: Params, fixed: Params, x: Any, y: Any) -> Any:
        return loss(forward({**adapted, **fixed}, x), y)

    def task(params: Params, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        adapted = {name: value for name, value in params.items() if case.adapts(name)}
        fixed = {name: value for name, value in params.items() if name not in adapted}
        for _ in range(case.steps):
            gradients = jax.grad(on)(adapted, fixed, support_x, support_y)
            adapted = jax.tree.map(lambda value, gradient: value - case.lr * gradient, adapted, gradients)
        return on(adapted, fixed, query_x, query_y)

    return task


def _loss(case: Case) -> Callable[[Any, Any], Any]:
    import jax
    from jax import numpy as jnp

    def cross_entropy(logits: Any, classes: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], axis=1).mean()

    if case.loss == "ce":
        return cross_entropy
    if case.loss == "mse":
        return lambda output, target: jnp.square(output - target).mean()
    raise ValueError(f"benchmark: the JAX peers have mse and ce, got {case.loss!r}")


def _arrays(made: Instance) -> tuple[Params, tuple[Any, ...]]:
    import jax

    def array(tensor: Tensor) -> Any:
        wide = tensor.dtype == torch.int64
        found = tensor.detach().cpu().numpy()
        return jax.device_put(found.astype(np.int32) if wide else found)

    params = {name: array(value) for name, value in made.params.items()}
    return params, tuple(jax.tree.map(array, part) for part in plain_torch.episode(made))


def _tensors(gradients: Params) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in gradients.items()}
