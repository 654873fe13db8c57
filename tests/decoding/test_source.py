"""mini_nn.decoding.source, and the enumeration that all proofs of this directory stand on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.decoding import RngSource, accept, laws, one_hot, ratio, residual
from tests.decoding.enumerate import distance, law, total
from tests.support import assert_close

WEIGHTS = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any)


def normal(weights: Any) -> Any:
    return np.asarray(weights, "float64") / np.sum(weights)


class Stuck:
    """An ``Rng`` whose uniform number is always the same."""

    def __init__(self, u: float) -> None:
        self.host = self
        self.u = u

    def random(self) -> float:
        return self.u


def stuck(u: float) -> RngSource:
    return RngSource(Stuck(u))  # type: ignore[arg-type]


LAST = 1.0 - 2.0**-53
"""The largest uniform number there is."""


# The enumeration


def test_every_branch_once() -> None:
    def run(source: Any) -> tuple[Any, ...]:
        first = source.categorical([0.0, 0.25, 0.75])
        return (first, source.bernoulli(0.1)) if first == 1 else (first,)

    found = law(run)
    assert found == {(1, True): 0.25 * 0.1, (1, False): 0.25 * 0.9, (2,): 0.75}
    assert law(lambda source: "nothing asked") == {"nothing asked": 1.0}
    assert_close(total(found), 1.0)
    with pytest.raises(AssertionError, match="branches"):
        law(run, limit=2)
    with pytest.raises(AssertionError, match="open"):
        law(lambda source: source.bernoulli(1.0))


@given(WEIGHTS, WEIGHTS)
def test_the_law_of_two_draws_is_the_product(first: Any, second: Any) -> None:
    p, q = normal(first), normal(second)
    found = law(lambda source: (source.categorical(p), source.categorical(q)))
    assert distance(found, {(i, j): p[i] * q[j] for i in range(3) for j in range(3)}) < 1e-15
    assert len(found) == np.count_nonzero(p) * np.count_nonzero(q)


# Choices at random


@given(WEIGHTS, st.one_of(st.sampled_from([0.0, LAST]), st.floats(0.0, LAST)))
def test_a_token_without_probability_is_never_drawn(weights: Any, u: float) -> None:
    """The inverse of the cumulated probabilities, at its ends too."""
    p = normal(weights)
    token = stuck(u).categorical(p)
    assert p[token] > 0.0
    cumulated = np.cumsum(p)
    assert cumulated[token] - p[token] <= u * cumulated[-1] <= cumulated[token]
    assert stuck(u).categorical(weights_as_floats(weights)) in np.flatnonzero(p)


def weights_as_floats(weights: Any) -> Any:
    return np.asarray(weights, "float32")


def test_u_equal_to_zero() -> None:
    """With ≤ in the place of < the first token would be drawn, which has no probability."""
    p = np.array([0.0, 0.4, 0.6, 0.0])
    assert stuck(0.0).categorical(p) == 1
    assert int(np.searchsorted(np.cumsum(p), 0.0)) == 0  # the bug
    assert stuck(LAST).categorical(p) == 2
    assert stuck(LAST).categorical(np.array([0.0, 5e-324, 0.0])) == 1  # u Σp is Σp, rounded
    assert not stuck(0.0).bernoulli(0.0)
    assert stuck(0.0).bernoulli(5e-324) and not stuck(0.5).bernoulli(0.5)


def test_frequencies() -> None:
    """20,000 draws: each count within 5 standard deviations (false alarm 2e-6 in all)."""
    p, source, n = np.array([0.5, 0.0, 0.3, 0.2]), RngSource(Rng(0)), 20_000
    counts = np.bincount([source.categorical(p) for _ in range(n)], minlength=4)
    assert np.all(abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)))
    heads = sum(source.bernoulli(0.3) for _ in range(n))
    assert abs(heads - 0.3 * n) < 5 * np.sqrt(n * 0.21)


def test_the_same_seed_makes_the_same_choices() -> None:
    p = normal([1, 2, 3])
    one, two = RngSource(Rng(5)), RngSource(Rng(5))
    assert [one.categorical(p) for _ in range(20)] == [two.categorical(p) for _ in range(20)]


def test_nothing_to_draw_from() -> None:
    for p in ([0.0, 0.0], [], [0.5, np.nan], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="positive sum"):
            RngSource(Rng(0)).categorical(np.array(p))


# Acceptance and residual


@given(WEIGHTS, WEIGHTS)
def test_acceptance_and_residual_add_up_to_p(a: Any, b: Any) -> None:
    """q min(1, p/q) + (1 − β) r = p; what is accepted and r share no token that p has less of."""
    p, q = normal(a), normal(b)
    beta = np.minimum(p, q).sum()
    r = residual(p, q)
    assert_close(r.sum(), 1.0)
    assert_close(np.minimum(p, q) + (1.0 - beta) * r, p, atol=1e-15)
    assert_close(1.0 - beta, abs(p - q).sum() / 2.0, atol=1e-15)
    if beta < 1.0 - 1e-9:
        assert not r[p <= q].any()

    def one(source: Any) -> int:
        x = source.categorical(q)
        return x if accept(p[x], q[x], source) else source.categorical(r)

    assert distance(law(one), dict(enumerate(p))) < 1e-15


def test_a_difference_of_which_rounding_leaves_nothing() -> None:
    """A concrete float32 pair: p ≠ q, both sum to 1 up to rounding, and no p is above its q."""
    p = np.array([0.448313, 0.342155, 0.209532], "float32")
    q = p.copy()
    q[2] = np.nextafter(q[2], np.float32(1.0))
    assert (p != q).any() and not np.maximum(p - q, 0).any()
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()).all()  # the bug
    assert_close(residual(p, q), p, rtol=1e-6)
    assert residual(p, q).dtype == np.float32
    assert_close(residual(q, p), [0.0, 0.0, 1.0], 0, 0)


@given(st.integers(0, 2**32), st.sampled_from(["float32", "float64"]))
def test_laws_that_are_nearly_equal(seed: int, dtype: str) -> None:
    """Logits that differ by at most two units in the last place: a tenth of these pairs have no
    residual.  It is a law within the support of p all the same."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=5).astype(dtype)
    close = logits.copy()
    for _ in range(2):
        close = np.where(rng.random(5) < 0.3, np.nextafter(close, np.array(9.0, dtype)), close)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, close))
    r = residual(p, q)
    assert np.isfinite(r).all() and (r >= 0).all()
    assert_close(r.sum(), 1.0, rtol=1e-6)
    token = stuck(LAST).categorical(r)
    assert r[token] > 0 and p[token] > 0


