"""Non-local attention, EM attention and the asymmetric pyramid: loops, limits, and what leaks."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.attention import (
    AsymmetricNonLocal2d,
    EMAttention2d,
    NonLocal2d,
    asymmetric_attention,
    concatenation_similarity,
    dot_product_similarity,
    em_attention,
    gaussian_similarity,
    generalized_attention,
    pyramid_pool,
    softmax_attention,
)
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from tests.support import assert_close, host

lengths = st.integers(1, 8)


def operands(seed: int, n: int, m: int, lead: Any = ()) -> list[Any]:
    rng = Rng(seed)
    shapes = ((*lead, n, 3), (*lead, m, 3), (*lead, m, 2))
    return [rng.normal(shape, dtype="float64") for shape in shapes]


def cauchy(query: Any, key: Any) -> Any:
    """A similarity that no paper has: 1 / (1 + |q − k|²)."""
    apart = query[..., :, None, :] - key[..., None, :, :]
    return 1.0 / (1.0 + (apart * apart).sum(axis=-1))


def similarities(seed: int) -> dict[str, Any]:
    weight = Rng(seed).normal((6,), dtype="float64")
    return {
        "gaussian": (gaussian_similarity, lambda q, k: math.exp(float(q @ k))),
        "dot product": (dot_product_similarity, lambda q, k: float(q @ k)),
        "concatenation": (
            functools.partial(concatenation_similarity, weight=weight),
            lambda q, k: max(0.0, float(host(weight) @ np.concatenate([q, k]))),
        ),
        "cauchy": (cauchy, lambda q, k: 1.0 / (1.0 + float(((q - k) ** 2).sum()))),
    }


def by_loops(arrays: Any, number: Any, count: bool, causal: bool, mask: Any) -> Any:
    q, k, v = map(host, arrays)
    y = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if (not causal or j <= i) and mask[j]]
        w = {j: number(q[i], k[j]) for j in seen}
        total = len(seen) if count else sum(w.values())
        if total:
            y[i] = sum(w[j] * v[j] for j in seen) / total
    return y


# Generalised attention


@given(
    st.integers(0, 2**32),
    lengths,
    lengths,
    st.sampled_from(["gaussian", "dot product", "concatenation", "cauchy"]),
    st.booleans(),
    st.booleans(),
)
def test_loops(xp: Any, seed: int, n: int, m: int, kind: str, count: bool, causal: bool) -> None:
    arrays, (similarity, number) = operands(seed, n, m), similarities(seed)[kind]
    count = count or kind == "dot product"
    name = "count" if count else "sum"
    mask = Rng(seed + 1).bernoulli(0.7, (m,))
    y = generalized_attention(*arrays, similarity, name, causal, mask)
    assert_close(y, by_loops(arrays, number, count, causal, host(mask)), rtol=1e-8, atol=1e-10)
    whole = by_loops(arrays, number, count, causal, np.ones(m, bool))
    assert_close(generalized_attention(*arrays, similarity, name, causal), whole, 1e-8, 1e-10)


@given(st.integers(0, 2**32), lengths, lengths, st.booleans())
def test_gaussian_is_softmax(xp: Any, seed: int, n: int, m: int, causal: bool) -> None:
    arrays = operands(seed, n, m, (2,))
    y = generalized_attention(*arrays, gaussian_similarity, is_causal=causal)
    assert_close(y, softmax_attention(*arrays, is_causal=causal, scale=1.0))


@given(st.integers(0, 2**32), lengths, lengths)
def test_dot_product_is_associative(xp: Any, seed: int, n: int, m: int) -> None:
    """Q (Kᵀ V) / m: no pair need be looked at."""
    query, key, value = operands(seed, n, m)
    y = generalized_attention(query, key, value, dot_product_similarity, "count")
    assert_close(y, query @ (key.T @ value) / float(m))


@given(st.integers(0, 2**32), lengths, lengths, st.sampled_from(["gaussian", "cauchy"]))
def test_weights(xp: Any, seed: int, n: int, m: int, kind: str) -> None:
    """Means of values, whatever each query's similarities are multiplied by."""
    query, key, value = operands(seed, n, m)
    similarity = similarities(seed)[kind][0]
    w = generalized_attention(query, key, xp.eye(m, dtype="float64"), similarity)
    assert float(host(w).min()) >= 0.0
    assert_close(w.sum(axis=-1), 1.0)
    y = generalized_attention(query, key, value, similarity)
    assert (host(y) <= host(value).max(axis=0) + 1e-9).all()
    assert (host(y) >= host(value).min(axis=0) - 1e-9).all()
    factors = xp.exp(Rng(seed).normal((n, 1), dtype="float64"))
    scaled = generalized_attention(query, key, value, lambda q, k: factors * similarity(q, k))
    assert_close(scaled, y)
    order = Rng(seed).permutation(m)
    assert_close(generalized_attention(query, key[order], value[order], similarity), y)
    counted = generalized_attention(
        query, key, value, lambda q, k: factors * similarity(q, k), "count"
    )
    plain = generalized_attention(query, key, value, similarity, "count")
    assert_close(counted, factors * plain)  # which the other normaliser does not undo


