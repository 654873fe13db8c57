"""Efficient attention and A²-Nets: one formula, what it sees, and its causal form at any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, ops
from mini_nn.attention import (
    EfficientState,
    causal_efficient_attention,
    distribute_features,
    double_attention,
    efficient_attention,
    exp_features,
    gather_features,
    linear_attention,
    softmax_features,
)
from mini_nn.check import check_grads
from tests.attention.test_linear import LEADS, SEEDS, draw, golden, part
from tests.support import assert_close, host


def softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def naive(query: Any, key: Any, value: Any, is_causal: bool = True) -> Any:
    """Token by token, in float64: the mean over the features of the means over the keys."""
    q, k, v = (host(x).astype("float64") for x in (query, key, value))
    p, outputs = softmax(q, -1), []
    for i in range(q.shape[-2]):
        end = i + 1 if is_causal else k.shape[-2]
        means = np.swapaxes(softmax(k[..., :end, :], -2), -1, -2) @ v[..., :end, :]
        outputs.append(p[..., i : i + 1, :] @ means)
    return np.concatenate(outputs, axis=-2)


# Both papers


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), LEADS)
def test_efficient_attention(xp: Any, seed: int, n: int, m: int, d: int, lead: Any) -> None:
    """softmax(Q) softmax(K)ᵀ V by a loop; A²-Nets' gathering and distribution are the same."""
    q, k, v = draw(seed, n, d, 3, lead, m)
    wanted = naive(q, k, v, False)
    assert_close(efficient_attention(q, k, v), wanted, rtol=1e-10, atol=1e-11)
    assert_close(double_attention(q, k, v), wanted, rtol=1e-10, atol=1e-11)
    g = gather_features(k, v)
    assert g.shape == (*lead, d, 3)
    assert_close(distribute_features(q, g), wanted, rtol=1e-10, atol=1e-11)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_rows_add_up_without_a_denominator(xp: Any, seed: int, n: int, m: int, d: int) -> None:
    """Σⱼ weights = 1: it is linear attention with φ = softmax_d(q) and ϕ = softmax_n(k).

    With ϕ = eᵏ alone, whose columns are not normalised, it is another attention.
    """
    q, k, v = draw(seed, n, d, 2, (), m)
    weights = softmax(host(q), -1) @ softmax(host(k), 0).T
    assert_close(weights.sum(axis=-1), np.ones(n), rtol=1e-12)
    y = host(efficient_attention(q, k, v))
    assert_close(y, weights @ host(v), rtol=1e-10, atol=1e-11)

    def over_the_sequence(x: Any) -> Any:
        return ops.softmax(x, axis=-2)

    by_maps = linear_attention(q, k, v, (softmax_features, over_the_sequence))
    assert_close(by_maps, y, rtol=1e-10, atol=1e-11)
    assert (y <= host(v).max(axis=0) + 1e-12).all() and (y >= host(v).min(axis=0) - 1e-12).all()
    assert_close(efficient_attention(q + 3.0, k - 2.0, v), y, rtol=1e-9, atol=1e-10)


def test_columns_have_to_be_normalised(xp: Any) -> None:
    """What is planted: ϕ = eᵏ as it stands."""
    q, k, v = draw(0, 5, 4, 2)
    planted = linear_attention(q, k, v, (softmax_features, exp_features))
    assert abs(host(planted) - host(efficient_attention(q, k, v))).max() > 0.05


@pytest.mark.parametrize("form", [efficient_attention, double_attention])
def test_both_look_at_the_whole_sequence(form: Any, xp: Any) -> None:
    """A change of the last key moves all outputs, so a causal mask could not save them."""
    q, k, v = draw(0, 6, 3, 2)
    other = xp.concatenate([k[:5], k[5:] + 2.0])
    assert abs(host(form(q, k, v)) - host(form(q, other, v)))[:5].min() > 1e-6
    leaf = Tensor(k, requires_grad=True)
    (g,) = mini_nn.grad(form(q, leaf, v)[0].sum(), leaf)
    assert host(g)[1:].any()
    with pytest.raises(ValueError, match="not causal"):
        form(q, k, v, is_causal=True)


