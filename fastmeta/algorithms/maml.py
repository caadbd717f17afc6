"""MAML and its first-order form as one `nn.Module`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.algorithms import compiled
from fastmeta.algorithms.algorithm import Algorithm
from fastmeta.algorithms.inner_rates import InnerRates
from fastmeta.algorithms.machinery import MAMLMachinery, options_of
from fastmeta.algorithms.meta_loss import leaves_of, meta_loss
from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.network.swap import locked
from fastmeta.ops.adapted import adapted_now
from fastmeta.ops.checks import Tensors, check_net
from fastmeta.ops.divergence import check_choice, check_diverged
from fastmeta.ops.eager import eager
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt, check_options, names_of, numbers_of, rule_of
from fastmeta.ops.rates import Rates, repeated
from fastmeta.ops.rule_numbers import repeated_hyper
from fastmeta.update_rules import UpdateRule

if TYPE_CHECKING:
    from fastmeta.explain import Explanation


# where torch.compile breaks its graph
_outside = torch.compiler.disable(meta_loss)


class MetaLoss(NamedTuple):
    """What a `MAML` returns. Only `loss` is differentiable: a loss built from the others raises on
    backward."""

    loss: Tensor  # ()
    task_losses: Tensor  # [T]
    output: Tree  # [T, M, *out]; of a network that returns several tensors, what it returns


class MAML(Algorithm):
    """Model-agnostic meta-learning: an initialisation from which a few inner steps adapt to any
    task.

        maml = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=5)
        out = maml(support_x, support_y, query_x, query_y)
        out.loss.backward()

    Args:
        net: the network; its parameters are the meta-parameters.
        loss: a name, a function of `torch.nn.functional`, a loss module or any f(output, target) ->
            scalar; see `fastmeta.losses.resolve`. A module of `torch.nn` is read once, here.
            Parameters of a loss network get their gradients, but are none of this module's
            `parameters()`.
        query_loss: the same for the query sets; None: `loss`.
        inner_lr: a number, a tensor () or [K], or a dict by parameter name or glob pattern of
            numbers and tensors () or [K or 1, T or 1, ...] that end in any shape that broadcasts to
            the parameter's: the rates, or where `learn_lr` says so their start. A name goes before
            a pattern, and the first pattern that matches before later ones.
        inner_steps: K, at least 0.
        order: "second", exact, or "first" (FOMAML).
        adapt: "all", "head" (the last layer with parameters) or "body" (all the others), of these
            the parameters that require grad when a call is made; names of parameters, glob patterns
            of names ("blocks.*.weight") or a predicate (name, parameter) -> bool, which is asked
            here and now: frozen ones too, if they are asked for.
        learn_lr: None, or which rates become parameters in `inner_lrs`: "scalar", one; "tensor",
            one for each adapted parameter tensor; "element", one for each of their scalar weights
            (Meta-SGD). What is frozen now has none, and what is frozen later has the gradient zero
            for its rates.
        lr_per_step: learned rates differ from step to step.
        step_weights: K + 1 numbers: weights of the query losses after 0 .. K steps; None: the last
            one only.
        weight_norm: the mean over examples with weights w: "count", sum(w * l) / N, or "sum", sum(w
            * l) / sum(w), which is zero, without any gradient, where all weights of a task are
              zero.
        support_step_weights: K numbers: weights of each step's own support loss, before its update,
            in the loss and in `task_losses` (test-time training); None: all zero.
        update_rule: what a step does with a gradient: `fastmeta.SGD`, `Adam`, `AdamW`, `RMSProp`,
            `Adagrad`, `Lion` or a `CustomRule`; None: plain SGD. Numbers of it that are
            `nn.Parameter` and the parameters of a `CustomRule` are among `parameters()`, in
            `inner_rule`.
        memory: "auto", "store" (activations of every inner step), "recompute" (only the parameters
            and the state of the update rule of every step) or "checkpoint" (those of about sqrt(K)
            steps).
        memory_limit: bytes that those may take at most with "checkpoint"; None: any.
        task_chunk: at most so many tasks at a time on the `torch` backend; None: all.
        batch_stats: batch norm by "task", the task's own batch; by the "running" statistics; or
            "module": each norm as the module itself does it, by its batch after .train(), by its
            running statistics after .eval(). Running statistics are never moved, unlike by the
            module itself.
        backend: "auto", or the name of one; only "torch" honours autocast.
        on_divergence: what becomes of a call in which a task's query loss, or with "skip" a
            gradient, is not finite. "raise": FloatingPointError. "skip": the loss and its gradient
            are those of the other tasks alone, computed again, the mean over as many as they are,
            and a RuntimeWarning counts and names the tasks that are left out. "keep": NaN, as it
            comes. A task of weight zero contributes nothing in any case. On an accelerator only
            "skip" looks, since reading a loss waits for it. `task_losses` has every task.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017); Li et al., "Meta-SGD"
        (2017).
    """

    who = "MAML"
    on_divergence = "raise"
    _machinery: MAMLMachinery

    @locked
    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        query_loss: object = None,
        inner_lr: Rates,
        inner_steps: int,
        order: str = "second",
        adapt: Adapt = "all",
        learn_lr: str | None = None,
        lr_per_step: bool = False,
        step_weights: Sequence[float] | None = None,
        weight_norm: str = "count",
        support_step_weights: Sequence[float] | None = None,
        update_rule: UpdateRule | None = None,
        memory: str = "auto",
        memory_limit: int | None = None,
        task_chunk: int | None = None,
        batch_stats: str = "task",
        backend: str = "auto",
        on_divergence: str = "raise",
    ) -> None:
        super().__init__()
        check_choice(self.who, on_divergence)
        check_net(self.who, net)
        self.net = net
        self.loss = resolve(loss, weight_norm=weight_norm)
        self.query_loss = self.loss if query_loss is None else resolve(query_loss, weight_norm=weight_norm)
        self.inner_steps = inner_steps
        self.order = order
        self.adapts = names_of(self.who, net, adapt)
        self.step_weights = numbers_of(self.who, step_weights)
        self.update_rule = rule_of(self.who, update_rule)
        self.support_step_weights = numbers_of(self.who, support_step_weights, "support_step_weights")
        self.memory = memory
        self.memory_limit = memory_limit
        self.task_chunk = task_chunk
        self.batch_stats = batch_stats
        self.backend = backend
        self.on_divergence = on_divergence
        check_options(options_of(self, self.who))
        params: dict[str, Tensor] = dict(net.named_parameters())
        now = adapted_now(self.who, net, self.adapts)
        self.inner_lrs = InnerRates(
            self.who,
            inner_lr,
            learn_lr=learn_lr,
            per_step=lr_per_step,
            steps=inner_steps,
            names=now.names,
            params=params,
            frozen=now.frozen,
        )
        self._machinery = MAMLMachinery(self)

    def forward(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        query_y: Tree,
        task_weights: Tensor | None = None,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        support_per_step: bool = False,
    ) -> MetaLoss:
        """Query losses after the inner loop.

        Args:
            support_x: [T, N, *in]; [T, K, N, *in] with `support_per_step`; or a tree of tensors,
                see `fastmeta.Inputs`.
            support_y: as the loss wants it.
            query_x: [T, M, *in], or a tree.
            query_y: as the query loss wants it.
            task_weights: [T]; the loss is sum(task_weights * task_losses) / T, T less the tasks
                that are skipped.
            support_weights: [T, N] or [T, K, N]; of booleans: a mask, for tasks of different sizes.
                The mean is over the examples that it keeps; the others may hold anything finite,
                and any class.
            query_weights: [T, M]; of booleans: a mask.
            support_per_step: there is a support set of its own for every inner step.

        Returns:
            `MetaLoss`.

        Derivatives: `loss` is differentiable in the parameters, the learned rates, the tensors of
            the update rule, every input that requires grad and everything else that requires grad
            and that the network or a loss reads. The gradients are computed here, together with the
            loss, wherever gradients are on. With `create_graph=True`, for Hessian-vector products
            of the outer loss, the backward pass computes them again by plain autograd, which takes
            the time and the memory of a loop over all inner steps in PyTorch; with order="first"
            inner gradients are constants there too.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. Nothing was
                modified.
            FloatingPointError: tasks diverged: their query losses are not finite. Without
                gradients, on an accelerator, where reading a loss would wait for it, and under
                torch.compile this is not looked for. With on_divergence="skip": no task is left.
            BackendUnavailable: the backend named cannot run this call.
            RuntimeError: in the backward pass: something that the loss was computed from was
                modified since.

        Warns:
            RuntimeWarning: tasks are skipped, see `on_divergence`.
        """
        tensors = Tensors(
            support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights
        )
        own = self._machinery
        if torch.compiler.is_compiling():
            run = compiled.meta_loss if compiled.takes(tensors) and not self.update_rule.learns else _outside
            return MetaLoss(*run(own, tensors, support_per_step))
        out = MetaLoss(*meta_loss(own, tensors, support_per_step))
        return checked(out, self.who, self.on_divergence, task_weights)

    @eager
    def adapt(
        self, x: Tree, y: Tree, steps: int | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The parameters of every task after the inner loop.

        Args:
            x: support inputs [T, N, *in], or a tree of tensors, see `fastmeta.Inputs`.
            y: support targets.
            steps: None: `inner_steps`. Beyond those the last step's learning rates repeat.
            weights: of the support examples, [T, N]; of booleans: a mask.

        Returns:
            name -> [T, *shape], every parameter, also those that are not adapted.

        Derivatives: as `fastmeta.inner_sgd`, where gradients are on.
        """
        own = self._machinery
        options = own.options(f"{self.who}.adapt")._replace(step_weights=None, support_step_weights=None)
        params, rates = own.differentiable()
        lr, hyper = own.lr_of(rates), own.hyper_of(rates)
        if steps is not None:
            options = options._replace(steps=steps)
            check_options(options)
            lr, hyper = repeated(lr, steps), repeated_hyper(options.rule, hyper, steps)
        given = options, self.net, params, Tensors(x, y, weights), lr, self.loss, own.aliases()
        return inner_loop(*given, hyper=hyper)

    def explain(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        query_y: Tree,
        task_weights: Tensor | None = None,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        support_per_step: bool = False,
    ) -> Explanation:
        """Which backend runs a training step on this episode, at what cost, and why others do not;
        print it.

        Args:
            support_x, support_y, query_x, query_y, task_weights, support_weights, query_weights,
                support_per_step: as in a call.
        """
        from fastmeta.explain import explain

        tensors = Tensors(
            support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights
        )
        own = self._machinery
        params, rates = own.meta_parameters()
        wrt = leaves_of(own, params, rates).wrt
        return explain(own.prepare(params, rates, tensors, support_per_step, wrt))


def checked(out: MetaLoss, who: str, on_divergence: str, task_weights: Tensor | None) -> MetaLoss:
    """`out`, unless tasks of other weights than zero diverged.

    Args:
        out: of a call.
        who, on_divergence: of the algorithm.
        task_weights: of the call.

    Raises:
        FloatingPointError: as `MAML.forward` says.
    """
    # one loss that is not finite leaves no finite mean: reading that alone costs a quarter of a
    # microsecond
    watched = out.loss.is_cpu and on_divergence == "raise" and torch.is_grad_enabled()
    if watched and not isfinite(out.loss.item()):
        check_diverged(who, "query losses are", [out.task_losses], task_weights)
    return out
