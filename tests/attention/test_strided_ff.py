"""The strided feed-forward part: position by position at stride 1, by loops, pads, and the leak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import StridedFeedForward
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from tests.attention.test_linear import SEEDS
from tests.support import assert_close, host


def normal(seed: int, *shape: int) -> Any:
    return Rng(seed).normal(shape, dtype="float64")


def layer_of(stride: int, kernel: int | None = None) -> StridedFeedForward:
    layer = StridedFeedForward(3, 5, stride, kernel, rng=Rng(0))
    for p in layer.parameters():
        p.data = p.data.astype("float64")
    return layer


def test_stride_one(xp: Any) -> None:
    """It is the feed-forward part of a Transformer."""
    layer, x = layer_of(1), normal(0, 2, 6, 3)
    inner = F.gelu(F.linear(x, layer.conv.weight.data[..., 0], layer.conv.bias))
    assert_close(layer(x), host(layer.linear(inner)), rtol=1e-12, atol=1e-13)


@given(SEEDS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_by_loops(xp: Any, seed: int, n: int, stride: int, more: int) -> None:
    k = stride + more
    layer, x = layer_of(stride, k), normal(seed, 1, n, 3)
    w, b = host(layer.conv.weight), host(layer.conv.bias)
    y = host(layer(x))
    assert y.shape == (1, -(-n // stride), 3)
    for i in range(y.shape[1]):
        inner = b.copy()
        for t in range(k):
            j = stride * i + t - more // 2
            if 0 <= j < n:
                inner += w[:, :, t] @ host(x)[0, j]
        wanted = host(layer.linear(F.gelu(xp.asarray(inner[None]))))[0]
        assert_close(y[0, i], wanted, rtol=1e-11, atol=1e-12)


@given(SEEDS, st.integers(1, 6), st.integers(0, 5))
def test_pads_are_zeros(xp: Any, seed: int, n: int, pads: int) -> None:
    layer, x = layer_of(2, 3), normal(seed, 2, n + pads, 3)
    real = xp.arange(n + pads) < n
    x = xp.where(real[:, None], x, xp.asarray(np.full(x.shape, np.nan)))
    leaf = Tensor(x, requires_grad=True)
    y = layer(leaf, real)[:, : -(-n // 2)]
    assert_close(y, host(layer(x[:, :n])), rtol=1e-12, atol=1e-13)
    (g,) = grad(ops.sum(y), leaf)
    assert np.isfinite(host(g)).all() and not host(g)[:, n:].any()


def test_it_leaks(xp: Any) -> None:
    """The place that token 0 is in sees token 1; with k = s = 1 no token sees another."""
    x = Tensor(normal(0, 1, 6, 3), requires_grad=True)
    (g,) = grad(ops.sum(layer_of(2)(x)[:, 0]), x)
    assert host(g)[0, 1].all() and not host(g)[0, 2:].any()
    (g,) = grad(ops.sum(layer_of(1)(x)[:, 0]), x)
    assert not host(g)[0, 1:].any()


def test_derivatives_and_errors(xp: Any) -> None:
    check_grads(layer_of(2, 3), normal(0, 2, 5, 3), order=1, dtypes=("float64",))
    for stride, kernel in ((0, None), (3, 2)):
        with pytest.raises(ValueError, match="at least the stride"):
            StridedFeedForward(3, 5, stride, kernel)
    y = StridedFeedForward(3, 5, rng=Rng(0))(Rng(0).normal((2, 5, 3)))
    assert y.shape == (2, 3, 3) and y.dtype == "float32"
