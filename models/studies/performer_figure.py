"""The figure of the study ``performer``: maps of the kernel's error, convergence, bias, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"trigonometric": plot.ORANGE, "positive": plot.BLUE, "hyperbolic": plot.GREEN}
BARS = (
    plot.BLUE, plot.ORANGE, plot.YELLOW, plot.PINK, plot.GREY, plot.SKY, plot.GREEN,
)  # fmt: skip
LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def draw(
    series: dict[str, Any],
    norms: Sequence[float],
    angles: Sequence[float],
    sizes: Sequence[int],
) -> Figure:
    """Four maps above; below convergence at two sizes of logits, bias, and cost."""
    figure, axes = plot.figure(5, 2, size=(24.0, 9.0))
    image: Any = None
    for place, (name, maps) in zip(axes[:4], series["kernel"].items(), strict=True):
        image = draw_map(place, maps, norms, angles)
        plot.title(place, f"e^(q·k) by {name} features")
    axes[0].set_ylabel("length of q and of k")
    draw_bias(axes[4], series["bias"], sizes)
    bar = figure.colorbar(image, ax=axes[3])
    bar.ax.set_title("log₁₀", fontsize=plot.SIZE - 1)
    bar.outline.set_visible(False)  # type: ignore[operator]
    for place, (deviation, lines) in zip(axes[5:8], series["attention"].items(), strict=True):
        draw_convergence(place, lines)
        if place is axes[5]:
            place.legend(frameon=False, fontsize=plot.SIZE - 2, loc="lower left")
        plot.title(place, f"Attention, logits of deviation {deviation}")
    draw_leak(axes[8], series["leak"])
    draw_cost(axes[9], series["cost"])
    return figure


def draw_map(
    axes: Axes, maps: dict[str, Any], norms: Sequence[float], angles: Sequence[float]
) -> Any:
    """What was measured as colours, and lines of what theory says."""
    measured, theory = (np.array(maps[name]) for name in ("measured", "theory"))
    image = axes.pcolormesh(
        angles, norms, measured, cmap="RdBu_r", vmin=-3.0, vmax=3.0, shading="nearest"
    )
    lines = axes.contour(angles, norms, theory, levels=LEVELS, colors=plot.BLACK, linewidths=1.0)
    axes.clabel(lines, fmt=lambda level: f"{level:.0f}", fontsize=plot.SIZE - 2)
    axes.set_xticks([0, 45, 90, 135, 180])
    axes.set_xlabel("angle between q and k, degrees")
    axes.grid(False)
    return image


def draw_convergence(axes: Axes, lines: dict[str, list[Any]]) -> None:
    """Medians and quartiles over the number of features, both axes logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("features")
    axes.set_ylabel("error of the output ÷ its length")
    axes.set_ylim(0.003, 30.0)
    for name, rows in lines.items():
        feature, law = name.split(", ")
        count, low, middle, high = (np.array(column) for column in zip(*rows, strict=True))
        style = "o-" if law == "orthogonal" else "--"
        axes.plot(count, middle, style, color=COLOURS[feature], markersize=4, label=name)
        axes.fill_between(count, low, high, color=COLOURS[feature], alpha=0.12, linewidth=0)
    axes.axvline(64, color=plot.GREY, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
    axes.annotate("4 d", (64, 30.0), (4, -12), textcoords="offset points", color=plot.GREY)


def draw_bias(axes: Axes, bias: dict[str, list[float]], sizes: Sequence[int]) -> None:
    """Bars around 1: the mean estimate over the truth."""
    width = 0.8 / len(bias)
    for k, (name, ratios) in enumerate(bias.items()):
        places = np.arange(len(sizes)) + width * (k - (len(bias) - 1) / 2)
        axes.bar(places, np.array(ratios) - 1.0, width, bottom=1.0, color=BARS[k], label=name)
    plot.reference(axes, 1.0)
    axes.set_xticks(range(len(sizes)), [f"d = {d}" for d in sizes])
    axes.set_ylabel("mean estimate ÷ e^(q·k)")
    axes.set_ylim(0.55, 1.65)
    axes.legend(frameon=False, fontsize=plot.SIZE - 2, loc="upper right", ncols=2)
    plot.title(axes, "Bias, by how W is drawn")


def draw_leak(axes: Axes, leak: dict[str, list[tuple[float, float]]]) -> None:
    """The change of earlier outputs over the factor of the last key; 0 is drawn at 1e-17."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("factor of the last key")
    axes.set_ylabel("largest change of an output before it")
    axes.set_ylim(3e-18, 30.0)
    for (name, rows), colour in zip(leak.items(), (plot.ORANGE, plot.BLUE), strict=True):
        x, y = zip(*[(factor, max(change, 1e-17)) for factor, change in rows], strict=True)
        axes.plot(x, y, "o-", color=colour, markersize=4)
        axes.annotate(name, (x[-1], y[-1]), (-4, 8), textcoords="offset points", ha="right",
                      color=colour)  # fmt: skip
    plot.title(axes, "What is seen of the future")


def draw_cost(axes: Axes, cost: dict[str, list[tuple[int, float]]]) -> None:
    """Time over tokens, both logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("forward pass, ms")
    for name, points in cost.items():
        x, y = zip(*points, strict=True)
        colour = plot.BLACK if name.startswith("softmax") else plot.BLUE
        axes.plot(x, y, "--" if "causal" in name else "o-", color=colour, label=name, markersize=4)
    axes.legend(frameon=False, fontsize=plot.SIZE - 1, loc="upper left")
    plot.title(axes, "Cost of a head of 64, 256 features")


CAPTION = """Above: the mean square error of the estimate of e^(q·k) from 16 rows, over \
e^(2q·k), by the length of q and k ({d} numbers each) and the angle between them: measured with \
{kernel_draws:,} projections (colour, as its logarithm) and in theory (lines). Right: the mean of \
the positive estimate over the truth for q = k = u with u = ±(1, …, 1)/√d, over {bias_rows:,} \
rows (relative standard error √(53 / rows)): orthogonal rows of the right law, \
LAPACK's Q as it comes, and other laws of the rows' lengths. Below, from the left: the error of \
attention over {tokens} tokens, median and quartiles of {steps} projections, by the number of \
features, for logits of standard deviation 0.25, 1 and 3 (solid: orthogonal rows, dashed: \
independent ones). The largest change of any output but the last one when the last key is \
multiplied, in causal attention (0 is drawn at 1e-17). The time of one head of 64 with 256 \
features, forward only, causal attention dashed; 4 d marks the usual number of features."""