def test_nothing_similar_gives_zeros(xp: Any) -> None:
    query, key, value = operands(0, 3, 4)
    leaves = [Tensor(x, requires_grad=True) for x in (query, key, value)]
    y = generalized_attention(*leaves, lambda q, k: 0.0 * dot_product_similarity(q, k))
    assert not host(y).any()
    assert all(np.isfinite(host(g)).all() for g in grad(y.sum(), leaves))
    hidden = xp.zeros((4,), "bool")
    y = generalized_attention(query, key, value, gaussian_similarity, key_mask=hidden)
    assert not host(y).any()


@pytest.mark.parametrize("name", ["sum", "count"])
def test_pads_and_parts(xp: Any, name: str) -> None:
    """Real tokens first, then pads, which change nothing; and any cut of the sequence."""
    arrays = operands(3, 7, 7, (2,))
    whole = generalized_attention(*arrays, cauchy, name, is_causal=True)
    mask = xp.arange(7) < 5
    short = [x[:, :5] for x in arrays]
    padded = generalized_attention(*arrays, cauchy, name, key_mask=mask)[:, :5]
    assert_close(padded, generalized_attention(*short, cauchy, name))
    planted = generalized_attention(arrays[0], arrays[1], arrays[2] * mask[:, None], cauchy, name)
    assert float(host(abs(planted[:, :5] - padded)).max()) > 1e-2  # pads in the normaliser
    state: Any = ()
    for start, stop in ((0, 3), (3, 3), (3, 4), (4, 7)):
        some = [x[:, start:stop] for x in arrays]
        y, state = generalized_attention(*some, cauchy, name, is_causal=True, state=state)
        assert_close(y, whole[:, start:stop])


@pytest.mark.parametrize("name", ["sum", "count"])
def test_pads_of_a_continued_sequence(xp: Any, name: str) -> None:
    """The mask is that of the new tokens, and the state knows those before; pads may hold nan."""
    arrays = operands(6, 9, 9, (2,))
    real = Rng(7).bernoulli(0.6, (2, 9))
    whole = generalized_attention(*arrays, cauchy, name, True, real)
    query = arrays[0]
    dirty = [xp.where(real[..., None], x, float("nan")) for x in arrays[1:]]
    leaves = [Tensor(x, requires_grad=True) for x in dirty]
    state: Any = ()
    for start, stop in ((0, 4), (4, 4), (4, 5), (5, 9)):
        some = [x[:, start:stop] for x in (query, *leaves)]
        y, state = generalized_attention(*some, cauchy, name, True, real[:, start:stop], state)
        assert_close(y, whole[:, start:stop])
    for g in grad(y.sum(), leaves):
        assert np.isfinite(host(g)).all() and not host(g)[~host(real)].any()


@pytest.mark.parametrize("name", ["sum", "count"])
def test_dtypes(xp: Any, name: str) -> None:
    """float32 stays, also where keys are counted; float16 is summed in float32."""
    single = [x.astype("float32") for x in operands(0, 4, 4)]
    y, state = generalized_attention(*single, cauchy, name, True, state=())
    assert {x.dtype.name for x in (y, *state[:2])} == {"float32"}
    big, value = xp.full((900, 3), 8.0, "float16"), xp.ones((900, 1), "float16")
    y = generalized_attention(big, big, value, dot_product_similarity, name)
    assert y.dtype == "float16"  # 900 · 192 is beyond it
    assert_close(y, xp.full((900, 1), 1.0 if name == "sum" else 192.0, "float16"))


