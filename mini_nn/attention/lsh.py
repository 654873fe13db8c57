"""Attention among tokens that fall into the same bucket of a locality-sensitive hash.

Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451, section 2
and appendix A; the hash is that of Andoni et al. 2015, arXiv:1509.02897.

==========================================  ================================================
qⱼ = xⱼ, kⱼ = xⱼ / ‖xⱼ‖  (shared QK)        ``lsh_attention``: one array ``query_key``
h(x) = argmax [x R; −x R], R (d, b/2)       ``lsh_hash``; b buckets, r independent R
order by (h, position), chunks of m         ``_sorted``
Pᵢ = {j: h(xⱼ) = h(xᵢ), chunk(j) ∈          ``_places``, ``_within``
{chunk(i), chunk(i) − 1}, j ≠ i [, j < i]}
Nᵢⱼ = #{rounds in which j ∈ Pᵢ}             ``_targets``; sᵢⱼ becomes sᵢⱼ − ln Nᵢⱼ
o = Σᵣ exp(lseᵣ − lse) oᵣ                   the end of ``lsh_attention``
==========================================  ================================================

Since a pair found in N rounds is counted N times with weight 1/N, the r rounds together are one
softmax over the union ∪ᵣ Pᵢ.  A token for which the union is empty attends to itself.

Is it causal?  Weights and gradients are: nothing of a token j > i is added to oᵢ, so ∂oᵢ/∂xⱼ and
∂oᵢ/∂vⱼ are exactly 0.  The *set* Pᵢ is not quite: a later token that changes its bucket moves the
borders of the chunks, and with them how far back i sees.  Always in reach are the last m earlier
tokens of its bucket, never more than the last 2m − 1; which of those between, the future decides.
It decides nothing where no bucket has more than m + 1 tokens, so also where m ≥ n − 1.  With
``strict=True`` i sees exactly the last m, and earlier outputs cannot change at all.

Deviations: ``strict`` is not in the paper.  The first chunk of a round looks back at nothing,
where released code lets it see the last chunk, which a causal mask then hides.  Hugging Face's
code also lets tokens attend across buckets within the two chunks and does not divide by Nᵢⱼ; here
the paper's equations hold.  Its scale is 1, with keys of length 1; here it is 1/√d by default.  A
token that has nothing to attend to gets its own value exactly, instead of through a large negative
logit.  float16 is summed in float32.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..nn.module import Module
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .arguments import check_attention, narrow, score_scale, wide, without_pads

__all__ = ["LSHAttention", "lsh_attention", "lsh_hash"]


def lsh_hash(x: Any, rotations: Any) -> Array:
    """h(x) = argmax [x R; −x R]: near directions get the same number more often than far ones.

    h(c x) = h(x) for c > 0, and h(−x) ≠ h(x).  For b = 2 and R from a normal law two vectors with
    an angle of θ agree with probability 1 − θ/π, for larger b with one that also falls with θ.

    Args:
        x: (…, n, d).
        rotations: R, (…, r, d, b/2), whose leading axes broadcast to those of x, such as (h, …).
            Several in a tuple are a hash in factors, b = b₁ b₂ …, that agrees where all agree:
            [x R; −x R] has then n (b₁ + b₂ + …) numbers instead of n b, which counts for b ~ n.

    Returns:
        (…, r, n) integers in [0, b), without a gradient; the first of several largest, so the
        vector 0 falls into bucket 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    x, (number, count) = data_of(x), (0, 1)
    for factor in map(data_of, _factors(rotations)):
        if x.ndim < 2 or factor.ndim < 3 or factor.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"lsh_hash takes x (…, n, d) and rotations (…, r, d, b/2), got {x.shape} and "
                f"{factor.shape}"
            )
        turned = x[..., None, :, :] @ factor
        number = number + count * of(x).concatenate([turned, -turned], axis=-1).argmax(axis=-1)
        count *= 2 * factor.shape[-1]
    return number


def _factors(rotations: Any) -> tuple[Any, ...]:
    return (*rotations,) if isinstance(rotations, (tuple, list)) else (rotations,)


