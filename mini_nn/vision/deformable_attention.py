"""Deformable attention: each query looks at a few points that it chooses, on several maps at once.

Zhu, Su, Lu, Li, Wang, Dai 2020, "Deformable DETR: Deformable Transformers for End-to-End Object
Detection", arXiv:2010.04159 (ICLR 2021).

==================================================================  ==============================
eq. 2  Σₘ Wₘ Σₖ A_mqk W′ₘ x(p_q + Δp_mqk)                           ``MSDeformAttn``, L = 1
eq. 3  Σₘ Wₘ Σₗ Σₖ A_mlqk W′ₘ xˡ(φₗ(p̂_q) + Δp_mlqk)                 ``MSDeformAttn``
eq. 3  its inner sums Σₗ Σₖ A_mlqk x′ˡ(…), without W′ₘ and Wₘ       ``ms_deform_attn``
app. A.4  Δp scaled by the width and height of a box                ``locations_from_offsets``
app. A.4  Δp of head m and point k at the start: k in direction m   ``compass_offsets``
app. A.1  O(2 N_q C² + min(H W C², N_q K C²))                       ``sampled_values``
==================================================================  ==============================

======  ==============================  =========================================================
letter  argument                        meaning
======  ==============================  =========================================================
N       –                               images
S       –                               Σ H_l W_l, the pixels of all levels, level by level
M, D    ``n_heads``, –                  heads, and channels of each: C = M D
L, K    ``n_levels``, ``n_points``      levels, and points that a head samples in each
A       ``attention_weights``           softmax over all L K points of a linear map of the query;
                                        no key is compared with it
p̂       ``reference_points``            (x, y) in [0, 1]², 0 and 1 at the outer edges of the map
======  ==============================  =========================================================

Pixel i of n has its centre at (i + ½) / n: a location u reads at the pixel coordinate u n − ½, and
what lies outside the map is 0 (grid_sample with align_corners=False and zero padding).

The sum over points and their four neighbours is one sparse matrix, whose 4 L K entries in each row
(n, q, m) are A times the bilinear weights, applied to the pixels as rows.  With entries a and the
cotangent ȳ of a row: x̄ = aᵀ ȳ, ā = ⟨x, ȳ⟩, and A and the location follow from ā by the chain rule.

Deviations: where the reference is a box, the paper scales the initial offsets by 1 / 2K, so that
all points start inside of the box; the released code, which we follow for its checkpoints, divides
every offset by 2K.  The directions stand in the code's order, not in the paper's.  The starts of
the levels, an argument of the code, are worked out from ``spatial_shapes``, a list of Python pairs:
the host has to know the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import backend, ops
from ..backend import Array
from ..engine import primitive
from ..nn import Linear, Module, Parameter
from ..ops.elementwise import of
from ..ops.fused import as_rows
from ..rng import Rng, default_rng
from ..tape import Kept
from .boxes import booleans
from .sampling import sample_points

__all__ = [
    "MSDeformAttn", "compass_offsets", "locations_from_offsets", "ms_deform_attn", "sampled_values",
]  # fmt: skip

Shapes = Sequence[Sequence[int]]


def _definition(value: Any, locations: Any, weights: Any, spatial_shapes: Any) -> Any:
    """Level by level: sample, weigh, add."""
    n, _, m, d = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    xp = of(value)
    image = (xp.arange(n) * m)[:, None, None, None] + xp.arange(m)[:, None]
    image = xp.broadcast_to(image, (n, queries, m, points)).reshape(-1)
    y, start = 0.0, 0
    for level, (height, width) in enumerate(spatial_shapes):
        maps = value[:, start : start + height * width].transpose(0, 2, 3, 1)
        start += height * width
        at = locations[:, :, :, level]
        pixels = ops.stack((at[..., 1] * height - 0.5, at[..., 0] * width - 0.5), axis=-1)
        maps = maps.reshape(n * m, d, height, width)
        sampled = sample_points(maps, pixels.reshape(image.size, 2), image)
        sampled = sampled.reshape(n, queries, m, points, d)
        y = y + (sampled * weights[:, :, :, level, :, None]).sum(axis=3)
    return y


@primitive(composite=_definition)
def _attend(value: Any, locations: Any, weights: Any, spatial_shapes: Any) -> Any:
    """(N, S, M, D), (N, Lq, M, L, K, 2), (N, Lq, M, L, K) → (N, Lq, M, D)."""
    n, queries, m, levels, points, _ = locations.shape
    corners = index, x, y, _, _ = _corners(locations, spatial_shapes)
    entries = _outer(y, x)
    entries *= weights[:, :, :, None]
    shape = (n * queries * m, 4 * levels * points)
    out = backend.weighted_rows(entries.reshape(shape), index.reshape(shape), _rows(value))
    return Kept(out.reshape(n, queries, m, value.shape[-1]), corners=corners)


@_attend.joint_derivative("value", "locations", "weights")
def _rule(
    g: Any, needs: Any, value: Any, weights: Any, spatial_shapes: Any, corners: Any
) -> tuple[Any, Any, Any]:
    n, queries, m, levels, points = weights.shape
    g = as_rows(g)
    index, x, y, inside_x, inside_y = corners
    shape = (n * queries * m, 4 * levels * points)
    bilinear = _outer(y, x)
    grads: list[Any] = [None, None, None]
    if needs[0]:
        entries = (bilinear * weights[:, :, :, None]).reshape(shape)
        rows = math.prod(value.shape[:3]) + 1
        spread = backend.spread_rows(entries, index.reshape(shape), g, rows)
        grads[0] = spread[:-1].reshape(value.shape)
    if needs[1] or needs[2]:
        a = _row_products(g, index.reshape(shape), _rows(value)).reshape(index.shape)
    if needs[2]:
        grads[2] = (a * bilinear).sum(axis=3)
    if needs[1]:
        xp = of(value)
        at = xp.empty((*weights.shape, 2), weights.dtype)
        a *= weights[:, :, :, None]
        (a00, a01, a10, a11), (x0, x1), (y0, y1) = (_parts(part) for part in (a, x, y))
        (in_x0, in_x1), (in_y0, in_y1) = _parts(inside_x), _parts(inside_y)
        at[..., 0] = in_x1 * (y0 * a01 + y1 * a11) - in_x0 * (y0 * a00 + y1 * a10)
        at[..., 1] = in_y1 * (x0 * a10 + x1 * a11) - in_y0 * (x0 * a00 + x1 * a01)
        at *= _sizes(xp, spatial_shapes, weights.dtype)[:, None]
        grads[1] = at
    return grads[0], grads[1], grads[2]


def _rows(value: Any) -> Any:
    """The pixels as rows (N S M + 1, D), with a row of zeros for all that is outside.

    An infinite pixel at the edge would leave nan where its weight is 0.
    """
    rows = as_rows(value)
    xp = of(rows)
    return xp.concatenate([rows, xp.zeros((1, rows.shape[1]), rows.dtype)])


def _sizes(xp: Any, spatial_shapes: Any, dtype: Any) -> Any:
    """(L, 2): width and height of each level."""
    return xp.asarray([(width, height) for height, width in spatial_shapes], dtype=dtype)


def _parts(x: Any) -> list[Any]:
    """The members along the axis of the corners."""
    return [x[:, :, :, i] for i in range(x.shape[3])]


def _outer(y: Any, x: Any) -> Any:
    """The bilinear weights of the corners (0, 0), (0, 1), (1, 0), (1, 1), as (y, x)."""
    xp, (n, queries, m, _, levels, points) = of(x), x.shape
    product = xp.empty((n, queries, m, 4, levels, points), x.dtype)
    for i in range(2):
        xp.multiply(y[:, :, :, i, None], x, out=product[:, :, :, 2 * i : 2 * i + 2])
    return product


def _corners(locations: Any, spatial_shapes: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Where the four neighbours of each point stand among ``_rows``, and their weights.

    Returns:
        The numbers (N, Lq, M, 4, L, K) of the rows, that of the zeros outside; then four arrays
        (N, Lq, M, 2, L, K): the weights of the two columns and of the two rows of pixels, which are
        0 outside of the map, and whether these lie inside.
    """
    xp, (n, queries, m, levels, points, _) = of(locations), locations.shape
    total = sum(height * width for height, width in spatial_shapes)
    largest = max(n * total * m, 4 * math.prod(locations.shape[:5]))
    number = "int32" if largest < 2**31 else "int64"  # half of the memory
    inside, weights, places = [], [], []
    for axis in range(2):
        size = _sizes(xp, spatial_shapes, locations.dtype)[:, axis, None]
        at = locations[..., axis] * size - 0.5
        at = xp.maximum(xp.minimum(at, size + 1.0), -2.0)  # far outside, integers would overflow
        first = xp.floor(at)
        at -= first
        near = xp.empty((n, queries, m, 2, levels, points), "bool")
        part = xp.empty(near.shape, locations.dtype)
        place = xp.empty(near.shape, number)
        for i, weight in enumerate((1.0 - at, at)):
            corner = first + float(i)
            xp.logical_and(corner >= 0.0, corner < size, out=near[:, :, :, i])
            xp.multiply(weight, near[:, :, :, i], out=part[:, :, :, i])
            place[:, :, :, i] = xp.where(near[:, :, :, i], corner, 0.0)
        inside.append(near)
        weights.append(part)
        places.append(place)
    starts, widths, start = [], [], 0
    for height, width in spatial_shapes:
        starts.append([start])
        widths.append([width])
        start += height * width
    x, y = places
    y *= xp.asarray(widths, dtype=number)
    y += xp.asarray(starts, dtype=number)
    y += (xp.arange(n, dtype=number) * total)[:, None, None, None, None, None]
    index = (y[:, :, :, :, None] + x[:, :, :, None]).reshape(n, queries, m, 4, levels, points)
    index *= m
    index += xp.arange(m, dtype=number)[:, None, None, None]
    near = (inside[1][:, :, :, :, None] & inside[0][:, :, :, None]).reshape(index.shape)
    index = xp.where(near, index, n * total * m).astype(number, copy=False)
    return index, weights[0], weights[1], inside[0], inside[1]