def test_causality(xp: Any) -> None:
    arrays = operands(4, 6, 6)
    changed = [xp.concatenate([x[:4], x[4:] + 3.0]) for x in arrays]
    for causal in (True, False):
        one, other = (
            host(generalized_attention(*x, cauchy, is_causal=causal))[:4] for x in (arrays, changed)
        )
        assert np.allclose(one, other, rtol=0, atol=1e-12) == causal
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = generalized_attention(*leaves, cauchy, is_causal=True)[:4]
    assert not any(host(g)[4:].any() for g in grad(y.sum(), leaves))


def test_gradients(xp: Any) -> None:
    arrays = operands(5, 3, 4)
    for similarity, _ in similarities(5).values():

        def counted(*x: Any, similarity: Any = similarity) -> Any:
            return generalized_attention(*x, similarity, "count")

        check_grads(counted, *arrays, order=2, dtypes=("float64",))
    check_grads(lambda *x: generalized_attention(*x, cauchy, is_causal=True), *arrays, order=2)


# EM attention


def em_by_loops(x: Any, bases: Any, steps: int, temperature: float, mask: Any) -> Any:
    """One pixel and one basis after the other."""
    mu = [*bases]
    for _ in range(steps):
        z = []
        for row in x:
            e = [math.exp(float(row @ m) / temperature) for m in mu]
            z.append([a / sum(e) for a in e])
        for k in range(len(mu)):
            mass = sum(z[i][k] for i in range(len(x)) if mask[i])
            mean = sum(z[i][k] / (mass + 1e-6) * x[i] for i in range(len(x)) if mask[i])
            mu[k] = mean / (math.sqrt(float(mean @ mean)) + 1e-6)
    return np.array([sum(z[i][k] * mu[k] for k in range(len(mu))) for i in range(len(x))]), mu


@given(st.integers(0, 2**32), lengths, st.integers(1, 4), st.integers(1, 4), st.floats(0.3, 3.0))
def test_em_by_loops(xp: Any, seed: int, n: int, k: int, steps: int, temperature: float) -> None:
    x, bases = (Rng(seed + i).normal((s, 3), dtype="float64") for i, s in enumerate((n, k)))
    mask = Rng(seed).bernoulli(0.8, (n,))
    mask[0] = True
    for key_mask in (None, mask):
        y, mu = em_attention(x, bases, steps, temperature, key_mask=key_mask)
        seen = np.ones(n, bool) if key_mask is None else host(mask)
        wanted, means = em_by_loops(host(x), host(bases), steps, temperature, seen)
        assert_close(y, wanted, rtol=1e-8, atol=1e-9)
        assert_close(mu, np.array(means), rtol=1e-8, atol=1e-9)


def test_em_properties(xp: Any) -> None:
    """Rank at most k; bases of length 1; the order of places does not matter; pads neither."""
    x, bases = Rng(0).normal((2, 9, 5), dtype="float64"), Rng(1).normal((3, 5), dtype="float64")
    y, mu = em_attention(x, bases)
    assert [int(np.linalg.matrix_rank(image, tol=1e-9)) for image in host(y)] == [3, 3]
    assert_close((mu * mu).sum(axis=-1), 1.0, atol=1e-4)
    order = Rng(2).permutation(9)
    again, same = em_attention(x[:, order], bases)
    assert_close(again, y[:, order])
    assert_close(same, mu)
    alone, found = em_attention(x[:, :6], bases)
    masked, those = em_attention(x, bases, key_mask=xp.arange(9) < 6)
    assert_close(masked[:, :6], alone)
    assert_close(those, found)
    assert float(host(abs(y[:, :6] - alone)).max()) > 1e-3  # so pads would matter


def test_em_pads_may_hold_anything(xp: Any) -> None:
    """nan among the pads reaches no real token, no basis and no gradient."""
    x, bases = Rng(0).normal((2, 9, 5), dtype="float64"), Rng(1).normal((3, 5), dtype="float64")
    real = xp.arange(9) < 6
    leaves = [Tensor(a, requires_grad=True) for a in (xp.where(real[:, None], x, xp.nan), bases)]
    y, mu = em_attention(*leaves, key_mask=real)
    wanted, means = em_attention(x[:, :6], bases)
    assert_close(y[:, :6], wanted)
    assert_close(mu, means)
    of_x, of_bases = (host(g) for g in grad(y[:, :6].sum() + mu.sum(), leaves))
    assert np.isfinite(of_x).all() and np.isfinite(of_bases).all() and not of_x[:, 6:].any()


