"""Deformable convolution: a kernel whose every point is moved by a number that the network chose.

Dai, Qi, Xiong, Li, Zhang, Hu, Wei 2017, *Deformable Convolutional Networks*, arXiv:1703.06211
(ICCV 2017); Zhu, Hu, Lin, Dai 2019, *Deformable ConvNets v2: More Deformable, Better Results*,
arXiv:1811.11168 (CVPR 2019).

=======================================================  =======================================
y(p₀) = Σₙ w(pₙ) x(p₀ + pₙ + Δpₙ)         (1703.06211, 2)  ``deform_conv2d``, ``mask=None``
y(p) = Σₖ wₖ x(p + pₖ + Δpₖ) Δmₖ          (1811.11168, 1)  ``deform_conv2d`` with ``mask``
the same as K warps and 1×1 convolutions                   ``deform_conv2d_by_warps``
=======================================================  =======================================

======  ============  ==========================================================================
letter  argument      meaning
======  ============  ==========================================================================
x, w    input, weight  as for a convolution
pₙ, pₖ  –             the K = kh · kw places of the kernel, row by row
Δp      offset        two channels for each place, first Δy, then Δx: channel 2 (g K + k) is Δy
Δm      mask          one channel for each place; the layer puts it through a sigmoid
G       –             offset groups: channels of x are split into G parts, each with its own Δp
======  ============  ==========================================================================

With S the sparse matrix of bilinear weights (``sampling``), x as rows of pixels and w as a matrix
(K C, C'), the columns are D(m) S x and y = D(m) S x w.  So w̄ = (D(m) S x)ᵀ ȳ, and with z = ȳ wᵀ:
x̄ = Sᵀ D(m) z, m̄ = ⟨z, S x⟩, and Δp̄ = m ⟨z, S' x⟩ for each of the two coordinates.

Deviations: none; the layout is torchvision.ops.deform_conv2d's.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..backend import Array, spread_rows, weighted_rows
from ..engine import primitive
from ..ops.conv import Pair, per_axis
from ..ops.elementwise import of
from .sampling import (
    BORDERS,
    Border,
    as_rows,
    bilinear_sample,
    corners,
    from_rows,
    row_products,
)

__all__ = ["deform_conv2d", "deform_conv2d_by_warps"]

BUDGET = 1 << 23
"""Numbers that may exist beside arguments and gradients: images are taken in chunks to stay below.

