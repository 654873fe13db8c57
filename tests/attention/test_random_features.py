"""Random features: unbiased and with the stated error, by quadrature; then by sampling.

A projection whose rows are the nodes of a quadrature makes a feature map exact: the products of its
features, weighted, are the expectation over w ~ N(0, I).  Sampled estimates may be off by 5
standard errors (probability 5.7e-7), which are in closed form; seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention import (
    KERNELS,
    arc_cosine_kernel,
    exponential_features,
    exponential_log_features,
    fourier_features,
    fourier_matrices,
    gaussian_matrix,
    generalized_features,
    hyperbolic_features,
    hyperbolic_log_features,
    jittered_matrix,
    mse_hyperbolic,
    mse_oprf,
    mse_orthogonal,
    mse_positive,
    mse_trigonometric,
    oprf_features,
    oprf_log_features,
    oprf_rho,
    orthogonal_gain_bound,
    orthogonal_matrix,
    positive_features,
    positive_log_features,
    trigonometric_features,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "attention_features.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118

Features = Callable[[Any, Any], Any]


def oprf(x: Any, w: Any) -> Any:
    return oprf_features(x, w, 1.7)


SOFTMAX: dict[str, tuple[Features, Callable[..., Any]]] = {
    "trigonometric": (trigonometric_features, mse_trigonometric),
    "positive": (positive_features, mse_positive),
    "hyperbolic": (hyperbolic_features, mse_hyperbolic),
    "oprf": (oprf, lambda q, k, m: mse_oprf(q, k, m, 1.7)),
}
"""Feature maps of e^{q·k} and their errors."""

each = pytest.mark.parametrize("kind", SOFTMAX)


def gauss(d: int, nodes: int = 36) -> tuple[Any, Any]:
    """All points and weights of the product rule for N(0, I) in d dimensions."""
    x, weight = np.polynomial.hermite_e.hermegauss(nodes)
    weight = weight / weight.sum()
    points = np.stack(np.meshgrid(*[x] * d, indexing="ij"), -1).reshape(-1, d)
    weights = np.prod(np.stack(np.meshgrid(*[weight] * d, indexing="ij"), -1).reshape(-1, d), 1)
    return points, weights


def one_row_estimates(features: Features, q: Any, k: Any, w: Any) -> Any:
    """(m,): what each row of W says by itself; a map of two features a row adds its two."""
    m = w.shape[0]
    products = m * host(features(q, w)) * host(features(k, w))
    return products.reshape(-1, m).sum(0)


def pair(seed: int, d: int, longest: float = 1.1) -> tuple[Any, Any]:
    """q and k (1, d), of random lengths up to ``longest``, on the current backend."""
    rng = Rng(seed)
    x = rng.normal((2, 1, d), dtype="float64")
    length = rng.uniform((2, 1, 1), 0.1, longest, dtype="float64")
    q, k = x * length / (x * x).sum(axis=-1, keepdims=True) ** 0.5
    return q, k


seeds = st.integers(0, 10_000)


# Unbiased, and the error as stated: quadrature


@each
@pytest.mark.parametrize("d", [1, 2, 3])
@given(seed=seeds)
def test_features_are_unbiased_and_their_error_is_the_closed_form(
    xp: Any, kind: str, d: int, seed: int
) -> None:
    features, mse = SOFTMAX[kind]
    q, k = pair(seed, d)
    points, weights = gauss(d, {1: 150, 2: 60, 3: 26}[d])
    found = one_row_estimates(features, q, k, xp.asarray(points))
    sm = float(np.exp(host(q) @ host(k).T)[0, 0])
    loose = 1e-11 if d < 3 else 1e-6
    assert_close(weights @ found, sm, rtol=loose)
    error = host(mse(q, k, 3))[0]
    assert_close(weights @ (found - sm) ** 2 / 3, float(error), rtol=100 * loose, atol=1e-13)


@pytest.mark.parametrize("d", [4, 64])
@given(seed=seeds)
def test_one_dimension_is_enough_for_any_number_of_them(xp: Any, d: int, seed: int) -> None:
    """e^{w·z} and cos w·δ depend on w along z or δ only, and the law of w is round."""
    q, k = pair(seed, d)
    sm = float(np.exp(host(q) @ host(k).T)[0, 0])
    points, weights = gauss(1, 60)
    for features, axis in (
        (positive_features, q + k),
        (hyperbolic_features, q + k),
        (trigonometric_features, q - k),
    ):
        w = xp.asarray(points) * axis / (axis * axis).sum() ** 0.5
        assert_close(weights @ one_row_estimates(features, q, k, w), sm, rtol=1e-12)


def test_what_is_no_estimate_of_the_kernel_is_caught(xp: Any) -> None:
    """No ‖x‖²/2; and cos(w·x + b), which a tutorial calls FAVOR+."""
    q, k = xp.asarray([[0.9, 0.3]]), xp.asarray([[0.5, -0.8]])
    sm = float(np.exp(host(q) @ host(k).T)[0, 0])
    points, weights = gauss(2)
    w = xp.asarray(points)

    def tutorial(x: Any, w: Any) -> Any:
        return ops.cos(ops.linear(x, w) + 0.7) * (2.0 / len(w)) ** 0.5

    for wrong in (exponential_features, tutorial):
        assert abs(weights @ one_row_estimates(wrong, q, k, w) / sm - 1.0) > 0.05


class Nodes(Rng):
    """A generator that answers with the given columns in turn."""

    def __init__(self, xp: Any, columns: Any) -> None:
        super().__init__(0)
        self.columns = iter([xp.asarray(column[:, None].copy()) for column in columns])

    def normal(self, *args: Any, **kwargs: Any) -> Any:
        return next(self.columns)


@pytest.mark.parametrize("lam", [0.5, 0.6, 1.0])
@given(seed=seeds)
def test_the_fourier_recipe_is_unbiased_and_best_at_one_half(
    xp: Any, lam: float, seed: int
) -> None:
    """MSE = e^{2λ(q² + k²)} (1 − e^{−v})² / 2m with v = 2λ(q² + k²) − 2qk."""
    q, k = pair(seed, 1)
    points, weights = gauss(2, 50)
    m = len(points)
    w_q, w_k = fourier_matrices(m, 1, Nodes(xp, points.T), lam, dtype="float64")
    products = m * host(fourier_features(q, w_q, lam)) * host(fourier_features(k, w_k, lam))
    found = products.reshape(-1, m).sum(0)
    a, b = float(host(q)[0, 0]), float(host(k)[0, 0])
    sm = math.exp(a * b)
    assert_close(weights @ found, sm, rtol=1e-10)

    def mse(lam: float) -> float:
        s = 2.0 * lam * (a * a + b * b)
        return 0.5 * math.exp(s) * (1.0 - math.exp(2.0 * a * b - s)) ** 2

    assert_close(weights @ (found - sm) ** 2, mse(lam), rtol=1e-8, atol=1e-12)
    assert mse(0.5) <= mse(lam)
    if lam == 0.5:
        assert np.array_equal(host(w_q), host(w_k))
        assert np.array_equal(host(fourier_features(q, w_q)), host(trigonometric_features(q, w_q)))


def test_the_fourier_recipe_needs_lambda_of_one_half(xp: Any) -> None:
    """Below, [[2λ, −1], [−1, 2λ]] has a negative eigenvalue, and the integral diverges."""
    for lam in (0.49, 0.5, 0.51):
        lowest = np.linalg.eigvalsh([[2 * lam, -1.0], [-1.0, 2 * lam]]).min()
        if lowest < -1e-12:
            with pytest.raises(ValueError, match=r"λ ≥ ½, got λ=0\.49"):
                fourier_matrices(4, 2, Rng(0), lam)
        else:
            fourier_matrices(4, 2, Rng(0), lam)
    for side in (10.0, 20.0):  # along q = k the integrand is e^{(1 − 2λ) q²}
        grows = np.trapezoid(np.exp(0.02 * np.linspace(-side, side, 999) ** 2), dx=side / 499)
        assert grows > 2 * side
    w_q, w_k = map(host, fourier_matrices(40_000, 1, Rng(1), 0.8, dtype="float64"))
    seen = np.cov(w_q.ravel(), w_k.ravel())
    assert np.abs(seen - [[1.6, 1.0], [1.0, 1.6]]).max() < 6.0 * 1.6 * math.sqrt(2.0 / 40_000)
    with pytest.raises(ValueError, match="m=0, d=2"):
        fourier_matrices(0, 2, Rng(0))
    with pytest.raises(ValueError, match="got λ=inf"):
        fourier_matrices(4, 2, Rng(0), math.inf)


# The error


@given(seed=seeds, d=st.integers(2, 12), m=st.integers(1, 40))
def test_orthogonal_rows_gain_what_the_theorem_says(seed: int, d: int, m: int) -> None:
    q, k = pair(seed, d, longest=2.0)
    exact, bound, alone = (float(host(f(q, k, m))[0]) for f in (
        mse_orthogonal, orthogonal_gain_bound, mse_positive
    ))  # fmt: skip
    assert exact <= alone - bound + 1e-12 * alone
    assert m == 1 or bound > 0.0
    if m <= d:
        a, b = host(q)[0], host(k)[0]
        gap = math.exp(a @ b) - math.exp(-(a @ a + b @ b) / 2)
        assert_close(bound, 2.0 * (m - 1) / (m * (d + 2)) * gap**2, rtol=1e-9, atol=1e-300)


@given(seed=seeds, d=st.integers(1, 12), blocks=st.integers(1, 3))
def test_the_error_of_orthogonal_rows_is_a_hypergeometric_function(
    seed: int, d: int, blocks: int
) -> None:
    q, k = pair(seed, d, longest=3.0)
    z2, sm = float(host(((q + k) ** 2).sum())), float(host(ops.exp((q * k).sum())))
    two = scipy.special.hyp1f1(d, d / 2, z2 / 2)
    wanted = (
        sm**2 * math.exp(-z2) / blocks
        * (math.exp(2 * z2) / d + (1 - 1 / d) * two - math.exp(z2))
    )  # fmt: skip
    scale = float(host(mse_positive(q, k, d * blocks))[0])
    assert_close(host(mse_orthogonal(q, k, d * blocks))[0], wanted, rtol=1e-9, atol=1e-11 * scale)


@given(seed=seeds, d=st.integers(2, 6))
def test_only_rows_of_one_block_help_each_other(seed: int, d: int) -> None:
    """m² MSE is m variances and a covariance for each pair in a block, the last partial one too."""
    q, k = pair(seed, d)

    def total(m: int) -> float:
        return m * m * float(host(mse_orthogonal(q, k, m))[0])

    variance = float(host(mse_positive(q, k, 1))[0])
    covariance = (total(d) - d * variance) / (d * (d - 1))
    assert covariance < 0.0
    for m in range(1, 3 * d):
        block = np.arange(m) // d
        pairs = int((block[:, None] == block).sum()) - m
        assert_close(total(m), m * variance + pairs * covariance, rtol=1e-8)


def test_the_error_of_orthogonal_rows_in_two_dimensions(xp: Any) -> None:
    """An angle and two lengths, integrated: no series, no theory."""
    x, weight = np.polynomial.legendre.leggauss(60)
    r, weight_r = 5 * (x + 1), 5 * weight * scipy.stats.chi(2).pdf(5 * (x + 1))
    angle = 2 * np.pi * np.arange(64) / 64
    first, second = (
        np.stack([np.cos(angle), np.sin(angle)], 1),
        np.stack([-np.sin(angle), np.cos(angle)], 1),
    )
    q, k = pair(5, 2)
    sm = math.exp(float((q * k).sum()))
    one, other = (
        one_row_estimates(
            positive_features, q, k, xp.asarray((r[:, None, None] * u).reshape(-1, 2))
        ).reshape(60, 64)
        for u in (first, second)
    )
    both = (one[:, None] + other[None]) / 2
    mse = np.einsum("a,b,abt->", weight_r, weight_r, (both - sm) ** 2) / 64
    assert_close(host(mse_orthogonal(q, k, 2))[0], mse, rtol=1e-4)  # lengths up to 10


@given(seed=seeds)
def test_hyperbolic_features_err_less_than_half(xp: Any, seed: int) -> None:
    q, k = pair(seed, 4, longest=2.0)
    hyperbolic, positive, twice = (
        float(host(f)[0])
        for f in (mse_hyperbolic(q, k, 5), mse_positive(q, k, 5), mse_positive(q, k, 10))
    )
    assert hyperbolic < 0.5 * positive and hyperbolic < twice


def test_where_each_kind_is_exact(xp: Any) -> None:
    """Trigonometric features at k = q, positive ones at k = −q; and no error is lost in between."""
    q = Rng(1).normal((1, 3), dtype="float64")
    for w in (gaussian_matrix(2, 3, Rng(2), "float64"), xp.ones((2, 3))):
        for k, exact in ((q, trigonometric_features), (-q, positive_features)):
            truth = host(ops.exp((q * k).sum()))
            for features in (trigonometric_features, positive_features):
                seen = host(ops.sum(features(q, w) * features(k, w)))
                assert np.allclose(seen, truth, rtol=1e-12) == (features is exact)
    assert float(host(mse_trigonometric(q, q, 1))[0]) == 0.0
    assert float(host(mse_positive(q, -q, 1))[0]) == 0.0
    tiny = 1e-9 * q
    assert_close(mse_positive(tiny, tiny, 1), 4e-18 * host((q * q).sum(axis=-1)), rtol=1e-6)


def test_the_relative_error_of_trigonometric_features_explodes_where_the_kernel_is_small(
    xp: Any,
) -> None:
    ratios = []
    for angle in (0.25, 0.5, 0.75):
        q = xp.asarray([[2.0, 0.0]])
        k = xp.asarray([[2.0 * math.cos(angle * math.pi), 2.0 * math.sin(angle * math.pi)]])
        ratios.append(float(host(mse_trigonometric(q, k, 1) / mse_positive(q, k, 1))[0]))
    assert ratios[0] < 1e-3 and ratios[2] > 1e3


# Laws of the features


def test_imaginary_arguments_turn_cosines_into_exponentials() -> None:
    """e^{iw·x} at −iq and e^{−iw·x} at ik give positive features; cosines alone hyperbolic ones."""
    rng = np.random.default_rng(2)
    q, k, w = (
        0.5 * rng.standard_normal((1, 4)),
        0.5 * rng.standard_normal((1, 4)),
        rng.standard_normal((6, 4)),
    )
    left, right = trigonometric_features(-1j * q, w), trigonometric_features(1j * k, w)
    hyperbolic = hyperbolic_features(q, w) @ hyperbolic_features(k, w).T
    assert_close((left @ right.T).real, hyperbolic, rtol=1e-12)
    assert_close((left @ right.T).imag, np.zeros((1, 1)), atol=1e-13)
    m = len(w)
    wave = (left[:, :m] + 1j * left[:, m:]) @ (right[:, :m] - 1j * right[:, m:]).T
    assert_close(wave.real, positive_features(q, w) @ positive_features(k, w).T, rtol=1e-12)
    assert not np.allclose((left @ right.T).real, wave.real, rtol=1e-3)  # not the same estimate


@given(seed=seeds)
def test_hyperbolic_features_are_positive_ones_of_w_and_of_minus_w(xp: Any, seed: int) -> None:
    q, k = pair(seed, 3)
    w = gaussian_matrix(5, 3, Rng(seed), "float64")

    def estimate(features: Features, w: Any) -> Any:
        return host(ops.sum(features(q, w) * features(k, w)))

    both = (estimate(positive_features, w) + estimate(positive_features, -w)) / 2
    assert_close(estimate(hyperbolic_features, w), both, rtol=1e-12)
    assert_close(estimate(hyperbolic_features, -w), both, rtol=1e-12)
    assert_close(estimate(positive_features, xp.concatenate([w, -w])), both, rtol=1e-12)
    a, b, u = host(q)[0], host(k)[0], host(w)
    cosh = math.exp(-(a @ a + b @ b) / 2) * np.cosh(u @ (a + b)).mean()
    assert_close(both, cosh, rtol=1e-12)


@given(seed=seeds, scale=st.floats(0.0, 8.0))
def test_all_but_trigonometric_estimates_are_positive(xp: Any, seed: int, scale: float) -> None:
    x = scale * Rng(seed).normal((6, 4), dtype="float64")
    w = gaussian_matrix(3, 4, Rng(seed + 1), "float64")
    for features in (positive_features, hyperbolic_features, oprf, exponential_features):
        assert host(features(x, w)).min() > 0.0


def test_trigonometric_estimates_can_be_negative(xp: Any) -> None:
    q, k = xp.asarray([[1.0, 0.0]]), xp.asarray([[-1.0, 0.0]])
    w = xp.full((4, 2), math.pi / 2)
    estimate = ops.sum(trigonometric_features(q, w) * trigonometric_features(k, w))
    assert_close(estimate, -math.e, rtol=1e-12)


@given(seed=seeds, order=st.permutations(range(7)))
def test_the_order_of_the_rows_does_not_matter(xp: Any, seed: int, order: list[int]) -> None:
    q, k = pair(seed, 3)
    w = orthogonal_matrix(7, 3, Rng(seed), dtype="float64")
    mixed = xp.asarray(host(w)[order])
    for features, _ in SOFTMAX.values():
        seen, wanted = (host(ops.sum(features(q, v) * features(k, v))) for v in (mixed, w))
        assert_close(seen, wanted, rtol=1e-12)


@given(seed=seeds)
def test_both_ways_to_divide_by_the_root_of_d(xp: Any, seed: int) -> None:
    """The same target exp(q·k/√d) and another variance: less where the scaled ‖q + k‖ is less."""
    d = 4
    q, k = pair(seed, d, longest=2.0)
    ways = [(q * d**-0.25, k * d**-0.25), (q * d**-0.5, k)]
    target = math.exp(float((q * k).sum()) / math.sqrt(d))
    points, weights = gauss(1, 60)
    for a, b in ways:
        axis = (a + b) / ((a + b) ** 2).sum() ** 0.5
        found = weights @ one_row_estimates(positive_features, a, b, xp.asarray(points) * axis)
        assert_close(found, target, rtol=1e-12)
    even, odd = (float(host(mse_positive(a, b, 1))[0]) for a, b in ways)
    lengths = [float(((a + b) ** 2).sum()) for a, b in ways]
    assert (even < odd) == (lengths[0] < lengths[1])


# FAVOR++


@given(s=st.floats(0.0, 50.0), d=st.integers(1, 64))
def test_rho_minimises_the_variance(s: float, d: int) -> None:
    rho = oprf_rho(s, d)
    assert 0.0 < rho <= 1.0
    if s > 1e-3:
        root = math.sqrt((2 * s + d) ** 2 + 8 * d * s)
        assert rho == pytest.approx((root - 2 * s - d) / (4 * s), rel=1e-6)

    def log_second_moment(rho: float) -> float:
        return d / 2 * math.log((1 + rho) ** 2 / (4 * rho)) + rho * s

    for other in (0.99 * rho, min(1.0, 1.01 * rho)):
        assert log_second_moment(rho) <= log_second_moment(other) + 1e-13


def test_oprf_without_a_length_is_positive_features(xp: Any) -> None:
    x, w = Rng(0).normal((5, 4), dtype="float64"), gaussian_matrix(6, 4, Rng(1), "float64")
    assert oprf_rho(0.0, 4) == 1.0
    assert_close(oprf_features(x, w, 0.0), positive_features(x, w), rtol=1e-13)
    q, k = pair(1, 4)
    assert_close(mse_oprf(q, k, 3, 0.0), host(mse_positive(q, k, 3)), rtol=1e-13)


@given(seed=seeds)
def test_oprf_errs_less_than_positive_features(xp: Any, seed: int) -> None:
    q, k = pair(seed, 8, longest=2.0)
    z2 = float(((q + k) ** 2).sum())
    best = float(host(mse_oprf(q, k, 1, z2))[0])
    assert best <= float(host(mse_positive(q, k, 1))[0])
    assert best <= float(host(mse_oprf(q, k, 1, 1.3 * z2))[0])


def test_how_much_oprf_gains(xp: Any) -> None:
    """At ‖z‖² = 2.64 and d = 8: from 13.0 of SM² a row to 5.0."""
    q = xp.zeros((1, 8))
    q[0, 0] = math.sqrt(2.64)
    k = xp.zeros((1, 8))  # SM = 1
    assert float(host(mse_positive(q, k, 1))[0]) == pytest.approx(13.01, abs=0.01)
    assert float(host(mse_oprf(q, k, 1, 2.64))[0]) == pytest.approx(5.00, abs=0.01)


def test_a_mean_square_below_0_is_refused(xp: Any) -> None:
    """A complex ρ would be the alternative; a number of NumPy's is a number like any other."""
    x, w = xp.ones((2, 3), dtype="float32"), xp.ones((4, 3), dtype="float32")
    with pytest.raises(ValueError, match=r"at least 0.*got -1\.0"):
        oprf_features(x, w, -1)
    assert oprf_features(x, w, np.float64(1.5)).dtype == "float32"


