"""The sum of every delta rule: the chunks against the recurrence, and the inverse by halves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor
from mini_nn.attention.delta_chunks import chunked_delta, recurrent_delta, unit_lower_inverse
from mini_nn.check import check_grads
from tests.support import assert_close, host

OPTIONS = [(decay, erase, first) for decay in (0, 1) for erase in (0, 1) for first in (False, True)]


def arguments(rng: Rng, n: int, d: int = 3, e: int = 4, lead: tuple[int, ...] = (2,)) -> Any:
    """Query, key, value, beta, log_decay, state, erase."""
    q, k, p = (rng.normal((*lead, n, d), dtype="float64") for _ in range(3))
    v = rng.normal((*lead, n, e), dtype="float64")
    beta = rng.uniform((*lead, n), 0.0, 1.0, dtype="float64")
    log_decay = -rng.uniform((*lead, n), 0.0, 2.0, dtype="float64")
    return q, k, v, beta, log_decay, rng.normal((*lead, d, e), dtype="float64"), p


@given(
    st.integers(0, 70), st.data(), st.sampled_from(OPTIONS), st.booleans(), st.integers(0, 2**32)
)
def test_chunks_are_the_recurrence(
    xp: Any, n: int, data: Any, options: Any, starts: bool, seed: int
) -> None:
    """Any length, any chunk, dividing it or not, with and without a state to begin with."""
    size = data.draw(st.integers(1, n + 3))
    q, k, v, beta, log_decay, state, erase = arguments(Rng(seed), n)
    k = k / (k * k).sum(axis=-1, keepdims=True) ** 0.5
    decay, own, first = options
    rest = (log_decay if decay else None, state if starts else None, erase if own else None, first)
    y, last = chunked_delta(q, k, v, beta, *rest, chunk_size=size)
    want, end = recurrent_delta(q, k, v, beta, *rest)
    scale = max(1.0, float(abs(host(end)).max()))
    assert_close(y, want, rtol=1e-10, atol=1e-10 * scale)
    assert_close(last, end, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize(("decay", "erase", "first"), OPTIONS)
def test_gradients(xp: Any, decay: int, erase: int, first: bool) -> None:
    q, k, v, beta, log_decay, state, p = arguments(Rng(3), 5, 2, 2, ())
    rest = [state] + ([log_decay] if decay else []) + ([p] if erase else [])

    def rule(q: Any, k: Any, v: Any, beta: Any, state: Any, *rest: Any) -> Any:
        log_decay = rest[0] if decay else None
        return chunked_delta(q, k, v, beta, log_decay, state, rest[-1] if erase else None, first, 2)

    check_grads(rule, q, k, v, beta, *rest, order=2 if decay else 1)


@pytest.mark.parametrize("wanted", range(7))
@pytest.mark.parametrize("first", [False, True])
def test_the_gradient_of_each_input_alone(xp: Any, wanted: int, first: bool) -> None:
    """The rule leaves out what is not asked for, and nothing else; the rest is constant."""
    args = arguments(Rng(11), 6)
    found = []
    for rule, options in ((chunked_delta, {"chunk_size": 4}), (recurrent_delta, {})):
        leaf = Tensor(args[wanted], requires_grad=True)
        y, last = rule(*args[:wanted], leaf, *args[wanted + 1 :], first, **options)
        found.append(mini_nn.grad((y * y).sum() + last.sum(), leaf)[0])
    assert_close(*found, rtol=1e-9, atol=1e-10)


def test_forgetting_everything(xp: Any) -> None:
    """γ = 0, a logarithm of −inf, cuts the sequence, and nothing becomes nan."""
    q, k, v, beta, log_decay, state, _ = arguments(Rng(4), 9)
    log_decay[:, 4] = -float("inf")
    leaf = Tensor(v, requires_grad=True)
    y, last = chunked_delta(q, k, leaf, beta, log_decay, state, chunk_size=4)
    rest = (x[:, 4:] for x in (q, k, v, beta, log_decay))
    want, end = recurrent_delta(*rest)
    assert_close(y[:, 4:], want)
    assert_close(last, end)
    (g,) = mini_nn.grad(y[:, 4:].sum(), leaf)
    assert_close(g[:, :4], 0.0, atol=1e-300)
    assert np.isfinite(host(g)).all()


def test_decay_is_not_a_quotient_of_products(xp: Any) -> None:
    """Products over 2,000 tokens underflow; sums that start anew do not care."""
    n = 2000
    q, k, v, beta, _, _, _ = arguments(Rng(5), n, 2, 2, ())
    k = k / (k * k).sum(axis=-1, keepdims=True) ** 0.5
    log_decay = -Rng(6).uniform((n,), 0.1, 0.7, dtype="float64")
    total = np.cumprod(np.exp(host(log_decay)))
    with np.errstate(all="ignore"):
        assert not np.isfinite(1 / total).all()  # what the classic bug multiplies keys with
    y, _ = chunked_delta(q, k, v, beta, log_decay, chunk_size=64)
    assert_close(y, recurrent_delta(q, k, v, beta, log_decay)[0])


@given(st.integers(1, 20), st.integers(0, 2**32))
def test_inverse_by_halves(xp: Any, c: int, seed: int) -> None:
    """For any size, also one that is no power of 2; what is on or above the diagonal is ignored."""
    a = Rng(seed).normal((3, c, c), dtype="float64")
    want = np.linalg.inv(np.eye(c) + np.tril(host(a), -1))
    got = unit_lower_inverse(a)
    assert_close(got, want, rtol=1e-8, atol=1e-8 * abs(want).max())
    assert_close(unit_lower_inverse(xp.tril(a, -1)), got, rtol=0.0, atol=1e-300)


def test_inverse_does_not_amplify(xp: Any) -> None:
    """64 equal keys: powers of the triangle have entries of 10¹⁷, the inverse has none above 1.

    So the product of (I + (−A)^(2^j)), which also needs log c steps, loses every digit of float32.
    """
    a = xp.tril(xp.ones((64, 64), "float32"), -1)
    want = np.eye(64) - np.eye(64, k=-1)
    assert_close(unit_lower_inverse(a), want.astype("float32"), atol=1e-6)
    power, product = -host(a), np.eye(64, dtype="float32") - host(a)
    for _ in range(5):
        power = power @ power
        product = product @ (np.eye(64, dtype="float32") + power)
    assert abs(product - want).max() > 1.0


def test_inverse_gradients(xp: Any) -> None:
    check_grads(unit_lower_inverse, Rng(7).normal((2, 5, 5), dtype="float64"), order=2)


def test_float32(xp: Any) -> None:
    args = [x.astype("float32") for x in arguments(Rng(8), 37)]
    leaves = [Tensor(x, requires_grad=True) for x in args]
    y, last = chunked_delta(*leaves, True, 16)
    assert y.dtype == last.dtype == "float32"
    grads = mini_nn.grad([y.sum(), last.sum()], leaves)
    assert all(
        g.dtype == "float32" and g.shape == x.shape for g, x in zip(grads, args, strict=True)
    )


@pytest.mark.parametrize("rule", [chunked_delta, recurrent_delta])
@pytest.mark.parametrize("n", [0, 5])
def test_the_queries_decide_the_dtype(xp: Any, rule: Any, n: int) -> None:
    """Also without a state to begin with, beside float64 rates; float16 has float32 states."""
    q, k, v, beta, log_decay, _, _ = arguments(Rng(12), n)
    for dtype, of_state in (("float32", "float32"), ("float16", "float32")):
        y, last = rule(*[x.astype(dtype) for x in (q, k, v)], beta, log_decay)
        assert (y.dtype, last.dtype) == (dtype, of_state)
        assert y.shape == v.shape


def test_float16_is_summed_in_float32(xp: Any) -> None:
    """Keys at right angles to all before: 4,000 writes of 8 · 8, read by a small query."""
    n = 4000
    k = xp.full((n, 1), 8.0, "float16")
    for rule in (chunked_delta, recurrent_delta):
        y, last = rule(k * 1e-4, k, k, xp.ones(n, "float16"), None, None, 0.0 * k)
        assert_close(last, xp.full((1, 1), 64.0 * n, "float32"))
        assert_close(y[-1].astype("float64"), 8e-4 * 64.0 * n, rtol=2e-3)


def test_errors(xp: Any) -> None:
    q, k, v, beta, log_decay, state, p = arguments(Rng(9), 4)
    for rule in (chunked_delta, recurrent_delta):
        with pytest.raises(ValueError, match="query, key and erasing key"):
            rule(q, k[:, :3], v, beta)
        with pytest.raises(ValueError, match="query, key and erasing key"):
            rule(q, k, v, beta, log_decay, state, p[..., :2])
        with pytest.raises(ValueError, match=r"beta is .* \(2, 4\)"):
            rule(q, k, v, beta[:, :3])
        with pytest.raises(ValueError, match="log_decay is"):
            rule(q, k, v, beta, log_decay[0])
        with pytest.raises(ValueError, match="the state is"):
            rule(q, k, v, beta, log_decay, state[:, :2])
        with pytest.raises(ValueError, match=r"the state is .* \(2, 3, 4\) here, got \(1, 3, 4\)"):
            rule(q, k, v, beta, log_decay, state[:1])
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_delta(q, k, v, beta, chunk_size=0)
    with pytest.raises(ValueError, match="c, c"):
        unit_lower_inverse(q)
