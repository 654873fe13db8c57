"""Deformable convolution, versions three and four: shared weights, masks that add up to 1, or not.

Wang et al. 2022, *InternImage: Exploring Large-Scale Vision Foundation Models with Deformable
Convolutions*, arXiv:2211.05778; Xiong et al. 2024, *Efficient Deformable ConvNets: Rethinking
Dynamic and Sparse Operator for Vision Applications* (DCNv4), arXiv:2401.06197.

===============================================================  ==================
y(p₀) = Σ_g Σₖ w_g m_gk x_g(p₀ + pₖ + Δp_gk)  (2211.05778, 2)    ``dcn_v3``
the same, m_gk any number                     (2401.06197, 3.1)  ``dcn_v4``
offsets and masks from a depthwise convolution, a norm, GELU     ``DCNv3``
offsets and masks from one linear map                            ``DCNv4``
===============================================================  ==================

There is no weight for each place of the kernel: the masks are that, and w_g is a 1×1 convolution,
the ``output_proj`` of the layers.  So it is multi-scale deformable attention with one level, whose
heads are the groups and whose reference points are the pixels, and is computed as that.

The order is not that of the first two versions: places of the kernel run column by column (x outer,
y inner), and an offset is (x, y).  ``offset_scale`` s scales the whole grid: p₀ + s (pₖ + Δp), with
pₖ counted from the middle, ⌊dilation (kernel − 1) / 2⌋ of it.

Deviations: of the layers, padding is always the one that keeps the size at stride 1, and the branch
that makes offsets has the stride too, where the released module leaves it out (and fails).  Left
out are the released choices of activation and norm, ``remove_center``, v3's size of the depthwise
kernel (it is the grid's) and v4's stride; v4 takes images (n, h, w, c), not rows of pixels.  The
released Python form interchanges the paddings of height and width, its CUDA form does not; nor do
we.  Locations pass through [0, 1], as in that Python form, so in float32 a point that should be on
a pixel's centre can come out just left of it: the value is the same to rounding, but the gradient
of its offset is then the slope on that side.
"""

from __future__ import annotations

import math

from .. import ops
from ..backend import Array
from ..nn import GELU, Conv2d, LayerNorm, Linear, Module, Parameter, Sequential, init
from ..ops.conv import Pair, per_axis
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .deformable_attention import ms_deform_attn

__all__ = ["DCNv3", "DCNv4", "dcn_v3", "dcn_v4"]


