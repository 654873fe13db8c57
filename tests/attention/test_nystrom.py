"""Nyström attention: landmarks, the iteration singular value by singular value, and what is off."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    NystromAttention,
    exact_pinv,
    iterative_pinv,
    matrix_start,
    nystrom_attention,
    segment_means,
    shared_start,
    softmax_attention,
)
from mini_nn.check import check_grads
from tests.attention.test_linear import LEADS, SEEDS, draw
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_nystrom.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def stochastic(seed: int, *shape: int, size: float = 1.0) -> Any:
    return ops.softmax(size * normal(seed, *shape), axis=-1)


def with_singular_values(seed: int, values: Any) -> Any:
    """A matrix U Σ Wᵀ, on the host."""
    rng, m = np.random.default_rng(seed), len(values)
    u, w = (np.linalg.qr(rng.standard_normal((m, m)))[0] for _ in range(2))
    return u @ np.diag(values) @ w.T


def closed_form(r: Any, iterations: int) -> Any:
    """r = 1 − σ z after so many iterations."""
    for _ in range(iterations):
        r = 0.25 * r * r * r * (3.0 + r)
    return r


# Landmarks


@given(SEEDS, st.integers(1, 20), st.integers(1, 9), LEADS)
def test_segments(xp: Any, seed: int, n: int, m: int, lead: Any) -> None:
    """Runs in the order of the text, each token in one, lengths that differ by one at most."""
    x = normal(seed, *lead, n, 2)
    means, there = segment_means(x, m)
    shares, _ = segment_means(xp.eye(n, dtype="float64"), m)
    member = host(shares) > 0
    sizes = member.sum(axis=1)
    assert (member.sum(axis=0) == 1).all() and (np.diff(member.argmax(axis=0)) >= 0).all()
    assert sizes.max() - sizes.min() <= 1 and (host(there) == (sizes > 0)).all()
    wanted = [host(x)[..., row, :].mean(axis=-2) for row in member if row.any()]
    assert_close(means[..., sizes > 0, :], np.stack(wanted, axis=-2), rtol=1e-12, atol=1e-13)
    assert not host(means)[..., sizes == 0, :].any()
    total = (host(means) * sizes[:, None]).sum(axis=-2)
    assert_close(total, host(x).sum(axis=-2), rtol=1e-11, atol=1e-12)
    if n % m == 0:
        runs = host(x).reshape(*lead, m, n // m, 2).mean(axis=-2)
        assert_close(means, runs, rtol=1e-12, atol=1e-13)


# The iteration


@pytest.mark.parametrize("name", ["shared", "matrix"])
def test_released_iterates(xp: Any, name: str) -> None:
    start = {"shared": shared_start, "matrix": matrix_start}[name]
    a = xp.asarray(GOLDEN["mlpen.matrices"])
    for k in range(9):
        wanted = GOLDEN[f"mlpen.inverse.{name}.{k}"]
        assert_close(iterative_pinv(a, k, start), wanted, rtol=1e-10, atol=1e-11)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_closed_form(xp: Any, seed: int, m: int, n: int, iterations: int) -> None:
    """Z_k = W diag((1 − r_k) / σ) Uᵀ, r₀ = 1 − σ² / (‖A‖₁ ‖A‖_∞), r ← r³ (3 + r) / 4."""
    a = normal(seed, m, n)
    u, s, wt = np.linalg.svd(host(a), full_matrices=False)
    size = abs(host(a))
    norm = size.sum(axis=0).max() * size.sum(axis=1).max()
    r = closed_form(1.0 - s * s / norm, iterations)
    z = (wt.T * ((1.0 - r) / s)) @ u.T
    got = iterative_pinv(a, iterations)
    assert_close(got, z, rtol=1e-7, atol=1e-9 * abs(z).max())


@given(SEEDS, st.integers(1, 7), st.floats(0.2, 4.0))
def test_the_start_converges(xp: Any, seed: int, m: int, size: float) -> None:
    """0 < σ² ≤ ‖A‖₁ ‖A‖_∞, so all r₀ are in [0, 1), and |I − A Z| falls to the end."""
    a = stochastic(seed, m, m, size=size)
    r0 = 1.0 - np.linalg.svd(host(a) @ host(matrix_start(a)), compute_uv=False)
    assert (r0 > -1e-12).all() and (r0 < 1.0).all()
    shared = host(shared_start(a))
    assert_close(shared, host(matrix_start(a)), rtol=1e-12)  # one matrix, of rows that add up to 1
    sizes = [
        np.linalg.norm(np.eye(m) - host(a) @ host(iterative_pinv(a, k)), 2) for k in range(0, 9, 2)
    ]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("factor", "converges"),
    [(0.01, True), (1.0, True), (2.9, True), (3.0, False), (3.1, False), (3.6, True), (4.3, False)],
)
def test_when_it_converges(xp: Any, factor: float, converges: bool) -> None:
    """Z₀ = α Aᵀ: for all 0 < α σ₁² < 3; at 3, r stays at −2, to which 3.1 is drawn.

    3.6 is an accident: r = −2.6 goes to −1.76, past −2.  r = −3.3 goes to 2.7 and then to infinity.
    """
    a = xp.asarray(with_singular_values(0, [1.0, 0.8, 0.5]))
    z = iterative_pinv(a, 20 if factor < 4.0 else 2, lambda x: factor * ops.matrix_transpose(x))
    error = abs(host(z) - np.linalg.inv(host(a))).max()
    assert (error < 1e-9) == converges
    left = closed_form(1.0 - factor * np.array([1.0, 0.64, 0.25]), 20 if factor < 4.0 else 2)
    assert (abs(left).max() < 1e-9) == converges
    if factor == 3.0:
        one = iterative_pinv(xp.ones((1, 1), "float64"), 5, lambda x: 3.0 * x)
        assert_close(one, np.array([[3.0]]), rtol=1e-12)


def test_the_order_is_three(xp: Any) -> None:
    """Near the end r ← ¾ r³; with a wrong coefficient in the polynomial r stays."""
    a, r = with_singular_values(1, [1.0, 1.0, 1.0]), 1e-3
    z = iterative_pinv(xp.asarray(a), 1, lambda x: (1.0 - r) * ops.matrix_transpose(x))
    left = 1.0 - np.linalg.svd(a @ host(z), compute_uv=False)
    assert_close(left, np.full(3, 0.75 * r**3), rtol=1e-3, atol=1e-15)
    az = 1.0 - r
    planted = 1.0 - 0.25 * az * (13.0 - az * (15.0 - az * (6.0 - az)))
    assert abs(planted) > 0.1


def test_six_iterations_are_not_enough(xp: Any) -> None:
    """cond A = 174, m = 10: relative errors .98 after 6, .03 after 10, and rounding after 20.

    The error is that at the smallest singular value, which the closed form gives.
    """
    a = with_singular_values(0, np.geomspace(1.0, 1.0 / 174.0, 10))
    norm = abs(a).sum(axis=0).max() * abs(a).sum(axis=1).max()
    inverse = np.linalg.inv(a)
    errors = {}
    for k in (6, 10, 20):
        z = host(iterative_pinv(xp.asarray(a), k))
        errors[k] = np.linalg.norm(z - inverse, 2) / np.linalg.norm(inverse, 2)
        wanted = closed_form(1.0 - 174.0**-2 / norm, k)
        assert_close(errors[k], np.asarray(wanted), rtol=1e-6, atol=1e-11)
    assert errors[6] > 0.97 and 1e-3 < errors[10] < 0.9 and errors[20] < 1e-11


def test_zeros_and_missing_ranks(xp: Any) -> None:
    """A⁺ for a matrix with zero rows and columns, as missing landmarks leave it."""
    a = xp.zeros((5, 5), "float64")
    assert not host(iterative_pinv(a)).any() and not host(exact_pinv(a)).any()
    inner = host(stochastic(0, 3, 3))
    padded = np.zeros((5, 5))
    padded[:3, :3] = inner
    for pinv in (iterative_pinv, exact_pinv):
        z = host(pinv(xp.asarray(padded)))
        assert not z[3:].any() and not z[:, 3:].any()
        assert_close(z[:3, :3], host(pinv(xp.asarray(inner))), rtol=1e-9, atol=1e-10)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_exact_pinv(xp: Any, seed: int, m: int, n: int) -> None:
    """The four equations of Penrose, and the derivative for tall, wide and square matrices."""
    a = host(normal(seed, m, n)) + 2.0 * np.eye(m, n)
    y = host(exact_pinv(xp.asarray(a)))
    for left, right in ((a @ y @ a, a), (y @ a @ y, y), ((a @ y).T, a @ y), ((y @ a).T, y @ a)):
        assert_close(left, right, rtol=1e-8, atol=1e-8 * max(1.0, abs(y).max()))


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 4), (4, 2)])
def test_derivative_of_the_exact_one(xp: Any, shape: Any) -> None:
    check_grads(exact_pinv, normal(3, *shape), order=2)


# Attention


def test_released(xp: Any) -> None:
    """transformers and mlpen with both starts, and the convolution."""
    for part, name, start in (
        ("transformers", "out", shared_start),
        ("mlpen", "shared", shared_start),
        ("mlpen", "matrix", matrix_start),
    ):
        qkv = [xp.asarray(GOLDEN[f"{part}.{x}"]) for x in ("query", "key", "value")]
        layer = NystromAttention(4, 2, 5, partial(iterative_pinv, start=start))
        assert layer.conv is not None
        layer.conv.weight.data = xp.asarray(GOLDEN[f"{part}.conv"])
        assert_close(layer(*qkv), GOLDEN[f"{part}.{name}"], rtol=1e-9, atol=1e-10)


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), LEADS)
def test_by_hand(xp: Any, seed: int, n: int, m: int, landmarks: int, lead: Any) -> None:
    """Three softmaxes and numpy's pseudo-inverse."""
    q, k, v = draw(seed, n, 3, 2, lead, m)
    y = nystrom_attention(q, k, v, landmarks, exact_pinv)

    def means(x: Any) -> Any:
        x, places = host(x), np.arange(x.shape[-2]) * landmarks // x.shape[-2]
        return np.stack([x[..., places == s, :].mean(axis=-2) for s in sorted({*places})], axis=-2)

    def weights(a: Any, b: Any) -> Any:
        return softmax(a @ np.swapaxes(b, -1, -2) / np.sqrt(3.0))

    qm, km = means(q), means(k)
    core = np.linalg.pinv(weights(qm, km), 1e-15)
    wanted = weights(host(q), km) @ core @ (weights(qm, host(k)) @ host(v))
    assert_close(y, wanted, rtol=1e-6, atol=1e-6 * max(1.0, abs(core).max()))


@given(SEEDS, st.integers(1, 6), st.integers(0, 3))
def test_every_token_a_landmark(xp: Any, seed: int, n: int, more: int) -> None:
    """A A⁺ A = A: with n landmarks or more it is softmax attention, in the limit of iterations."""
    qkv = draw(seed, n, 3, 2, (2,))
    full = host(softmax_attention(*qkv))
    assert_close(nystrom_attention(*qkv, n + more, exact_pinv), full, rtol=1e-5, atol=1e-6)
    many = partial(iterative_pinv, iterations=25)
    errors = [
        abs(host(nystrom_attention(*qkv, n + more, partial(iterative_pinv, iterations=k))) - full)
        for k in (1, 8)
    ]
    assert errors[1].max() <= errors[0].max() + 1e-9
    assert abs(host(nystrom_attention(*qkv, n + more, many)) - full).max() < 1e-5


def test_rows_and_signs(xp: Any) -> None:
    """With the exact inverse rows add up to 1, some entries are negative; with six they do not."""
    q, k, _ = draw(3, 24, 4, 1)
    identity = xp.eye(24, dtype="float64")
    weights = host(nystrom_attention(3.0 * q, 3.0 * k, identity, 6, exact_pinv))
    assert_close(weights.sum(axis=-1), np.ones(24), rtol=1e-8)
    assert weights.min() < -0.1
    assert host(softmax_attention(3.0 * q, 3.0 * k, identity)).min() >= 0.0
    six = host(nystrom_attention(3.0 * q, 3.0 * k, identity, 6))
    assert abs(six.sum(axis=-1) - 1.0).max() > 1e-3


def test_a_text_depends_on_its_batch(xp: Any) -> None:
    """What the released start does: one maximum for all; ours is per matrix."""
    q, k, v = draw(0, 12, 3, 2, (2,))
    other = xp.concatenate([k[:1], 6.0 * k[1:]])
    for start, moves in ((shared_start, True), (matrix_start, False)):
        form = partial(nystrom_attention, landmarks=4, pinv=partial(iterative_pinv, start=start))
        moved = host(form(q, other, v))[0] - host(form(q, k, v))[0]
        assert (abs(moved).max() > 1e-4) == moves and (moves or not moved.any())
        alone = host(form(q[:1], k[:1], v[:1]))[0] - host(form(q, other, v))[0]
        assert (abs(alone).max() > 1e-4) == moves


@given(SEEDS, st.integers(0, 10), st.integers(0, 6), st.integers(1, 5), st.booleans())
def test_pads_change_nothing(
    xp: Any, seed: int, n: int, pads: int, landmarks: int, exact: bool
) -> None:
    """On either side, whatever they hold, with fewer tokens than landmarks too."""
    lead = int(np.random.default_rng(seed).integers(0, pads + 1))
    qkv = draw(seed, n + pads, 3, 2, (2,))
    places = xp.arange(n + pads)
    real = (places >= lead) & (places < lead + n)
    junk = [xp.where(real[:, None], x, xp.asarray(np.full(x.shape, np.nan))) for x in qkv]
    pinv = exact_pinv if exact else iterative_pinv
    leaves = [Tensor(x, requires_grad=True) for x in junk]
    y = nystrom_attention(*leaves, landmarks, pinv, key_mask=real)[:, lead : lead + n]
    short = nystrom_attention(*(x[:, lead : lead + n] for x in qkv), landmarks, pinv)
    assert_close(y, host(short), rtol=1e-6, atol=1e-7)
    for g in grad(ops.sum(y), leaves):
        assert np.isfinite(host(g)).all() and not host(g)[:, ~host(real)].any()


def test_masks_of_texts(xp: Any) -> None:
    """(b, 1, n) beside (b, h, n, d): each text as if alone, also with the convolution."""
    qkv = [x.astype("float32") for x in draw(0, 9, 3, 2, (2, 2))]
    lengths = (9, 5)
    real = (xp.arange(9) < xp.asarray([[9], [5]]))[:, None]
    layer = NystromAttention(3, 2, 3, rng=Rng(0))
    y = layer(*qkv, key_mask=real)
    assert y.dtype == "float32"
    for b, n in enumerate(lengths):
        alone = layer(*(x[b : b + 1, :, :n] for x in qkv))
        assert_close(y[b : b + 1, :, :n], host(alone), rtol=1e-4, atol=1e-5)


def test_pads_as_zeros_are_seen(xp: Any) -> None:
    """What is planted: mlpen's landmarks, means that count a pad as a token of zeros."""
    q, k, v = draw(0, 8, 3, 2)
    real = xp.arange(8) < 5
    right = host(nystrom_attention(q, k, v, 4, key_mask=real))[:5]
    q, k, v = (host(xp.where(real[:, None], x, 0.0)) for x in (q / np.sqrt(3.0), k, v))
    qm, km = (x.reshape(4, 2, 3).mean(axis=1) for x in (q, k))
    last = softmax(np.where(host(real), qm @ k.T, -1e9))
    core = host(iterative_pinv(xp.asarray(softmax(qm @ km.T))))
    planted = (softmax(q @ km.T) @ core @ last @ v)[:5]
    assert abs(planted - right).max() > 0.01


def test_only_pads(xp: Any) -> None:
    leaves = [Tensor(x, requires_grad=True) for x in draw(0, 4, 2, 2)]
    for pinv in (iterative_pinv, exact_pinv):
        y = nystrom_attention(*leaves, 2, pinv, key_mask=xp.zeros(4, "bool"))
        assert y.shape == (4, 2) and not host(y).any()
        assert not any(host(g).any() for g in grad(y.sum(), leaves))


def test_it_leaks(xp: Any) -> None:
    """The last token moves the first output, as a key, a value and a query: so it is refused."""
    qkv = draw(0, 8, 3, 2)
    y = host(nystrom_attention(*qkv, 4))
    for which in range(3):
        other = [*qkv]
        other[which] = xp.concatenate([other[which][:7], other[which][7:] + 2.0])
        assert abs(host(nystrom_attention(*other, 4)) - y)[:7].min() > 1e-9
    leaves = [Tensor(x, requires_grad=True) for x in qkv]
    for g in grad(nystrom_attention(*leaves, 4)[0].sum(), leaves):
        assert host(g)[-1].all()
    for form in (nystrom_attention, lambda *x, **y: NystromAttention(4)(*x[:3], **y)):
        with pytest.raises(ValueError, match="not causal"):
            form(*qkv, 4, is_causal=True)


def test_derivatives(xp: Any) -> None:
    qkv = draw(0, 5, 2, 2)
    check_grads(partial(nystrom_attention, landmarks=2), *qkv, order=2)
    check_grads(partial(nystrom_attention, landmarks=3, pinv=exact_pinv), *qkv, order=1)
    real = xp.arange(5) < 2
    # nearly converged, Z has forgotten its start, whose |A| a complex step cannot differentiate
    check_grads(partial(nystrom_attention, landmarks=3, key_mask=real), *qkv, order=1, rtol=1e-7)


def test_halves_and_large_scores(xp: Any) -> None:
    """float16 as float32; scores of thousands, where softmaxes have one entry each."""
    qkv = draw(0, 9, 3, 2)
    half = [x.astype("float16") for x in qkv]
    y = nystrom_attention(*half, 4)
    assert y.dtype == "float16"
    single = nystrom_attention(*(x.astype("float32") for x in half), 4)
    assert_close(y.astype("float32"), host(single), rtol=2e-3, atol=2e-3)
    big = [Tensor(x, requires_grad=True) for x in (1e3 * qkv[0], qkv[1], qkv[2])]
    for pinv in (iterative_pinv, exact_pinv):
        y = nystrom_attention(*big, 4, pinv)
        assert all(np.isfinite(host(x)).all() for x in (y, *grad(ops.sum(y), big)))


@pytest.mark.parametrize("n", [1024, 2048])
def test_memory_is_linear(backend_name: str, n: int) -> None:
    """Forward and backward, measured on the host: no matrix (n, n), of n² numbers, exists."""
    if backend_name != "numpy":
        pytest.skip("tracemalloc sees NumPy's memory")
    qkv = [Tensor(x, requires_grad=True) for x in normal(0, 3, n, 8)]
    tracemalloc.start()
    try:
        grad(ops.sum(nystrom_attention(*qkv, 32)), qkv)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 32 * n * 12


def test_errors(xp: Any) -> None:
    q, k, v = draw(0, 3, 2, 2, (), 4)
    with pytest.raises(ValueError, match="query_mask"):
        nystrom_attention(q, k, v, 2, key_mask=xp.ones(4, "bool"))
    y = nystrom_attention(q, k, v, 2, key_mask=xp.ones(4, "bool"), query_mask=xp.ones(3, "bool"))
    assert_close(y, host(nystrom_attention(q, k, v, 2)), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        segment_means(k, 0)
    with pytest.raises(ValueError, match="odd"):
        NystromAttention(4, 2, 4)
    with pytest.raises(ValueError, match="≥ 0"):
        iterative_pinv(k, -1)
    with pytest.raises(ValueError, match="key_mask"):
        NystromAttention(4)(q, k, v, attn_mask=xp.ones((3, 4), "bool"))
    with pytest.raises(ValueError, match=r"\(b, 2, n, e\)"):
        NystromAttention(4, 2, 3)(q, k, v)
    empty = nystrom_attention(q[:0], k, v, 2)
    assert empty.shape == (0, 2)
    assert repr(NystromAttention(4)) == "NystromAttention(landmarks=4)"