def _row_products(g: Any, index: Any, rows: Any) -> Any:
    """ā = ⟨x, ȳ⟩: the products of row r of g (r, d) with rows[index[r, e]], (r, e)."""
    count, entries = index.shape
    products = of(g).empty((count, entries, 1), g.dtype)
    for block in backend.gathered(count, entries * rows.shape[1]):
        products[block] = rows[index[block]] @ g[block, :, None]
    return products[:, :, 0]


# Layer


def ms_deform_attn(
    value: Array, spatial_shapes: Shapes, sampling_locations: Array, attention_weights: Array
) -> Array:
    """Σₗ Σₖ A_mlqk xˡ(location): the inner sums of eq. 3, as ms_deform_attn_core_pytorch.

    Args:
        value: (N, S, M, D), the pixels of all levels one after the other, each row by row.
        spatial_shapes: (H, W) of each level, Python numbers; S = Σ H W.
        sampling_locations: (N, Lq, M, L, P, 2), (x, y) with 0 and 1 at the edges of the map.
        attention_weights: (N, Lq, M, L, P), not normalised here.

    Returns:
        (N, Lq, M D).  A location outside reads 0, less than a pixel outside a part of the pixels at
        the edge, and one at nan reads nan.  At the centre of a pixel the gradient of the location
        is the slope to the right or below; rounding of a location may put it just before the
        centre, where it is the other one.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the dtypes are not one floating-point dtype.

    The sampled values are never all in memory: beside the numbers and weights of the neighbours,
    which the tape keeps, there are ``backend.GATHERED`` numbers of them at a time.
    """
    levels = [(int(height), int(width)) for height, width in spatial_shapes]
    n, s, m, d = value.shape if value.ndim == 4 else (-1, -1, -1, -1)
    at, a = sampling_locations.shape, attention_weights.shape
    fits = value.ndim == 4 and s == sum(height * width for height, width in levels)
    fits = fits and len(at) == 6 and (at[0], *at[2:4], at[5]) == (n, m, len(levels), 2)
    if not fits or a != at[:5]:
        raise ValueError(
            "ms_deform_attn takes value (N, S, M, D), levels (H, W) with S = Σ H W, locations "
            f"(N, Lq, M, L, P, 2) and weights (N, Lq, M, L, P); got value {value.shape}, levels "
            f"{levels}, locations {at} and weights {a}"
        )
    dtypes = {str(x.dtype) for x in (value, sampling_locations, attention_weights)}
    if len(dtypes) > 1 or value.dtype.kind != "f":
        raise TypeError(
            f"ms_deform_attn takes arrays of one floating-point dtype, got {sorted(dtypes)}: "
            "convert with astype"
        )
    y = _attend(value, sampling_locations, attention_weights, levels)
    return y.reshape(*y.shape[:2], m * d)


