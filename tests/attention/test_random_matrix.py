"""Laws of random projections: which rows are Gaussian, exactly, and which only look like it.

Expectations over directions and lengths are closed forms and quadrature, expectations over signs
and permutations are enumerated.  Where matrices are sampled a statistic may be off by 5 standard
errors (probability 5.7e-7), or 6 where many are compared at once; standard errors are those of the
exact law, and seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, attention, backend
from mini_nn.attention import (
    chi_norms,
    constant_norms,
    gaussian_matrix,
    givens_matrix,
    hadamard_matrix,
    hyperbolic_features,
    jittered_matrix,
    jittered_norms,
    midpoint_matrix,
    midpoint_norms,
    mse_orthogonal,
    mse_positive,
    orthogonal_matrix,
    positive_features,
    quantile_matrix,
    quantile_norms,
    regularized_matrix,
    trigonometric_features,
)
from tests.support import assert_close, host

Law = Callable[..., Any]

BLOCKS: list[Law] = [
    orthogonal_matrix, regularized_matrix, quantile_matrix, midpoint_matrix, jittered_matrix,
    givens_matrix, hadamard_matrix,
]  # fmt: skip
LAWS = [gaussian_matrix, *BLOCKS]


def name(law: Law) -> str:
    return law.__name__


def blocks(law: Law, count: int, d: int, seed: int = 0) -> Any:
    """(count, d, d): independent blocks, float64 on the host."""
    return host(law(count * d, d, Rng(seed), dtype="float64")).reshape(count, d, d)


class Chosen(Rng):
    """A generator whose host answers what it is told to, and draws the rest."""

    def __init__(self, seed: int = 0, **answers: Callable[..., Any]) -> None:
        super().__init__(seed)
        self.answers = answers

    @property
    def host(self) -> Any:
        return Answers(self.answers, self._generator)


class Answers:
    def __init__(self, answers: dict[str, Callable[..., Any]], otherwise: Any) -> None:
        self.answers, self.otherwise = answers, otherwise

    def __getattr__(self, asked: str) -> Any:
        return self.answers.get(asked) or getattr(self.otherwise, asked)


# What all of them share


@pytest.mark.parametrize("law", BLOCKS, ids=name)
@pytest.mark.parametrize(("m", "d"), [(20, 8), (3, 8), (8, 8), (5, 1), (1, 4)])
def test_rows_of_a_block_are_orthogonal(xp: Any, law: Law, m: int, d: int) -> None:
    w = host(law(m, d, Rng(1), dtype="float64"))
    assert w.shape == (m, d)
    for start in range(0, m, d):
        gram = w[start : start + d] @ w[start : start + d].T
        assert_close(gram - np.diag(np.diag(gram)), 0.0, atol=1e-12)
        assert np.diag(gram).min() > 0.0
    if d > 1 and m > d:  # another block is another rotation
        assert np.abs(w[d:] @ w[:d].T).max(axis=1).min() > 1e-3


def test_independent_rows_are_not_orthogonal() -> None:
    gram = host(gaussian_matrix(8, 8, Rng(1), dtype="float64"))
    gram = gram @ gram.T
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 1.0


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_a_seed_gives_the_same_numbers_on_every_backend(xp: Any, law: Law) -> None:
    w = law(12, 8, Rng(5))
    assert type(w) is type(xp.zeros(1)) and w.dtype == xp.float32
    with backend.using("numpy"):
        there = law(12, 8, Rng(5))
    assert np.array_equal(host(w), there)
    assert not np.array_equal(there, host(law(12, 8, Rng(6))))
    assert_close(w, host(law(12, 8, Rng(5), dtype="float64")), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_all_laws_are_called_alike(xp: Any, law: Law) -> None:
    """The fourth argument of each is the dtype; lengths go by their name."""
    assert law(12, 8, Rng(5), "float64").dtype == xp.float64
    if law in (orthogonal_matrix, givens_matrix, hadamard_matrix):
        w = host(law(12, 8, Rng(5), "float64", norms=constant_norms))
        assert_close((w * w).sum(axis=1), np.full(12, 8.0), rtol=1e-12)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_what_is_no_projection_is_refused(law: Law) -> None:
    for m, d in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(ValueError, match=f"m={m}, d={d}"):
            law(m, d, Rng(0))
    with pytest.raises(TypeError, match="floating-point dtype, got int64"):
        law(4, 4, Rng(0), dtype="int64")


def test_hadamards_matrix_wants_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="got 6: pad queries and keys with zeros to 8"):
        hadamard_matrix(6, 6, Rng(0))


def test_padding_with_zeros_changes_no_product(xp: Any) -> None:
    """The remedy that the error names."""
    rng = Rng(3)
    q = 0.3 * rng.normal((1, 6), dtype="float64")
    w = hadamard_matrix(8, 8, rng, dtype="float64")
    pad = xp.zeros((1, 2))
    wide = positive_features(xp.concatenate([q, pad], 1), w)
    assert_close(wide, positive_features(q, w[:, :6]), rtol=1e-13)


# Lengths


def uniformity(norms: Any, d: int) -> float:
    """The p-value of Kolmogorov and Smirnov's test that these are draws from χ_d."""
    return float(scipy.stats.kstest(host(norms), scipy.stats.chi(d).cdf).pvalue)


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_lengths_are_those_of_gaussian_vectors(d: int) -> None:
    w = host(orthogonal_matrix(4000, d, Rng(2), dtype="float64"))
    assert uniformity(np.sqrt((w * w).sum(1)), d) > 1e-6
    assert uniformity(jittered_norms(4000, d, Rng(2)), d) > 1e-6
    assert uniformity(constant_norms(4000, d, Rng(2)), d) < 1e-6
    assert uniformity(chi_norms(4000, d + 1, Rng(2)), d) < 1e-6  # one degree of freedom too many


