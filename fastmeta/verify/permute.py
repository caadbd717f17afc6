"""The same problem in another order: examples shuffled, hidden units shuffled, and the result put
back.

A permuted run rounds differently and is equally right, so it is one of the samples of PyTorch's own
float32 error.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmeta.inputs import Tree, first_leaf, mapped
from fastmeta.problem import Batch, Problem, Result

#: Parameter name -> the axes (from the end) that are shuffled, each with its order.
Orders = dict[str, list[tuple[int, Tensor]]]


class Permutation:
    """One random order of the examples and of the hidden units of a problem.

    Hidden units are shuffled only where that is simple: between two neighbouring linear layers of
    an `nn.Sequential` on rows, with element-wise layers, batch norms and layer norms alone between
    them and no parameter used twice.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._units = _unit_orders(problem, generator)
        self._support = _example_order(problem.support, generator)
        self._query = _example_order(problem.query, generator)

    def apply(self, problem: Problem) -> Problem:
        """The problem in the new order."""
        return replace(
            problem,
            params=_reorder(problem.params, self._units),
            rates=_reorder(problem.rates, self._units),
            adapted_grad=problem.adapted_grad and _reorder(problem.adapted_grad, self._units),
            output_grad=_examples(problem.output_grad, 1, self._query),
            support=_batch(problem.support, self._support),
            query=_batch(problem.query, self._query),
        )

    def undo(self, problem: Problem, result: Result) -> Result:
        """The result of the permuted problem in the order of the problem itself."""
        units = {
            name: [(axis, order.argsort()) for axis, order in axes] for name, axes in self._units.items()
        }
        support = None if self._support is None else self._support.argsort()
        query = None if self._query is None else self._query.argsort()
        axis = 2 if problem.support is not None and problem.support.per_step else 1
        grads = result.grads
        return replace(
            result,
            output=_examples(result.output, 1, query),
            adapted=result.adapted and _reorder(result.adapted, units),
            grads=replace(
                grads,
                params=grads.params and _reorder(grads.params, units),
                lr=grads.lr and _reorder(grads.lr, units),
                support_x=_examples(grads.support_x, axis, support),
                support_y=_examples(grads.support_y, axis, support),
                support_weights=_examples(grads.support_weights, axis, support),
                query_x=_examples(grads.query_x, 1, query),
                query_y=_examples(grads.query_y, 1, query),
                query_weights=_examples(grads.query_weights, 1, query),
                flat_params=None,
            ),
        )


def _unit_orders(problem: Problem, generator: torch.Generator) -> Orders:
    orders: Orders = {}
    net = problem.net
    if not isinstance(net, nn.Sequential):
        return orders
    linears = [(i, layer) for i, layer in enumerate(net) if isinstance(layer, nn.Linear)]
    used = [id(value) for layer in net for value in layer.parameters()]
    if len(set(used)) < len(used):
        return orders
    rows = all(
        batch is None or first_leaf(batch.x).ndim == 3 + batch.per_step
        for batch in (problem.support, problem.query)
    )
    for (i, _), (j, following) in pairwise(linears):
        units = following.in_features
        if not all(_any_order(layer, units, rows) for layer in list(net)[i + 1 : j]):
            continue
        order = torch.randperm(units, generator=generator)
        for k in range(i, j):
            for name, value in net[k].named_parameters():
                orders.setdefault(f"{k}.{name}", []).append((-value.ndim, order))
        orders.setdefault(f"{j}.weight", []).append((-1, order))
    return orders


def _any_order(layer: nn.Module, units: int, rows: bool) -> bool:
    """Whether a layer does the same in any order of its units, if its parameters are in that order
    too."""
    if isinstance(layer, nn.BatchNorm1d):
        return rows
    if isinstance(layer, nn.LayerNorm):
        return rows and layer.normalized_shape == (units,)
    return not isinstance(layer, (nn.Flatten, nn.GroupNorm)) and not list(layer.parameters())


def _reorder(tensors: dict[str, Tensor], orders: Orders) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for axis, order in orders.get(name, []):
            # A rate shared along the axis has size one there.
            tensor = tensor if tensor.shape[axis] == 1 else tensor.index_select(axis, order)
        found[name] = tensor
    return found


def _example_order(batch: Batch | None, generator: torch.Generator) -> Tensor | None:
    if batch is None:
        return None
    return torch.randperm(first_leaf(batch.x).shape[2 if batch.per_step else 1], generator=generator)


def _examples(tree: Tree, axis: int, order: Tensor | None) -> Tree:
    return tree if order is None else mapped(lambda leaf: leaf.index_select(axis, order), tree)


def _batch(batch: Batch | None, order: Tensor | None) -> Batch | None:
    if batch is None:
        return None
    axis = 2 if batch.per_step else 1
    y, weights = _examples(batch.y, axis, order), _examples(batch.weights, axis, order)
    return replace(batch, x=_examples(batch.x, axis, order), y=y, weights=weights)
