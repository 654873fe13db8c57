"""Taylor softmax: positive for even orders, monotone when clipped, softmax in the limit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    softmax_attention,
    taylor_attention,
    taylor_exp,
    taylor_minimum,
    taylor_softmax,
)
from mini_nn.check import arrays, check_grads
from tests.support import assert_close, host

TABLE = {  # the source's: where each order is smallest, and its value there
    2: (-1.0, 0.5),
    4: (-1.596072, 0.270395),
    6: (-2.180607, 0.149325),
    8: (-2.759003, 0.0832715),
    10: (-3.333551, 0.0466991),
}
EVEN = st.integers(1, 8).map(lambda k: 2 * k)


def line(xp: Any, low: float = -30.0, high: float = 5.0) -> Any:
    return xp.linspace(low, high, 701, dtype="float64")


@pytest.mark.parametrize("order", TABLE)
def test_table(xp: Any, order: int) -> None:
    at, value = TABLE[order]
    x = taylor_minimum(order)
    assert_close(x, at, atol=5e-7)
    y = host(taylor_exp(xp.full((1,), x, "float64"), order))[0]
    assert_close(y, value, atol=6e-7)
    assert_close(y, x**order / math.factorial(order), rtol=1e-13)


@given(EVEN)
def test_the_minimum(xp: Any, order: int) -> None:
    """f_n falls to the left of it and rises to its right; the slope there is 0."""
    at = taylor_minimum(order)
    assert abs(float(host(taylor_exp(xp.full((1,), at, "float64"), order - 1))[0])) < 1e-13
    y, x = host(taylor_exp(line(xp), order)), host(line(xp))
    steps = np.diff(y)
    assert (steps[x[1:] < at] < 0).all() and (steps[x[:-1] > at] > 0).all()
    clipped = np.diff(host(taylor_exp(line(xp), order, clipped=True)))
    assert (clipped >= 0).all() and (clipped[x[1:] < at] == 0).all()
    assert steps.min() < 0  # so that without the clip it is not monotone


@given(st.integers(0, 12), arrays((3, 4)))
def test_the_polynomial(xp: Any, order: int, x: Any) -> None:
    """Its sum, and its derivative, which is the one of an order less."""
    terms = sum(host(x) ** k / math.factorial(k) for k in range(order + 1))
    assert_close(taylor_exp(x, order), terms, rtol=1e-12, atol=1e-12)
    if order:
        leaf = Tensor(x, requires_grad=True)
        (g,) = grad(taylor_exp(leaf, order).sum(), leaf)
        assert_close(g, taylor_exp(x, order - 1), rtol=1e-11, atol=1e-11)


@given(st.integers(1, 15))
def test_sign(xp: Any, order: int) -> None:
    """Even orders are positive everywhere, odd ones are negative far to the left."""
    y = host(taylor_exp(line(xp, -200.0), order))
    assert (y.min() > 0) == (order % 2 == 0)


@given(arrays((3, 5), low=-2.0, high=2.0), EVEN, st.booleans(), st.sampled_from([0, 1, -1]))
def test_softmax_in_the_limit(xp: Any, x: Any, order: int, clipped: bool, axis: int) -> None:
    y = taylor_softmax(x, order, clipped, axis)
    assert float(host(y).min()) > 0.0
    assert_close(y.sum(axis=axis), 1.0)
    exact = host(ops.softmax(x, axis=axis))
    bound = 2.0 ** (order + 1) * math.e**2 / math.factorial(order + 1)
    if not clipped or order >= 8:  # the clip is below −2 from there on
        relative = bound * math.e**2  # of each exponential, which is at least e⁻²
        assert (abs(host(y) - exact) <= 2.1 * relative * exact / max(1e-9, 1 - relative)).all() or (
            relative >= 1
        )
    assert_close(taylor_softmax(x, 24, False, axis), exact, rtol=1e-12)


def test_what_softmax_does_not_do(xp: Any) -> None:
    """A number added to all changes it; unclipped, a bad score counts like a good one."""
    x = xp.asarray([[-9.0, 0.0, 2.0]])
    assert float(host(abs(taylor_softmax(x + 1.0) - taylor_softmax(x))).max()) > 0.01
    loose, clipped = host(taylor_softmax(x, 2))[0], host(taylor_softmax(x, 2, clipped=True))[0]
    assert loose.argmax() == 0 and clipped.argmax() == 2
    assert (np.diff(clipped) >= 0).all()


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans())
def test_attention(xp: Any, seed: int, n: int, m: int, causal: bool, clipped: bool) -> None:
    """By loops over 1 + s + s²/2, whose sum over n keys is at least n/2."""
    rng = Rng(seed)
    query, key, value = (rng.normal(s, dtype="float64") for s in ((n, 3), (m, 3), (m, 2)))
    s = host(query @ key.T) * 3**-0.5
    w = 1.0 + s + s * s / 2.0
    assert (w.sum(axis=-1) >= m / 2).all()
    if clipped:
        w = np.where(s < -1.0, 0.5, w)
    if causal:
        w = np.tril(w)
    y = taylor_attention(query, key, value, clipped=clipped, is_causal=causal)
    assert_close(y, (w / w.sum(axis=-1, keepdims=True)) @ host(value), rtol=1e-10, atol=1e-11)


def test_attention_approaches_softmax(xp: Any) -> None:
    query, key, value = Rng(0).normal((3, 2, 6, 4), dtype="float64")
    exact = softmax_attention(query, key, value, is_causal=True)
    errors = [
        float(host(abs(taylor_attention(query, key, value, n, is_causal=True) - exact)).max())
        for n in (2, 4, 6, 8, 20)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10


def test_the_dtype_is_that_of_the_query(xp: Any) -> None:
    """float16 is summed in float32; a scale of NumPy's float64 does not widen float32."""
    rising, value = xp.full((600, 3), 9.0, "float16"), xp.ones((600, 1), "float16")
    y = taylor_attention(rising, rising, value, 4)  # f₄(140) alone is beyond float16
    assert y.dtype == "float16"
    assert_close(y, xp.ones((600, 1), "float16"))
    x = Rng(0).normal((5, 3), dtype="float32")
    y = taylor_attention(x, x, x, scale=np.float64(0.4))
    assert y.dtype == "float32"
    assert_close(y, taylor_attention(x, x, x, scale=0.4))


