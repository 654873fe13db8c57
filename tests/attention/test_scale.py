"""Scales of attention: what they keep, where softmax stops learning, how entropy grows with n."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, ops
from mini_nn.attention import (
    dot_product_scale,
    entropy,
    entropy_invariant_scale,
    length_scale,
    sensitivity,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host


def weights(logits: Any) -> Any:
    return host(ops.softmax(logits, axis=-1))


# Scales


def test_the_default_scale(xp: Any) -> None:
    """``scaled_dot_product_attention`` without a scale has this one, and takes the others."""
    q, k, v = Rng(0).normal((3, 2, 5, 6))
    plain = ops.scaled_dot_product_attention(q, k, v)
    assert_close(ops.scaled_dot_product_attention(q, k, v, scale=dot_product_scale(6)), plain)
    longer = ops.scaled_dot_product_attention(q, k, v, scale=length_scale(5, 6, trained=5))
    assert_close(longer, plain)


@given(st.integers(1, 2048), st.integers(2, 4096), st.integers(2, 4096))
def test_scales_by_length(d: int, n: int, trained: int) -> None:
    """One is 1/√d at the trained length and grows with ln n; so does the other, in units of 1/d.

    They are the same function for κ = √d / ln(trained).
    """
    assert_close(length_scale(trained, d, trained), dot_product_scale(d), rtol=1e-12)
    assert_close(length_scale(n * n, d, trained), 2 * length_scale(n, d, trained), rtol=1e-12)
    kappa = math.sqrt(d) / math.log(trained)
    want = entropy_invariant_scale(n, d, kappa)
    assert_close(length_scale(n, d, trained), want, rtol=1e-12)
    assert length_scale(1, d) == entropy_invariant_scale(1, d) == 0.0  # one key: nothing to scale


def test_scales_refuse() -> None:
    for use in (
        lambda: dot_product_scale(0),
        lambda: length_scale(0, 4),
        lambda: length_scale(4, 4, trained=1),
        lambda: length_scale(4, 0),
        lambda: entropy_invariant_scale(0, 4),
        lambda: entropy_invariant_scale(4, 0),
    ):
        with pytest.raises(ValueError, match=r"at least 1|takes n"):
            use()


# Sensitivity


@given(st.integers(0, 2**32), st.integers(1, 7), st.floats(0.01, 5.0))
def test_sensitivity_is_half_the_sum_of_the_jacobian(xp: Any, seed: int, n: int, a: float) -> None:
    """∂pᵢ/∂sⱼ = a (pᵢ δᵢⱼ − pᵢ pⱼ), whose entries' absolute values add up to 2 a (1 − Σ p²)."""
    s = 2.0 * Rng(seed).normal((n,), dtype="float64")
    leaf = Tensor(s, requires_grad=True)
    p = ops.softmax(a * leaf, axis=-1)
    rows = [host(mini_nn.grad(p, leaf, e, retain_graph=True)[0]) for e in xp.eye(n)]
    jacobian, seen = np.stack(rows), host(p)
    assert_close(jacobian, a * (np.diag(seen) - np.outer(seen, seen)), rtol=1e-8, atol=1e-12)
    assert_close(sensitivity(s, a), 0.5 * np.abs(jacobian).sum(), rtol=1e-8, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 4))
def test_limits_of_sensitivity(xp: Any, seed: int, n: int, ties: int) -> None:
    """0 for a → 0; for a → ∞ it is 0 if one logit is the largest, a (1 − 1/k) if k are."""
    k = min(ties, n)
    lower = -1.0 - Rng(seed).uniform((n - k,), dtype="float64")
    s = xp.concatenate([xp.zeros(k), lower])
    assert_close(sensitivity(s, 1e-6) / 1e-6, 1 - 1 / n, rtol=1e-4)
    a = 1e3
    assert_close(sensitivity(s, a), a * (1 - 1 / k), rtol=1e-9, atol=1e-9)


def test_the_plateau(xp: Any) -> None:
    """512 normal logits: no peak at a = 0.84 √(ln n), where a mean-field formula has it.

    It still grows to √(2 ln n), where one weight freezes out, and stays about the same from there.
    The rows' standard deviations are 0.13, 0.72 and 1.9, and 2,000 are averaged: the tolerances
    are 6 standard errors or more.
    """
    n = 512
    logits = Rng(1).normal((2000, n))
    critical = math.sqrt(2 * math.log(n))
    scales = (0.84 * math.sqrt(math.log(n)), critical, 2 * critical, 3 * critical)
    peak, freezing, above, far = (float(host(sensitivity(logits, a)).mean()) for a in scales)
    assert abs(peak - 1.98) < 0.05 and abs(freezing - 2.63) < 0.1 and abs(above - 2.91) < 0.26
    assert peak < 0.8 * freezing < 0.8 * above
    assert abs(far - above) < 0.4


