"""Reading an image between its pixels: bilinear sampling, its gradients, and grids of points.

Dai, Qi, Xiong, Li, Zhang, Hu, Wei 2017, *Deformable Convolutional Networks*, arXiv:1703.06211;
Jaderberg, Simonyan, Zisserman, Kavukcuoglu 2015, *Spatial Transformer Networks*, arXiv:1506.02025.

====================================================  ==========================================
x(p) = Σ_q G(q, p) x(q)             (1703.06211, 3)   ``sample_points``, ``bilinear_sample``
G(q, p) = g(q_y, p_y) g(q_x, p_x)   (1703.06211, 4)   with g(a, b) = max(0, 1 − |a − b|)
∂G/∂p                               (1703.06211, 7)   its derivative; see below at integers
the grid T_θ                        (1506.02025, 1)   ``affine_grid``
the sampler                         (1506.02025, 5)   ``grid_sample``
====================================================  ==========================================

Only four pixels q have G(q, p) ≠ 0, so sampling is a matrix S(p) with four entries in each row,
times the image as rows of channels: y = S x, x̄ = Sᵀ ȳ, and p̄ = ⟨ȳ, S'(p) x⟩ with S' the matrix of
the derivatives of those entries.

At an integer coordinate G has a kink.  The derivative is the one to the right, x(p + 1) − x(p), as
in the released kernels, which take the floor.  ``border`` says what lies outside:

``"zero_pad"``   pixels outside are 0, so up to one pixel beyond the edge something is left of it
                 (torchvision, DCN v2).  At −1 and below, and at H and above, the value is 0, and so
                 is the derivative, but for −1 itself, where the one to the right is x(0).
``"clamp_v1"``   a point outside [0, H) reads 0; in [H − 1, H) it reads the last row, and the
                 derivative is 0 (the first release).

Deviations: ``grid_sample`` answers nan to a point at nan, where torch's modes disagree: some give
nan, some 0 or a pixel of the border.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from .. import ops
from ..backend import Array, spread_rows, weighted_rows
from ..engine import data_of, primitive
from ..ops.elementwise import of

__all__ = ["affine_grid", "bilinear_sample", "grid_sample", "sample_points"]

Border = Literal["zero_pad", "clamp_v1"]
BORDERS = ("zero_pad", "clamp_v1")


def sample_points(input: Array, points: Array, image: Array, border: Border = "zero_pad") -> Array:
    """Bilinear samples at points of several images (Dai et al. 2017, eq. 3).

    Args:
        input: (n, c, h, w).
        points: (p, 2), (y, x) in pixels: (0, 0) is the centre of the first pixel.
        image: (p,) integers in [0, n): which image each point reads.
        border: what lies outside; see the module.

    Returns:
        (p, c).  A point at ±inf reads 0, one at nan reads nan.  A pixel that is inf or nan shows
        only in points of which it is one of the four neighbours, even with the weight 0.

    Raises:
        IndexError: an image number is out of range (on a GPU: not checked).
        ValueError: the shapes do not fit, or an unknown border.
        TypeError: ``input`` and ``points`` are not of one floating-point dtype, or ``image`` is not
            of integers.
    """
    if input.ndim != 4 or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f"sample_points takes input (n, c, h, w) and points (p, 2), got {input.shape} and "
            f"{points.shape}"
        )
    if tuple(image.shape) != (points.shape[0],):
        raise ValueError(
            f"image numbers are ({points.shape[0]},), one per point, got {image.shape}"
        )
    if border not in BORDERS:
        raise ValueError(f"border is one of {', '.join(BORDERS)}, got {border!r}")
    if input.dtype != points.dtype or input.dtype.kind != "f":
        raise TypeError(
            "input and points are of one floating-point dtype, got "
            f"{input.dtype} and {points.dtype}: convert with astype"
        )
    image = data_of(image)
    if image.dtype.kind not in "iu":
        raise TypeError(f"image numbers are integers, got {image.dtype}")
    return _sample(input, points, image.astype("int64", copy=False), border)


def bilinear_sample(input: Array, points: Array, border: Border = "zero_pad") -> Array:
    """Bilinear samples at points of their own for each image.

    Args:
        input: (n, c, h, w).
        points: (n, p, 2), (y, x) in pixels.
        border: as for ``sample_points``.

    Returns:
        (n, c, p).

    Raises:
        ValueError, TypeError: as ``sample_points``.
    """
    if points.ndim != 3 or points.shape[0] != input.shape[0]:
        raise ValueError(
            f"bilinear_sample takes input (n, c, h, w) and points (n, p, 2), got {input.shape} and "
            f"{points.shape}"
        )
    n, p, _ = points.shape
    xp = of(points)
    image = xp.broadcast_to(xp.arange(n)[:, None], (n, p)).reshape(-1)
    rows = sample_points(input, points.reshape(n * p, 2), image, border)
    return rows.reshape(n, p, input.shape[1]).transpose(0, 2, 1)


def _definition(input: Any, points: Any, image: Any, border: str) -> Any:
    """Σ_q G(q, p) x(q), neighbour by neighbour."""
    size = input.shape[2:]
    rows = as_rows(input)
    at, _ = _placed(points, size, border)
    floor = of(points).floor(data_of(at))
    fraction, low = at - floor, _whole(floor)
    y: Any = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (fraction[:, 0] if dy else 1.0 - fraction[:, 0]) * (
                fraction[:, 1] if dx else 1.0 - fraction[:, 1]
            )
            y = y + weight[:, None] * rows[_numbers(low[:, 0] + dy, low[:, 1] + dx, image, size)]
    return y


def _placed(points: Any, size: Any, border: str) -> tuple[Any, Any]:
    """Where the points (…, 2) are read, and where that moves with them (None: wherever it counts).

    Points outside are moved to −2, where there is nothing, so that their integers exist.
    """
    xp, raw = of(points), data_of(points)
    edge = xp.asarray([*size], dtype=raw.dtype)
    if border == "clamp_v1":
        moves = (raw >= 0.0) & (raw < edge - 1.0)
        held = xp.where((raw >= 0.0) & (raw < edge), edge - 1.0, -2.0)
        return ops.where(moves | (raw != raw), points, held), moves
    near = (raw > -2.0) & (raw < edge + 1.0)
    return ops.where(near | (raw != raw), points, -2.0), None


def _whole(place: Any) -> Any:
    """Integers as such; −2 for nan."""
    return of(place).where(place == place, place, -2.0).astype("int64")


def _numbers(y: Any, x: Any, image: Any, size: Any) -> Any:
    """The rows of ``as_rows`` with the pixels (y, x) of the images."""
    h, w = size
    near = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return of(y).where(near, y * w + x, h * w) + image * (h * w + 1)


def corners(
    points: Any, image: Any, size: Any, border: str, slopes: bool = False
) -> tuple[Any, ...]:
    """The four neighbours of each point as numbers of ``as_rows``, and their weights.

    Args:
        points: (p, 2) array.
        image: (p,) integers.
        size: (h, w).
        slopes: whether the derivatives of the weights are wanted.

    Returns:
        Four arrays (p, 4): numbers, weights, and their derivatives by y and by x (or None).
    """
    xp, shape = of(points), (len(points), 4)
    at, moves = _placed(points, size, border)
    floor = xp.floor(at)
    fraction, low = at - floor, _whole(floor)
    sides = [(1.0 - fraction[:, axis], fraction[:, axis]) for axis in (0, 1)]
    number, weights = xp.empty(shape, "int64"), xp.empty(shape, points.dtype)
    for k in range(4):
        i, j = k // 2, k % 2
        number[:, k] = _numbers(low[:, 0] + i, low[:, 1] + j, image, size)
        xp.multiply(sides[0][i], sides[1][j], out=weights[:, k])
    if not slopes:
        return number, weights, None, None
    by_y, by_x = xp.empty(shape, points.dtype), xp.empty(shape, points.dtype)
    for k in range(4):
        i, j = k // 2, k % 2
        by_y[:, k] = sides[1][j] if i else -sides[1][j]
        by_x[:, k] = sides[0][i] if j else -sides[0][i]
    if moves is not None:
        by_y, by_x = by_y * moves[:, :1], by_x * moves[:, 1:]
    return number, weights, by_y, by_x


def row_products(a: Any, b: Any) -> Any:
    """⟨a_r, b_r⟩ for every row r of two matrices."""
    return of(a).einsum("rc,rc->r", a, b)


def as_pixels(input: Any) -> Any:
    """(n, c, h, w) as rows (n h w, c)."""
    n, c, h, w = input.shape
    return input.transpose(0, 2, 3, 1).reshape(n * h * w, c)


def as_rows(input: Any) -> Any:
    """(n, c, h, w) as rows (n (h w + 1), c): behind the pixels of each image a row of zeros.

    All that lies outside reads this row, so that even inf · 0 at the edge stays inside.
    """
    n, c, h, w = input.shape
    pixels = input.transpose(0, 2, 3, 1).reshape(n, h * w, c)
    rows = ops.concatenate([pixels, of(input).zeros((n, 1, c), input.dtype)], axis=1)
    return rows.reshape(n * (h * w + 1), c)


def from_rows(rows: Any, shape: tuple[int, ...]) -> Any:
    """What ``as_rows`` does to an input of this shape, undone."""
    n, c, h, w = shape
    pixels = rows.reshape(n, h * w + 1, c)[:, : h * w]
    return pixels.reshape(n, h, w, c).transpose(0, 3, 1, 2)


@primitive(composite=_definition)
def _sample(input: Any, points: Any, image: Any, border: str) -> Any:
    number, weights, _, _ = corners(points, image, input.shape[2:], border)
    return weighted_rows(weights, number, as_rows(input))


@_sample.joint_derivative("input", "points")
def _rule(g: Any, needs: Any, input: Any, points: Any, image: Any, border: str) -> tuple[Any, Any]:
    shape = input.shape
    number, weights, by_y, by_x = corners(points, image, shape[2:], border, slopes=needs[1])
    x_bar = p_bar = None
    if needs[0]:
        count = shape[0] * (shape[2] * shape[3] + 1)
        x_bar = from_rows(spread_rows(weights, number, g, count), shape)
    if needs[1]:
        rows = as_rows(input)
        slopes = (weighted_rows(slope, number, rows) for slope in (by_y, by_x))
        p_bar = of(g).stack([row_products(g, slope) for slope in slopes], axis=1)
    return x_bar, p_bar


# grids


def affine_grid(theta: Array, size: tuple[int, ...], align_corners: bool = False) -> Array:
    """The points (x, y) = θ (x', y', 1)ᵀ for every pixel (x', y') of the output.

    Jaderberg et al. 2015, eq. 1, as torch.nn.functional.affine_grid.

    Args:
        theta: (n, 2, 3).
        size: (n, c, h, w) of the output; c is not used.
        align_corners: whether −1 and 1 are the centres of the first and last pixel, or the edges of
            the image.

    Returns:
        (n, h, w, 2), what ``grid_sample`` takes.

    Raises:
        ValueError: the shapes do not fit.
    """
    if len(size) != 4 or tuple(theta.shape) != (size[0], 2, 3):
        raise ValueError(
            f"affine_grid takes theta (n, 2, 3) and a size (n, c, h, w), got {theta.shape} and "
            f"{tuple(size)}"
        )
    n, _, h, w = size
    xp, dtype = of(theta), theta.dtype
    base = xp.ones((h, w, 3), dtype)
    base[..., 0] = _axis(xp, w, align_corners)
    base[..., 1] = _axis(xp, h, align_corners)[:, None]
    return (base.reshape(1, h * w, 3) @ theta.swapaxes(1, 2)).reshape(n, h, w, 2)


def _axis(xp: Any, size: int, align_corners: bool) -> Any:
    """The coordinates of pixels in [−1, 1]; 0 for a single one whose corners are aligned."""
    place = xp.arange(size).astype("float64")
    if align_corners:
        return 2.0 * place / (size - 1) - 1.0 if size > 1 else 0.0 * place
    return (2.0 * place + 1.0) / size - 1.0


PADDINGS = ("zeros", "border", "reflection")
CUBIC = -0.75
"""The derivative of Keys' kernel at 1, as in torch."""

