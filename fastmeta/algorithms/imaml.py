"""iMAML: the exact meta-gradient of a regularised inner problem from its solution alone, not from
the way there."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmeta.algorithms.conjugate_gradient import conjugate_gradient
from fastmeta.algorithms.inner_loop import InnerLoop, InnerLoopMachinery, check_no_gradients
from fastmeta.algorithms.meta_loss import answer, attached
from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.models.check import check_count, is_finite
from fastmeta.ops.again import Read, captures_of, reads
from fastmeta.ops.checks import Tensors
from fastmeta.ops.differentiable import Operation, run_and_read
from fastmeta.ops.divergence import check_choice, check_diverged, left_out, named
from fastmeta.ops.eager import eager
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt
from fastmeta.ops.plan import prepare
from fastmeta.update_rules import SGD

if TYPE_CHECKING:
    from fastmeta.explain import Explanation


class _Step(NamedTuple):
    """One inner step."""

    start: dict[str, Tensor]  # name -> [T, *shape], leaves
    moved: dict[str, Tensor]  # name -> [T, *shape]
    captured: list[Tensor]  # what the network and the loss read past their arguments


class IMAMLLoss(NamedTuple):
    """What an `IMAML` returns. Only `loss` is differentiable: a loss built from the others raises
    on backward."""

    loss: Tensor  # ()
    task_losses: Tensor  # [T]
    output: Tree  # [T, M, *out]; of a network that returns several tensors, what it returns
    residuals: Tensor | None = (
        None  # [T]: ||b - A u|| / ||b|| of every task's linear system; None without gradients
    )
    inner_residuals: Tensor | None = (
        None  # [T]: ||grad L(theta_K) + lambda (theta_K - theta)||, zero if solved
    )


class IMAML(InnerLoop):
    """Implicit MAML: the inner loop solves min L(theta_t) + lambda/2 ||theta_t - theta||^2 for
    every task t.

    At the solution d theta_t / d theta = (I + H_t / lambda)^-1, H_t the Hessian of the support loss
    there, so that the meta-gradient is mean_T(u_t) with (I + H_t / lambda) u_t = grad Q_t(theta_t),
    by conjugate gradients for all tasks at once. Memory and cost do not grow with the inner steps.
    It is exact as far as both are solved, and `residuals` and `inner_residuals` of what a call
    returns say how far that is.

        imaml = fm.IMAML(net, loss="mse", inner_lr=0.05, inner_steps=16, proximal=2.0)
        out = imaml(support_x, support_y, query_x, query_y)
        out.loss.backward()

    Args:
        net: the network; its parameters are the meta-parameters.
        loss, query_loss, weight_norm, batch_stats, backend: as in `fastmeta.MAML`.
        inner_lr: alpha, a number: theta_t - alpha (grad L(theta_t) + lambda (theta_t - theta)) is
            an inner step.
        inner_steps: K, at least 0.
        proximal: lambda, greater than 0; where it does not exceed minus the least eigenvalue of
            H_t, the inner problem has no minimum there and the system no solution to rely on.
        cg_steps: Hessian-vector products of the solver at most.
        cg_tolerance: a task's system is solved when its relative residual is at most this.
        on_divergence: as in `fastmeta.MAML`, of tasks whose adapted parameters, query gradients or
            linear systems are not finite, looked for on any device where gradients are on.
        adapt: as in `fastmeta.MAML`; lambda holds the adapted parameters, the others are shared by
            all tasks.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients" (2019),
        sections 3 and 4.
    """

    who = "IMAML"
    _machinery: _IMAMLMachinery

    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        query_loss: object = None,
        inner_lr: float,
        inner_steps: int,
        proximal: float,
        cg_steps: int = 50,
        cg_tolerance: float = 1e-5,
        adapt: Adapt = "all",
        weight_norm: str = "count",
        batch_stats: str = "task",
        backend: str = "auto",
        on_divergence: str = "raise",
    ) -> None:
        check_choice(self.who, on_divergence)
        for name, value in {"inner_lr": inner_lr, "proximal": proximal, "cg_tolerance": cg_tolerance}.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"IMAML: `{name}` must be a number, got {type(value).__name__}")
            if not (is_finite(value) and value > 0):
                raise ValueError(f"IMAML: `{name}` must be finite and greater than 0, got {value}")
        if cg_tolerance > 1:
            raise ValueError(
                f"IMAML: `cg_tolerance` must be a relative residual of at most 1, got {cg_tolerance}"
            )
        inner_lr, proximal, cg_tolerance = float(inner_lr), float(proximal), float(cg_tolerance)
        check_count("IMAML: `cg_steps`", cg_steps, 1)
        super().__init__(
            net,
            loss=loss,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            adapt=adapt,
            weight_norm=weight_norm,
            update_rule=None,
            batch_stats=batch_stats,
            backend=backend,
        )
        self.query_loss = self.loss if query_loss is None else resolve(query_loss, weight_norm=weight_norm)
        self.inner_lr = inner_lr
        self.proximal = proximal
        self.cg_steps = cg_steps
        self.cg_tolerance = cg_tolerance
        self.on_divergence = on_divergence
        self._machinery = _IMAMLMachinery(self)

    @eager
    def forward(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        query_y: Tree,
        task_weights: Tensor | None = None,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
    ) -> IMAMLLoss:
        """Query losses at the solutions of the inner problems.

        Args:
            support_x, support_y, query_x, query_y, task_weights, support_weights, query_weights: as
                in `fastmeta.MAML`.

        Returns:
            `IMAMLLoss`.

        Derivatives: `loss` is once differentiable in the parameters and in whatever requires grad
            that the network or a loss reads besides; differentiating again raises. The gradients
            are computed here, wherever gradients are on.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. Nothing was
                modified.
            FloatingPointError: tasks diverged, where gradients are on; without them their losses
                are not finite.
            BackendUnavailable: the backend named cannot run this call.

        Warns:
            RuntimeWarning: systems that were not solved to `cg_tolerance`, with their tasks and
                residuals.
        """
        tensors = Tensors(
            support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights
        )
        check_no_gradients(self.who, tensors)
        own = self._machinery
        params = own.params()
        wanted = torch.is_grad_enabled()
        solution = own.adapted(self.who, Tensors(support_x, support_y, support_weights), self.inner_steps)
        options = own.options(self.who)._replace(steps=0)
        wrt = frozenset({"params"} if wanted else ())
        given = options, self.net, solution, tensors, self.loss, self.query_loss, self.inner_lr, wrt
        call = prepare(*given, captures=captures_of(True, None) if wanted else None)
        result = call.solve()
        loss, task_losses, output = answer(call, result)
        if not wanted:
            gone = left_out(self.who, self.on_divergence, [task_losses], task_weights)
            return IMAMLLoss(gone.mean(task_losses, task_weights) if gone else loss, task_losses, output)
        direct = reads(result.grads.captured, None)
        step = own.step(solution, tensors)
        if not (direct or step.captured or any(value.requires_grad for value in params.values())):
            gone = left_out(self.who, self.on_divergence, [task_losses], task_weights)
            return IMAMLLoss(gone.mean(task_losses, task_weights) if gone else loss, task_losses, output)
        query = cast(
            "dict[str, Tensor]", result.grads.params
        )  # name -> [T, *shape], task weights and 1 / T in it
        found = [*solution.values(), *query.values()]
        if self.on_divergence == "raise":
            check_diverged(self.who, "adapted parameters or query gradients are", found, task_weights)
        gradients, implicit, residuals, inner, indefinite = own.implicit(params, step, query)
        if self.on_divergence == "raise":
            check_diverged(self.who, "linear systems are", [residuals], task_weights)
        gone = left_out(self.who, self.on_divergence, [*found, residuals], task_weights)
        captured = [*direct, *implicit]
        if gone:
            if captured:
                raise FloatingPointError(
                    f"{self.who}: tasks diverged or have weight zero without being finite, and the network "
                    "or a loss reads tensors that require grad, whose gradients are sums over all tasks: "
                    "leave those tasks out"
                )
            loss = gone.mean(task_losses, task_weights)
            scale = len(residuals) / gone.counted
            gradients = {name: scale * gone.without(value) for name, value in gradients.items()}
        _report(self, residuals, indefinite)
        total = {name: value.sum(0) for name, value in gradients.items()}
        return IMAMLLoss(attached(loss, total, params, captured), task_losses, output, residuals, inner)

    def explain(self, x: Tree, y: Tree, weights: Tensor | None = None) -> Explanation:
        """Which backend runs the inner loop on these support sets, and why others do not; print it.

        Args:
            x, y, weights: as in `adapt`.
        """
        line = (
            "each inner step is a call of its own; then one Hessian-vector product for each of at most "
            f"{self.cg_steps} steps of conjugate gradients, which the cost does not count"
        )
        whole = super().explain(x, y, weights)
        return replace(whole, conventions=(line, *whole.conventions))


class _IMAMLMachinery(InnerLoopMachinery):
    def adapted(
        self, who: str, tensors: Tensors, steps: int, support_per_step: bool = False
    ) -> dict[str, Tensor]:  # name -> [T, *shape], detached
        """The inner loop: weight decay lambda pulls to zero, and what is added after each step, to
        theta.

        There is one inner problem, so that minibatches, `support_per_step`, do not come here.
        """
        if not isinstance(steps, int) or steps < 1:  # nothing to do, or something to refuse
            return super().adapted(who, tensors, steps)
        module = self.module
        options = self.options(who)._replace(steps=1, rule=SGD(weight_decay=module.proximal))
        params = self.params()
        pull = module.inner_lr * module.proximal
        theta, names = params, self.names
        with torch.no_grad():
            for _ in range(steps):
                theta = inner_loop(options, self.net, theta, tensors, module.inner_lr, self.loss)
                for name in names:
                    theta[name] += pull * params[name]
        return theta

    def step(self, solution: dict[str, Tensor], tensors: Tensors) -> _Step:
        """One inner step of rate -1 / lambda from the solution, with its graph."""
        start = {name: value.requires_grad_() for name, value in solution.items()}
        support = Tensors(tensors.support_x, tensors.support_y, tensors.support_weights)
        options = self.options(self.who)._replace(steps=1, adapt=self.names)
        moved, captured = run_and_read(
            Operation(options, self.net, start, support, -1 / self.module.proximal, self.loss)
        )
        return _Step(start, moved, captured)

    def implicit(
        self, params: dict[str, Tensor], step: _Step, query: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Read], Tensor, Tensor, Tensor]:
        """(every task's meta-gradient by name, that of what was captured, residuals [T], inner
        residuals [T], which systems are indefinite [T]).

        One inner step of rate -1 / lambda from the solution, theta_K + grad L(theta_K) / lambda,
        has I + H / lambda
        as its Jacobian: vector-Jacobian products of it are what conjugate gradients need. It also
        lands on theta if the inner problem is solved. In what is not adapted the product is the
        mixed derivative.
        """
        start, moved, names, module = step.start, step.moved, self.names, self.module
        adapted = [moved[name] for name in names]
        shapes = [value.shape for value in adapted]
        sizes = [value[0].numel() for value in adapted]

        def along(v: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:  # v: [T, P]
            directions = [part.reshape(shape) for part, shape in zip(v.split(sizes, 1), shapes, strict=True)]
            return torch.autograd.grad(adapted, leaves, directions, retain_graph=True)

        def products(v: Tensor) -> dict[str, Tensor]:  # name -> [T, *shape]
            return dict(zip(start, along(v, [*start.values()]), strict=True))

        with torch.no_grad():
            b = _flat(query, names)
            # half of it: the true residual, which is reported, is not quite that of the recursion
            goal = 0.5 * module.cg_tolerance
            u, indefinite = conjugate_gradient(lambda v: _flat(products(v), names), b, module.cg_steps, goal)
            left = {name: query[name] - product for name, product in products(u).items()}
            products_captured = along(u, step.captured) if step.captured else ()
            size = b.norm(dim=1)
            residuals = _flat(left, names).norm(dim=1) / torch.where(size > 0, size, 1)
            inner = module.proximal * _flat({name: moved[name] - params[name] for name in names}, names).norm(
                dim=1
            )
        own = [part.reshape(shape) for part, shape in zip(u.split(sizes, 1), shapes, strict=True)]
        implicit = [
            Read(x, None, -product) for x, product in zip(step.captured, products_captured, strict=True)
        ]
        return {**left, **dict(zip(names, own, strict=True))}, implicit, residuals, inner, indefinite


def _report(imaml: IMAML, residuals: Tensor, indefinite: Tensor) -> None:
    """Warn of the tasks whose systems are not solved."""
    tasks = (residuals > imaml.cg_tolerance).nonzero().flatten().tolist()
    if not tasks:
        return
    bent = indefinite.nonzero().flatten().tolist()
    why = (
        f"; I + H / lambda has negative curvature in {named(bent)}: `proximal` is too small there"
        if bent
        else ""
    )
    warnings.warn(
        f"IMAML: after {imaml.cg_steps} conjugate-gradient steps at most, {len(tasks)} of "
        f"{len(residuals)} systems are not solved to `cg_tolerance` = {imaml.cg_tolerance:g}: "
        f"{named(tasks)}, largest residual {float(residuals[tasks].max()):.1e}; "
        f"the meta-gradient is approximate{why}",
        RuntimeWarning,
        stacklevel=2,
    )


def _flat(values: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """What belongs to adapted parameters as vectors [T, P]."""
    return torch.cat([values[name].reshape(len(values[name]), -1) for name in names], 1)
