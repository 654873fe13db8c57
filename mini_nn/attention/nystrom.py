"""Nyströmformer: a few landmarks stand for the matrix of softmax attention.

Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh 2021, "Nyströmformer: A Nyström-Based Algorithm for
Approximating Self-Attention", arXiv:2102.03902.

=====================================================  ===========================================
softmax(Q K̃ᵀ) softmax(Q̃ K̃ᵀ)⁺ softmax(Q̃ Kᵀ) V,        ``nystrom_attention``
all scores times 1/√d
Q̃, K̃: means of m segments                             ``segment_means``
Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))         ``iterative_pinv``
Z₀ = Aᵀ / (‖A‖₁ ‖A‖_∞)                                 ``matrix_start``; the released code has
                                                       ``shared_start`` by default
a depthwise convolution of V is added to the result    ``NystromAttention``
=====================================================  ===========================================

With A = U Σ Wᵀ every iterate is W diag(z) Uᵀ, so it is enough to look at one singular value σ.
For r = 1 − σ z an iteration is r ← ¼ r³ (3 + r).  It goes to 0 from all −2 < r < 1 and stays at
the two ends, so Z₀ = α Aᵀ leads to A⁺ for any 0 < α < 3/σ₁².  As σ₁² ≤ ‖A‖₁ ‖A‖_∞, the paper's
start is among them.  A small σ z grows by 13/4 in an iteration only, so a condition number κ needs
some 1.7 ln κ of them and a few more: six are not enough for κ = 100.

Exact, with A invertible, the rows of the product add up to 1, since those of its three factors
do; but its entries may be negative, so the result is not in the convex hull of the values.
Landmarks of queries and keys contain tokens from all over their segments, so nothing here is
causal.

Deviations: segments may differ by one token where m does not divide n, as the released code's
cannot.  Pads belong to no segment and the real tokens are divided among all m; with fewer than m of
them the landmarks that are left over do not exist, for any of the three factors.  The released
landmarks count pads as zeros (mlpen/Nystromformer) or as tokens (transformers).  float16 is
computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import data_of, primitive
from ..nn import Conv2d, Module
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import check_attention, check_key_mask, narrow, real_tokens, wide

__all__ = [
    "NystromAttention", "exact_pinv", "iterative_pinv", "matrix_start", "nystrom_attention",
    "segment_means", "shared_start",
]  # fmt: skip

NEVER = float("-inf")


def segment_means(x: Array, landmarks: int, key_mask: Array | None = None) -> tuple[Array, Array]:
    """The means of m runs of tokens, whose lengths differ by one at most.

    Token i of n real ones is in segment ⌊i m / n⌋.  If m divides n these are runs of n/m; for
    m ≥ n each token is a segment.

    Args:
        x: (…, n, d).
        landmarks: m, at least 1.
        key_mask: booleans that broadcast to (…, n), true for real tokens; pads are not counted.

    Returns:
        The means (…, m, d), zeros where there is no token, and (…, m) booleans that say where there
        is one, without the leading axes that the mask does not have.

    Raises:
        ValueError: m is below 1, or the mask has another shape.
        TypeError: the mask is not boolean.
    """
    if landmarks < 1:
        raise ValueError(f"segment_means takes at least 1 landmark, got {landmarks}")
    xp = of(data_of(x))
    x, real = real_tokens(x, key_mask)
    rank = xp.cumsum(real.astype("int64"), axis=-1)
    segment = (rank - 1) * landmarks // xp.maximum(rank[..., -1:], 1)
    member = (segment[..., None, :] == xp.arange(landmarks)[:, None]) & real[..., None, :]
    size = member.sum(axis=-1)
    share = member.astype(x.dtype) / xp.maximum(size, 1).astype(x.dtype)[..., None]
    return ops.matmul(share, x), size > 0


def matrix_start(a: Array) -> Array:
    """Aᵀ / (‖A‖₁ ‖A‖_∞) for each matrix of (…, m, n): the largest sums of a column and of a row."""
    size = ops.abs(a)
    columns = ops.max(ops.sum(size, axis=-2), axis=-1)[..., None, None]
    rows = ops.max(ops.sum(size, axis=-1), axis=-1)[..., None, None]
    return _start(a, columns * rows)


def shared_start(a: Array) -> Array:
    """Aᵀ / the largest sum of a column in the whole batch, for A ≥ 0 whose rows add up to 1.

    The released default, which is smaller than ``matrix_start`` for all matrices but one.  With it
    what six iterations give for a text depends on the other texts of its batch.
    """
    return _start(a, ops.max(ops.sum(a, axis=-2)))


def _start(a: Any, norm: Any) -> Any:
    """Aᵀ / norm, and zeros for a matrix of zeros."""
    return ops.matrix_transpose(a) / ops.where(data_of(norm) > 0.0, norm, 1.0)


def iterative_pinv(
    a: Array, iterations: int = 6, start: Callable[[Array], Array] = matrix_start
) -> Array:
    """An approximation of A⁺ by products only.

    Args:
        a: A (…, m, n).
        iterations: each multiplies a small σ z by 13/4, and near 1 gets three times the digits.
            A σ that is 0 but for rounding grows too, and is inverted in the end.
        start: Z₀ of A; see ``matrix_start`` and ``shared_start``.

    Returns:
        (…, n, m), zeros for zeros.

    Raises:
        ValueError: ``iterations`` is negative.
    """
    if iterations < 0:
        raise ValueError(f"iterative_pinv takes iterations ≥ 0, got {iterations}")
    z = start(a)
    identity = of(data_of(a)).eye(a.shape[-2], dtype=a.dtype)
    for _ in range(iterations):
        az = ops.matmul(a, z)
        inner = 15.0 * identity - ops.matmul(az, 7.0 * identity - az)
        z = ops.matmul(0.25 * z, 13.0 * identity - ops.matmul(az, inner))
    return z


@primitive
def exact_pinv(a: Any) -> Any:
    """A⁺ of (…, m, n) by its singular values, of which those below max(m, n) ε σ₁ count as 0.

    The derivative is that along matrices of the same rank (Golub & Pereyra 1973, SIAM J. Numer.
    Anal. 10(2), p. 413); A⁺ jumps where the rank changes.
    """
    xp = of(a)
    return xp.linalg.pinv(a, max(a.shape[-2:]) * float(xp.finfo(a.dtype).eps))


def _pinv_rule(g: Any, y: Any, a: Any) -> Any:
    """Ā = −YᵀȲYᵀ + (I − AY) ȲᵀY Yᵀ + YᵀY Ȳᵀ (I − YA)."""
    yt, gt = ops.matrix_transpose(y), ops.matrix_transpose(g)
    left = ops.matmul(gt, ops.matmul(y, yt))
    right = ops.matmul(ops.matmul(yt, y), gt)
    along = ops.matmul(ops.matmul(yt, g), yt)
    beyond = left - ops.matmul(a, ops.matmul(y, left))
    return beyond + right - ops.matmul(ops.matmul(right, y), a) - along


exact_pinv.derivative(a=_pinv_rule)


def nystrom_attention(
    query: Array,
    key: Array,
    value: Array,
    landmarks: int,
    pinv: Callable[[Array], Array] = iterative_pinv,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """softmax(Q K̃ᵀ) softmax(Q̃ K̃ᵀ)⁺ (softmax(Q̃ Kᵀ) V), in time and memory O((n + m) landmarks).

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        landmarks: how many; from n = m on the result is softmax attention, as exact as ``pinv`` is.
        pinv: A⁺ of A (…, landmarks, landmarks): ``iterative_pinv``, with ``functools.partial`` for
            its options, or ``exact_pinv``.
        key_mask: (…, m) booleans, true for real tokens; pads change nothing, and without any real
            token the result is 0.
        query_mask: the same for the queries, (…, n), whose landmarks they are kept out of.  None
            for ``key_mask`` if there are as many queries as keys.  Rows of pads are those of
            a query of zeros.
        is_causal: refused.

    Returns:
        (…, n, e).

    Raises:
        ValueError: the shapes do not fit, a ``key_mask`` says nothing of the queries, or
            ``is_causal``.
        TypeError: a mask is not boolean.
    """
    check_attention(query, key, value)
    if is_causal:
        raise ValueError(
            "nystrom_attention is not causal: landmarks are means over segments of the text, and "
            "every query looks at all of them. Use an attention with a causal form"
        )
    n, m = query.shape[-2], key.shape[-2]
    if key_mask is not None and query_mask is None:
        if n != m:
            raise ValueError(
                f"key_mask says nothing of {n} queries for {m} keys: give query_mask as well"
            )
        query_mask = key_mask
    # a pad may hold nan, and nan times a gradient of 0 is nan
    if query_mask is not None:
        check_key_mask(query_mask, query)
        query = ops.where(query_mask[..., None], query, 0.0)
    if key_mask is not None:
        check_key_mask(key_mask, key)
        key, value = (ops.where(key_mask[..., None], x, 0.0) for x in (key, value))
    query, key = wide(query) * query.shape[-1] ** -0.5, wide(key)
    query_marks, asked = segment_means(query, landmarks, query_mask)
    key_marks, kept = segment_means(key, landmarks, key_mask)
    by_key_marks = ops.matrix_transpose(key_marks)
    by_keys = ops.matmul(query_marks, ops.matrix_transpose(key))
    if key_mask is not None:
        by_keys = ops.where(key_mask[..., None, :], by_keys, NEVER)
    first = ops.where(kept[..., None, :], ops.matmul(query, by_key_marks), NEVER)
    core = ops.where(kept[..., None, :], ops.matmul(query_marks, by_key_marks), NEVER)
    middle, last = (ops.softmax(x, axis=-1) * _numbers(asked, x) for x in (core, by_keys))
    means = ops.matmul(pinv(middle), ops.matmul(last, wide(value)))
    return narrow(ops.matmul(ops.softmax(first, axis=-1), means), value)


def _numbers(asked: Any, like: Any) -> Any:
    """1 for the rows of landmarks that exist and 0 for others."""
    return asked[..., None].astype(like.dtype)


class NystromAttention(Module):
    """``nystrom_attention`` beside a depthwise convolution of the values along the sequence.

    Args:
        landmarks: how many.
        heads: h, which the convolution has one filter each for; None for no convolution.
        kernel_size: of the convolution, odd; the released models for long texts have 33 or 35.
        pinv: as for ``nystrom_attention``.
        rng: what the convolution is drawn from (None: ``default_rng()``).

    Attributes:
        conv: Conv2d with weight (h, 1, kernel_size, 1), or None.

    Raises:
        ValueError: ``landmarks`` is below 1, or the kernel size is even.
    """

    def __init__(
        self,
        landmarks: int,
        heads: int | None = None,
        kernel_size: int = 33,
        pinv: Callable[[Array], Array] = iterative_pinv,
        *,
        rng: Rng | None = None,
    ) -> None:
        if landmarks < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "NystromAttention takes at least 1 landmark and an odd kernel, got "
                f"{landmarks=} and {kernel_size=}"
            )
        self.landmarks = landmarks
        self.pinv = pinv
        self.conv = None
        if heads is not None:
            size, pad = (kernel_size, 1), (kernel_size // 2, 0)
            self.conv = Conv2d(heads, heads, size, padding=pad, groups=heads, bias=False, rng=rng)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        key_mask: Any = None,
    ) -> Any:
        """(b, h, n, d) twice and (b, h, n, e) to (b, h, n, e), or any leading axes without conv.

        Raises:
            ValueError: there is an ``attn_mask``, or ``is_causal``; with a convolution there are
                other axes, or not as many queries as keys.
        """
        if attn_mask is not None:
            raise ValueError(
                f"Nyström attention has no scores of tokens to mask, but attn_mask has shape "
                f"{attn_mask.shape}: use key_mask=(…, m) for pads"
            )
        y = nystrom_attention(
            query, key, value, self.landmarks, self.pinv, key_mask, is_causal=is_causal
        )
        if self.conv is None:
            return y
        if value.ndim != 4 or value.shape[1] != self.conv.in_channels or y.shape != value.shape:
            raise ValueError(
                f"the convolution takes (b, {self.conv.in_channels}, n, e) and n queries, got "
                f"value {value.shape} and query {query.shape}"
            )
        if key_mask is not None:
            value = ops.where(key_mask[..., None], value, 0.0)
        return y + self.conv(value)

    def extra_repr(self) -> str:
        """The number of landmarks."""
        return f"landmarks={self.landmarks}"
