"""Inner loops that are a chain of engine calls, one for each step, because something happens
between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.machinery import MAMLMachinery
from fastmeta.algorithms.maml import MAML, MetaLoss, checked
from fastmeta.algorithms.meta_loss import Recipe, again_of, answer, attached_to, inputs_of
from fastmeta.algorithms.parameters import ParameterTable
from fastmeta.algorithms.rule_tensors import with_prefix
from fastmeta.backends._captured import leaves_behind
from fastmeta.inputs import Tree, mapped
from fastmeta.network.swap import locked
from fastmeta.ops.again import captures_of, reads
from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import all_finite, leave_out, looked_for
from fastmeta.ops.eager import eager
from fastmeta.ops.options import Options, argument, check_options
from fastmeta.ops.places import placed
from fastmeta.ops.plan import prepare
from fastmeta.ops.rule_numbers import repeated_hyper

if TYPE_CHECKING:
    from fastmeta.explain import Explanation


class Stepwise(MAML):
    """A base class: `MAML` whose machinery says in `path` how theta_0 becomes theta_K.

    Autograd links the steps. It keeps every theta_k, not what is inside a step, which its backward
    pass runs again.

    Args:
        net, options: as of `fastmeta.MAML`, but `support_step_weights`.

    Attributes:
        extra: the meta-parameters besides those of the network and the rates.
    """

    extra: nn.ParameterDict
    _machinery: StepwiseMachinery

    @locked
    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net, **options)
        self.extra = nn.ParameterDict()
        if self.support_step_weights is not None:
            raise ValueError(
                f"{argument(self.who, 'support_step_weights')} must be None: steps are calls of their own"
            )

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
        support_per_step: bool = False,
    ) -> MetaLoss:
        """Query losses after the inner loop; arguments, result and derivatives are those of
        `MAML.forward`."""
        tensors = Tensors(
            support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights
        )
        own = self._machinery
        # checks everything before the first step
        call = own.prepare(*own.meta_parameters(), tensors, support_per_step)
        watched = looked_for(self.on_divergence, call.plan.shapes.device.type == "cpu", task_weights)
        out = (own.settled if watched else own.chain)(tensors, support_per_step)
        return checked(out, self.who, self.on_divergence, task_weights)

    @eager
    def adapt(
        self, x: Tree, y: Tree, steps: int | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The parameters of every task after the inner loop; as `MAML.adapt`."""
        who, own = f"{self.who}.adapt", self._machinery
        steps = self.inner_steps if steps is None else steps
        options = own.options(who)._replace(steps=steps, step_weights=None)
        check_options(options)
        support = Tensors(x, y, weights)
        params, rates = own.meta_parameters()
        hyper = repeated_hyper(options.rule, own.hyper_of(rates), steps)
        call = prepare(options, self.net, params, support, self.loss, None, 0.0, hyper=hyper)
        *_, theta = own.path(own.step(), support, steps, False)
        tasks, shapes = call.problem.tasks, call.plan.shapes.params
        return {n: v.expand(tasks, *v.shape) if tuple(v.shape) == shapes[n] else v for n, v in theta.items()}

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """As `MAML.explain`; the backend is that of every step."""
        from fastmeta.explain import in_steps

        weights = self.step_weights or (1.0,)
        return in_steps(super().explain(*args, **kwargs), sum(weight != 0 for weight in weights[:-1]) + 1)


