"""The one case list: it drives the tests, `fastmeta verify` and `fastmeta bench`."""

from fastmeta.cases.case import Case, Instance
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS

__all__ = ["VERIFICATION", "WORKLOADS", "Case", "Instance"]
