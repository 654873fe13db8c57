"""Moments under N(0, 1), against closed forms and other integrators, and what they predict."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, ops
from mini_nn.nn import functional as F
from mini_nn.nn.gaussian import (
    correlation_map,
    expectation,
    gain,
    gaussian_moments,
    second_moment_map,
    selu_constants,
    stability,
)
from tests.support import assert_close, host

TABLE: dict[str, tuple[Any, float, float, float, float]] = {
    "relu": (F.relu, 0.3989422804, 0.5, 1.4142135624, 1.0),
    "sigmoid": (F.sigmoid, 0.5, 0.2933790359, 1.8462285453, 0.1063),
    "tanh": (F.tanh, 0.0, 0.3942944904, 1.5925374197, 0.4611),
    "erf": (ops.erf, 0.0, 0.4645590544, 1.4671669505, 0.4086),
    "elu": (F.elu, 0.1605205723, 0.6449454175, 1.2451983007, 0.8910),
    "selu": (F.selu, 0.0, 1.0, 1.0, 0.7826),
    "softplus": (F.softplus, 0.8060591833, 0.9212459089, 1.0418668355, 0.4921),
    "gelu": (F.gelu, 0.2820947918, 0.4252214826, 1.5335304412, 1.1441),
    "gelu_tanh": (lambda x: F.gelu(x, "tanh"), 0.2820385881, 0.4251937110, 1.5335805217, 1.1443),
    "silu": (F.silu, 0.2066209641, 0.3557755198, 1.6765324703, 1.1726),
    "mish": (F.mish, 0.2404038884, 0.4523421924, 1.4868475813, 1.0763),
}
STABLE, UNSTABLE = ("sigmoid", "tanh", "erf", "selu"), ("gelu", "silu", "mish")


# Moments


@pytest.mark.parametrize("name", TABLE)
def test_constants(name: str) -> None:
    """The published table, to all of its digits."""
    f, mean, square, factor, slope = TABLE[name]
    got = *gaussian_moments(f), gain(f), stability(f)
    for value, want, digits in zip(
        got, (mean, square, factor, slope), (10, 10, 10, 4), strict=True
    ):
        assert abs(value - want) <= 0.51 * 10.0**-digits


def test_closed_forms() -> None:
    """Where the integral is known: ReLU, erf and GELU."""
    pi = math.pi
    known = [
        (gaussian_moments(F.relu), (1 / math.sqrt(2 * pi), 0.5)),
        (gaussian_moments(ops.erf), (0.0, 2 / pi * math.asin(2 / 3))),
        (gaussian_moments(F.gelu), (0.5 / math.sqrt(pi), 1 / 3 + 0.5 / (math.sqrt(3) * pi))),
        (gaussian_moments(F.leaky_relu), (0.99 / math.sqrt(2 * pi), 0.5 + 0.5e-4)),
        (gaussian_moments(lambda z: z), (0.0, 1.0)),
        (gaussian_moments(lambda z: z * z), (1.0, 3.0)),
    ]
    for got, want in known:
        assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("at", [0.0, 0.37, -1.0, 2.5])
def test_kinks_and_jumps_wherever_they_are(at: float) -> None:
    """Gauss-Hermite, which does not see them, is wrong from the fourth digit on."""
    assert_close(expectation(lambda z: (z > at) * 1.0), 0.5 * math.erfc(at / 2**0.5), rtol=1e-12)
    density = math.exp(-at * at / 2) / math.sqrt(2 * math.pi)
    hinge = density - at * 0.5 * math.erfc(at / 2**0.5)
    assert_close(expectation(lambda z: F.relu(z - at)), hinge, rtol=1e-12)
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    hermite = (weight * (node > at)).sum() / math.sqrt(2 * math.pi)
    assert at == 0.0 or abs(hermite - 0.5 * math.erfc(at / 2**0.5)) > 1e-4


@given(st.floats(0.01, 300.0))
def test_steep_functions(steep: float) -> None:
    """The second moment of erf(a z) is (2/π) arcsin(2a² / (1 + 2a²)), also for a step."""
    ratio = 2 * steep**2 / (1 + 2 * steep**2)
    got = gaussian_moments(lambda z: ops.erf(steep * z))[1]
    assert_close(got, 2 / math.pi * math.asin(ratio), rtol=1e-11)


def test_another_integrator() -> None:
    def integrand(z: float) -> float:
        return math.tanh(z) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    want = 2 * scipy.integrate.quad(integrand, 0, np.inf, epsabs=1e-13, epsrel=1e-13)[0]
    assert_close(gaussian_moments(F.tanh)[1], want, rtol=1e-12)


def test_constants_of_selu() -> None:
    """From the closed form; the literals that the library uses are these numbers."""
    scale, alpha = selu_constants()
    assert_close(scale, F.activation.SELU_SCALE, rtol=1e-15)
    assert_close(alpha, F.activation.SELU_ALPHA, rtol=1e-15)
    mean, square = gaussian_moments(F.selu)
    assert abs(mean) < 1e-12 and abs(square - 1) < 1e-12
    rounded = gaussian_moments(lambda z: 1.05 * F.elu(z, 1.67))  # two digits are not enough
    assert abs(rounded[1] - 1) > 1e-3


# Maps from layer to layer


@pytest.mark.parametrize("name", TABLE)
def test_second_moment_map(name: str) -> None:
    """F(1) = 1, its slope there is ``stability``, and F(0) = f(0)² / E f²."""
    f = TABLE[name][0]
    assert_close(second_moment_map(f, 1.0), 1.0, rtol=1e-13)
    h = 1e-4
    slope = (second_moment_map(f, 1 + h) - second_moment_map(f, 1 - h)) / (2 * h)
    assert_close(stability(f), slope, rtol=1e-7)
    at_0 = float(f(np.zeros(1))[0]) ** 2 * gain(f) ** 2
    assert_close(second_moment_map(f, 0.0), at_0, rtol=1e-12, atol=1e-14)


@given(st.floats(1e-3, 1e3), st.floats(-0.5, 0.5))
def test_homogeneous_functions_have_a_neutral_map(v: float, slope: float) -> None:
    assert_close(second_moment_map(lambda z: F.leaky_relu(z, slope), v), v, rtol=1e-12)


@given(st.floats(-1.0, 1.0))
def test_correlation_map_in_closed_form(c: float) -> None:
    """ReLU: the arc-cosine kernel of degree 1; erf: Williams' kernel; sign: of degree 0."""
    arc = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    assert_close(correlation_map(F.relu, c), arc, rtol=1e-10, atol=1e-12)
    assert_close(
        correlation_map(ops.erf, c), math.asin(2 * c / 3) / math.asin(2 / 3), rtol=1e-10, atol=1e-12
    )
    assert_close(correlation_map(np.sign, c), 2 / math.pi * math.asin(c), rtol=1e-7, atol=1e-9)
    assert_close(correlation_map(lambda z: z, c), c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["gelu", "tanh", "elu", "sigmoid"])