def test_every_single_jittered_length_is_chi() -> None:
    """Because the order is random; in order, the first row is the shortest."""
    first = [jittered_norms(8, 4, Rng(seed))[0] for seed in range(2000)]
    assert uniformity(first, 4) > 1e-6
    in_order = [np.sort(jittered_norms(8, 4, Rng(seed)))[0] for seed in range(2000)]
    assert uniformity(in_order, 4) < 1e-6


@pytest.mark.parametrize("m", [1, 5, 8])
def test_stratified_lengths_are_the_quantiles(m: int) -> None:
    i, chi = np.arange(1, m + 1), scipy.stats.chi(8)
    assert_close(np.sort(quantile_norms(m, 8, Rng(0))), chi.ppf(i / (m + 1)), rtol=1e-10)
    assert_close(np.sort(midpoint_norms(m, 8, Rng(0))), chi.ppf((i - 0.5) / m), rtol=1e-10)
    inside = chi.cdf(np.sort(jittered_norms(m, 8, Rng(0)))) * m
    assert np.array_equal(np.floor(inside), i - 1)


# The mean of e^{w·z}, exactly: E e^{R u·z} over directions u is ₀F₁(d/2; R² ‖z‖² / 4)


def over_directions(norms: Any, d: int, z2: float) -> Any:
    return scipy.special.hyp0f1(d / 2, host(norms) ** 2 * z2 / 4)


def graded(pieces: int = 40) -> tuple[Any, Any]:
    """Nodes and weights for (0, 1), finer towards both ends, where quantiles are singular."""
    x, weight = np.polynomial.legendre.leggauss(12)
    edges = np.concatenate([[0.0], 0.5 ** np.arange(pieces, 0, -1)])
    half = np.diff(edges)[:, None] / 2
    nodes, weights = (edges[:-1, None] + half * (1 + x)).ravel(), (half * weight).ravel()
    return np.concatenate([nodes, 1 - nodes]), np.concatenate([weights, weights])


@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("z2", [0.25, 1.0, 3.0])
def test_gaussian_lengths_are_unbiased(d: int, z2: float) -> None:
    p, weight = graded()
    mean = weight @ over_directions(scipy.stats.chi(d).ppf(p), d, z2)
    assert_close(mean, math.exp(z2 / 2), rtol=1e-8)


@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("m", [1, 4, 8])
def test_jittered_lengths_are_unbiased_and_the_other_strata_are_not(m: int, d: int) -> None:
    z2, (p, weight) = 1.0, graded()
    rng = Chosen(random=lambda count: p[:, None], permutation=np.arange)
    jittered = over_directions(jittered_norms(m, d, rng), d, z2)  # (nodes, m)
    truth = math.exp(z2 / 2)
    assert_close(weight @ jittered.mean(1), truth, rtol=1e-8)
    midpoint = over_directions(midpoint_norms(m, d, Rng(0)), d, z2).mean()
    quantile = over_directions(quantile_norms(m, d, Rng(0)), d, z2).mean()
    assert quantile <= midpoint < truth * (1 - 1e-4)
    assert m == 1 or quantile < midpoint


