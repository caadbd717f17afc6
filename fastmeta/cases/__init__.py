"""The one case list: it drives the tests, `fastmeta verify` and `fastmeta bench`."""

from typing import TYPE_CHECKING, Any

from fastmeta.cases.case import Case, Instance

if TYPE_CHECKING:
    from fastmeta.cases.verification import VERIFICATION
    from fastmeta.cases.workloads import WORKLOADS

__all__ = ["VERIFICATION", "WORKLOADS", "Case", "Instance"]


def __getattr__(name: str) -> Any:
    """The lists, collected when they are first asked for: the layer kinds, which make most of the
    cases, import from this package."""
    if name == "VERIFICATION":
        from fastmeta.cases.verification import VERIFICATION

        return VERIFICATION
    if name == "WORKLOADS":
        from fastmeta.cases.workloads import WORKLOADS

        return WORKLOADS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