TAPS = (-1, 0, 1, 2)
"""The neighbours of a point in bicubic interpolation, counted from its floor."""


def grid_sample(
    input: Array,
    grid: Array,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Array:
    """Sample at points given in [−1, 1], as torch.nn.functional.grid_sample.

    Args:
        input: (n, c, h, w).
        grid: (n, h', w', 2), (x, y): −1 and 1 are the edges of the image, or, with
            ``align_corners``, the centres of the outermost pixels.
        mode: ``"bilinear"``, ``"nearest"`` (a tie goes to the even pixel) or ``"bicubic"`` (Keys
            1981, with a = −0.75).
        padding_mode: what lies outside: ``"zeros"``, the nearest pixel of the ``"border"``, or the
            image mirrored at its edges (at the centres of the outermost pixels with
            ``align_corners``), ``"reflection"``.

        align_corners: see ``grid``.

    Returns:
        (n, c, h', w').  A point at nan reads nan, and so does one at ±inf with ``"reflection"`` or
        ``"bicubic"``, which have no place for it.

    Raises:
        ValueError: the shapes do not fit, or an unknown mode.
        TypeError: not one floating-point dtype.
    """
    if input.ndim != 4 or grid.ndim != 4 or grid.shape[0] != input.shape[0] or grid.shape[3] != 2:
        raise ValueError(
            f"grid_sample takes input (n, c, h, w) and grid (n, h', w', 2), got {input.shape} and "
            f"{grid.shape}"
        )
    if mode not in SAMPLERS or padding_mode not in PADDINGS:
        raise ValueError(
            f"grid_sample knows the modes {', '.join(SAMPLERS)} and the paddings "
            f"{', '.join(PADDINGS)}, got {mode!r} and {padding_mode!r}"
        )
    n, height, width, _ = grid.shape
    sizes = (input.shape[3], input.shape[2])
    scale = [(s - 1) / 2 if align_corners else s / 2 for s in sizes]
    shift = [(s - 1) / 2 for s in sizes]
    xp = of(grid)
    pixels = grid * xp.asarray(scale, dtype=grid.dtype) + xp.asarray(shift, dtype=grid.dtype)
    points = ops.flip(pixels, axis=-1).reshape(n, height * width, 2)
    found = SAMPLERS[mode](input, points, padding_mode, align_corners)
    return found.reshape(n, input.shape[1], height, width)


def _bilinear(input: Any, points: Any, padding: str, align_corners: bool) -> Any:
    return bilinear_sample(input, _padded(points, input.shape[2:], padding, align_corners))


def _nearest(input: Any, points: Any, padding: str, align_corners: bool) -> Any:
    points = data_of(_padded(points, input.shape[2:], padding, align_corners))
    return _pixels(input, of(points).rint(points))


def _bicubic(input: Any, points: Any, padding: str, align_corners: bool) -> Any:
    """Sixteen neighbours; the padding is that of the neighbours, not of the point."""
    xp, (n, p, _), size = of(points), points.shape, input.shape[2:]
    floor = xp.floor(data_of(points))
    t = points - floor
    weights = [ops.stack([_keys(t[..., axis], tap) for tap in TAPS], axis=2) for axis in (0, 1)]
    taps = xp.asarray([[y, x] for y in TAPS for x in TAPS], dtype=floor.dtype)
    near = (floor[:, :, None] + taps).reshape(n, p * len(taps), 2)
    found = _pixels(input, _padded(near, size, padding, align_corners))
    found = found.reshape(n, input.shape[1], p, len(TAPS), len(TAPS))
    return ops.einsum("ncpij,npi,npj->ncp", found, *weights)


def _pixels(input: Any, places: Any) -> Any:
    """The pixels (n, c, p) at places (n, p, 2) that are integers: 0 outside, nan for nan."""
    (n, p, _), size = places.shape, input.shape[2:]
    at = _whole(_placed(places, size, "zero_pad")[0])
    image = of(places).arange(n)[:, None]
    found = as_rows(input)[_numbers(at[..., 0], at[..., 1], image, size).reshape(-1)]
    found = found.reshape(n, p, input.shape[1]).transpose(0, 2, 1)
    return ops.where((places == places).all(axis=2)[:, None], found, math.nan)


def _keys(t: Any, tap: int) -> Any:
    """The weight of the pixel ``tap`` pixels from the floor of a point with fraction t."""
    if tap in (0, 1):
        d = t if tap == 0 else 1.0 - t
        return ((CUBIC + 2.0) * d - (CUBIC + 3.0)) * d * d + 1.0
    d = 1.0 + t if tap < 0 else 2.0 - t
    return CUBIC * (((d - 5.0) * d + 8.0) * d - 4.0)


SAMPLERS = {"bilinear": _bilinear, "nearest": _nearest, "bicubic": _bicubic}


def _padded(points: Any, size: Any, padding: str, align_corners: bool) -> Any:
    """The points (…, 2) that are read instead, with their derivatives: 0 where one is moved."""
    if padding == "zeros":
        return points
    xp, raw = of(points), data_of(points)
    last = xp.asarray([s - 1.0 for s in size], dtype=raw.dtype)
    if padding == "reflection":
        low = 0.0 if align_corners else -0.5
        span = xp.asarray([s - 1.0 if align_corners else float(s) for s in size], dtype=raw.dtype)
        away = abs(raw - low)
        turns = xp.floor(away / xp.maximum(span, 1e-30))
        odd = turns - 2.0 * xp.floor(turns / 2.0)
        sign = xp.where(raw < low, -1.0, 1.0).astype(raw.dtype)
        # |p − low| − turns · span, or, every other time, what is left of the span
        points = (points - low) * (sign * (1.0 - 2.0 * odd)) + (
            odd * span - (1.0 - 2.0 * odd) * turns * span + low
        )
        points = ops.where(span > 0.0, points, 0.0)
        raw = data_of(points)
    held = xp.minimum(xp.maximum(raw, 0.0), last)
    return ops.where((raw > 0.0) & (raw < last), points, held)
