"""The cuda backend through the public API, its kernels compiled as ordinary C++: against the
reference, in value and in every gradient, wherever its memory lies and however many threads a block
has."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from problems import EVERYTHING, assert_same, make_problem
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda import run as runs
from fastmeta.capture.capture import captured
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import quantities

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU"),
]

H100 = launches.EMULATED


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


def _case(case_id: str) -> Case:
    return next(case for case in VERIFICATION if case.id == case_id)


#: Every layer kind, loss family, option and operator at least once;
#: `fastmeta verify --backend cuda` runs all of them.
FLOAT64 = [
    "gelu-3x13x7x2-T3-N7-M5-K2-mse",
    "leaky_relu-3x13x7x2-T3-N7-M5-K2-mse",
    "softplus-3x13x7x2-T3-N7-M5-K2-mse",
    "no_bias-T3-N7-M5-K2-mse",
    "tied-T3-N7-M5-K3-mse-recompute",
    "residual-T3-N7-M5-K2-ce",
    "image-T3-N7-M5-K2-ce",
    "rows-T3-N7-M5-K1-mse",
    "linear-T3-N7-M5-K2-mse",
    "sigmoid_head-T3-N7-M5-K2-mse",
    "bn_input-T2-N4-M3-K2-ce",
    "ln_input-T2-N4-M3-K2-ce",
    "bn_mlp-T3-N7-M5-K3-ce-lr_element_step_task-mu0.9-wd0.05-recompute",
    "ln_mlp-T3-N7-M5-K2-ce-first-step_weights-weights_sqt-own_some",
    "gn_mlp-T3-N7-M5-K2-ce-inner_sgd-lr_head-per_step",
    "bn_gelu_mlp-T3-N33-M21-K2-mse",
    "rows_normed-T3-N7-M5-K2-mse",
    "half_norms-T3-N7-M5-K2-ce",
    "tanh-5x65x17x3-T3-N7-M5-K2-mse",
    "relu-1x40x40x1-T4-N10-M10-K5-mse",
    "tanh-T18-N3-M2-K2-mse",
    "tanh-T3-N33-M21-K2-mse",
    "tanh-T1-N1-M1-K1-mse",
    "tanh-T3-N7-M5-K0-mse",
    "tanh-T3-N7-M5-K2-ce_everything",
    "tanh-T3-N7-M5-K1-ce_masked_mean-weights_sqt",
    "tanh-T3-N7-M5-K2-ce_probabilities_everything",
    "tanh-T3-N7-M5-K1-mse_masked_mean-weights_sqt",
    "tanh-T3-N7-M5-K2-bce_pos_weight",
    "grid-T3-N7-M5-K2-ce_everything-weights_sqt",
    "grid-T3-N7-M5-K2-ce_probabilities_everything-step_weights-weights_sq-per_step",
    "grid-T3-N7-M5-K2-ce_masked_mean-weights_sq0-recompute",
    "sequence-T3-N7-M5-K2-ce_ignored+bce_pos_weight",
    "tanh-T3-N7-M5-K2-mse+huber",
    "tanh-T3-N7-M5-K3-mse-lr_element_step_task-mu0.9-wd0.05-store",
    "tanh-T3-N7-M5-K3-mse-lr_element_step_task-mu0.9-wd0.05-recompute",
    "tanh-T3-N7-M5-K2-ce-step_weights-weights_sqt-per_step-recompute",
    "tanh-T3-N7-M5-K3-mse-first-lr_per_step",
    "tanh-T3-N7-M5-K2-mse-first-mu0.7-wd0.1-step_weights",
    "tanh-T3-N7-M5-K2-mse-lr_head-mu0.5",
    "tanh-T3-N7-M5-K2-mse-first-lr_element-own_some",
    "tanh-T3-N7-M5-K2-mse-inner_sgd-lr_element_step_task-mu0.9-wd0.1-per_step",
    "tanh-T3-N7-M5-K2-ce-inner_sgd-lr_head-weights_s-recompute",
    "tanh-T3-N7-M5-K0-task_forward-own_some",
]
FLOAT32 = [
    "tanh-T3-N7-M5-K2-mse",
    "relu-3x13x7x2-T3-N7-M5-K2-mse",
    "bn_mlp-T3-N7-M5-K2-ce",
    "tanh-T3-N7-M5-K2-ce_smoothed",
    "tanh-T3-N7-M5-K2-mse-lr_element_step_task",
]


@pytest.mark.parametrize(
    ("dtype", "case_id"), [("float64", c) for c in FLOAT64] + [("float32", c) for c in FLOAT32]
)
def test_cuda_matches_reference(dtype: str, case_id: str) -> None:
    _verify(_case(case_id), dtype)


def _verify(case: Case, dtype: str = "float64") -> None:
    rows = verify_case(case, "cuda", dtype)
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []


#: Bytes of shared memory, and what then lies elsewhere.
BUDGETS = {
    "checkpoints": (20_000, {"checkpoints"}),
    "values": (9_000, {"values"}),
    "everything": (2_000, {"theta", "values", "scratch", "adjoint"}),
}


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("where", BUDGETS)
def test_small_shared_memory_matches_reference(
    where: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, elsewhere = BUDGETS[where]
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(budget))
    case = Case(
        where,
        partial(mlp, (6, 17, 13, 5), "tanh"),
        (6,),
        steps=4,
        loss="ce",
        memory=memory,
        step_weights=True,
        rates="tensor",
    )
    problem = problem_of(case, torch.float64, 0)
    plan = runs.make_plan(problem, wanted(case, problem))
    assert plan.shared_bytes <= budget
    found = {area.group for area in plan.areas.values() if area.space != "shared" and area.size}
    assert elsewhere <= found, found
    _verify(case)


def test_input_read_where_the_user_has_it_matches_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(12_000))
    for inputs in (50, 52):  # rows of whole vectors, and not
        case = Case("input", partial(mlp, (inputs, 5, 2), "tanh"), (inputs,), shots=8, queries=20)
        problem = problem_of(case, torch.float32, 0)
        assert runs.make_plan(problem, wanted(case, problem)).areas["input"].space == "user"
        _verify(case, "float32")


SEVERAL = [
    case for case in FLOAT64 if case.startswith(("tied", "residual", "image", "rows", "bn_mlp", "ln_mlp"))
]


@pytest.mark.parametrize("case_id", SEVERAL + FLOAT64[-10:-6])
def test_blocks_of_several_threads_match_reference(case_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "3")
    _verify(_case(case_id))


class Rows(nn.Module):
    """Reshapes between layers, concatenation in both directions, values that are read twice, by one
    layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.head = nn.Linear(3, 4), nn.Linear(6, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]  # [N, 2, 3]
        rows = torch.tanh(self.narrow(x))  # [N, 2, 4]
        flat = self.wide(x.reshape(n, 6)).reshape(n, 1, 4)
        both = torch.cat([rows, flat, rows], 1)  # [N, 5, 4]
        return self.head(torch.cat([torch.sin(both), both], 2).reshape(n, 5, 8))  # [N, 5, 2]


