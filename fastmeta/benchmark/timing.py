"""The protocol of the clock: blocks of calls, the first calls of a block dropped, blocks of the
peers in turn.

Taking turns call by call would make the thread pools of two libraries fight; one long run each
would give one peer the cold machine and another the warm one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastmeta.benchmark.peers import Prepared

#: Calls at the head of a block that are not counted; one where a call takes longer than a block
#: should.
DROPPED = 3


@dataclass(frozen=True, slots=True)
class Protocol:
    """How long to measure: times in seconds."""

    rounds: int = 7  # blocks of each peer
    block: float = 0.15  # that a block should take
    most: int = 400  # timed calls in a block
    budget: float = 20.0  # for one peer on one case; its first block is always run


QUICK = Protocol(rounds=3, block=0.05, budget=3.0)


@dataclass(slots=True)
class Times:
    """The seconds of every timed call of one peer on one case."""

    total: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)  # outside of the kernel, where that is known

    @property
    def median(self) -> float:
        """Of the calls, in seconds."""
        return float(np.median(self.total))

    def percentile(self, q: float) -> float:
        """Of the calls, in seconds."""
        return float(np.percentile(self.total, q))


def measure(peers: Mapping[str, Prepared], protocol: Protocol) -> dict[str, Times]:
    """Time every peer's step, block after block in turn.

    Args:
        peers: ready and warm: each step has run at least once.
        protocol: block length and number of rounds.
    """
    times = {name: Times() for name in peers}
    spent = dict.fromkeys(peers, 0.0)
    for _ in range(protocol.rounds):
        for name, peer in peers.items():
            if spent[name] < protocol.budget:
                start = time.perf_counter()
                _block(peer, times[name], protocol)
                spent[name] += time.perf_counter() - start
    return times


def _block(peer: Prepared, times: Times, protocol: Protocol) -> None:
    guess = _call(peer)[0]
    if guess < protocol.block:
        for _ in range(DROPPED - 1):
            guess = min(guess, _call(peer)[0])
    for _ in range(max(3, min(protocol.most, round(protocol.block / max(guess, 1e-9))))):
        total, beyond = _call(peer)
        times.total.append(total)
        if beyond is not None:
            times.beyond.append(beyond)


def _call(peer: Prepared) -> tuple[float, float | None]:
    start = time.perf_counter()
    peer.step()
    total = time.perf_counter() - start
    return total, None if peer.inside is None else total - peer.inside()
