"""The state of the random generators that a network on one device can draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """A snapshot of the generators of the CPU and of one device."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None  # None: the device is the CPU

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The state as it is."""
        on_device = None if device.type == "cpu" else _generators(device).get_rng_state(*_which(device))
        return cls(device, torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """Make the state what it was."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _generators(self.device).set_rng_state(self.accelerator, *_which(self.device))

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        if self.accelerator is None or other.accelerator is None:
            return True
        return torch.equal(self.accelerator, other.accelerator)


@contextmanager
def preserved(device: torch.device) -> Iterator[RandomState]:
    """Whatever is drawn inside, the state afterwards is the one before."""
    before = RandomState.now(device)
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw inside what was drawn after `state`; the state afterwards is the one before."""
    with preserved(state.device):
        state.restore()
        yield


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that says which device, where there can be more than one."""
    return () if device.type == "mps" else (device,)