def test_accept_asks_only_open_questions() -> None:
    assert accept(0.5, 0.25, None)  # type: ignore[arg-type]
    assert accept(0.5, 0.5, None)  # type: ignore[arg-type]
    assert not accept(0.0, 0.5, None)  # type: ignore[arg-type]
    assert law(lambda source: accept(0.1, 0.4, source)) == {True: 0.25, False: 0.75}
    assert ratio(0.0, 5e-324) == 0.0 and ratio(1.0, 5e-324) == float("inf")
    for q in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="its own law"):
            accept(0.5, q, None)  # type: ignore[arg-type]


@given(st.floats(2.0**-60, 1.0), st.integers(1, 3))
def test_what_is_less_than_q_is_not_sure(q: float, steps: int) -> None:
    """p < q is never rounded to certainty."""
    p = q
    for _ in range(steps):
        p = float(np.nextafter(p, 0.0))
    assert ratio(p, q) < 1.0 and ratio(q, q) == 1.0


# Laws


def test_laws() -> None:
    p = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert_close(laws("p", p), p, 0, 0)
    half = (p * 1.0005).astype("float16")
    before = half.copy()
    rows = laws("p", half)
    assert rows.dtype == np.float64 and abs(rows.sum(axis=1) - 1.0).max() < 1e-15
    assert_close(half, before, 0, 0)
    assert laws("q", np.zeros((0, 3))).shape == (0, 3)
    for bad in ([[0.5, 0.4]], [[1.5, -0.5]], [[np.nan, 1.0]], [[0.0, 0.0]], [[np.inf, 0.0]]):
        with pytest.raises(ValueError, match="each row of p is a law"):
            laws("p", np.array(bad))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        laws("p", p[0])


def test_laws_live_on_the_host(xp: Any) -> None:
    device = xp.asarray(np.array([[0.5, 0.5]]))
    for bad in ([[0.5, 0.5]], *([device] if xp is not np else [])):
        with pytest.raises(TypeError, match="to_host"):
            laws("p", bad)


def test_one_hot() -> None:
    assert one_hot(1, 3).tolist() == [0.0, 1.0, 0.0]
    for token in (-1, 3):
        with pytest.raises(ValueError, match="0 … 2"):
            one_hot(token, 3)