class Normed(nn.Module):
    """An input read in both orders, a norm that two layers read, the same norm twice, and one as
    the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.rows, self.last = nn.BatchNorm1d(3), nn.LayerNorm(4), nn.BatchNorm1d(5)
        self.body, self.head = nn.Linear(4, 7), nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.images(x)  # [N, 3, 4]
        z = self.body(self.rows(y + x) + torch.sin(y))  # [N, 3, 7]
        return self.last(self.head(torch.tanh(self.images(z)).flatten(1)))  # [N, 5]


@pytest.mark.parametrize("rates", ["scalar", "element"])
def test_norms_read_twice_match_reference(rates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "3")
    _verify(Case("normed", Normed, (3, 4), rates=rates, loss="ce", wrt_inputs=True))


@pytest.mark.parametrize("threads", ["1", "3"])
def test_concatenation_and_reshapes_match_reference(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", threads)
    _verify(Case("rows", Rows, (2, 3), wrt_inputs=True))


# ---- the public API


def _data(tasks: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tasks, n, d, generator=generator) for n, d in ((7, 3), (7, 2), (5, 3), (5, 2))]


def test_maml_trains_as_on_the_cpu() -> None:
    grads = {}
    for backend in ("cuda", "cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 2))
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=3, learn_lr="tensor", backend=backend)
        out = maml(*_data())
        out.loss.backward()
        grads[backend] = [out.loss.detach(), *(p.grad for p in maml.parameters())]
        adapted = maml.adapt(*_data()[:2])
        grads[backend] += [*adapted.values(), maml.predict(adapted, _data()[2])]
    for ours, theirs in zip(*grads.values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_flat_gradient_is_one_vector() -> None:
    net = nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 2))
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend="cuda")
    flat = fm.flatten(maml)
    maml(*_data()).loss.backward()
    assert flat.grad is not None
    assert flat.grad.shape == flat.shape
    assert flat.grad.isfinite().all()


def test_non_dense_inputs_match_reference() -> None:
    net = mlp((3, 13, 2), "tanh").double()
    problem = make_problem(net, loss="mse", weighted=True)
    program, _ = captured(net, (3,), torch.float64)
    problem = replace(problem, program=program)
    support = replace(problem.support, x=problem.support.x.mT.contiguous().mT)
    assert not support.x.is_contiguous()
    want = backends.get("reference").solve(problem, EVERYTHING, True)
    assert_same(
        backends.get("cuda").solve(replace(problem, support=support, scratch={}), EVERYTHING, True), want
    )


def test_two_runs_and_any_number_of_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("tanh-T18-N3-M2-K2-mse")
    problem = problem_of(case, torch.float32, 0)
    results = []
    for blocks in (1, 5, 18, 18):
        monkeypatch.setattr(launches._Emulated, "blocks", lambda self, tasks, n=blocks: n)
        results.append(
            quantities(backends.get("cuda").solve(replace(problem, scratch={}), wanted(case, problem), False))
        )
    for result in results:
        assert all(torch.equal(result[key], results[0][key]) for key in results[0])


# ---- what is refused


def test_auto_never_chooses_an_emulated_gpu() -> None:
    maml = fm.MAML(nn.Sequential(nn.Linear(3, 2)), loss="mse", inner_lr=0.1, inner_steps=1)
    assert maml.explain(*_data()).backend == "cpu"


def test_explanation_says_that_it_is_emulated() -> None:
    maml = fm.MAML(nn.Sequential(nn.Linear(3, 2)), loss="mse", inner_lr=0.1, inner_steps=1, backend="cuda")
    text = str(maml.explain(*_data()))
    assert "backend: cuda" in text
    assert "EMULATED on the CPU" in text
    assert re.search(r"one block of 128 threads and \d+ KiB of shared memory a task", text)


@pytest.mark.parametrize(
    ("net", "loss", "reason"),
    [
        (
            nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.Flatten()),
            "mse",
            "conv2d has no kernels",
        ),
        (nn.Sequential(nn.Linear(3, 2)), lambda z, y: (z - y).abs().max(), "is a function of its own"),
        (
            nn.Sequential(nn.Linear(3, 4000), nn.ReLU(), nn.Linear(4000, 2000), nn.Linear(2000, 2)),
            "mse",
            "MiB beside",
        ),
    ],
    ids=["layer", "loss", "size"],
)
def test_rejects_what_it_cannot_run(net: nn.Module, loss: object, reason: str) -> None:
    maml = fm.MAML(net, loss=loss, inner_lr=0.1, inner_steps=3, backend="cuda")
    with pytest.raises(fm.BackendUnavailable, match=reason):
        maml(*_data())


def test_missing_says_why_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTMETA_CUDA_EMULATE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search("no CUDA", backends.get("cuda").missing())


def test_a_class_index_out_of_range_makes_nan() -> None:
    """Looking at it would mean waiting for the device."""
    net = nn.Sequential(nn.Linear(3, 4))
    x, y = torch.randn(2, 5, 3), torch.randint(4, (2, 5))
    y[1, 2] = 9
    out = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (x, torch.zeros_like(y)),
        (x, y),
        loss="cross_entropy",
        lr=0.1,
        steps=1,
        backend="cuda",
    )
    assert out.task_losses.isnan().tolist() == [False, True]


# ---- the plan


def test_sinusoid_fits_twice_into_a_multiprocessor() -> None:
    case = _case("relu-1x40x40x1-T4-N10-M10-K5-mse")
    plan = plans.make_plan(problem_of(case, torch.float32, 0), frozenset({"params"}), H100)
    assert plan.memory == "store"
    assert plan.keep_all
    assert plan.workspace == 0
    assert 2 * (plan.shared_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize("options", ["lr_element_step_task-mu0.9-wd0.05-store", "adamw"])
def test_no_two_areas_overlap(options: str) -> None:
    case = _case(f"tanh-T3-N7-M5-K3-mse-{options}")
    problem = problem_of(case, torch.float32, 0)
    plan = plans.make_plan(problem, wanted(case, problem), H100)
    pieces = {name: area for name, area in plan.areas.items() if area.size}
    apart = {"tangents", "tangent_deltas"}  # and the query's: never at once
    for space in ("shared", "global"):
        areas = sorted(
            (a.at, a.at + a.size) for n, a in pieces.items() if a.space == space and n not in apart
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(areas))
