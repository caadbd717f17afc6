"""Every layer kind from its record on Triton: its four functions against `torch.func` on the
record's plain forward."""

from __future__ import annotations

import pytest

from fastmeta.layers.kind import Example
from fastmeta.layers.registry import KINDS
from fastmeta.verify.layer import few, verify_example

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [(kind, example) for kind in KINDS for example in few(kind)]
FIRST = [(kind, record.examples[0]) for kind, record in KINDS.items()]


def _id(value: object) -> str:
    return str(getattr(value, "name", None) or getattr(value, "label", value))


@pytest.mark.parametrize(
    ("dtype", "kind", "example"),
    [("float64", *pair) for pair in EXAMPLES] + [("float32", *pair) for pair in FIRST],
    ids=_id,
)
def test_triton_matches_torch_func(dtype: str, kind: str, example: Example) -> None:
    rows = verify_example(kind, example, "triton", dtype)
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []
