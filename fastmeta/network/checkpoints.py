"""`torch.utils.checkpoint` inside a network, which runs parts of it again in the backward pass.

By then the module has its own parameters back, and the gradients would be those of another network.
So a checkpointed part is run like any other while fastmeta evaluates a module, and memory is saved
by `memory="recompute"` instead.
torch.utils.checkpoint looks up what it is made of at every call: that is how it is reached however
it was imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import checkpoint as _checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

_Reentrant: Any = _checkpoint.CheckpointFunction
_generator: Any = _checkpoint._checkpoint_without_reentrant_generator


class Plain(TorchFunctionMode):
    """While one of these modes is active, in its own thread, checkpointed functions are run like
    any others."""

    def __exit__(self, *raised: Any) -> None:
        # who took it off the stack for a while may have been interrupted before it was put back
        if self in _get_current_function_mode_stack()[-1:]:
            super().__exit__(*raised)


def _active() -> bool:
    return any(isinstance(mode, Plain) for mode in _get_current_function_mode_stack())


@classmethod  # type: ignore[misc]
def _apply(cls: Any, run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    if _active():
        return run_function(*args)
    return super(_Reentrant, cls).apply(run_function, preserve_rng_state, *args)


@wraps(_generator)
def _around(
    function: Any, preserve_rng_state: bool, context_fn: Any, *args: Any, **kwargs: Any
) -> Iterator[None]:
    """torch.utils.checkpoint runs `function` where this yields."""
    if not _active():
        yield from _generator(function, preserve_rng_state, context_fn, *args, **kwargs)
        return
    forward, _ = context_fn()
    # a dispatch mode is how selected tensors are kept for the recomputation
    with nullcontext() if isinstance(forward, TorchDispatchMode) else forward:
        yield


_Reentrant.apply = _apply
_checkpoint._checkpoint_without_reentrant_generator = _around  # type: ignore[assignment]