def test_how_low_the_strata_are() -> None:
    for m, share in ((8, 0.965), (32, 0.986), (128, 0.995)):
        assert (quantile_norms(m, 8, Rng(0)) ** 2).mean() / 8 == pytest.approx(share, abs=6e-4)
    for z2, quantile, midpoint in ((1.0, 0.9734, 0.9899), (0.6, 0.9861, 0.9949)):
        for norms, ratio in ((quantile_norms, quantile), (midpoint_norms, midpoint)):
            mean = over_directions(norms(8, 8, Rng(0)), 8, z2).mean() / math.exp(z2 / 2)
            assert mean == pytest.approx(ratio, abs=1e-4)


@given(z2=st.floats(0.01, 20.0))
def test_regularised_lengths_make_the_kernel_smaller_and_less_so_with_d(z2: float) -> None:
    ratios = [
        over_directions(constant_norms(1, d, Rng(0)), d, z2)[0] / math.exp(z2 / 2)
        for d in (1, 2, 4, 8, 64, 512)
    ]
    assert all(a < b for a, b in itertools.pairwise([0.0, *ratios, 1.0 + 1e-12]))
    assert 1.0 - ratios[-1] < z2 * z2 / (4 * 512) + 1e-12  # (1 − ratio) d → ‖z‖⁴ / 4


def test_how_small_the_regularised_kernel_is() -> None:
    for z2, wanted in ((1.0, 0.9777), (0.6, 0.9916)):
        ratio = over_directions(constant_norms(1, 8, Rng(0)), 8, z2)[0] / math.exp(z2 / 2)
        assert ratio == pytest.approx(wanted, abs=1e-4)


# Directions


def directions(d: int) -> list[Any]:
    """Unit vectors: both that the sign bug is worst for, an axis, and some others."""
    ones = np.ones(d) / math.sqrt(d)
    others = host(Rng(9).normal((3, d), dtype="float64"))
    return [ones, -ones, np.eye(d)[0], *(others / np.sqrt((others**2).sum(1, keepdims=True)))]


def errors(w: Any) -> list[float]:
    """By how many standard errors blocks (t, d, d) miss E e^{w·u} = e^{½}, for each direction."""
    count, d = w.shape[:2]
    rows, zero, found = w.reshape(-1, d), np.zeros((1, d)), []
    for u in directions(d):
        estimate = (positive_features(u[None], rows) * positive_features(zero, rows)).sum()
        mse = float(mse_orthogonal(u, zero[0], d)) / count
        found.append(float((estimate - 1.0) / math.sqrt(mse)))
    return found


def lapack(count: int, d: int, seed: int = 0) -> tuple[Any, Any]:
    """Raw Q transposed, as released code takes it, and R, each (count, d, d)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((count, d, d)))
    return q.swapaxes(1, 2), r


def chi_like(q: Any, seed: int = 1) -> Any:
    return np.sqrt(np.random.default_rng(seed).chisquare(q.shape[-1], q.shape[:-1]))[..., None]


@pytest.mark.parametrize("d", [2, 8, 16])
def test_positive_features_of_orthogonal_rows_are_unbiased(d: int) -> None:
    with backend.using("numpy"):
        assert max(map(abs, errors(blocks(orthogonal_matrix, 3000, d)))) < 5.0
        assert max(map(abs, errors(blocks(jittered_matrix, 3000, d)))) < 5.0


@pytest.mark.parametrize("d", [2, 8, 16])
def test_raw_qr_is_caught(d: int) -> None:
    """Without the signs of R's diagonal: too small for u > 0, too large for u < 0.

    At d = 2 the biases of the two rows cancel there, and an axis shows them.
    """
    with backend.using("numpy"):
        q, r = lapack(3000, d)
        found = errors(q * chi_like(q))
        assert max(map(abs, found)) > 15.0
        assert d == 2 or (found[0] < -15.0 and found[1] > 15.0)
        signs = np.sign(np.diagonal(r, axis1=1, axis2=2))[..., None]
        assert max(map(abs, errors(signs * q * chi_like(q)))) < 5.0


def test_how_biased_raw_qr_is() -> None:
    """A third of e^{q·k} = e at q = k = ±1/√d for d = 8."""
    with backend.using("numpy"):
        q, _ = lapack(20000, 8)
        rows, x = (q * chi_like(q)).reshape(-1, 8), directions(8)[:2]
        low, high = ((host(positive_features(u[None], rows)) ** 2).sum() for u in x)
    assert low == pytest.approx(1.75, abs=0.15) and high == pytest.approx(3.72, abs=0.3)


def test_even_features_do_not_see_the_signs(xp: Any) -> None:
    q, r = lapack(1, 8)
    raw = (q * chi_like(q))[0]
    fixed = raw * np.sign(np.diag(r[0]))[:, None]
    a, b = (0.4 * Rng(4).normal((2, 8), dtype="float64") for _ in range(2))
    for features, same in (
        (trigonometric_features, True),
        (hyperbolic_features, True),
        (positive_features, False),
    ):
        one, other = (
            host(features(a, xp.asarray(w))) @ host(features(b, xp.asarray(w))).T
            for w in (raw, fixed)
        )
        assert np.allclose(one, other, rtol=1e-12) == same


def test_one_dimension_has_two_directions() -> None:
    w = host(orthogonal_matrix(400, 1, Rng(0), dtype="float64", norms=constant_norms))
    assert set(w.ravel().tolist()) == {-1.0, 1.0}
    assert abs(w.sum()) < 5.0 * math.sqrt(400)
    raw, _ = lapack(400, 1)
    assert set(raw.ravel().tolist()) == {1.0}


def moments(w: Any) -> tuple[float, float]:
    """The largest deviation of means and of second moments from N(0, I)'s, in standard errors."""
    count, d = len(w), w.shape[-1]
    mean = np.abs(w.mean(0)).max() * math.sqrt(count)
    second = np.einsum("tja,tjb->jab", w, w) / count - np.eye(d)
    return mean, float(np.abs(second / np.sqrt(1.0 + np.eye(d))).max() * math.sqrt(count))


