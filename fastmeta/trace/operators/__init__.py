"""What each operator of PyTorch becomes; importing this fills the table."""

from fastmeta.trace.operators import (  # noqa: F401
    convolution,
    indexing,
    pointwise,
    products,
    reductions,
    shapes,
)
