"""Forked and spawned processes, data-loading workers, threads and signals around calls of
fastmeta."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensors import equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastmeta as fm
from fastmeta.network.swap import LOCK

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
BACKENDS = ("cpu", "torch", "reference")
#: Seconds that a process may take before it counts as hung.
LIMIT = 60


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many threads as make the pool start one of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0, width: int = 13) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def batch(seed: int, tasks: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (tasks, 7, 3), (tasks, 7, 2), (tasks, 5, 3), (tasks, 5, 2)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


def step(net: nn.Module, seed: int, backend: str = "cpu") -> list[Tensor]:
    """Loss, task losses and every gradient of a meta-step; nothing is written into `net`."""
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
    out = maml(*batch(seed))
    with LOCK:  # another thread may be running the same network
        parameters = list(net.parameters())
    gradients = torch.autograd.grad(out.loss, parameters)
    return [out.loss.detach(), out.task_losses.detach(), *gradients]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(one, other, strict=True))


def in_fork(work: Callable[[], bool]) -> str:
    """How a forked process ended that does `work`: "right", "wrong", or what became of it."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT)  # a hang ends the process
        code = 3
        try:
            code = 0 if work() else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {0: "right", 1: "wrong"}.get(os.waitstatus_to_exitcode(status), f"status {status}")


@FORKS
@pytest.mark.usefixtures("two_threads")
def test_forked_after_use_matches_its_parent():
    net = network()
    want = step(net, 0)
    assert in_fork(lambda: equal(step(net, 0), want)) == "right"
    # A network that only the child captures, and a child of the child.
    assert in_fork(lambda: equal(step(network(), 0), want)) == "right"
    assert in_fork(lambda: in_fork(lambda: equal(step(net, 0), want)) == "right") == "right"
    assert equal(step(net, 0), want)


@FORKS
@pytest.mark.usefixtures("two_threads")
def test_forked_while_another_thread_computes_and_captures():
    net = network()
    want, done, failed = step(net, 0), threading.Event(), []

    def compute() -> None:
        while not done.is_set():
            # A new network each time, so that captures are under way too when the process forks.
            if not equal(step(copy.deepcopy(net), 0), want):
                failed.append("parent")

    workers = [threading.Thread(target=compute) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        ends = [in_fork(lambda: equal(step(copy.deepcopy(net), 0), want)) for _ in range(12)]
    finally:
        done.set()
        for worker in workers:
            worker.join()
    assert ends == ["right"] * 12
    assert not failed


def _spawned(seed: int) -> list[list[float]]:
    torch.set_num_threads(2)
    return [tensor.tolist() for tensor in step(network(), seed)]


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=FORKS)])
def test_spawned_matches_its_parent(method):
    want = step(network(), 3)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # PyTorch and fastmeta come to the workers by a fork.
        context.set_forkserver_preload(["fastmeta", __name__])
    with context.Pool(1) as pool:
        got = pool.apply_async(_spawned, (3,)).get(LIMIT)
    assert equal([torch.tensor(values, dtype=torch.float64) for values in got], want)


@FORKS
def test_interpreter_ends_quietly_with_pools_alive():
    """The pool of threads asleep or in wait for work, and a pool of processes that nobody
    closed."""
    script = """
import multiprocessing, torch, fastmeta as fm
torch.set_num_threads(2)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 13), torch.nn.Tanh(), torch.nn.Linear(13, 2))
maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend="cpu")
x, y = torch.randn(4, 7, 3), torch.randn(4, 7, 2)
def call(number):
    out = maml(x, y, x, y)
    out.loss.backward()
    return out.loss.item()
want = call(0)
pool = multiprocessing.get_context("fork").Pool(2)
assert pool.map(call, range(4)) == [want] * 4
maml(x, y, x, y).loss.backward()
print("end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


class Adapted(Dataset):
    """Items that a worker computes with fastmeta."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in step(self.net, index)])


@FORKS
@pytest.mark.usefixtures("two_threads")
def test_data_loading_workers_match_no_workers():
    data = Adapted(network())
    want = list(DataLoader(data, batch_size=None))
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT)
    for _ in range(2):
        got = list(loader)
        assert len(got) == len(want) == 6
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("two_threads")
def test_threads_on_one_network_match_one_after_another(backend):
    net = network()
    names = [
        (id(module), name, id(value))
        for module in net.modules()
        for name, value in module._parameters.items()
    ]
    want = [step(net, seed, backend) for seed in range(4)]
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait(LIMIT)
        return all(close(step(net, seed, backend), want[seed]) for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    # The network is as it was, its parameters the same objects.
    assert names == [
        (id(module), name, id(value))
        for module in net.modules()
        for name, value in module._parameters.items()
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("two_threads")
def test_one_algorithm_in_two_threads_matches_one_after_another(backend):
    net = network()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
    parameters = list(net.parameters())

    def gradients(seed: int) -> list[Tensor]:
        out = maml(*batch(seed))
        adapted = maml.adapt(*batch(seed)[:2])
        predicted = maml.predict(adapted, batch(seed)[2])
        return [out.loss.detach(), predicted.detach(), *torch.autograd.grad(out.loss, parameters)]

    want = [gradients(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert all(
            threads.map(lambda seed: all(close(gradients(seed), want[seed]) for _ in range(8)), range(2))
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("two_threads")
def test_threads_on_networks_of_their_own_match_one_after_another(backend):
    nets = [network(seed, width=13 + seed) for seed in range(3)]
    want = [step(net, 0, backend) for net in nets]

    def work(number: int) -> bool:
        return all(close(step(nets[number], 0, backend), want[number]) for _ in range(8))

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(work, range(3)))


def test_threads_on_the_cpu_backend_give_the_same_bits(two_threads):
    net = network()
    want = [step(net, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert all(
            threads.map(lambda seed: all(equal(step(net, seed), want[seed]) for _ in range(10)), range(3))
        )


def _long(net: nn.Module) -> Callable[[], list[Tensor]]:
    """A call of the cpu backend that takes a good part of a second, most of it in C++."""
    maml = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=200, memory="recompute", backend="cpu")
    given = batch(0, tasks=60)

    def call() -> list[Tensor]:
        out = maml(*given)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, list(net.parameters()))]

    return call


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.usefixtures("two_threads")
def test_signals_during_a_call_are_handled_and_change_nothing():
    call = _long(network())
    want, seen = call(), []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        got = [call() for _ in range(3)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert all(equal(one, want) for one in got)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.usefixtures("two_threads")
def test_ctrl_c_during_a_call_leaves_the_next_call_right():
    call = _long(network())
    want = call()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    stopped = 0
    try:
        for after in (0.0005, 0.002, 0.005, 0.01, 0.02, 0.04):
            try:
                signal.setitimer(signal.ITIMER_REAL, after)
                call()
                signal.pause()
            except KeyboardInterrupt:
                stopped += 1
            assert equal(call(), want)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped == 6
