"""What a network is given and what it returns, where that is more than one tensor: trees.

A *tree* is a tensor, or a tuple, list, dict, NamedTuple or `Inputs` of trees. Its tensors are its
*leaves*, in the order of `flatten`. Numbers, strings, None, enumerations, dtypes and devices may
stand anywhere: they are part of the *form* of the tree, which is all of it but the tensors. Forms
are hashable, and equal where two trees differ in nothing but their tensors.

What a backend may rely on, besides `fastmeta.problem`:

- `Batch.x` is a tree. In most calls it is one tensor; a backend that takes nothing else says so in
  `refuses`. The network is called as `net(*args, **kwargs)` with `args, kwargs = arguments(x)`,
  where x is that of one task.
- Every leaf of x begins with T, or with T, K where the batch is `per_step`. What follows is free:
  the second dimension need not be N (an adjacency matrix [T, nodes, nodes] belongs to the task).
  N, where a number of examples is asked for, is that of the first leaf (`Batch.examples`). Leaves
  of integers or booleans are as good as others; floating-point ones have the dtype of the
  parameters. All are on one device.
- `Batch.y` is a tree in the same way. It is one tensor where the loss has a name.
- A network may return a tree. Its leaves are tensors of any dtype. `Result.output` has its form,
  with T in front of every leaf, and so has `Problem.output_grad`, with None in the place of leaves
  that have no cotangent.
- `Gradients.support_x`, `support_y`, `query_x` and `query_y` have the form of what they are the
  gradients by, with None in the place of everything that is no floating-point tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: A tensor, or a tuple, list, dict, NamedTuple or `Inputs` of trees.
Tree: TypeAlias = Any

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, Enum),
    *(torch.dtype, torch.device, torch.Size),
)
_PLAIN = (tuple, list, dict)
#: Containers in containers that are looked into.
_DEEPEST = 50


class Inputs:
    """The arguments of a network's `forward`, by place and by name, that belong to the examples or
    to the tasks.

        x = fm.Inputs(ids, attention_mask=mask)
        maml(x, y, fm.Inputs(query_ids, attention_mask=query_mask), query_y)

    It stands wherever an `x` does: each task calls `net(*args, **kwargs)` with its own part of
    every tensor. Arguments without names need no class, a tuple does: `(ids, mask)` is `net(ids,
    mask)`. Any other tree of tensors (a dict, a list, a NamedTuple; they may hold each other) is
    the one argument of the network, `net(x)`.

    Every tensor begins with the tasks, [T, ...] ([T, K, ...] with `support_per_step`). What follows
    is the network's business: [T, N, ...] for what belongs to the examples, and anything for what
    belongs to the task, such as an adjacency matrix [T, nodes, nodes]. Integers and booleans are
    welcome.

    Args:
        args, kwargs: tensors, or tuples, lists, dicts and NamedTuples of them. Numbers, strings and
            None are handed over as they are.
    """

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Tree, **kwargs: Tree) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *[f"{name}={value!r}" for name, value in self.kwargs.items()]]
        return f"Inputs({', '.join(given)})"


class NotATreeError(TypeError):
    """Something is neither a tensor nor a container of them that is known here."""

    def __init__(self, kind: str, place: str = "") -> None:
        super().__init__(f"{kind} at {place}" if place else kind)
        self.kind, self.place = kind, place


class Form(NamedTuple):
    """A tree without its tensors.

    Args:
        kind: the class of a container, `Tensor` for a leaf, that of a constant.
        keys: of a dict; of `Inputs` the number of `args` and then the names; of a constant itself.
        parts: the forms of what a container holds, in the order of `keys`.
    """

    kind: Any
    keys: tuple[Any, ...] = ()
    parts: tuple[Form, ...] = ()

    def build(self, leaves: Iterable[Any]) -> Tree:
        """The tree of this form with these leaves, in their order."""
        return next(iter(leaves)) if self is _LEAF else self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Tree:
        kind = self.kind
        if kind is Tensor:
            return next(leaves)
        if self is _NOTHING or issubclass(kind, _CONSTANTS):
            return self.keys[0]
        parts = [part._build(leaves) for part in self.parts]
        if kind is Inputs:
            count, *names = self.keys
            return Inputs(*parts[:count], **dict(zip(names, parts[count:], strict=True)))
        if issubclass(kind, dict):
            return _made(kind, dict(zip(self.keys, parts, strict=True)))
        return _made(kind, parts)

    def without_constants(self) -> Form:
        """The same form with None in the place of every constant."""
        if self.kind is Tensor:
            return self
        if issubclass(self.kind, _CONSTANTS):
            return _NOTHING
        return Form(self.kind, self.keys, tuple([part.without_constants() for part in self.parts]))

    def match(self, tree: Tree) -> list[Any]:
        """What another tree holds in the places of the leaves of this form; None for all of them
        where that tree, or a part of it, is None.

        Raises:
            ValueError: that tree has another form.
        """
        return [*self._match(tree)]

    def _match(self, tree: Tree) -> Iterator[Any]:
        if self.kind is Tensor:
            yield tree
        elif self.parts:
            parts = (None,) * len(self.parts) if tree is None else _parts_of(tree, self.keys)
            if len(parts) != len(self.parts):
                raise ValueError(f"{self.kind.__name__} of {len(self.parts)} and of {len(parts)}")
            for form, part in zip(self.parts, parts, strict=True):
                yield from form._match(part)


_LEAF = Form(Tensor)
_NOTHING = Form(type(None), (None,))


def flatten(tree: Tree) -> tuple[list[Tensor], Form]:
    """(the leaves of a tree, its form).

    Raises:
        NotATreeError: it holds something that has no place in a tree; says where.
    """
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    leaves: list[Tensor] = []
    return leaves, _form_of(tree, leaves, 0)


def leaves_of(tree: Tree) -> list[Tensor]:
    """The leaves of a tree.

    Raises:
        NotATreeError: as `flatten`.
    """
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None else flatten(tree)[0]


def first_leaf(tree: Tree) -> Tensor:
    """The first leaf of a tree that has one."""
    return tree if isinstance(tree, Tensor) else flatten(tree)[0][0]


def mapped(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """A tree of the same form, with `function(leaf, ...)` in the places of its leaves.

    Args:
        function: of a leaf and of what each of `others` holds in its place.
        tree: None: there is none.
        others: trees of the same form, whose constants do not matter; None stands for Nones.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if tree is None:
        return None
    leaves, form = flatten(tree)
    return form.build(map(function, leaves, *[form.match(other) for other in others]))