def test_s_may_be_an_array_per_head(xp: Any) -> None:
    x, w = Rng(0).normal((2, 5, 4), dtype="float64"), gaussian_matrix(6, 4, Rng(1), "float64")
    s = xp.asarray([0.5, 2.0]).reshape(2, 1, 1)
    seen = host(oprf_features(x, w, s))
    for head, number in enumerate((0.5, 2.0)):
        assert_close(seen[head], host(oprf_features(x[head], w, number)), rtol=1e-13)
    assert oprf_features(x.astype("float32"), w, s).dtype == xp.float32
    assert oprf_features(x.astype("float32"), w, 2).dtype == xp.float32


# Generalised attention


def test_relu_features_have_the_arc_cosine_kernel(xp: Any) -> None:
    """In the plane of q and k: E r² = 2 times a mean over the angle of w."""
    x, weight = np.polynomial.legendre.leggauss(40)
    q = xp.asarray([[1.3, 0.0]])
    for t in (0.0, 0.4, 1.5, 2.9, math.pi):
        k = xp.asarray([[0.7 * math.cos(t), 0.7 * math.sin(t)]])
        width = math.pi - t  # w·q and w·k are both positive for angles in (t − π/2, π/2)
        angle = (t - math.pi / 2) + width * (x + 1) / 2
        w = xp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1))

        def relu(x: Any, w: Any) -> Any:
            return generalized_features(x, w, eps=0.0)

        found = one_row_estimates(relu, q, k, w)
        mean = 2.0 * (weight @ found) * width / 2 / (2 * math.pi)
        assert_close(host(arc_cosine_kernel(q, k))[0], mean, rtol=1e-10, atol=1e-15)
    assert_close(arc_cosine_kernel(q, 0.0 * q), np.zeros(1), atol=0.0)
    assert_close(arc_cosine_kernel(q, q), host((q * q).sum(axis=-1)) / 2, rtol=1e-7)


