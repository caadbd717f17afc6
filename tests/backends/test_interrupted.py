"""An exception at any line of a call, a signal at any moment: nothing is left behind and the next
call is right."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from linecache import getline
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unchanged import differences, global_state, module_state

import fastmeta as fm
from fastmeta.network import swap

pytestmark = pytest.mark.usefixtures("one_thread")

FASTMETA = ("/fastmeta/",)
TORCH = (
    "/torch/fx/",
    "/torch/_functorch/",
    "/torch/overrides.py",
    "/torch/nn/",
    "/torch/autograd/",
    "/contextlib.py",
)


class _Interrupted(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


def _episode() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((2, 4, 3), (2, 4, 2), (2, 5, 3), (2, 5, 2))]


class _Last(nn.Module):
    """Keeps its activation, and has what is replaced while fastmeta runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.head(self.last)


def _captured() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _network(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _answer(net: nn.Module, backend: str) -> list[Tensor]:
    """The loss of a training step and all gradients."""
    for parameter in net.parameters():
        parameter.grad = None
    loss = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)(*_episode()).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in net.parameters())]


class _RaiseAt:
    """Traces lines of some files and raises before the n-th of them is run."""

    def __init__(self, files: tuple[str, ...], n: int) -> None:
        self.files, self.left = files, n
        self.known: dict[CodeType, bool] = {}
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self.known:
            self.known[code] = any(part in code.co_filename for part in self.files)
        return self.line if self.known[code] else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self._leaves_a_lock(frame):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise _Interrupted(self.where)
        return self.line

    def _leaves_a_lock(self, frame: FrameType) -> bool:
        """Entering and leaving a lock is one step of C, which a signal cannot come before: the
        trace alone can."""
        return "LOCK:" in getline(frame.f_code.co_filename, frame.f_lineno)

    def run(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


def _lock_is_free(lock: Any) -> bool:
    found: list[bool] = []

    def attempt() -> None:
        found.append(lock.acquire(timeout=1))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("files", [FASTMETA, TORCH], ids=["fastmeta", "torch"])
@pytest.mark.parametrize(
    ("make", "backend"),
    [(_captured, "auto"), (_Last, "torch"), (_Last, "reference")],
    ids=["captured", "torch", "reference"],
)
def test_an_exception_at_any_line_leaves_nothing_behind(
    make: Callable[[], nn.Module], backend: str, files: tuple[str, ...]
) -> None:
    want = _answer(_network(make), backend)
    count, net = _RaiseAt(files, 0), _network(make)
    count.run(lambda: _answer(net, backend))
    lines = -count.left
    assert lines > 100
    state = global_state()
    for n in random.Random(0).sample(range(1, lines), min(lines - 1, SAMPLES)):
        net = _network(make)
        before, drawn = module_state(net), torch.get_rng_state()
        raising = _RaiseAt(files, n)
        with suppress(_Interrupted):
            raising.run(lambda net=net: _answer(net, backend))  # type: ignore[misc]
            pytest.fail(f"no exception came out of {raising.where}")
        where = raising.where
        assert not differences(before, module_state(net)), where
        assert not differences(state, global_state()), where
        assert torch.equal(drawn, torch.get_rng_state()), where
        assert _lock_is_free(swap.LOCK), where
        assert all(map(torch.equal, _answer(net, backend), want)), where


SAMPLES = 15


class _Late(Exception):
    """What a handler raises where somebody else's code may take it for an error of its own."""


@pytest.fixture
def alarm() -> Iterator[Callable[[float, type[BaseException]], None]]:
    """alarm(seconds, error): that long from now, the handler of SIGALRM raises `error`, wherever
    Python is."""

    def set_alarm(seconds: float, error: type[BaseException]) -> None:
        def handler(number: int, frame: FrameType | None) -> None:
            raise error

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.getsignal(signal.SIGALRM)
    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signals here")
@pytest.mark.parametrize("error", [KeyboardInterrupt, _Late])
@pytest.mark.parametrize(
    ("make", "backend"), [(_captured, "auto"), (_Last, "torch")], ids=["captured", "torch"]
)
def test_a_signal_at_any_moment_leaves_nothing_behind(
    make: Callable[[], nn.Module],
    backend: str,
    error: type[BaseException],
    alarm: Callable[[float, type[BaseException]], None],
) -> None:
    want, state, interrupted = _answer(_network(make), backend), global_state(), 0
    start = time.perf_counter()
    _answer(_network(make), backend)
    takes, moments = time.perf_counter() - start, random.Random(0)
    while interrupted < SAMPLES:
        net = _network(make)
        before = module_state(net)
        try:
            try:
                alarm(moments.uniform(1e-5, takes), error)
                _answer(net, backend)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)  # it may come just before
            takes *= 0.9  # other processes have slowed the first one down
        except error:
            interrupted += 1
        assert not differences(before, module_state(net))
        assert not differences(state, global_state())
        assert _lock_is_free(swap.LOCK)
    assert all(map(torch.equal, _answer(net, backend), want))
