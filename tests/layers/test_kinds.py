"""Every layer kind from its record: each example of it on every backend, its four functions against
`torch.func` on the record's plain forward.

Triton's part is in tests/backends/interpreted/test_kinds.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.backends import cuda
from fastmeta.backends.cuda import compile as compiler
from fastmeta.capture.capture import captured
from fastmeta.capture.kinds import CALLS, MODULES
from fastmeta.graph.program import Layer
from fastmeta.layers.functions import FUNCTIONS
from fastmeta.layers.kind import Example
from fastmeta.layers.registry import KINDS, kind_of
from fastmeta.verify import rule
from fastmeta.verify.layer import TASKS, examples, few, probe, verify_example
from fastmeta.verify.quantities import Key, groups

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [(kind, example) for kind in KINDS for example in examples(kind)]
FEW = [(kind, example) for kind in KINDS for example in few(kind)]
QUANTITIES = ("forward", "vjp", "vjp_step", "jvp", "jvp_of_vjp")


def _id(value: object) -> str:
    return str(getattr(value, "name", None) or getattr(value, "label", value))


each = pytest.mark.parametrize(("kind", "example"), EXAMPLES, ids=_id)
emulated = pytest.mark.parametrize(("kind", "example"), FEW, ids=_id)


# ---- the four functions


@pytest.mark.skipif(os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@each
def test_cpu_matches_torch_func(kind: str, example: Example, dtype: str) -> None:
    _verify(kind, example, "cpu", dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@each
def test_torch_matches_torch_func(kind: str, example: Example, dtype: str) -> None:
    _verify(kind, example, "torch", dtype)


@pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU")
@emulated
def test_cuda_matches_torch_func(kind: str, example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    files = compiler.source_folder() / "cuda" / "layers"
    kinds = [layer.kind for layer in probe(example).program.layers]
    without = [name for name in kinds if not (files / f"{name}.h").exists()]
    if without:
        (row,) = verify_example(kind, example, "cuda", "float64")
        assert (row.skipped, row.note) == (True, f"{without[0]} has no kernels")
        return
    _verify(kind, example, "cuda", "float64")


def _verify(kind: str, example: Example, backend: str, dtype: str) -> None:
    rows = verify_example(kind, example, backend, dtype)
    assert {row.quantity.partition(" ")[0] for row in rows} == set(QUANTITIES), rows[0].note
    assert [str(row) for row in rows if row.skipped or not row.passed] == []


# ---- what the comparison can find


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantity_of_a_kind_is_there_to_be_wrong(kind: str) -> None:
    """Where all examples had a zero, nothing could be found: only what is linear in all of its
    inputs has no second derivative."""
    norms = [_norms(probe(example).truth) for example in examples(kind)]
    largest = {quantity: max(norm[quantity] for norm in norms) for quantity in QUANTITIES}
    curved = KINDS[kind].family in ("bilinear", "norm", "pointwise")
    for quantity in QUANTITIES if curved else QUANTITIES[:-1]:
        assert largest[quantity] > 0.1, quantity


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_sign_error_fails(quantity: str) -> None:
    truth = probe(KINDS["conv2d"].examples[0]).truth
    wrong = {key: -value if key[0] == quantity else value for key, value in truth.items()}
    for dtype in (torch.float64, torch.float32):
        found = rule.errors(wrong, truth, dtype)
        assert {name.partition(" ")[0] for name, error in found.items() if not error < 1} == {quantity}


def test_what_a_backend_leaves_out_fails() -> None:
    truth = probe(KINDS["linear"].examples[0]).truth
    without = {key: value for key, value in truth.items() if key[0] != "jvp"}
    assert not all(error <= rule.FLOAT64 for error in rule.errors(without, truth, torch.float64).values())


def _norms(truth: dict[Key, Tensor]) -> dict[str, float]:
    return {
        group: sum(float(truth[key].square().sum()) for key in keys) ** 0.5
        for group, keys in groups(truth).items()
    }


# ---- the records


@each
def test_an_example_is_what_its_module_computes(kind: str, example: Example) -> None:
    """The plain forward against the module itself; and the captured layer fits its record."""
    of = probe(example)
    layers = of.program.layers
    assert kind in [layer.kind for layer in layers]
    for t in range(TASKS):
        state = {**dict(of.net.named_buffers()), **of.task(t)}
        out = torch.func.functional_call(of.net, state, (torch.eye(3, dtype=torch.float64),))
        torch.testing.assert_close(of.truth["forward", ""][t], out, rtol=1e-12, atol=1e-12)
    for layer in layers:
        own = kind_of(layer)
        assert len(layer.inputs) == own.inputs
        assert len(layer.params) == len(own.params)
        assert all(name is not None for name in layer.params[: own.required])
        assert own.constants[0] <= len(layer.constants) <= own.constants[1]


def test_every_function_is_tested_with_all_its_constants() -> None:
    seen = {
        (layer.function, layer.constants)
        for example in KINDS["elementwise"].examples
        for layer in probe(example).program.layers
        if layer.kind == "elementwise"
    }
    assert {function for function, _ in seen} == set(FUNCTIONS)
    for row in FUNCTIONS.values():
        for constants in row.tested if row.name != "affine" else ():
            assert (row.name, constants or tuple(row.constants.values())) in seen


def test_every_capture_of_a_record_is_registered() -> None:
    for kind in KINDS.values():
        assert kind.modules.keys() <= MODULES.keys()
        assert (kind.functions | kind.methods).keys() <= CALLS.keys()


def test_piecewise_linear_functions_have_no_second_derivative() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64) + 0.01
    for row in FUNCTIONS.values():
        for constants in row.tested:
            second = _derivative(_derivative(row.forward))(x, *constants)
            zero = bool((second == 0).all())
            assert zero == row.piecewise_linear or constants == (0.0,), row.name


def test_functions_told_by_their_output_are() -> None:
    """Points of one value have one derivative: of a grid, those whose values are alike."""
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64) + 1e-4
    for row in FUNCTIONS.values():
        for constants in row.tested:
            if not row.told_by_output(constants):
                continue
            y, first = row.forward(x, *constants), _derivative(row.forward)(x, *constants)
            order = y.argsort()
            y, first = y[order], first[order]
            same = (y[1:] - y[:-1]).abs() < 1e-9
            assert not ((first[1:] - first[:-1]).abs()[same] > 1e-6).any(), row.name


def _derivative(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def derived(x: Tensor, *constants: float) -> Tensor:
        return torch.func.grad(lambda inputs: function(inputs, *constants).sum())(x)

    return derived


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="no layer kind is called 'other'"):
        kind_of(Layer("other", (0,), (3,)))
    layer = Layer("elementwise", (0,), (3,), function="other")
    with pytest.raises(ValueError, match="no function is called 'other'"):
        KINDS["elementwise"].forward(layer, {}, torch.ones(1, 3))


@pytest.mark.skipif(os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension")
def test_the_engine_counts_as_the_records_do() -> None:
    """What the extension says of the kinds that it was built with."""
    engine = pytest.importorskip("fastmeta._C")
    known = engine.kinds()
    assert set(known) <= set(KINDS)
    for name, counts in known.items():
        kind = KINDS[name]
        assert counts == (kind.inputs, *kind.constants, len(kind.params), kind.required), name
    assert set(engine.functions()) <= set(FUNCTIONS)
    assert cuda._known()[1] == set(engine.functions())
    assert backends.get("cpu").missing() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_cases_of_its_own(kind: str) -> None:
    cases = list(KINDS[kind].cases())
    assert cases
    programs = [captured(case.make(), case.input_shape, torch.float32, case.batch_stats)[0] for case in cases]
    for case, program in zip(cases, programs, strict=True):
        assert program is not None, case.id
    assert any(layer.kind == kind for program in programs for layer in program.layers)
