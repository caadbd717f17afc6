"""Cases that several tests of the cuda backend use."""

from functools import partial

from fastmeta.cases import Case
from fastmeta.cases.networks import mlp

#: Too large for one block of an H100, and for two.
TWO = Case(
    "two", partial(mlp, (64, 96, 96, 64, 5), "tanh"), (64,), 1, 3, 2, loss="ce", rates="element", wrt_inputs=False
)
FOUR = Case(
    "four", partial(mlp, (64, 128, 128, 128, 5), "tanh"), (64,), 1, 3, 2, loss="ce", rates="element", wrt_inputs=False
)
