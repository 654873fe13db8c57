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

Deviations: none.
"""

from __future__ import annotations

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
        (p, c).  A point at ±inf reads 0, one at nan reads nan.

    Raises:
        ValueError: the shapes do not fit, or an unknown border.
        TypeError: ``input`` and ``points`` are not of one floating-point dtype.
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
    return _sample(input, points, data_of(image), border)


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
    n, c, h, w = input.shape
    xp = of(points)
    rows = input.transpose(0, 2, 3, 1).reshape(n * h * w, c)
    at, _, inside = _placed(points, h, w, border)
    floor = xp.floor(data_of(at))
    fraction = at - floor
    y: Any = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (fraction[:, 0] if dy else 1.0 - fraction[:, 0]) * (
                fraction[:, 1] if dx else 1.0 - fraction[:, 1]
            )
            row, column = floor[:, 0] + dy, floor[:, 1] + dx
            near = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            place = (image * h + _held(row, h)) * w + _held(column, w)
            y = y + (weight * near.astype(weight.dtype))[:, None] * rows[place]
    return y


def _placed(points: Any, h: int, w: int, border: str) -> tuple[Any, Any, Any]:
    """Where the points are read; where that moves with them (None: everywhere); where it counts.

    Points far outside are moved near, so that their integers exist.
    """
    xp, raw = of(points), data_of(points)
    size = xp.asarray([h, w], dtype=raw.dtype)
    if border == "clamp_v1":
        inside = ((raw >= 0.0) & (raw < size)).all(axis=1)
        moves = (raw >= 0.0) & (raw < size - 1.0)
        held = xp.minimum(xp.maximum(raw, 0.0), size - 1.0)
        return ops.where(moves | (raw != raw), points, held), moves, inside
    near = (raw > -2.0) & (raw < size + 1.0)
    at = ops.where(near | (raw != raw), points, -2.0)
    return at, None, xp.ones(raw.shape[0], "bool")


def _held(place: Any, size: int) -> Any:
    """Integers, those outside of the image moved to its edge; 0 for nan."""
    xp = of(place)
    return xp.where(place == place, xp.clip(place, 0.0, size - 1.0), 0.0).astype("int64")


def corners(points: Any, image: Any, h: int, w: int, border: str) -> tuple[Any, Any, Any, Any]:
    """The four neighbours of each point as rows (n h w), and their weights.

    Args:
        points: (p, 2) array.
        image: (p,) integers.

    Returns:
        Four arrays (p, 4): numbers of rows, weights, and their derivatives by y and by x.
    """
    xp, dtype = of(points), points.dtype
    at, moves, inside = _placed(points, h, w, border)
    floor = xp.floor(at)
    fraction = at - floor
    sides: list[Any] = [[], []]  # of each axis, above and below: place, weight, slope
    for axis, size in enumerate((h, w)):
        f, low = fraction[:, axis], floor[:, axis]
        for side in (0, 1):
            place = low + side
            near = (inside & (place >= 0) & (place < size)).astype(dtype)
            slope = near if side else -near
            if moves is not None:
                slope = slope * moves[:, axis]
            sides[axis].append((_held(place, size), (f if side else 1.0 - f) * near, slope))
    number = xp.empty((len(points), 4), "int64")
    weights, by_y, by_x = (xp.empty((len(points), 4), dtype) for _ in range(3))
    for i, (row, wy, sy) in enumerate(sides[0]):
        start = (image * h + row) * w
        for j, (column, wx, sx) in enumerate(sides[1]):
            k = 2 * i + j
            xp.add(start, column, out=number[:, k])
            xp.multiply(wy, wx, out=weights[:, k])
            xp.multiply(sy, wx, out=by_y[:, k])
            xp.multiply(wy, sx, out=by_x[:, k])
    return number, weights, by_y, by_x


def row_products(a: Any, b: Any) -> Any:
    """⟨a_r, b_r⟩ for every row r of two matrices."""
    return of(a).einsum("rc,rc->r", a, b)


def as_pixels(input: Any) -> Any:
    """(n, c, h, w) as rows (n h w, c)."""
    n, c, h, w = input.shape
    return input.transpose(0, 2, 3, 1).reshape(n * h * w, c)


@primitive(composite=_definition)
def _sample(input: Any, points: Any, image: Any, border: str) -> Any:
    h, w = input.shape[2:]
    number, weights, _, _ = corners(points, image, h, w, border)
    return weighted_rows(weights, number, as_pixels(input))


@_sample.joint_derivative("input", "points")
def _rule(g: Any, needs: Any, input: Any, points: Any, image: Any, border: str) -> tuple[Any, Any]:
    n, c, h, w = input.shape
    number, weights, by_y, by_x = corners(points, image, h, w, border)
    x_bar = p_bar = None
    if needs[0]:
        x_bar = spread_rows(weights, number, g, n * h * w)
        x_bar = x_bar.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    if needs[1]:
        rows = as_pixels(input)
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

    Returns:
        (n, c, h', w').

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
    return bilinear_sample(input, of(points).rint(points))


def _bicubic(input: Any, points: Any, padding: str, align_corners: bool) -> Any:
    """Sixteen neighbours; the padding is that of the neighbours, not of the point."""
    xp, size = of(points), input.shape[2:]
    floor = xp.floor(data_of(points))
    t = points - floor
    y: Any = 0.0
    for dy in range(-1, 3):
        for dx in range(-1, 3):
            near = floor + xp.asarray([dy, dx], dtype=floor.dtype)
            tap = bilinear_sample(input, _padded(near, size, padding, align_corners))
            y = y + tap * (_keys(t[..., 0], dy) * _keys(t[..., 1], dx))[:, None]
    return y


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