def test_the_arc_cosine_kernel_has_a_slope_for_parallel_vectors(xp: Any) -> None:
    """The gradient in q is k (π − t) / 2π + q ‖k‖/‖q‖ sin t / 2π: k/2 at t = 0, and 0 at t = π."""
    rng = Rng(3)
    q = Tensor(rng.normal((500, 3), dtype="float32"), requires_grad=True)
    for c in (1.0, 3.0, -2.0):
        k = c * q.data
        y = arc_cosine_kernel(q, k)
        assert_close(y, max(c, 0.0) / 2 * (host(q) ** 2).sum(axis=-1), rtol=1e-5, atol=1e-6)
        (slope,) = grad(y.sum(), [q])
        assert_close(slope, host(k) / 2 if c > 0 else 0.0, rtol=2e-3, atol=2e-3)
    zero = Tensor(xp.zeros((1, 3)), requires_grad=True)
    (slope,) = grad(arc_cosine_kernel(zero, xp.ones((1, 3))).sum(), [zero])
    assert not host(slope).any()
    k = 0.7 * rng.normal((4, 3), dtype="float64")
    check_grads(arc_cosine_kernel, rng.normal((4, 3), dtype="float64"), k)


@pytest.mark.parametrize("law", [gaussian_matrix, orthogonal_matrix, jittered_matrix])
def test_sampled_relu_features(xp: Any, law: Any) -> None:
    q, k = pair(2, 8)
    w = law(8_000, 8, Rng(3), dtype="float64")
    found = host(ops.sum(generalized_features(q, w, eps=0.0) * generalized_features(k, w, eps=0.0)))
    a, b = host(q)[0], host(k)[0]
    most = 1.5 * (a @ a) * (b @ b)  # E relu² relu² ≤ √(E relu⁴ E relu⁴) = 3/2 ‖q‖² ‖k‖²
    assert abs(found - host(arc_cosine_kernel(q, k))[0]) < 5.0 * math.sqrt(most / 8_000)