def test_a_causal_mask_over_the_weights_leaks(xp: Any) -> None:
    """What is planted: softmax_n over all keys, then the lower triangle, rows normalised again."""

    def planted(q: Any, k: Any, v: Any) -> Any:
        a = np.tril(softmax(host(q), -1) @ softmax(host(k), 0).T)
        return a / a.sum(axis=-1, keepdims=True) @ host(v)

    q, k, v = draw(0, 6, 3, 2)
    other = xp.concatenate([k[:5], k[5:] + 2.0])
    assert abs(planted(q, k, v) - planted(q, other, v))[1:5].max() > 1e-3
    ours = [host(causal_efficient_attention(q, x, v, is_causal=True)) for x in (k, other)]
    assert_close(ours[1][:5], ours[0][:5], rtol=0.0, atol=1e-12)


def test_the_authors_answer(xp: Any) -> None:
    g = golden("efficient.", xp)
    qkv = (g["query"], g["key"], g["value"])
    for form in (efficient_attention, double_attention):
        assert_close(form(*qkv), g["output"], rtol=1e-10, atol=1e-11)


# The causal form


@given(SEEDS, st.integers(1, 140), st.integers(1, 4), LEADS, st.sampled_from([0.1, 1, 30, 3000]))
def test_causal_form(xp: Any, seed: int, n: int, d: int, lead: Any, size: float) -> None:
    """The loop, for keys of any size; at the last token it is efficient attention."""
    q, k, v = draw(seed, n, d, 2, lead)
    k = k * size
    y = causal_efficient_attention(q, k, v, is_causal=True)
    tolerance = {"rtol": 1e-9, "atol": 1e-12 * max(1.0, size)}
    assert_close(y, naive(q, k, v), **tolerance)
    last = efficient_attention(q[..., -1:, :], k, v)
    assert_close(y[..., -1:, :], host(last), **tolerance)
    alone = causal_efficient_attention(q[..., -1:, :], k, v, is_causal=False)
    assert_close(alone, host(last), **tolerance)
    single = [x.astype("float32") for x in (q, k, v)]
    got = causal_efficient_attention(*single, is_causal=True)
    assert got.dtype == "float32"
    assert_close(got.astype("float64"), naive(*single), rtol=1e-4, atol=2e-6 * max(1.0, size))


def test_one_reference_for_a_chunk_underflows(xp: Any) -> None:
    """What is planted: e^{k − c} with c the largest key of a chunk, as in a softmax.

    In float32 the first tokens have no weight left when a key 200 larger comes, and get 0/0.
    """
    q = xp.zeros((4, 1), "float32")
    k = xp.asarray([[0.0], [1.0], [200.0], [-150.0]]).astype("float32")
    v = xp.asarray([[1.0], [2.0], [3.0], [4.0]]).astype("float32")
    e = np.exp(host(k) - host(k).max())
    assert np.cumsum(e)[1] == 0.0
    y = causal_efficient_attention(q, k, v, is_causal=True)
    assert_close(y, naive(q, k, v).astype("float32"), rtol=1e-5)


@given(SEEDS, st.integers(1, 140), st.data())
def test_splitting_a_sequence(xp: Any, seed: int, n: int, data: Any) -> None:
    """Cut anywhere, the state handed on: outputs, state and gradients of one pass."""
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    qkv = draw(seed, n, 3, 2, (2,))
    whole = [Tensor(x, requires_grad=True) for x in qkv]
    pieces = [Tensor(x, requires_grad=True) for x in qkv]
    y, last = causal_efficient_attention(*whole, is_causal=True, state=())
    outputs, state = [], ()
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        out, state = causal_efficient_attention(
            *part(pieces, start, stop), is_causal=True, state=state
        )
        outputs.append(out)
    joined = ops.concatenate(outputs, axis=-2)
    assert isinstance(state, EfficientState)
    assert_close(joined, host(y), rtol=1e-9, atol=1e-10)
    for a, b in zip(state, last, strict=True):
        assert_close(a, host(b), rtol=1e-9, atol=1e-10)
    weights = Rng(1).normal(y.shape, dtype="float64")
    one, other = (
        mini_nn.grad(ops.sum(out * weights) + ops.sum(end[0]) + ops.sum(end[1]), leaves)
        for out, end, leaves in ((y, last, whole), (joined, state, pieces))
    )
    for a, b in zip(one, other, strict=True):
        assert_close(b, host(a), rtol=1e-8, atol=1e-9)


