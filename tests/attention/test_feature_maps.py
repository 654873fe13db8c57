"""Feature maps: the similarities that they stand for, their signs, and numbers of every size."""

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
    cosine_features,
    dpfp_features,
    elu_plus_one,
    exp_features,
    limit_features,
    linear_attention,
    map_pair,
    polynomial_features,
    relu_features,
    softmax_features,
    squared_relu_features,
    symmetric_taylor_features,
    taylor_features,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

SEEDS = st.integers(0, 2**32)
MAPS = (
    cosine_features,
    dpfp_features,
    elu_plus_one,
    exp_features,
    limit_features,
    polynomial_features,
    relu_features,
    softmax_features,
    squared_relu_features,
    symmetric_taylor_features,
    taylor_features,
)


def inner(phi: Any, q: Any, k: Any) -> Any:
    """φ(q)ᵀ φ(k) of all pairs of rows."""
    return host(phi(q)) @ host(phi(k)).T


def pair(seed: int, n: int, d: int, scale: float = 1.0) -> tuple[Any, Any]:
    q, k = Rng(seed).normal((2, n, d), std=scale, dtype="float64")
    return q, k


@pytest.mark.parametrize("phi", MAPS, ids=lambda f: f.__name__)
def test_dtypes_shapes_and_derivatives(phi: Any, xp: Any) -> None:
    for dtype in ("float16", "float32", "float64"):
        leaf = Tensor(Rng(1).normal((2, 3, 4), dtype=dtype), requires_grad=True)
        y = phi(leaf)
        (g,) = mini_nn.grad(ops.sum(y * y), leaf)
        assert y.dtype == g.dtype == dtype and y.shape[:-1] == (2, 3)
        assert_close(phi(leaf.data), host(y))
    empty = phi(xp.zeros((0, 4), "float32"))
    assert empty.shape == (0, y.shape[-1]) and empty.dtype == "float32"
    check_grads(phi, Rng(2).normal((2, 3), dtype="float64"), order=2)


# ELU + 1


