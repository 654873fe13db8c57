"""Linformer: all keys and values are mixed down to k of each before anybody looks at them.

Wang, Li, Khabsa, Fang, Ma 2020, "Linformer: Self-Attention with Linear Complexity",
arXiv:2006.04768.

=====================================================  =======================================
softmax(Q (E K)ᵀ / √d) (F V), E and F (k, m), sec. 4   ``linformer_attention``
4  parameter sharing: headwise, key-value, layerwise   ``LinformerAttention``
=====================================================  =======================================

The matrix softmax(Q (E K)ᵀ) F by which the values are multiplied has rank k at most, and costs
O((n + m) k).  Its rows need not be positive, nor add up to 1: that holds of the softmax alone, and
F mixes values with any sign.  With k = m and E = F = I it is softmax attention.

A position of the text has a column of E and F of its own.  So the text may be shorter than they
are, and then has the first columns, but not longer.  A pad has to lose its column, or else it is a
part of everything; its place in the softmax does not help, since after E there are no places left.
For the same reason there is no causal form: each of the k mixtures contains the last token, and
a triangular mask over (n, k) hides mixtures and not tokens.

The proofs take a random E with entries from N(0, 1/k), which keeps products in the mean.  As a
start for training it makes scores √(m/k) times as large as they were, so the released code
(examples/linformer of fairseq) has a smaller one, under which they get no larger; so has the layer.

Deviations: E and F are matrices for every use; the paper also tries pooling and convolution.  They
mix keys and values, as the paper writes it; fairseq mixes the input before it is projected to
these, which is the same but for the biases, and does not look at pads.  float16 is summed in
float32.
"""

from __future__ import annotations

from typing import Any, Literal

from .. import ops
from ..backend import Array
from ..nn.module import Module, Parameter
from ..rng import Rng, default_rng
from .arguments import check_attention, check_key_mask, narrow, wide

__all__ = ["LinformerAttention", "linformer_attention"]

Sharing = Literal["none", "headwise", "key-value"]


def linformer_attention(
    query: Array,
    key: Array,
    value: Array,
    e: Array,
    f: Array,
    key_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """softmax(Q (E K)ᵀ / √d) (F V).

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, v).
        e: E (…, k, M) with M ≥ m, of which the first m columns are used; leading axes broadcast
            with those of the keys, so (h, k, M) is a matrix for each head.
        f: F, shaped as E.
        key_mask: (…, m) booleans, true for real tokens: pads lose their columns of E and F.
            Without any real token the result is 0.
        is_causal: refused.

    Returns:
        (…, n, v).

    Raises:
        ValueError: the shapes do not fit, the text is longer than M, or ``is_causal``.
        TypeError: ``key_mask`` is not boolean.
    """
    check_attention(query, key, value)
    if is_causal:
        raise ValueError(
            "linformer_attention is not causal: E and F mix later keys and values into every one "
            "of the k that a query looks at. Use an attention with a causal form"
        )
    m = key.shape[-2]
    if min(e.ndim, f.ndim) < 2 or e.shape[-2:] != f.shape[-2:] or e.shape[-1] < m:
        raise ValueError(
            f"E and F are both (…, k, M) with a column for each of {m} keys, got {e.shape} and "
            f"{f.shape}: make them for the longest text"
        )
    if key_mask is not None:
        check_key_mask(key_mask, key)
        key, value = (ops.where(key_mask[..., None], x, 0.0) for x in (key, value))
    keys, values = ops.matmul(e[..., :m], wide(key)), ops.matmul(f[..., :m], wide(value))
    scores = ops.matmul(wide(query) * query.shape[-1] ** -0.5, ops.matrix_transpose(keys))
    return narrow(ops.matmul(ops.softmax(scores, axis=-1), values), value)


class LinformerAttention(Module):
    """``linformer_attention`` with its E and F, for the place of softmax attention in an encoder.

    Args:
        length: M, of the longest text.
        projected: k, the keys that are left of it.
        sharing: ``"none"`` for E and F of each head, ``"headwise"`` for one E and one F, or
            ``"key-value"`` for one matrix that is both.
        heads: h, with ``sharing="none"`` only.
        projection: a Parameter to use as E, and if that is shared as F too: the ``e`` of another
            layer gives the paper's layerwise sharing.  It is saved under the names of all.
        rng: what the matrices are drawn from, U(−a, a) with a² = 3/(k + M), of variance 1/(k + M)
            (None: ``default_rng()``).

    Attributes:
        e: E, (k, M) or (h, k, M).
        f: F; E itself with ``sharing="key-value"``.

    Raises:
        ValueError: a number is below 1, ``heads`` does not go with ``sharing``, or the
            ``projection`` has another shape.
    """

    def __init__(
        self,
        length: int,
        projected: int,
        sharing: Sharing = "headwise",
        heads: int | None = None,
        projection: Parameter | None = None,
        *,
        rng: Rng | None = None,
    ) -> None:
        if sharing not in ("none", "headwise", "key-value"):
            raise ValueError(
                f"sharing is 'none', 'headwise' or 'key-value', got {sharing!r}; for layerwise "
                "sharing pass the projection of another layer"
            )
        if (heads is None) != (sharing != "none"):
            raise ValueError(
                f"matrices for each head take their number, and shared ones do not: got {heads=} "
                f"with {sharing=}"
            )
        if min(length, projected, 1 if heads is None else heads) < 1:
            raise ValueError(
                f"LinformerAttention takes numbers of at least 1, got {length=}, {projected=} and "
                f"{heads=}"
            )
        shape = (projected, length) if heads is None else (heads, projected, length)
        if projection is not None and projection.shape != shape:
            raise ValueError(f"the projection has shape {projection.shape}, wanted {shape}")
        rng = default_rng() if rng is None else rng
        bound = (3.0 / (projected + length)) ** 0.5

        def drawn() -> Parameter:
            return Parameter(rng.uniform(shape, -bound, bound))

        self.e = drawn() if projection is None else projection
        self.f = self.e if sharing == "key-value" else drawn()

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        key_mask: Any = None,
    ) -> Any:
        """(…, n, d), (…, m, d), (…, m, v) to (…, n, v), for m ≤ ``length``.

        Raises:
            ValueError: there is an ``attn_mask``, or ``is_causal``.
        """
        if attn_mask is not None:
            raise ValueError(
                f"Linformer has no scores of tokens to mask, but attn_mask has shape "
                f"{attn_mask.shape}: use key_mask=(…, m) for pads"
            )
        return linformer_attention(query, key, value, self.e, self.f, key_mask, is_causal)

    def extra_repr(self) -> str:
        """The shape of E, and whether F is another matrix."""
        return f"e={self.e.shape}, shared={self.f is self.e}"
