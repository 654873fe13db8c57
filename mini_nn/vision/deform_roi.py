"""Deformable RoI pooling: each bin of a region is moved by a number that the network chose.

Dai, Qi, Xiong, Li, Zhang, Hu, Wei 2017, *Deformable Convolutional Networks*, arXiv:1703.06211
(ICCV 2017); Zhu, Hu, Lin, Dai 2019, *Deformable ConvNets v2: More Deformable, Better Results*,
arXiv:1811.11168 (CVPR 2019).

=========================================================  ======================================
y(i, j) = Σ_p x(p₀ + p) / n_ij            (1703.06211, 5)  ``deform_roi_pool``, no ``offset``
y(i, j) = Σ_p x(p₀ + p + Δp_ij) / n_ij    (1703.06211, 6)  ``deform_roi_pool``, ``DeformRoIPool``
the same, each bin from its own maps    (1703.06211 §2.2)  ``deform_ps_roi_pool``,
                                                           ``DeformPSRoIPool``
y(k) = Σ_j x(p_kj + Δp_k) Δm_k / n_k      (1811.11168, 2)  ``modulated_deform_roi_pool``,
                                                           ``ModulatedDeformRoIPool``
Σ_{b∈Ω} [1 − cos(f_RCNN(b), f_FRCNN(b))]  (1811.11168, 3)  ``feature_mimic_loss``
=========================================================  ======================================

Δp = γ Δp̂ ∘ (w, h): offsets are in parts of the region's size, so that they mean the same for
regions of every size.  **Channel 0 is x and channel 1 is y**, as in the released kernels, and the
other way round than for deformable convolution.

Where a bin reads.  Eqs. 5 and 6 take the pixels of Fast R-CNN's bins.  The released kernel, which
is position-sensitive, samples a grid instead, from the corner of each cell.  Eq. 2 of v2 takes
RoIAlign's samples, the centres.  In the first two a sample beyond the edge of the image, half a
pixel from the outermost centres, does not count: n is the number of those that do, and a bin that
has none is 0.  In the last it counts as RoIAlign counts it.

Deviations: eq. 6's n_ij counts all pixels of a bin, also those outside; we count as the kernel
does.  At an integer coordinate the kernel's derivative is 0, since its floor and ceiling coincide;
ours is the one to the right (``sampling``).  Which part and which map a bin belongs to is computed
in integers, where the kernel's quotient of floats may fall one short.  Eq. 2 is printed without γ;
the released code keeps 0.1, and pools with v1's kernel rather than with RoIAlign's samples: that is
``deform_ps_roi_pool`` with ``sample_per_part=2, group_size=1``, times the mask.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..backend import Array, current
from ..engine import data_of
from ..nn.conv import Conv2d
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from ..ops.conv import Pair, per_axis
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .roi import (
    Boxes,
    aligned_means,
    along,
    bin_means,
    checked_boxes,
    half_away,
    on_host,
    pixel_bins,
    roi_align,
    rounded_boxes,
    scaled_boxes,
)

__all__ = [
    "DeformPSRoIPool", "DeformRoIPool", "ModulatedDeformRoIPool", "deform_ps_roi_pool",
    "deform_roi_pool", "feature_mimic_loss", "modulated_deform_roi_pool",
]  # fmt: skip


def deform_roi_pool(
    input: Array,
    boxes: Boxes,
    offset: Array | None,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
) -> Array:
    """The mean of the pixels of each bin, all moved by one offset (Dai et al. 2017, eq. 6).

    Args:
        input: (n, c, h, w).
        boxes: (k, 5), rows (number of the image, x₁, y₁, x₂, y₂), or for each image its (l, 4), as
            for ``roi_pool``.
        offset: (k, 2, kh, kw), (x, y) in parts of the region's size; None for 0, which is plain RoI
            pooling with the mean (eq. 5).
        output_size: (kh, kw), or one number for both.
        spatial_scale: what the boxes are multiplied by.
        gamma: γ, what the offsets are multiplied by.

    Returns:
        (k, c, kh, kw).  A bin whose pixels have all left the image is 0, with gradient 0.

    The size of the largest bin is read on the host (on a GPU: it waits), and each bin costs as
    much.  Beside input and output, the samples of a chunk of bins are in memory, about 2²⁰ numbers
    or those of one bin, and some 30 numbers for each sample.

    Raises:
        ValueError: the shapes do not fit, or the input has no pixels.
        TypeError: not one floating-point dtype.
        IndexError: there is no image of this number (on a GPU: not checked).
    """
    image, corners = checked_boxes("deform_roi_pool", input, boxes)
    size = per_axis("deform_roi_pool", "output_size", output_size, 2, 1)
    lows, lengths = rounded_boxes(data_of(corners), spatial_scale)
    moved = None
    if offset is not None:
        _check("offset", offset, (len(image), 2, *size), input)
        moved = _shifts(offset, lengths, gamma)
    xp, at, used = of(lows[0]), [], []
    for axis in (0, 1):
        first, end = pixel_bins(lows[axis], lengths[axis], size[axis])
        pixel = first[..., None] + xp.arange(on_host(end - first)).astype(first.dtype)
        inside = pixel < end[..., None]
        pixel, inside = (along(z, axis) for z in (pixel, inside))
        at.append(pixel if moved is None else pixel + moved[axis][..., None, None])
        used.append(inside)
    return _counted_means(input, image[:, None, None], at, used[0] & used[1]).transpose(0, 3, 1, 2)


def deform_ps_roi_pool(
    input: Array,
    boxes: Boxes,
    offset: Array | None,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    sample_per_part: int = 4,
    group_size: int | Pair | None = None,
    gamma: float = 0.1,
) -> Array:
    """Deformable position-sensitive RoI pooling as the released kernel does it.

    A box begins at round(x₁) s − ½ and ends at (round(x₂) + 1) s − ½, and is at least 0.1 wide.
    Sample a of a bin is at its start + a / sample_per_part of its length.

    Args:
        input: (n, c gh gw, h, w), channel (c' gh + i) gw + j for group (i, j) of output channel c'.
        boxes: as for ``deform_roi_pool``; without gradients, since they are rounded.
        offset: (k, 2 l, ph, pw), channels 2 m and 2 m + 1 being x and y of class m, in parts of the
            region's size; l divides c, and each class has c / l neighbouring channels.  ph × pw
            parts of the region are moved; bin i belongs to part ⌊i ph / kh⌋.  None for 0.
        output_size: (kh, kw), or one number for both.
        spatial_scale: s, what the boxes are multiplied by.
        sample_per_part: samples for each axis of a bin.
        group_size: (gh, gw), where bin i reads group ⌊i gh / kh⌋; None for the output size; 1 for
            pooling that is not position-sensitive.
        gamma: γ, what the offsets are multiplied by.

    Returns:
        (k, c, kh, kw).  A bin without samples in [−½, w − ½] × [−½, h − ½] is 0, with gradient 0.

    Beside input and output, the samples of a chunk of bins are in memory, about 2²⁰ numbers or
    those of one bin, and some 30 numbers for each sample.

    Raises:
        ValueError, TypeError, IndexError: as ``deform_roi_pool``.
    """
    name = "deform_ps_roi_pool"
    image, corners = checked_boxes(name, input, boxes)
    kh, kw = per_axis(name, "output_size", output_size, 2, 1)
    many = per_axis(name, "sample_per_part", sample_per_part, 2, 1)
    gh, gw = per_axis(name, "group_size", (kh, kw) if group_size is None else group_size, 2, 1)
    (n, channels, h, w), boxes_in_all = input.shape, len(image)
    classes = 1 if offset is None else offset.shape[1] // 2
    if channels % (gh * gw * max(classes, 1)):
        raise ValueError(
            f"{name} with groups {(gh, gw)} and offsets of {classes} classes takes a multiple of "
            f"{gh * gw * classes} channels, got {channels}"
        )
    # an image for each class and group, with the channels that read there
    split = input.reshape(n, classes, channels // (classes * gh * gw), gh, gw, h, w)
    maps = split.transpose(0, 1, 3, 4, 2, 5, 6).reshape(n * classes * gh * gw, -1, h, w)
    xp, dtype = of(image), input.dtype
    i, j = xp.arange(kh), xp.arange(kw)
    group = (i * gh // kh)[:, None] * gw + j * gw // kw
    number = (image[:, None] * classes + xp.arange(classes)) * (gh * gw)
    number = number[:, :, None, None] + group  # (k, classes, kh, kw)

    rounded = half_away(data_of(corners))
    ends = rounded[:, 2:] + 1.0
    lows = [rounded[:, axis] * spatial_scale - 0.5 for axis in (1, 0)]
    highs = [ends[:, axis] * spatial_scale - 0.5 for axis in (1, 0)]
    lengths = [xp.maximum(b - a, 0.1) for a, b in zip(lows, highs, strict=True)]
    moved = None
    if offset is not None:
        parts = offset.shape[2:]
        _check("offset", offset, (boxes_in_all, 2 * classes, *parts), input)
        pairs = offset.reshape(boxes_in_all * classes, 2, *parts)
        part = (i * parts[0] // kh)[:, None], j * parts[1] // kw
        pairs = pairs[(slice(None), slice(None), *part)]
        moved = _shifts(pairs.reshape(boxes_in_all, classes, 2, kh, kw), lengths, gamma)
    at = []
    for axis, bins in enumerate((kh, kw)):
        cell = xp.arange(bins * many[axis]).astype(dtype) / (bins * many[axis])
        z = lows[axis][:, None] + cell * lengths[axis][:, None]
        shape = (bins, 1, many[0], 1) if axis == 0 else (1, bins, 1, many[1])
        z = z.reshape(boxes_in_all, 1, *shape)
        at.append(z if moved is None else z + moved[axis][..., None, None])
    y = _counted_means(maps, number, at, xp.ones((), "bool"))  # (k, classes, kh, kw, c / classes)
    return y.transpose(0, 1, 4, 2, 3).reshape(boxes_in_all, channels // (gh * gw), kh, kw)


def modulated_deform_roi_pool(
    input: Array,
    boxes: Boxes,
    offset: Array,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    mask: Array | None = None,
) -> Array:
    """RoIAlign whose bins are moved and weighed (Zhu et al. 2019, eq. 2).

    Args:
        input, boxes, output_size, spatial_scale, sampling_ratio: as for ``roi_align``, aligned.
        offset: (k, 2, kh, kw), (x, y) in parts of the region's size.
        gamma: γ, what the offsets are multiplied by; 1 is the equation as printed.
        mask: (k, kh, kw), Δm; the layer puts it through a sigmoid.  None for 1.

    Returns:
        (k, c, kh, kw).  With offsets 0 it is ``roi_align(…, aligned=True)`` times the mask.

    Its memory, and what it reads on the host, are those of ``roi_align``.

    Raises:
        ValueError, TypeError, IndexError: as ``roi_align``.
    """
    image, corners = checked_boxes("modulated_deform_roi_pool", input, boxes)
    size = per_axis("modulated_deform_roi_pool", "output_size", output_size, 2, 1)
    _check("offset", offset, (len(image), 2, *size), input)
    lows, lengths = scaled_boxes(corners, spatial_scale, 0.5)
    moved = _shifts(offset, lengths, gamma)
    at = image[:, None, None]
    y = aligned_means(input, at, lows, lengths, size, sampling_ratio, moved)
    y = y.transpose(0, 3, 1, 2)
    if mask is None:
        return y
    _check("mask", mask, (len(image), *size), input)
    return y * mask[:, None]


def feature_mimic_loss(rcnn: Array, frcnn: Array, positive: Array | None = None) -> Array:
    """Σ_{b∈Ω} [1 − cos(f_RCNN(b), f_FRCNN(b))]  (Zhu et al. 2019, eq. 3).

    f_RCNN is seen by a branch of the same weights in the box cut out of the image, f_FRCNN by the
    detector in the whole image: the detector learns to see in a box what is in the box.

    Args:
        rcnn, frcnn: (k, d) features of the same k boxes.
        positive: (k,) booleans, Ω: the boxes that show an object; None for all.

    Returns:
        0-d, in [0, 2 |Ω|]: 0 where all pairs are parallel or Ω is empty.  The cosine with a vector
        of length 0 is taken as 0, and so is its gradient.  Boxes outside Ω may hold anything.

    Raises:
        ValueError: the shapes do not fit.
    """
    if rcnn.ndim != 2 or rcnn.shape != frcnn.shape:
        raise ValueError(
            f"feature_mimic_loss takes two (k, d) features, got {rcnn.shape} and {frcnn.shape}"
        )
    if positive is not None:
        positive = data_of(positive)
        if tuple(positive.shape) != (rcnn.shape[0],) or positive.dtype.kind != "b":
            raise ValueError(
                f"positive is ({rcnn.shape[0]},) booleans, one for each box, got {positive.dtype} "
                f"{positive.shape}"
            )
        rcnn = ops.where(positive[:, None], rcnn, 0.0)  # nan there would come back as a gradient
        frcnn = ops.where(positive[:, None], frcnn, 0.0)
    losses = 1.0 - ops.sum(_unit(rcnn) * _unit(frcnn), axis=1)
    return ops.sum(losses if positive is None else ops.where(positive, losses, 0.0))


def _unit(x: Any) -> Any:
    """Rows divided by their lengths; one of length 0 stays, a constant."""
    length = ops.norm(x, axis=1, keepdims=True)
    zero = data_of(length) == 0.0
    return ops.where(zero, 0.0, x) / ops.where(zero, 1.0, length)


def _check(name: str, x: Any, shape: tuple[int, ...], input: Any) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"for these boxes the {name} is {shape}, got {x.shape}")
    if x.dtype != input.dtype:
        raise TypeError(
            f"the {name} is of the input's dtype {input.dtype}, got {x.dtype}: convert with astype"
        )


def _shifts(offset: Any, lengths: Any, gamma: float) -> tuple[Any, Any]:
    """(…, 2, kh, kw) in parts of regions (k, …) as (y, x) in pixels."""
    shape = (-1, *(1,) * (offset.ndim - 2))
    height, width = (length.reshape(shape) for length in lengths)
    return offset[..., 1, :, :] * gamma * height, offset[..., 0, :, :] * gamma * width


def _counted_means(input: Any, image: Any, at: Any, used: Any) -> Any:
    """Means of the samples that are used and in the image, (…, c); 0 where there are none."""
    for z, limit in zip(at, input.shape[2:], strict=True):
        raw = data_of(z)
        used = used & (raw >= -0.5) & (raw <= limit - 0.5)
    used = of(used).broadcast_to(used, (*image.shape[:1], *used.shape[1:]))
    count = used.sum(axis=(-2, -1), keepdims=True)
    weight = used.astype(input.dtype) / of(used).maximum(count, 1).astype(input.dtype)
    return bin_means(input, image, [ops.where(used, z, 0.0) for z in at], weight)


# layers


def _zeros(layer: Any) -> Any:
    """The layer with weights and biases 0: its offsets begin at 0, its masks at ½."""
    for parameter in layer.parameters():
        parameter.data[...] = 0.0
    return layer


class DeformRoIPool(Module):
    """RoI pooling, and a layer that looks at its result and moves the bins (Dai et al. 2017, §2.2).

    Args:
        in_channels: c.
        output_size: (kh, kw), or one number for both.
        spatial_scale: what the boxes are multiplied by.
        gamma: γ.

    Attributes:
        offset_fc: Linear(c kh kw, 2 kh kw) that begins as 0; the paper trains it with 0.01 of the
            learning rate in Faster R-CNN.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | Pair,
        spatial_scale: float = 1.0,
        gamma: float = 0.1,
    ) -> None:
        self.output_size = per_axis("DeformRoIPool", "output_size", output_size, 2, 1)
        self.spatial_scale = spatial_scale
        self.gamma = gamma
        bins = math.prod(self.output_size)
        self.offset_fc = _zeros(Linear(in_channels * bins, 2 * bins, rng=Rng(0)))

    def forward(self, input: Array, boxes: Boxes) -> Array:
        """(n, c, h, w) and k boxes → (k, c, kh, kw)."""
        plain = deform_roi_pool(input, boxes, None, self.output_size, self.spatial_scale)
        offset = self.offset_fc(plain.reshape(plain.shape[0], math.prod(plain.shape[1:])))
        offset = offset.reshape(plain.shape[0], 2, *self.output_size)
        options = (self.output_size, self.spatial_scale, self.gamma)
        return deform_roi_pool(input, boxes, offset, *options)


