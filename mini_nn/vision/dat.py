"""Vision Transformer with Deformable Attention: all queries share a few keys at learned positions.

Xia, Pan, Song, Li, Huang 2022, "Vision Transformer with Deformable Attention", arXiv:2201.00520
(CVPR 2022), section 3.2, whose formulas these are.

==========================================================  =======================================
q = x W_q, k̃ = x̃ W_k, ṽ = x̃ W_v                             ``DeformableAttention``, ``proj_*``
Δp = s tanh(θ_offset(q)), x̃ = φ(x; p + Δp)                  ``DeformableAttention.positions``
φ(z; p) = Σ_r g(p_x, r_x) g(p_y, r_y) z[r_y, r_x]           ``sampling.bilinear_sample``
z = softmax(q k̃ᵀ / √d + φ(B̂; R)) ṽ, for each head           ``DeformableAttention.forward``
p: a grid of points, r pixels apart, scaled to [−1, 1]²     ``reference_grid``
φ(B̂; R), R the displacements of keys, in [−1, 1]²           ``relative_position_bias``
==========================================================  =======================================

θ_offset is a depth-wise convolution, a norm, GELU and a 1×1 convolution without bias, which each
group of channels has in common (shared weights, positions of its own).  −1 and 1 are the centres of
the outermost pixels (align_corners=True).  With s = 2 a key may move as far as its neighbour.

Deviations: the released code starts its grid of keys half a cell late, (i + ½) / (n − 1), although
it samples with align_corners=True, so that all of them sit half a cell to the lower right; the
paper's text, which we follow, and the code's own grid of queries have i / (n − 1).  The names of
the weights are the code's; dropout is left out; position bias is always on, and interpolated.
"""

from __future__ import annotations

from typing import Any

from .. import backend, ops
from ..backend import Array
from ..nn import GELU, Conv2d, LayerNorm, Module, Parameter, Sequential
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .sampling import bilinear_sample, sample_points

__all__ = ["DeformableAttention", "reference_grid", "relative_position_bias"]


def reference_grid(height: int, width: int, dtype: Any = "float32") -> Array:
    """(height, width, 2): places as (y, x), −1 and 1 at the outermost; 0 where there is only one.

    On the current backend.
    """
    return _grid(backend.current().xp, height, width, dtype)


def _grid(xp: Any, height: int, width: int, dtype: Any) -> Any:
    rows, columns = (xp.arange(n, dtype=dtype) * (2.0 / max(n - 1, 1)) for n in (height, width))
    rows, columns = rows - float(height > 1), columns - float(width > 1)
    grid = (rows[:, None], columns)
    return xp.stack([xp.broadcast_to(axis, (height, width)) for axis in grid], axis=-1)


def _pixels(places: Any, height: int, width: int) -> Any:
    """From [−1, 1] to the coordinates of pixels, 0 … n − 1."""
    y, x = places[..., 0], places[..., 1]
    return ops.stack(((y + 1.0) * (0.5 * (height - 1)), (x + 1.0) * (0.5 * (width - 1))), axis=-1)


