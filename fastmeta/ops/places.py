"""The tensors of a call in one list and back: autograd takes lists of tensors, and not trees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from fastmeta.inputs import Form, flatten
from fastmeta.ops.checks import Tensors
from fastmeta.ordinary import PLAIN
from fastmeta.problem import Gradients


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a list belong.

    Args:
        fields: the field of `Tensors` beside each tensor.
        form: of `Tensors`.
    """

    fields: tuple[str, ...]
    form: Form

    def tensors(self, given: Iterable[Tensor]) -> Tensors:
        """The tensors of a list in their places."""
        return self.form.build(given)

    def gradients(self, grads: Gradients, task_weights: Tensor | None = None) -> list[Any]:
        """The gradient by each tensor, None where there is none.

        Args:
            grads: holds all but that by the weights of tasks.
            task_weights: that one.
        """
        found = [getattr(grads, field, task_weights) for field in Tensors._fields]
        return self.form.match(Tensors(*found))


def placed(tensors: Tensors) -> tuple[list[Tensor], Places]:
    """(all tensors of a call, where they belong)."""
    given = [x for x in tensors if x is not None]
    if PLAIN.issuperset(map(type, given)):  # no trees: cheap
        return given, _plain(tuple([x is not None for x in tensors]))
    leaves, form = flatten(tensors)
    return leaves, Places(_fields_of(form), form)


@lru_cache(maxsize=256)
def _plain(there: tuple[bool, ...]) -> Places:
    parts = tuple(Form(Tensor) if given else Form(type(None), (None,)) for given in there)
    form = Form(Tensors, (), parts)
    return Places(_fields_of(form), form)


def _fields_of(form: Form) -> tuple[str, ...]:
    """The field beside each leaf of a form of `Tensors`."""
    pairs = zip(Tensors._fields, form.parts, strict=True)
    return tuple(field for field, part in pairs for _ in part.match(None))