def test_em_eps(xp: Any) -> None:
    """It is added to the sum of responsibilities and to the length, here large enough to see."""
    x, bases = Rng(0).normal((5, 3), dtype="float64"), Rng(1).normal((2, 3), dtype="float64")
    z = np.exp(host(x) @ host(bases).T)
    z /= z.sum(axis=1, keepdims=True)
    means = (z / (z.sum(axis=0) + 0.5)).T @ host(x)
    means /= np.linalg.norm(means, axis=1, keepdims=True) + 0.5
    _, mu = em_attention(x, bases, 1, eps=0.5)
    assert_close(mu, means)
    single = [a.astype("float32") for a in (x, bases)]
    for y in em_attention(*single, temperature=np.float64(0.5), eps=np.float64(1e-6)):
        assert y.dtype == "float32"


def test_em_finds_clusters(xp: Any) -> None:
    """Pixels around two orthogonal directions, a low temperature: the bases are their means."""
    rng = Rng(0)
    centres = xp.asarray([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    x = xp.concatenate([c + rng.normal((20, 3), std=0.1, dtype="float64") for c in centres])
    start = xp.asarray([[0.8, 0.6, 0.0], [0.6, 0.8, 0.0]])
    _, mu = em_attention(x, start, steps=5, temperature=0.2)
    means = [x[:20].mean(axis=0), x[20:].mean(axis=0)]
    wanted = [host(m) / np.linalg.norm(host(m)) for m in means]
    assert_close(mu, np.array(wanted), atol=1e-3)


def test_em_layer(xp: Any) -> None:
    """The two convolutions around it, and bases that follow in training only."""
    layer = EMAttention2d(4, bases=3, momentum=0.75, rng=Rng(0)).astype("float64")
    assert [*layer.state_dict()][:3] == ["mu", "conv1.weight", "conv1.bias"]
    assert "conv2.0.weight" in layer.state_dict() and "conv2.1.running_mean" in layer.state_dict()
    x = Rng(1).normal((2, 4, 3, 5), dtype="float64")
    before = host(layer.mu).copy()
    assert_close((before**2).sum(axis=1), 1.0, atol=1e-5)
    layer.eval()
    y = layer(x)
    assert_close(layer.mu, before, rtol=0)
    pixels = ops.swapaxes(layer.conv1(x).reshape((2, 4, 15)), 1, 2)
    mixed, ends = em_attention(pixels, layer.mu.swapaxes(1, 2))
    image = ops.relu(ops.swapaxes(mixed, 1, 2).reshape((2, 4, 3, 5)))
    assert_close(y, ops.relu(layer.conv2(image) + x))
    other = EMAttention2d(4, bases=3, steps=5, rng=Rng(0)).astype("float64").eval()
    more, _ = em_attention(pixels, layer.mu.swapaxes(1, 2), steps=5)
    image = ops.relu(ops.swapaxes(more, 1, 2).reshape((2, 4, 3, 5)))
    assert_close(other(x), ops.relu(layer.conv2(image) + x))
    assert float(host(abs(more - mixed)).max()) > 1e-4
    layer.train()
    layer(x)
    moved = 0.75 * before + 0.25 * host(ends).mean(axis=0).T[None]
    assert_close(layer.mu, moved)
    leaves = [*layer.parameters()]
    assert all(host(g).any() for g in grad(layer(x).sum(), leaves[:1]))  # conv1 is trained


def test_em_gradients(xp: Any) -> None:
    x, bases = Rng(0).normal((4, 3), dtype="float64"), Rng(1).normal((2, 3), dtype="float64")
    check_grads(lambda *a: em_attention(*a, steps=2), x, bases, order=2)
    zeros = Tensor(xp.zeros((4, 3)), requires_grad=True)  # all means at 0 have no direction
    y, _ = em_attention(zeros, bases)
    assert np.isfinite(host(grad(y.sum(), zeros)[0])).all()


# The asymmetric pyramid


def test_pyramid(xp: Any) -> None:
    """110 anchors; each is the mean of its cell, coarse grids first, row by row."""
    x = Rng(0).normal((2, 3, 24, 48), dtype="float64")
    anchors = pyramid_pool(x)
    assert anchors.shape == (2, 110, 3)
    seen, wanted = host(x), []
    for s in (1, 3, 6, 8):
        h, w = 24 // s, 48 // s
        for i in range(s):
            for j in range(s):
                cell = seen[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
                wanted.append(cell.mean(axis=(2, 3)))
    assert_close(anchors, np.stack(wanted, axis=1))


def test_asymmetric_limits(xp: Any) -> None:
    """A grid as fine as the image is attention to all pixels; one cell gives the mean of all."""
    query, key, value = (
        Rng(i).normal((2, c, 4, 4), dtype="float64") for i, c in enumerate((3, 3, 5))
    )
    rows = [ops.swapaxes(x.reshape((2, -1, 16)), 1, 2) for x in (query, key, value)]
    full = ops.swapaxes(softmax_attention(*rows), 1, 2).reshape((2, 5, 4, 4))
    assert_close(asymmetric_attention(query, key, value, (4,)), full)
    assert_close(asymmetric_attention(query, key, value, (4, 4)), full)  # each key twice
    mean = value.mean(axis=(2, 3), keepdims=True)
    one = asymmetric_attention(query, key, value, (1,))
    assert_close(one, xp.broadcast_to(mean, one.shape))
    assert float(host(abs(asymmetric_attention(query, key, value, (1, 3)) - full)).max()) > 1e-3
    scaled = asymmetric_attention(query, key, value, (4,), scale=0.3)
    longer = asymmetric_attention(query * (0.3 * 3**0.5), key, value, (4,))
    assert_close(scaled, longer)
    single = [x.astype("float32") for x in (query, key, value)]
    single[0] = single[0][..., :1, :1]  # of one pixel
    assert asymmetric_attention(*single, (2,), scale=np.float64(0.3)).dtype == "float32"


def test_asymmetric_layer(xp: Any) -> None:
    """No context at first; then softmax of the shared map with its own anchors."""
    layer = AsymmetricNonLocal2d(6, 4, 5, rng=Rng(0)).astype("float64").eval()
    x = Rng(1).normal((2, 6, 9, 8), dtype="float64")
    assert not host(layer(x)).any()
    layer.W.weight.data[...] = Rng(2).normal(layer.W.weight.shape)
    query, value = layer.f_key(x), layer.f_value(x)
    k, v = pyramid_pool(query), pyramid_pool(value)
    q = ops.swapaxes(query.reshape((2, 4, 72)), 1, 2)
    weights = ops.softmax(ops.matmul(q, ops.swapaxes(k, 1, 2)) / 2.0, axis=-1)
    y = ops.swapaxes(ops.matmul(weights, v), 1, 2).reshape((2, 5, 9, 8))
    assert_close(layer(x), F.conv2d(y, layer.W.weight, layer.W.bias))
    coarse = AsymmetricNonLocal2d(6, 4, 5, sizes=(2,), rng=Rng(0)).astype("float64").eval()
    coarse.load_state_dict(layer.state_dict())
    y = asymmetric_attention(query, query, value, (2,))
    assert_close(coarse(x), F.conv2d(y, layer.W.weight, layer.W.bias))
    assert float(host(abs(coarse(x) - layer(x))).max()) > 1e-6


def test_asymmetric_gradients(xp: Any) -> None:
    arrays = [Rng(i).normal((1, c, 3, 4), dtype="float64") for i, c in enumerate((2, 2, 3))]
    check_grads(lambda *x: asymmetric_attention(*x, (1, 2)), *arrays, order=2)


# Non-local layers


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
def test_non_local_layers(xp: Any, kind: str) -> None:
    """The identity at first; then the loops over all pairs of pixels."""
    layer = NonLocal2d(4, kind=kind, rng=Rng(0)).astype("float64")
    x = Rng(1).normal((1, 4, 2, 3), dtype="float64")
    assert_close(layer(x), x, rtol=0)
    layer.out.weight.data[...] = Rng(2).normal(layer.out.weight.shape)

    def pixels(image: Any) -> Any:
        return host(image)[0].reshape(-1, 6).T

    values = pixels(layer.g(x))
    if kind == "gaussian":
        q = k = pixels(x)
    else:
        q, k = pixels(layer.theta(x)), pixels(layer.phi(x))
    numbers = {
        "dot_product": lambda a, b: float(a @ b),
        "concatenation": lambda a, b: max(0.0, float(host(layer.weight) @ np.concatenate([a, b]))),
    }
    count = kind in numbers
    number = numbers.get(kind, lambda a, b: math.exp(float(a @ b)))
    y = by_loops((q, k, values), number, count, False, np.ones(6, bool))
    image = xp.asarray(y.T.reshape(1, 2, 2, 3))
    assert_close(layer(x), F.conv2d(image, layer.out.weight, layer.out.bias) + x)
    leaves = [*layer.parameters()]
    assert all(host(g).any() for g in grad((layer(x) ** 2).sum(), leaves))


def test_the_weight_of_a_concatenation_starts_small(xp: Any) -> None:
    """1/√(2 inner): a sum of 2 inner products has a variance that does not depend on inner."""
    for inner in (128, 2048):
        weight = host(NonLocal2d(4, inner, "concatenation", rng=Rng(0)).weight)
        assert abs(float(weight.std()) * (2 * inner) ** 0.5 - 1.0) < 0.15  # 3.4 or more deviations


def test_float32(xp: Any) -> None:
    query, key, _ = (x.astype("float32") for x in operands(0, 3, 3))
    weight = Rng(0).normal((6,), dtype="float64")
    assert concatenation_similarity(query, key, weight).dtype == "float32"
    for layer in (NonLocal2d(4), EMAttention2d(4, 3), AsymmetricNonLocal2d(4, 4, 4)):
        x = Tensor(Rng(0).normal((2, 4, 5, 5)), requires_grad=True)
        y = layer(x)
        assert y.dtype == "float32" and isinstance(layer, nn.Module)
        (g,) = grad(y.sum(), x)
        assert g.dtype == "float32"


# What cannot be causal, and would leak


def test_em_and_pyramids_leak(xp: Any) -> None:
    """The first places change with the last ones, which is why is_causal=True is refused."""
    x, bases = Rng(0).normal((9, 3), dtype="float64"), Rng(1).normal((2, 3), dtype="float64")
    changed = xp.concatenate([x[:8], x[8:] + 5.0])
    one, other = (em_attention(a, bases)[0][:8] for a in (x, changed))
    assert float(host(abs(one - other)).max()) > 1e-3
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(em_attention(leaf, bases)[0][0].sum(), leaf)
    assert host(g)[8].any()
    with pytest.raises(ValueError, match="cannot be causal"):
        em_attention(x, bases, is_causal=True)
    images = [a.T.reshape((1, 3, 3, 3)) for a in (x, changed)]
    one, other = (asymmetric_attention(images[0], a, a, (1, 3)) for a in images)
    assert float(host(abs(one - other))[..., 0, 0].max()) > 1e-3
    with pytest.raises(ValueError, match="not causal"):
        asymmetric_attention(images[0], images[0], images[0], is_causal=True)


def test_errors(xp: Any) -> None:
    query, key, value = operands(0, 3, 3)
    with pytest.raises(ValueError, match=r"attention takes query .* got"):
        generalized_attention(query, key[:2], value, cauchy)
    with pytest.raises(ValueError, match="'sum' or 'count', got 'mean'"):
        generalized_attention(query, key, value, cauchy, "mean")
    with pytest.raises(ValueError, match="needs is_causal=True"):
        generalized_attention(query, key, value, cauchy, state=())
    with pytest.raises(ValueError, match="a query and a key, got 2 and 3"):
        generalized_attention(query[:2], key, value, cauchy, is_causal=True, state=())
    with pytest.raises(ValueError, match=r"shape \(6,\), got \(3,\)"):
        concatenation_similarity(query, key, query[0])
    with pytest.raises(ValueError, match="cannot go on with"):
        state = generalized_attention(*operands(1, 3, 3, (2,)), cauchy, is_causal=True, state=())[1]
        generalized_attention(query, key, value, cauchy, is_causal=True, state=state)
    with pytest.raises(ValueError, match="got 2 arrays"):
        generalized_attention(query, key, value, cauchy, is_causal=True, state=(key, value))
    for wrong in (xp.ones((5, 1, 3), "bool"), xp.ones(2, "bool")):  # no axis is added, or cut off
        with pytest.raises(ValueError, match=r"key_mask has to broadcast .* \(3,\)"):
            generalized_attention(query, key, value, cauchy, key_mask=wrong)
        with pytest.raises(ValueError, match=r"key_mask has to broadcast .* \(3,\)"):
            em_attention(query, key, key_mask=wrong)
    for call in (
        lambda: generalized_attention(query, key, value, cauchy, key_mask=xp.ones(3, "int64")),
        lambda: em_attention(query, key, key_mask=xp.ones(3, "int64")),
    ):
        with pytest.raises(TypeError, match="key_mask has booleans"):
            call()
    with pytest.raises(ValueError, match="at least one step"):
        em_attention(query, key, steps=0)
    with pytest.raises(ValueError, match="got 'softmax'"):
        NonLocal2d(4, kind="softmax")
    image = Rng(0).normal((1, 3, 4, 4))
    with pytest.raises(ValueError, match="asymmetric attention takes"):
        asymmetric_attention(image, image, image[..., :3])
