"""What a checkpoint must hold, checked before anything of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.cli.train.sealed import Damaged

#: Of the checkpoints that this version writes and reads.
FORMAT = 2

_NAMES = ("settings", "maml", "optimizer", "iteration", "seconds", "losses", "columns", "rows")


class OtherVersion(ValueError):
    """A checkpoint of another version of fastmeta; the message says what was expected and came."""


def check(content: Any, columns: Sequence[str]) -> None:
    """Check that this is a checkpoint of a run with these metrics, of any network.

    Raises:
        Damaged: something is missing or is not of its kind, shape or range.
        OtherVersion: it is of another format.
    """
    if not isinstance(content, dict):
        raise Damaged(f"expected a dict, got {type(content).__name__}")
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise OtherVersion(f"expected format {FORMAT}, got {content.get('format')!r:.40}")
    if missing := [name for name in _NAMES if name not in content]:
        raise Damaged(f"expected {', '.join(_NAMES)}, got none of {', '.join(missing)}")
    _settings(content["settings"])
    iteration = content["iteration"]
    _need(type(iteration) is int and iteration >= 0, "`iteration`, 0 or more", iteration)
    seconds = content["seconds"]
    _need(type(seconds) is float and 0 <= seconds < math.inf, "finite `seconds`", seconds)
    _need(isinstance(content["columns"], list), "the names of the metrics", content["columns"])
    if [str(column) for column in content["columns"]] != list(columns):
        raise OtherVersion(f"expected the metrics {list(columns)}, got {content['columns']!r:.80}")
    _rows(content["rows"], len(columns), iteration)
    _losses(content["losses"], iteration - (content["rows"][-1][0] if content["rows"] else 0))


def check_weights(content: Mapping[str, Any], maml: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the weights and the optimiser's state are those of this network.

    Raises:
        Damaged: a tensor is missing, or has another shape or dtype.
    """
    _like("maml", content["maml"], maml.state_dict())
    (flat,) = optimizer.param_groups[0]["params"]
    optimised = content["optimizer"]
    _need(
        isinstance(optimised, dict) and isinstance(optimised.get("state"), dict),
        "the optimiser's state",
        optimised,
    )
    states = optimised["state"]
    if content["iteration"] == 0 and not states:
        return
    _need(list(states) == [0], "the state of one parameter", list(states))
    _like("optimizer", states[0], {"step": torch.zeros(()), "exp_avg": flat, "exp_avg_sq": flat})
    # Counted in float32, which has no odd numbers above this one.
    steps, step = min(content["iteration"], 2**24), float(states[0]["step"])
    _need(step == steps, f"{steps} steps of the optimiser", step)


def _need(right: bool, expected: str, got: object) -> None:
    if not right:
        raise Damaged(f"expected {expected}, got {got!r:.80}")


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _settings(settings: Any) -> None:
    kinds = (str, int, float, bool, type(None))
    right = isinstance(settings, dict) and all(
        isinstance(name, str) and isinstance(value, kinds) for name, value in settings.items()
    )
    _need(right, "settings by name", settings)


def _losses(losses: Any, count: int) -> None:
    plain = isinstance(losses, Tensor) and losses.dim() == 1 and losses.dtype == torch.float32
    # A tensor that is not contiguous may be far longer than the file.
    right = plain and losses.device.type == "cpu" and losses.is_contiguous() and len(losses) == count
    _need(right, f"the {count} losses since the last row", losses)


def _rows(rows: Any, columns: int, iteration: int) -> None:
    right = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 1 + columns and all(map(_number, row)) for row in rows
    )
    _need(right, f"rows of {1 + columns} numbers", rows)
    at = [row[0] for row in rows]
    rising = (
        all(type(i) is int for i in at)
        and at == sorted(set(at))
        and (not at or 0 < at[0] <= at[-1] <= iteration)
    )
    _need(rising, f"rows of rising iterations up to {iteration}", at)


def _like(what: str, held: Any, wanted: Mapping[str, Tensor]) -> None:
    """Tensors of the names, shapes and dtypes of `wanted`."""
    _need(isinstance(held, dict) and held.keys() == wanted.keys(), f"in `{what}` {', '.join(wanted)}", held)
    for name, tensor in wanted.items():
        other = held[name]
        same = isinstance(other, Tensor) and other.shape == tensor.shape and other.dtype == tensor.dtype
        if not same or other.layout != torch.strided or other.device != tensor.device:
            got = f"{other.dtype} {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
            raise Damaged(f"expected `{what}` {name} to be {tensor.dtype} {tuple(tensor.shape)}, got {got}")
