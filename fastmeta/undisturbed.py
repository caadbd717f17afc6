"""Whatever is raised in a call, and wherever, torch's global state is afterwards what it was
before.

Context managers written in Python can be interrupted between what they set and the block that they
guard, by the handler of a signal or by an exception set from another thread. What they leave behind
then is put back here.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from operator import methodcaller
from traceback import clear_frames, walk_tb
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import _autograd, _functorch

from fastmeta.backends._random_state import RandomState
from fastmeta.network.swap import LOCK

P = ParamSpec("P")
T = TypeVar("T")

_C: Any = torch._C
_DEVICES = ("cpu", "cuda")
#: (read, write) of flags of the whole process.
_FLAGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{setter}"))
    for name, setter in (
        ("cudnn_enabled", "cudnn_enabled"),
        ("cudnn_benchmark", "cudnn_benchmark"),
        ("cudnn_deterministic", "cudnn_deterministic"),
        ("cudnn_allow_tf32", "cudnn_allow_tf32"),
        ("float32_matmul_precision", "float32_matmul_precision"),
        ("flash_sdp_enabled", "sdp_use_flash"),
        ("mem_efficient_sdp_enabled", "sdp_use_mem_efficient"),
        ("math_sdp_enabled", "sdp_use_math"),
        ("cudnn_sdp_enabled", "sdp_use_cudnn"),
        ("overrideable_sdp_enabled", "sdp_use_overrideable"),
        ("sdp_priority_order", "sdp_priority_order"),
    )
    if hasattr(_C, f"_get_{name}") and hasattr(_C, f"_set_{setter}")
]
_AUTOCAST_NESTING = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)
_called = methodcaller("__call__")


def undisturbed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)`; if it raises, gradient mode, modes, transforms, hooks and flags are what
    they were."""
    before = _State()
    try:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            before.restore(error)
            raise
    except BaseException as error:  # the first time may have been interrupted itself
        before.restore(error)
        raise


def undrawn(device: torch.device, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`undisturbed`, and if it raises, nothing was drawn from the random generators."""
    random = RandomState.now(device)
    try:
        try:
            return undisturbed(function, *args, **kwargs)
        except BaseException:
            random.restore()
            raise
    except BaseException:
        random.restore()
        raise


def abandon(error: BaseException | None) -> None:
    """Have context managers that were interrupted as they were entered go now, not when the last
    trace of the error
    does: they still put back what they had found, which by then may be somebody else's."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def asynchronous(error: BaseException) -> bool:
    """Whether an exception comes from outside of the code that it came up in: not an `Exception`,
    or raised by the handler of a signal. Who would go on another way after an error of the code's
    own lets it pass."""
    if not isinstance(error, Exception):
        return True
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code(handler) for handler in handlers if callable(handler)} - {None}
    return bool(codes) and any(frame.f_code in codes for frame, _ in walk_tb(error.__traceback__))


def _code(function: Any) -> Any:
    """The code of a function, a method or an object that is called, None where it is not
    Python's."""
    for called in (getattr(function, "__func__", function), type(function).__call__):
        if hasattr(called, "__code__"):
            return called.__code__
    return None


class _State:
    """torch's state, of this thread and of the process, as far as a forward pass or fastmeta
    changes it for a time."""

    def __init__(self) -> None:
        with LOCK:  # flags are of the process: not those of another thread's forward pass
            self._read()

    def _read(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
        self.cache = torch.is_autocast_cache_enabled()
        self.nesting = [*map(_called, _AUTOCAST_NESTING)][1]  # in one step, which no signal cuts in two
        self.modes = [*map(_C._get_function_stack_at, range(_C._len_torch_function_stack()))]
        self.function_state = _C._get_torch_function_state()
        self.dispatch = _C._len_torch_dispatch_stack()
        self.transforms = _functorch.get_dynamic_layer_stack_depth()
        self.hooks = _autograd._top_saved_tensors_default_hooks(True)
        self.hooks_disabled = _autograd._saved_tensors_hooks_get_disabled_error_message()
        self.flags = [read() for read, _ in _FLAGS]
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        self.stance = None if compiler is None else getattr(compiler, "_stance", None)

    def restore(self, error: BaseException) -> None:
        """Make the state this one."""
        with LOCK:
            self._restore(error)

    def _restore(self, error: BaseException) -> None:
        self._restore_modes()  # first of all: they would see what is read and set here
        differs = vars(_State()) != vars(self)
        if differs or asynchronous(error):  # else the frames are left to a debugger
            abandon(error)
            self._restore_modes()
        if vars(_State()) == vars(self):
            return
        while _functorch.get_dynamic_layer_stack_depth() > self.transforms:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        while _C._len_torch_dispatch_stack() > self.dispatch:
            _C._pop_torch_dispatch_stack(None)
        self._restore_hooks()
        while (depth := [*map(_called, _AUTOCAST_NESTING)][1]) != self.nesting:
            _AUTOCAST_NESTING[depth > self.nesting]()
        for device, (enabled, dtype) in zip(_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        for (read, write), value in zip(_FLAGS, self.flags, strict=True):
            if read() != value:
                write(value)
        if self.stance is not None:
            sys.modules["torch._dynamo.eval_frame"]._set_stance(self.stance)
        if torch.is_grad_enabled() != self.grad:
            torch._C._set_grad_enabled(self.grad)

    def _restore_modes(self) -> None:
        if _C._get_torch_function_state() != self.function_state:
            _C._set_torch_function_state(self.function_state)
        now = [*map(_C._get_function_stack_at, range(_C._len_torch_function_stack()))]
        shared = 0
        while shared < min(len(now), len(self.modes)) and now[shared] is self.modes[shared]:
            shared += 1
        while _C._len_torch_function_stack() > shared:
            _C._pop_torch_function_stack()
        for mode in self.modes[shared:]:
            _C._push_on_torch_function_stack(mode)

    def _restore_hooks(self) -> None:
        if _autograd._saved_tensors_hooks_get_disabled_error_message() != self.hooks_disabled:
            if self.hooks_disabled is None:
                _autograd._saved_tensors_hooks_enable()
            else:
                _autograd._saved_tensors_hooks_disable(self.hooks_disabled)
        while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None and top != self.hooks:
            _autograd._pop_saved_tensors_default_hooks()
