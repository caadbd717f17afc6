"""The plots of `fastmeta train`; without matplotlib a message says that there is none."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from fastmeta.cli.files import write_whole


def sinusoid(
    path: Path,
    console: Console,
    *,
    x: Tensor,
    truth: Tensor,
    support: tuple[Tensor, Tensor],
    curves: Mapping[int, Tensor],
    mse: Sequence[float],
) -> None:
    """Tasks with their fits, and the error over the inner steps.

    Args:
        path: the PNG file.
        console: gets the message.
        x: [X].
        truth: [tasks, X].
        support: x and y, each [tasks, N].
        curves: inner steps -> predictions [tasks, X].
        mse: mean query MSE after 0, 1, ... inner steps.
    """
    figure = _figure(len(truth) + 1, console)
    if figure is None:
        return
    *panels, error = figure.axes
    for task, axes in enumerate(panels):
        axes.plot(x, truth[task], color="0.6", linewidth=3, label="truth")
        for steps, y in curves.items():
            axes.plot(x, y[task], label=f"{steps} inner steps")
        axes.plot(support[0][task], support[1][task], "k^", markersize=5, label="support set")
        axes.set_title(f"test task {task}")
    panels[0].legend(fontsize="small")
    error.plot(range(len(mse)), mse, "o-")
    error.set(xlabel="inner steps", title="mean query MSE")
    error.set_ylim(bottom=0)
    _save(figure, path, console)


def accuracy(
    path: Path,
    console: Console,
    *,
    logged: Sequence[tuple[int, float]],
    accuracies: Sequence[tuple[float, float]],
    chance: float,
) -> None:
    """The training loss, and the test accuracy over the inner steps.

    Args:
        path: the PNG file.
        console: gets the message.
        logged: iterations and mean training losses.
        accuracies: (mean, half width of the 95 % interval) after 0, 1, ... inner steps, in 0 .. 1.
        chance: accuracy of guessing.
    """
    figure = _figure(2, console)
    if figure is None:
        return
    left, right = figure.axes
    left.plot([iteration for iteration, _ in logged], [loss for _, loss in logged])
    left.set(xlabel="iteration", title="query loss in meta-training")
    means, widths = zip(*accuracies, strict=True)
    right.errorbar(range(len(means)), means, yerr=widths, fmt="o-", capsize=3)
    right.axhline(chance, color="0.6", linestyle="--", label="chance")
    right.set(xlabel="inner steps", title="query accuracy on held-out alphabets", ylim=(0, 1))
    right.legend(fontsize="small")
    _save(figure, path, console)


def episode(
    path: Path,
    console: Console,
    *,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    guesses: Mapping[int, Tensor],
) -> None:
    """A task's drawings, a class in each row: a support drawing, then queries with predictions.

    Args:
        path: the PNG file.
        console: gets the message.
        support: drawings [N, 1, H, W] and classes [N].
        query: drawings [M, 1, H, W] and classes [M].
        guesses: inner steps -> predicted classes [M].
    """
    ways, most = int(support[1].max()) + 1, 6
    figure = _figure(1 + most, console, rows=ways, size=1.3)
    if figure is None:
        return
    panels = [figure.axes[way * (1 + most) : (way + 1) * (1 + most)] for way in range(ways)]
    for axes in figure.axes:
        axes.set_axis_off()
    for way, row in enumerate(panels):
        row[0].imshow(support[0][support[1] == way][0, 0], cmap="gray_r")
        row[0].set_title(f"class {way}", fontsize="small")
        chosen = (query[1] == way).nonzero().flatten()[:most].tolist()
        for axes, at in zip(row[1:], chosen, strict=False):
            axes.imshow(query[0][at, 0], cmap="gray_r")
            taken = [int(guess[at]) for guess in guesses.values()]
            right = taken[-1] == way
            axes.set_title(" → ".join(map(str, taken)), fontsize="small", color="green" if right else "red")
    steps = " and ".join(map(str, guesses))
    figure.suptitle(
        f"support drawing, then query drawings: class found after {steps} inner steps", fontsize="small"
    )
    _save(figure, path, console)


def _figure(panels: int, console: Console, rows: int = 1, size: float = 4) -> Any:
    """A figure with rows of panels, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'fastmeta\\[plot]')")
        return None
    # Figure itself, not pyplot: no window system is asked for, whatever the user's backend is.
    figure = Figure(figsize=(size * panels, 0.9 * size * rows), layout="constrained")
    figure.subplots(rows, panels)
    return figure


def _save(figure: Any, path: Path, console: Console) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_whole(path, image.getvalue())
    console.print(f"plot: {escape(str(path))}")