class StepwiseMachinery(MAMLMachinery):
    """`MAMLMachinery` with extra meta-parameters, and the chain of steps."""

    def bind(self, module: Any) -> None:
        """As `Machinery.bind`."""
        super().bind(module)
        self.extra = ParameterTable(module.extra)

    def path(
        self, options: Options, support: Tensors, steps: int, per_step: bool, tasks: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """theta_0 .. theta_K, with their graph where gradients are on.

        Args:
            options: of one inner step.
            support: x, y and weights.
            steps: K.
            per_step: there is a support set of its own for every step.
            tasks: the numbers of the tasks that these are of all; None: they are all.
        """
        raise NotImplementedError

    def meta_parameters(self, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `MAMLMachinery.meta_parameters`; the extra ones are among the rates, under keys that
        no rate has."""
        rates = {} if self.rates is None else self.rates.current()
        extra = {f"extra.{key}": value for key, value in self.extra.current().items()}
        params, rates = self.params.current(), {**rates, **extra, **with_prefix(self.hyper)}
        if check and self.flat is not None:
            self.flat.check(params, rates)
        return params, rates

    def step(self) -> Options:
        """The options of one inner step."""
        return self.options(self.who)._replace(steps=1, step_weights=None)

    def chain(self, tensors: Tensors, per_step: bool, tasks: Tensor | None = None) -> MetaLoss:
        """All steps and query losses, `loss` with its graph; of `tasks`, as in `path`."""
        support = Tensors(tensors.support_x, tensors.support_y, tensors.support_weights)
        module = self.module
        last = module.inner_steps
        weights = module.step_weights or (0.0,) * last + (1.0,)
        path = self.path(self.step(), support, last, per_step, tasks)
        parts = [
            (weight, self._query(theta, tensors))
            for k, (weight, theta) in enumerate(zip(weights, path, strict=True))
            if weight or k == last
        ]
        loss = torch.stack([weight * part.loss for weight, part in parts]).sum(0)
        task_losses = torch.stack([weight * part.task_losses for weight, part in parts]).sum(0)
        return MetaLoss(loss, task_losses, parts[-1][1].output)

    def settled(self, tensors: Tensors, per_step: bool) -> MetaLoss:
        """As `_chain`, without tasks that diverged: the gradients have to be there to be looked
        at."""
        leaves, inputs = [], []
        captured: list[Tensor] = []
        if torch.is_grad_enabled():
            params, rates = self.meta_parameters()
            own = [self.flat.vector] if self.flat is not None else [*params.values(), *rates.values()]
            leaves = [leaf for leaf in own if leaf.requires_grad]
            inputs = [tensor for tensor in placed(tensors)[0] if tensor.requires_grad]

        def again(tasks: Tensor | None) -> _Gradients:
            part = tensors
            if tasks is not None:
                part = Tensors(*[mapped(lambda x: x.index_select(0, tasks), tree) for tree in tensors])
            out = self.chain(part, per_step, tasks)
            known = {id(leaf) for leaf in (*leaves, *inputs)}
            captured.extend(leaf for leaf in leaves_behind(out.loss) if id(leaf) not in known)
            captured[:] = {id(leaf): leaf for leaf in captured}.values()
            by = [*leaves, *inputs, *captured]
            grads = torch.autograd.grad(out.loss, by, materialize_grads=True, retain_graph=True) if by else ()
            return _Gradients(out._replace(loss=out.loss.detach()), list(grads))

        whole = again(None)
        rest = leave_out(self.who, self.module.on_divergence, whole, tensors.task_weights, again)
        found, (loss, task_losses, output) = whole.grads, whole.out
        if rest is not None and rest.answer is None:
            loss, found = torch.zeros_like(loss), [torch.zeros_like(grad) for grad in found]
        elif rest is not None and rest.answer is not None:
            part = rest.answer.out
            loss, found = part.loss * rest.scale, [grad * rest.scale for grad in rest.answer.grads]
            task_losses = task_losses.index_copy(0, rest.tasks, part.task_losses)
            output = mapped(lambda a, b: a.index_copy(0, rest.tasks, b), output, part.output)
        return MetaLoss(attached_to(loss, found, leaves, [*inputs, *captured]), task_losses, output)

    def _query(self, theta: dict[str, Tensor], tensors: Tensors) -> MetaLoss:
        """The query losses at theta, `loss` with its graph."""
        query = tensors._replace(support_x=None, support_y=None, support_weights=None)
        grad = torch.is_grad_enabled()
        fields = inputs_of(query) if grad else []
        wanted = grad and any(value.requires_grad for value in theta.values())
        wrt = frozenset(["params"] * wanted + fields) - {"task_weights"}
        options, query_loss = self.step()._replace(steps=0), self.module.query_loss
        aliases = self.aliases()
        captures = captures_of(True, aliases) if grad else None
        call = prepare(options, self.net, theta, query, None, query_loss, 0.0, wrt, captures=captures)
        run = again_of(call)
        result = call.solve()
        loss, task_losses, output = answer(call, result)
        captured = reads(result.grads.captured, aliases)
        if wanted or fields or captured:
            params = result.grads.params or {}
            gradients = [torch.cat([params[name].reshape(-1) for name in theta])] if wanted else []
            given, places = placed(query)
            at = tuple(i for i, x in enumerate(given) if x.requires_grad) if fields else ()
            by = places.gradients(result.grads, task_losses / task_losses.shape[0])
            gradients += [by[i] for i in at]
            recipe = Recipe(
                options=options,
                net=self.net,
                loss=None,
                query_loss=query_loss,
                lr_of=lambda rates: 0.0,
                hyper_of=lambda rates: {},
                wrt=wrt,
                rerun=run,
                flat=None,
                names=tuple(theta),
                keys=(),
                places=places,
                inputs=at,
                parts=tuple(read.part for read in captured),
                own=None,
            )
            leaves = [*theta.values()] if wanted else []
            loss = recipe.attach(loss, gradients, leaves, theta, {}, given, captured)
        return MetaLoss(loss, task_losses, output)


@dataclass(slots=True)
class _Gradients:
    """A chain's answer, and its gradients in the order of the leaves."""

    out: MetaLoss
    grads: list[Tensor]

    @property
    def task_losses(self) -> Tensor:
        return self.out.task_losses

    @property
    def finite(self) -> bool:
        return all_finite([self.out.loss, *self.grads])


def support_of(support: Tensors, k: int, per_step: bool) -> Tensors:
    """The support set of inner step k."""
    return Tensors(*[mapped(lambda x: x[:, k], tree) for tree in support]) if per_step else support
