"""Values that no argument expects, by name, and ways to spoil a value that would be right."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F


class Wrapper(torch.Tensor):
    """A wrapper subclass without storage of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils import _pytree

        def unwrapped(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        return func(*_pytree.tree_map(unwrapped, args), **_pytree.tree_map(unwrapped, kwargs or {}))


class Plain(torch.Tensor):
    """A subclass with storage."""


class Comparing:
    """An object that compares as an array does."""

    def __eq__(self, other: object) -> Any:
        return np.zeros(2, dtype=bool)

    __hash__ = None  # type: ignore[assignment]


class Colour(enum.Enum):
    """An enumeration."""

    RED = "second"


def _freed(value: Tensor) -> Tensor:
    value = value.detach().clone()
    value.untyped_storage().resize_(0)
    return value


def _inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


def _fake(value: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(value.detach().clone())


def _requiring(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


#: Whatever stands in the place of an argument.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "empty string": lambda: "",
    "string": lambda: "nothing",
    "surrogate": lambda: "\ud800*",
    "bytes": lambda: b"second",
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "2**63": lambda: 2**63,
    "2**200": lambda: 2**200,
    "10**400": lambda: 10**400,
    "0.5": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "1e308": lambda: 1e308,
    "complex": lambda: 1j,
    "list": list,
    "list of None": lambda: [None],
    "list of numbers": lambda: [1, 2.5],
    "tuple": lambda: (),
    "nested tuple": lambda: ((), ((),)),
    "dict": dict,
    "dict of numbers": lambda: {"0.weight": 1},
    "dict of None": lambda: {None: None},
    "set": lambda: {1},
    "object": object,
    "comparing": Comparing,
    "enum": lambda: Colour.RED,
    "class": lambda: int,
    "module class": lambda: nn.MSELoss,
    "function": lambda: lambda *a, **k: None,
    "raising": lambda: lambda *a, **k: (_ for _ in ()).throw(TypeError("of the caller's own")),
    "partial": lambda: functools.partial(F.mse_loss, reduction="none"),
    "generator": lambda: (n for n in ("0.weight",)),
    "range": lambda: range(3),
    "array": lambda: np.zeros((2, 3, 4)),
    "array of objects": lambda: np.array([None, "x"], dtype=object),
    "numpy number": lambda: np.float64(0.5),
    "numpy int": lambda: np.int64(2),
    "dtype": lambda: torch.float16,
    "device": lambda: torch.device("meta"),
    "module": lambda: nn.Linear(4, 3),
    "module without parameters": nn.Identity,
    "lazy module": lambda: nn.LazyLinear(2),
    "script module": lambda: torch.jit.script(nn.Linear(4, 3)),
    "parameter": lambda: nn.Parameter(torch.zeros(3)),
    "scalar": lambda: torch.tensor(0.5),
    "scalar of ints": lambda: torch.tensor(2),
    "empty tensor": lambda: torch.zeros(0),
    "tensor": lambda: torch.zeros(2, 3, 4),
    "huge tensor": lambda: torch.zeros(1).expand(2**40),
    "optimizer": lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
    "Ellipsis": lambda: ...,
    "slice": lambda: slice(None),
}

#: What a tensor that would be right is turned into.
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "unsqueezed": lambda x: x.unsqueeze(0),
    "flattened": lambda x: x.reshape(-1),
    "no tasks": lambda x: x[:0],
    "one task": lambda x: x[:1],
    "twice": lambda x: torch.cat([x, x]) if x.dim() else x,
    "reversed dimensions": lambda x: x.permute(*reversed(range(x.dim()))),
    "without last": lambda x: x[..., 0] if x.dim() else x,
    "without examples": lambda x: x[:, :0] if x.dim() > 1 else x,
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float32": lambda x: x.float(),
    "int": lambda x: x.int(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex128),
    "conjugate": lambda x: torch.complex(x.double(), x.double()).conj(),
    "imaginary": lambda x: torch.complex(x.double(), x.double()).conj().imag,
    "nan": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x,
    "inf": lambda x: x * float("inf") if x.is_floating_point() else x,
    "enormous": lambda x: x * 1e200 if x.is_floating_point() else x + 2**62,
    "negative": lambda x: -x - 1 if x.dtype != torch.bool else ~x,
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([*x]) if x.dim() > 1 else x,
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged) if x.dim() > 1 else x,
    "meta": lambda x: x.to("meta"),
    "fake": _fake,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "freed": _freed,
    "wrapper": lambda x: Wrapper(x.detach()),
    "subclass": lambda x: x.detach().as_subclass(Plain),
    "inference": _inference,
    "requires grad": lambda x: _requiring(x) if x.is_floating_point() else x,
    "not a leaf": lambda x: _requiring(x) * 1 if x.is_floating_point() else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() else x,
    "overlapping": lambda x: torch.as_strided(x.contiguous(), x.shape, [1] * x.dim()),
    "array": lambda x: x.detach().numpy(),
    "list": lambda x: x.tolist(),
    "in a list": lambda x: [x],
    "buffer": lambda x: (
        torch.frombuffer(bytearray(x.numel() * 8), dtype=torch.float64).reshape(x.shape) if x.numel() else x
    ),
}

#: What a dict that would be right is turned into.
SPOILED_DICTS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "without one": lambda d: dict([*d.items()][1:]),
    "with another": lambda d: {**d, "another": next(iter(d.values()), None)},
    "with a number": lambda d: {**d, 7: next(iter(d.values()), None)},
    "of None": lambda d: dict.fromkeys(d),
    "of numbers": lambda d: dict.fromkeys(d, 0.1),
    "of lists": lambda d: {key: [value] for key, value in d.items()},
    "as pairs": lambda d: [*d.items()],
    "reversed": lambda d: dict(reversed([*d.items()])),
    "empty": lambda d: {},
    **{
        f"first {name}": lambda d, spoil=spoil: {
            key: spoil(value) if at == 0 and isinstance(value, Tensor) else value
            for at, (key, value) in enumerate(d.items())
        }
        for name, spoil in SPOILED.items()
    },
}
