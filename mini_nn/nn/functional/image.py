"""Borders, and changes of resolution, under torch's names.

Resampling along an axis is a matrix whose row holds the weights of one output position, so that
bilinear interpolation and adaptive pooling are one line each, and their derivative is a transpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ... import ops
from ...backend import Array
from ...ops.elementwise import of

MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""torch's name of each way to pad, and NumPy's."""


def pad(
    input: Array, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Array:
    """A border around the last axes.

    Args:
        input: any shape.
        pad: before and after the last axis, before and after the one before it, and so on; a
            negative number cuts off instead.
        mode: ``"constant"``; ``"reflect"`` mirrors at the outermost element, ``"replicate"``
            repeats it, ``"circular"`` continues with the other end.
        value: of a constant border (None: 0).

    Raises:
        ValueError: another mode, an odd number of widths, more than there are axes, or more cut off
            than there is.
    """
    if len(pad) % 2 or len(pad) > 2 * input.ndim or mode not in MODES:
        raise ValueError(
            f"pad takes pairs of widths for at most {input.ndim} axes and a mode among "
            f"{', '.join(MODES)}; got {tuple(pad)} and {mode!r}"
        )
    widths = [(0, 0)] * (input.ndim - len(pad) // 2)
    widths += [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    pairs = list(zip(input.shape, widths, strict=True))
    if any(n + min(before, 0) + min(after, 0) < 0 for n, (before, after) in pairs):
        raise ValueError(f"pad cannot cut {tuple(pad)} off shape {input.shape}")
    if min(pad, default=0) < 0:
        input = input[tuple([slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in pairs])]
        widths = [(max(before, 0), max(after, 0)) for before, after in widths]
    return ops.pad(input, widths, MODES[mode], 0.0 if value is None else value)


def adaptive_avg_pool2d(input: Array, output_size: Any) -> Array:
    """Means of (nearly) equal parts: (…, H, W) to (…, *output_size).

    Args:
        input: at least two axes.
        output_size: (H', W') or one number for both; None keeps a length.  Output i of n is the
            mean of the elements ⌊i H / n⌋ to ⌈(i + 1) H / n⌉ − 1.
    """
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * 2
    rows, columns = _parts(input, -2, sizes[0]), _parts(input, -1, sizes[1])
    return ops.matmul(ops.matmul(rows, input), columns.T)


def _parts(input: Array, axis: int, count: int | None) -> Array:
    """The matrix that takes the mean of each part of an axis."""
    n, xp = input.shape[axis], of(input)
    count = n if count is None else count
    part = xp.arange(count)[:, None]
    start, stop = part * n // count, -(-(part + 1) * n // count)
    inside = (xp.arange(n) >= start) & (xp.arange(n) < stop)
    return inside.astype(input.dtype) / (stop - start).astype(input.dtype)


def interpolate(
    input: Array,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Array:
    """Images (N, C, H, W) at another resolution.

    Args:
        input: the images.
        size: (H', W') or one number for both.
        scale_factor: instead of ``size``: H'/H and W'/W, two numbers or one; H' and W' are rounded
            down.
        mode: ``"nearest"`` (output i takes element ⌊i H / H'⌋) or ``"bilinear"``.
        align_corners: for ``"bilinear"``: the centres of the outermost pixels stay in place, rather
            than their outer edges.

    Raises:
        ValueError: not four axes, an unknown mode, or not exactly one of the two sizes.
    """
    if (
        input.ndim != 4
        or mode not in ("nearest", "bilinear")
        or (size is None) == (scale_factor is None)
    ):
        raise ValueError(
            "interpolate takes (N, C, H, W), mode 'nearest' or 'bilinear', and either size or "
            f"scale_factor; got {input.shape}, {mode!r}, {size} and {scale_factor}"
        )
    given = scale_factor if size is None else size
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    for axis, wanted in zip((2, 3), pair, strict=True):
        n, xp = input.shape[axis], of(input)
        count = wanted if scale_factor is None else math.floor(n * wanted)
        step = n / count if scale_factor is None else 1 / wanted
        outputs = xp.arange(count)
        if mode == "nearest":
            source = outputs * n // count if scale_factor is None else xp.floor(outputs * step)
            input = ops.take(input, xp.minimum(source.astype("int64"), n - 1), axis=axis)
            continue
        if align_corners:
            place = outputs * ((n - 1) / max(count - 1, 1))
        else:
            place = (outputs + 0.5) * step - 0.5
        place = xp.clip(place, 0, n - 1)
        hats = xp.maximum(1 - xp.abs(place[:, None] - xp.arange(n)), 0).astype(input.dtype)
        input = ops.matmul(hats, input) if axis == 2 else ops.matmul(input, hats.T)
    return input


def pixel_shuffle(input: Array, upscale_factor: int) -> Array:
    """(N, C r², H, W) to (N, C, r H, r W): r² channels become one r × r patch of each pixel.

    Shi et al. 2016, arXiv:1609.05158, eq. 4.

    Raises:
        ValueError: the channels are not a multiple of r².
    """
    r = upscale_factor
    n, c, h, w = input.shape
    if c % (r * r):
        raise ValueError(f"pixel_shuffle by {r} takes a multiple of {r * r} channels, got {c}")
    patches = input.reshape(n, c // (r * r), r, r, h, w)
    return ops.transpose(patches, (0, 1, 4, 2, 5, 3)).reshape(n, c // (r * r), h * r, w * r)
