"""The figure of the study ``speculative``: the formula, the schemes, several candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(
    schemes: dict[str, dict[str, float]],
    alpha: float,
    lengths: list[tuple[int, float, float]],
    candidates: dict[str, list[float]],
) -> Figure:
    """Three panels."""
    figure, (left, middle, right) = plot.figure(3, size=(15.0, 4.8), width_ratios=(1, 1.25, 1))
    draw_lengths(left, alpha, lengths)
    draw_schemes(middle, schemes)
    draw_candidates(right, candidates)
    return figure


def draw_lengths(axes: Axes, alpha: float, rows: list[tuple[int, float, float]]) -> None:
    """Dots: counted; line: the formula."""
    drafts, counted, formula = zip(*rows, strict=True)
    axes.plot(drafts, formula, color=plot.GREY, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.plot(drafts, counted, "o", color=plot.BLUE)
    axes.set_xlabel("drafts per call γ")
    axes.set_ylabel("tokens per call of the target")
    axes.set_ylim(0, None)
    axes.annotate(f"(1 − αᵞ⁺¹)/(1 − α), α = {alpha:.2f}", (0.97, 0.05), xycoords="axes fraction",
                  ha="right", color=plot.GREY)  # fmt: skip
    plot.title(axes, "A call gives what the formula says")


def draw_schemes(axes: Axes, schemes: dict[str, dict[str, float]]) -> None:
    """Bars: tokens per call, and time."""
    names = sorted(schemes, key=lambda name: schemes[name]["speed"])
    places = np.arange(len(names))
    for shift, what, colour, label in (
        (0.2, "tokens", plot.SKY, "tokens per call"),
        (-0.2, "speed", plot.BLUE, "times as fast"),
    ):
        values = [schemes[name][what] for name in names]
        axes.barh(places + shift, values, 0.38, color=colour, label=label)
        for place, value in zip(places + shift, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, place), (3, 0), textcoords="offset points",
                          va="center", fontsize=plot.SIZE - 2.5)  # fmt: skip
    axes.axvline(1.0, color=plot.GREY, linewidth=1.0, linestyle=(0, (5, 3)))
    axes.set_yticks(places, names)
    axes.grid(False)
    axes.legend(frameon=False, fontsize=plot.SIZE - 2, loc="lower right")
    plot.title(axes, "Greedy text, unchanged")


def draw_candidates(axes: Axes, candidates: dict[str, list[float]]) -> None:
    """Acceptance by the number of candidates."""
    labels = []
    for (name, values), colour in zip(
        candidates.items(), (*plot.PALETTE[:4], plot.BLACK), strict=True
    ):
        style = (0, (4, 2)) if name == "the most possible" else "-"
        axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=style, marker="o")
        labels.append((values[-1], name, colour))
    axes.set_xticks(range(1, len(values) + 1))
    axes.set_xlabel("candidates for one place")
    axes.set_ylabel("one of them stands")
    plot.title(axes, "Several guesses for one place")
    plot.label_right(axes, labels, plot.SIZE - 2)


CAPTION = """Left: tokens per call of the target ({target_parameters:,} parameters) with drafts \
of a small model ({draft_parameters:,}), while {prompts} texts of {steps} new tokens are sampled \
from the target's law (dots), and the formula with the acceptance that was measured on texts that \
the target wrote alone (dashed). Middle: the same for greedy text, which every scheme leaves as \
it is, with up to {drafts} drafts a call, and the time of plain cached decoding divided by the \
scheme's (median over the texts). Right: how often one of several candidates stands, over laws of \
both models in held-out text, by four rules, and the most that independent candidates allow."""
