"""Embeddings on the machine: steps on the rows that a task names give what steps on all rows do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.backends.machine import run
from fastmeta.backends.machine.choice import forced

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = ("support_y", "query_y", "support_weights", "query_weights")


class Fields(nn.Module):
    """An embedding for each column of the input, a linear layer, and a table that is read twice."""

    def __init__(self, rows: list[int], width: int, **options: Any) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width, **options) for n in rows)
        self.mix = nn.Linear(width, width)
        self.end = nn.Linear(width * len(rows), 1)

    def forward(self, ids: Tensor) -> Tensor:
        found = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        found[0] = found[0] * self.mix(self.tables[0](ids[:, -1])).tanh()
        return self.end(torch.cat(found, -1).tanh())


class Whole(Fields):
    """All of a table is used besides."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.tables[0].weight.pow(2).mean()


class Indexed(Fields):
    """Rows by indices, which count from the end where they are below zero."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.end(torch.cat([t.weight[ids[:, i]] for i, t in enumerate(self.tables)], -1).tanh())


def _small(job: run.Job) -> int:
    return 0 if job.plan.few is None else len(job.plan.few.tables)


def _both(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, params: dict[str, Tensor], *sets: Any, **options: Any
) -> int:
    """How many tables were small ones, once the answer is the reference's."""
    jobs: list[run.Job] = []
    solve = run.Job.run

    def noted(job: run.Job, problem: Any) -> Any:
        jobs.append(job)
        return solve(job, problem)

    expected = fm.meta_gradient(net, params, *sets, loss="mse", backend="reference", **options)
    with monkeypatch.context() as patch:
        patch.setattr(run.Job, "run", noted)
        patch.setattr(run, "POISON", True)
        found = fm.meta_gradient(net, params, *sets, loss="mse", backend="machine", **options)
    pairs = [("loss", found.loss, expected.loss), ("output", found.output, expected.output)]
    pairs += [(n, found.grads[n], g) for n, g in (expected.grads or {}).items()]  # type: ignore[index]
    pairs += [(n, getattr(found, n), getattr(expected, n)) for n in SETS]
    if isinstance(expected.lr, dict):
        pairs += [(f"lr {n}", found.lr[n], rate) for n, rate in expected.lr.items()]  # type: ignore[index]
    else:
        pairs.append(("lr", found.lr, expected.lr))
    for name, own, other in pairs:
        if other is None:
            assert own is None, name
            continue
        assert own.shape == other.shape, name
        assert (own - other).norm() <= 1e-9 * other.norm() + 1e-13, (name, (own - other).norm())
    return _small(jobs[-1])


def _draw(seed: int) -> tuple[Any, ...]:
    """A network, its parameters, sets and options at random."""
    draw = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    fields, width = int(draw.integers(1, 4)), int(draw.choice([1, 3, 16, 17]))
    rows = [int(n) for n in draw.choice([1, 5, 40, 300], fields)]
    padding = {"padding_idx": 0} if draw.random() < 0.3 else {}
    net = Fields(rows, width, **padding).double()
    tasks, shots, queries, steps = (int(draw.integers(1, n)) for n in (20, 6, 5, 4))
    few = draw.random() < 0.4  # so that many are named twice

    def data(n: int) -> tuple[Tensor, Tensor]:
        columns = [torch.randint(0, min(3, r) if few else r, (tasks, n), generator=generator) for r in rows]
        columns.append(torch.randint(0, min(3, rows[0]) if few else rows[0], (tasks, n), generator=generator))
        y = torch.randn(tasks, n, 1, generator=generator, dtype=torch.float64)
        return torch.stack(columns, -1), y

    params: dict[str, Tensor] = {}
    for name, value in net.named_parameters():
        shared = value.detach()
        own = draw.random() < 0.2
        params[name] = shared + 0.1 * torch.randn(tasks, *shared.shape, dtype=shared.dtype) if own else shared
    lr: Any = 0.3
    if draw.random() < 0.5:
        lr = {}
        for name, value in net.named_parameters():
            form = draw.integers(0, 5)
            lead = (steps if form == 1 else 1, tasks if form == 2 else 1)
            inner = value.shape if form == 3 else (1,) * value.dim()
            rate = 0.1 + 0.2 * torch.rand(*lead, *inner, generator=generator, dtype=torch.float64)
            lr[name] = 0.2 if form == 4 else rate
    options: dict[str, Any] = {"lr": lr, "steps": steps}
    if draw.random() < 0.5:
        options["update_rule"] = fm.SGD(momentum=0.5, weight_decay=0.1)
    if draw.random() < 0.3:
        options["step_weights"] = [float(w) for w in draw.random(steps + 1)]
    if draw.random() < 0.3:
        options["task_weights"] = torch.rand(tasks, generator=generator, dtype=torch.float64)
    if draw.random() < 0.3:
        options["order"] = "first"
    options["memory"] = str(draw.choice(["store", "recompute"]))
    options["wrt"] = ("params", "lr", "support_y", "query_y")
    return net, params, data(shots), data(queries), options


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_random_networks_match_the_reference(monkeypatch: pytest.MonkeyPatch, lanes: bool) -> None:
    small = 0
    for seed in range(24):
        net, params, support, query, options = _draw(seed)
        with forced(lanes):
            small += _both(monkeypatch, net, params, support, query, **options)
    assert small > 12


