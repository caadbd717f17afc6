"""The CUDA kernels compiled for GPUs that need not be there: what they take of a multiprocessor,
and the cache."""

from __future__ import annotations

import os
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.skipif(bool(compiler.missing_compiler()), reason=compiler.missing_compiler())

H100 = launches.EMULATED
A100 = plans.Chip(163 << 10)
REGISTERS = 1 << 16  # of a multiprocessor, from sm_80 on

SINUSOID = next(case for case in WORKLOADS["sinusoid"] if case.tasks == 32 and case.steps == 5)
RECOMMENDER = next(case for case in WORKLOADS["recommender"] if case.steps == 5)
EVERYTHING = next(
    case for case in VERIFICATION if case.id == "tanh-T3-N7-M5-K3-mse-lr_element_step_task-mu0.9-wd0.05-store"
)
FIELD = Case("siren", partial(mlp, (2, 256, 256, 3), "sin"), (2,), 16, 1024, 1024, 3, wrt_inputs=False)

WIDE = Case("wide", partial(mlp, (8, 64, 256, 3), "tanh"), (8,), 16, 10, 15, 3, wrt_inputs=False)
MLP = next(case for case in WORKLOADS["mlp"] if case.steps == 5)
MLP_BN = next(case for case in WORKLOADS["mlp-bn"] if case.steps == 5)
NORMED = next(case for case in VERIFICATION if case.label == "rows_normed")

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
GRID = next(case for case in VERIFICATION if case.label == "grid" and case.loss == "ce_masked_mean")
RULES = {case.rule: case for case in reversed(VERIFICATION) if case.rule}
CASES = [SINUSOID, EVERYTHING, RECOMMENDER, FIELD, WIDE, MLP, MLP_BN, NORMED, GRID, *RULES.values()]
#: Case, dtype, architecture: all of them with FASTMETA_EVERY_KERNEL=1, else each case and each
#: architecture.
SPECIALISATIONS = [
    *((SINUSOID, torch.float32, architecture) for architecture in ARCHITECTURES),
    *((EVERYTHING, torch.float32, architecture) for architecture in ("sm_80", "sm_100")),
    (EVERYTHING, torch.float64, "sm_90a"),
    (RECOMMENDER, torch.float32, "sm_90a"),
    (FIELD, torch.float32, "sm_100"),
    (NORMED, torch.float32, "sm_90a"),
    (GRID, torch.float32, "sm_100"),
    *((WIDE, torch.float32, architecture) for architecture in ("sm_80", "sm_100")),
    (MLP, torch.float32, "sm_100"),
    (MLP_BN, torch.float32, "sm_90a"),
    (RULES["adamw"], torch.float32, "sm_80"),
    (RULES["rmsprop"], torch.float64, "sm_100"),
]
if os.environ.get("FASTMETA_EVERY_KERNEL") == "1":
    SPECIALISATIONS = list(product(CASES, (torch.float32, torch.float64), ARCHITECTURES))


def _source(case: Case, dtype: torch.dtype, chip: plans.Chip = H100) -> plans.Plan:
    problem = problem_of(case, dtype, 0)
    return plans.make_plan(problem, wanted(case, problem), chip)


@pytest.mark.parametrize(
    ("case", "dtype", "architecture"),
    SPECIALISATIONS,
    ids=lambda item: item.id if isinstance(item, Case) else str(item).removeprefix("torch."),
)
def test_kernels_compile_without_spills(case: Case, dtype: torch.dtype, architecture: str) -> None:
    chip = A100 if architecture == "sm_80" else H100
    _assert_no_spills(_source(case, dtype, chip), chip, architecture)


@pytest.mark.parametrize(("setting", "architecture"), [("high", "sm_90a"), ("medium", "sm_80")])
def test_lower_precisions_compile_without_spills(setting: str, architecture: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        chip = A100 if architecture == "sm_80" else H100
        _assert_no_spills(_source(WIDE, torch.float32, chip), chip, architecture)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100"])
def test_clusters_compile_without_spills(architecture: str) -> None:
    chip = plans.Chip(64 << 10, cluster=4)
    plan = _source(WIDE, torch.float32, chip)
    assert plan.ranks > 1
    _assert_no_spills(plan, chip, architecture)


def _assert_no_spills(plan: plans.Plan, chip: plans.Chip, architecture: str) -> None:
    _, report = compiler.compile_for(plans.source(plan), architecture)
    found = compiler.resources(report)
    assert found.spills == 0, found
    assert found.registers * max(plan.threads, 128) <= REGISTERS
    assert plan.shared_bytes <= chip.shared_bytes
    # sine and cosine keep a table for huge arguments on the stack; nothing else may be there
    assert found.stack <= (64 if "sin(" in _functions(plan) else 0), found


def _functions(plan: plans.Plan) -> str:
    return " ".join(f"{layer.function}(" for layer in plan.layers)


def test_resources_are_read_from_a_report() -> None:
    report = (
        "Used 40 registers\n 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "Used 9 registers\n"
    )
    assert compiler.resources(report) == compiler.Resources(40, 8, 16)
    with pytest.raises(ValueError, match="no resources"):
        compiler.resources("all is well")


def test_a_broken_source_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"did not compile a kernel for sm_90a(.|\n)*undefined"):
        compiler.compile_for("int f() { return undefined_name; }", "sm_90a")


@pytest.mark.parametrize(
    ("kind", "function"), [("conv3d", "sin"), ("elementwise", "no_function"), ("elementwise", "")]
)
def test_what_there_are_no_kernels_for_does_not_compile(kind: str, function: str) -> None:
    plan = _source(FIELD, torch.float32)
    last = next(layer for layer in plan.layers if layer.kind == "elementwise")
    last.kind, last.function = kind, function
    with pytest.raises(RuntimeError, match=kind if kind == "conv3d" else function or "incomplete"):
        compiler.compile_for(plans.source(plan), "sm_90a")


def test_compiled_kernels_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    compiled = []

    def compile_for(source: str, architecture: str) -> tuple[bytes, str]:
        compiled.append(architecture)
        return source.encode() + architecture.encode(), ""

    monkeypatch.setattr(compiler, "compile_for", compile_for)
    for _ in range(2):
        assert compiler.cubin("a", "sm_80") == b"asm_80"
        assert compiler.cubin("a", "sm_90a") == b"asm_90a"
        assert compiler.cubin("b", "sm_80") == b"bsm_80"
    assert compiled == ["sm_80", "sm_90a", "sm_80"]
    monkeypatch.setattr(compiler, "_headers_digest", lambda: "other sources")
    compiler.cubin("a", "sm_80")
    assert len(compiled) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_kernels_run_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "compile_for", lambda source, architecture: (source.encode(), ""))
    with pytest.warns(UserWarning, match="machine code cannot be kept"):
        assert compiler.cubin("a", "sm_90a") == b"a"
