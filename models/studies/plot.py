"""How the figures of all studies look: one size of type, one palette, labels at the lines.

Figures are drawn without pyplot, so nothing is global and no display is needed.  Matplotlib is
imported where it is used: listing the studies works without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, BLACK, GREY = "#56B4E9", "#E69F00", "#222222", "#6B6B6B"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
"""Okabe & Ito 2008: colours that colour-blind readers can tell apart, without the palest; black is
softened, and there is a grey for what is not data."""

SIZE = 10.5
"""Points, in a figure ten inches wide: still readable when a page shows it at half of that."""

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": None,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": BLACK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.dpi": 150.0,
    "savefig.facecolor": "white",
}


def figure(
    columns: int = 1, rows: int = 1, size: tuple[float, float] = (10.0, 4.4), **grid: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` inches and its axes, row by row; ``grid`` goes to Figure.subplots."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        made = Figure(figsize=size, layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False, **grid)
    return made, [*axes.flat]


def title(axes: Axes, text: str) -> None:
    """What a panel says, above its left end."""
    axes.set_title(text, loc="left", fontsize=SIZE + 1.5, fontweight="bold", pad=10.0)


def reference(axes: Axes, y: float) -> None:
    """A dashed line to compare data with."""
    axes.axhline(y, color=GREY, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved as little as their order allows, with at least ``gap`` between any two.

    Least squares under that constraint: in x_i - i·gap it asks for a non-decreasing sequence, which
    pooling neighbours that are out of order gives (isotonic regression).
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[list[float]] = []  # [mean, count]
    for rank, i in enumerate(order):
        pools.append([places[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            total = pools[-1][1] + count
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * count) / total, total]
    level = [mean for mean, count in pools for _ in range(int(count))]
    moved = [0.0] * len(places)
    for rank, i in enumerate(order):
        moved[i] = level[rank] + rank * gap
    return moved


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]], size: float = SIZE) -> None:
    """Write (y, text, colour) outside the right edge, each at its height, none over another.

    Call it when the limits of the y axis are final.
    """
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]  # type: ignore[union-attr]
    gap = 1.35 * size / 72 * abs(high - low) / inches
    heights = spread([y for y, _, _ in labels], gap)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.annotate(
            text,
            (1.0, height),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
        )