Of 4 bytes, that is 32 MiB; an image that needs more is a chunk of its own.
"""


def deform_conv2d(
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | Pair = (1, 1),
    padding: int | Pair = (0, 0),
    dilation: int | Pair = (1, 1),
    mask: Array | None = None,
    *,
    border: Border = "zero_pad",
) -> Array:
    """Deformable convolution, v1, or v2 with a ``mask`` (Dai et al. 2017, eq. 2; Zhu 2019, eq. 1).

    Args:
        input: (n, c, h, w).
        offset: (n, 2 G kh kw, h', w') in pixels; G is read off it.  Channel 2 (g K + k) moves
            place k of group g down, the next one moves it right.
        weight: (c', c / groups, kh, kw); the groups are read off it.
        bias: (c',), or None for 0.
        stride, padding, dilation: of the grid that is deformed; an int for both axes.
        mask: (n, G kh kw, h', w'), or None for 1.
        border: what lies outside of the image; see ``sampling``.

    Returns:
        (n, c', h', w') with h' = (h + 2 padding − dilation (kh − 1) − 1) // stride + 1.

    Memory: beside arguments, output and gradients there are at most 2²³ numbers in the forward pass
    and in the backward pass, or those of one image if that needs more, which is 72 for each place
    that is read (G K h' w'), 6 for each column (c K h' w') and 4 for each number of the image and
    of the output.  Under ``create_graph`` it is that of ``deform_conv2d_by_warps``.

    Raises:
        ValueError: the shapes do not fit; the kernel is larger than the padded image.
        TypeError: not one floating-point dtype.
    """
    geometry = _checked(input, offset, weight, mask, stride, padding, dilation, border)
    y = _deform(input, offset, weight, mask, geometry, border)
    return y if bias is None else y + _checked_bias(bias, weight)


def deform_conv2d_by_warps(
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | Pair = (1, 1),
    padding: int | Pair = (0, 0),
    dilation: int | Pair = (1, 1),
    mask: Array | None = None,
    *,
    border: Border = "zero_pad",
) -> Array:
    """The same function, to be read: for each place of the kernel the image is warped, and weighed.

    Its memory is that of K images.  Arguments, result and errors are ``deform_conv2d``'s.
    """
    geometry = _checked(input, offset, weight, mask, stride, padding, dilation, border)
    y = _definition(input, offset, weight, mask, geometry, border)
    return y if bias is None else y + _checked_bias(bias, weight)


def _definition(
    input: Any, offset: Any, weight: Any, mask: Any, geometry: Geometry, border: Border
) -> Any:
    """Σₖ wₖ (mₖ · warp of x by pₖ + Δpₖ), a 1×1 convolution for each k."""
    n, c, h, w = input.shape
    groups, k, (height, width) = geometry.offset_groups, geometry.places, geometry.output
    size = height * width
    moved = offset.reshape(n * groups, k, 2, size).transpose(0, 1, 3, 2)
    points = moved + geometry.grid(of(offset), offset.dtype).swapaxes(0, 1)
    maps = input.reshape(n * groups, c // groups, h, w)
    warped = bilinear_sample(maps, points.reshape(n * groups, k * size, 2), border)
    warped = warped.reshape(n, groups, c // groups, k, size)
    if mask is not None:
        warped = warped * mask.reshape(n, groups, 1, k, size)
    parts = geometry.groups
    kernel = weight.reshape(parts, weight.shape[0] // parts, c // parts, k)
    y = ops.einsum("ngckl,gock->ngol", warped.reshape(n, parts, c // parts, k, size), kernel)
    return y.reshape(n, weight.shape[0], height, width)


class Geometry:
    """Where a kernel reads: all that is known without looking at a number."""

    def __init__(
        self,
        image: Pair,
        kernel: Pair,
        options: tuple[Pair, Pair, Pair],
        groups: int,
        offset_groups: int,
    ) -> None:
        """``options`` are stride, padding and dilation; the rest as ``deform_conv2d`` reads it."""
        self.kernel = kernel
        self.stride, self.padding, self.dilation = options
        self.groups, self.offset_groups = groups, offset_groups
        self.places = kernel[0] * kernel[1]
        sizes = zip(image, kernel, *options, strict=True)
        height, width = ((a + 2 * p - d * (k - 1) - 1) // s + 1 for a, k, s, p, d in sizes)
        self.output = (height, width)

    def grid(self, xp: Any, dtype: Any) -> Any:
        """p₀ + pₖ for every pixel of the output and place of the kernel: (h' w', K, 2)."""
        (height, width), (kh, kw) = self.output, self.kernel
        grid = xp.empty((height, width, kh, kw, 2), dtype)
        for axis, (size, taps) in enumerate(((height, kh), (width, kw))):
            start = xp.arange(size) * self.stride[axis] - self.padding[axis]
            place = (start[:, None] + xp.arange(taps) * self.dilation[axis]).astype(dtype)
            grid[..., axis] = place[:, None, :, None] if axis == 0 else place[:, None, :]
        return grid.reshape(height * width, kh * kw, 2)


def _columns(
    offset: Any, mask: Any, shape: Any, geometry: Geometry, border: str, slopes: bool = False
) -> tuple[Any, Any, Any, Any, Any]:
    """The rows of pixels that each column is made of, in the order (n, h' w', K, G).

    Returns:
        ``corners`` of all points, rows of pixels split into G, and the mask (points, 1) or None.
    """
    xp, n = of(offset), shape[0]
    groups, k = geometry.offset_groups, geometry.places
    size = geometry.output[0] * geometry.output[1]
    points = offset.reshape(n, groups, k, 2, size).transpose(0, 4, 2, 1, 3)
    points = points + geometry.grid(xp, offset.dtype)[:, :, None]
    image = xp.broadcast_to(xp.arange(n)[:, None], (n, size * k * groups)).reshape(-1)
    number, *weights = corners(points.reshape(-1, 2), image, shape[2:], border, slopes)
    if groups > 1:
        number *= groups
        number += xp.arange(len(number))[:, None] % groups
    if mask is not None:
        mask = mask.reshape(n, groups, k, size).transpose(0, 3, 2, 1).reshape(-1, 1)
    return number, *weights, mask


def _needed(shape: Any, out: int, geometry: Geometry) -> int:
    """A bound on the numbers that exist at a time for one image, as ``deform_conv2d`` states it."""
    (_, c, h, w), size = shape, geometry.output[0] * geometry.output[1]
    places = geometry.places * size
    return int(72 * geometry.offset_groups * places + 6 * c * places + 4 * (c * h * w + out * size))


def _chunks(shape: Any, out: int, geometry: Geometry) -> list[slice]:
    step = max(1, BUDGET // max(_needed(shape, out, geometry), 1))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _matrix(weight: Any, groups: int) -> Any:
    """w as (groups, K c, c'), c and c' of one group."""
    out, c, kh, kw = weight.shape
    split = weight.reshape(groups, out // groups, c, kh * kw)
    return split.transpose(0, 3, 2, 1).reshape(groups, kh * kw * c, out // groups)


def _by_group(columns: Any, geometry: Geometry) -> Any:
    """(n h' w', K C) as (groups, n h' w', K c)."""
    groups = geometry.groups
    if groups == 1:
        return columns[None]
    rows, k = columns.shape[0], geometry.places
    split = columns.reshape(rows, k, groups, -1).transpose(2, 0, 1, 3)
    return split.reshape(groups, rows, -1)


@primitive(composite=_definition)
def _deform(input: Any, offset: Any, weight: Any, mask: Any, geometry: Any, border: str) -> Any:
    (n, c, _, _), out = input.shape, weight.shape[0]
    height, width = geometry.output
    y = of(input).empty((n, out, height, width), input.dtype)
    w = _matrix(weight, geometry.groups)
    for chunk in _chunks(input.shape, weight.shape[0], geometry):
        x, part = input[chunk], None if mask is None else mask[chunk]
        number, weights, _, _, m = _columns(offset[chunk], part, x.shape, geometry, border)
        rows = of(x).ascontiguousarray(as_rows(x)).reshape(-1, c // geometry.offset_groups)
        columns = weighted_rows(weights if m is None else weights * m, number, rows)
        columns = columns.reshape(-1, geometry.places * c)
        found = _by_group(columns, geometry) @ w  # (groups, n h' w', c')
        found = found.reshape(geometry.groups, x.shape[0], height * width, -1)
        y[chunk] = found.transpose(1, 0, 3, 2).reshape(x.shape[0], out, height, width)
    return y


@_deform.joint_derivative("input", "offset", "weight", "mask")
def _rule(
    g: Any, needs: Any, input: Any, offset: Any, weight: Any, mask: Any, geometry: Any, border: str
) -> tuple[Any, ...]:
    xp, (n, c, _, _) = of(g), input.shape
    groups, k, parts = geometry.offset_groups, geometry.places, geometry.groups
    matrix = _matrix(weight, parts)
    grads: list[Any] = [xp.zeros(a.shape, a.dtype) if a is not None and needed else None
             for a, needed in zip((input, offset, weight, mask), needs, strict=True)]  # fmt: skip
    x_bar, p_bar, _, m_bar = grads
    w_bar: Any = 0.0
    for chunk in _chunks(input.shape, weight.shape[0], geometry):
        x, part = input[chunk], None if mask is None else mask[chunk]
        count = x.shape[0]
        number, weights, by_y, by_x, m = _columns(
            offset[chunk], part, x.shape, geometry, border, slopes=needs[1]
        )
        # every product would copy rows that are not contiguous
        rows = xp.ascontiguousarray(as_rows(x)).reshape(-1, c // groups)
        y_bar = g[chunk].reshape(count, parts, -1, g.shape[2] * g.shape[3])
        y_bar = y_bar.transpose(1, 0, 3, 2).reshape(parts, count * y_bar.shape[3], -1)
        if needs[0] or needs[1] or needs[3]:
            z = y_bar @ matrix.swapaxes(1, 2)  # (groups, n h' w', K c)
            z = z.reshape(parts, -1, k, c // parts).transpose(1, 2, 0, 3).reshape(-1, c // groups)
        if needs[2] or needs[3]:
            sampled = weighted_rows(weights, number, rows)
            if needs[2]:
                columns = sampled if m is None else sampled * m
                columns = _by_group(columns.reshape(-1, k * c), geometry)
                w_bar = w_bar + columns.swapaxes(1, 2) @ y_bar
            if needs[3]:
                m_bar[chunk] = _as_channels(row_products(z, sampled), count, geometry)
        if needs[1]:
            slopes = (weighted_rows(slope, number, rows) for slope in (by_y, by_x))
            moved = xp.stack([row_products(z, slope) for slope in slopes], axis=1)
            p_bar[chunk] = _as_channels(moved if m is None else moved * m, count, geometry)
        if needs[0]:
            spread = spread_rows(weights if m is None else weights * m, number, z, len(rows))
            x_bar[chunk] = from_rows(spread, x.shape)
    if needs[2] and n:
        out = weight.shape[0]
        w_bar = w_bar.reshape(parts, k, c // parts, out // parts).transpose(0, 3, 2, 1)
        grads[2] = w_bar.reshape(weight.shape)
    return tuple(grads)


def _as_channels(values: Any, count: int, geometry: Geometry) -> Any:
    """(n h' w' K G, …) as channels (n, G K …, h', w')."""
    (height, width), k, groups = geometry.output, geometry.places, geometry.offset_groups
    values = values.reshape(count, height, width, k, groups, -1)
    return values.transpose(0, 4, 3, 5, 1, 2).reshape(count, -1, height, width)


def _checked(
    input: Any, offset: Any, weight: Any, mask: Any,
    stride: int | Pair, padding: int | Pair, dilation: int | Pair, border: str,
) -> Geometry:  # fmt: skip
    arrays = {"input": input, "offset": offset, "weight": weight, "mask": mask}
    present = {name: x for name, x in arrays.items() if x is not None}
    if any(x.ndim != 4 for x in present.values()):
        raise ValueError(
            "deform_conv2d takes input (n, c, h, w), offset (n, 2 G K, h', w'), weight "
            "(c', c / groups, kh, kw) and mask (n, G K, h', w'), got "
            + ", ".join(f"{name} {x.shape}" for name, x in present.items())
        )
    dtypes = {str(x.dtype) for x in present.values()}
    if len(dtypes) > 1 or input.dtype.kind != "f":
        raise TypeError(
            f"deform_conv2d takes one floating-point dtype, got {sorted(dtypes)}: convert with "
            "astype"
        )
    if border not in BORDERS:
        raise ValueError(f"border is one of {', '.join(BORDERS)}, got {border!r}")
    n, c, h, w = input.shape
    out, width, kh, kw = weight.shape
    if width == 0 or c % width or out % (c // width):
        raise ValueError(
            f"a weight {weight.shape} does not fit {c} input channels: its second axis divides "
            "them into groups, and the groups divide its first axis"
        )
    pairs = (
        per_axis("deform_conv2d", "stride", stride, 2, 1),
        per_axis("deform_conv2d", "padding", padding, 2, 0),
        per_axis("deform_conv2d", "dilation", dilation, 2, 1),
    )
    groups = offset.shape[1] // (2 * kh * kw)
    geometry = Geometry((h, w), (kh, kw), pairs, c // width, groups)
    if min(geometry.output) < 1:
        raise ValueError(
            f"a kernel {(kh, kw)} with dilation {pairs[2]} is larger than images {(h, w)} with "
            f"padding {pairs[1]}: pad more"
        )
    wanted = (n, 2 * groups * kh * kw, *geometry.output)
    if groups == 0 or c % max(groups, 1) or tuple(offset.shape) != wanted:
        raise ValueError(
            f"an offset for kernel {(kh, kw)} has 2 G {kh * kw} channels, where G divides {c}, "
            f"and the output's size {geometry.output} for each of {n} images, got {offset.shape}"
        )
    if mask is not None and tuple(mask.shape) != (n, wanted[1] // 2, *geometry.output):
        raise ValueError(
            f"a mask for this offset is {(n, wanted[1] // 2, *geometry.output)}, got {mask.shape}"
        )
    return geometry


def _checked_bias(bias: Any, weight: Any) -> Any:
    if bias.dtype != weight.dtype:
        raise TypeError(
            f"bias has the weight's dtype {weight.dtype}, got {bias.dtype}: convert with astype"
        )
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is ({weight.shape[0]},), one per channel, got {bias.shape}")
    return bias.reshape(-1, 1, 1)