def test_kernels_of_generalised_attention(xp: Any) -> None:
    x, w = Rng(0).normal((2, 5, 4), dtype="float64"), gaussian_matrix(6, 4, Rng(1), "float64")
    wx = host(x) @ host(w).T
    defined = {
        "relu": np.maximum(wx, 0.0), "sigmoid": 1 / (1 + np.exp(-wx)), "exp": np.exp(wx),
        "abs": np.abs(wx), "gelu": wx * scipy.special.ndtr(wx), "cos": np.cos(wx),
        "tanh": np.tanh(wx), "identity": wx,
    }  # fmt: skip
    assert defined.keys() == KERNELS.keys()
    for name, wanted in defined.items():
        seen = generalized_features(x, w, KERNELS[name], eps=0.01)
        assert_close(seen, wanted / math.sqrt(6) + 0.01, rtol=1e-10, atol=1e-12)
    assert_close(generalized_features(x, w), defined["relu"] / math.sqrt(6) + 1e-3, rtol=1e-12)
    bare = generalized_features(x, f=KERNELS["identity"], eps=0.0)
    assert np.array_equal(host(bare), host(x))
    assert_close(generalized_features(x, f=ops.exp, eps=0.0), np.exp(host(x)), rtol=1e-12)


def test_exponential_features_are_generalised_ones_and_positive_ones_but_for_the_norm(
    xp: Any,
) -> None:
    x, w = Rng(0).normal((5, 4), dtype="float64"), gaussian_matrix(6, 4, Rng(1), "float64")
    frozen = exponential_features(x, w)
    assert_close(frozen, host(generalized_features(x, w, ops.exp, eps=0.0)), rtol=1e-13)
    factor = host(ops.exp(-0.5 * (x * x).sum(axis=-1, keepdims=True)))
    assert_close(positive_features(x, w), host(frozen) * factor, rtol=1e-12)


