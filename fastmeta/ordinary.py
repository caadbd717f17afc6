"""Tensors with memory of their own: kernels read nothing else.

A tensor may have none (freed storage, as FSDP leaves it; fake and meta tensors; zero-tensors), or
keep its numbers in other tensors that only its class knows of (DTensor and other wrapper
subclasses). A subclass that changes no more than what functions do (`__torch_function__`, made by
`as_subclass`) is an ordinary tensor underneath, and is read as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from fastmeta.inputs import NotATreeError, Tree, flatten, leaves_of, signature

try:
    from fastmeta import _C

    _read_sorts = _C.sorts
except ImportError:  # without it by attributes

    def _read_sorts(tensors: list[Any]) -> bytes | None:
        return None


_sort = attrgetter("shape", "dtype", "device", "layout")

#: The classes that need no look: of tensors, and of what may stand where one could.
KNOWN: frozenset[type] = frozenset({Tensor, nn.Parameter, type(None), float, int})
#: Of tensors alone.
PLAIN: frozenset[type] = frozenset({Tensor, nn.Parameter})


def all_known(*groups: Any) -> bool:
    """Whether these, and what is in these mappings and tuples, are all of a class that needs no
    look: cheap."""
    for group in groups:
        if group.__class__ in KNOWN:
            continue
        members = group.values() if group.__class__ is dict else _members(group)
        if not KNOWN.issuperset(map(type, members)):
            return False
    return True


def sorts(trees: list[Tree]) -> object:
    """What a plan depends on of these, hashable and equal where it is: of each its shape, dtype,
    device and layout."""
    read = _read_sorts(trees)
    if read is not None:
        return read
    return tuple([None if x is None else _sort(x) if x.__class__ in PLAIN else signature(x) for x in trees])


def all_plain(*groups: Any) -> bool:
    """Whether the tensors among these, and in these mappings, tuples and trees, are all plain
    ones."""
    members = [member for group in groups for member in _members(group)]
    return all(type(leaf) in PLAIN for member in members for leaf in _leaves(member))


def _members(group: Any) -> Iterable[Any]:
    if isinstance(group, tuple):
        return group
    return group.values() if isinstance(group, Mapping) else (group,)


def _leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree; none of what is no tree, which the checks will name."""
    try:
        return leaves_of(tree)
    except NotATreeError:
        return []


def plain(given: Any) -> Any:
    """`given`, tensors of subclasses without their class: a tensor, or a mapping of tensors, or a
    named tuple of trees.

    What is no ordinary tensor underneath stays as it is, for `check_ordinary` to refuse.
    """
    if isinstance(given, Tensor):
        if type(given) in PLAIN or _dispatches(given):
            return given
        with torch._C.DisableTorchFunctionSubclass():
            return given.as_subclass(Tensor)
    if isinstance(given, Mapping):
        return given if all_known(given) else {name: plain(value) for name, value in given.items()}
    if isinstance(given, tuple) and hasattr(given, "_make"):
        return given._make(map(plain_tree, given))
    return given


def plain_tree(tree: Tree) -> Tree:
    """A tree whose leaves are as `plain` has them."""
    try:
        leaves, form = flatten(tree)
    except NotATreeError:  # which the checks will name
        return tree
    return tree if PLAIN.issuperset(map(type, leaves)) else form.build(map(plain, leaves))


def check_ordinary(what: str, tensor: Tensor) -> None:
    """Check that a tensor has memory that kernels can read; reads no values.

    Args:
        what: its name in messages.
        tensor: of any class.

    Raises:
        TypeError: it is of a class that keeps its numbers elsewhere; sparse, nested or quantised;
            one of torch.func's wrappers.
        ValueError: its storage is freed or too small; it is on the meta device.
    """
    if type(tensor) not in PLAIN and _dispatches(tensor):
        name = type(tensor).__name__
        ways = {
            "DTensor": "`.full_tensor()` or `.to_local()`",
            "FakeTensor": "a tensor made outside of FakeTensorMode",
        }
        way = ways.get(name, "the tensor inside")
        raise TypeError(
            f"{what} must be an ordinary tensor, got {name}, which has no memory of its own: pass {way}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        if is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
            raise TypeError(
                f"{what} must be an ordinary tensor: torch.vmap and torch.func do not reach into fastmeta"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(
                f"{what} must be a dense tensor, got {'nested, ' * tensor.is_nested}{tensor.layout}"
            )
        if tensor.is_quantized:
            raise TypeError(f"{what} must be a dense tensor, got {tensor.dtype}: pass `.dequantize()`")
        if tensor.is_meta:
            raise ValueError(
                f"{what} must be on cpu or where else there is memory, got meta, where tensors have a shape "
                "only"
            )
        if tensor._is_zerotensor():
            raise TypeError(
                f"{what} must be an ordinary tensor, got a zero-tensor without memory: use torch.zeros"
            )
        if not has_memory(tensor):
            there = tensor.untyped_storage().nbytes()
            raise ValueError(
                f"{what} must have memory, got {tuple(tensor.shape)} {tensor.dtype} on a storage of {there} "
                "bytes, freed or too small: if it is sharded (FSDP), gather it before (`summon_full_params`, "
                "`unshard`)"
            )


def has_memory(tensor: Tensor) -> bool:
    """Whether a dense tensor's storage holds all of its numbers."""
    numel = tensor.numel()
    if not numel:
        return True
    if tensor.is_contiguous():
        last = numel
    else:
        last = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    try:
        there = tensor.untyped_storage().nbytes()
        return bool((tensor.storage_offset() + last) * tensor.itemsize <= there and tensor.data_ptr())
    except (RuntimeError, NotImplementedError):  # it has no storage at all
        return False


def savable(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """`tensors`, as PyTorch lets them be saved for a backward pass: those of inference mode as
    copies.

    Raises:
        ValueError: one of inference mode requires grad; PyTorch computes no gradient of it.
    """
    tensors = list(tensors)
    for at, tensor in enumerate(tensors):
        if tensor is not None and tensor.is_inference():
            if tensor.requires_grad:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} requires grad, but was made in "
                    "torch.inference_mode, where there are no gradients: make the network (`net`) and its "
                    "input outside of it"
                )
            tensors[at] = tensor.clone()
    return tensors


def lack_memory(*groups: Mapping[str, Any] | Iterable[Tree] | None) -> bool:
    """Whether some plain tensor of these has lost its memory since it was checked."""
    for group in groups:
        for tree in group.values() if isinstance(group, Mapping) else group or ():
            if tree is None:
                continue
            # most are tensors, which need no walk
            if tree.__class__ in PLAIN:
                lost = not has_memory(cast(Tensor, tree))
            else:
                lost = not all(map(has_memory, leaves_of(tree)))
            if lost:
                return True
    return False


def _dispatches(tensor: Tensor) -> bool:
    """Whether a tensor's class, and not its memory, says what its numbers are."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
