"""Architectures as people publish them, small and written plainly: any of them may be brought by a
user. Each is a `Case`; to add one, add it to the list of its file."""

from fastmeta.cases.architectures import attention, gated, graphs, images, recurrent, tables
from fastmeta.cases.case import Case

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: tuple[Case, ...] = (
    *recurrent.CASES,
    *attention.CASES,
    *gated.CASES,
    *graphs.CASES,
    *images.CASES,
    *tables.CASES,
)