@given(SEEDS, st.integers(1, 100), st.data())
def test_causality(xp: Any, seed: int, n: int, data: Any) -> None:
    t = data.draw(st.integers(0, n - 1))
    qkv = draw(seed, n, 3, 2)
    other = [
        xp.concatenate([x[:t], 5.0 * y[t:]]) for x, y in zip(qkv, draw(9, n, 3, 2), strict=True)
    ]
    y, moved = (causal_efficient_attention(*x, is_causal=True) for x in (qkv, other))
    assert_close(moved[:t], host(y)[:t], rtol=1e-12, atol=1e-12)
    leaves = [Tensor(x, requires_grad=True) for x in qkv]
    y = causal_efficient_attention(*leaves, is_causal=True)
    for g in mini_nn.grad(ops.sum(y[:t]), leaves):
        assert not host(g)[t:].any()


@given(SEEDS, st.integers(1, 70), st.integers(0, 20))
def test_pads_change_nothing(xp: Any, seed: int, n: int, pads: int) -> None:
    """On either side, whatever stands there; and nothing flows back to them."""
    lead = int(Rng(seed).host.integers(0, pads + 1))
    q, k, v = draw(seed, n + pads, 3, 2, (2,))
    places = xp.arange(n + pads)
    mask = (places >= lead) & (places < lead + n)
    v = xp.where(mask[:, None], v, xp.asarray(np.full(v.shape, np.nan)))
    inside = part((q, k, v), lead, lead + n)
    for form, options in (
        (efficient_attention, {}),
        (double_attention, {}),
        (causal_efficient_attention, {"is_causal": True}),
    ):
        leaves = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        y = form(*leaves, key_mask=mask, **options)
        got = y[..., lead : lead + n, :]
        assert_close(got, host(form(*inside, **options)), rtol=1e-9, atol=1e-10)
        gradients = mini_nn.grad(ops.sum(got), leaves)
        assert not any(host(g)[:, ~host(mask)].any() for g in gradients)
    assert not host(y)[:, :lead].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_only_pads(xp: Any, is_causal: bool) -> None:
    """Nothing to see: 0, with finite gradients, and in the causal form the next token is alone."""
    form = causal_efficient_attention if is_causal else efficient_attention
    leaves = [Tensor(x, requires_grad=True) for x in draw(0, 3, 2, 2)]
    mask = xp.asarray([False] * 3)
    y = form(*leaves, key_mask=mask, is_causal=is_causal)
    assert_close(y, np.zeros((3, 2)), atol=0.0)
    for g in mini_nn.grad(y.sum(), leaves):
        assert np.isfinite(host(g)).all()
    if is_causal:
        _, state = form(*leaves, key_mask=mask, is_causal=True, state=())
        more = draw(1, 1, 2, 2)
        out, _ = form(*more, is_causal=True, state=state)
        assert_close(out, host(more[2]), rtol=1e-12)


