"""Windows that slide over an image: as columns, their means and their largest elements.

Everything here is a sum over the positions k of the window of slices of the image, and comes in
pairs of linear maps that are each other's transpose, which is each other's derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..engine import data_of, primitive
from .conv import Geometry, as_pair, per_axis
from .elementwise import of
from .shape import reshape

__all__ = ["avg_pool1d", "avg_pool2d", "fold", "max_pool1d", "max_pool2d", "unfold"]

Size = int | tuple[int, ...]


def _taps(geo: Geometry) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """For each position of the window, row by row: windows where it is inside, and its pixels."""
    for a in range(geo.kernel[0]):
        to_h, from_h = geo.overlap(0, a * geo.dilation[0], geo.out[0])
        for b in range(geo.kernel[1]):
            to_w, from_w = geo.overlap(1, b * geo.dilation[1], geo.out[1])
            yield (..., to_h, to_w), (..., from_h, from_w)


def _geometry(
    name: str,
    size: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil: bool = False,
) -> Geometry:
    """For one axis or two; ``ceil`` keeps a last window that hangs over, if it begins inside."""
    axes = len(size)
    k = per_axis(name, "kernel_size", kernel_size, axes, 1)
    s = per_axis(name, "stride", kernel_size if stride is None else stride, axes, 1)
    d = per_axis(name, "dilation", dilation, axes, 1)
    p, size = per_axis(name, "padding", padding, axes, 0), as_pair(size)
    out = []
    for i in (0, 1):
        room = size[i] + 2 * p[i] - d[i] * (k[i] - 1) - 1
        steps = -(-room // s[i]) if ceil else room // s[i]
        hangs = ceil and steps * s[i] >= size[i] + p[i]
        out.append(steps + (not hangs))
    if min(out) < 1:
        raise ValueError(
            f"{name}: a window {kernel_size} with dilation {dilation} is larger than the image "
            f"{size[-axes:]} with padding {padding}: pad more, or take a smaller window"
        )
    return Geometry(size, k, as_pair(out), s, p, d)


# Windows as columns


@primitive
def _windows(x: Any, geo: Geometry) -> Any:
    """(…, H, W) → (…, kh·kw, Ho, Wo), 0 where a window is outside."""
    windows = of(x).zeros((*x.shape[:-2], math.prod(geo.kernel), *geo.out), x.dtype)
    for k, (to, inside) in enumerate(_taps(geo)):
        windows[..., k, :, :][to] = x[inside]
    return windows


@primitive
def _overlapped(windows: Any, geo: Geometry) -> Any:
    """The transpose of ``_windows``: what the windows hold of a pixel, added up."""
    x = of(windows).zeros((*windows.shape[:-3], *geo.size), windows.dtype)
    for k, (to, inside) in enumerate(_taps(geo)):
        x[inside] += windows[..., k, :, :][to]
    return x


_windows.derivative(x=lambda g, geo: _overlapped(g, geo))
_overlapped.derivative(windows=lambda g, geo: _windows(g, geo))


def unfold(
    input: Any, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> Any:
    """The windows of an image as columns (im2col), as torch.nn.functional.unfold.

    A convolution is a matrix product with them: conv2d(x, w) is w.reshape(O, −1) @ unfold(x, …).

    Args:
        input: (N, C, H, W), or (C, H, W).
        kernel_size, dilation, padding, stride: as in ``conv2d``.

    Returns:
        (N, C·kh·kw, L), or without N: for each of the L windows, counted row by row, its elements
        channel by channel and row by row.

    Raises:
        ValueError: another number of axes, or a window larger than the padded image.
    """
    if input.ndim not in (3, 4):
        raise ValueError(f"unfold takes an input (N, C, H, W) or (C, H, W), got {input.shape}")
    geo = _geometry("unfold", input.shape[-2:], kernel_size, stride, padding, dilation)
    rows = input.shape[-3] * math.prod(geo.kernel)
    return reshape(_windows(input, geo), (*input.shape[:-3], rows, math.prod(geo.out)))


def fold(
    input: Any,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Any:
    """The transpose of ``unfold``: windows added up where they overlap (col2im), as torch's fold.

    Args:
        input: (N, C·kh·kw, L), or without N.
        output_size: (H, W) of the image.
        kernel_size, dilation, padding, stride: as in ``unfold``.

    Returns:
        (N, C, H, W), or without N.

    Raises:
        ValueError: shapes that ``unfold`` of such an image would not give.
    """
    size = per_axis("fold", "output_size", output_size, 2, 1)
    geo = _geometry("fold", size, kernel_size, stride, padding, dilation)
    taps, length = math.prod(geo.kernel), math.prod(geo.out)
    if input.ndim not in (2, 3) or input.shape[-2] % taps or input.shape[-1] != length:
        raise ValueError(
            f"fold to {size} takes (N, C·{taps}, {length}) or without N, for {length} windows of "
            f"{taps} elements, got {input.shape}"
        )
    channels = input.shape[-2] // taps
    return _overlapped(reshape(input, (*input.shape[:-2], channels, taps, *geo.out)), geo)


# Means


@primitive
def _sums(x: Any, geo: Geometry) -> Any:
    """(…, H, W) → (…, Ho, Wo), the sum of each window."""
    sums = of(x).zeros((*x.shape[:-2], *geo.out), x.dtype)
    for to, inside in _taps(geo):
        sums[to] += x[inside]
    return sums


@primitive
def _spread(sums: Any, geo: Geometry) -> Any:
    """The transpose of ``_sums``: to every pixel the numbers of the windows that it is in."""
    x = of(sums).zeros((*sums.shape[:-2], *geo.size), sums.dtype)
    for to, inside in _taps(geo):
        x[inside] += sums[to]
    return x


_sums.derivative(x=lambda g, geo: _spread(g, geo))
_spread.derivative(sums=lambda g, geo: _sums(g, geo))


def avg_pool2d(
    input: Any,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """The mean of each window, as torch.nn.functional.avg_pool2d.

    Args:
        input: (N, C, H, W), or (C, H, W).
        kernel_size: of the window; a pair is (vertical, horizontal).
        stride: from one window to the next (None: the window's own size).
        padding: zeros on each side, at most half of the window.
        ceil_mode: keep a last window that hangs over the padded image, if it begins inside.
        count_include_pad: divide by the padding in the window too (what hangs over never counts).
        divisor_override: divide by this instead.

    Returns:
        (N, C, H', W') with H' = ⌊(H + 2 padding − kernel) / stride⌋ + 1, or without N.

    Raises:
        ValueError: another number of axes, or sizes that do not fit.
    """
    options = kernel_size, stride, padding, 1, ceil_mode
    x, geo, shape = _pooled("avg_pool2d", 2, input, options)
    if divisor_override is not None:
        if divisor_override == 0:
            raise ValueError("avg_pool2d divides by divisor_override: it cannot be 0")
        return reshape(_sums(x, geo) * (1 / divisor_override), shape)
    return reshape(_sums(x, geo) * _shares(data_of(x), geo, count_include_pad), shape)


def avg_pool1d(
    input: Any,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:
    """``avg_pool2d`` with one axis: (N, C, L) or (C, L)."""
    x, geo, shape = _pooled("avg_pool1d", 1, input, (kernel_size, stride, padding, 1, ceil_mode))
    return reshape(_sums(x, geo) * _shares(data_of(x), geo, count_include_pad), shape)


def _shares(x: Any, geo: Geometry, count_include_pad: bool) -> Any:
    """1 / the number of elements of each window, (Ho, Wo)."""
    xp, counts = of(x), []
    for n, k, out, s, p in zip(geo.size, geo.kernel, geo.out, geo.stride, geo.before, strict=True):
        start, pad = xp.arange(out) * s - p, p if count_include_pad else 0
        counts.append(xp.minimum(start + k, n + pad) - xp.maximum(start, -pad))
    return (1 / (counts[0][:, None] * counts[1])).astype(x.dtype)


# Maxima


@primitive
def _pick(x: Any, which: Any, geo: Geometry) -> Any:
    """From each window the element number ``which`` (N, C, Ho, Wo); −∞ if there is none."""
    picked = of(x).full(which.shape, float("-inf"), x.dtype)
    for k, (to, inside) in enumerate(_taps(geo)):
        picked[to] = of(x).where(which[to] == k, x[inside], picked[to])
    return picked


@primitive
def _place(picked: Any, which: Any, geo: Geometry) -> Any:
    """The transpose of ``_pick``."""
    x = of(picked).zeros((*picked.shape[:-2], *geo.size), picked.dtype)
    for k, (to, inside) in enumerate(_taps(geo)):
        x[inside] += of(picked).where(which[to] == k, picked[to], 0.0)
    return x


_pick.derivative(x=lambda g, which, geo: _place(g, which, geo))
_place.derivative(picked=lambda g, which, geo: _pick(g, which, geo))


def _first_maximum(x: Any, geo: Geometry) -> Any:
    """The number of the first largest element of each window; a nan is larger than everything."""
    xp, shape = of(x), (*x.shape[:-2], *geo.out)
    largest, which = xp.full(shape, float("-inf"), x.dtype), xp.full(shape, -1, "int32")
    for k, (to, inside) in enumerate(_taps(geo)):
        new = x[inside]
        better = (new > largest[to]) | (new != new) | (which[to] < 0)
        largest[to] = xp.where(better, new, largest[to])
        which[to] = xp.where(better, k, which[to])
    return which


def max_pool2d(
    input: Any,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Any:
    """The largest element of each window, as torch.nn.functional.max_pool2d.

    Where several are largest, the first of them, row by row, gets the gradient, as in torch; a nan
    in the window is the result.

    Args:
        input: (N, C, H, W), or (C, H, W), of floating-point numbers.
        kernel_size: of the window; a pair is (vertical, horizontal).
        stride: from one window to the next (None: the window's own size).
        padding: −∞ on each side, at most half of the window.
        dilation: from one element of the window to the next.
        ceil_mode: keep a last window that hangs over the padded image, if it begins inside.

    Returns:
        (N, C, H', W') with H' = ⌊(H + 2 padding − dilation (kernel − 1) − 1) / stride⌋ + 1.

    Raises:
        ValueError: another number of axes, or sizes that do not fit.
        TypeError: integers.
    """
    return _max_pool("max_pool2d", 2, input, (kernel_size, stride, padding, dilation, ceil_mode))


def max_pool1d(
    input: Any,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Any:
    """``max_pool2d`` with one axis: (N, C, L) or (C, L)."""
    return _max_pool("max_pool1d", 1, input, (kernel_size, stride, padding, dilation, ceil_mode))


def _max_pool(name: str, axes: int, input: Any, options: tuple[Any, ...]) -> Any:
    if input.dtype.kind != "f":
        raise TypeError(
            f"{name} takes floating-point numbers, got {input.dtype}: use astype('float32')"
        )
    x, geo, shape = _pooled(name, axes, input, options)
    return reshape(_pick(x, _first_maximum(data_of(x), geo), geo), shape)


def _pooled(
    name: str, axes: int, input: Any, options: tuple[Any, ...]
) -> tuple[Any, Geometry, tuple[int, ...]]:
    """The input with two axes, the geometry, and the shape of the result."""
    if input.ndim not in (axes + 1, axes + 2):
        image = "L" if axes == 1 else "H, W"
        raise ValueError(
            f"{name} takes an input (N, C, {image}) or (C, {image}), got {input.shape}"
        )
    lead, size = input.shape[:-axes], input.shape[-axes:]
    geo = _geometry(name, size, *options)
    if any(
        2 * p > d * (k - 1) + 1
        for p, d, k in zip(geo.before, geo.dilation, geo.kernel, strict=True)
    ):
        raise ValueError(
            f"{name} takes a padding of at most half of the window, so that each window sees the "
            f"image: got padding {options[2]} for a window {options[0]}"
        )
    return reshape(input, (*lead, *geo.size)), geo, (*lead, *geo.out[-axes:])
