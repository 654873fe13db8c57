"""Boxes and reference points of Deformable DETR.

Zhu, Su, Lu, Li, Wang, Dai 2020, arXiv:2010.04159.

===========================================================  ======================================
σ⁻¹, with its argument kept away from 0 and 1                ``inverse_sigmoid``
app. A.4  b_d = σ(Δb_d + σ⁻¹(b_{d−1})), b_{d−1} a constant   ``refine_boxes``
the part of a padded map that an image fills                 ``valid_ratio``
app. A.4  (p̂ᵢ, 2ˡ⁻¹ s, 2ˡ⁻¹ s) with s = 0.05 for each pixel  ``encoder_proposals``
app. A.4  the best of them start the decoder                 ``top_proposals``
centres of all pixels as points of every level               ``encoder_reference_points``
===========================================================  ======================================

A box is (x, y, w, h): centre and size in parts of the image.  ``padding`` is True where a pixel is
padding; images lie in the upper left corner of their maps.

Deviations: ``encoder_proposals`` says which pixels are of use, where the released code masks the
memory itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import backend, ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of

__all__ = [
    "encoder_proposals", "encoder_reference_points", "inverse_sigmoid", "refine_boxes",
    "top_proposals", "valid_ratio",
]  # fmt: skip

Shapes = Sequence[Sequence[int]]


def inverse_sigmoid(x: Array, eps: float = 1e-5) -> Array:
    """ln(x / (1 − x)), with x and 1 − x at least ``eps``: any shape, finite for every x.

    Outside of [0, 1] it is that of the nearer end, with gradient 0.
    """
    x = ops.clip(x, 0.0, 1.0)
    return ops.log(ops.maximum(x, eps) / ops.maximum(1.0 - x, eps))


def refine_boxes(delta: Array, reference: Array, eps: float = 1e-5) -> Array:
    """σ(Δb + σ⁻¹(reference)): the box that a decoder layer makes of the one before.

    Args:
        delta: (…, 4), what the layer's head predicts.
        reference: (…, 4) boxes or (…, 2) points in [0, 1]; of a point, the size is σ(Δb) alone.
            No gradient flows into it: a layer is not trained through those after it.
        eps: as for ``inverse_sigmoid``.

    Returns:
        (…, 4); where Δb = 0 the reference itself, kept in [eps, 1 − eps].

    Raises:
        ValueError: the shapes do not fit.
    """
    reference = data_of(reference)
    if reference.shape[-1] not in (2, 4) or delta.shape != (*reference.shape[:-1], 4):
        raise ValueError(
            "refine_boxes takes changes (…, 4) of boxes (…, 4) or points (…, 2), got "
            f"{delta.shape} and {reference.shape}"
        )
    before = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 2:
        before = of(before).concatenate((before, of(before).zeros_like(before)), axis=-1)
    return ops.sigmoid(delta + before)


def booleans(name: str, padding: Array) -> Array:
    """The array of a padding mask.

    Raises:
        TypeError: it is not of booleans; integers are refused, as elsewhere 1 means no padding.
    """
    padding = data_of(padding)
    if padding.dtype.kind != "b":
        raise TypeError(
            f"{name} takes padding as booleans, True where a pixel is padding, got "
            f"{padding.dtype}: compare, as in mask == 0 for a mask of ones where the image is"
        )
    return padding


def valid_ratio(padding: Array, dtype: Any = "float32") -> Array:
    """The part of width and height that is no padding: (N, H, W) booleans → (N, 2), as (w, h).

    Raises:
        TypeError: ``padding`` is not of booleans.
        ValueError: it has not three axes.
    """
    padding = booleans("valid_ratio", padding)
    if padding.ndim != 3:
        raise ValueError(f"valid_ratio takes padding (N, H, W), got {padding.shape}")
    _, height, width = padding.shape
    columns, rows = (~padding[:, 0, :]).sum(axis=1), (~padding[:, :, 0]).sum(axis=1)
    parts = (columns.astype(dtype) / width, rows.astype(dtype) / height)
    return of(padding).stack(parts, axis=-1)


def _centres(xp: Any, height: int, width: int, dtype: Any) -> Any:
    """(H W, 2): i + ½ for each pixel, as (x, y)."""
    x = xp.broadcast_to(xp.arange(width, dtype=dtype) + 0.5, (height, width))
    y = xp.broadcast_to((xp.arange(height, dtype=dtype) + 0.5)[:, None], (height, width))
    return xp.stack((x, y), axis=-1).reshape(-1, 2)


def encoder_reference_points(spatial_shapes: Shapes, valid_ratios: Array) -> Array:
    """The centre of each pixel of each level, as a point of every level.

    Args:
        spatial_shapes: (H, W) of each level.
        valid_ratios: (N, L, 2), as (w, h), from ``valid_ratio``; ones without padding.

    Returns:
        (N, S, L, 2), (x, y).  The centre (i + ½) / n on the pixel's own level; on another, the same
        place of the image's content, which fills another part of that map.

    Raises:
        ValueError: there is not one ratio for each level.
    """
    valid_ratios = data_of(valid_ratios)
    if valid_ratios.ndim != 3 or valid_ratios.shape[1:] != (len(spatial_shapes), 2):
        raise ValueError(
            f"valid_ratios are (N, {len(spatial_shapes)}, 2) for {len(spatial_shapes)} levels, got "
            f"{valid_ratios.shape}"
        )
    xp = of(valid_ratios)
    points = []
    for level, (height, width) in enumerate(spatial_shapes):
        size = xp.asarray([width, height], dtype=valid_ratios.dtype)
        centres = _centres(xp, height, width, valid_ratios.dtype)
        points.append(centres / (valid_ratios[:, level, None] * size))
    return xp.concatenate(points, axis=1)[:, :, None] * valid_ratios[:, None]


def encoder_proposals(
    padding: Array | None, spatial_shapes: Shapes, batch: int = 1, dtype: Any = "float32"
) -> tuple[Array, Array]:
    """A box around each pixel: what the first stage of the two-stage variant corrects.

    Args:
        padding: (N, S) booleans, all levels one after the other; None for none at all.
        spatial_shapes: (H, W) of each level.
        batch: N where ``padding`` is None, which is then on the current backend.
        dtype: of the boxes.

    Returns:
        σ⁻¹ of the boxes (N, S, 4), of size 0.05 · 2ˡ on level l = 0, 1, …, and whether they
        are of use (N, S).  Those on padding, or with a coordinate or size outside of (0.01, 0.99),
        are not: they are inf, and what is read there belongs to be set to 0.

    Raises:
        TypeError: ``padding`` is not of booleans.
        ValueError: the levels do not make up S.
    """
    total = sum(height * width for height, width in spatial_shapes)
    if padding is None:
        padding = backend.current().xp.zeros((batch, total), "bool")
    padding = booleans("encoder_proposals", padding)
    if padding.ndim != 2 or padding.shape[1] != total:
        raise ValueError(f"padding is (N, {total}) for these levels, got {padding.shape}")
    xp, boxes, start = of(padding), [], 0
    for level, (height, width) in enumerate(spatial_shapes):
        mask = padding[:, start : start + height * width].reshape(-1, height, width)
        start += height * width
        extent = valid_ratio(mask, dtype) * xp.asarray([width, height], dtype=dtype)
        extent = xp.maximum(extent, 1e-5)  # an image without content: all of it is padding
        centres = _centres(xp, height, width, dtype) / extent[:, None]
        sizes = xp.full(centres.shape, 0.05 * 2.0**level, dtype)
        boxes.append(xp.concatenate((centres, sizes), axis=-1))
    made = xp.concatenate(boxes, axis=1)
    valid = ((made > 0.01) & (made < 0.99)).all(axis=-1) & ~padding
    inner = xp.where(valid[..., None], made, 0.5)
    logits = xp.log(inner / (1.0 - inner))
    return xp.where(valid[..., None], logits, float("inf")), valid


def top_proposals(scores: Array, boxes: Array, k: int = 300) -> Array:
    """The k boxes with the highest scores, best first, without their history.

    Args:
        scores: (N, S).
        boxes: (N, S, 4), as logits or not.
        k: at most S.

    Returns:
        (N, k, 4), a plain array: the second stage is not trained through the first.

    Raises:
        ValueError: there are fewer than k.
    """
    scores, boxes = data_of(scores), data_of(boxes)
    _, places = ops.topk(scores, k, axis=1)
    images = of(scores).arange(scores.shape[0])[:, None]
    return boxes[images, places]