def test_elu_plus_one_of_every_float16(xp: Any) -> None:
    """Positive, monotone and right to a rounding for all 63,488 finite numbers of the dtype."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = np.sort(every[np.isfinite(every)])
    y = host(elu_plus_one(xp.asarray(x)))
    assert y.dtype == "float16" and (y > 0).all() and (np.diff(y) >= 0).all()
    wide = x.astype("float64")
    exact = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
    assert_close(y[wide > 0].astype("float64"), exact[wide > 0], rtol=2.0**-10)
    assert_close(y[wide <= 0].astype("float64"), exact[wide <= 0], rtol=2.0**-10, atol=2.0**-24)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["float32", "float64"]))
def test_elu_plus_one_is_positive(xp: Any, x: float, dtype: str) -> None:
    x = float(np.clip(x, np.finfo(dtype).min, np.finfo(dtype).max))
    y = host(elu_plus_one(xp.asarray([x]).astype(dtype)))[0]
    assert y > 0 and np.isfinite(y) and y.dtype == dtype
    wanted = x + 1 if x > 0 else math.exp(x)
    assert abs(y - wanted) <= 4 * np.finfo(dtype).eps * wanted + np.finfo(dtype).tiny


def test_elu_plus_one_has_a_derivative_everywhere(xp: Any) -> None:
    """It and its derivative are continuous at 0; the second derivative is 1 up to 0 and 0 after."""
    x = xp.asarray([-1e-9, 0.0, 1e-9, -2.0, 3.0, -900.0])
    leaf = Tensor(x, requires_grad=True)
    y = elu_plus_one(leaf)
    assert_close(y, [1 - 1e-9, 1.0, 1 + 1e-9, math.exp(-2), 4.0, 5e-324], rtol=1e-12, atol=0.0)
    (g,) = mini_nn.grad(y.sum(), leaf, create_graph=True)
    assert_close(g, [1 - 1e-9, 1.0, 1.0, math.exp(-2), 1.0, 0.0], rtol=1e-12, atol=1e-300)
    (h,) = mini_nn.grad(g.sum(), leaf)
    assert_close(h, [1.0, 1.0, 0.0, math.exp(-2), 0.0, 0.0], rtol=1e-8, atol=1e-300)


def test_elu_and_then_one_cancels(xp: Any) -> None:
    """What is planted: elu(x) + 1 as it is written, in float16 (11 bits; bfloat16 has 8).

    At −9 it is 0, and a query of such features sees nothing; ours sees all keys alike.
    """

    def planted(x: Any) -> Any:
        return ops.where(x > 0, x, ops.expm1(ops.minimum(x, 0.0))) + 1.0

    x = xp.full((3, 2), -9.0, "float16")
    v = xp.asarray([[0.0], [3.0], [6.0]]).astype("float16")
    assert host(planted(x)).max() == 0.0
    assert_close(host(elu_plus_one(x)).astype("float64"), math.exp(-9), rtol=1e-2)
    assert_close(linear_attention(x, x, v), np.full((3, 1), 3.0, "float16"))
    assert abs(host(linear_attention(x, x, v, planted)) - 3.0).min() > 1.0
    at_six = xp.asarray([-6.0, -7.5]).astype("float16")
    exact = np.exp([-6.0, -7.5])
    assert abs(host(planted(at_six)) / exact - 1).max() > 0.1
    assert abs(host(elu_plus_one(at_six)) / exact - 1).max() < 1e-3


# Cosine


@given(SEEDS, st.integers(1, 6), st.floats(-30, 30))
def test_cosine_features(xp: Any, seed: int, d: int, exponent: float) -> None:
    """1 + cos, between 0 and 2, whatever the lengths are: to 1e±30 in float32."""
    q, k = pair(seed, 3, d)
    lengths = np.linalg.norm(host(q), axis=1)[:, None] * np.linalg.norm(host(k), axis=1)
    got = inner(cosine_features, q, k)
    assert_close(got, 1 + host(q) @ host(k).T / lengths, rtol=1e-9, atol=1e-12)
    assert (got >= -1e-12).all() and (got <= 2 + 1e-12).all()
    assert cosine_features(q).shape == (3, d + 1)
    scaled = (q * 10.0**exponent).astype("float32")
    assert_close(cosine_features(scaled), host(cosine_features(q)).astype("float32"), atol=1e-5)


def test_cosine_features_of_zero(xp: Any) -> None:
    """No direction: alike to every key, and no gradient, of any order, is infinite."""
    x = Tensor(xp.asarray([[0.0, 0.0], [3.0, 4.0], [1e-200, 0.0]]), requires_grad=True)
    y = cosine_features(x)
    assert_close(y, [[1, 0, 0], [1, 0.6, 0.8], [1, 1, 0]], rtol=1e-12, atol=0.0)
    (g,) = mini_nn.grad(ops.sum(y * xp.asarray([1.0, 2.0, 3.0])), x, create_graph=True)
    assert_close(g[0], np.zeros(2))
    assert_close(g[1] @ x[1], 0.0, atol=1e-12)  # a direction does not change along itself
    (h,) = mini_nn.grad(ops.sum(g[:2] * g[:2]), x)
    assert np.isfinite(host(h)[:2]).all()


# Polynomials


@given(SEEDS, st.integers(1, 6), st.floats(0.1, 10.0))
def test_taylor_features(xp: Any, seed: int, d: int, scale: float) -> None:
    """1 + s + s²/2 with s = q·k/√d, never below ½; half of the products are enough."""
    q, k = pair(seed, 5, d, scale)
    s = host(q) @ host(k).T / math.sqrt(d)
    got = inner(taylor_features, q, k)
    assert taylor_features(q).shape == (5, 1 + d + d * d)
    assert_close(got, 1 + s + s * s / 2, rtol=1e-9, atol=1e-9)
    assert (got >= 0.5 - 1e-12 * abs(s).max() ** 2).all()
    half = inner(symmetric_taylor_features, q, k)
    assert symmetric_taylor_features(q).shape == (5, 1 + d + d * (d + 1) // 2)
    assert_close(half, got, rtol=1e-9, atol=1e-9)


@given(SEEDS, st.integers(1, 3), st.integers(0, 6))
def test_polynomial_features(xp: Any, seed: int, d: int, order: int) -> None:
    """The Taylor polynomial of eˢ exactly, and its remainder within |s|ⁿ⁺¹ e^|s| / (n + 1)!."""
    q, k = pair(seed, 4, d)
    s = host(q) @ host(k).T
    got = inner(lambda x: polynomial_features(x, order), q, k)
    assert polynomial_features(q, order).shape[-1] == sum(d**m for m in range(order + 1))
    wanted = sum(s**m / math.factorial(m) for m in range(order + 1))
    assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    bound = abs(s) ** (order + 1) * np.exp(abs(s)) / math.factorial(order + 1)
    assert (abs(got - np.exp(s)) <= bound + 1e-10 * (1 + abs(wanted))).all()
    scaled = inner(lambda x: polynomial_features(x * d**-0.25, 2), q, k)
    assert_close(scaled, inner(taylor_features, q, k), rtol=1e-9, atol=1e-10)


def test_odd_orders_have_a_negative_region(xp: Any) -> None:
    """So their normaliser may vanish, which that of an even order never does."""
    q, k = xp.asarray([[3.0]]), xp.asarray([[-1.0]])
    for order in range(1, 8):
        sim = float(inner(lambda x, n=order: polynomial_features(x, n), q, k)[0, 0])
        assert (sim > 0) == (order % 2 == 0)


@given(SEEDS, st.integers(1, 3), st.integers(1, 5))
def test_limit_features(xp: Any, seed: int, d: int, power: int) -> None:
    """(1 + s/n)ⁿ exactly, and within s² e^|s| / 2n of the exponential."""
    q, k = pair(seed, 4, d)
    s = host(q) @ host(k).T
    got = inner(lambda x: limit_features(x, power), q, k)
    assert limit_features(q, power).shape[-1] == (1 + d) ** power
    assert_close(got, (1 + s / power) ** power, rtol=1e-9, atol=1e-10)
    bound = s * s * np.exp(abs(s)) / (2 * power)
    assert (abs(got - np.exp(s)) <= bound + 1e-10 * (1 + abs(got))).all()


# The others


@given(SEEDS, st.integers(1, 4), st.data())
def test_dpfp_features(xp: Any, seed: int, d: int, data: Any) -> None:
    """rᵢ rᵢ₋ⱼ by loops, the paper's rᵢ rᵢ₊ⱼ in another order.

    At most d of the 2d entries of r are not 0, so most products are.
    """
    nu = data.draw(st.integers(1, 2 * d - 1))
    x = Rng(seed).normal((3, d), dtype="float64")
    r = np.maximum(np.concatenate([host(x), -host(x)], axis=-1), 0)
    wanted = [
        [row[i] * row[(i - j) % (2 * d)] for j in range(1, nu + 1) for i in range(2 * d)]
        for row in r
    ]
    got = dpfp_features(x, nu)
    assert_close(got, wanted, rtol=1e-12)
    assert got.shape == (3, 2 * d * nu)
    papers = [
        [row[i] * row[(i + j) % (2 * d)] for j in range(1, nu + 1) for i in range(2 * d)]
        for row in r
    ]
    assert_close(np.sort(host(got)), np.sort(papers), rtol=1e-12)
    assert ((host(got) > 0).sum(axis=-1) <= d * (d - 1)).all()


@given(SEEDS, st.floats(-100.0, 100.0))
def test_elementwise_and_softmax_features(xp: Any, seed: int, shift: float) -> None:
    """Shares of the features do not see what is added to a query; both give one attention."""
    q, k = pair(seed, 4, 3)
    x = host(q)
    assert_close(relu_features(q), np.maximum(x, 0))
    assert_close(squared_relu_features(q), np.maximum(x, 0) ** 2, rtol=1e-12)
    assert_close(exp_features(q), np.exp(x), rtol=1e-12)
    assert_close(softmax_features(q).sum(axis=-1), np.ones(4), rtol=1e-12)
    v = Rng(seed).normal((4, 2), dtype="float64")
    wanted = linear_attention(q, k, v, exp_features)
    got = linear_attention(q + shift, k, v, (softmax_features, exp_features))
    assert_close(got, host(wanted), rtol=1e-9, atol=1e-10)


def test_defaults(xp: Any) -> None:
    """Order and power 2, ν = 1."""
    x = Rng(0).normal((2, 3), dtype="float64")
    assert_close(polynomial_features(x), host(polynomial_features(x, 2)), rtol=0.0)
    assert_close(limit_features(x), host(limit_features(x, 2)), rtol=0.0)
    assert_close(dpfp_features(x), host(dpfp_features(x, 1)), rtol=0.0)


def test_a_map_or_a_pair() -> None:
    assert map_pair(elu_plus_one) == (elu_plus_one, elu_plus_one)
    assert map_pair((softmax_features, exp_features)) == (softmax_features, exp_features)
    for wrong in (None, (elu_plus_one,), (elu_plus_one, 3), (elu_plus_one,) * 3):
        with pytest.raises(TypeError, match="a callable or a pair"):
            map_pair(wrong)  # type: ignore[arg-type]


def test_refusals(xp: Any) -> None:
    x = xp.ones((2, 3))
    for use, seen in (
        (lambda: polynomial_features(x, -1), "at least 0"),
        (lambda: limit_features(x, 0), "at least 1"),
        (lambda: dpfp_features(x, 0), "2 d"),
        (lambda: dpfp_features(x, 6), "2 d"),
        (lambda: taylor_features(xp.ones((2, 0))), "at least one number"),
    ):
        with pytest.raises(ValueError, match=seen):
            use()
