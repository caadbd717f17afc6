"""All layer kinds: whatever file of this folder has a `KIND`. Adding a kind edits no list."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fastmeta import layers
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind


def _found() -> dict[str, LayerKind]:
    kinds: dict[str, LayerKind] = {}
    for file in iter_modules(layers.__path__):
        kind = getattr(import_module(f"{layers.__name__}.{file.name}"), "KIND", None)
        if kind is None:
            continue
        if not isinstance(kind, LayerKind) or kind.name != file.name:
            raise TypeError(f"fastmeta/layers/{file.name}.py: KIND must be the LayerKind of that name")
        kinds[kind.name] = kind
    return kinds


#: Name -> record, in the order of the names.
KINDS: dict[str, LayerKind] = _found()


def kind_of(layer: Layer) -> LayerKind:
    """The record of a layer's kind.

    Raises:
        ValueError: there is no such kind.
    """
    try:
        return KINDS[layer.kind]
    except KeyError:
        raise ValueError(f"no layer kind is called {layer.kind!r}; there are {', '.join(KINDS)}") from None
