"""The figure of the study ``linear_attention``: costs, recall, spectra, and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import plot
from .measure import growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "softmax, dense": plot.BLACK, "softmax, in blocks": plot.GREY, "linear, in chunks": plot.BLUE,
    "softmax": plot.BLACK, "ELU + 1": plot.BLUE, "linear": plot.SKY, "delta rule": plot.ORANGE,
    "softmax × 16": plot.PINK, "mesa": plot.GREEN, "1 + cosine": plot.PINK,
    "double softmax": plot.GREEN, "ELU + 1, causal": plot.SKY, "Performer": plot.PINK,
    "gated delta": plot.ORANGE,
}  # fmt: skip

Points = list[tuple[float, float]]


def draw(series: dict[str, Any], bits: dict[str, float], counts: dict[str, float]) -> Figure:
    """Costs, recall and spectra above and below; text last."""
    figure, axes = plot.figure(3, 2, size=(17.0, 9.4))
    draw_growth(axes[0], series["cost"]["milliseconds"], "forward and backward, ms")
    plot.title(axes[0], "Time")
    draw_growth(axes[1], series["cost"]["mebibytes"], "most that is held at a time, MiB")
    plot.title(axes[1], "Memory")
    draw_recall(axes[2], series["recall"])
    draw_spectra(axes[3], series["spectra"])
    draw_text(axes[4], series["text"], bits, counts)
    draw_next_token(axes[5], series["next_token"])
    return figure


def draw_growth(axes: Axes, lines: dict[str, Points], label: str) -> None:
    """Both axes logarithmic, and the exponent of each line."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    for name, points in lines.items():
        x, y = zip(*points, strict=True)
        text = f"{name}: as n^{growth(points):.2f}"
        axes.plot(x, y, "o-", color=COLOURS[name], markersize=4, label=text)
    if lines:  # memory is traced on the host only
        axes.legend(frameon=False, fontsize=plot.SIZE - 1, loc="upper left")


def draw_recall(axes: Axes, recall: dict[str, dict[str, Points]]) -> None:
    """The error over the number of pairs; dashed where the same keys were written a second time."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pairs of key and value, keys of 64 numbers")
    axes.set_ylabel("error ÷ deviation of the values")
    axes.set_ylim(-0.05, 2.1)
    labels = []
    for what, style in (("written", "o-"), ("rewritten", "--")):
        for name, points in recall[what].items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=COLOURS[name], markersize=4,
                      linewidth=2.0 if what == "written" else 1.2)  # fmt: skip
            if what == "written":
                labels.append((min(y[-1], 2.05), name, COLOURS[name]))
    plot.reference(axes, 1.0)
    plot.label_right(axes, labels, plot.SIZE - 1)
    plot.title(axes, "What can be read back")


def draw_spectra(axes: Axes, spectra: dict[str, list[float]]) -> None:
    """Singular values, largest 1, on a logarithmic axis that ends where rounding begins."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular value ÷ largest")
    axes.set_ylim(1e-7, 2.0)
    for name, values in spectra.items():
        kept = np.array([v for v in values if v > 1e-10])
        axes.plot(np.arange(1, len(kept) + 1), kept, "-" if len(kept) > 40 else "o-", markersize=4,
                  color=COLOURS[name], label=f"{name}: rank {len(kept)}")  # fmt: skip
    axes.legend(frameon=False, fontsize=plot.SIZE - 1, loc="lower left")
    plot.title(axes, "Rank of the matrix of weights")


def draw_text(
    axes: Axes,
    text: dict[str, list[tuple[int, int, float]]],
    bits: dict[str, float],
    counts: dict[str, float],
) -> None:
    """Bits per character by how many characters come before; dashed, what counting gives."""
    spans: list[tuple[int, int, float]] = next(iter(text.values()))
    labels = []
    for name, rows in text.items():
        axes.plot(range(len(rows)), [value for *_, value in rows], "o-", color=COLOURS[name],
                  markersize=4)  # fmt: skip
        labels.append((rows[-1][2], f"{name} {bits[name]:.2f}", COLOURS[name]))
    for name, value in counts.items():
        plot.reference(axes, value)
        labels.append((value, f"{name} {value:.2f}", plot.GREY))
    axes.set_xticks(range(len(spans)), [str(b) for _, b, _ in spans])
    axes.set_xlabel("at most so many characters before")
    axes.set_ylabel("bits per character, held-out text")
    plot.label_right(axes, labels, plot.SIZE - 1)
    plot.title(axes, "Real text")


def draw_next_token(axes: Axes, times: dict[str, Points]) -> None:
    """Milliseconds of one more token over the length of the text."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("one more token, ms")
    labels = []
    for name, points in times.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=COLOURS[name], markersize=4)
        labels.append((y[-1], name, COLOURS[name]))
    axes.set_ylim(0, None)
    plot.label_right(axes, labels, plot.SIZE - 1)
    plot.title(axes, "The next token")


CAPTION = """Above, from the left: time and memory of causal attention, one head of {pairs_kept} \
numbers, forward and backward, over the length of the text, with the exponent fitted from \
1,024 tokens on. The error of what is read back for random keys of length 1 after all pairs \
have been written, over the number of pairs ({trials} trials; an answer of 0 has error 1); dashed: \
the same keys written a second time with new values, which are asked for. The softmax has its \
usual factor 1/√d, or 16. Below: the singular values of the matrices of \
weights for the same 200 queries and keys of 8 normal numbers. Bits per character of {scored:,} \
characters of held-out Shakespeare by how many characters of the window come before, for four \
GPTs of {n_layer} layers and {n_embd} channels after {steps} steps of {batch} windows of \
{context}; at the lines: the mean; dashed: counts of single characters and of pairs in the same \
text. Time of one more token after so many, in the same models."""