class DeformPSRoIPool(Module):
    """Position-sensitive pooling; a convolution makes maps of offsets (Dai et al. 2017, §2.2).

    Args:
        in_channels: channels of the features that the offsets are computed from.
        output_size: k, the bins of both axes, and the groups.
        num_classes: C + 1, each with offsets of its own.
        spatial_scale: what the boxes are multiplied by.
        sample_per_part: samples for each axis of a bin.
        gamma: γ.

    Attributes:
        offset_conv: 1×1 convolution to 2 k² (C + 1) maps that begins as 0.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int,
        num_classes: int = 1,
        spatial_scale: float = 1.0,
        sample_per_part: int = 4,
        gamma: float = 0.1,
    ) -> None:
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sample_per_part = sample_per_part
        self.gamma = gamma
        maps = 2 * output_size * output_size * num_classes
        self.offset_conv = _zeros(Conv2d(in_channels, maps, 1, rng=Rng(0)))

    def forward(self, input: Array, features: Array, boxes: Boxes) -> Array:
        """Score maps (n, c k², h, w), features (n, in_channels, h, w) and b boxes → (b, c, k, k).

        The classes divide c.
        """
        size, scale, samples = self.output_size, self.spatial_scale, self.sample_per_part
        maps = self.offset_conv(features)
        offset = deform_ps_roi_pool(maps, boxes, None, size, scale, samples)
        return deform_ps_roi_pool(input, boxes, offset, size, scale, samples, gamma=self.gamma)


class ModulatedDeformRoIPool(Module):
    """RoIAlign, and three layers that look at its result, move the bins and weigh them.

    Zhu et al. 2019, §3.2.

    Args:
        in_channels: c.
        output_size: (kh, kw), or one number for both.
        spatial_scale: what the boxes are multiplied by.
        sampling_ratio: samples for each axis of a bin.
        gamma: γ.
        hidden: the width of the first two layers.
        rng: what their weights are drawn from, N(0, 0.01²) (None: ``default_rng()``).

    Attributes:
        offset_fc1, offset_fc2: Linear layers with ReLU, their biases 0.
        offset_fc3: Linear(hidden, 3 kh kw) that begins as 0, so that the result begins as half of
            RoIAlign's: 2 kh kw offsets, all x first, then kh kw masks before the sigmoid.  The
            paper trains the branch with 0.1 of the learning rate.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | Pair,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        gamma: float = 0.1,
        hidden: int = 1024,
        *,
        rng: Rng | None = None,
    ) -> None:
        self.output_size = per_axis("ModulatedDeformRoIPool", "output_size", output_size, 2, 1)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        bins = math.prod(self.output_size)
        rng = default_rng() if rng is None else rng
        self.offset_fc1 = _normal(in_channels * bins, hidden, rng)
        self.offset_fc2 = _normal(hidden, hidden, rng)
        self.offset_fc3 = _zeros(Linear(hidden, 3 * bins, rng=Rng(0)))

    def forward(self, input: Array, boxes: Boxes) -> Array:
        """(n, c, h, w) and k boxes → (k, c, kh, kw)."""
        size, scale, ratio = self.output_size, self.spatial_scale, self.sampling_ratio
        plain = roi_align(input, boxes, size, scale, ratio, aligned=True)
        x = plain.reshape(plain.shape[0], math.prod(plain.shape[1:]))
        x = ops.relu(self.offset_fc2(ops.relu(self.offset_fc1(x))))
        moved = self.offset_fc3(x).reshape(plain.shape[0], 3, *size)
        mask = ops.sigmoid(moved[:, 2])
        return modulated_deform_roi_pool(
            input, boxes, moved[:, :2], size, scale, ratio, self.gamma, mask
        )


def _normal(inputs: int, outputs: int, rng: Rng) -> Linear:
    layer = Linear(inputs, outputs, rng=Rng(0))
    layer.weight = Parameter(rng.normal((outputs, inputs), std=0.01))
    layer.bias = Parameter(current().xp.zeros(outputs, "float32"))
    return layer