def test_relu_without_epsilon_can_leave_nothing(xp: Any) -> None:
    x, w = xp.ones((1, 3)), -xp.ones((4, 3))
    assert host(generalized_features(x, w, eps=0.0)).max() == 0.0
    assert host(generalized_features(x, w)).min() == 1e-3
    assert generalized_features(x.astype("float32"), w, eps=np.float64(0.1)).dtype == "float32"


# Sampling


@pytest.mark.parametrize("law", [gaussian_matrix, orthogonal_matrix, jittered_matrix])
@each
def test_sampled_estimates_are_unbiased(xp: Any, kind: str, law: Any) -> None:
    """Of blocks of any of these laws; the standard error is that of independent rows."""
    features, mse = SOFTMAX[kind]
    m, d = 8_000, 8
    q, k = pair(7, d, longest=0.9)
    w = law(m, d, Rng(11), dtype="float64")
    found, sm = host(ops.sum(features(q, w) * features(k, w))), host(ops.exp((q * k).sum()))
    assert abs(found - sm) < 5.0 * math.sqrt(float(host(mse(q, k, m))[0]))


def test_sampled_squares_of_the_error(xp: Any) -> None:
    """One row each; E e^{n w·z} = e^{n²‖z‖²/2} gives the standard error of the square."""
    count, d = 40_000, 4
    q, k = pair(7, d, longest=0.35)
    w = gaussian_matrix(count, d, Rng(12), "float64")
    sm = float(host(ops.exp((q * k).sum())))
    z2 = float(((q + k) ** 2).sum())
    assert z2 < 0.7
    ratio = one_row_estimates(positive_features, q, k, w) / sm
    x = [math.exp(n * (n - 1) * z2 / 2) for n in range(5)]  # E ratioⁿ
    square, fourth = x[2] - 1.0, x[4] - 4 * x[3] + 6 * x[2] - 3.0
    assert_close(host(mse_positive(q, k, 1))[0], square * sm * sm, rtol=1e-12)
    error = math.sqrt((fourth - square * square) / count)
    assert abs(((ratio - 1.0) ** 2).mean() - square) < 5.0 * error


