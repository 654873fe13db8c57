"""PoWER-BERT: what is significant, what is kept in which order, and the three steps of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.attention import (
    PowerLayer,
    SoftExtract,
    extract,
    retention_configuration,
    retention_loss,
    significance,
    softmax_attention,
)
from mini_nn.check import check_grads
from mini_nn.nn.residual import post_norm
from tests.attention.test_linear import LEADS, SEEDS
from tests.support import assert_close, host


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def weights_of(seed: int, *shape: int, is_causal: bool = False) -> Any:
    s = normal(seed, *shape)
    if is_causal:
        s = ops.where(ops.tril(ops.ones_like(s)) > 0.0, s, float("-inf"))
    return ops.softmax(s, axis=-1)


# Scores


@given(SEEDS, st.integers(1, 7), st.integers(1, 3), LEADS)
def test_significance(xp: Any, seed: int, n: int, h: int, lead: Any) -> None:
    """Column sums by loops; h n is given away in all, or without what words keep for themselves."""
    weights = weights_of(seed, *lead, h, n, n)
    a = host(weights)
    scores = host(significance(weights))
    for place in np.ndindex(*lead):
        for w in range(n):
            total = sum(a[place][head, other, w] for head in range(h) for other in range(n))
            assert_close(scores[place][w], np.asarray(total), rtol=1e-12)
    assert_close(scores.sum(axis=-1), np.full(lead, float(h * n)), rtol=1e-12)
    others = host(significance(weights, include_self=False))
    own = np.einsum("...hww->...w", a)
    assert_close(others, scores - own, rtol=1e-9, atol=1e-12)


def test_rows_are_not_columns(xp: Any) -> None:
    """What is planted: sums of rows, which are h for every word, so that ties decide."""
    weights = weights_of(0, 2, 6, 6)
    assert_close(ops.sum(weights, axis=(-3, -1)), np.full(6, 2.0), rtol=1e-12)
    assert host(significance(weights)).std() > 0.1


@given(SEEDS, st.integers(1, 6), st.integers(0, 4))
def test_pads_do_not_look(xp: Any, seed: int, n: int, pads: int) -> None:
    s = normal(seed, 2, 3, n + pads, n + pads)
    real = xp.arange(n + pads) < n
    weights = ops.softmax(xp.where(real, s, float("-inf")), axis=-1)
    alone = ops.softmax(s[..., :n, :n], axis=-1)
    scores = host(significance(weights, real))
    assert_close(scores[:, :n], host(significance(alone)), rtol=1e-12)
    assert (scores[:, n:] == -np.inf).all()
    per_text = host(significance(weights, xp.stack([real, real])))
    assert_close(per_text, scores, rtol=0.0, atol=0.0)


def test_pads_that_look_would_decide(xp: Any) -> None:
    """What is planted: the released sum, in which the rows of pads count as well."""
    s = normal(0, 1, 8, 8)
    places = xp.arange(8)
    real = places < 4
    least = int(host(significance(ops.softmax(s[:, :4, :4], axis=-1))).argmin())
    s = xp.where(~real[:, None] & (places == least), 9.0, xp.where(real, s, float("-inf")))
    weights = ops.softmax(s, axis=-1)
    assert host(significance(weights, real)).argsort()[4] == least  # after four pads
    assert host(significance(weights)).argmax() == least


# Keeping


@given(SEEDS, st.integers(1, 9), st.integers(1, 10), LEADS, st.booleans())
def test_extract(xp: Any, seed: int, n: int, length: int, lead: Any, keep_first: bool) -> None:
    """[CLS] and the largest scores, in the order of the text; ties keep earlier words."""
    x = normal(seed, *lead, n, 2)
    scores = ops.round(2.0 * normal(seed + 1, *lead, n)) / 2.0
    y, places, real = (host(a) for a in extract(x, scores, length, keep_first))
    assert real.all() and y.shape == (*lead, min(length, n), 2)
    for place in np.ndindex(*lead):
        s = [float(v) for v in host(scores)[place]]
        first = [0] if keep_first else []
        rest = sorted(range(len(first), n), key=lambda j: (-s[j], j))
        wanted = sorted((first + rest)[:length])
        assert places[place].tolist() == wanted
        assert_close(y[place], host(x)[place][wanted], rtol=0.0, atol=0.0)


def test_first_word_stays(xp: Any) -> None:
    """B21: also with the lowest score; what is planted, the plain top l, loses it."""
    x, scores = normal(0, 5, 2), xp.asarray([0.0, 4.0, 1.0, 3.0, 2.0])
    assert host(extract(x, scores, 3)[1]).tolist() == [0, 1, 3]
    assert host(extract(x, scores, 3, keep_first=False)[1]).tolist() == [1, 3, 4]
    by_score = host(ops.topk(scores, 3)[1])
    assert by_score.tolist() == [1, 3, 4] and host(extract(x, scores, 1)[1]).tolist() == [0]
    falling = xp.asarray([0.0, 1.0, 2.0, 3.0, 4.0])
    assert host(ops.topk(falling, 3)[1]).tolist() == [4, 3, 2]  # the order of scores
    assert host(extract(x, falling, 3)[1]).tolist() == [0, 3, 4]  # that of the text


def test_pads_are_kept_last(xp: Any) -> None:
    x, scores = normal(0, 2, 5, 2), normal(1, 2, 5)
    real = xp.asarray([[True] * 5, [True, True, False, False, False]])
    _, places, left = extract(x, scores, 3, key_mask=real)
    assert host(places)[1, :2].tolist() == [0, 1]
    assert host(left).tolist() == [[True] * 3, [True, True, False]]


def test_gradient_of_extract(xp: Any) -> None:
    """Words that are dropped get none, scores neither: which are kept is a constant."""
    x = Tensor(normal(0, 5, 2), requires_grad=True)
    scores = Tensor(xp.asarray([0.0, 4.0, 1.0, 3.0, 2.0]), requires_grad=True)
    (g,) = grad(ops.sum(extract(x, scores, 3)[0]), x)
    assert host(g).tolist() == [[float(i in (0, 1, 3))] * 2 for i in range(5)]


# Training


@given(SEEDS, st.integers(1, 8), LEADS)
def test_soft_extract(xp: Any, seed: int, n: int, lead: Any) -> None:
    """The k-th word by score is multiplied by r[k]; r of ones and zeros is ``extract``."""
    x, scores = normal(seed, *lead, n, 2), normal(seed + 1, *lead, n)
    layer = SoftExtract(n + 2)
    assert_close(layer(x, scores), host(x), rtol=0.0, atol=0.0)
    layer.retention.data = Rng(seed).uniform((n + 2,), 0.0, 1.0, dtype="float64")
    r, y = host(layer.retention), host(layer(x, scores))
    for place in np.ndindex(*lead):
        order = [0, *sorted(range(1, n), key=lambda j: -host(scores)[place][j])]
        for k, j in enumerate(order):
            assert_close(y[place][j], r[k] * host(x)[place][j], rtol=1e-14)
    length = 1 + seed % n
    layer.retention.data = xp.asarray((np.arange(n + 2) < length).astype("float64"))
    hard, places, _ = extract(x, scores, length)
    soft = ops.take_along_axis(layer(x, scores), places[..., None], axis=-2)
    assert_close(soft, host(hard), rtol=0.0, atol=0.0)
    assert_close(ops.sum(layer(x, scores), axis=-2), host(ops.sum(hard, axis=-2)), rtol=1e-12)


def test_the_loss_drops_words(xp: Any) -> None:
    """λ Σ j mass_j: its gradient is λ j for all r of layer j, so later layers lose theirs first."""
    layers = [SoftExtract(6) for _ in range(3)]
    loss = retention_loss([layer.mass() for layer in layers], 0.1)
    assert_close(loss, np.asarray(0.1 * 6 * (1 + 2 + 3), "float32"), rtol=1e-6)
    gradients = grad(loss, [layer.retention for layer in layers])
    for j, g in enumerate(gradients, 1):
        assert_close(g, np.full(6, 0.1 * j, "float32"), rtol=1e-6)
    for layer, g in zip(layers, gradients, strict=True):
        layer.retention.data -= 4.0 * g.data
        layer.project()
    masses = [layer.mass() for layer in layers]
    assert_close(ops.stack(masses), np.array([3.6, 1.2, 0.0], "float32"), atol=1e-5)
    assert retention_configuration(masses, 6) == [4, 2, 1]
    layers[0].retention.data += 9.0
    layers[0].project()
    assert retention_configuration([layers[0].mass(), 9.0, 2.5, 3.0, -1.0], 6) == [6, 6, 3, 3, 1]
    assert retention_configuration([5.0 + 5e-7, 5.01], 9) == [5, 5]


def test_words_that_matter_get_through(xp: Any) -> None:
    """A search that has to keep two words: the r of the first two places stay, the others go."""
    x, layer = normal(0, 16, 6, 3), SoftExtract(6)
    scores = xp.asarray([9.0, 1.0, 8.0, 2.0, 3.0, 4.0]) + 0.1 * normal(1, 16, 6)
    target = ops.sum(x[:, [0, 2]], axis=1)
    for _ in range(200):
        y = ops.sum(layer(x, scores), axis=1)
        loss = ops.mean(ops.square(y - target)) + retention_loss([layer.mass()], 0.02)
        (g,) = grad(loss, layer.retention)
        layer.retention.data -= 0.3 * g.data
        layer.project()
    r = host(layer.retention)
    assert (r[:2] > 0.9).all() and (r[2:] < 0.01).all()
    assert retention_configuration([layer.mass()], 6) == [2]


# The layer


def transformer(layer: PowerLayer, x: Any, mask: Any = None) -> Any:
    """The same weights as a layer of BERT, from other parts."""
    h = layer.num_attention_heads

    def attend(y: Any) -> Any:
        b, n, c = y.shape
        heads = [
            part(y).reshape((b, n, h, c // h)).swapaxes(1, 2)
            for part in (layer.query, layer.key, layer.value)
        ]
        return layer.dense(softmax_attention(*heads, mask).swapaxes(1, 2).reshape((b, n, c)))

    def feed(y: Any) -> Any:
        return layer.output(nn.functional.gelu(layer.intermediate(y)))

    return post_norm(post_norm(x, layer.attention_norm, attend), layer.output_norm, feed)


def test_with_all_words_it_is_a_transformer(xp: Any) -> None:
    """No length, one as long as the text, and r of ones, with pads."""
    x = Rng(0).normal((2, 7, 8))
    real = xp.arange(7) < xp.asarray([[7], [4]])
    for max_length in (None, 7):
        layer = PowerLayer(8, 2, 12, max_length, rng=Rng(1))
        assert_close(layer(x)[0], host(transformer(layer, x)), rtol=2e-5, atol=2e-6)
        wanted = host(transformer(layer, x, real[:, None, None]))
        for length in (None, 7, 99):
            y, left = layer(x, length, real)
            assert_close(y, wanted, rtol=2e-5, atol=2e-6)
            assert (host(left) == host(real)).all()


def test_a_schedule(xp: Any) -> None:
    """Fewer words in each layer, [CLS] first; pads change nothing of what is real."""
    x = Rng(0).normal((2, 8, 8))
    layers = [PowerLayer(8, 2, 12, include_self=k != 1, rng=Rng(k)) for k in range(3)]

    def run(y: Any, mask: Any = None) -> Any:
        for layer, length in zip(layers, (6, 4, 2), strict=True):
            y, mask = layer(y, length, mask)
        return y, mask

    y, left = run(x)
    assert y.shape == (2, 2, 8) and host(left).all()
    more = ops.concatenate([x, 9.0 + 0.0 * x], axis=1)
    padded, left = run(more, xp.arange(16)[None] < xp.asarray([[8], [8]]))
    assert host(left).all()
    assert_close(padded, host(y), rtol=1e-4, atol=1e-5)
    short, left = run(x, xp.arange(8)[None] < xp.asarray([[8], [1]]))
    assert host(left).tolist() == [[True, True], [True, False]]
    assert_close(short[0], host(y)[0], rtol=1e-4, atol=1e-5)
    (g,) = grad(ops.sum(ops.square(y)[:, 0]), layers[0].query.weight)
    assert host(g).any()


def test_it_leaks(xp: Any) -> None:
    """Though every row of weights looks back only, a later word decides which earlier ones stay."""
    x, weights = normal(0, 6, 2), host(weights_of(1, 2, 6, 6, is_causal=True))
    kept = set()
    for word in range(6):
        changed = weights.copy()
        changed[:, 5] = np.eye(6)[word]
        _, places, _ = extract(x, significance(xp.asarray(changed)), 4)
        kept.add(tuple(place for place in host(places).tolist() if place < 5))
    assert len(kept) > 1 and {places[0] for places in kept} == {0}
    layer, tokens = PowerLayer(8, 2, 12, rng=Rng(0)), Rng(1).normal((1, 6, 8))
    other = xp.concatenate([tokens[:, :5], tokens[:, 5:] + 2.0], axis=1)
    moved = host(layer(other, 3)[0])[:, 0] - host(layer(tokens, 3)[0])[:, 0]
    assert abs(moved).min() > 1e-6


def test_derivatives(xp: Any) -> None:
    scores = normal(1, 4)
    check_grads(lambda x: extract(x, scores, 3)[0], normal(0, 4, 2), order=2)
    check_grads(significance, weights_of(0, 2, 3, 3), order=1)


def test_errors(xp: Any) -> None:
    x = normal(0, 4, 2)
    for bad in (lambda: extract(x, normal(1, 4), 0), lambda: extract(x, normal(1, 3), 2)):
        with pytest.raises(ValueError, match="extract keeps"):
            bad()
    with pytest.raises(ValueError, match="weights"):
        significance(normal(0, 2, 3, 4))
    with pytest.raises(ValueError, match="SoftExtract"):
        SoftExtract(3)(x, normal(1, 4))
    with pytest.raises(ValueError, match="at least one"):
        retention_loss([], 0.1)
    with pytest.raises(ValueError, match="do not divide"):
        PowerLayer(8, 3, 12)
    assert "length=3" in repr(SoftExtract(3)) and "heads=2" in repr(PowerLayer(8, 2, 12))