def dcn_v3(
    input: Array,
    offset: Array,
    mask: Array,
    kernel_size: int | Pair = 3,
    stride: int | Pair = 1,
    pad: int | Pair = 1,
    dilation: int | Pair = 1,
    group: int = 1,
    offset_scale: float = 1.0,
) -> Array:
    """Σₖ m_gk x_g(p₀ + s (pₖ + Δp_gk)): the sum of eq. 2 without its weights w_g.

    Args:
        input: (n, h, w, c).
        offset: (n, h', w', 2 G K), for each group and place (Δx, Δy) in pixels.
        mask: (n, h', w', G K); with a softmax over K of each group, v3.
        kernel_size, stride, pad, dilation: of the grid; a pair is (vertical, horizontal).
        group: G, a divisor of c.
        offset_scale: s.

    Returns:
        (n, h', w', c).  Outside of the image is 0.

    Raises:
        ValueError: the shapes do not fit; the kernel is larger than the padded image.
        TypeError: not one floating-point dtype.
    """
    (kh, kw), (sy, sx), (py, px), (dy, dx) = (
        per_axis("dcn_v3", what, value, 2, least)
        for what, value, least in (
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("padding", pad, 0),
            ("dilation", dilation, 1),
        )
    )
    if input.ndim != 4 or group < 1 or input.shape[3] % group:
        raise ValueError(
            f"dcn_v3 takes an input (n, h, w, c) whose channels {group} groups divide, got "
            f"{input.shape}"
        )
    n, h, w, c = input.shape
    height = (h + 2 * py - dy * (kh - 1) - 1) // sy + 1
    width = (w + 2 * px - dx * (kw - 1) - 1) // sx + 1
    if min(height, width) < 1:
        raise ValueError(
            f"a kernel {(kh, kw)} with dilation {(dy, dx)} is larger than images {(h, w)} with "
            f"padding {(py, px)}: pad more"
        )
    places, wanted = kh * kw, (n, height, width, group * kh * kw)
    if tuple(mask.shape) != wanted or tuple(offset.shape) != (*wanted[:3], 2 * wanted[3]):
        raise ValueError(
            f"for an input {input.shape} and kernel {(kh, kw)} mask is {wanted} and offset "
            f"{(*wanted[:3], 2 * wanted[3])}, got {mask.shape} and {offset.shape}"
        )
    xp, queries = of(offset), height * width
    # where the middle of the kernel stands, and its places from there
    middle_x, middle_y = dx * (kw - 1) // 2, dy * (kh - 1) // 2
    start = xp.empty((height, width, 2), offset.dtype)
    start[..., 0] = xp.arange(width) * sx - px + middle_x
    start[..., 1] = (xp.arange(height) * sy - py + middle_y)[:, None]
    grid = xp.empty((kw, kh, 2), offset.dtype)
    grid[..., 0] = (xp.arange(kw) * dx - middle_x)[:, None]
    grid[..., 1] = xp.arange(kh) * dy - middle_y
    moved = offset.reshape(n, queries, group, places, 2) + grid.reshape(places, 2)
    points = moved * offset_scale + start.reshape(queries, 1, 1, 2)
    size = xp.asarray([w, h], dtype=offset.dtype)
    locations = ((points + 0.5) / size).reshape(n, queries, group, 1, places, 2)
    value = input.reshape(n, h * w, group, c // group)
    weights = mask.reshape(n, queries, group, 1, places)
    return ms_deform_attn(value, [(h, w)], locations, weights).reshape(n, height, width, c)


def dcn_v4(
    input: Array,
    offset_mask: Array,
    kernel_size: int | Pair = 3,
    stride: int | Pair = 1,
    pad: int | Pair = 1,
    dilation: int | Pair = 1,
    group: int = 1,
    offset_scale: float = 1.0,
) -> Array:
    """``dcn_v3`` with offsets and masks in one array and no softmax: weights may be any number.

    Args:
        offset_mask: (n, h', w', ≥ 3 G K): for each group its 2 K offsets, then its K weights; what
            is left over at the end, to a multiple of 8, is not read.

    Returns, raises:
        As ``dcn_v3``.
    """
    kh, kw = per_axis("dcn_v4", "kernel_size", kernel_size, 2, 1)
    places = kh * kw
    if offset_mask.ndim != 4 or offset_mask.shape[3] < 3 * group * places:
        raise ValueError(
            f"offset_mask has at least 3 · {group} · {places} channels, last, got "
            f"{offset_mask.shape}"
        )
    n, height, width, _ = offset_mask.shape
    parts = offset_mask[..., : 3 * group * places].reshape(n, height, width, group, 3 * places)
    offset = parts[..., : 2 * places].reshape(n, height, width, -1)
    mask = parts[..., 2 * places :].reshape(n, height, width, -1)
    options = (stride, pad, dilation, group, offset_scale)
    return dcn_v3(input, offset, mask, (kh, kw), *options)


class ChannelsLast(Module):
    """(n, c, h, w) to (n, h, w, c)."""

    def forward(self, input: Array) -> Array:
        """A view."""
        return input.transpose(0, 2, 3, 1)


def _zeroed(layer: Linear) -> Linear:
    for parameter in layer.parameters():
        init.zeros_(parameter)
    return layer


def _projection(channels: int, rng: Rng) -> Linear:
    layer = Linear(channels, channels, rng=rng)
    init.xavier_uniform_(layer.weight, rng=rng)
    init.zeros_(layer.bias)
    return layer


class _Layer(Module):
    """What both versions share: sizes, and how much of the unmoved input is mixed in."""

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, group: int, offset_scale: float
    ) -> None:
        if group < 1 or channels % group:
            raise ValueError(f"{group} groups do not divide {channels} channels")
        self.channels = channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.pad = dilation * (kernel_size - 1) // 2
        self.group = group
        self.offset_scale = offset_scale
        self.places = group * kernel_size * kernel_size

    def _center(self, present: bool) -> None:
        xp = of(next(self.parameters()))
        weight = xp.zeros((self.group, self.channels), "float32")
        self.center_feature_scale_proj_weight = Parameter(weight) if present else None
        bias = xp.zeros((self.group,), "float32")
        self.center_feature_scale_proj_bias = Parameter(bias) if present else None

    def _mixed(self, sampled: Array, still: Array, query: Array) -> Array:
        """(1 − s) y + s x with s = σ(A q) for each group, if the layer has an A."""
        if self.center_feature_scale_proj_weight is None:
            return sampled
        scale = ops.sigmoid(
            ops.linear(
                query,
                self.center_feature_scale_proj_weight,
                self.center_feature_scale_proj_bias,
            )
        )
        shape = (*sampled.shape[:3], self.group, self.channels // self.group)
        scale = scale.reshape(*shape[:4], 1)
        y = sampled.reshape(shape) * (1.0 - scale) + still.reshape(shape) * scale
        return y.reshape(sampled.shape)


class DCNv3(_Layer):
    """InternImage's operator: value projection, ``dcn_v3``, output projection.

    At the start all offsets are 0 and all masks 1/K, which averages windows.

    Args:
        channels: C.
        kernel_size: of the grid and of the depthwise convolution, odd.
        stride: of the output.
        dilation: of the grid.
        group: G, a divisor of C.
        offset_scale: s.
        center_feature_scale: whether to mix in the projected input itself; needs stride 1.
        rng: where to draw from; None for ``default_rng()``.

    Attributes:
        dw_conv, offset, mask, input_proj, output_proj: as in the released checkpoints.

    Raises:
        ValueError: G does not divide C, an even kernel, or a mixed-in input with a stride.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(channels, kernel_size, dilation, group, offset_scale)
        if kernel_size % 2 == 0 or (center_feature_scale and stride > 1):
            raise ValueError(
                "DCNv3 takes an odd kernel_size, and center_feature_scale with stride 1 only, got "
                f"kernel_size {kernel_size} and stride {stride}"
            )
        rng = default_rng() if rng is None else rng
        self.stride = stride
        half = (kernel_size - 1) // 2
        self.dw_conv = Sequential(
            Conv2d(channels, channels, kernel_size, stride, half, groups=channels, rng=rng),
            Sequential(ChannelsLast(), LayerNorm(channels, eps=1e-6)),
            GELU(),
        )
        self.offset = _zeroed(Linear(channels, 2 * self.places, rng=rng))
        self.mask = _zeroed(Linear(channels, self.places, rng=rng))
        self.input_proj = _projection(channels, rng)
        self.output_proj = _projection(channels, rng)
        self._center(center_feature_scale)

    def forward(self, input: Array) -> Array:
        """(n, h, w, C) to (n, h', w', C)."""
        value = self.input_proj(input)
        query = self.dw_conv(input.transpose(0, 3, 1, 2))
        n, height, width, _ = query.shape
        mask = ops.softmax(self.mask(query).reshape(n, height, width, self.group, -1))
        sampled = dcn_v3(
            value,
            self.offset(query),
            mask.reshape(n, height, width, self.places),
            self.kernel_size,
            self.stride,
            self.pad,
            self.dilation,
            self.group,
            self.offset_scale,
        )
        return self.output_proj(self._mixed(sampled, value, query))


class DCNv4(_Layer):
    """``DCNv3`` with unbounded masks and one linear map for them and the offsets.

    At the start everything is 0, masks too, so the layer puts out its bias.

    Args:
        channels, kernel_size, dilation, group, offset_scale, center_feature_scale, rng: as
            ``DCNv3``; an even kernel is possible if the dilation is even.
        dw_kernel_size: of a depthwise convolution before the linear map, odd; None for none.

    Attributes:
        offset_mask: Linear(C, 3 G K, rounded up to a multiple of 8).
        value_proj, output_proj, offset_mask_dw: as in the released checkpoints.

    Raises:
        ValueError: G does not divide C, a grid without a middle pixel, or an even dw_kernel_size.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(channels, kernel_size, dilation, group, offset_scale)
        if dilation * (kernel_size - 1) % 2 or (dw_kernel_size or 1) % 2 == 0:
            raise ValueError(
                "DCNv4 keeps the size of its input: dilation · (kernel_size − 1) is even and "
                f"dw_kernel_size odd, got kernel_size {kernel_size}, dilation {dilation} and "
                f"dw_kernel_size {dw_kernel_size}"
            )
        rng = default_rng() if rng is None else rng
        self.offset_mask_dw = None
        if dw_kernel_size is not None:
            half = (dw_kernel_size - 1) // 2
            self.offset_mask_dw = Conv2d(
                channels, channels, dw_kernel_size, padding=half, groups=channels, rng=rng
            )
        rounded = 8 * math.ceil(3 * self.places / 8)
        self.offset_mask = _zeroed(Linear(channels, rounded, rng=rng))
        self.value_proj = _projection(channels, rng)
        self.output_proj = _projection(channels, rng)
        self._center(center_feature_scale)

    def forward(self, input: Array) -> Array:
        """(n, h, w, C) to the same."""
        value, query = self.value_proj(input), input
        if self.offset_mask_dw is not None:
            query = self.offset_mask_dw(input.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        sampled = dcn_v4(
            value,
            self.offset_mask(query),
            self.kernel_size,
            1,
            self.pad,
            self.dilation,
            self.group,
            self.offset_scale,
        )
        return self.output_proj(self._mixed(sampled, value, sampled))
