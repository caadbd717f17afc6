"""Functions of tensors as programs of the machine, without a network around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmeta import _C
from fastmeta.backends._native_rules import described_rule
from fastmeta.backends.machine.encode import Encoder
from fastmeta.trace import operators  # noqa: F401
from fastmeta.trace.interpret import interpret
from fastmeta.trace.ir import Buffer, Space
from fastmeta.trace.lower import OPERATORS, Lowering
from fastmeta.trace.program import Result, StepProgram, finished
from fastmeta.trace.record import Recorder, Ref, numel
from fastmeta.trace.step import OUTPUT_START, Layout, Slot


class Traced:
    """A function, recorded with these tensors, and lowered.

    Args:
        function: of tensors; gives one tensor.
        tensors: of one task.
    """

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        self.dtype = next(t.dtype for t in tensors if t.is_floating_point())
        self.recorder = Recorder(OPERATORS)
        self.layout = Layout()
        clones = []
        for at, tensor in enumerate(tensors):
            space = Space.BATCH if tensor.is_floating_point() else Space.INTS
            slot = self.layout.add(f"{at}", tuple(tensor.shape), space)
            clones.append(tensor.clone(memory_format=torch.contiguous_format))
            self.recorder.register(clones[-1], slot.name)
        with self.recorder:
            self.expected = function(*clones)
        self.ref: Ref = self.recorder.ref(self.expected)

    def program(self, rows: bool = True) -> StepProgram:
        """The step program, its result in `OUTPUT`."""
        self.inputs = {s.name: (Buffer(s.size, s.space, s.offset), 0) for s in self.layout.slots}
        low = Lowering(self.dtype, self.inputs)
        (operand,) = low.run([self.ref])
        result = Result(operand, self.ref.shape, Space.OUTPUT, OUTPUT_START)
        return finished(low.build, [result], self.layout.sizes, 1, rows)

    def interpreted(self, *tensors: Tensor) -> Tensor:
        """By plain PyTorch."""
        program = self.program()
        memory = {
            self.inputs[s.name][0]: t.reshape(-1) for s, t in zip(self.layout.slots, tensors, strict=True)
        }
        target = next(
            v.buffer for i in program.instructions for v in _written(i) if v.buffer.space == Space.OUTPUT
        )
        held = interpret(program.instructions, memory, self.dtype)
        return held[target][: numel(self.ref.shape)].reshape(self.ref.shape)

    def by_machine(self, *tensors: Tensor, lanes: bool) -> Tensor:
        """[T, ...] each -> [T, ...], by the C++ machine."""
        machine = _C.Machine(self.description(lanes))
        tasks = tensors[0].shape[0]
        output = torch.full((tasks, numel(self.ref.shape)), torch.nan, dtype=self.dtype)
        given = [t if t.is_floating_point() else t.to(torch.int64) for t in tensors]
        none: list[Any] = []
        outcome = machine.run(
            tasks, 1, none, none, none, none, none, none, none, none, none, none, given, none, none, none,
            [None, None, None, None, output, None, None], none, True,
        )  # fmt: skip
        if outcome:
            raise IndexError("an index is out of range")
        return output.reshape(tasks, *self.ref.shape)

    def description(self, lanes: bool) -> dict[str, Any]:
        """What `_C.Machine` is made of."""
        program = self.program(rows=not lanes)
        sizes = dict(program.sizes)
        return {
            "is_double": self.dtype == torch.float64,
            "lanes": lanes,
            "steps": 0,
            "second_order": False,
            "store": False,
            "schedule": [],
            "support_step_weights": [],
            "gradient": False,
            "wants_rates": False,
            "per_step": False,
            "rule": described_rule(None),
            "query_loss": False,
            "output_grad": False,
            "theta": sizes.get(Space.THETA, 0),
            "fixed": sizes.get(Space.FIXED, 0),
            "output": numel(self.ref.shape),
            "adapted": [],
            "tables": [],
            "others": [],
            "state": 0,
            "rule_fixed": 0,
            "traced_rule": None,
            "support": None,
            "query": {
                **Encoder(program).described(),
                "entries": [_entry(s) for s in self.layout.slots],
                "numbered": [],
            },
        }


def _entry(slot: Slot) -> tuple[int, int, bool, int]:
    return slot.offset, slot.size, slot.space == Space.INTS, -1


def _written(instruction: Any) -> list[Any]:
    from fastmeta.trace.ir import written

    return written(instruction)
