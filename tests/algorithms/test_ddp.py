"""`MAML` inside DistributedDataParallel: gradients are the average of the processes' own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plain_autograd import episodes, network
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fastmeta as fm

WORLD = 2


def _maml(backend: str) -> fm.MAML:
    return fm.MAML(network(), loss="mse", inner_lr=0.1, inner_steps=2, learn_lr="tensor", backend=backend)


def _process(rank: int, folder: str, backend: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    maml = _maml(backend)
    with torch.no_grad():  # rank 0's parameters win
        maml.net[0].weight.mul_(1 + rank)
    parallel = DistributedDataParallel(maml)
    for _ in range(2):  # the second pass goes through the buckets as they were rebuilt
        maml.zero_grad()
        parallel(*episodes(seed=rank)).loss.backward()
    torch.save([value.grad for value in maml.parameters()], f"{folder}/{rank}.pt")
    Path(folder, f"{rank}.done").touch()
    while not all(Path(folder, f"{other}.done").exists() for other in range(WORLD)):
        time.sleep(0.01)
    # Taking the process group down can deadlock in PyTorch: its thread may need the interpreter's
    # lock to drop a Python object while this one holds it and waits for that thread.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradients_are_the_average_of_two_processes(tmp_path: Path, backend: str) -> None:
    multiprocessing.start_processes(_process, (str(tmp_path), backend), nprocs=WORLD, start_method="spawn")
    alone = []
    for rank in range(WORLD):
        maml = _maml(backend)
        maml(*episodes(seed=rank)).loss.backward()
        alone.append([value.grad for value in maml.parameters()])
    for rank in range(WORLD):
        for got, *parts in zip(torch.load(tmp_path / f"{rank}.pt"), *alone, strict=True):
            torch.testing.assert_close(got, sum(parts) / WORLD, rtol=1e-12, atol=1e-15)