# Edges


def test_a_zero_vector_has_one_feature_value(xp: Any) -> None:
    zero, w = xp.zeros((1, 4)), gaussian_matrix(6, 4, Rng(0), "float64")
    assert_close(positive_features(zero, w), np.full((1, 6), 6**-0.5), rtol=1e-14)
    assert_close(hyperbolic_features(zero, w), np.full((1, 12), 12**-0.5), rtol=1e-14)
    for features in (positive_features, hyperbolic_features, trigonometric_features):
        assert_close(ops.sum(features(zero, w) ** 2), 1.0, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [50.0, 1e4])
def test_long_vectors_stay_finite_in_the_log_domain(xp: Any, dtype: str, length: float) -> None:
    x = Rng(0).normal((5, 16), dtype=dtype)
    x = x * (length / (x * x).sum(axis=-1, keepdims=True) ** 0.5)
    w = gaussian_matrix(64, 16, Rng(1), dtype)
    for log_features in (
        positive_log_features,
        hyperbolic_log_features,
        exponential_log_features,
        lambda x, w: oprf_log_features(x, w, length * length),
    ):
        assert np.isfinite(host(log_features(x, w))).all()
    most = np.exp((host(w).astype("float64") ** 2).sum(1) / 2) / 8
    assert (host(positive_features(x, w)) <= most * (1 + 1e-5)).all()
    for shorter in (0.05, 0.3, 1.0):
        assert (host(positive_features(shorter * x, w)) <= most * (1 + 1e-3)).all()