def relative_position_bias(table: Array, places: Array, keys: Array) -> Array:
    """The bias of each query for each key: the table, read between its entries.

    Args:
        table: B̂ (heads, 2 H − 1, 2 W − 1); entry (H − 1, W − 1) is for a key where the query is.
        places: (H W, 2), the queries' (y, x) in [−1, 1].
        keys: (B, G, N, 2), the keys' in the same coordinates, for G groups of heads.

    Returns:
        (B, heads, H W, N).  On whole steps it is Swin's relative position bias, B̂[Δy + H − 1,
        Δx + W − 1] with Δ = query − key; a displacement beyond the table fades to 0.

    Raises:
        ValueError: the heads do not divide into the groups.
    """
    heads, height, width = table.shape
    n, groups, count, _ = keys.shape
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
    xp, queries = of(keys), places.shape[0]
    displacement = (places[:, None] - keys[:, :, None]) * 0.5
    at = _pixels(displacement, height, width).reshape(n * groups * queries * count, 2)
    image = xp.broadcast_to(xp.arange(groups)[:, None], (n, groups, queries * count)).reshape(-1)
    maps = table.reshape(groups, heads // groups, height, width)
    bias = sample_points(maps, at, image).reshape(n, groups, queries, count, heads // groups)
    return bias.transpose(0, 1, 4, 2, 3).reshape(n, heads, queries, count)


class ChannelNorm(Module):
    """Layer norm over the channels of each pixel: (N, C, H, W); its weights are those of ``norm``.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.norm = LayerNorm(channels)

    def forward(self, input: Array) -> Array:
        """(N, C, H, W)."""
        return self.norm(input.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


class DeformableAttention(Module):
    """Deformable multi-head attention of DAT.

    Args:
        dim: C, the channels.
        n_heads: a divisor of C.
        size: (H, W) of the map, which the table of position biases is made for.
        n_groups: G, a divisor of the heads; each group of channels has key positions of its own.
        stride: r, the distance of the reference points in pixels.
        kernel_size: of the offset network's convolution, odd.
        offset_range_factor: s; offsets lie within ± s / (n − 1), of which 2 / (n − 1) is the
            distance of neighbours among the n reference points of an axis.
        rng: what weights are drawn from (None: ``default_rng()``).

    Attributes:
        conv_offset: θ_offset, on each group's channels.
        proj_q, proj_k, proj_v, proj_out: 1×1 convolutions.
        rpe_table: B̂ (heads, 2 H − 1, 2 W − 1), drawn from N(0, 0.01²).

    Raises:
        ValueError: the heads do not divide C, the groups do not divide the heads, or the kernel is
            even.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        size: tuple[int, int],
        n_groups: int = 1,
        stride: int = 1,
        kernel_size: int = 5,
        offset_range_factor: float = 2.0,
        *,
        rng: Rng | None = None,
    ) -> None:
        if dim % n_heads or n_heads % n_groups or kernel_size % 2 == 0:
            raise ValueError(
                "DeformableAttention divides its channels among heads, its heads among groups and "
                f"centres an odd kernel; got {dim} channels, {n_heads} heads, {n_groups} groups, "
                f"kernel {kernel_size}"
            )
        self.n_heads = n_heads
        self.n_groups = n_groups
        self.size = size
        self.offset_range_factor = offset_range_factor
        channels, rng = dim // n_groups, default_rng() if rng is None else rng
        self.conv_offset = Sequential(
            Conv2d(
                channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, rng=rng
            ),
            ChannelNorm(channels),
            GELU(),
            Conv2d(channels, 2, 1, bias=False, rng=rng),
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (
            Conv2d(dim, dim, 1, rng=rng) for _ in range(4)
        )
        table = (n_heads, 2 * size[0] - 1, 2 * size[1] - 1)
        self.rpe_table = Parameter(rng.normal(table, std=0.01))

    def positions(self, queries: Array) -> Array:
        """Where the keys are read: p + Δp.

        Args:
            queries: (B, C, H, W), the projected queries.

        Returns:
            (B, G, H_G, W_G, 2), (y, x) in the coordinates of ``reference_grid``.
        """
        n, dim, height, width = queries.shape
        groups = queries.reshape(n * self.n_groups, dim // self.n_groups, height, width)
        offset = ops.tanh(self.conv_offset(groups)).transpose(0, 2, 3, 1)
        _, rows, columns, _ = offset.shape
        xp = of(queries)
        reach = [self.offset_range_factor / max(length - 1, 1) for length in (rows, columns)]
        places = _grid(xp, rows, columns, queries.dtype) + offset * xp.asarray(
            reach, dtype=queries.dtype
        )
        return places.reshape(n, self.n_groups, rows, columns, 2)

    def forward(self, input: Array) -> Array:
        """Attend from every pixel to the sampled ones: (B, C, H, W).

        Raises:
            ValueError: the map has another size than the table was made for.
        """
        n, dim, height, width = input.shape
        if (height, width) != tuple(self.size):
            raise ValueError(
                f"this layer's position table is for maps of {self.size}, got {input.shape}: make "
                "a layer for that size"
            )
        queries = self.proj_q(input)
        places = self.positions(queries)
        count = places.shape[2] * places.shape[3]
        places = places.reshape(n, self.n_groups, count, 2)
        maps = input.reshape(n * self.n_groups, dim // self.n_groups, height, width)
        at = _pixels(places, height, width).reshape(n * self.n_groups, count, 2)
        sampled = bilinear_sample(maps, at).reshape(n, dim, 1, count)
        own = _grid(of(input), height, width, input.dtype).reshape(height * width, 2)
        bias = relative_position_bias(self.rpe_table, own, places)
        heads = (n, self.n_heads, dim // self.n_heads)
        q = queries.reshape(*heads, height * width).swapaxes(-1, -2)
        k, v = (
            project(sampled).reshape(*heads, count).swapaxes(-1, -2)
            for project in (self.proj_k, self.proj_v)
        )
        y = ops.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj_out(y.swapaxes(-1, -2).reshape(n, dim, height, width))
