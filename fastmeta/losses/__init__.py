"""Losses: what the user may pass as `loss=`, written down once as a `Loss`."""

from fastmeta.losses.loss import Loss
from fastmeta.losses.resolve import resolve

__all__ = ["Loss", "resolve"]
