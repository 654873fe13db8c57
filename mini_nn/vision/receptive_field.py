"""What a node of a network looks at: measures of its spatial support.

Luo, Li, Urtasun, Zemel 2016, *Understanding the Effective Receptive Field in Deep Convolutional
Neural Networks*, arXiv:1701.04128; Zhu, Hu, Lin, Dai 2019, *Deformable ConvNets v2*,
arXiv:1811.11168; Dai et al. 2017, *Deformable Convolutional Networks*, arXiv:1703.06211; Zhou,
Khosla, Lapedriza, Oliva, Torralba 2015, *Object Detectors Emerge in Deep Scene CNNs*,
arXiv:1412.6856.

====================================================  ======================================
|∂ node / ∂ pixel|  (1701.04128 §1; 1811.11168 §2.1)  ``effective_receptive_field``
√(n (k² − 1) / 12), its width        (1701.04128 §2)  ``gaussian_width``, ``measured_width``
|∂ node / ∂ place of a sample|     (1811.11168 §2.1)  ``effective_sampling_locations``
the smallest region that suffices  (1811.11168 §2.1)  ``saliency_region``
mean distance of adjacent samples  (1703.06211 §4.2)  ``effective_dilation``
====================================================  ======================================

**Width.**  A layer with a kernel of k equal weights spreads a gradient as a step of a random walk
that is uniform on k places, of variance (k² − 1) / 12.  Variances add up over n layers, and the sum
of many steps is Gaussian: the support that counts grows as √n, the one that is possible as n.

**Smallest region.**  Finding it is a search among all subsets, so §2.1 masks the image step by
step.  We remove cells of a regular grid greedily, as Zhou et al. remove segments: those whose
removal changes the response least go first, as long as all changes together stay within ε.  The
result is minimal: no cell can be taken out of it alone.

Deviations: cells of a grid stand where the paper may use any regions, and a round removes as many
cells at once as the bound allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import backend, ops
from ..backend import Array
from ..engine import Tensor, data_of, grad
from ..ops.conv import Pair, per_axis
from ..ops.elementwise import of
from ..tape import no_grad

__all__ = [
    "effective_dilation", "effective_receptive_field", "effective_sampling_locations",
    "gaussian_width", "measured_width", "saliency_region",
]  # fmt: skip

Node = Any
"""An index of a network's output; of several elements the sum is the node."""


def effective_receptive_field(f: Callable[[Tensor], Tensor], input: Array, node: Node) -> Array:
    """|∂ node / ∂ pixel|, how much each pixel matters to a node (Luo et al. 2016, §1).

    Args:
        f: a network: (n, c, h, w) → anything.
        input: (n, c, h, w), floating point.
        node: an index of the output, ``(0, 3, 8, 8)``; the sum where it selects several elements.

    Returns:
        (n, h, w), an array: the length of the gradient over the channels.

    Raises:
        ValueError: the input has not four axes.
        RuntimeError: the output does not depend on the input.
    """
    if input.ndim != 4:
        raise ValueError(f"effective_receptive_field takes (n, c, h, w), got {input.shape}")
    return effective_sampling_locations(f, input, node, axis=1)


def effective_sampling_locations(
    f: Callable[[Tensor], Tensor], locations: Array, node: Node, axis: int = -1
) -> Array:
    """|∂ node / ∂ place|, how much it matters where a sample is read (Zhu et al. 2019, §2.1).

    Args:
        f: places → the network's output.  For an offset (n, 2 G K, h', w') of ``deform_conv2d`` let
            it take (n, G K, 2, h', w'), and ``axis`` be 2.
        locations: the two coordinates lie along ``axis``.
        node: an index of the output; the sum where it selects several elements.
        axis: where the coordinates are.

    Returns:
        An array without ``axis``: the length of the gradient along it.

    Raises:
        RuntimeError: the output does not depend on the places.
    """
    leaf = Tensor(data_of(locations), requires_grad=True)
    (g,) = grad(f(leaf)[node].sum(), leaf)
    slope = g.data
    return of(slope).sqrt((slope * slope).sum(axis=axis))


def gaussian_width(depth: int, kernel_size: int) -> float:
    """√(n (k² − 1) / 12) pixels: the standard deviation of an effective receptive field.

    Luo et al. 2016, §2: of ``depth`` convolutions with stride 1 whose weights are equal, and, for
    the squares of gradients, random without a mean.

    Raises:
        ValueError: the depth is negative or the kernel is empty.
    """
    if depth < 0 or kernel_size < 1:
        raise ValueError(
            f"gaussian_width takes depth ≥ 0 and kernel_size ≥ 1, got {depth} and {kernel_size}"
        )
    return math.sqrt(depth * (kernel_size * kernel_size - 1) / 12.0)


def measured_width(weights: Array) -> Array:
    """The standard deviation, in pixels, of a map as a distribution over pixels.

    Args:
        weights: (…, h, w), at least 0, such as an effective receptive field or its square.

    Returns:
        (…, 2), along y and along x; nan for a map of zeros.

    Raises:
        ValueError: there are fewer than two axes.
    """
    if weights.ndim < 2:
        raise ValueError(f"measured_width takes maps (…, h, w), got {weights.shape}")
    xp, found = of(weights), []
    for axis in (-1, -2):
        line = weights.sum(axis=axis)  # over the other axis
        total = line.sum(axis=-1, keepdims=True)
        mass = xp.where(total > 0.0, line / xp.where(total > 0.0, total, 1.0), math.nan)
        place = xp.arange(line.shape[-1]).astype(weights.dtype)
        centred = place - (mass * place).sum(axis=-1, keepdims=True)
        found.append(xp.sqrt((mass * centred * centred).sum(axis=-1)))
    return xp.stack(found, axis=-1)