# Entropy


@given(st.integers(0, 2**32), st.integers(1, 9), st.floats(-50.0, 50.0))
def test_entropy(xp: Any, seed: int, n: int, shift: float) -> None:
    """−Σ p ln p, between 0 and ln n, whatever is added to all logits; gradient −p (ln p + H)."""
    s = 3.0 * Rng(seed).normal((2, n), dtype="float64")
    p, h = weights(s), host(entropy(s))
    assert_close(h, -(p * np.log(p)).sum(axis=-1), rtol=1e-9, atol=1e-12)
    assert (h >= -1e-12).all() and (h <= math.log(n) + 1e-12).all()
    assert_close(entropy(s + shift), h, rtol=1e-8, atol=1e-10)
    assert_close(entropy(0.0 * s), np.full(2, math.log(n)), atol=1e-12)
    leaf = Tensor(s, requires_grad=True)
    (g,) = mini_nn.grad(entropy(leaf).sum(), leaf)
    assert_close(g, -p * (np.log(p) + h[:, None]), rtol=1e-8, atol=1e-10)


def test_entropy_with_masked_keys(xp: Any) -> None:
    """Masked keys do not count, weights that underflow add 0, and no gradient is nan."""
    inf = math.inf
    s = xp.asarray(
        [[0.0, 0.0, -inf, -inf], [5.0, -inf, -inf, -inf], [-inf] * 4, [0.0, -2e3, -2e3, 0.0]]
    ).astype("float32")
    leaf = Tensor(s, requires_grad=True)
    h = entropy(leaf)
    assert_close(h, np.array([math.log(2), 0, 0, math.log(2)], "float32"), rtol=1e-6, atol=1e-7)
    (g,) = mini_nn.grad(h.sum(), leaf)
    assert_close(g, np.zeros((4, 4), "float32"), atol=1e-6)
    assert h.dtype == g.dtype == "float32"


def test_derivatives(xp: Any) -> None:
    s = Rng(0).normal((2, 5), dtype="float64")
    check_grads(entropy, s, order=2)
    check_grads(lambda x: sensitivity(x, 1.7), s, order=2)


# What happens without a scale, and with longer texts


@pytest.mark.parametrize(
    ("d", "top", "rest"),
    [(16, 0.52, 0.63), (64, 0.76, 0.34), (256, 0.90, 0.14), (1024, 0.95, 0.08)],
)
def test_saturation(xp: Any, d: int, top: float, rest: float) -> None:
    """128 random keys: unscaled, one weight takes all as d grows; by 1/√d nothing depends on d.

    Means of 16 times 64 queries, each with a standard deviation below 0.3: 0.05 is 5 of the mean's.
    """
    q, k = Rng(d).normal((16, 64, d)), Rng(d + 1).normal((16, 128, d))
    logits = ops.matmul(q, xp.swapaxes(k, 1, 2))
    for scale, largest, spread in ((1.0, top, rest), (dot_product_scale(d), 0.07, 0.98)):
        assert abs(weights(scale * logits).max(axis=-1).mean() - largest) < 0.05
        assert abs(host(sensitivity(logits, scale) / scale).mean() - spread) < 0.05


def test_entropy_of_longer_texts(xp: Any) -> None:
    """Random queries and keys, d = 64, from 64 to 16,384 keys: what each scale claims.

    log_m n / √d takes little off the growth of the entropy; κ ln n / d with κ = 1/0.24 keeps it.
    """
    d, lengths = 64, (64, 1024, 16384)
    q, k = Rng(0).normal((64, d)), Rng(1).normal((lengths[-1], d))
    logits = q @ k.T

    def entropies(scale: Any) -> list[float]:
        return [float(host(entropy(scale(n) * logits[:, :n])).mean()) for n in lengths]

    plain = entropies(lambda n: dot_product_scale(d))
    practical = entropies(lambda n: length_scale(n, d))
    invariant = entropies(lambda n: entropy_invariant_scale(n, d))
    assert abs(plain[0] - 3.7) < 0.2 and abs(plain[-1] - 9.2) < 0.2
    assert plain[-1] - plain[0] > 5.0 and 4.0 < practical[-1] - practical[0] < 5.0
    assert max(invariant) - min(invariant) < 1.0 and min(invariant) > 2.0
