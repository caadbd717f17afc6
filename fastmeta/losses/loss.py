"""The loss of one task: what it is, what targets it takes, and its value in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from math import inf
from typing import cast

from torch import Tensor, finfo, int64, nn
from torch import dtype as Dtype

from fastmeta.inputs import Tree
from fastmeta.losses import cross_entropy, elementwise
from fastmeta.models.check import is_finite
from fastmeta.ordinary import check_ordinary, plain

#: Losses that compare output and target element by element.
ELEMENTWISE = ("mse", "l1", "smooth_l1", "huber", "bce_with_logits")
#: Every loss that has a name; a "custom" one has a function instead.
NAMES = (*ELEMENTWISE, "cross_entropy")


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """A loss and all of its options; `fastmeta.losses.resolve` makes one from what the user gave.

    Args:
        kind: one of `NAMES`, or "custom".
        reduction: "mean" or "sum", over the examples of a task and the elements of an example.
        beta: threshold of smooth_l1 (its `beta`) and huber (its `delta`), greater than zero.
        label_smoothing: of cross_entropy, from 0 to 1.
        ignore_index: of cross_entropy: the class index of positions that do not count.
        weight: cross_entropy: class weights [C]. bce_with_logits: broadcasts to one example's
            output [*out], so it cannot tell examples apart (example weights do).
        pos_weight: of bce_with_logits: weight of the positive class, broadcasts to [*out].
        function: of a custom loss: f(output [N, *out], target [N, ...]) -> scalar. Both may be
            trees of tensors as well: what the network returns, and what the user gives.
        weight_norm: the denominator of the mean over examples with weights w. "count": the mean is
            sum(w * l) / N. "sum": it is sum(w * l) / sum(w), and zero where all weights are zero.
            Where torch's own denominator is not N (cross_entropy of class indices counts the class
            weights of the positions that are not ignored), it takes the place of N, and w
            multiplies its terms.

    A `weight` or `pos_weight` that requires grad gets its gradient on the backends that run the
    module itself, as any tensor does that a custom loss reads.

    Raises:
        ValueError: an option is out of range, or this kind of loss does not have it.
        TypeError: an option that must be a number is something else.
    """

    kind: str
    reduction: str = "mean"
    beta: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    function: Callable[[Tree, Tree], Tensor] | None = None
    weight_norm: str = "count"
    #: Everything but the values of the tensors: two losses with the same key run the same code.
    key: tuple[object, ...] = field(init=False, repr=False)
    plain: bool = field(init=False, repr=False)  # it has no weights

    def __post_init__(self) -> None:
        _check_options(self)
        for name in ("beta", "label_smoothing"):
            object.__setattr__(self, name, float(getattr(self, name)))  # PyTorch takes no int beyond 64 bits
        for name in ("weight", "pos_weight"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        self.check_tensors()
        shapes = tuple(None if t is None else tuple(t.shape) for t in (self.weight, self.pos_weight))
        options = (
            self.kind,
            self.reduction,
            self.beta,
            self.label_smoothing,
            self.ignore_index,
            self.weight_norm,
        )
        object.__setattr__(self, "key", (*options, *shapes, self.function))
        object.__setattr__(self, "plain", shapes == (None, None))

    def check_tensors(self) -> None:
        """Check that `weight` and `pos_weight` have memory.

        Raises:
            TypeError, ValueError: names the one that has not.
        """
        for name, tensor in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if tensor is not None:
                check_ordinary(f"{self.kind}: `{name}`", tensor)

    def __call__(self, output: Tree, target: Tree, weights: Tensor | None = None) -> Tensor:
        """The loss of one task; works under `torch.func.vmap`.

        Args:
            output: [N, *out], floating point; [N, C, d...] for cross_entropy. A custom loss takes
                any tree.
            target: as `check_target` says, with leading dimension N. A custom loss takes any tree.
            weights: [N], of output's dtype: one weight an example. None: all ones.

        Returns:
            A scalar; as in PyTorch, NaN where a mean has nothing to count. With `weight_norm="sum"`
            and weights that are all zero it is zero, and so are its derivatives.

        Derivatives: twice differentiable in output, target (where it is floating point) and
        weights.

        Raises:
            ValueError, TypeError: the target does not fit; weights with a custom loss; a tree with
                any other.
        """
        self.check_one("the network's output", output)
        self.check_one("target", target)
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            lead, out_shape = tuple(output.shape[:1]), tuple(output.shape[1:])
            self.check_target("target", target, lead, out_shape, output.dtype)
        if self.function is not None:
            return self._custom(output, target, weights)
        values, shares = self._values(output, target)
        if weights is None:
            return self._reduce(values, shares)
        if weights.shape != output.shape[:1]:
            raise ValueError(
                f"{self.kind}: `weights` must be {tuple(output.shape[:1])}, got {tuple(weights.shape)}"
            )
        weights = weights.reshape(-1, *[1] * (values.dim() - 1))  # [N, 1...]
        if self.weight_norm != "sum" or self.reduction == "sum":
            return self._reduce(weights * values, shares)
        total = (weights.expand_as(values) if shares is None else weights * shares).sum()
        # all weights are zero: nothing counts, and all derivatives are zero
        nothing = (weights.abs() < finfo(weights.dtype).tiny).all()
        return (weights * values).sum() / total.masked_fill(nothing, inf)

    @property
    def learned(self) -> str:
        """The weight that requires grad, or ""."""
        weights = {"weight": self.weight, "pos_weight": self.pos_weight}
        return next(
            (name for name, value in weights.items() if value is not None and value.requires_grad), ""
        )

    def needs_class_indices(self, target: Tensor) -> bool:
        """Whether `target` is read as class indices, whose range `check_values` checks."""
        return self.kind == "cross_entropy" and not target.is_floating_point()

    def check_one(self, what: str, tree: Tree) -> None:
        """Check that an output or a target is one tensor, where this loss takes nothing else.

        Args:
            what: its name in messages.
            tree: the output or the target.

        Raises:
            TypeError: it is not.
        """
        if self.kind != "custom" and not isinstance(tree, Tensor):
            raise TypeError(
                f"{what} must be one tensor for {self.kind}, got {type(tree).__name__}; a function "
                "loss(output, target) takes what the network returns as it is"
            )

    def check_target(
        self, what: str, target: Tensor, lead: tuple[int, ...], out_shape: tuple[int, ...], dtype: Dtype
    ) -> None:
        """Check shape and dtype of a target; reads no values.

        Args:
            what: its name in messages, such as "MAML: `support_y`".
            target: element-wise losses: [*lead, *out_shape] in `dtype`. cross_entropy: class
                indices [*lead, *out_shape[1:]] in int64 or probabilities [*lead, *out_shape] in
                `dtype`. custom: [*lead, ...].
            lead: leading dimensions, such as (T, N).
            out_shape: shape of the network's output for one example.
            dtype: of the network's output.

        Raises:
            ValueError: its shape, or that of `weight` or `pos_weight`, does not fit the output.
            TypeError: its dtype is wrong.
        """
        if self.kind == "custom":
            if target.shape[: len(lead)] != lead:
                raise ValueError(f"{what} must begin with {lead}, got {tuple(target.shape)}")
            return
        if self.kind == "cross_entropy":
            self._check_classes(what, target, lead, out_shape, dtype)
            return
        if target.shape != lead + out_shape:
            raise ValueError(
                f"{what} must be {lead + out_shape}, the shape of the network's output ({self.kind} "
                f"broadcasts no target), got {tuple(target.shape)}"
            )
        if target.dtype != dtype:
            raise TypeError(
                f"{what} must be {dtype}, as the network's output ({self.kind}), got {target.dtype}"
            )
        for name, tensor in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if tensor is not None and not _broadcasts(tuple(tensor.shape), out_shape):
                raise ValueError(
                    f"{self.kind}: `{name}` must broadcast to {out_shape}, the output of one example, "
                    f"got {tuple(tensor.shape)}"
                )

    def check_values(self, what: str, target: Tensor, classes: int) -> None:
        """Check that class indices are in range; targets of any other sort pass unread.

        Args:
            what: its name in messages, such as "MAML: `support_y`".
            target: any shape.
            classes: C.

        Raises:
            ValueError: an index is neither in [0, C) nor `ignore_index`; names the first one and
                its place.
        """
        if not self.needs_class_indices(target):
            return
        wrong = ((target < 0) | (target >= classes)) & (target != self.ignore_index)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{what} must hold class indices in [0, {classes}) or ignore_index={self.ignore_index}, "
                f"got {target[tuple(place)].item()} at {place}"
            )

    def _check_classes(
        self, what: str, target: Tensor, lead: tuple[int, ...], out_shape: tuple[int, ...], dtype: Dtype
    ) -> None:
        if not out_shape:
            raise ValueError(
                "cross_entropy: the network's output must be [C, ...] for one example, got a scalar"
            )
        if self.weight is not None and self.weight.shape != out_shape[:1]:
            raise ValueError(
                f"cross_entropy: `weight` must be {out_shape[:1]}, got {tuple(self.weight.shape)}"
            )
        if target.is_floating_point():
            sort, shape = "probabilities", lead + out_shape
            if self.ignore_index >= 0:
                raise ValueError(
                    f"{what}: cross_entropy of probabilities takes no `ignore_index`, got {self.ignore_index}"
                )
        else:
            sort, shape, dtype = "class indices", lead + out_shape[1:], int64
        if target.dtype != dtype:
            raise TypeError(f"{what} must be {dtype} ({sort} for cross_entropy), got {target.dtype}")
        if target.shape != shape:
            raise ValueError(f"{what} must be {shape} ({sort} for cross_entropy), got {tuple(target.shape)}")

    def _custom(self, output: Tree, target: Tree, weights: Tensor | None) -> Tensor:
        if weights is not None:
            raise ValueError(
                "custom loss: example weights need a loss with a name; weigh inside the function instead"
            )
        function = cast("Callable[[Tree, Tree], Tensor]", self.function)
        try:
            value = function(output, target)
        except (TypeError, RuntimeError) as error:  # the latter by script modules
            _check_takes_two(function, error)
            raise
        if not isinstance(value, Tensor) or value.shape != ():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"custom loss: {self.function!r} must return a scalar tensor, got {got}")
        return value

    def _values(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """(loss of each element or position, its share of the denominator or None for one each)."""
        weight, pos_weight = (None if t is None else t.to(output) for t in (self.weight, self.pos_weight))
        if self.kind == "cross_entropy":
            if self.needs_class_indices(target):
                return cross_entropy.of_indices(
                    output, target, weight, self.label_smoothing, self.ignore_index
                )
            return cross_entropy.of_probabilities(output, target, weight, self.label_smoothing)
        if self.kind == "bce_with_logits":
            return elementwise.bce_with_logits(output, target, weight, pos_weight), None
        if self.kind == "smooth_l1":
            return elementwise.smooth_l1(output, target, self.beta), None
        if self.kind == "huber":
            return elementwise.huber(output, target, self.beta), None
        return (elementwise.mse if self.kind == "mse" else elementwise.l1)(output, target), None

    def _reduce(self, values: Tensor, shares: Tensor | None) -> Tensor:
        if self.reduction == "sum":
            return values.sum()
        return values.sum() / (values.numel() if shares is None else shares.sum())


def _check_options(loss: Loss) -> None:
    kind = loss.kind
    if not isinstance(kind, str) or (kind not in NAMES and (kind != "custom" or loss.function is None)):
        raise ValueError(f"loss must be one of {', '.join(map(repr, NAMES))} or a function, got {kind!r}")
    if kind != "custom" and loss.function is not None:
        raise ValueError(f"{kind} has no `function`")
    if not isinstance(loss.reduction, str) or loss.reduction not in ("mean", "sum"):
        raise ValueError(f"{kind}: `reduction` must be 'mean' or 'sum', got {loss.reduction!r}")
    if not isinstance(loss.weight_norm, str) or loss.weight_norm not in ("count", "sum"):
        raise ValueError(f"`weight_norm` must be 'count' or 'sum', got {loss.weight_norm!r}")
    beta = "delta" if kind == "huber" else "beta"
    numbers: tuple[tuple[str, object], ...] = (
        (beta, loss.beta),
        ("label_smoothing", loss.label_smoothing),
        ("ignore_index", loss.ignore_index),
    )
    for name, number in numbers:
        if not isinstance(number, int if name == "ignore_index" else (int, float)):
            raise TypeError(f"{kind}: `{name}` must be a Python number, got {type(number).__name__}")
    if not (is_finite(loss.beta) and loss.beta > 0):
        raise ValueError(f"{kind}: `{beta}` must be finite and greater than zero, got {loss.beta}")
    if not 0 <= loss.label_smoothing <= 1:
        raise ValueError(f"{kind}: `label_smoothing` must be from 0 to 1, got {loss.label_smoothing}")
    for name, value, kinds in (
        ("weight", loss.weight, ("cross_entropy", "bce_with_logits")),
        ("pos_weight", loss.pos_weight, ("bce_with_logits",)),
    ):
        if value is not None and kind not in kinds:
            raise ValueError(f"{kind} has no `{name}`")
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{kind}: `{name}` must be a tensor, got {type(value).__name__}")


def _check_takes_two(function: Callable[[Tree, Tree], Tensor], error: Exception) -> None:
    """Check that a loss can be called with an output and a target.

    An error that the loss itself raises is not looked at.

    Raises:
        TypeError: it cannot; `error` is what its call raised.
    """
    try:
        signature(function.forward if isinstance(function, nn.Module) else function).bind(None, None)
    except TypeError as unfit:
        raise TypeError(f"custom loss: {function!r} must take (output, target): {unfit}") from error
    except ValueError:  # it has no signature
        return


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    if len(shape) > len(to):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