def saliency_region(
    f: Callable[[Array], Array],
    image: Array,
    node: Node,
    epsilon: float,
    cell: int | Pair = 1,
    fill: float | Array = 0.0,
    batch: int = 64,
) -> Array:
    """A smallest region of the image that gives a node the same response (Zhu et al. 2019, §2.1).

    Args:
        f: a network in evaluation mode: images (n, c, h, w) → (n, …), each by itself.
        image: (c, h, w).
        node: an index of one image's output; the sum where it selects several elements.
        epsilon: how much the response may change, absolutely.
        cell: (height, width) of what is removed at a time, or one number for both; the last ones
            are smaller where it does not divide the image.
        fill: what takes the place of what is removed: a number, or what broadcasts to the image.
        batch: how many images ``f`` is given at a time.

    Returns:
        (h, w) booleans: the region.  The response to the image without the rest of it differs by at
        most ``epsilon``, and removing any one cell more makes it differ by more.

    A round costs two responses for each cell that is left.  What they are is read on the host.

    Raises:
        ValueError: the shapes do not fit, or ``epsilon`` is negative.
    """
    if image.ndim != 3 or epsilon < 0.0:
        raise ValueError(
            f"saliency_region takes an image (c, h, w) and epsilon ≥ 0, got {image.shape} and "
            f"{epsilon}"
        )
    image = data_of(image)
    xp, (_, h, w) = of(image), image.shape
    tall, wide = per_axis("saliency_region", "cell", cell, 2, 1)
    across = -(-w // wide)
    number = (xp.arange(h) // tall)[:, None] * across + xp.arange(w) // wide
    wanted: Any = None

    def changes(masks: Any) -> Any:
        """How much the response differs for each mask (m, cells)."""
        found = []
        for start in range(0, masks.shape[0], batch):
            shown = masks[start : start + batch][:, number][:, None]
            with no_grad():
                out = data_of(f(xp.where(shown, image, fill).astype(image.dtype)))
            out = out[(slice(None), *(node if isinstance(node, tuple) else (node,)))]
            found.append(out.reshape(out.shape[0], math.prod(out.shape[1:])).sum(axis=1))
        joined = xp.concatenate(found)
        return joined if wanted is None else xp.abs(joined - wanted)

    cells = -(-h // tall) * across
    kept = xp.ones(cells, "bool")
    wanted = changes(kept[None])
    while True:
        left = xp.nonzero(kept)[0]
        alone = kept & (xp.arange(cells) != left[:, None])
        if not left.shape[0]:
            break
        change = changes(alone)
        order = left[xp.argsort(change, kind="stable")]
        rank = xp.full(cells, cells, "int64")
        rank[order] = xp.arange(order.shape[0])
        count = int(backend.to_host((change <= epsilon).sum()))
        if not count:
            break
        # the first 1, 2, … of the order removed together; the first alone is within the bound
        prefixes = kept & (rank > xp.arange(count)[:, None])
        within = backend.to_host(changes(prefixes) <= epsilon)
        kept = prefixes[max(map(int, within.nonzero()[0]), default=0)]
    return kept[number]


def effective_dilation(offset: Array, kernel_size: int | Pair, dilation: int | Pair = 1) -> Array:
    """The mean distance of all pairs of adjacent samples of a kernel (Dai et al. 2017, §4.2).

    Args:
        offset: (n, 2 G kh kw, h', w') as for ``deform_conv2d``: channel 2 (g K + k) moves place k
            down, the next one moves it right.
        kernel_size: (kh, kw), or one number for both.
        dilation: of the grid that is deformed.

    Returns:
        (n, G, h', w') in pixels of the input; without offsets it is the dilation (of both axes,
        weighed by their pairs).  The gradient is 0 where two samples coincide.

    Raises:
        ValueError: the shapes do not fit, or a kernel of one place has no pairs.
    """
    kh, kw = per_axis("effective_dilation", "kernel_size", kernel_size, 2, 1)
    down, right = per_axis("effective_dilation", "dilation", dilation, 2, 1)
    places = kh * kw
    if offset.ndim != 4 or offset.shape[1] % (2 * places) or places < 2:
        raise ValueError(
            f"effective_dilation takes an offset (n, 2 G {places}, h', w') for a kernel {(kh, kw)} "
            f"of at least two places, got {offset.shape}"
        )
    n, channels, h, w = offset.shape
    xp, groups = of(offset), channels // (2 * places)
    grid = xp.zeros((kh, kw, 2, 1, 1), offset.dtype)
    grid[:, :, 0, 0, 0] = (xp.arange(kh) * down)[:, None]
    grid[:, :, 1, 0, 0] = xp.arange(kw) * right
    points = offset.reshape(n, groups, kh, kw, 2, h, w) + grid
    pairs = [
        points[:, :, 1:] - points[:, :, :-1],
        points[:, :, :, 1:] - points[:, :, :, :-1],
    ]
    total: Any = 0.0
    for step in pairs:
        total = total + ops.sum(ops.norm(step, axis=4), axis=(2, 3))
    return total / float(kh * (kw - 1) + kw * (kh - 1))
