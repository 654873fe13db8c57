"""The figure of the study ``initialization``: six panels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .initialization import InitializationConfig

COLOURS = (
    plot.BLUE, plot.SKY, plot.GREEN, plot.YELLOW, plot.PINK, plot.ORANGE, plot.ORANGE, plot.BLACK,
)  # fmt: skip
FLOOR, CEILING = -6.0, 6.0
"""Powers of ten between which second moments are shown."""


def draw(config: InitializationConfig, series: dict[str, Any], unigram: float, span: int) -> Figure:
    """Signals, cosines and shares above; training, saturation and sensitivity below."""
    figure, axes = plot.figure(3, 2, size=(15.0, 8.6))
    moments, cosines, shares, training, largest, slopes = axes
    draw_moments(moments, series["signals"])
    draw_cosines(cosines, series["signals"])
    draw_shares(shares, series["shares"])
    draw_training(training, series["losses"], unigram, span, config)
    draw_largest(largest, series["largest_weights"])
    draw_slopes(slopes, series["sensitivities"], config.keys)
    return figure


def _range(axes: Axes, depth: int, label: str) -> None:
    axes.set_xlim(1, depth)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)


def draw_moments(axes: Axes, signals: dict[str, Any]) -> None:
    """Powers of ten of the second moment; dashed, the mean field."""
    labels, depth = [], 1
    for (name, found), colour in zip(signals.items(), COLOURS, strict=True):
        for kind, style in (("predicted", (0, (4, 2))), ("measured", "-")):
            q = found[kind].get("second_moment")
            if q is None:
                continue
            depth = len(q)
            logs = [min(max(math.log10(v), -99.0), 99.0) if v > 0 else -99.0 for v in q]
            width = 1.2 if kind == "predicted" else 2.0
            axes.plot(range(1, depth + 1), logs, color=colour, linestyle=style, linewidth=width)
        labels.append((min(max(logs[-1], FLOOR), CEILING), name, colour))
    axes.set_ylim(FLOOR, CEILING)
    _range(axes, depth, "log₁₀ of the mean square of the signal")
    plot.title(axes, "Which laws keep a signal's size")
    plot.label_right(axes, labels, plot.SIZE - 2)


def draw_cosines(axes: Axes, signals: dict[str, Any]) -> None:
    """The mean cosine of two inputs."""
    labels, depth = [], 1
    for (name, found), colour in zip(signals.items(), COLOURS, strict=True):
        if "LeCun" in name or "0.67" in name:  # the same cosines as those of the next
            continue
        for kind, style in (("predicted", (0, (4, 2))), ("measured", "-")):
            c = found[kind].get("cosine")
            if c is None:
                continue
            depth = len(c)
            width = 1.2 if kind == "predicted" else 2.0
            axes.plot(range(1, depth + 1), c, color=colour, linestyle=style, linewidth=width)
        labels.append((c[-1], name.split(",")[0], colour))
    axes.set_ylim(-0.05, 1.05)
    _range(axes, depth, "mean cosine of two inputs")
    plot.title(axes, "… and which keep two inputs apart")
    plot.label_right(axes, labels, plot.SIZE - 2)


def draw_shares(axes: Axes, shares: dict[str, list[float]]) -> None:
    """Dots: measured; lines: 2^(-(l-t)/2), 1 and 0."""
    depth = len(shares["post-norm"]) - 1
    places = np.arange(depth + 1)
    theory = {
        "post-norm": [2 ** (-depth / 2), *(2 ** (-(depth - t + 1) / 2) for t in places[1:])],
        "pre-norm": [1.0] * (depth + 1),
        "ReZero": [1.0] + [0.0] * depth,
    }
    labels = []
    for (name, found), colour in zip(shares.items(), plot.PALETTE, strict=False):
        axes.plot(places, theory[name], color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.plot(places, found, "o", color=colour, markersize=5.5)
        labels.append((found[-1], name, colour))
    axes.set_xticks(places, ["input", *(str(t) if t % 3 == 0 else "" for t in places[1:])])
    axes.set_xlabel("branch")
    axes.set_ylabel("coefficient in the last state")
    axes.set_ylim(-0.05, 1.15)
    plot.title(axes, "What a residual stream remembers")
    plot.label_right(axes, labels, plot.SIZE - 2)


def draw_training(
    axes: Axes,
    losses: dict[str, list[float]],
    unigram: float,
    span: int,
    config: InitializationConfig,
) -> None:
    """Loss over training."""
    labels = [(unigram, "single letters", plot.GREY)]
    plot.reference(axes, unigram)
    for (name, curve), colour in zip(losses.items(), plot.PALETTE, strict=False):
        steps = [span * (k + 1) for k in range(len(curve))]
        axes.plot(steps, curve, color=colour)
        labels.append((min(curve[-1], 7.0), name, colour))
    axes.set_ylim(3.4, 7.0)
    axes.set_xlim(0, config.steps)
    axes.set_xlabel(f"training steps of {config.batch * config.context} characters")
    axes.set_ylabel("bits per character")
    plot.title(axes, f"Which {config.n_layer}-layer Transformers start to learn")
    plot.label_right(axes, labels, plot.SIZE - 2)


def draw_largest(axes: Axes, largest: dict[str, list[list[float]]]) -> None:
    """The middle 80 % of queries, and the median, by head dimension."""
    places = np.arange(len(largest))
    for which, (label, colour) in enumerate((("q·k", plot.ORANGE), ("q·k/√d", plot.BLUE))):
        low, mid, high = (
            [float(np.quantile(runs[which], part)) for runs in largest.values()]
            for part in (0.1, 0.5, 0.9)
        )
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, mid, "o-", color=colour)
        axes.annotate(label, (places[-1], mid[-1]), (-6, 8), textcoords="offset points",
                      color=colour, ha="right")  # fmt: skip
    axes.set_xticks(places, [*largest])
    axes.set_ylim(0, 1.12)
    axes.set_xlabel("head dimension d")
    axes.set_ylabel("largest attention weight of a query")
    plot.title(axes, "Why the softmax is divided by √d")


def draw_slopes(axes: Axes, rows: list[tuple[float, float]], keys: int) -> None:
    """How much attention can still learn, by the scale of its logits."""
    scales, slopes = zip(*rows, strict=True)
    axes.plot(scales, slopes, color=plot.BLUE)
    frozen = math.sqrt(2 * math.log(keys))
    axes.axvline(frozen, color=plot.GREY, linewidth=1.0, linestyle=(0, (5, 3)))
    axes.annotate("√(2 ln n)", (frozen, max(slopes) * 0.05), (5, 0), color=plot.GREY,
                  textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("standard deviation a of the logits")
    axes.set_ylabel("a (1 − Σ p²)")
    axes.set_ylim(0, None)
    plot.title(axes, "How much a softmax can still learn")


CAPTION = """Above left: the mean square of what each linear layer of a random network of width \
{width} puts out (solid, median of {draws} draws of the weights), and what the mean field \
predicts from the first layer on (dashed). "Corrected", and both GELUs without a norm: the \
weights make up for what the activation loses of a signal of mean square 1; "from" is the input's \
mean square. Above middle: the mean cosine of {samples} different inputs in the same networks; \
the prediction is for inputs of one length, which GELU without a norm soon drives apart. Above \
right: the last state of a stream of {residual_depth} random linear branches of width \
{residual_width}, as a combination of the input and of what each branch put out (dots), and the \
coefficients that theory gives (dashed). Below left: bits per character while GPTs of {n_layer} \
layers and width {n_embd} read Shakespeare with Adam at one learning rate, {lr}, which grows over \
{warmup} steps where it says warm-up and is constant elsewhere; medians of {seeds} seeds. \
Matrices start with 0.55 of LeCun's standard deviation, which is BERT's at its width, those of \
DeepNorm with LeCun's and its own factor. Dashed: what counting single letters reaches. Below \
middle: the largest of {keys} attention weights of each of {queries} random queries, median and \
middle four fifths. Below right: half the sum of the absolute derivatives of a query's weights by \
its logits, mean over 10,000 queries."""
