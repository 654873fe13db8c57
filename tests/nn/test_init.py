"""Initialisers: the variances and bounds they promise, exactly or within 5 standard errors.

A normal statistic leaves 5 standard errors with probability 5.7e-7, 6 with 2e-9; seeds are fixed,
and where many statistics are compared at once 6 are allowed, so each test's rate of false alarms is
below 1e-6.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import scipy.integrate
import scipy.special
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, manual_seed, nn
from mini_nn.nn import Parameter, init
from mini_nn.nn import functional as F
from mini_nn.rng import _truncated_quantile
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "init.safetensors", framework="np"
) as _file:
    ARRAYS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118
    FANS, GAINS, LAWS, SIGNATURES = (
        json.loads(_file.metadata()[part]) for part in ("fans", "gains", "laws", "signatures")
    )

KEPT_STD = 0.87962566103423978
"""Of a standard normal truncated at ±2: the constant in Keras and JAX."""

WIDER = 2.2736944687
"""The bound of the corrected one in units of its standard deviation: 2 / KEPT_STD."""


def empty(xp: Any, *shape: int, dtype: str = "float64") -> Any:
    return xp.full(shape, xp.nan, dtype)


def has_moments(x: Any, mean: float, std: float, kurtosis: float, errors: float = 5.0) -> None:
    """Sample mean and variance within so many standard errors, in closed form."""
    seen, n = host(x).astype("float64"), x.size
    assert abs(seen.mean() - mean) < errors * std / math.sqrt(n)
    var = ((seen - mean) ** 2).mean()
    assert abs(var - std**2) < errors * std**2 * math.sqrt((kurtosis - 1.0) / n)


# Fans


@pytest.mark.parametrize("row", FANS, ids=lambda row: "x".join(map(str, row[0])))
def test_fans_are_torchs(row: Any) -> None:
    shape, fan_in, fan_out = row
    assert init.fans(shape) == (fan_in, fan_out)
    assert init.fans([shape[1], shape[0], *shape[2:]], "in_out") == (fan_in, fan_out)
    if len(shape) > 2:
        assert init.fans(shape, "conv") == (fan_in, fan_out)


@pytest.mark.parametrize("groups", [1, 2])
def test_fans_count_connections(xp: Any, groups: int) -> None:
    """With ones everywhere an output counts its inputs, and an input's gradient its outputs."""
    x = Tensor(xp.ones((1, 4, 9, 9)), requires_grad=True)
    convolutions = [
        (F.conv2d, (6, 4 // groups, 3, 2), "conv"),
        (F.conv_transpose2d, (4, 6 // groups, 3, 2), "in_out"),
    ]
    for convolve, shape, layout in convolutions:
        y = convolve(x, xp.ones(shape), groups=groups)
        (reached,) = mini_nn.grad(y.sum(), x)
        counted = float(host(y)[0, 0, 4, 4]), float(host(reached)[0, 0, 4, 4])
        assert init.fans(shape, layout, groups) == counted
        assert (init.fans(shape, layout) == counted) == (groups == 1)  # torch's, without groups


def test_both_layouts_of_a_matrix_get_the_same_law(xp: Any) -> None:
    for fill in (init.lecun_normal_, init.fan_out_uniform_, init.kaiming_uniform_):
        one = host(fill(empty(xp, 6, 4), rng=Rng(1))).ravel()
        other = host(fill(empty(xp, 4, 6), layout="in_out", rng=Rng(1))).ravel()
        assert np.array_equal(one, other)
        assert not np.array_equal(one, host(fill(empty(xp, 4, 6), rng=Rng(1))).ravel())


# The law and its instances, against torch


class Noted(Rng):
    """A generator that notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[float] = []

    def normal(self, shape: Any = (), mean: float = 0, std: float = 1, dtype: Any = "f4") -> Any:
        self.asked += [mean, std]
        return super().normal(shape, mean, std, dtype)

    def uniform(self, shape: Any = (), low: float = 0, high: float = 1, dtype: Any = "f4") -> Any:
        self.asked += [low, high]
        return super().uniform(shape, low, high, dtype)


def test_laws_are_torchs(xp: Any) -> None:
    for name, options, shape, asked in LAWS:
        rng = Noted()
        getattr(init, name)(empty(xp, *shape), **options, rng=rng)
        assert rng.asked == pytest.approx(asked, rel=1e-15), (name, options, shape)


def test_gains_are_torchs() -> None:
    for name, param, gain in GAINS:
        assert init.calculate_gain(name, param) == pytest.approx(gain, rel=1e-15)
    with pytest.raises(ValueError, match="gelu"):
        init.calculate_gain("gelu")


def test_which_gains_are_exact() -> None:
    """ReLU's and the linear one solve gain² E f(z)² = 1; tanh, sigmoid and SELU have heuristics."""
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    functions: dict[str, Callable[[Any], Any]] = {
        "linear": lambda z: z,
        "relu": lambda z: np.maximum(z, 0.0),
        "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
        "tanh": np.tanh,
        "sigmoid": scipy.special.expit,
        "selu": lambda z: scale * np.where(z > 0, z, alpha * np.expm1(z)),
    }
    exact = {n: float((weights * f(z) ** 2).sum()) ** -0.5 for n, f in functions.items()}
    off = {n: init.calculate_gain(n) / gain for n, gain in exact.items()}
    for name in ("linear", "relu", "leaky_relu"):
        assert off[name] == pytest.approx(1.0, abs=1e-12)
    assert exact["tanh"] == pytest.approx(1.5925374197, abs=1e-9)
    assert exact["sigmoid"] == pytest.approx(1.8462285453, abs=1e-9)
    for name in ("tanh", "sigmoid", "selu"):
        assert abs(off[name] - 1.0) > 0.04


def test_signatures_are_torchs() -> None:
    """Names, order and defaults; the generator is ``rng``, by keyword, and comes last."""
    for name, wanted in SIGNATURES.items():
        ours = inspect.signature(getattr(init, name)).parameters
        torchs = {n: default for n, default in wanted if n != "generator"}
        positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == [*torchs]
        for p in positional:
            default = "required" if p.default is p.empty else p.default
            assert default == torchs[p.name], (name, p.name)
        assert ("rng" in ours) == (len(torchs) < len(wanted))


def test_eye_and_dirac_are_torchs(xp: Any) -> None:
    for name, wanted in ARRAYS.items():
        kind, sizes, *groups = name.split(".")
        w = empty(xp, *map(int, sizes.split("x")), dtype="float32")
        got = init.eye_(w) if kind == "eye" else init.dirac_(w, *map(int, groups))
        assert got is w and np.array_equal(host(w), wanted), name


def test_dirac_passes_each_group_through(xp: Any) -> None:
    x = Rng(0).normal((2, 4, 5, 5), dtype="float64")
    w = init.dirac_(empty(xp, 4, 2, 3, 3), 2)
    assert_close(F.conv2d(x, w, padding=1, groups=2), x)
    with pytest.raises(AssertionError):  # groups forgotten
        assert_close(F.conv2d(x, init.dirac_(empty(xp, 4, 2, 3, 3)), padding=1, groups=2), x)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_the_law(xp: Any, mode: str, distribution: str) -> None:
    """Var(w) = scale / fan for each distribution; the fans are 180 and 360, their mean 270."""
    fan = {"fan_in": 180, "fan_out": 360, "fan_avg": 270}[mode]
    kurtosis = {"normal": 3.0, "uniform": 1.8, "truncated_normal": 2.3655}[distribution]
    w = empty(xp, 40, 20, 3, 3, dtype="float32")
    init.variance_scaling_(w, 1.7, mode, distribution, rng=Rng(3))
    has_moments(w, 0.0, math.sqrt(1.7 / fan), kurtosis)
    with pytest.raises(AssertionError):  # the fan of another mode
        has_moments(w, 0.0, math.sqrt(1.7 / (fan + 90)), kurtosis)


@pytest.mark.parametrize("bits", [32, 64])
def test_uniform_has_its_support_and_variance(xp: Any, bits: int) -> None:
    std = 0.3
    w = init.lecun_uniform_(empty(xp, 1000, 100, dtype=f"float{bits}"), rng=Rng(0))
    has_moments(w, 0.0, 0.1, 1.8)
    bound = np.asarray(math.sqrt(3.0) * 0.1, f"float{bits}")
    assert 0.999 * bound < np.abs(host(w)).max() <= bound
    w = init.uniform_(w, -1.0, std, rng=Rng(0))
    has_moments(w, (std - 1.0) / 2.0, (1.0 + std) / math.sqrt(12.0), 1.8)


def test_normal_and_constants(xp: Any) -> None:
    has_moments(init.normal_(empty(xp, 300, 300), 0.5, 0.02, rng=Rng(0)), 0.5, 0.02, 3.0)
    w = empty(xp, 2, 3)
    for fill, value in ((init.zeros_, 0.0), (init.ones_, 1.0)):
        assert bool((fill(w) == value).all())
    assert bool((init.constant_(w, -2.5) == -2.5).all())
    assert bool((init.normal_(w, 3.0, 0.0) == 3.0).all())


# The truncated normal


def corrected_truncation(x: Any, std: float) -> None:
    """What ±2 truncation with the right variance is: B2 of the article's properties."""
    has_moments(x, 0.0, std, 2.3655)
    assert np.abs(host(x).astype("float64")).max() <= 2.0 * (std / KEPT_STD)
    assert np.abs(host(x)).max() > 2.27 * std


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_corrected_truncated_normal(xp: Any, dtype: str) -> None:
    def draw(**options: Any) -> Any:
        return init.trunc_normal_(empty(xp, 100_000, dtype=dtype), 0.0, 0.02, rng=Rng(0), **options)

    corrected_truncation(draw(corrected=True), 0.02)
    plain = draw()
    has_moments(plain, 0.0, 0.02 * KEPT_STD, 2.3655)
    assert np.abs(host(plain).astype("float64")).max() <= 0.04
    with pytest.raises(AssertionError):  # the factor forgotten: 60 standard errors off
        corrected_truncation(plain, 0.02)
    with pytest.raises(AssertionError):  # absolute bounds: nothing is truncated
        corrected_truncation(draw(a=-2 / 0.02, b=2 / 0.02), 0.02)
    assert pytest.approx(2.0 / KEPT_STD, abs=1e-9) == WIDER


def test_corrected_for_any_interval(xp: Any) -> None:
    """Mean and deviation of the result are those asked for, also where the interval is lopsided."""
    for a, b in ((-1.0, 3.0), (0.5, math.inf), (-math.inf, 0.0), (2.0, 2.5)):
        x = init.trunc_normal_(empty(xp, 50_000), 3.0, 0.5, a, b, corrected=True, rng=Rng(0))
        kurtosis = 3.0 + float(scipy.stats.truncnorm(a, b).stats("k"))
        has_moments(x, 3.0, 0.5, kurtosis)


finite = st.floats(-4.0, 4.0)


@given(finite, st.floats(1e-3, 10.0), finite, finite)
def test_moments_are_scipys(mean: float, std: float, first: float, second: float) -> None:
    a, b = sorted((first, second))
    assume(b - a > 0.05)
    theirs = scipy.stats.truncnorm(a, b, mean, std)
    centre, spread = init.truncated_moments(mean, std, mean + a * std, mean + b * std)
    assert centre == pytest.approx(theirs.mean(), abs=1e-11 * (std + abs(mean)))
    assert spread == pytest.approx(_std_by_quadrature(a, b) * std, rel=1e-9)


def _std_by_quadrature(a: float, b: float) -> float:
    moments = [
        scipy.integrate.quad(
            lambda z, k=k: (z - a) ** k * math.exp((a - z) * (a + z) / 2.0), a, b, epsabs=0.0
        )[0]
        for k in range(3)
    ]
    return math.sqrt(moments[2] / moments[0] - (moments[1] / moments[0]) ** 2)


def test_moments_known_in_closed_form() -> None:
    assert init.truncated_moments() == (0.0, pytest.approx(KEPT_STD, rel=1e-15))
    assert init.truncated_moments(1.0, 2.0, -math.inf, math.inf) == (1.0, 2.0)
    half = math.sqrt(2.0 / math.pi)
    assert init.truncated_moments(0.0, 1.0, 0.0, math.inf) == pytest.approx(
        (half, math.sqrt(1.0 - half * half)), rel=1e-14
    )
    centre, spread = init.truncated_moments(0.0, 1.0, -math.inf, -0.0)
    assert (centre, spread) == pytest.approx((-half, math.sqrt(1.0 - half * half)), rel=1e-14)
    for tail in (1e2, 1e3, 1e6):  # almost exponential with rate a
        centre, spread = init.truncated_moments(0.0, 1.0, tail, math.inf)
        assert (centre - tail) * tail == pytest.approx(1.0 - 2.0 / tail**2, rel=1e-4)
        assert spread * tail == pytest.approx(1.0 - 3.0 / tail**2, rel=1e-6)
    for width in (1e-2, 1e-6):  # almost uniform
        _, spread = init.truncated_moments(0.0, 1.0, 0.5, 0.5 + width)
        assert spread == pytest.approx(width / math.sqrt(12.0), rel=1e-4)


@given(finite, st.floats(1e-3, 10.0), finite, finite, st.integers(0, 2**32))
def test_sample_moments(
    xp: Any, mean: float, std: float, first: float, second: float, seed: int
) -> None:
    """Against the formula, for any interval that keeps a thousandth (6 standard errors)."""
    a, b = sorted((first, second))
    assume(b - a > 1e-3 and scipy.stats.norm.cdf(b) - scipy.stats.norm.cdf(a) > 1e-3)
    x = init.trunc_normal_(empty(xp, 20_000), mean, std, a, b, rng=Rng(seed))
    centre, spread = init.truncated_moments(mean, std, mean + a * std, mean + b * std)
    fourth = ((host(x) - centre) ** 4).mean() / spread**4
    has_moments(x, centre, spread, fourth, errors=6.0)
    assert mean + a * std <= host(x).min() and host(x).max() <= mean + b * std


def lies_as(x: Any, cdf: Callable[[Any], Any]) -> None:
    """Kolmogorov and Smirnov's test, false alarms 1e-6."""
    assert scipy.stats.kstest(host(x).ravel(), cdf).pvalue > 1e-6


@pytest.mark.parametrize(
    ("a", "b"),
    [(-2.0, 2.0), (0.0, 1.0), (-0.5, 3.0), (2.0, 9.0), (-math.inf, -5.0), (6.0, 6.5), (1.0, 1.1)],
)
def test_distribution_is_scipys(a: float, b: float) -> None:
    x = Rng(5).truncated_normal((20_000,), 1.0, 0.3, 1.0 + a * 0.3, 1.0 + b * 0.3, "float64")
    lies_as(x, scipy.stats.truncnorm(a, b, 1.0, 0.3).cdf)
    with pytest.raises(AssertionError):
        lies_as(x, scipy.stats.truncnorm(a, b + 0.2, 1.0 + 0.03, 0.3).cdf)


TAILS = [
    (0.0, 1.0, 6.0, math.inf),
    (0.0, 1.0, -math.inf, -30.0),
    (0.0, 0.02, 3.0, 4.0),
    (5.0, 0.02, -2.0, 2.0),
    (0.0, 1.0, 9e3, math.inf),
    (0.0, 1.0, 2e4, math.inf),
    (0.0, 1.0, 1e5, 1e5 + 2e-5),
    (0.0, 1.0, -1.0, -1.0 + 1e-7),
    (0.0, 1.0, -1e-6, 1e-6),
    (0.0, 1.0, 0.0, 1e-14),
    (-1e7, 1.0, 0.0, math.inf),
    (-1e9, 10.0, 0.0, 1e-9),
    (0.0, 1.0, -20.0, 7.0),
    (1.0, 2.0, -math.inf, math.inf),
]


def survives(x: Any, low: float, high: float) -> None:
    """Finite, within the bounds, and without a lump at either of them."""
    seen = host(x).astype("float64")
    assert np.isfinite(seen).all() and (low <= seen).all() and (seen <= high).all()
    assert np.mean((seen == low) | (seen == high)) < 1e-3
    assert np.unique(seen).size > 0.9 * seen.size


@pytest.mark.parametrize(("mean", "std", "low", "high"), TAILS)
def test_tails(mean: float, std: float, low: float, high: float) -> None:
    """Far out, for narrow windows, and through the mirror: always as many draws as results."""
    rng, plain = Rng(1), Rng(1)
    x = rng.truncated_normal((20_000,), mean, std, low, high, "float64")
    order = np.argsort(host(plain.uniform((20_000,), dtype="float64")))
    assert rng.state_dict() == plain.state_dict()
    assert (np.diff(host(x)[order]) >= 0.0).all()
    survives(x, low, high)
    centre, spread = init.truncated_moments(mean, std, low, high)
    deviations = (host(x) - centre) / spread
    has_moments(deviations, 0.0, 1.0, float((deviations**4).mean()))
    mirrored = Rng(1).truncated_normal((20_000,), -mean, std, -high, -low, "float64")
    survives(mirrored, -high, -low)
    lies_as(
        (host(mirrored) + centre) / spread, lambda t: scipy.stats.ecdf(-deviations).cdf.evaluate(t)
    )


def test_far_tail_is_exponential() -> None:
    for tail in (9e3, 2e4):  # on both sides of the change of formula
        x = host(Rng(2).truncated_normal((20_000,), 0.0, 1.0, tail, math.inf, "float64"))
        lies_as((x - tail) * tail, scipy.stats.expon.cdf)


def test_both_ends_are_equally_fine() -> None:
    """The quantile at 1 − u is the mirrored one at u, to the last of the uniform numbers."""
    u = 2.0 ** -np.arange(1.0, 54.0)
    for low, high in ((-1.0, math.inf), (-3.0, 9.0), (-math.inf, math.inf), (2.0, 50.0)):
        upper = _truncated_quantile(1.0 - u, 0.0, 1.0, low, high)
        lower = _truncated_quantile(u, 0.0, 1.0, -high, -low)
        assert np.isfinite(upper).all()
        assert_close(upper, -lower, rtol=1e-12)


def test_the_least_uniform_number(xp: Any) -> None:
    """A generator's 0 is not −∞."""

    class Zero:
        def random(self, shape: Any) -> Any:
            return np.zeros(shape)

    rng = Rng(0)
    rng._generator = Zero()  # type: ignore[assignment]
    for low, high in ((-math.inf, -5.0), (-math.inf, math.inf), (5.0, math.inf)):
        assert np.isfinite(host(rng.truncated_normal((2,), 0.0, 1.0, low, high))).all()


def test_inverse_cdf_in_float32_does_not_survive() -> None:
    """The negative twin: Φ⁻¹ of a float32 number near 1 is infinite or one of few values."""
    u = np.random.default_rng(0).random(20_000, "float32")
    low = scipy.special.ndtr(np.float32(5.0))
    x = np.clip(scipy.special.ndtri(low + u * (np.float32(1.0) - low)), 5.0, 8.0)
    with pytest.raises(AssertionError):
        survives(x, 5.0, 8.0)
    survives(Rng(0).truncated_normal((20_000,), 0.0, 1.0, 5.0, 8.0, "float64"), 5.0, 8.0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_stays_within_the_bounds(xp: Any, dtype: str) -> None:
    """0.1 is no float: its nearest lies above it in float32 and below it in float16."""
    eps = float(np.finfo(dtype).eps)
    outside = 0
    for low, high in ((0.1 - 0.2 * eps, 0.1), (-0.1, -0.1 + 0.2 * eps), (0.1, 0.1 + 0.2 * eps)):
        x = host(Rng(0).truncated_normal((1000,), 0.0, 1.0, low, high, dtype))
        assert x.dtype == dtype
        wide = x.astype("float64")
        assert (wide >= low).all() and (wide <= high).all()
        wide = host(Rng(0).truncated_normal((1000,), 0.0, 1.0, low, high, "float64"))
        rounded = wide.astype(dtype).astype("float64")
        outside += int(((rounded < low) | (rounded > high)).sum())
    assert outside > 0  # plain rounding would have left them
    with pytest.raises(ValueError, match="wider dtype"):
        Rng(0).truncated_normal((), 0.0, 1.0, 0.1 - 1e-9, 0.1 + 1e-9, dtype)


def test_truncated_normal_as_the_other_draws(xp: Any) -> None:
    x = Rng(0).truncated_normal((3, 4))
    assert x.shape == (3, 4) and x.dtype == "float32"
    assert Rng(0).truncated_normal().shape == ()
    assert Rng(0).truncated_normal((0, 2)).shape == (0, 2)
    for wrong in ((0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, 1.0, 2.0, 2.0), (0.0, 1.0, 3.0)):
        with pytest.raises(ValueError, match="truncated normal"):
            Rng(0).truncated_normal((2,), *wrong)
        with pytest.raises(ValueError, match="truncated normal"):
            init.truncated_moments(*wrong)


# Second moments through layers


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_second_moment_of_a_layer(xp: Any, shift: float) -> None:
    """E ‖W x‖² / n = ‖x‖² Var(w) for any fixed x: nothing is asked of its mean."""
    n, m, draws = 50, 30, 200
    x = np.abs(np.random.default_rng(0).standard_normal(m)) + shift
    w = empty(xp, n, m)
    means = [(host(init.lecun_normal_(w, rng=rng)) @ x) ** 2 for rng in Rng(0).split(draws)]
    predicted = (x**2).sum() / m
    error = predicted * math.sqrt(2.0 / (n * draws))  # ‖W x‖² is χ² of n degrees
    assert abs(np.mean(means) - predicted) < 5 * error
    assert abs(np.mean(means) - x.var()) > 20 * error  # what holds only for inputs of mean 0


def test_orthogonal_matrices(xp: Any) -> None:
    for shape in ((7, 7), (9, 4), (4, 9), (6, 2, 3, 3), (20, 2, 3, 3), (1, 5), (5, 1)):
        w = host(init.orthogonal_(empty(xp, *shape), 1.5, rng=Rng(0))).reshape(shape[0], -1) / 1.5
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        assert_close(gram, np.eye(len(gram)), atol=1e-12)


def test_depth_100(xp: Any) -> None:
    """Orthogonal: each draw keeps the norm.  LeCun: only E ‖x‖² does, and E log ‖x‖ = O(−N/n)."""
    n, depth, draws = 64, 100, 100
    rng = Rng(0)
    x = np.full(n, 1.0)
    for _ in range(depth):
        x = host(init.orthogonal_(empty(xp, n, n), rng=rng)) @ x
    assert abs(np.linalg.norm(x) - 8.0) < 1e-10
    w, logs = empty(xp, n, n), []
    for _ in range(draws):
        x = np.full(n, 1.0)
        for _ in range(depth):
            x = host(init.lecun_normal_(w, rng=rng)) @ x
        logs.append(math.log(np.linalg.norm(x) / 8.0))
    # ‖W x‖² / ‖x‖² is χ²(n) / n, whatever x is: mean 1, and a logarithm of mean ψ(n/2) − log(n/2)
    drift = depth / 2.0 * float(scipy.special.digamma(n / 2.0) - math.log(n / 2.0))
    spread = math.sqrt(depth / 4.0 * float(scipy.special.polygamma(1, n / 2.0)))
    assert drift == pytest.approx(-0.785, abs=0.005) and spread == pytest.approx(0.89, abs=0.01)
    assert abs(np.mean(logs) - drift) < 5 * spread / math.sqrt(draws)
    assert np.mean(logs) < -5 * spread / math.sqrt(draws)  # "norms are kept" fails on each draw


def test_squared_norm_over_draws(xp: Any) -> None:
    """E ‖x_N‖² = ‖x_0‖² over draws, at the same time as log ‖x_N‖ drifts down."""
    n, depth, draws = 32, 10, 500
    w, rng, squares = empty(xp, n, n), Rng(0), []
    for _ in range(draws):
        x = np.full(n, n**-0.5)
        for _ in range(depth):
            x = host(init.lecun_normal_(w, rng=rng)) @ x
        squares.append(float(x @ x))
    error = math.sqrt(((1.0 + 2.0 / n) ** depth - 1.0) / draws)
    assert abs(np.mean(squares) - 1.0) < 5 * error
    assert np.mean(np.log(squares)) < -0.2


def is_haar(draw: Callable[[Rng], Any]) -> None:
    """E Q = 0, E (tr Q)² = 1 and E Q_ij² = 1/n over draws, 6 standard errors."""
    n, draws = 8, 2000
    q = np.stack([host(draw(rng)) for rng in Rng(0).split(draws)])
    assert np.abs(q.mean(0)).max() < 6.0 / math.sqrt(n * draws)
    trace = np.trace(q, axis1=1, axis2=2)
    assert abs((trace**2).mean() - 1.0) < 6.0 * math.sqrt(2.0 / draws)
    fourth = 3.0 / (n * (n + 2)) - 1.0 / n**2  # Var Q_ij²
    assert np.abs((q**2).mean(0) - 1.0 / n).max() < 6.0 * math.sqrt(fourth / draws)


def test_haar(xp: Any) -> None:
    is_haar(lambda rng: init.orthogonal_(empty(xp, 8, 8), rng=rng))
    with pytest.raises(AssertionError):  # QR as LAPACK gives it: E Q_ii is about −0.27
        is_haar(lambda rng: np.linalg.qr(host(rng.normal((8, 8), dtype="float64")))[0])


# In place, reproducible, on any backend


def parameters(name: str) -> Any:
    return inspect.signature(getattr(init, name)).parameters


def fill_all() -> dict[str, Callable[..., Any]]:
    """Every initialiser of a matrix that draws."""
    names = [n for n in init.__all__ if n.endswith("_") and "rng" in parameters(n)]
    return {n: getattr(init, n) for n in names}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", sorted(fill_all()))
def test_in_place_and_the_same_everywhere(xp: Any, name: str, dtype: str) -> None:
    """One seed, the same bits: on NumPy and here, for arrays, Tensors and Parameters."""
    fill = fill_all()[name]
    reference = fill(np.full((6, 4), np.nan, dtype), rng=Rng(7))
    array = empty(xp, 6, 4, dtype=dtype)
    for target in (array, Tensor(array), Parameter(array)):
        array[...] = xp.nan
        assert fill(target, rng=Rng(7)) is target
        assert type(array) is type(xp.zeros(1)) and array.dtype == dtype
        assert np.array_equal(host(array), reference)
    manual_seed(7)
    assert np.array_equal(host(fill(array)), reference)
    assert not np.array_equal(host(fill(array)), reference)  # the default stream goes on


def test_views_are_filled(xp: Any) -> None:
    """A third of a joint projection is initialised by itself, and only that."""
    joint = Parameter(xp.zeros((5, 9), "float32"))
    init.normal_(joint.data[:, 3:6], rng=Rng(0))
    seen = host(joint) != 0
    assert seen[:, 3:6].all() and not seen[:, :3].any() and not seen[:, 6:].any()


def test_gradients_do_not_notice(xp: Any) -> None:
    layer = nn.Linear(3, 2)
    init.lecun_normal_(layer.weight, rng=Rng(0))
    layer(xp.ones((1, 3), "float32")).sum().backward()
    assert layer.weight.requires_grad and layer.weight.grad.shape == (2, 3)
    with pytest.raises(ValueError, match="computed from others"):
        init.zeros_(layer.weight * 2.0)


def test_empty_weights(xp: Any) -> None:
    for shape in ((0, 3), (3, 0), (0, 0)):
        for name, fill in fill_all().items():
            w = empty(xp, *shape)
            assert fill(w, rng=Rng(0)) is w, name
        init.eye_(empty(xp, *shape))


def test_wrong_use(xp: Any) -> None:
    w, v = xp.ones((4, 4)), xp.ones(4)
    for name in ("variance_scaling_", "xavier_normal_", "kaiming_uniform_", "lecun_normal_"):
        with pytest.raises(ValueError, match="no fans"):
            getattr(init, name)(v)
    wrong: list[Callable[[], Any]] = [
        lambda: init.fans((4,)),
        lambda: init.fans((4, 4), "conv"),
        lambda: init.fans((4, 4), "hwio"),
        lambda: init.fans((4, 4, 3), groups=3),
        lambda: init.fans((4, 4, 3), groups=0),
        lambda: init.variance_scaling_(w, -1.0),
        lambda: init.variance_scaling_(w, math.nan),
        lambda: init.variance_scaling_(w, 1.0, "fan"),
        lambda: init.variance_scaling_(w, 1.0, "fan_in", "cauchy"),
        lambda: init.kaiming_normal_(w, nonlinearity="gelu"),
        lambda: init.normal_(w, 0.0, -1.0),
        lambda: init.uniform_(w, 1.0, 0.0),
        lambda: init.trunc_normal_(w, 0.0, 0.0),
        lambda: init.trunc_normal_(w, 0.0, 1.0, 2.0, -2.0),
        lambda: init.orthogonal_(v),
        lambda: init.eye_(v),
        lambda: init.dirac_(w),
        lambda: init.dirac_(xp.ones((4, 2, 3)), 3),
    ]
    for use in wrong:
        with pytest.raises(ValueError):
            use()
    assert bool((w == 1.0).all()) and bool((v == 1.0).all())
    for data in (xp.ones((2, 2), "int64"), [[1.0, 2.0]], 3.0, None, np.float32(1.0)):
        with pytest.raises(TypeError, match="in place"):
            init.zeros_(data)


def test_scale_zero(xp: Any) -> None:
    for distribution in ("normal", "uniform", "truncated_normal"):
        w = init.variance_scaling_(empty(xp, 3, 3), 0.0, "fan_in", distribution)
        assert bool((w == 0.0).all())