def locations_from_offsets(
    reference_points: Array, sampling_offsets: Array, spatial_shapes: Shapes
) -> Array:
    """Where to sample, given how far from the reference.

    Args:
        reference_points: (N, Lq, L, 2), (x, y) in [0, 1], or boxes (N, Lq, L, 4), (x, y, w, h).
        sampling_offsets: (N, Lq, M, L, P, 2), Δp as (x, y): pixels of the level from a point;
            of a box, an offset of P leads from its centre to its edge.
        spatial_shapes: (H, W) of each level.

    Returns:
        (N, Lq, M, L, P, 2): p̂ + Δp / (W, H), or p̂ + Δp / P · (w, h) / 2.

    Raises:
        ValueError: a reference has neither 2 nor 4 coordinates.
    """
    coordinates = reference_points.shape[-1]
    n, queries, _, levels = sampling_offsets.shape[:4]
    if coordinates not in (2, 4) or tuple(reference_points.shape[:-1]) != (n, queries, levels):
        raise ValueError(
            f"reference_points are points (N, Lq, L, 2) or boxes (N, Lq, L, 4) with (N, Lq, L) = "
            f"{(n, queries, levels)}, got {reference_points.shape}"
        )
    reference = reference_points[:, :, None, :, None]
    if coordinates == 4:
        extent = reference[..., 2:] * (0.5 / sampling_offsets.shape[4])
        return reference[..., :2] + sampling_offsets * extent
    sizes = _sizes(of(sampling_offsets), spatial_shapes, sampling_offsets.dtype)
    return reference + sampling_offsets / sizes[:, None]