def lsh_attention(
    query_key: Any,
    value: Any,
    rotations: Any,
    chunk_size: int,
    is_causal: bool = False,
    key_mask: Any = None,
    *,
    scale: float | None = None,
    strict: bool = False,
    return_logsumexp: bool = False,
) -> Any:
    """softmax over the tokens that share a bucket, and a chunk or the chunk before.

    There are r n · 2 m logits instead of n².  Buckets should hold about m/2 tokens: b ≈ 2 n / m.
    The hash has no derivative; given the buckets, there are derivatives of every order.

    Args:
        query_key: (…, n, d): the queries, and after division by their lengths the keys.
        value: (…, n, e), the same leading axes.
        rotations: (…, r, d, b/2), one for each of r rounds, or a tuple; see ``lsh_hash``.
        chunk_size: m ≥ 1; it need not divide n, and beyond n it is n.
        is_causal: a token sees earlier ones only; see the top of this file for what that promises.
        key_mask: booleans that broadcast to (…, n), true for real tokens.  Pads sort behind all
            buckets and change nothing, whatever they hold.
        scale: of the logits; None for 1/√d.
        strict: see exactly the last m earlier tokens of the bucket; needs ``is_causal``.
        return_logsumexp: return also ln Σⱼ exp sᵢⱼ over the union, (…, n).

    Returns:
        (…, n, e); a token that has no other to attend to gets its own value, a pad zeros.  Their
        logsumexps are the token's own logit and −inf.

    Raises:
        ValueError: the shapes do not fit, ``chunk_size`` is below 1, or ``strict`` without
            ``is_causal``.
        TypeError: ``key_mask`` is not of booleans.
    """
    if query_key.ndim < 2 or value.shape[:-1] != query_key.shape[:-1]:
        raise ValueError(
            f"lsh_attention takes query_key (…, n, d) and value (…, n, e), got {query_key.shape} "
            f"and {value.shape}"
        )
    if chunk_size < 1 or (strict and not is_causal):
        raise ValueError(
            "lsh_attention takes chunk_size ≥ 1, and strict=True only with is_causal=True, got "
            f"chunk_size={chunk_size}, strict={strict}, is_causal={is_causal}"
        )
    like, query_key, value = value, wide(query_key), wide(value)
    lead, n = query_key.shape[:-2], query_key.shape[-2]
    scale = score_scale(scale, query_key)
    if key_mask is not None:  # what stands in a pad, even nan, must not reach a sum
        query_key, value = without_pads(key_mask, query_key, value)
        key_mask = of(data_of(value)).broadcast_to(data_of(key_mask), (*lead, n))
    keys = _unit(query_key)
    if n == 0:
        return (like, like.sum(axis=-1)) if return_logsumexp else like
    buckets = lsh_hash(query_key, rotations)
    if buckets.shape[:-2] != lead:
        raise ValueError(
            f"the leading axes of rotations have to broadcast to {lead}, got "
            f"{[factor.shape for factor in _factors(rotations)]}"
        )
    m = min(chunk_size, n)
    if key_mask is not None:
        pad = math.prod(2 * factor.shape[-1] for factor in _factors(rotations))
        buckets = of(buckets).where(key_mask[..., None, :], buckets, pad)
    rows, back, places, positions = _sorted(buckets, key_mask, m, strict)
    allowed, counts = _targets(places, positions, m if strict else 1, is_causal)

    q, k, v = (ops.take(x.reshape(-1, x.shape[-1]), rows, axis=0) for x in (query_key, keys, value))
    logits = ops.matmul(q * scale, ops.matrix_transpose(with_previous(k)))
    twice = of(counts).maximum(counts, 1).astype(q.dtype)  # at least 1 wherever it is looked at
    logits = ops.where(allowed, logits - of(twice).log(twice), float("-inf"))
    outputs = ops.matmul(ops.softmax(logits), with_previous(v))  # no target: zeros
    sizes = ops.logsumexp(logits, axis=-1)  # no target: −inf

    outputs = ops.take(outputs.reshape(-1, v.shape[-1]), back, axis=0)
    sizes = ops.take(sizes.reshape(-1), back, axis=0)
    weights = ops.softmax(sizes, axis=-2)
    output = (weights[..., None] * outputs).sum(axis=-3)
    total = ops.logsumexp(sizes, axis=-2)
    alone = data_of(total) == float("-inf")
    if key_mask is not None:
        alone = alone & key_mask
    output = ops.where(alone[..., None], value, output)
    if not return_logsumexp:
        return narrow(output, like)
    total = ops.where(alone, (query_key * keys).sum(axis=-1) * scale, total)
    return narrow(output, like), narrow(total, like)


