"""Random networks with random options: cpu and torch against the reference in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmeta.cases import Case
from fastmeta.cases.case import RATES
from fastmeta.cases.losses import LOSSES
from fastmeta.cases.networks import ACTIVATIONS
from fastmeta.verify import verify_case

pytestmark = pytest.mark.usefixtures("one_thread")

NO_EXTENSION = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)

CLASSES = 5  # of the losses with class weights


@dataclass(frozen=True)
class Block:
    """One layer of a random network: linear (tied to the one before if it can be), activation,
    perhaps a skip."""

    width: int
    activation: str
    bias: bool
    skip: bool
    tied: bool


class RandomNet(nn.Module):
    """Blocks, and a linear head."""

    def __init__(self, inputs: int, blocks: tuple[Block, ...], outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.activations = nn.ModuleList()
        self.skips = []
        for block in blocks:
            layer = nn.Linear(inputs, block.width, bias=block.bias)
            before = self.layers[-1] if len(self.layers) else None
            if block.tied and before is not None and before.weight.shape == layer.weight.shape:
                layer.weight = before.weight
            self.layers.append(layer)
            self.activations.append(ACTIVATIONS[block.activation]())
            self.skips.append(block.skip and inputs == block.width)
            inputs = block.width
        self.head = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation, skip in zip(self.layers, self.activations, self.skips, strict=True):
            new = activation(layer(x))
            x = x + new if skip else new
        return self.head(x)


WIDTHS = st.sampled_from((1, 2, 3, 5, 7, 8, 13, 16, 17, 33))
BLOCKS = st.lists(
    st.builds(
        Block, WIDTHS, st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.booleans(), st.booleans()
    ),
    max_size=3,
).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A small case; its seed is fixed, hypothesis draws everything else."""
    inputs, blocks = draw(WIDTHS), draw(BLOCKS)
    steps = draw(st.integers(0, 3))
    loss = draw(st.sampled_from([name for name in sorted(LOSSES) if name != "bce_weighted"]))
    return Case(
        "random",
        lambda: RandomNet(inputs, blocks, CLASSES),
        (inputs,),
        tasks=draw(st.integers(1, 4)),
        shots=draw(st.integers(1, 9)),
        queries=draw(st.integers(1, 9)),
        steps=steps,
        loss=loss,
        operator=draw(st.sampled_from(("meta_gradient", "meta_gradient", "inner_sgd"))),
        order=draw(st.sampled_from(("second", "second", "first"))),
        lr=0.01 if loss.endswith("_sum") else 0.05,
        rates=draw(st.sampled_from(RATES)),
        momentum=draw(st.sampled_from((0.0, 0.9))),
        weight_decay=draw(st.sampled_from((0.0, 0.1))),
        step_weights=draw(st.booleans()),
        weighted=draw(st.sampled_from(("", "s", "q", "t", "sqt"))),
        per_task=draw(st.sampled_from(("", "all", "some"))),
        per_step=steps > 0 and draw(st.booleans()),
        memory=draw(st.sampled_from(("auto", "store", "recompute"))),
        kinks=True,
    )


# Always the same examples: a failure must come from the change that is tested.
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NO_EXTENSION), "torch"])
@given(case=cases())
def test_random_network_matches_reference(backend: str, case: Case) -> None:
    rows = verify_case(case, backend, "float64")
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []
