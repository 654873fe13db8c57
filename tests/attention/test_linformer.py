"""Linformer: its limits, its rank, the law of its projections, pads, and why it is not causal."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import LinformerAttention, linformer_attention, softmax_attention
from mini_nn.check import check_grads
from tests.attention.test_linear import LEADS, SEEDS, draw
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_linformer.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def naive(q: Any, k: Any, v: Any, e: Any, f: Any) -> Any:
    """Query by query, for one head."""
    q, k, v, e, f = map(host, (q, k, v, e, f))
    mixed = [sum(e[a, j] * k[j] for j in range(len(k))) for a in range(len(e))]
    values = [sum(f[a, j] * v[j] for j in range(len(k))) for a in range(len(f))]
    rows = []
    for row in q:
        weights = np.exp([row @ x / np.sqrt(len(row)) for x in mixed])
        rows.append(sum(w * x for w, x in zip(weights, values, strict=True)) / weights.sum())
    return np.array(rows)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_by_loops(xp: Any, seed: int, n: int, m: int, k: int, more: int) -> None:
    """For any number of queries, and texts shorter than the matrices."""
    q, key, v = draw(seed, n, 3, 2, (), m)
    e, f = normal(seed + 1, k, m + more), normal(seed + 2, k, m + more)
    y = linformer_attention(q, key, v, e, f)
    assert_close(y, naive(q, key, v, host(e)[:, :m], host(f)[:, :m]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ["full", "short", "shared"])
def test_released(xp: Any, case: str) -> None:
    g = {name: xp.asarray(GOLDEN[f"{case}.{name}"]) for name in ("query", "key", "value", "e", "f")}
    assert_close(linformer_attention(*g.values()), GOLDEN[f"{case}.out"], rtol=1e-11, atol=1e-12)
    layer = LinformerAttention(9, 5, "key-value" if case == "shared" else "headwise")
    layer.load_state_dict({"e": g["e"], "f": g["f"]})
    single = [g[name].astype("float32") for name in ("query", "key", "value")]
    assert_close(layer(*single), GOLDEN[f"{case}.out"].astype("float32"), rtol=2e-4, atol=2e-5)


# Limits and theorems


@given(SEEDS, st.integers(1, 9), LEADS)
def test_without_mixing(xp: Any, seed: int, m: int, lead: Any) -> None:
    """E = F = I is softmax attention; so is E = F = P, any order of the keys."""
    qkv = draw(seed, 5, 3, 2, lead, m)
    full = host(softmax_attention(*qkv))
    identity = xp.eye(m, dtype="float64")
    assert_close(linformer_attention(*qkv, identity, identity), full, rtol=1e-11, atol=1e-12)
    order = identity[xp.asarray(np.random.default_rng(seed).permutation(m))]
    assert_close(linformer_attention(*qkv, order, order), full, rtol=1e-11, atol=1e-12)


def test_the_two_matrices_are_two(xp: Any) -> None:
    """What is planted: values in another order than keys."""
    qkv = draw(0, 5, 3, 2, (), 4)
    identity = xp.eye(4, dtype="float64")
    planted = linformer_attention(*qkv, identity, identity[::-1])
    assert abs(host(planted) - host(softmax_attention(*qkv))).max() > 0.1


@given(SEEDS, st.integers(1, 4))
def test_rank(xp: Any, seed: int, k: int) -> None:
    """The matrix that multiplies V has rank k at most; that of softmax has them all."""
    q, key, _ = draw(seed, 9, 4, 1)
    identity = xp.eye(9, dtype="float64")
    e, f = normal(seed + 1, k, 9), normal(seed + 2, k, 9)
    weights = host(linformer_attention(q, key, identity, e, f))
    sizes = np.linalg.svd(weights, compute_uv=False)
    assert (sizes[k:] < 1e-12 * sizes[0]).all()
    assert np.linalg.matrix_rank(host(softmax_attention(q, key, identity))) > k


def test_rows_of_the_matrix(xp: Any) -> None:
    """Weights may be negative and add up to anything; only the softmax over k is normalised."""
    q, key, _ = draw(0, 6, 3, 1)
    weights = host(
        linformer_attention(q, key, xp.eye(6, dtype="float64"), normal(1, 4, 6), normal(2, 4, 6))
    )
    assert weights.min() < -0.1 and abs(weights.sum(axis=-1) - 1.0).min() > 0.1
    ones = xp.ones((4, 6), "float64") / 6.0
    means = linformer_attention(q, key, xp.eye(6, dtype="float64"), normal(1, 4, 6), ones)
    assert_close(means, np.full((6, 6), 1.0 / 6.0), rtol=1e-12)


def test_random_projections_keep_products(xp: Any) -> None:
    """R with entries N(0, 1/k): a Rᵀ R v has mean a · v, and variance (|a|²|v|² + (a·v)²) / k.

    The mean of 20,000 draws is 6 of its standard errors from there in 1 of 10⁹ runs; the seed is
    fixed.
    """
    k, count = 5, 20_000
    a, v = normal(0, 7), normal(1, 7)
    r = Rng(2).normal((count, k, 7), std=k**-0.5, dtype="float64")
    products = host(((r @ a) * (r @ v)).sum(axis=-1))
    a, v = host(a), host(v)
    variance = (a @ a * (v @ v) + (a @ v) ** 2) / k
    assert abs(products.mean() - a @ v) < 6.0 * np.sqrt(variance / count)
    assert abs(products.var() / variance - 1.0) < 0.15


def test_the_start_keeps_scores_small(xp: Any) -> None:
    """Variance 1/(k + M), so that of E K is M/(k + M) < 1; with N(0, 1/k) it is M/k."""
    layer = LinformerAttention(400, 25, rng=Rng(0))
    assert abs(host(layer.e).var() * 425 - 1.0) < 6.0 / np.sqrt(400 * 25)
    assert abs(host(layer.f)).max() <= np.sqrt(3.0 / 425)
    key = Rng(1).normal((400, 16))
    assert 0.8 < host(layer.e.data @ key).var() < 1.1
    planted = host(Rng(2).normal((25, 400), std=0.2) @ key)
    assert planted.var() > 10.0


# Pads and causality


@given(SEEDS, st.integers(0, 6), st.integers(0, 3))
def test_pads_change_nothing(xp: Any, seed: int, n: int, pads: int) -> None:
    """Behind a text, whatever they hold; and no gradient reaches them."""
    q, key, v = draw(seed, n + pads, 3, 2, (2,))
    e, f = normal(seed + 1, 4, n + pads), normal(seed + 2, 4, n + pads)
    real = xp.arange(n + pads) < n
    junk = [xp.where(real[:, None], x, xp.asarray(np.full(x.shape, np.nan))) for x in (key, v)]
    leaves = [Tensor(x, requires_grad=True) for x in (q, *junk, e, f)]
    y = linformer_attention(*leaves, key_mask=real)
    short = linformer_attention(q, key[:, :n], v[:, :n], e, f)
    assert_close(y, host(short), rtol=1e-12, atol=1e-13)
    if n:
        gradients = [host(g) for g in grad(ops.sum(y * y), leaves)]
        assert all(np.isfinite(g).all() for g in gradients)
        assert not any(g[:, n:].any() for g in gradients[1:])


def test_a_pad_is_a_part_of_everything(xp: Any) -> None:
    """What is planted: only the values are cleared, or only a place of the softmax is taken."""
    q, key, v = draw(0, 5, 3, 2)
    e, f = normal(1, 5, 5), normal(2, 5, 5)
    real = xp.arange(5) < 4
    right = host(linformer_attention(q, key, v, e, f, key_mask=real))
    planted = linformer_attention(q, key, xp.where(real[:, None], v, 0.0), e, f)
    assert abs(host(planted) - right).max() > 0.01
    scores = q @ (e @ key).T / np.sqrt(3.0)
    planted = ops.softmax(xp.where(real, scores, float("-inf")), axis=-1) @ (f @ v)
    assert abs(host(planted) - right).max() > 0.01


def test_only_pads(xp: Any) -> None:
    qkv = draw(0, 3, 2, 2)
    y = linformer_attention(*qkv, normal(1, 2, 3), normal(2, 2, 3), xp.zeros(3, "bool"))
    assert_close(y, 0.0, atol=0.0) if not host(y).any() else pytest.fail("not 0")


def test_it_leaks(xp: Any) -> None:
    """The last token moves every output, also behind a triangle of (n, k): so it is refused."""
    q, key, v = draw(0, 6, 3, 2)
    e, f = normal(1, 6, 6), normal(2, 6, 6)
    other = xp.concatenate([key[:5], key[5:] + 2.0])
    moved = host(linformer_attention(q, other, v, e, f)) - host(
        linformer_attention(q, key, v, e, f)
    )
    assert abs(moved).min() > 1e-6
    triangle = xp.tril(xp.ones((6, 6), "bool"))

    def planted(k: Any) -> Any:
        scores = xp.where(triangle, q @ (e @ k).T, float("-inf"))
        return host(ops.softmax(scores, axis=-1) @ (f @ v))

    assert abs(planted(other) - planted(key))[1:5].max() > 1e-3
    leaf = Tensor(v, requires_grad=True)
    (g,) = grad(linformer_attention(q, key, leaf, e, f)[0].sum(), leaf)
    assert host(g)[1:].all()
    for form in (linformer_attention, lambda *x, **y: LinformerAttention(6, 2)(*x[:3], **y)):
        with pytest.raises(ValueError, match="not causal"):
            form(q, key, v, e, f, is_causal=True)


# The layer


def test_sharing(xp: Any) -> None:
    """Four, two and one matrix for two heads, and one for two layers."""
    qkv = [x.astype("float32") for x in draw(0, 5, 3, 2, (2, 2))]
    sizes = {"none": 2 * 2 * 4 * 7, "headwise": 2 * 4 * 7, "key-value": 4 * 7}
    for sharing, size in sizes.items():
        heads = 2 if sharing == "none" else None
        layer = LinformerAttention(7, 4, sharing, heads, rng=Rng(0))  # type: ignore[arg-type]
        assert layer.num_parameters() == size
        y = layer(*qkv)
        assert y.dtype == "float32"
        for h in range(2):
            e, f = (x[h] if heads else x for x in (layer.e, layer.f))
            alone = linformer_attention(*(x[:, h] for x in qkv), e, f)
            assert_close(y[:, h], host(alone), rtol=2e-5, atol=1e-6)
    first = LinformerAttention(7, 4, "key-value", rng=Rng(0))
    second = LinformerAttention(7, 4, "key-value", projection=first.e)
    assert second.e is first.e and second.f is first.e
    y = second(qkv[0], qkv[1], first(*qkv))
    (g,) = grad(ops.sum(y * y), first.e)
    separate = [Tensor(first.e.data, requires_grad=True) for _ in range(2)]
    inner = linformer_attention(*qkv, separate[0], separate[0])
    z = linformer_attention(qkv[0], qkv[1], inner, separate[1], separate[1])
    parts = grad(ops.sum(z * z), separate)
    assert_close(g, host(parts[0]) + host(parts[1]), rtol=1e-4, atol=1e-5)


def test_derivatives(xp: Any) -> None:
    qkv = draw(0, 3, 2, 2, (), 4)
    check_grads(linformer_attention, *qkv, normal(1, 2, 5), normal(2, 2, 5), order=2)


def test_halves(xp: Any) -> None:
    qkv = [x.astype("float16") for x in draw(0, 9, 3, 2)]
    layer = LinformerAttention(9, 4, rng=Rng(0))
    y = layer(*qkv)
    assert y.dtype == "float16"
    single = layer(*(x.astype("float32") for x in qkv))
    assert_close(y.data.astype("float32"), host(single), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [1024, 2048])
def test_memory_is_linear(backend_name: str, n: int) -> None:
    """Forward and backward, measured on the host: no matrix (n, n), of n² numbers, exists."""
    if backend_name != "numpy":
        pytest.skip("tracemalloc sees NumPy's memory")
    qkv = [Tensor(x, requires_grad=True) for x in normal(0, 3, n, 8)]
    matrices = normal(1, 2, 32, n)
    tracemalloc.start()
    try:
        grad(ops.sum(linformer_attention(*qkv, *matrices)), qkv)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 32 * n * 12


def test_errors(xp: Any) -> None:
    qkv = draw(0, 4, 2, 2)
    wide, short = normal(1, 3, 6), normal(1, 3, 3)
    with pytest.raises(ValueError, match="longest text"):
        linformer_attention(*qkv, short, short)
    with pytest.raises(ValueError, match=r"\(3, 6\) and \(2, 6\)"):
        linformer_attention(*qkv, wide, normal(1, 2, 6))
    with pytest.raises(TypeError, match="booleans"):
        linformer_attention(*qkv, wide, wide, xp.ones(4, "int64"))
    with pytest.raises(ValueError, match="key_mask"):
        LinformerAttention(4, 2)(*qkv, attn_mask=xp.ones((4, 4), "bool"))
    for bad in ({"sharing": "layerwise"}, {"sharing": "none"}, {"heads": 2}, {"length": 0}):
        with pytest.raises(ValueError):
            LinformerAttention(**({"length": 4, "projected": 2} | bad))
    with pytest.raises(ValueError, match="wanted"):
        LinformerAttention(4, 3, projection=LinformerAttention(4, 2).e)
    assert repr(LinformerAttention(4, 2)) == "LinformerAttention(e=(2, 4), shared=False)"