@pytest.mark.parametrize("law", [gaussian_matrix, orthogonal_matrix, jittered_matrix], ids=name)
def test_every_row_has_mean_0_and_covariance_1(law: Law) -> None:
    assert max(moments(blocks(law, 6000, 8))) < 6.0


def test_lengths_of_the_matrix_that_was_decomposed_are_caught() -> None:
    """They are χ_d and depend on the directions: E w_jj² = (d² + 4(d − j) + 2) / (d² + 2d)."""
    d, count = 8, 6000
    q, r = lapack(count, d)
    signs = np.sign(np.diagonal(r, axis1=1, axis2=2))[..., None]
    matrix = (q.swapaxes(1, 2)) @ r
    lengths = np.sqrt((matrix**2).sum(2))
    assert uniformity(lengths[:, 3], d) > 1e-6  # no test of the lengths can see it
    w = signs * q * lengths[..., None]
    mean, second = moments(w)
    assert mean < 6.0 < second
    j = np.arange(1, d + 1)
    wanted = (d * d + 4.0 * (d - j) + 2.0) / (d * d + 2.0 * d)
    seen = np.diagonal(w, axis1=1, axis2=2) ** 2
    assert np.abs(seen.mean(0) - wanted).max() < 6.0 * math.sqrt(3.0 / count)
    assert max(moments(signs * q * chi_like(q))) < 6.0


def test_blocks_are_independent_also_the_last_partial_one() -> None:
    """(w·w')² of rows of two blocks has mean d and variance 2d² + 6d; of one rotation mean d²."""
    d, count = 8, 3000
    rng = Rng(8)
    products = []
    for _ in range(count):
        w = host(orthogonal_matrix(d + 1, d, rng, dtype="float64"))
        products.append(w[d] @ w[0])
    squares = np.square(products)
    error = math.sqrt((2.0 * d * d + 6.0 * d) / count)
    assert abs(squares.mean() - d) < 5.0 * error
    assert abs(np.mean(products)) < 5.0 * math.sqrt(d / count)
    w = blocks(orthogonal_matrix, count, d)
    again = w[:, 0] * (chi_like(w[:, 0]) / np.sqrt((w[:, 0] ** 2).sum(1, keepdims=True)))
    reused = ((w[:, 0] * again).sum(1) ** 2).mean()  # the first row of the same rotation
    assert abs(reused - d) > 50.0 * error


# Structured rows: what holds exactly, and what does not


def all_hadamards(d: int) -> Any:
    """(2^{3d}, d, d): the directions for every choice of signs."""
    choices = [np.array(bits) for bits in itertools.product((0, 1), repeat=d)]
    found = []
    with backend.using("numpy"):
        for three in itertools.product(choices, repeat=3):
            answers = iter(three)
            rng = Chosen(integers=lambda low, high, size, answers=answers: next(answers))
            found.append(hadamard_matrix(d, d, rng, dtype="float64", norms=constant_norms))
    return np.array(found) / math.sqrt(d)


