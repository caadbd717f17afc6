"""The Triton backend against the float64 reference, in value and in every gradient, on cases that
reach every kernel.

`TRITON_INTERPRET=1 fastmeta verify --backend triton` runs all cases.
"""

from __future__ import annotations

import pytest

from fastmeta.cases import Case
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify import verify_case

pytestmark = pytest.mark.usefixtures("one_thread")

#: Too large for an interpreter.
_LARGE = ("wide", "300x", "conv_large", "ln_last", "64x64", "65x17", "48x1", "7x100", "1x40x40x1")
#: Nothing but kernels that other cases reach, in another order or with other tails.
_LIKE_OTHERS = (
    "ln_mlp gn_mlp bn_relu_mlp bn_plain gn1_plain in gn_pool bn_pool gn_relu gn_relu_pool first_gn".split()
)
_LIKE_OTHERS += "conv_gray conv_winograd conv_winograd_valid".split()
_BY_LABEL = {
    case.label: case
    for case in reversed(VERIFICATION)
    if case.label not in _LIKE_OTHERS and not any(name in case.id for name in _LARGE)
}
_BY_LOSS = {
    (case.loss, case.query_loss): case
    for case in reversed(VERIFICATION)
    if case.label == "tanh" and case.weighted == "sqt" and case.steps == 1
}
_OPTIONS = (
    "K3-mse-lr_element_step_task-mu0.9-wd0.05-recompute",
    "K3-mse-lr_element_step_task-mu0.9-wd0.05-store",
    "K2-ce-step_weights-weights_sqt-per_step-recompute",
    "K2-ce-step_weights-weights_sqt-per_step-store",
    "K2-mse-lr_per_step",
    "K2-mse-lr_head-mu0.5",
    "K3-mse-first-lr_tensor",
    "K2-mse-first-mu0.7-wd0.1-step_weights",
    "T3-N7-M5-K0-mse-first",
    "T1-N1-M1-K1-mse",
    "T18-N3-M2-K2-mse",
    "K2-mse-own_all",
    "K2-mse-first-lr_element-own_some",
    "K2-mse-inner_sgd-own_some",
    "K2-ce-inner_sgd-lr_head-weights_s-recompute",
    "K0-task_forward-own_some",
    "tied-T3-N7-M5-K3-mse-recompute",
    "K2-mse_masked_mean-weights_sq0",
    "K2-ce_masked_mean-weights_sq0-recompute",
    "K2-ce_probabilities_everything-step_weights-weights_sq-per_step",
)
_BY_OPTION = [next(case for case in VERIFICATION if case.id.endswith(name)) for name in _OPTIONS]
CASES = list(dict.fromkeys([*_BY_LABEL.values(), *_BY_LOSS.values(), *_BY_OPTION]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_matches_reference(case: Case) -> None:
    rows = verify_case(case, "triton", "float64")
    assert rows
    assert not any(row.skipped for row in rows), rows[0].note
    assert [str(row) for row in rows if not row.passed] == []


_SMOOTH = [case for case in CASES if not case.kinks][::8]


@pytest.mark.parametrize("case", _SMOOTH, ids=lambda case: case.id)
def test_float32_is_as_exact_as_pytorch(case: Case) -> None:
    assert [str(row) for row in verify_case(case, "triton", "float32") if not row.passed] == []
