"""Regions of interest: what lies in a box of any size as a map of one size.

Girshick 2015, *Fast R-CNN*, arXiv:1504.08083; Dai, Li, He, Sun 2016, *R-FCN*, arXiv:1605.06409;
He, Gkioxari, Dollár, Girshick 2017, *Mask R-CNN*, arXiv:1703.06870.  Names, arguments and layouts
are those of torchvision.ops.

=======================================================  ================
RoI pooling, the largest of each bin  (1504.08083 §2.1)  ``roi_pool``
r_c(i, j) = Σ z_{i,j,c} / n             (1605.06409, 1)  ``ps_roi_pool``
RoIAlign, where nothing is rounded      (1703.06870 §3)  ``roi_align``
both at once                                             ``ps_roi_align``
=======================================================  ================

A box of size w × h is cut into k × k bins.  The first two functions round it to pixels; bin i of an
axis of length w takes the pixels ⌊i w / k⌋ ≤ p < ⌈(i + 1) w / k⌉, so that neighbours may share one.
The other two sample each bin at the centres of a grid of cells, bilinearly.  The position-sensitive
ones (``ps_``) read bin (i, j) of channel c from a map of its own, number (c k + i) k + j.

Rounding is that of C, halves away from 0, as in every released kernel: NumPy's ``rint`` takes 2.5
to 2, and a box would lose a pixel.

Deviations: ``ps_roi_pool`` reads all of the image.  torchvision's forward pass cuts the bins off at
the last row and column, excluding them, where its backward pass does not (0.29.1): its output is
ours of the image without them, its gradient is ours.  Where a box has no area, and so no samples,
``ps_roi_align`` gives 0, not 0 / 0.  ``roi_pool`` takes nan and −inf for what they are, where
torchvision passes over them.  Boxes get gradients where nothing is rounded; torchvision has
none for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import backend, ops
from ..backend import Array, spread_rows, weighted_rows
from ..engine import data_of, primitive
from ..ops.conv import Pair, per_axis
from ..ops.elementwise import of
from .sampling import as_pixels, sample_points

__all__ = ["ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool"]

Boxes = Array | Sequence[Array]

SAMPLED = 1 << 20
"""Numbers that are read from a map at a time: bins are taken in chunks of about so many."""


def roi_pool(
    input: Array, boxes: Boxes, output_size: int | Pair, spatial_scale: float = 1.0
) -> Array:
    """The largest pixel of each bin (Girshick 2015, §2.1).

    Args:
        input: (n, c, h, w).
        boxes: (k, 5), rows (number of the image, x₁, y₁, x₂, y₂), or for each image its (l, 4); of
            the input's dtype.  Both corners are pixels of the box.
        output_size: (bins in a column, bins in a row), or one number for both.
        spatial_scale: what the boxes are multiplied by: pixels of the map for one of theirs.

    Returns:
        (k, c, *output_size).  0 where a bin has no pixel of the image.  The gradient goes to the
        first of several largest pixels; nan is the largest.

    The size of the largest bin is read on the host (on a GPU: it waits).  Beside input and output,
    the pixels of a chunk of bins are in memory, about 2²⁰ numbers or those of one bin, where each
    counts as much as the largest.

    Raises:
        ValueError: the shapes do not fit, or the input has no pixels.
        TypeError: not one floating-point dtype.
        IndexError: there is no image of this number (on a GPU: not checked).
    """
    image, corners = checked_boxes("roi_pool", input, boxes)
    size = per_axis("roi_pool", "output_size", output_size, 2, 1)
    lows, lengths = rounded_boxes(data_of(corners), spatial_scale)
    bins = [
        pixel_bins(lows[axis], lengths[axis], size[axis], input.shape[2 + axis]) for axis in (0, 1)
    ]
    pixel, empty = _largest(data_of(input), image, bins)
    channel = of(pixel).arange(input.shape[1])
    y = ops.where(empty[:, None], 0.0, as_pixels(input)[pixel, channel])
    return y.reshape(len(image), *size, input.shape[1]).transpose(0, 3, 1, 2)


def ps_roi_pool(
    input: Array, boxes: Boxes, output_size: int | Pair, spatial_scale: float = 1.0
) -> Array:
    """The mean of each bin, each read from maps of its own (Dai et al. 2016, eq. 1).

    Args:
        input: (n, c kh kw, h, w), channel (c' kh + i) kw + j for bin (i, j) of output channel c'.
        boxes: as for ``roi_pool``, but the right and lower edge are not of the box.
        output_size: (kh, kw), or one number for both.
        spatial_scale: as for ``roi_pool``.

    Returns:
        (k, c, kh, kw).  0 where a bin has no pixel of the image.

    The size of the largest bin is read on the host (on a GPU: it waits).  Two numbers for each
    pixel of each bin are in memory, where each bin counts as much as the largest.

    Raises:
        ValueError, TypeError, IndexError: as ``roi_pool``; the channels are no multiple of kh kw.
    """
    image, corners = checked_boxes("ps_roi_pool", input, boxes)
    size = per_axis("ps_roi_pool", "output_size", output_size, 2, 1)
    maps = by_bin("ps_roi_pool", input, size)
    lows, lengths = rounded_boxes(data_of(corners), spatial_scale, last=0.0)
    bins = [
        pixel_bins(lows[axis], lengths[axis], size[axis], input.shape[2 + axis]) for axis in (0, 1)
    ]
    number, inside = _pixels(map_numbers(image, size), bins, input.shape[2:])
    count = inside.sum(axis=1, keepdims=True)
    weights = inside.astype(input.dtype) / of(count).maximum(count, 1).astype(input.dtype)
    y = _weighted(as_pixels(maps), number, weights)
    return y.reshape(len(image), *size, maps.shape[1]).transpose(0, 3, 1, 2)


def roi_align(
    input: Array,
    boxes: Boxes,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Array:
    """The mean of bilinear samples of each bin (He et al. 2017, §3).

    Args:
        input: (n, c, h, w).
        boxes: (k, 5), rows (number of the image, x₁, y₁, x₂, y₂), or for each image its (l, 4); of
            the input's dtype.  They get gradients.
        output_size: (bins in a column, bins in a row), or one number for both.
        spatial_scale: what the boxes are multiplied by.
        sampling_ratio: samples for each axis of a bin; 0 and below: one for each pixel begun.
        aligned: whether 0 in a box is the edge of the image, and so −½ for the map, whose pixels
            have their centres at integers.  Without it, 0 is the centre of the first pixel, and a
            box is at least one pixel wide and high.

    Returns:
        (k, c, *output_size).  A sample up to a pixel beyond the outermost centres is moved there;
        farther out it is 0, and counts.  A bin without samples is 0.

    Where there is no ``sampling_ratio``, the largest number of samples is read on the host (on a
    GPU: it waits), and each box costs as much as the largest.  Beside input and output, the samples
    of a chunk of bins are in memory, about 2²⁰ numbers or those of one bin, and some 30 numbers for
    each sample.

    Raises:
        ValueError: the shapes do not fit, or the input has no pixels.
        TypeError: not one floating-point dtype.
        IndexError: there is no image of this number (on a GPU: not checked).
    """
    image, corners = checked_boxes("roi_align", input, boxes)
    size = per_axis("roi_align", "output_size", output_size, 2, 1)
    lows, lengths = scaled_boxes(corners, spatial_scale, 0.5 if aligned else 0.0)
    if not aligned:
        lengths = [ops.maximum(length, 1.0) for length in lengths]
    y = aligned_means(input, image[:, None, None], lows, lengths, size, sampling_ratio)
    return y.transpose(0, 3, 1, 2)


def ps_roi_align(
    input: Array,
    boxes: Boxes,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Array:
    """The mean of bilinear samples of each bin, each read from maps of its own.

    Args:
        input: (n, c kh kw, h, w), channel (c' kh + i) kw + j for bin (i, j) of output channel c'.
        boxes, output_size, spatial_scale, sampling_ratio: as for ``roi_align`` with ``aligned``.

    Returns:
        (k, c, kh, kw).

    Raises:
        ValueError, TypeError, IndexError: as ``roi_align``; the channels are no multiple of kh kw.
    """
    image, corners = checked_boxes("ps_roi_align", input, boxes)
    size = per_axis("ps_roi_align", "output_size", output_size, 2, 1)
    maps = by_bin("ps_roi_align", input, size)
    lows, lengths = scaled_boxes(corners, spatial_scale, 0.5)
    y = aligned_means(maps, map_numbers(image, size), lows, lengths, size, sampling_ratio)
    return y.transpose(0, 3, 1, 2)


# boxes


def checked_boxes(name: str, input: Any, boxes: Any) -> tuple[Any, Any]:
    """The image that each box lies in, (k,) int64, and (k, 4) corners as (x₁, y₁, x₂, y₂)."""
    if input.ndim != 4 or input.dtype.kind != "f" or 0 in input.shape[2:]:
        raise (TypeError if input.dtype.kind != "f" else ValueError)(
            f"{name} takes a floating-point input (n, c, h, w) with pixels, got {input.dtype} "
            f"{input.shape}"
        )
    listed, xp, n = isinstance(boxes, (list, tuple)), of(input), input.shape[0]
    parts = list(boxes) if listed else [boxes]
    if any(part.ndim != 2 or part.shape[1] != (4 if listed else 5) for part in parts) or (
        listed and len(parts) != n
    ):
        raise ValueError(
            f"{name} takes boxes (k, 5), or a list with (l, 4) for each of {n} images, got "
            + (f"a list of {[part.shape for part in parts]}" if listed else f"{boxes.shape}")
        )
    if any(part.dtype != input.dtype for part in parts):
        raise TypeError(
            f"{name} takes input and boxes of one dtype, got {input.dtype} and "
            f"{sorted({str(part.dtype) for part in parts})}: convert with astype"
        )
    if listed:
        if not parts:
            return xp.zeros(0, "int64"), xp.zeros((0, 4), input.dtype)
        numbers = [xp.full(part.shape[0], i, "int64") for i, part in enumerate(parts)]
        return xp.concatenate(numbers), ops.concatenate(parts, axis=0)
    image = data_of(boxes)[:, 0].astype("int64")
    # reading is what checks the numbers: NumPy raises, a GPU counts modulo n and stays inside
    return xp.arange(n)[xp.where(image < 0, n, image)], boxes[:, 1:]


def half_away(x: Any) -> Any:
    """The nearest integer, halves away from 0, of an array: C's ``round``."""
    xp = of(x)
    size = xp.abs(x)
    low = xp.floor(size)  # ⌊|x| + ½⌋ would take the number just below ½ to 1
    return xp.sign(x) * (low + (size - low >= 0.5).astype(x.dtype))


def rounded_boxes(corners: Any, scale: float, last: float = 1.0) -> tuple[list[Any], list[Any]]:
    """First pixels and lengths, at least 1, as (vertical, horizontal) arrays (k,)."""
    corners = half_away(corners * scale)
    lows = [corners[:, 1], corners[:, 0]]
    highs = [corners[:, 3] + last, corners[:, 2] + last]
    xp = of(corners)
    return lows, [xp.maximum(b - a, 1.0) for a, b in zip(lows, highs, strict=True)]


def scaled_boxes(corners: Any, scale: float, shift: float) -> tuple[list[Any], list[Any]]:
    """Upper left corners and lengths, as (vertical, horizontal) arrays (k,)."""
    corners = corners * scale - shift
    lows = [corners[:, 1], corners[:, 0]]
    return lows, [corners[:, 3] - lows[0], corners[:, 2] - lows[1]]


def pixel_bins(low: Any, length: Any, bins: int, limit: int | None = None) -> tuple[Any, Any]:
    """First pixel of each bin and the one after its last, (k, bins); cut off at [0, limit]."""
    xp = of(low)
    place = xp.arange(bins).astype(low.dtype)
    step = (length / bins)[:, None]
    first, end = xp.floor(place * step), xp.ceil((place + 1.0) * step)
    first, end = first + low[:, None], end + low[:, None]
    if limit is None:
        return first, end
    return xp.clip(first, 0.0, float(limit)), xp.clip(end, 0.0, float(limit))


def along(x: Any, axis: int) -> Any:
    """(k, bins, samples) of an axis as (k, bins, 1, samples, 1) or (k, 1, bins, 1, samples)."""
    return x[:, :, None, :, None] if axis == 0 else x[:, None, :, None, :]


def on_host(count: Any) -> int:
    """The largest of an array of counts, at least 1; the shape of what follows depends on it."""
    return max(1, int(backend.to_host(count).max())) if count.size else 1


# maps for each bin


def by_bin(name: str, input: Any, size: Pair) -> Any:
    """(n, c kh kw, h, w) as images (n kh kw, c, h, w), one for each bin."""
    (n, channels, h, w), (kh, kw) = input.shape, size
    if channels % (kh * kw):
        raise ValueError(
            f"{name} reads each of {kh} × {kw} bins from maps of its own: channels are a multiple "
            f"of {kh * kw}, got {channels}"
        )
    split = input.reshape(n, channels // (kh * kw), kh, kw, h, w)
    return split.transpose(0, 2, 3, 1, 4, 5).reshape(n * kh * kw, channels // (kh * kw), h, w)


def map_numbers(image: Any, size: Pair) -> Any:
    """(k, kh, kw): which image of ``by_bin`` each bin reads."""
    xp, (kh, kw) = of(image), size
    return image[:, None, None] * (kh * kw) + xp.arange(kh * kw).reshape(kh, kw)


# pixels of a bin


def _pixels(image: Any, bins: Any, shape: Any) -> tuple[Any, Any]:
    """Numbers of the pixels of each bin as rows (n h w), and which are meant: (k kh kw, m)."""
    (first_y, end_y), (first_x, end_x) = bins
    xp, (h, w) = of(first_y), shape
    axes = []
    for first, end in ((first_y, end_y), (first_x, end_x)):
        place = xp.arange(on_host(end - first)).astype(first.dtype)
        at = first[..., None] + place
        axes.append((at.astype("int64"), at < end[..., None]))
    (y, in_y), (x, in_x) = [[along(z, axis) for z in pair] for axis, pair in enumerate(axes)]
    number = (image[..., None, None] * h + y) * w + x
    inside = xp.broadcast_to(in_y & in_x, number.shape)
    many = math.prod(number.shape[3:])
    return xp.where(inside, number, 0).reshape(-1, many), inside.reshape(-1, many)


def _largest(input: Any, image: Any, bins: Any) -> tuple[Any, Any]:
    """The pixel (bins, c) that is the first largest of each bin, and which bins have none."""
    xp, (kh, kw) = of(input), (bins[0][0].shape[1], bins[1][0].shape[1])
    image = xp.broadcast_to(image[:, None, None], (len(image), kh, kw))
    number, inside = _pixels(image, bins, input.shape[2:])
    rows, channels = as_pixels(input), input.shape[1]
    pixel = xp.zeros((len(number), channels), "int64")
    for part in chunks(len(number), number.shape[1] * channels):
        values = xp.where(inside[part, :, None], rows[number[part]], -math.inf)
        pixel[part] = xp.take_along_axis(number[part], values.argmax(axis=1), axis=1)
    return pixel, ~inside.any(axis=1)


def chunks(count: int, each: int) -> list[slice]:
    """Slices of ``count`` things that have ``each`` numbers, about ``SAMPLED`` in all."""
    step = max(1, SAMPLED // max(each, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@primitive
def _weighted(rows: Any, number: Any, weights: Any) -> Any:
    """Σₑ weights[r, e] rows[number[r, e]]."""
    return weighted_rows(weights, number, rows)


@primitive
def _spread(values: Any, number: Any, weights: Any, count: int) -> Any:
    """The transpose of ``_weighted``."""
    return spread_rows(weights, number, values, count)


_weighted.derivative(
    rows=lambda g, number, weights, like: _spread(g, number, weights, like.shape[0])
)
_spread.derivative(values=lambda g, number, weights: _weighted(g, number, weights))


# samples of a bin


def aligned_means(
    input: Any, image: Any, lows: Any, lengths: Any, size: Pair, ratio: int, shifts: Any = None
) -> Any:
    """RoIAlign's samples, moved by ``shifts`` (two arrays (k, kh, kw)), as means (k, kh, kw, c)."""
    weight: Any = None
    at = []
    for axis in (0, 1):
        low, length, bins, limit = lows[axis], lengths[axis], size[axis], input.shape[2 + axis]
        xp, dtype, step = of(low), input.dtype, length / size[axis]
        if ratio > 0:
            per, most = xp.full(low.shape, ratio, dtype), ratio
        else:
            per = xp.ceil(data_of(step))
            most = on_host(per)
        cell = xp.arange(most).astype(dtype)
        part = (cell + 0.5) / xp.maximum(per, 1.0)[:, None]  # (k, samples) of a bin's length
        place = xp.arange(bins).astype(dtype)[:, None] + part[:, None, :]
        y = low[:, None, None] + place * step[:, None, None]
        y = along(y, axis)
        used = (cell < per[:, None]).reshape(-1, 1, 1, *((most, 1) if axis == 0 else (1, most)))
        if shifts is not None:
            y = y + shifts[axis][..., None, None]
        raw = data_of(y)
        inside = (raw >= -1.0) & (raw <= float(limit))
        y = ops.where(inside, y, 0.0)  # it has no weight, but nan · 0 is nan
        share = (used & inside).astype(dtype) / xp.maximum(per, 1.0).reshape(-1, 1, 1, 1, 1)
        weight = share if weight is None else weight * share
        at.append(y)
    return bin_means(input, image, at, weight)


def bin_means(input: Any, image: Any, at: Any, weight: Any) -> Any:
    """Weighted sums of samples, each bin's on a grid.

    Args:
        input: (n, c, h, w).
        image: (…) integers: which of the n each bin reads.
        at: y, which broadcasts to (…, a, b), and x likewise; beyond the outermost pixels they are
            moved there.
        weight: an array (…, a, b).

    Returns:
        (…, c).
    """
    *lead, a, b = weight.shape
    xp, count, many = of(weight), math.prod(lead), a * b
    weight = weight.reshape(count, 1, many)
    image = xp.broadcast_to(image[..., None, None], (*lead, a, b)).reshape(count, many)
    held = [ops.clip(z, 0.0, limit - 1.0) for z, limit in zip(at, input.shape[2:], strict=True)]
    y, x = (ops.broadcast_to(z, (*lead, a, b)).reshape(count, many) for z in held)
    found = []
    for part in chunks(count, many * input.shape[1]):
        points = ops.stack([y[part].reshape(-1), x[part].reshape(-1)], axis=-1)
        samples = sample_points(input, points, image[part].reshape(-1), "clamp_v1")
        found.append(ops.matmul(weight[part], samples.reshape(-1, many, input.shape[1])))
    if not found:
        return of(weight).zeros((*lead, input.shape[1]), input.dtype)
    joined = found[0] if len(found) == 1 else ops.concatenate(found, axis=0)
    return joined.reshape(*lead, input.shape[1])