@pytest.mark.parametrize("d", [2, 4])
def test_hadamard_rows_have_mean_0_and_covariance_1_and_not_the_haar_measure(d: int) -> None:
    q = all_hadamards(d)
    assert_close(np.mean(q, 0), 0.0, atol=1e-15)
    assert_close(np.einsum("tja,tjb->jab", q, q) / len(q), np.tile(np.eye(d) / d, (d, 1, 1)))
    assert_close(np.mean(q**3, 0), 0.0, atol=1e-15)
    haar = 3.0 / (d * (d + 2))
    assert np.abs((q**4).mean(0) - haar).min() > 0.05 * haar


def test_hadamard_rows_are_biased_a_little() -> None:
    """E cosh(R c) over χ_d is ₁F₁(d/2; ½; c²/2), enumerated over all directions; ‖z‖ = 1."""
    rows, counts = np.unique(all_hadamards(4).reshape(-1, 4).round(12), axis=0, return_counts=True)

    def estimate(c: Any) -> Any:
        return scipy.special.hyp1f1(2.0, 0.5, c * c / 2) / math.exp(0.5)

    means = [estimate(rows @ z) @ counts / counts.sum() for z in directions(4)]
    assert 5e-3 < np.abs(np.array(means) - 1.0).max() < 0.02
    c, weight = scipy.special.roots_gegenbauer(30, 1.0)  # a coordinate of a uniform direction
    assert_close(weight @ estimate(c) / weight.sum(), 1.0, rtol=1e-12)


def all_starts(d: int, seed: int) -> Any:
    """Givens products of one sequence of rotations, for every signed permutation at the start."""
    found = []
    with backend.using("numpy"):
        for order in itertools.permutations(range(d)):
            for bits in itertools.product((0, 1), repeat=d):
                rng = Chosen(
                    seed,
                    permutation=lambda n, order=order: np.array(order),
                    integers=lambda low, high, size, bits=bits: np.array(bits),
                )
                found.append(givens_matrix(d, d, rng, dtype="float64", norms=constant_norms))
    return np.array(found) / math.sqrt(d)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_givens_rows_have_mean_0_and_covariance_1_whatever_the_rotations(d: int) -> None:
    q = all_starts(d, seed=7)
    assert_close(np.mean(q, 0), 0.0, atol=1e-15)
    assert_close(np.einsum("tja,tjb->jab", q, q) / len(q), np.tile(np.eye(d) / d, (d, 1, 1)))


def test_givens_products_that_start_from_the_identity_are_caught() -> None:
    """A step keeps 1 − 1/(d − 1) of a row's excess on its own axis: d⌈ln d⌉ steps leave 17 %."""
    d, count = 8, 1500
    rng = Chosen(
        permutation=np.arange, integers=lambda low, high, size: np.ones(size, dtype="int64")
    )
    q = host(givens_matrix(count * d, d, rng, dtype="float64", norms=constant_norms))
    q = q.reshape(count, d, d) / math.sqrt(d)
    steps = d * math.ceil(math.log(d))
    wanted = 1.0 + (d - 1) * (1.0 - 1.0 / (d - 1)) ** steps
    assert wanted == pytest.approx(1.173, abs=1e-3)
    own = d * (np.diagonal(q, axis1=1, axis2=2) ** 2).mean(1)  # at most d each
    error = d * math.sqrt(0.25 / count)
    assert abs(own.mean() - wanted) < 5.0 * error
    assert abs(own.mean() - wanted) < 5.0 * own.std() / math.sqrt(count) < wanted - 1.0


def test_givens_rows_are_less_biased_than_raw_qr() -> None:
    """Not exact, and no third of the kernel either; ‖z‖ = 1, standard errors of the exact law."""
    d, count = 8, 1500
    with backend.using("numpy"):
        w = blocks(givens_matrix, count, d)
        rows, zero = w.reshape(-1, d), np.zeros((1, d))
        for u in directions(d):
            estimate = (
                host(positive_features(u[None], rows)) * positive_features(zero, rows)
            ).sum()
            error = math.sqrt(float(mse_positive(u, zero[0], d)) / count)
            assert abs(estimate - 1.0) < 0.02 + 5.0 * error


def test_the_laws_are_exported() -> None:
    for law in LAWS:
        assert getattr(attention, law.__name__) is law