def test_correlation_map_by_hermite_polynomials(name: str) -> None:
    """E f(u₁) f(u₂) = Σ aₖ² cᵏ with aₖ = E f hₖ, hₖ orthonormal under N(0, 1) (Mehler)."""
    f = TABLE[name][0]

    def coefficient(k: int) -> float:
        one = [0.0] * k + [1.0 / math.sqrt(math.factorial(k))]
        return expectation(lambda z: f(z) * np.polynomial.hermite_e.hermeval(z, one))

    squares = [coefficient(k) ** 2 for k in range(25)]
    for c in (-0.5, 0.0, 0.2, 0.5):
        series = sum(a * c**k for k, a in enumerate(squares)) * gain(f) ** 2
        assert_close(correlation_map(f, c), series, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", TABLE)
def test_ends_of_the_correlation_map(name: str) -> None:
    """1 to 1, and 0 to (E f)² / E f²: not 0 for a function with a mean, so cosines grow."""
    f, mean, square, *_ = TABLE[name]
    assert_close(correlation_map(f, 1.0), 1.0, rtol=1e-12)
    assert_close(correlation_map(f, 0.0), mean**2 / square, rtol=1e-9, atol=1e-12)
    near = correlation_map(f, 1.0 - 1e-9)
    assert_close(near, 1.0, atol=1e-6)


def test_kinks_elsewhere_in_two_dimensions() -> None:
    """hardtanh, whose kinks are at ±1, by conditional expectations in closed form."""
    c = 0.3
    s = math.sqrt(1 - c * c)

    def inner(z: Any) -> Any:  # E hardtanh(c z + s x) over x
        low, high = (-1 - c * z) / s, (1 - c * z) / s
        cdf = [0.5 * (1 + ops.erf(b / math.sqrt(2))) for b in (low, high)]
        pdf = [np.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in (low, high)]
        return 1 - cdf[1] - cdf[0] + c * z * (cdf[1] - cdf[0]) - s * (pdf[1] - pdf[0])

    want = expectation(lambda z: F.hardtanh(z) * inner(z)) * gain(F.hardtanh) ** 2
    assert_close(correlation_map(F.hardtanh, c), want, rtol=1e-7)


def test_cosines_collapse_although_second_moments_stay() -> None:
    """50 layers: ReLU and sigmoid make all inputs alike; tanh and SELU, of mean 0, do not."""

    def after(name: str, c: float) -> float:
        for _ in range(50):
            c = min(correlation_map(TABLE[name][0], c), 1.0)
        return c

    assert after("relu", 0.0) > 0.97 and after("sigmoid", 0.0) > 0.9999
    assert after("tanh", 0.5) < 0.05 and after("selu", 0.5) < 0.2
    for name in ("relu", "sigmoid", "tanh", "selu"):  # which this alone cannot tell apart
        assert stability(TABLE[name][0]) < 1 + 1e-9


def test_selu_contracts() -> None:
    """(mean, variance) → (mean, variance) at (0, 1): spectral radius 0.783 for weights of sum 0.

    That the weights of a unit add up to 0 is needed: with a sum of 1 the radius is above 1.
    """

    def jacobian(total: float, h: float = 1e-5) -> Any:
        def moments(mean: float, var: float) -> Any:
            root = math.sqrt(var)
            m, square = gaussian_moments(lambda z: F.selu(total * mean + root * z))
            return np.array([m, square - m * m])

        columns = [
            (moments(*(np.array([0, 1]) + step)) - moments(*(np.array([0, 1]) - step))) / (2 * h)
            for step in (np.array([h, 0.0]), np.array([0.0, h]))
        ]
        return np.stack(columns, axis=1)

    contracting = jacobian(0.0)
    assert_close(contracting[:, 0], np.zeros(2), atol=1e-10)
    assert_close(contracting[:, 1], np.array([0.088834, 0.782648]), rtol=1e-5)
    assert max(abs(np.linalg.eigvals(contracting))) < 0.79
    assert max(abs(np.linalg.eigvals(jacobian(1.0)))) > 1.05


# Depth: real matrices


WIDTH, DEPTH, SAMPLES = 512, 50, 128


@pytest.fixture(scope="module")
def second_moments(xp: Any) -> dict[str, Any]:
    """The second moment of each sample after each layer, (layers, samples), for each function.

    Weights are N(0, 1/width).  Every sample has a network of its own for the price of one: the
    inputs of a layer get signs s of their own, and W diag(s) is as random as W, and uncorrelated
    with the matrices of the other samples.
    """
    rng = Rng(0)
    names = [name for name in TABLE if name != "gelu_tanh"]
    x = xp.stack([rng.normal((SAMPLES, WIDTH))] * len(names))
    rows = []
    for _ in range(DEPTH):
        w = rng.normal((WIDTH, WIDTH), std=WIDTH**-0.5)
        signs = 2.0 * rng.bernoulli(0.5, (SAMPLES, WIDTH)).astype("float32") - 1.0
        h = (x * signs).reshape(-1, WIDTH) @ w
        h = h.reshape(x.shape)
        rows.append(host((h * h).mean(axis=-1)))
        x = xp.stack([gain(TABLE[n][0]) * TABLE[n][0](h[i]) for i, n in enumerate(names)])
    seen = np.stack(rows, axis=1).astype("float64")
    return dict(zip(names, seen, strict=True))


@pytest.mark.parametrize("name", [n for n in TABLE if n != "gelu_tanh"])
def test_each_layer_follows_the_map(second_moments: dict[str, Any], name: str) -> None:
    """v ← F(v), within 5 % in every layer, for stable and unstable functions alike.

    The mean of f² over 512 units deviates by √((E f⁴ / (E f²)² − 1) / 512), at most 11 %, in one
    network, so by 1 % in the mean of 128.
    """
    v = second_moments[name]
    grid = np.arange(np.log(v.min()) - 0.3, np.log(v.max()) + 0.3, 0.25)
    ratios = [second_moment_map(TABLE[name][0], math.exp(t)) / math.exp(t) for t in grid]
    predicted = v[:-1] * np.interp(np.log(v[:-1]), grid, ratios)
    assert np.abs((v[1:] / predicted).mean(axis=1) - 1).max() < 0.05


@pytest.mark.parametrize("name", STABLE)
def test_contracting_functions_stay_at_1(second_moments: dict[str, Any], name: str) -> None:
    v = second_moments[name]
    assert np.abs(v.mean(axis=1) - 1).max() < 0.05
    assert np.median(np.abs(np.log(v[-1]))) < 0.2


@pytest.mark.parametrize("name", UNSTABLE)
def test_expanding_functions_pass_one_layer_and_fail_fifty(
    second_moments: dict[str, Any], name: str
) -> None:
    """A test of one layer finds nothing wrong with corrected GELU, SiLU and Mish."""
    v = second_moments[name]
    assert abs(v[1].mean() - 1) < 0.05
    assert np.median(np.abs(np.log(v[-1]))) > math.log(2.0)
    assert v[-1].max() > 10.0 and v[-1].min() < 0.5


# Wrong use


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no gain"):
        gain(lambda z: 0.0 * z)
    with pytest.raises(ValueError, match="at least 0"):
        second_moment_map(F.tanh, -1.0)
    for c in (-1.5, 1.0001, math.nan):
        with pytest.raises(ValueError, match="correlation"):
            correlation_map(F.tanh, c)
