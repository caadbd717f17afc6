"""The elementary functions of the cpu engine: what they are in PyTorch's float64, and what the
engine makes of them.

`python tests/support/elementary_values.py INPUT OUTPUT` computes in a process of its own, which
FASTMETA_CPU_ISA gives an instruction set: two files of torch.save, of calls and of their results.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import _C

# name, order of the derivative, constants, arguments
Call = tuple[str, int, tuple[float, ...], list[Tensor]]

SQRT_2 = math.sqrt(2)
GELU_TANH = 2 * math.sqrt(2 / math.pi)

# name: constants, and the function of float64, right to about its last digits, tails included
FUNCTIONS: dict[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "exp": ((), torch.exp),
    "expm1": ((), torch.expm1),
    "log": ((), torch.log),
    "log1p": ((), torch.log1p),
    "tanh": ((), torch.tanh),
    "sigmoid": ((), lambda x: 1 / (1 + torch.exp(-x))),
    "sin": ((), torch.sin),
    "cos": ((), torch.cos),
    "erf": ((), torch.erf),
    "sqrt": ((), torch.sqrt),
    "pow": ((), torch.pow),
    "gelu": ((0, 0), lambda x: x * (torch.erfc(-x / SQRT_2) / 2)),
    "gelu_tanh": ((0, 0), lambda x: x / (1 + torch.exp(-GELU_TANH * (x + 0.044715 * x**3)))),
    "silu": ((0, 0), lambda x: x / (1 + torch.exp(-x))),
    "mish": ((0, 0), lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "softplus": ((1, 20), F.softplus),
    "elu": ((1, 0), F.elu),
}
MOST_ULP = 2.0
EXPONENT = 0x7FF << 52


def compute(call: Call) -> Tensor:
    """What the engine makes of it."""
    name, order, constants, inputs = call
    output = torch.full_like(inputs[0], float("nan"))
    _C.elementary(name, order, output.dtype == torch.float64, list(constants), inputs, output)
    return output


def ulp(found: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
    """How many units in the last place of its type `found` is off high + low, in float64; infinite
    where infinity, NaN or the sign of a zero is missing, or is too much."""
    bits, least = (52, -1074) if found.dtype == torch.float64 else (23, -149)
    unit = (high.view(torch.int64) & EXPONENT).view(torch.float64).mul_(2.0**-bits).clamp_(min=2.0**least)
    error = found.double() - high
    error = (error if low is None else error.sub_(low)).abs_().div_(unit)
    target = high.to(found.dtype)
    special = ~target.isfinite() | (target == 0)
    if special.any():
        near = high.isfinite() & (error <= MOST_ULP)  # zero or infinity by rounding
        same = (near | (found == target)) & (found.signbit() == target.signbit())
        same |= found.isnan() & target.isnan()
        error = torch.where(special, torch.where(same, 0.0, math.inf), error)
    return error.masked_fill_(error.isnan(), math.inf)


if __name__ == "__main__":
    torch.save([compute(call) for call in torch.load(sys.argv[1])], sys.argv[2])
