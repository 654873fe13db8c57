"""The figure of the study ``deformable``: accuracy, dilation, points, receptive fields, nuclei."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "conv": plot.GREY, "dcn_v1": plot.BLUE, "dcn_v2": plot.ORANGE, "attention": plot.GREEN,
}  # fmt: skip
NAMES = {"conv": "plain", "dcn_v1": "deformable", "dcn_v2": "modulated", "attention": "attention"}


LOOKING = {"conv": "the plain one", "dcn_v1": "the deformable one", "attention": "attention"}


def draw(radii: Sequence[float], series: dict[str, Any], pictures: dict[str, Any]) -> Figure:
    """Discs above, receptive fields and nuclei below."""
    figure, axes = plot.figure(5, 2, size=(20.0, 8.4))
    draw_lines(axes[0], radii, series["accuracy"], "part of disc pixels named right")
    axes[0].set_ylim(0, 1.05)
    plot.title(axes[0], "How large is the disc?")
    draw_lines(axes[1], radii, series["dilation"], "mean effective dilation, pixels")
    axes[1].set_ylim(0, 1.15 * max(map(max, series["dilation"].values())))
    plot.title(axes[1], "How far the grid opens")
    draw_points(axes[2], radii, pictures["discs"], series["points"])
    draw_overlaps(axes[3], series["overlap"])
    draw_costs(axes[4], series["costs"])
    for place, kind in zip(axes[5:8], ("conv", "dcn_v1", "attention"), strict=True):
        draw_field(place, series["fields"][kind], radii[2], f"What {LOOKING[kind]} looks at")
    draw_tissue(axes[8], pictures["tissue"], pictures["truth"], "Nuclei, by hand")
    draw_tissue(axes[9], pictures["tissue"], pictures["said"]["dcn_v1"], "Nuclei, deformable")
    return figure


def draw_lines(axes: Axes, radii: Sequence[float], lines: dict[str, Any], label: str) -> None:
    """One line for each network, over the radius."""
    labels = []
    for kind, values in lines.items():
        axes.plot(radii, values, "o-", color=COLOURS[kind])
        labels.append((values[-1], NAMES[kind], COLOURS[kind]))
    axes.set_xticks([*radii])
    axes.set_xlabel("radius of the disc, pixels")
    axes.set_ylabel(label)
    plot.label_right(axes, labels, plot.SIZE - 2)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_points(
    axes: Axes, radii: Sequence[float], discs: dict[str, Any], points: dict[str, Any]
) -> None:
    """Four discs side by side, and where the last layer reads for the middle pixel."""
    size = next(iter(discs.values())).shape[0]
    board = np.zeros((2 * size, 2 * size))
    for k, radius in enumerate(radii):
        top, left = k // 2 * size, k % 2 * size
        board[top : top + size, left : left + size] = discs[str(radius)]
        y, x = np.array(points[str(radius)]).T
        axes.plot(x + left, y + top, "o", color=plot.ORANGE, markersize=4, zorder=3)
        axes.plot(size // 2 + left, size // 2 + top, "+", color=plot.BLACK, markersize=9, zorder=4)
    axes.imshow(board, cmap="Blues", vmin=0, vmax=2.5, interpolation="nearest")
    axes.set_xlim(-0.5, 2 * size - 0.5)
    axes.set_ylim(2 * size - 0.5, -0.5)
    axes.axhline(size - 0.5, color="white", linewidth=2)
    axes.axvline(size - 0.5, color="white", linewidth=2)
    _bare(axes)
    plot.title(axes, "Where the pixel + reads")


def draw_overlaps(axes: Axes, overlaps: dict[str, Any]) -> None:
    """Bars: intersection over union on held-out tissue."""
    names = ("nucleus", "inside", "edge")
    for k, (kind, values) in enumerate(overlaps.items()):
        places = np.arange(len(names)) + 0.27 * (k - 1)
        axes.bar(places, values, 0.25, color=COLOURS[kind], label=NAMES[kind])
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.2f}", (place, value), (0, 2), textcoords="offset points",
                          ha="center", fontsize=plot.SIZE - 3.5, color=plot.BLACK)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("intersection over union")
    axes.legend(frameon=False, fontsize=plot.SIZE - 2, loc="upper right", ncols=3,
                columnspacing=0.8, handlelength=1.0)  # fmt: skip
    plot.title(axes, "Nuclei that were not trained on")


def draw_costs(axes: Axes, costs: dict[str, list[tuple[int, float]]]) -> None:
    """Time over the number of pixels, both logarithmic."""
    for (name, rows), colour in zip(costs.items(), (plot.GREEN, plot.BLACK), strict=True):
        pixels, times = zip(*rows, strict=True)
        axes.plot(pixels, times, "o-", color=colour)
        axes.annotate(name, (1.0, times[-1]), (6, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color=colour, va="center",
                      fontsize=plot.SIZE - 2)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("pixels, all of them queries")
    axes.set_ylabel("forward pass, ms")
    plot.title(axes, "What attention costs")


def draw_field(axes: Axes, field: Any, radius: float, text: str) -> None:
    """The effective receptive field of the middle pixel, square root for the eye, and the disc."""
    from matplotlib.patches import Circle

    size = len(field)
    axes.imshow(np.sqrt(np.array(field)), cmap="Greys", interpolation="nearest")
    middle = (size - 1) / 2
    axes.add_patch(Circle((middle, middle), radius, fill=False, color=plot.BLUE, linewidth=1.5))
    axes.plot(size // 2, size // 2, "+", color=plot.ORANGE, markersize=9)
    _bare(axes)
    plot.title(axes, text)


def draw_tissue(axes: Axes, tissue: Any, classes: Any, text: str) -> None:
    """A square of the micrograph with the edges marked."""
    side = tissue.shape[1]
    part = slice(side, 2 * side)
    axes.imshow(tissue[part], cmap="gray", vmin=-1.5, vmax=4, interpolation="nearest")
    edge = np.ma.masked_where(classes[part] != 2, np.ones_like(tissue[part]))
    axes.imshow(edge, cmap="autumn", vmin=0, vmax=1.2, alpha=0.55, interpolation="nearest")
    _bare(axes)
    plot.title(axes, text)


CAPTION = """Above, from the left: the part of the pixels of discs whose radius (± 0.6) is named \
right by networks of five layers, of which the third and fourth are plain ({conv_parameters:,} \
parameters), deformable ({dcn_v1_parameters:,}) or modulated deformable convolutions \
({dcn_v2_parameters:,}), or deformable attention ({attention_parameters:,}), after {steps} steps \
of Adam on noisy discs; {test_discs} discs of each radius. The mean distance of neighbouring \
places that the fourth layer reads, over the pixels of those discs. The nine places that it reads \
for the middle pixel of four discs without noise (deformable). Intersection over union of nuclei, \
their insides, and their edges (two pixels wide) in the last 128 columns of the micrograph, which \
no network was trained on, after {nuclei_steps} steps on the others. One forward pass of \
attention over all pixels, 32 channels: four points each, or softmax over all pixels. Below: the \
length of the gradient of what is said about the middle pixel by the pixels of the image (root, \
largest black) for a disc of radius 6 (circle); and a square of the held-out columns, with the \
edges of nuclei as they were drawn by hand and as the deformable network finds them."""
