"""A dictionary that forgets: every cache of the project is one, so that none grows with the number of calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_K = TypeVar("_K")
_V = TypeVar("_V")


class Bounded(Generic[_K, _V]):
    """What was used least recently is dropped when there are too many entries, or when they weigh too much.

    Args:
        entries: at most so many.
        weight: at most so much in all; the newest entry stays whatever it weighs. None: not weighed.
        weigh: the weight of a value, in bytes for example, asked when it is put in.
        dropped: called with each value that had to go to make room.
    """

    def __init__(
        self,
        entries: int,
        weight: float | None = None,
        weigh: Callable[[_V], float] | None = None,
        dropped: Callable[[_V], object] | None = None,
    ) -> None:
        self._entries, self._most, self._weigh, self._dropped = entries, weight, weigh, dropped
        self._found: OrderedDict[_K, _V] = OrderedDict()
        self._weights: dict[_K, float] = {}
        self._total = 0.0

    def get(self, key: _K, default: Any = None) -> Any:
        """The value under `key`, which is then the one used last."""
        try:
            value = self._found[key]
            self._found.move_to_end(key)
        except KeyError:  # or another thread has just dropped it
            return default
        return value

    def put(self, key: _K, value: _V) -> _V:
        """Keep `value` under `key`; returns it."""
        self.drop(key)
        self._found[key] = value
        if self._weigh is not None:
            self._weights[key] = self._weigh(value)
            self._total += self._weights[key]
        while len(self._found) > self._entries or (
            self._most is not None and self._total > self._most and len(self._found) > 1
        ):
            oldest = next(iter(self._found))
            dropped = self._found[oldest]
            self.drop(oldest)
            if self._dropped is not None:
                self._dropped(dropped)
        return value

    def drop(self, key: _K) -> None:
        """Forget what is under `key`, if anything is."""
        self._found.pop(key, None)
        self._total -= self._weights.pop(key, 0.0)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)


class Known(Generic[_K, _V]):
    """What was found out about networks: something under each of at most `entries` keys a network, gone with it."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._of: WeakKeyDictionary[nn.Module, Bounded[_K, _V]] = WeakKeyDictionary()

    def get(self, net: nn.Module, key: _K) -> _V | None:
        """What is known, None for nothing."""
        found = self._of.get(net)
        return None if found is None else found.get(key)

    def put(self, net: nn.Module, key: _K, value: _V) -> _V:
        """Keep `value`; returns it."""
        return self._of.setdefault(net, Bounded(self._entries)).put(key, value)

    def __len__(self) -> int:
        return len(self._of)
