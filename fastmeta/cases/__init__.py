"""The one case list: it drives the tests, `fastmeta verify` and `fastmeta bench`.

The cases of a layer kind stand in its record (`fastmeta.layers`), those of options, losses and
operators in `verification`, which collects all of them; what is timed is in `workloads`.
"""

from fastmeta.cases.case import Case, Instance

__all__ = ["Case", "Instance"]
