"""What the architectures share: the size of their episodes."""

from __future__ import annotations

from functools import partial

from fastmeta.cases.case import Case

#: A case of the architectures: two tasks, three support and two query examples, two inner steps.
small = partial(Case, tasks=2, shots=3, queries=2, steps=2)
