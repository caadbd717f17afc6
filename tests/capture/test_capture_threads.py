"""First calls from several threads at once: torch.fx patches nn.Module for the whole process while
it traces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from fastmeta.capture.capture import captured


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 13), nn.ReLU(), nn.Sequential(nn.Linear(13, 7), nn.Tanh()), nn.Linear(7, 2)
    )


def test_captures_in_several_threads_all_succeed() -> None:
    def capture(_: int) -> str:
        program, reason = captured(_net(), (3,), torch.float32)
        return reason if program is None else " ".join(layer.kind for layer in program.layers)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(capture, range(200)))
    assert found == {"linear elementwise linear elementwise linear"}


def test_modules_called_during_a_capture_compute_as_ever() -> None:
    net, x = _net(), torch.randn(5, 3)
    want = net(x)

    def job(index: int) -> bool:
        if index % 2:
            return captured(_net(), (3,), torch.float32)[0] is not None
        return torch.equal(net(x), want)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(200)))
