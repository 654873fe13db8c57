"""Top-k attention: exactly k keys, ties to the first, no gradient for what was dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import causal_mask, topk_attention, topk_mask
from mini_nn.check import check_grads
from tests.support import assert_close, host


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def largest(row: Any, k: int) -> set[int]:
    """The places of the k largest, of equal ones the first; −inf never."""
    places = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
    return {j for j in places if row[j] > -np.inf}


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_exactly_k_and_of_equal_ones_the_first(xp: Any, m: int, k: int, seed: int) -> None:
    """Scores of four values and −inf, so that nearly all tie."""
    values = host(Rng(seed).integers(0, 5, (3, 2, m))).astype("float64")
    values[values == 4] = -np.inf
    kept = host(topk_mask(xp.asarray(values), k))
    for place in np.ndindex(3, 2):
        assert set(kept[place].nonzero()[0]) == largest(values[place], k)


def test_the_papers_threshold_keeps_more_than_k(xp: Any) -> None:
    """P ≥ t with t the k-th largest score, the rule that ours deviates from."""
    scores = xp.asarray([[1.0, 3.0, 1.0, 1.0, 0.0]])
    threshold = host(ops.topk(scores, 2)[0])[:, -1:]
    assert (host(scores) >= threshold).sum() == 4
    assert host(topk_mask(scores, 2)).tolist() == [[True, True, False, False, False]]


def test_nan_is_kept_and_seen(xp: Any) -> None:
    """A bad score is not hidden by being dropped."""
    scores = xp.asarray([[1.0, float("nan"), 3.0]])
    assert host(topk_mask(scores, 1)).tolist() == [[False, True, False]]


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 8), st.booleans())
def test_against_loops(xp: Any, n: int, more: int, k: int, is_causal: bool) -> None:
    m, seed = n + more, n + 7 * more
    q, key, v = normal(seed, 2, n, 3), normal(seed + 1, 2, m, 3), normal(seed + 2, 2, m, 4)
    got = topk_attention(q, key, v, k, is_causal)
    scores = host(q) @ host(key).swapaxes(1, 2) / np.sqrt(3)
    if is_causal:
        scores[:, ~host(causal_mask(n, m))] = -np.inf
    want = np.zeros((2, n, 4))
    for b in range(2):
        for i in range(n):
            places = sorted(largest(scores[b, i], k))
            weights = np.exp(scores[b, i, places])
            want[b, i] = weights @ host(v)[b, places] / weights.sum()
    assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_limits(xp: Any) -> None:
    """k ≥ m is softmax attention; k = 1 copies the value of the best key."""
    q, key, v = normal(0, 2, 5, 3), normal(1, 2, 5, 3), normal(2, 2, 5, 4)
    for k in (5, 6, 100):
        for is_causal in (False, True):
            full = ops.scaled_dot_product_attention(q, key, v, is_causal=is_causal)
            assert_close(topk_attention(q, key, v, k, is_causal), full, rtol=1e-12)
    best = host(q @ key.swapaxes(1, 2)).argmax(axis=-1)
    want = np.take_along_axis(host(v), best[..., None], axis=1)
    assert_close(topk_attention(q, key, v, 1), want, rtol=1e-12)


def test_equal_keys(xp: Any) -> None:
    """All scores tie: the mean of the first k values."""
    q, key, v = normal(0, 4, 3), xp.zeros((6, 3)), normal(2, 6, 2)
    want = np.broadcast_to(host(v)[:2].mean(axis=0), (4, 2))
    assert_close(topk_attention(q, key, v, 2), want, rtol=1e-12)


def test_what_is_dropped_gets_no_gradient(xp: Any) -> None:
    """Exactly 0 for scores, keys and values that the query drops; not so for softmax."""
    q, key, v = (Tensor(normal(s, n, 3), requires_grad=True) for s, n in ((0, 1), (1, 8), (2, 8)))
    kept = host(topk_mask(q.data @ key.data.T, 3))[0]
    assert kept.sum() == 3
    y = topk_attention(q, key, v, 3)
    for g in grad((y * y).sum(), [key, v]):
        moved = (host(g) != 0.0).any(axis=1)
        assert np.array_equal(moved, kept)
    y = ops.scaled_dot_product_attention(q, key, v)
    assert all((host(g) != 0.0).all() for g in grad((y * y).sum(), [key, v]))


def test_gradients(xp: Any) -> None:
    q, key, v = normal(3, 2, 4, 3), normal(4, 2, 6, 3), normal(5, 2, 6, 2)
    check_grads(lambda q, k, v: topk_attention(q, k, v, 2), q, key, v)
    check_grads(lambda q, k, v: topk_attention(q, k, v, 2, is_causal=True), q, key, v)


def test_causality(xp: Any) -> None:
    """Later tokens change nothing before them, and get no gradient from there."""
    q, key, v = normal(0, 7, 3), normal(1, 7, 3), normal(2, 7, 3)
    y = host(topk_attention(q, key, v, 2, is_causal=True))
    for t in range(1, 7):
        changed = [xp.concatenate([x[:t], x[t:] + 3.0 * normal(9, 7 - t, 3)]) for x in (q, key, v)]
        assert_close(topk_attention(*changed, 2, is_causal=True)[:t], y[:t], atol=1e-12)
        leaves = [Tensor(x, requires_grad=True) for x in (q, key, v)]
        out = topk_attention(*leaves, 2, is_causal=True)[:t]
        assert all(not host(g)[t:].any() for g in grad((out * out).sum(), leaves))


def test_choosing_before_masking_would_leak(xp: Any) -> None:
    """The classic bug: a later key takes one of the k places, and the row is left with fewer."""

    def leaky(q: Any, key: Any, v: Any, k: int) -> Any:
        scores = q @ key.T / np.sqrt(3)
        kept = topk_mask(scores, k) & causal_mask(len(q))
        return ops.scaled_dot_product_attention(q, key, v, kept)

    q, key, v = normal(0, 7, 3), normal(1, 7, 3), normal(2, 7, 3)
    later = xp.concatenate([key[:4], 5.0 * key[4:]])
    assert abs(host(leaky(q, later, v, 2)) - host(leaky(q, key, v, 2)))[:4].max() > 1e-3
    assert_close(
        topk_attention(q, later, v, 2, True)[:4], topk_attention(q, key, v, 2, True)[:4], rtol=1e-12
    )


def test_a_sequence_in_pieces(xp: Any) -> None:
    q, key, v = normal(0, 2, 9, 3), normal(1, 2, 9, 3), normal(2, 2, 9, 4)
    real = Rng(3).bernoulli(0.7, (2, 9))
    whole = topk_attention(q, key, v, 3, is_causal=True, key_mask=real)
    for cut in range(10):
        state: Any = ()
        pieces = []
        for part in (slice(0, cut), slice(cut, 9)):
            args = (q[:, part], key[:, part], v[:, part], 3, True, state)
            y, state = topk_attention(*args, key_mask=real[:, part])
            pieces.append(y)
        assert_close(ops.concatenate(pieces, axis=1), whole, rtol=1e-12)
        assert_close(state.key, xp.where(real[..., None], key, 0.0))


def test_pads_and_nothing_to_see(xp: Any) -> None:
    q, key, v = normal(0, 4, 3), normal(1, 6, 3), normal(2, 6, 2)
    real = xp.arange(6) < 4
    want = topk_attention(q, key[:4], v[:4], 2)
    assert_close(topk_attention(q, key, v, 2, key_mask=real), want, rtol=1e-12)
    dirty = [Tensor(xp.where(real[:, None], x, xp.nan), requires_grad=True) for x in (key, v)]
    y = topk_attention(q, *dirty, 2, key_mask=real)
    assert_close(y, want, rtol=1e-12)  # though nan would count as the largest score
    for g in grad(y.sum(), dirty):
        assert np.isfinite(host(g)).all() and not host(g)[4:].any()
    leaves = [Tensor(x, requires_grad=True) for x in (q, key, v)]
    y = topk_attention(*leaves, 2, key_mask=xp.zeros(6, "bool"))
    assert not host(y).any()
    assert all(not host(g).any() for g in grad(y.sum(), leaves))


def test_refuses(xp: Any) -> None:
    q = normal(0, 4, 3)
    with pytest.raises(ValueError, match="k is at least 1"):
        topk_attention(q, q, q, 0)
    with pytest.raises(ValueError, match="k is at least 1"):
        topk_mask(q, 0)
    with pytest.raises(ValueError, match="needs is_causal"):
        topk_attention(q, q, q, 1, state=())
    with pytest.raises(TypeError, match="boolean"):
        topk_attention(q, q, q, 1, key_mask=xp.ones(4))
    for wrong in (xp.ones((5, 1, 4), "bool"), xp.ones(3, "bool")):  # no axis is added, or cut off
        with pytest.raises(ValueError, match=r"key_mask has to broadcast to .* \(4,\)"):
            topk_attention(q, q, q, 1, key_mask=wrong)


def test_float16_is_summed_in_float32(xp: Any) -> None:
    """70,000 keys alike are more than float16 can count."""
    key, v = xp.ones((70_000, 2), "float16"), xp.full((70_000, 1), 8.0, "float16")
    y = topk_attention(key[:1], key, v, 69_999)
    assert y.dtype == "float16"
    assert_close(y, v[:1])
