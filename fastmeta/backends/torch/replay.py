"""Running a step a second time: with the random numbers of the first time, and a check that it is
the same step.

What a forward takes from the clock, from the operating system's entropy or from state of its own
cannot be replayed.
It shows in the losses, one number a task, which forward passes alone make: they hardly depend on
how gradients are computed, as gradients do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmeta.backends._random_state import RandomState, replayed

#: Largest relative difference between two runs of one forward that rounding explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
WHY = (
    "the forward does not compute the same when it is run again with the same random state: it draws from "
    "something that cannot be replayed, such as the clock, os.urandom or an iterator, or keeps a state of "
    "its own"
)


class NotReplayedError(RuntimeError):
    """A forward pass that was run again was another one."""


class Replay:
    """What it takes to run one step again; to be made before it is run the first time."""

    def __init__(self, state: RandomState) -> None:
        self._state = state
        self._marks: Tensor | None = None

    def keep(self, marks: Tensor) -> None:
        """Remember what the first run computed.

        Args:
            marks: any numbers that would be others if it had not been the same, [T] for example.
        """
        self._marks = marks.detach()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, what was drawn the first time is drawn again."""
        with replayed(self._state):
            yield

    def check(self, marks: Tensor) -> None:
        """Compare with the first run; says nothing where that has no finite numbers.

        Raises:
            NotReplayedError: it was another one.
        """
        if marks.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing can be looked at
        kept = self._marks
        if kept is None:
            return
        finite = kept.isfinite()
        off = (marks.detach() - kept)[finite].abs()
        if not bool((off <= _TOLERANCE.get(kept.dtype, 0.05) * kept[finite].abs()).all()):
            raise NotReplayedError(WHY)


def marks_of(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each floating-point tensor on top of the largest of them, [n]: what cancels, as
    the gradient of a bias in front of a batch norm does, is zero but for rounding."""
    floating = [x.detach() for x in tensors if x.is_floating_point() or x.is_complex()]
    if not floating:
        return torch.zeros(0, device="cpu")
    norms = torch.stack([tensor.norm() for tensor in floating])
    return norms + norms.where(norms.isfinite(), 0).max()
