"""The cost of attention: counted, and its thresholds, exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn.attention import (
    attention_cost,
    feed_forward_cost,
    length_of_attention,
    length_of_linear,
    length_of_quadratic,
    linear_core_cost,
    projection_cost,
    softmax_core_cost,
)

heads, widths, lengths = st.integers(1, 64), st.integers(1, 256), st.integers(1, 100_000)


def product(*shape: int) -> int:
    """Multiplications of (a, b) times (b, c)."""
    return math.prod(shape)


@given(lengths, heads, widths)
def test_counted_product_by_product(n: int, h: int, d: int) -> None:
    projections = 4 * product(n, h * d, h * d)
    core = h * (product(n, d, n) + product(n, n, d))
    feed_forward = product(n, h * d, 4 * h * d) + product(n, 4 * h * d, h * d)
    linear = h * (product(4 * d, n, d) + product(n, 4 * d, d))
    assert projection_cost(n, h, d) == projections == 4 * n * h**2 * d**2
    assert softmax_core_cost(n, h, d) == core
    assert attention_cost(n, h, d) == projections + core
    assert feed_forward_cost(n, h, d) == feed_forward == 8 * n * h**2 * d**2
    assert linear_core_cost(n, h, 4 * d, d) == linear
    narrow = product(n, h * d, 2 * h * d) + product(n, 2 * h * d, h * d)
    assert feed_forward_cost(n, h, d, expansion=2) == narrow


@given(heads, widths, st.sampled_from([-1, 0, 1]))
def test_thresholds(h: int, d: int, step: int) -> None:
    """At the threshold both sides are equal; a token more or less decides."""

    def signs(n: int, one: Any, other: Any) -> int:
        difference: int = one(n) - other(n)
        return (difference > 0) - (difference < 0)

    n = length_of_attention(h, d) + step
    assert n - step == 2 * h * d
    wanted = step if n > 0 else 0
    assert signs(n, lambda n: attention_cost(n, h, d), lambda n: feed_forward_cost(n, h, d)) == (
        wanted
    )
    n = length_of_quadratic(h, d) + step
    assert n - step == 6 * h * d
    assert step == signs(
        n,
        lambda n: softmax_core_cost(n, h, d),
        lambda n: projection_cost(n, h, d) + feed_forward_cost(n, h, d),
    )
    n = int(length_of_linear(d)) + step
    assert n - step == 16 * d
    core, wide = softmax_core_cost(n, h, d), linear_core_cost(n, h, 4 * d, 4 * d)
    assert (core > wide) - (core < wide) == step
    n = int(length_of_linear(d, 4 * d, d)) + step  # with more features of the keys only
    assert n - step == 4 * d
    core, narrow = softmax_core_cost(n, h, d), linear_core_cost(n, h, 4 * d, d)
    assert (core > narrow) - (core < narrow) == step


def test_a_base_model() -> None:
    """12 heads of 64: attention outweighs the rest from 1,536 tokens on, the pairs from 4,608."""
    assert length_of_attention(12, 64) == 1536 and length_of_quadratic(12, 64) == 4608
    assert length_of_linear(64) == 1024.0 and length_of_linear(64, 65, 64) == 65.0


def test_slopes() -> None:
    """Doubling the tokens doubles what is linear and quadruples the pairs."""
    assert softmax_core_cost(200, 3, 8) == 4 * softmax_core_cost(100, 3, 8)
    assert linear_core_cost(200, 3, 8, 8) == 2 * linear_core_cost(100, 3, 8, 8)


def test_errors() -> None:
    for call in (lambda: projection_cost(1, 0, 4), lambda: length_of_linear(0)):
        with pytest.raises(ValueError, match="at least 1, got"):
            call()