def test_one_exponent_is_what_keeps_long_vectors_finite(xp: Any) -> None:
    """e^{w·x} = e^{120} is inf in float32 where e^{w·x − ‖x‖²/2} = e^{48} is a number."""
    x = xp.asarray([[12.0, 0.0]], dtype="float32")
    w = xp.asarray([[10.0, 0.0]], dtype="float32")
    assert_close(positive_features(x, w), np.full((1, 1), math.exp(48.0)), rtol=1e-4)
    with np.errstate(over="ignore"):
        assert np.isinf(host(exponential_features(x, w))).all()


@each
def test_shapes_precisions_and_what_does_not_fit(xp: Any, kind: str) -> None:
    features, _ = SOFTMAX[kind]
    w = gaussian_matrix(3, 4, Rng(0), "float64")
    for shape in ((4,), (0, 4), (2, 1, 4), (0, 5, 4)):
        for dtype in ("float32", "float64"):
            phi = features(xp.zeros(shape, dtype), w)
            assert phi.shape[:-1] == shape[:-1] and phi.shape[-1] in (3, 6)
            assert phi.dtype == dtype
    one = features(xp.ones((2, 1)), xp.ones((1, 1)))
    assert one.shape[0] == 2
    for x, bad in ((xp.ones((2, 3)), w), (xp.ones((2, 4)), w[0]), (xp.ones(()), w)):
        with pytest.raises(ValueError, match="take x"):
            features(x, bad)


