"""MAML and its first-order form as one `nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.algorithms import compiled
from fastmeta.algorithms.flat_parameters import FlatParameters, views
from fastmeta.algorithms.inner_rates import InnerRates, of_tasks, repeated
from fastmeta.algorithms.meta_loss import leaves_of, meta_loss
from fastmeta.algorithms.parameters import ParameterTable
from fastmeta.losses import resolve
from fastmeta.network.swap import locked
from fastmeta.ops.adapted import adapted_now
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors, check_net
from fastmeta.ops.divergence import check_choice, check_diverged
from fastmeta.ops.eager import eager
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt, Options, check_options, names_of, numbers_of, rule_of
from fastmeta.ops.plan import NOTHING, Call, prepare
from fastmeta.ops.rates import Rates
from fastmeta.ops.task_forward import forward as task_forward
from fastmeta.problem import Captures
from fastmeta.update_rules import SGD

if TYPE_CHECKING:
    from fastmeta.explain import Explanation

_NO_RATES: dict[str, Tensor] = {}
# Attributes that `_start` makes anew for every copy.
_OWN = ("_params", "_rates", "_extra", "_number", "handle")


class MetaLoss(NamedTuple):
    """What a `MAML` returns. Only `loss` is differentiable: a loss built from the others raises on
    backward."""

    loss: Tensor  # ()
    task_losses: Tensor  # [T]
    output: Tensor  # [T, M, *out]


class MAML(nn.Module):
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
        update_rule: `fastmeta.SGD(momentum, weight_decay)`; None: plain SGD.
        memory: "auto", "store" (activations of every inner step) or "recompute" (only the
            parameters of every step).
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

    #: The algorithm, as messages name it.
    who = "MAML"
    on_divergence = "raise"

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
        update_rule: SGD | None = None,
        memory: str = "auto",
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
        self.update_rule = rule_of(update_rule)
        self.memory = memory
        self.task_chunk = task_chunk
        self.batch_stats = batch_stats
        self.backend = backend
        self.on_divergence = on_divergence
        check_options(self._options(self.who))
        params: dict[str, Tensor] = dict(net.named_parameters())
        now = adapted_now(self.who, net, self.adapts)
        rates = inner_lr, learn_lr, lr_per_step
        self.inner_lrs = InnerRates(self.who, *rates, inner_steps, now.names, params, now.frozen)
        self.flat: FlatParameters | None = None
        self._start()

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        task_weights: Tensor | None = None,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        support_per_step: bool = False,
    ) -> MetaLoss:
        """Query losses after the inner loop.

        Args:
            support_x: [T, N, *in]; [T, K, N, *in] with `support_per_step`.
            support_y: as the loss wants it.
            query_x: [T, M, *in].
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

        Derivatives: `loss` is differentiable in the parameters, the learned rates, every input that
            requires grad and everything else that requires grad and that the network or a loss
            reads. The gradients are computed here, together with the loss, wherever gradients are
            on. With `create_graph=True`, for Hessian-vector products of the outer loss, the
            backward pass computes them again by plain autograd, which takes the time and the memory
            of a loop over all inner steps in PyTorch; with order="first" inner gradients are
            constants there too.

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
        if torch.compiler.is_compiling():
            return MetaLoss(*compiled.meta_loss(self, tensors, support_per_step))
        return self.checked(MetaLoss(*meta_loss(self, tensors, support_per_step)), task_weights)

    @eager
    def adapt(
        self, x: Tensor, y: Tensor, steps: int | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The parameters of every task after the inner loop.

        Args:
            x: support inputs [T, N, *in].
            y: support targets.
            steps: None: `inner_steps`. Beyond those the last step's learning rates repeat.
            weights: of the support examples, [T, N]; of booleans: a mask.

        Returns:
            name -> [T, *shape], every parameter, also those that are not adapted.

        Derivatives: as `fastmeta.inner_sgd`, where gradients are on.
        """
        options = self._options(f"{self.who}.adapt")._replace(step_weights=None)
        params, rates = self._differentiable()
        lr = self.lr_of(rates)
        if steps is not None:
            options = options._replace(steps=steps)
            check_options(options)
            lr = repeated(lr, steps)
        return inner_loop(options, self.net, params, Tensors(x, y, weights), lr, self.loss, self.aliases())

    @eager
    def predict(self, adapted: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's output with adapted parameters.

        Args:
            adapted: what `adapt` returns.
            x: inputs [T, M, *in].

        Returns:
            [T, M, *out].

        Derivatives: as `fastmeta.task_forward`, where gradients are on.
        """
        return task_forward(
            f"{self.who}.predict", self.net, adapted, x, self.batch_stats, self.backend, self.task_chunk
        )

    def explain(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
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
        params, rates = self.meta_parameters()
        wrt = leaves_of(self, params, rates).wrt
        return explain(self.prepare(params, rates, tensors, support_per_step, wrt))

    def checked(self, out: MetaLoss, task_weights: Tensor | None) -> MetaLoss:
        """`out`, unless tasks of other weights than zero diverged.

        Raises:
            FloatingPointError: as `forward` says.
        """
        # one loss that is not finite leaves no finite mean: reading that alone costs a quarter of a
        # microsecond
        watched = out.loss.is_cpu and self.on_divergence == "raise" and torch.is_grad_enabled()
        if watched and not isfinite(out.loss.item()):
            check_diverged(self.who, "query losses are", [out.task_losses], task_weights)
        return out

    def meta_parameters(self, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the network's parameters by name, the learned rates by key); not to be modified.

        Args:
            check: whether a flattened module must still have its parameters in its vector.

        Raises:
            RuntimeError: the module was flattened, and they are no longer views of its vector.
        """
        params = self._params.current()
        rates = _NO_RATES if self._rates is None else self._rates.current()
        if check and self.flat is not None:
            self.flat.check(params, rates)
        return params, rates

    def traced_parameters(self) -> dict[str, Tensor]:
        """The network's parameters by name, while torch.compile traces."""
        return self._params.without_modules() if self._params.recurrent else dict(self.net.named_parameters())

    def modules_replaced(self) -> bool:
        """Whether compiled code that was traced by `traced_parameters` may run with parameters that
        are gone."""
        return self._params.recurrent and self._params.modules_replaced()

    def prepare(
        self,
        params: dict[str, Tensor],
        rates: dict[str, Tensor],
        tensors: Tensors,
        support_per_step: bool = False,
        wrt: frozenset[str] = NOTHING,
        captures: Captures | None = None,
    ) -> Call:
        """A call of this module on its `meta_parameters`, checked and with its backend chosen."""
        options = self._options(self.who, support_per_step)
        flat = self.flat is None or len(self.flat.names) == len(params)
        frozen = NOTHING
        if "params" in wrt and self.flat is None:
            still = [name for name, value in params.items() if not value.requires_grad]
            frozen = frozenset(still) if 0 < len(still) < len(params) else NOTHING
        given = options, self.net, params, tensors, self.loss, self.query_loss, self.lr_of(rates), wrt
        return prepare(*given, prefer_flat=flat, frozen=frozen, captures=captures)

    def lr_of(self, rates: dict[str, Tensor], tasks: Tensor | None = None) -> Rates:
        """The rates as an operator takes them, from the learned ones by their keys; with `tasks`,
        of those alone."""
        number = self._number
        lr = self.inner_lrs.as_given(rates) if number is None else number
        return lr if tasks is None else of_tasks(lr, tasks)

    def aliases(self) -> Aliases | None:
        """What a loss may read of a flattened module: the parameters, which autograd knows as
        pieces of its vector."""
        flat = self.flat
        if flat is None:
            return None

        def parts() -> list[Tensor]:
            return flat.parts(*self.meta_parameters(check=False))

        return Aliases(parts, lambda: views(flat.vector, parts()))

    def _options(self, who: str, support_per_step: bool = False) -> Options:
        return Options(
            who,
            self.inner_steps,
            self.order,
            self.adapts,
            self.step_weights,
            support_per_step,
            self.update_rule,
            self.memory,
            self.batch_stats,
            self.backend,
            self.task_chunk,
        )

    def _differentiable(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`meta_parameters` as functions of the leaves."""
        params, rates = self.meta_parameters()
        flat = self.flat
        if flat is None:
            return params, rates
        pieces = views(flat.vector, flat.parts(params, rates))
        at = len(flat.names)
        return (
            {**params, **dict(zip(flat.names, pieces[:at], strict=True))},
            {**rates, **dict(zip(flat.keys, pieces[at:], strict=True))},
        )

    def _start(self) -> None:
        """What neither a copy nor a checkpoint of this module can share with it."""
        self._params = ParameterTable(self.net)
        self._rates = ParameterTable(self.inner_lrs) if self.inner_lrs.learned else None
        self._number = self.inner_lrs.number
        self.handle = compiled.register(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