def compass_offsets(n_heads: int, n_levels: int, n_points: int) -> Array:
    """The offsets that training starts from: point k of head m, k pixels away in direction m.

    Returns:
        (M, L, K, 2) float32 on the current backend: k (cos θ, sin θ) / max(|cos θ|, |sin θ|) with
        θ = 2π m / M, so that for 8 heads the points are the 8 neighbours at distance k.
    """
    xp = backend.current().xp
    theta = xp.arange(n_heads, dtype="float64") * (2.0 * math.pi / n_heads)
    direction = xp.stack((xp.cos(theta), xp.sin(theta)), axis=-1)
    direction = direction / abs(direction).max(axis=-1, keepdims=True)
    radius = xp.arange(1, n_points + 1, dtype="float64")[:, None]
    offsets = direction[:, None, None] * radius
    return xp.broadcast_to(offsets, (n_heads, n_levels, n_points, 2)).astype("float32")


def sampled_values(n_queries: int, n_heads: int, n_levels: int, n_points: int) -> int:
    """How many pixels' vectors are read for each image: 4 neighbours of each point of each head.

    Dense attention over S pixels reads M Lq S, so the cost is linear in the pixels where each of
    them is a query, not quadratic (app. A.1).
    """
    return 4 * n_queries * n_heads * n_levels * n_points


