"""The chunked sum is the recurrence, in value, gradient and gradient's gradient."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, backend, grad
from mini_nn.attention.chunked import chunked, recurrent
from mini_nn.check import check_grads
from tests.support import assert_close, host


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    rng = Rng(seed)
    return [rng.normal(shape, dtype=dtype) for shape in shapes]


def problem(seed: int, lead: tuple[int, ...], n: int, d: int, e: int, dtype: str = "float64"):
    q, k, v, g, s = drawn(
        seed, (*lead, n, d), (*lead, n, d), (*lead, n, e), (*lead, n), (*lead, d, e), dtype=dtype
    )
    return q, k, v, -abs(g), s


@given(
    n=st.integers(1, 70),
    size=st.integers(1, 73),
    d=st.integers(1, 4),
    e=st.integers(1, 4),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    decays=st.booleans(),
    starts=st.booleans(),
)
def test_chunked_is_recurrent(xp, n, size, d, e, lead, decays, starts):
    q, k, v, g, s = problem(n, lead, n, d, e)
    g, s = g if decays else None, s if starts else None
    y, last = chunked(q, k, v, g, s, size)
    want, end = recurrent(q, k, v, g, s)
    assert_close(y, want, rtol=1e-10, atol=1e-11)
    assert_close(last, end, rtol=1e-10, atol=1e-11)


@given(n=st.integers(2, 30), size=st.integers(1, 8), data=st.data())
def test_a_sequence_in_two_parts(xp, n, size, data):
    t = data.draw(st.integers(1, n - 1))
    q, k, v, g, s = problem(n, (2,), n, 3, 2)
    whole, end = chunked(q, k, v, g, s, size)
    first, state = chunked(q[:, :t], k[:, :t], v[:, :t], g[:, :t], s, size)
    rest, last = chunked(q[:, t:], k[:, t:], v[:, t:], g[:, t:], state, size)
    assert_close(xp.concatenate([first, rest], axis=1), whole, rtol=1e-10, atol=1e-11)
    assert_close(last, end, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", [chunked, recurrent])
@pytest.mark.parametrize("decays", [False, True])
def test_gradients_to_second_order(xp, form, decays):
    q, k, v, g, s = problem(1, (2,), 5, 2, 3)
    options = {"chunk_size": 2} if form is chunked else {}
    if decays:
        check_grads(lambda *xs: form(*xs, **options), q, k, v, g, s)
    else:
        check_grads(lambda q, k, v, s: form(q, k, v, None, s, **options), q, k, v, s)
        check_grads(lambda q, k, v: form(q, k, v, **options)[0], q, k, v)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 1, 1), (2, 1, 7)])
def test_a_decay_shared_by_tokens_heads_or_batch(xp, shape):
    q, k, v, _, s = problem(3, (2, 3), 7, 2, 2)
    g = -abs(drawn(4, shape)[0])
    check_grads(lambda *xs: chunked(*xs, chunk_size=3), q, k, v, g, s, order=1)
    wide = backend.of(g).broadcast_to(g, (2, 3, 7))
    assert_close(chunked(q, k, v, g, s, 3)[0], recurrent(q, k, v, wide, s)[0])


def test_gradients_are_those_of_the_recurrence(xp):
    arrays = problem(5, (2, 2), 41, 3, 4)
    seeds = drawn(6, (2, 2, 41, 4), (2, 2, 3, 4))
    found = []
    for form in (lambda *xs: chunked(*xs, chunk_size=8), recurrent):
        leaves = [Tensor(x, requires_grad=True) for x in arrays]
        found.append(grad(form(*leaves), leaves, seeds))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_token_forgets_everything(xp):
    """γ = 0: a logarithm of −inf, which a quotient of two products could not do."""
    q, k, v, g, s = problem(7, (), 9, 2, 2)
    g[4] = -float("inf")
    y, _ = chunked(q, k, v, g, s, 4)
    assert_close(y[4:], recurrent(q[4:], k[4:], v[4:], g[4:])[0])
    assert_close(y, recurrent(q, k, v, g, s)[0])
    leaves = [Tensor(x, requires_grad=True) for x in (q, k, v, s)]
    y, _ = chunked(leaves[0], leaves[1], leaves[2], g, leaves[3], 4)
    grads = grad(y[4:].sum(), leaves)
    for part in (*[host(x)[:4] for x in grads[:3]], host(grads[3])):
        assert (part == 0).all()


def test_decays_that_multiply_to_nothing(xp):
    """Γ_i / Γ_j with Γ the product from the start: what it would be, and what this gives."""
    n = 2000
    q, k, v, _, _ = problem(8, (), n, 2, 2)
    g = xp.log(xp.asarray(Rng(9).uniform((n,), 0.5, 0.9, dtype="float64")))
    total = host(g).cumsum()
    assert -total[-1] > 709  # 1/Γ is beyond float64
    y, last = chunked(q, k, v, g)
    want, end = recurrent(q, k, v, g)
    assert_close(y, want, rtol=1e-9, atol=1e-10)
    assert_close(last, end, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_long_sequence_with_heavy_decay_keeps_its_digits(xp, dtype):
    """A step of −1000 must not cost the digits of the small ones after it."""
    q, k, v, g, s = problem(10, (), 40, 2, 2, dtype)
    g = g * 0.01
    g[5] = -1000.0
    want = recurrent(*(x.astype("float64") for x in (q, k, v, g, s)))[0]
    got = chunked(q, k, v, g, s, 40)[0]
    tolerance = 2e-6 if dtype == "float32" else 1e-13
    assert_close(got.astype("float64"), want, rtol=0, atol=tolerance * float(abs(host(want)).max()))
    assert got.dtype == dtype


def test_the_future_is_not_seen(xp):
    q, k, v, g, s = problem(11, (2,), 20, 3, 3)
    before = chunked(q, k, v, g, s, 6)[0]
    for t in (0, 5, 6, 19):
        k2, v2, q2, g2 = (x.copy() for x in (k, v, q, g))
        for x in (k2, v2, q2):
            x[:, t] += 1.0
        g2[:, t] -= 1.0
        after = chunked(q2, k2, v2, g2, s, 6)[0]
        assert (host(after)[:, :t] == host(before)[:, :t]).all()
        assert (abs(host(after)[:, t:] - host(before)[:, t:]).max(axis=(0, 2)) > 1e-6).all()


def test_no_tokens(xp):
    q, k, v, g, s = problem(12, (2,), 0, 3, 4)
    for form in (chunked, recurrent):
        y, last = form(q, k, v, g, s)
        assert y.shape == (2, 0, 4)
        assert_close(last, s)
        assert_close(form(q, k, v)[1], xp.zeros((2, 3, 4)))


def test_memory_grows_as_the_sequence(xp, request):
    if request.config.getoption("backend") != "numpy":
        pytest.skip("traces the memory of the host")

    def peak(n: int) -> int:
        q, k, v = (Tensor(x, requires_grad=True) for x in problem(13, (), n, 16, 16)[:3])
        tracemalloc.start()
        grad(chunked(q, k, v)[0].sum(), [q, k, v])
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(4096) < 4.4 * peak(1024)
    assert peak(4096) < 4096 * 4096 * 8 / 8  # an eighth of one n × n matrix


def test_wrong_shapes_are_named(xp):
    q, k, v, g, s = problem(14, (2,), 5, 3, 4)
    for form in (chunked, recurrent):
        with pytest.raises(ValueError, match=r"\(2, 5, 3\), \(2, 4, 3\) and \(2, 5, 4\)"):
            form(q, k[:, 1:], v)
        with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
            form(q, k, v[:, 1:])
        with pytest.raises(ValueError, match=r"broadcast to .* \(2, 5\), got \(2, 4\)"):
            form(q, k, v, g[:, 1:])
        with pytest.raises(ValueError, match=r"\(2, 3, 4\) here, got \(2, 4, 3\)"):
            form(q, k, v, None, s.swapaxes(1, 2))
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked(q, k, v, chunk_size=0)


@pytest.mark.parametrize("form", [chunked, recurrent])
def test_a_decay_that_is_one_number(xp: Any, form: Any) -> None:
    """As a number, as an array without axes, and as one with an axis it is the same decay."""
    q, k, v, _, s = problem(15, (2,), 7, 2, 3)
    want, end = form(q, k, v, xp.full((2, 7), -0.3), s)
    for decay in (-0.3, np.float32(-0.3), xp.asarray(-0.3), xp.asarray([-0.3])):
        tolerance = 1e-7 if isinstance(decay, np.float32) else 1e-12
        y, last = form(q, k, v, decay, s)
        assert_close(y, want, rtol=tolerance, atol=tolerance)
        assert_close(last, end, rtol=tolerance, atol=tolerance)
    check_grads(lambda *xs: form(*xs), q, k, v, xp.asarray(-0.3), s)


@pytest.mark.parametrize("form", [chunked, recurrent])
@pytest.mark.parametrize("n", [0, 5])
def test_the_queries_decide_the_dtype(xp: Any, form: Any, n: int) -> None:
    """Not a float64 decay, nor the absence of tokens."""
    q, k, v, _, _ = problem(16, (2,), n, 3, 2, "float32")
    for decay in (None, np.float64(-0.3), xp.full((n,), -0.3)):
        assert [x.dtype for x in form(q, k, v, decay)] == ["float32", "float32"]


@pytest.mark.parametrize("form", [chunked, recurrent])
def test_float16_is_summed_in_float32(xp: Any, form: Any) -> None:
    """3,000 products of 64 are beyond float16; what is read from them is not."""
    ones = xp.ones((3000, 1), "float16")
    leaves = [Tensor(x, requires_grad=True) for x in (ones * 1e-3, ones * 8, ones * 8)]
    y, last = form(*leaves)
    assert (y.dtype, last.dtype) == ("float16", "float32")
    assert_close(last, xp.full((1, 1), 192000.0, "float32"))
    assert_close(y[-1].data.astype("float64"), 192.0, rtol=2e-3)  # 0.001 is not in float16
    # of q it would be those 192,000
    assert {g.dtype.name for g in grad(y[-1].sum(), leaves[1:])} == {"float16"}
