"""The chart: milliseconds of every peer on every case, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmeta.benchmark.peers import NOOP
from fastmeta.benchmark.rows import Row


def write_chart(path: Path, rows: Sequence[Row]) -> None:
    """Horizontal bars, one panel a case, the fastest on top, each with its median and its ratio to
    fastmeta.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.status == "timed" and row.peer != NOOP]
    cases = list(dict.fromkeys(row.case for row in timed))
    if not cases:
        return
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.5 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        bars = sorted((row for row in timed if row.case == case), key=lambda row: -row.median_ms)
        colours = ["#d95f02" if row.peer.startswith("fastmeta") else "#7f9fbf" for row in bars]
        medians = [row.median_ms for row in bars]
        spread = [[row.median_ms - row.p20_ms for row in bars], [row.p80_ms - row.median_ms for row in bars]]
        axis.barh([row.peer for row in bars], medians, xerr=spread, color=colours, ecolor="#444444")
        for i, row in enumerate(bars):
            ratio = "" if row.ratio != row.ratio else f"  {row.ratio:.1f}x"
            axis.text(row.p80_ms * 1.1, i, f"{row.median_ms:.3g} ms{ratio}", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 12)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("milliseconds a meta-gradient (median; bars p20 to p80)", fontsize=8)
        axis.tick_params(labelsize=8)
    first = timed[0]
    device, torch_version = (first.facts.get(name, "") for name in ("device", "torch"))
    about = f"{device}, {first.threads} threads, float32, torch {torch_version}"
    figure.suptitle(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