class MSDeformAttn(Module):
    """Multi-scale deformable attention, eq. 3; with one level it is DeformAttn, eq. 2.

    Args:
        d_model: C.
        n_levels: L, the number of maps.
        n_heads: M, a divisor of C.
        n_points: K, points that a head samples in each map.
        rng: what ``value_proj`` and ``output_proj`` are drawn from (None: ``default_rng()``).

    Attributes:
        sampling_offsets: Linear(C, 2 M L K) that starts with weight 0 and ``compass_offsets`` as
            its bias, which is trained like any other.
        attention_weights: Linear(C, M L K), 0 at the start: every point then weighs 1 / (L K).
        value_proj, output_proj: Linear(C, C): W′ and W of all heads, Xavier uniform, bias 0.

    Raises:
        ValueError: C is not divisible by the number of heads.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        rng: Rng | None = None,
    ) -> None:
        if d_model % n_heads:
            raise ValueError(
                f"d_model is divided among the heads, but {d_model} is no multiple of {n_heads}"
            )
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        points = n_heads * n_levels * n_points
        rng = default_rng() if rng is None else rng
        self.sampling_offsets = Linear(d_model, 2 * points, rng=rng)
        self.attention_weights = Linear(d_model, points, rng=rng)
        self.value_proj = Linear(d_model, d_model, rng=rng)
        self.output_proj = Linear(d_model, d_model, rng=rng)
        for layer in (self.sampling_offsets, self.attention_weights):
            layer.weight.data[...] = 0.0
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            layer.bias = Parameter(of(layer.weight).zeros(layer.out_features, "float32"))
        offsets = compass_offsets(n_heads, n_levels, n_points)
        self.sampling_offsets.bias = Parameter(offsets.reshape(-1))
        bound = math.sqrt(3.0 / d_model)  # Glorot and Bengio 2010: √(6 / (in + out))
        for layer in (self.value_proj, self.output_proj):
            layer.weight = Parameter(rng.uniform((d_model, d_model), -bound, bound))

    def forward(
        self,
        query: Array,
        reference_points: Array,
        input_flatten: Array,
        input_spatial_shapes: Shapes,
        input_padding_mask: Array | None = None,
    ) -> Array:
        """Attend from ``query`` to ``input_flatten``.

        Args:
            query: (N, Lq, C), with its position already added.
            reference_points: (N, Lq, L, 2) or (N, Lq, L, 4), see ``locations_from_offsets``.
            input_flatten: (N, S, C), all levels one after the other.
            input_spatial_shapes: (H, W) of each level.
            input_padding_mask: (N, S) booleans, True where a pixel is padding and reads as 0.

        Returns:
            (N, Lq, C).

        Raises:
            ValueError: the shapes do not fit together.
        """
        n, queries, _ = query.shape
        grid = (n, queries, self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            input_padding_mask = booleans("MSDeformAttn", input_padding_mask)
            if tuple(input_padding_mask.shape) != tuple(input_flatten.shape[:2]):
                raise ValueError(
                    f"input_padding_mask is (N, S) = {input_flatten.shape[:2]}, got "
                    f"{input_padding_mask.shape}"
                )
            value = ops.where(input_padding_mask[..., None], 0.0, value)
        value = value.reshape(*value.shape[:2], self.n_heads, self.d_model // self.n_heads)
        offsets = self.sampling_offsets(query).reshape(*grid, 2)
        weights = self.attention_weights(query).reshape(*grid[:3], self.n_levels * self.n_points)
        weights = ops.softmax(weights, axis=-1).reshape(*grid)
        at = locations_from_offsets(reference_points, offsets, input_spatial_shapes)
        return self.output_proj(ms_deform_attn(value, input_spatial_shapes, at, weights))
