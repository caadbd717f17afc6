"""The one vector that flattened meta-parameters are views of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FlatParameters:
    """A vector, and what its pieces are.

    Args:
        vector: [P], the leaf; parameters first, then learned rates.
        names: of the parameters in it.
        keys: of the learned rates in it.
    """

    vector: Tensor
    names: tuple[str, ...]
    keys: tuple[str, ...]

    def parts(self, params: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters and rates that should be views of the vector, in its order."""
        return [params[name] for name in self.names] + [rates[key] for key in self.keys]

    def holds(self, params: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> bool:
        """Whether every piece still is where it belongs, by address."""
        vector = self.vector
        try:
            parts = self.parts(params, rates)
        except KeyError:
            return False
        size = vector.element_size()
        address = vector.data_ptr()
        for part in parts:
            if part.data_ptr() != address or not part.is_contiguous():
                return False
            address += size * part.numel()
        return address == vector.data_ptr() + size * vector.numel()

    def check(self, params: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> None:
        """Refuse parameters that went their own way.

        Raises:
            RuntimeError: an optimiser on the vector would no longer move the network.
        """
        if not self.holds(params, rates):
            raise RuntimeError(
                "MAML: the parameters are no longer views of the vector that fastmeta.flatten made "
                "(deepcopy, pickle, .double(), .to(), replaced layers and assignments to .data part them): "
                "call fastmeta.flatten(maml) again and give the new vector to the optimiser"
            )


def views(vector: Tensor, like: Iterable[Tensor]) -> Sequence[Tensor]:
    """The pieces of `vector`, shaped as `like`."""
    shapes = [tensor.shape for tensor in like]
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
