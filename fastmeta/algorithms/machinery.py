"""The machinery of MAML and its relatives: its meta-parameters, its rates and its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmeta.algorithms import compiled
from fastmeta.algorithms.algorithm import Machinery
from fastmeta.algorithms.flat_parameters import FlatParameters, views
from fastmeta.algorithms.learner import Learner
from fastmeta.algorithms.parameters import ParameterTable
from fastmeta.algorithms.rule_tensors import with_prefix, without_prefix
from fastmeta.inputs import Tree
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors
from fastmeta.ops.options import Options
from fastmeta.ops.plan import NOTHING, Call, prepare
from fastmeta.ops.rates import Rates, of_tasks
from fastmeta.ops.rule_numbers import NONE, Hyper
from fastmeta.ops.task_forward import forward as task_forward
from fastmeta.problem import Captures

_NO_RATES: dict[str, Tensor] = {}


class MAMLMachinery(Machinery):
    """What `meta_loss` and `compiled` need of a MAML, see `Learner`.

    Attributes:
        flat: the vector of a flattened module, or None.
        handle: the number under which compiled code finds this.
    """

    flat: FlatParameters | None = None

    def bind(self, module: Any) -> None:
        """As `Machinery.bind`."""
        super().bind(module)
        self.params = ParameterTable(self.net)
        self.rates = ParameterTable(self.inner_lrs) if self.inner_lrs.learned else None
        self.number = self.inner_lrs.number
        learner: Learner = self
        self.handle = compiled.register(learner)

    def options(self, who: str, support_per_step: bool = False) -> Options:
        """The options as they are now; `who` is for messages."""
        return options_of(self.module, who, support_per_step)

    def predict(self, adapted: Mapping[str, Tensor], x: Tree) -> Tree:
        """As `MAML.predict`."""
        module = self.module
        how = module.batch_stats, module.backend, module.task_chunk
        return task_forward(f"{self.who}.predict", self.net, adapted, x, *how)

    def meta_parameters(self, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the network's parameters by name, the learned rates by key); not to be modified.

        The tensors of the update rule come after the rates, under keys that no rate has.

        Args:
            check: whether a flattened module must still have its parameters in its vector.

        Raises:
            RuntimeError: the module was flattened, and they are no longer views of its vector.
        """
        params = self.params.current()
        rates = _NO_RATES if self.rates is None else self.rates.current()
        hyper = self.hyper
        if hyper:
            rates = {**rates, **with_prefix(hyper)}
        if check and self.flat is not None:
            self.flat.check(params, rates)
        return params, rates

    def differentiable(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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

    def traced_parameters(self) -> dict[str, Tensor]:
        """The network's parameters by name, while torch.compile traces."""
        return self.params.without_modules() if self.params.recurrent else dict(self.net.named_parameters())

    def modules_replaced(self) -> bool:
        """Whether compiled code that was traced by `traced_parameters` may run with parameters that
        are gone."""
        return self.params.recurrent and self.params.modules_replaced()

    def prepare(
        self,
        params: dict[str, Tensor],
        rates: dict[str, Tensor],
        tensors: Tensors,
        support_per_step: bool = False,
        wrt: frozenset[str] = NOTHING,
        captures: Captures | None = None,
    ) -> Call:
        """A call of the module on its `meta_parameters`, checked and with its backend chosen."""
        module = self.module
        options = self.options(self.who, support_per_step)
        flat = self.flat is None or len(self.flat.names) == len(params)
        frozen = NOTHING
        if "params" in wrt and self.flat is None:
            still = [name for name, value in params.items() if not value.requires_grad]
            frozen = frozenset(still) if 0 < len(still) < len(params) else NOTHING
        given = options, self.net, params, tensors, module.loss, module.query_loss, self.lr_of(rates), wrt
        hyper = self.hyper_of(rates)
        return prepare(*given, prefer_flat=flat, frozen=frozen, captures=captures, hyper=hyper)

    def lr_of(self, rates: dict[str, Tensor], tasks: Tensor | None = None) -> Rates:
        """The rates as an operator takes them, from the learned ones by their keys; with `tasks`,
        of those alone."""
        number = self.number
        lr = self.inner_lrs.as_given(rates) if number is None else number
        return lr if tasks is None else of_tasks(lr, tasks)

    def hyper_of(self, rates: dict[str, Tensor]) -> Hyper:
        """The tensors of the update rule as an operator takes them, out of `meta_parameters`."""
        return without_prefix(rates) if rates else NONE

    def aliases(self) -> Aliases | None:
        """What a loss may read of a flattened module: the parameters, which autograd knows as
        pieces of its vector."""
        flat = self.flat
        if flat is None:
            return None

        def parts() -> list[Tensor]:
            return flat.parts(*self.meta_parameters(check=False))

        return Aliases(parts, lambda: views(flat.vector, parts()))

    def __getstate__(self) -> dict[str, Any]:
        return {"flat": self.flat}


def options_of(module: Any, who: str, support_per_step: bool = False) -> Options:
    """The options of a MAML as they are now.

    Args:
        module: the MAML.
        who: for messages.
        support_per_step: of this call.
    """
    return Options(
        who,
        module.inner_steps,
        module.order,
        module.adapts,
        module.step_weights,
        support_per_step,
        module.update_rule.form,
        module.memory,
        module.batch_stats,
        module.backend,
        module.task_chunk,
        module.support_step_weights,
        module.memory_limit,
    )
