"""Loaded kernels of one plan and how they are launched: on a GPU, or by what stands in for one in
tests.

On a GPU a launch goes to torch's current stream and waits for nothing, so that it can be captured
in a CUDA graph; load the kernels (by a first call) before the capture begins.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from functools import lru_cache
from typing import Any, Protocol

import torch

from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import plan as plans

#: What is stood in for: an H100.
EMULATED = plans.Chip(227 << 10, cluster=4)


def emulated_threads() -> int:
    """Threads of a block where a GPU is stood in for on the CPU, by FASTMETA_CUDA_EMULATE; 0: it is
    not."""
    asked = os.environ.get("FASTMETA_CUDA_EMULATE") or "0"
    if not asked.isdecimal():
        raise ValueError(
            f"FASTMETA_CUDA_EMULATE must be the threads of an emulated block, a number, got {asked!r}"
        )
    return int(asked)


class Kernels(Protocol):
    """The kernels of one plan, loaded on one device."""

    def blocks(self, tasks: int) -> int:
        """How many blocks, or clusters of blocks, share out the tasks."""

    def launch(
        self, kernel: str, clusters: int, ranks: int, threads: int, shared: int, words: list[int]
    ) -> None:
        """Run `kernel` on an argument of these words of 8 bytes, by clusters of `ranks` blocks."""


def chip(device: torch.device) -> plans.Chip:
    """What a plan depends on of a device."""
    if device.type != "cuda":
        return EMULATED
    properties: Any = torch.cuda.get_device_properties(device)
    return plans.Chip(
        int(properties.shared_memory_per_block_optin), cluster=4 if properties.major >= 9 else 1
    )


def kernels_for(plan: plans.Plan, device: torch.device) -> Kernels:
    """Compile, or take from the cache, and load.

    Raises:
        RuntimeError: the compiler failed.
    """
    if device.type != "cuda":
        return _Emulated(plan)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _on_gpu(
        plans.source(plan), plan.ranks, plan.threads, plan.shared_bytes, bool(plan.workspace), index
    )


class _Emulated:
    """A block, or a cluster, is `emulated_threads()` threads of this process; one runs after the
    other."""

    def __init__(self, plan: plans.Plan) -> None:
        self._library = compiler.emulated(plans.source(plan))
        self._itemsize = plan.itemsize

    def blocks(self, tasks: int) -> int:
        # fewer than tasks, so that a block takes several
        return -(-tasks // 2)

    def launch(
        self, kernel: str, clusters: int, ranks: int, threads: int, shared: int, words: list[int]
    ) -> None:
        memory = array("q", words)
        self.run(kernel, clusters, ranks, threads, shared, memory.buffer_info()[0])

    def run(self, kernel: str, clusters: int, ranks: int, threads: int, shared: int, address: int) -> None:
        """`launch`, of an argument in memory."""
        compiler.emulator().fastmeta_emulate(
            ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p),
            ctypes.cast(self._library.fastmeta_enter, ctypes.c_void_p),
            address,
            clusters,
            ranks,
            min(max(emulated_threads(), 1), threads),
            shared,
            self._itemsize,
        )


@lru_cache(maxsize=256)
def _on_gpu(source: str, ranks: int, threads: int, shared: int, workspace: bool, device: int) -> _OnGpu:
    return _OnGpu(source, ranks, threads, shared, workspace, device)


class _OnGpu:
    """Kernels in a module of the device's primary context, which is torch's."""

    def __init__(
        self, source: str, ranks: int, threads: int, shared: int, workspace: bool, device: int
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._device = device
        # torch's own context: a thread may come here before it has ever asked for anything on the
        # device
        self._context = self._checked(
            driver.cuDevicePrimaryCtxRetain(self._checked(driver.cuDeviceGet(device)))
        )
        with torch.cuda.device(device):
            self._checked(driver.cuCtxSetCurrent(self._context))
            self._module = self._checked(
                driver.cuModuleLoadData(compiler.cubin(source, architecture(device)))
            )
            self._functions = {
                name: self._checked(driver.cuModuleGetFunction(self._module, name.encode()))
                for name in ("fastmeta_meta_step", "fastmeta_sum")
            }
            function = self._functions["fastmeta_meta_step"]
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._checked(driver.cuFuncSetAttribute(function, limit, shared))
            resident = self._checked(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared)
            )
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        # a block that needs no global memory costs nothing while it waits
        self._most = max(int(resident) * processors // ranks, 1) if workspace else 1 << 30

    def blocks(self, tasks: int) -> int:
        return min(tasks, self._most)

    def launch(
        self, kernel: str, clusters: int, ranks: int, threads: int, shared: int, words: list[int]
    ) -> None:
        memory = array("q", words)
        blocks = clusters * ranks  # the kernel itself says how many are a cluster
        argument = (ctypes.c_void_p * 1)(memory.buffer_info()[0])
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            self._checked(self._driver.cuCtxSetCurrent(self._context))
            launched = self._driver.cuLaunchKernel(
                *(
                    self._functions[kernel],
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    shared,
                    stream,
                    ctypes.addressof(argument),
                    0,
                )
            )
            self._checked(launched)

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """What a driver call returned behind its verdict."""
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(result[0])
            said = text.decode() if isinstance(text, bytes) else result[0]
            raise RuntimeError(f"CUDA: {said}")
        return result[1] if len(result) > 1 else None


def architecture(device: int) -> str:
    """What to compile for; 9.0 and 10.0 have instructions of their own."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