def _net(kind: type[Fields] = Fields, rows: tuple[int, ...] = (50, 60)) -> tuple[Fields, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = kind(list(rows), 3).double()
    return net, {name: value.detach() for name, value in net.named_parameters()}


def _sets(ids: Tensor, others: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def y(x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:2], 1, generator=generator, dtype=torch.float64)

    return (ids, y(ids)), (others, y(others))


def test_only_the_rows_that_a_task_names_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    net, params = _net()
    ids = torch.tensor([[[1, 2, 1], [1, 2, 3]], [[49, 0, 1], [7, 59, 1]]])
    sets = _sets(ids, ids[:, :1])
    assert _both(monkeypatch, net, params, *sets, lr=0.1, steps=2) == 2
    grads = fm.meta_gradient(net, params, *sets, loss="mse", lr=0.1, steps=2, backend="machine").grads
    assert grads is not None
    touched = grads["tables.0.weight"].abs().sum(1).nonzero().flatten().tolist()
    assert touched == [1, 3, 7, 49]


@pytest.mark.parametrize("all_rows", [False, True])
def test_all_rows_named(monkeypatch: pytest.MonkeyPatch, all_rows: bool) -> None:
    """A table is small only where a task cannot name more than half of its rows."""
    net, params = _net(rows=(8, 8))
    n = 4 if all_rows else 1
    ids = torch.arange(2 * n * 3).reshape(2, n, 3) % 8
    small = _both(monkeypatch, net, params, *_sets(ids, ids.flip(1)), lr=0.1, steps=2)
    assert small == (0 if all_rows else 2)


def test_what_reads_all_of_a_table_keeps_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net, params = _net(Whole)
    ids = torch.tensor([[[1, 2, 1]], [[49, 0, 1]]])
    assert _both(monkeypatch, net, params, *_sets(ids, ids), lr=0.1, steps=2) == 1


def test_indices_below_zero_count_from_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    net, params = _net(Indexed)
    ids = torch.tensor([[[-1, 2], [49, -60]], [[-50, 0], [0, 59]]])
    assert _both(monkeypatch, net, params, *_sets(ids, ids), lr=0.1, steps=2) == 2


def test_a_set_for_each_step_keeps_tables_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net, params = _net()
    ids = torch.randint(0, 50, (2, 3, 2, 3), generator=torch.Generator().manual_seed(0))
    support = ids, torch.randn(2, 3, 2, 1, dtype=torch.float64)
    query = ids[:, 0], torch.randn(2, 2, 1, dtype=torch.float64)
    assert _both(monkeypatch, net, params, support, query, lr=0.1, steps=3, support_per_step=True) == 0


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("row", [50, -1, 1 << 40])
def test_a_row_out_of_range_is_an_error(where: int, row: int) -> None:
    net, params = _net()
    good = torch.zeros(2, 4, 3, dtype=torch.int64)
    sets = _sets(good, good.clone())
    options: dict[str, Any] = {"loss": "mse", "lr": 0.1, "steps": 1, "backend": "machine"}
    before = fm.meta_gradient(net, params, *sets, **options)
    sets[where][0][1, 2, 0] = row
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        fm.meta_gradient(net, params, *sets, **options)
    sets[where][0][1, 2, 0] = 0
    assert torch.equal(fm.meta_gradient(net, params, *sets, **options).loss, before.loss)


def test_adapted_parameters_have_all_rows() -> None:
    net, params = _net()
    ids = torch.zeros(2, 4, 3, dtype=torch.int64)
    (x, y), _ = _sets(ids, ids)
    adapted = [
        fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2, backend=backend)
        for backend in ("machine", "reference")
    ]
    for name, value in adapted[1].items():
        assert torch.allclose(adapted[0][name], value, rtol=1e-9, atol=1e-12)


def test_explain_says_how_many_rows_take_part() -> None:
    net, _ = _net()
    ids = torch.zeros(2, 4, 3, dtype=torch.int64)
    (x, y), (query_x, query_y) = _sets(ids, ids)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend="machine")
    lines = str(maml.explain(x, y, query_x, query_y))
    # of two columns of four indices each in both sets, of one column
    assert "tables: at most 16 of 50 rows, 8 of 60 rows take part in a task" in lines


def test_bits_do_not_depend_on_threads() -> None:
    net, params = _net()
    ids = torch.randint(0, 50, (40, 4, 3), generator=torch.Generator().manual_seed(0))
    sets, found = _sets(ids, ids.flip(0)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fm.meta_gradient(net, params, *sets, loss="mse", lr=0.1, steps=2, backend="machine"))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert torch.equal(found[0].loss, other.loss)
        for name, value in (found[0].grads or {}).items():
            assert torch.equal(value, (other.grads or {})[name])


def test_functional_embeddings_and_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bag is a mean of rows."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(70, 4))
            self.end = nn.Linear(4, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.end(F.embedding(ids, self.weight).mean(1))

    torch.manual_seed(0)
    net = Bag().double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    ids = torch.randint(0, 70, (3, 4, 3), generator=torch.Generator().manual_seed(0))
    assert _both(monkeypatch, net, params, *_sets(ids, ids[:, :2]), lr=0.1, steps=2) == 1