def test_attention_in_parts(xp: Any) -> None:
    query, key, value = Rng(0).normal((3, 2, 7, 4), dtype="float64")
    whole = taylor_attention(query, key, value, 4, is_causal=True)
    state: Any = ()
    for start, stop in ((0, 3), (3, 3), (3, 4), (4, 7)):
        some = [x[:, start:stop] for x in (query, key, value)]
        y, state = taylor_attention(*some, 4, is_causal=True, state=state)
        assert_close(y, whole[:, start:stop])


def test_gradients(xp: Any) -> None:
    x = Rng(0).normal((3, 4), dtype="float64")
    for clipped in (False, True):
        check_grads(lambda a, c=clipped: taylor_softmax(a, 4, c), x, order=2)
    operands = Rng(1).normal((3, 4, 3), dtype="float64")
    check_grads(lambda *a: taylor_attention(*a, is_causal=True), *operands, order=2)
    low = Tensor(xp.full((2,), -5.0), requires_grad=True)
    (g,) = grad(taylor_exp(low, 4, clipped=True).sum(), low)
    assert not host(g).any()  # what is clipped has no slope


def test_errors(xp: Any) -> None:
    x = Rng(0).normal((3, 3))
    for call in (
        lambda: taylor_minimum(3),
        lambda: taylor_minimum(0),
        lambda: taylor_exp(x, 3, clipped=True),
        lambda: taylor_softmax(x, 1),
        lambda: taylor_attention(x, x, x, order=5),
    ):
        with pytest.raises(ValueError, match="even order"):
            call()
    with pytest.raises(ValueError, match="0 or more, got -1"):
        taylor_exp(x, -1)
