"""A dictionary that forgets: every cache of the project is one, so that none grows with the number
of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_K = TypeVar("_K")
_V = TypeVar("_V")


class Bounded(dict[_K, _V]):
    """What came first is dropped when there are too many entries, or when they weigh too much.

    Values come in by `put`. To read is to read a dict, which hot paths do: `used` tells which entry
    shall stay longer.

    Args:
        entries: at most so many.
        weight: at most so much in all; the newest entry stays whatever it weighs. None: not
            weighed.
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
        super().__init__()
        self._entries, self._most, self._weigh, self._dropped = entries, weight, weigh, dropped
        self._weights: dict[_K, float] = {}
        self._total = 0.0

    def put(self, key: _K, value: _V) -> _V:
        """Keep `value` under `key`; returns it."""
        self.drop(key)
        self[key] = value
        if self._weigh is not None:
            self._weights[key] = self._weigh(value)
            self._total += self._weights[key]
        while len(self) > self._entries or (
            self._most is not None and self._total > self._most and len(self) > 1
        ):
            oldest = next(iter(self))
            gone = self[oldest]
            self.drop(oldest)
            if self._dropped is not None:
                self._dropped(gone)
        return value

    def used(self, key: _K) -> None:
        """Drop what is under `key`, if anything is, after all that is there now."""
        if key in self:
            self[key] = self.pop(key)

    def drop(self, key: _K) -> None:
        """Forget what is under `key`, if anything is."""
        self.pop(key, None)
        self._total -= self._weights.pop(key, 0.0)


class Known(Generic[_K, _V]):
    """What was found out about networks: something under each of at most `entries` keys a network,
    gone with it."""

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