@each
def test_gradients(xp: Any, kind: str) -> None:
    features, _ = SOFTMAX[kind]
    x, w = 0.7 * Rng(0).normal((2, 3, 2), dtype="float64"), gaussian_matrix(4, 2, Rng(1), "float64")
    check_grads(features, x, w)


def test_gradients_of_the_others(xp: Any) -> None:
    x, w = 0.7 * Rng(0).normal((3, 2), dtype="float64"), gaussian_matrix(4, 2, Rng(1), "float64")
    check_grads(exponential_features, x, w)
    check_grads(generalized_features, x, w)
    check_grads(lambda x, w: fourier_features(x, w, 0.8), x, w)
    check_grads(lambda x, w, s: oprf_log_features(x, w, s), x, w, xp.asarray([[1.5]]))
    check_grads(mse_trigonometric, x, x[::-1] * 0.5, 3)
    check_grads(mse_orthogonal, x, x[::-1] * 0.5, 3, 40)


def test_a_projection_is_trained_where_it_is_a_tensor_and_not_where_it_is_an_array(
    xp: Any,
) -> None:
    x = Tensor(Rng(0).normal((3, 2)), requires_grad=True)
    w = Tensor(gaussian_matrix(4, 2, Rng(1), "float64"), requires_grad=True)
    gx, gw = grad(exponential_features(x, w).sum(), [x, w])
    assert gx.dtype == xp.float32 and gw.dtype == xp.float64
    assert np.abs(host(gw)).min() > 0.0


# Released code, for one and the same projection


@pytest.fixture
def inputs(xp: Any) -> tuple[Any, Any]:
    return xp.asarray(GOLDEN["x"]), xp.asarray(GOLDEN["w"])


def test_performer_pytorch(inputs: Any) -> None:
    """Its features are ours over the largest e^{w·x}, plus ε; its generalised ones lack m^{−½}."""
    x, w = inputs
    m, d = w.shape
    scaled = x * d**-0.25
    log, wx = host(positive_log_features(scaled, w)), host(scaled @ w.T)
    for part, axes in (("query", -1), ("key", (-1, -2))):
        wanted = np.exp(log - wx.max(axes, keepdims=True)) + 1e-4 / math.sqrt(m)
        assert_close(GOLDEN[f"performer.{part}"], wanted, rtol=1e-12)
    for part, f in (("relu", ops.relu), ("gelu", ops.gelu)):
        ours = host(generalized_features(scaled, w, f, eps=0.0)) * math.sqrt(m) + 1e-3
        assert_close(ours, GOLDEN[f"performer.{part}"], rtol=1e-12)
    assert_close(generalized_features(scaled), GOLDEN["performer.bare"], rtol=1e-12)


def test_fast_transformers(inputs: Any) -> None:
    """Its Favor is our hyperbolic map; its Fourier features lack e^{‖x‖²/2}."""
    x, w = inputs
    assert_close(hyperbolic_features(x * 0.5**0.5, w), GOLDEN["fast.favor"], rtol=1e-12)
    gaussian = (
        host(trigonometric_features(x, w)) * np.exp(-0.5 * (GOLDEN["x"] ** 2).sum(-1))[..., None]
    )
    assert_close(gaussian, GOLDEN["fast.rbf"], rtol=1e-12, atol=1e-15)
    assert_close(GOLDEN["fast.smoothed"][..., :-1], gaussian, rtol=1e-12, atol=1e-15)
    assert (GOLDEN["fast.smoothed"][..., -1] == 1.0).all()
    ours = host(generalized_features(x, w, eps=0.0)) * math.sqrt(len(GOLDEN["w"]))
    assert_close(ours, GOLDEN["fast.generalized"], rtol=1e-12, atol=1e-15)


def test_scikit_learn(inputs: Any) -> None:
    """RBFSampler draws one phase a row; phases 0 and −π/2 make it our pair of cosine and sine."""
    x, w = inputs
    rows = x.reshape(-1, x.shape[-1])
    gaussian = host(trigonometric_features(rows, w)) * np.exp(
        -0.5 * (host(rows) ** 2).sum(-1, keepdims=True)
    )
    theirs = np.concatenate([GOLDEN["sklearn.0"], GOLDEN["sklearn.1"]], -1) / math.sqrt(2.0)
    assert_close(gaussian, theirs, rtol=1e-12, atol=1e-15)