@given(SEEDS, st.integers(0, 9), st.sampled_from([((2, 3), (2, 1)), ((3,), ()), ((), (3,))]))
def test_heads_of_keys_that_several_queries_share(xp: Any, seed: int, n: int, leads: Any) -> None:
    """No head is dropped: row i is efficient attention to the tokens up to i, also in parts."""
    (q, _, _), (_, k, v) = (draw(seed, n, 3, 2, lead) for lead in leads)
    y = causal_efficient_attention(q, k, v)
    assert y.shape == (*np.broadcast_shapes(*leads), n, 2)
    for i in range(n):
        last = efficient_attention(q[..., i : i + 1, :], *part((k, v), 0, i + 1))
        assert_close(y[..., i : i + 1, :], host(last), rtol=1e-9, atol=1e-10)
    if n:
        alone = causal_efficient_attention(q[..., -1:, :], k, v, is_causal=False)
        assert_close(alone, host(y)[..., -1:, :], rtol=1e-10, atol=1e-11)
    first, state = causal_efficient_attention(*part((q, k, v), 0, n // 2), state=())
    rest, _ = causal_efficient_attention(*part((q, k, v), n // 2, None), state=state)
    assert_close(ops.concatenate([first, rest], axis=-2), host(y), rtol=1e-9, atol=1e-10)


def test_keys_that_are_very_negative(xp: Any) -> None:
    """−10⁶ is a key like another and no pad: what is added to all keys cancels."""
    q, k, v = draw(0, 9, 3, 2)
    for shift in (-1e6, 1e6):
        moved = causal_efficient_attention(q, k + shift, v)
        assert_close(moved, host(causal_efficient_attention(q, k, v)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "form", [efficient_attention, double_attention, causal_efficient_attention]
)
def test_float16(form: Any, xp: Any) -> None:
    """The logarithm of nothing is no number of float16; nan at pads reaches no gradient."""
    q, k, v = (x.astype("float16") for x in draw(3, 9, 3, 2))
    real = xp.arange(9) > 2
    dirty = [xp.where(real[:, None], x, float("nan")) for x in (k, v)]
    leaves = [Tensor(x, requires_grad=True) for x in (q, *dirty)]
    y = form(*leaves, key_mask=real)
    assert y.dtype == "float16"
    wanted = form(*(x[3:].astype("float64") for x in (q, k, v)))
    assert_close(host(y)[3:], host(wanted).astype("float16"), rtol=5e-3, atol=2e-3)
    for g in mini_nn.grad(ops.sum(y), leaves):
        assert g.dtype == "float16" and np.isfinite(host(g)).all()
    x, v = xp.zeros((70_000, 1), "float16"), xp.full((70_000, 1), 8.0, "float16")
    assert_close(form(x, x, v), v)  # more tokens than float16 can count


def test_derivatives(xp: Any) -> None:
    qkv = draw(1, 5, 2, 2)
    check_grads(efficient_attention, *qkv, order=2)
    check_grads(double_attention, *qkv, order=1)
    check_grads(lambda *x: causal_efficient_attention(*x, is_causal=True), *qkv, order=2)


def test_empty_and_halves(xp: Any) -> None:
    x = xp.zeros((2, 0, 3), "float32")
    y, state = causal_efficient_attention(x, x, x[..., :2], is_causal=True, state=())
    assert y.shape == (2, 0, 2) and y.dtype == "float32"
    one = draw(0, 1, 3, 2)
    out, _ = causal_efficient_attention(*one, is_causal=True, state=tuple(s[0] for s in state))
    assert_close(out, host(one[2]), rtol=1e-6)
    half = [a.astype("float16") for a in draw(2, 70, 3, 2)]
    y = causal_efficient_attention(*half, is_causal=True)
    assert y.dtype == "float16"
    assert_close(y, naive(*half).astype("float16"), rtol=5e-3, atol=2e-3)


def test_refusals(xp: Any) -> None:
    q, k, v = draw(0, 4, 3, 2)
    for use, seen in (
        (lambda: efficient_attention(q, k[:, :2], v), "query"),
        (lambda: causal_efficient_attention(q, k, v, is_causal=False), "is_causal=True"),
        (lambda: causal_efficient_attention(q[:2], k, v, is_causal=True), "2 and 4"),
        (lambda: causal_efficient_attention(q[:1], k, v), "is_causal=False for the last token"),
        (lambda: causal_efficient_attention(q[:1], k[:0], v[:0], None, False), "got 1 and 0"),
        (lambda: causal_efficient_attention(q, k, v, None, False, ()), "is_causal=True"),
        (lambda: causal_efficient_attention(q, k, v, state=(k[1:].T[:, :2], k[0, :1])), "state"),
        (lambda: causal_efficient_attention(q, xp.stack([k, k]), xp.stack([v] * 3)), "broadcast"),
        (lambda: causal_efficient_attention(q, k, v, is_causal=True, state=(v, k)), "the state"),
        (lambda: gather_features(k, v, xp.ones(3) > 0), "key_mask"),
    ):
        with pytest.raises(ValueError, match=seen):
            use()
    for form in (efficient_attention, double_attention, causal_efficient_attention):
        with pytest.raises(TypeError, match="key_mask has booleans"):
            form(q, k, v, key_mask=xp.ones(4, "int64"))
    with pytest.raises(TypeError, match="a state is a tuple"):
        causal_efficient_attention(q, k, v, state=k)
