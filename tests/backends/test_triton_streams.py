"""In which order a call of the Triton backend waits, launches, captures and replays: on a stand-in
for `torch.cuda`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastmeta.backends.triton import run as runs

DEVICE = torch.device("cuda", 1)


class Cuda:
    """As much of `torch.cuda` as a call takes; everything that happens is written down with the
    stream it is on."""

    def __init__(self, capture_fails: bool = False) -> None:
        self.now, self.said, self.capturing, self.capture_fails = "user", [], False, capture_fails

    def say(self, what: str) -> None:
        self.said.append(f"{what} on {self.now}")

    def took(self) -> list[str]:
        """What happened since this was asked last."""
        said, self.said = self.said, []
        return said

    @contextmanager
    def graph(self, graph: Any, *, stream: str, capture_error_mode: str) -> Iterator[None]:
        # as PyTorch's: what fails leaves the stream of the capture behind
        assert capture_error_mode == "thread_local"
        self.now, self.capturing = stream, True
        yield
        self.capturing = False
        if self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now = "user"

    def replay(self) -> None:
        assert not self.capturing  # CUDA launches no graph into another
        self.say("replay")

    def set_stream(self, stream: Any) -> None:
        self.now = str(stream)

    def current_stream(self, device: Any = None) -> Any:
        return Stream(self, self.now)


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Any) -> None:
        self.cuda.said.append(f"wait on {self.name}")

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self.name)


def _job(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> runs.Job:
    graph = SimpleNamespace(replay=cuda.replay)
    for name, value in {
        "device": lambda device: nullcontext(),
        "current_stream": cuda.current_stream,
        "set_stream": cuda.set_stream,
        "is_current_stream_capturing": lambda: cuda.capturing,
        "Stream": lambda device: f"capture of {device}",
        "CUDAGraph": lambda: graph,
        "graph": cuda.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    tensor = SimpleNamespace(record_stream=lambda stream: cuda.said.append(f"lent to {stream}"))
    job = runs.Job.__new__(runs.Job)
    job.device, job.lock, job.graph, job.calls, job.why_no_graph = DEVICE, threading.Lock(), None, 0, ""
    job.done = SimpleNamespace(record=lambda stream: cuda.said.append(f"record on {stream}"))
    job.streams = {Stream(cuda, "user")}
    launches = [SimpleNamespace(run=lambda: cuda.say("launch"))]
    job.step = SimpleNamespace(emit=SimpleNamespace(launches=launches), tensors=lambda: [tensor])
    monkeypatch.setattr(runs.Job, "_load", lambda self, problem: cuda.say("load"))
    monkeypatch.setattr(runs.Job, "_result", lambda self, problem: cuda.say("result"))
    return job


def _call(job: runs.Job, cuda: Cuda) -> list[str]:
    job.run(None)
    return cuda.took()


def test_the_first_call_launches_and_the_second_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    job = _job(monkeypatch, cuda)
    before, after = ["wait on user", "load on user"], ["result on user", "record on user"]
    assert _call(job, cuda) == [*before, "launch on user", *after]
    assert _call(job, cuda) == [*before, "launch on capture of cuda:1", "replay on user", *after]
    assert _call(job, cuda) == [*before, "replay on user", *after]
    assert runs._how_launched(job) == runs._how_launched(None) == "one CUDA graph from the second call on"


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_launches_go_into_the_user_s_own_graph(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a graph of the launches already; and nothing is waited for that lies
    outside."""
    cuda = Cuda()
    job = _job(monkeypatch, cuda)
    for _ in range(calls):
        _call(job, cuda)
    cuda.capturing = True
    assert _call(job, cuda) == ["load on user", "launch on user", "result on user"]


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(capture_fails=True)
    job = _job(monkeypatch, cuda)
    first = _call(job, cuda)
    assert _call(job, cuda) == [*first[:2], "launch on capture of cuda:1", *first[2:]]
    assert "not permitted" in job.why_no_graph
    assert runs._how_launched(job) == f"launched one by one: {job.why_no_graph}"  # what explain() says
    assert _call(job, cuda) == first  # not tried again


def test_memory_is_lent_to_every_other_stream_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    job = _job(monkeypatch, cuda)
    lent = []
    for stream in ("user", "side", "side", "user", "other"):
        cuda.now = stream
        lent += [said for said in _call(job, cuda) if said.startswith("lent")]
        cuda.now = stream
    assert lent == ["lent to side", "lent to other"]