def _unit(x: Any) -> Any:
    """x / ‖x‖; the vector 0 stays 0."""
    length = ops.norm(x, axis=-1, keepdims=True)
    return x / ops.where(data_of(length) == 0, 1.0, length)


def with_previous(chunks: Any) -> Any:
    """(…, c, m, w) → (…, c, 2m, w): each chunk behind the one before it, the first behind zeros."""
    count = chunks.shape[-3]
    if count == 1:
        return chunks
    before = [(0, 0)] * (chunks.ndim - 3) + [(1, 0), (0, 0), (0, 0)]
    return ops.concatenate([ops.pad(chunks, before)[..., :count, :, :], chunks], axis=-2)


def _sorted(buckets: Array, key_mask: Any, m: int, strict: bool) -> tuple[Array, ...]:
    """Who stands where after sorting, chunk by chunk; the last chunk is filled up with token 0.

    Returns:
        rows: (…, r, c, m), the number of each token among all of (…, n).
        back: (…, r, n), the number of each token's place among all of (…, r, c, m).
        places: (…, r, c, m, r'), ``_places`` of the token in round r'; what fills up has 0.
        positions: (…, r, c, m), its number among the n.
    """
    xp, (*lead, rounds, n) = of(buckets), buckets.shape
    count = -(-n // m)
    # numbers that are all different: any sort of them is a stable sort by bucket
    order = xp.argsort(buckets * n + xp.arange(n), axis=-1)
    place = xp.argsort(order, axis=-1)
    fill = [(0, 0)] * (buckets.ndim - 1) + [(0, count * m - n)]
    order = xp.pad(order, fill)
    size = math.prod(lead)
    rows = xp.arange(size).reshape(*lead, 1, 1) * n + order
    back = xp.arange(size * rounds).reshape(*lead, rounds, 1) * (count * m) + place
    places = _places(buckets, place, m, count, strict)
    if key_mask is not None:
        places = xp.where(key_mask[..., None, :], places, 0)
    places = places.swapaxes(-1, -2).reshape(size * n, rounds)[rows]
    places = xp.where(xp.arange(count * m)[:, None] < n, places, 0)
    shape = (*lead, rounds, count, m)
    return rows.reshape(shape), back, places.reshape(*shape, rounds), order.reshape(shape)


def _places(buckets: Array, place: Array, m: int, count: int, strict: bool) -> Array:
    """Numbers of which i may see j if theirs differ by 0 to 1, or by 0 to m if strict.

    Buckets are so far apart that tokens of different ones never are in reach, nor is 0 from any.
    """
    if strict:
        return buckets * (count * m + m) + place + (m + 1)
    return buckets * (count + 1) + place // m + 2


def _within(i: Array, j: Array, reach: int) -> Array:
    """(…, m), (…, k) → (…, m, k): whether j is in reach of i; nothing is in reach of 0."""
    distance = of(i).where(i > 0, i, -1)[..., :, None] - j[..., None, :]
    return (distance >= 0) & (distance <= reach)


def _targets(places: Array, positions: Array, reach: int, is_causal: bool) -> tuple[Array, Array]:
    """Which keys (…, r, c, m, 2m) a token sees in this round, and in how many rounds: Nᵢⱼ."""
    xp, rounds = of(places), places.shape[-1]
    key_places = with_previous(places)
    i = positions[..., :, None]
    j = with_previous(positions[..., None])[..., None, :, 0]
    other_tokens = j < i if is_causal else j != i
    here = xp.arange(rounds).reshape(rounds, 1, 1, 1)
    allowed: Array = False
    counts: Array = 0
    for r in range(rounds):
        seen = _within(places[..., r], key_places[..., r], reach)
        counts = counts + seen.astype("int64")
        allowed = allowed | (seen & (here == r))
    return allowed & other_tokens, counts


class LSHAttention(Module):
    """``lsh_attention`` for the ``attention=`` slot of ``models.gpt``; nothing is trained.

    The shared QK is ``key``: of ``query`` only the shape is looked at, and it gets no gradient.
    The other choice would need all earlier queries where a cache holds keys.  A model that means
    it has one projection for both and hands that over twice.

    New rotations are drawn at each call while training, and the same ones at each call otherwise.

    Args:
        num_buckets: b, even, about 2 n / m; or even factors of it.
        chunk_size: m.
        rounds: r.
        strict: see ``lsh_attention``: True makes every causal output independent of what follows,
            as sampling token by token needs.
        scale: of the logits; None for 1/√d.
        rng: what the rotations are drawn from (None: ``default_rng()``).

    Attributes:
        seed: of the rotations in evaluation.

    Raises:
        ValueError: b is odd or below 2, or m or r below 1.
    """

    def __init__(
        self,
        num_buckets: int | tuple[int, ...] | list[int],
        chunk_size: int,
        rounds: int = 1,
        strict: bool = False,
        scale: float | None = None,
        *,
        rng: Rng | None = None,
    ) -> None:
        factors = _factors(num_buckets)
        if not factors or any(b < 2 or b % 2 for b in factors) or chunk_size < 1 or rounds < 1:
            raise ValueError(
                "LSHAttention takes an even number of buckets (x and −x have different ones), and "
                f"at least 1 token in a chunk and 1 round; got num_buckets={num_buckets}, "
                f"chunk_size={chunk_size}, rounds={rounds}"
            )
        self.num_buckets = factors
        self.chunk_size = chunk_size
        self.rounds = rounds
        self.strict = strict
        self.scale = scale
        self.rng = default_rng() if rng is None else rng
        self.seed = self.rng.split(1)[0].seed

    def rotations(self, heads: tuple[int, ...], d: int, dtype: Any) -> tuple[Array, ...]:
        """R (*heads, r, d, b/2) for each factor, normal numbers."""
        rng = self.rng if self.training else Rng(self.seed)
        shapes = [(*heads, self.rounds, d, b // 2) for b in self.num_buckets]
        return tuple([rng.normal(shape, dtype=dtype) for shape in shapes])

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        key_mask: Any = None,
    ) -> Any:
        """(…, h, n, d), (…, h, n, d), (…, h, n, e) → (…, h, n, e).

        With one query and several keys the query is the last token's, as with a cache of keys: all
        is computed again, and its row returned.

        Raises:
            ValueError: there is an ``attn_mask``, or neither one query nor as many as keys, or
                they have other leading axes.
        """
        if attn_mask is not None:
            raise ValueError(
                "LSH attention has no matrix of logits to which a mask (n, m) could be added, and "
                f"attn_mask of shape {getattr(attn_mask, 'shape', attn_mask)} is one: use "
                "is_causal=True, and key_mask=(…, n) for pads"
            )
        check_attention(query, key, value)
        queries, (n, d) = query.shape[-2], key.shape[-2:]
        last = queries == 1 < n
        if (queries != n and not last) or query.shape[:-2] != key.shape[:-2]:
            raise ValueError(
                "LSHAttention has one vector for the query and the key of a token, so it takes as "
                "many queries as keys, or the last one, and the same leading axes; got "
                f"{query.shape} and {key.shape}"
            )
        rotations = self.rotations(key.shape[-3:-2], d, data_of(key).dtype)
        output = lsh_attention(
            key, value, rotations, self.chunk_size, is_causal or last, key_mask,
            scale=self.scale, strict=self.strict and (is_causal or last),
        )  # fmt: skip
        return output[..., -1:, :] if last else output