def like(tree: Tree, leaves: Iterable[Any]) -> Tree:
    """A tree with other leaves, None in the place of its constants: gradients, for example."""
    return flatten(tree)[1].without_constants().build(leaves)


def named_leaves(tree: Tree) -> list[tuple[str, Tensor]]:
    """(what stands after the name of the tree to name it, leaf): ("['ids']", tensor).

    Raises:
        NotATreeError: as `flatten`.
    """
    flatten(tree)
    return [*_named(tree)]


def signature(tree: Tree, skip: int = 0) -> tuple[object, ...]:
    """What two trees have in common that differ in values and strides alone; hashable.

    Args:
        tree: any.
        skip: so many leading dimensions do not matter.
    """
    if isinstance(tree, Tensor):
        return tree.shape[skip:], tree.dtype, tree.device, tree.layout
    leaves, form = flatten(tree)
    return form, *[(leaf.shape[skip:], leaf.dtype, leaf.device, leaf.layout) for leaf in leaves]


def arguments(x: Tree) -> tuple[tuple[Tree, ...], dict[str, Tree]]:
    """What a network is called with: the positional and the named arguments."""
    if type(x) is tuple:
        return x, {}
    return (x.args, x.kwargs) if type(x) is Inputs else ((x,), {})


def described(tree: Tree) -> str:
    """Shapes and dtypes of all leaves, for messages."""
    if isinstance(tree, Tensor):
        return f"{tuple(tree.shape)} {tree.dtype}"
    return ", ".join(f"{name} {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in named_leaves(tree))


def _made(kind: Any, content: Any) -> Tree:
    """A container of a class, from a dict or a list of what it holds."""
    if type(content) is kind:
        return content
    return kind(*content) if hasattr(kind, "_fields") else kind(content)


def _parts_of(tree: Tree, keys: tuple[Any, ...]) -> tuple[Tree, ...]:
    """What a container holds, dicts in the order of `keys`."""
    if isinstance(tree, dict):
        if len(tree) != len(keys) or any(key not in tree for key in keys):
            raise ValueError(f"dicts with the keys {[*keys]} and {[*tree]}")
        return tuple(tree[key] for key in keys)
    if type(tree) is Inputs:
        return (*tree.args, *tree.kwargs.values())
    if not isinstance(tree, (tuple, list)):
        raise ValueError(f"no container, but {type(tree).__name__}")
    return tuple(tree)


def _form_of(tree: Tree, leaves: list[Tensor], depth: int) -> Form:
    """The form of a tree, whose leaves are added to `leaves`."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return _LEAF
    if tree is None:
        return _NOTHING
    kind: type = type(tree)
    if issubclass(kind, _CONSTANTS):
        return Form(kind, (tree,))
    keys: tuple[Any, ...] = ()
    if kind is Inputs:
        keys = (len(tree.args), *tree.kwargs)
    elif issubclass(kind, dict):
        keys = tuple(tree)
    elif not issubclass(kind, (tuple, list)):
        raise NotATreeError(kind.__name__)
    if kind not in _PLAIN and kind is not Inputs and not hasattr(kind, "_fields"):
        try:
            _made(kind, dict(tree) if issubclass(kind, dict) else [*tree])
        except Exception:  # a defaultdict, for example
            raise NotATreeError(kind.__name__) from None
    if depth == _DEEPEST:
        raise NotATreeError(f"containers {depth} deep")
    parts = []
    for at, part in enumerate(_parts_of(tree, keys)):
        try:
            parts.append(_form_of(part, leaves, depth + 1))
        except NotATreeError as error:
            raise NotATreeError(error.kind, _items(tree)[at][0] + error.place) from None
    return Form(kind, keys, tuple(parts))


def _items(tree: Tree) -> list[tuple[str, Tree]]:
    """What a container holds, by what stands after its name to name it."""
    if type(tree) is Inputs:
        args = [(f".args[{at}]", value) for at, value in enumerate(tree.args)]
        return args + [(f".kwargs[{name!r}]", value) for name, value in tree.kwargs.items()]
    if isinstance(tree, dict):
        return [(f"[{key!r}]", value) for key, value in tree.items()]
    names = getattr(type(tree), "_fields", None)
    if names is not None:
        return [(f".{name}", value) for name, value in zip(names, tree, strict=True)]
    return [(f"[{at}]", value) for at, value in enumerate(tree)]


def _named(tree: Tree) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield "", tree
    elif not isinstance(tree, _CONSTANTS):
        for name, part in _items(tree):
            for inside, leaf in _named(part):
                yield name + inside, leaf
