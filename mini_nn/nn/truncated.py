"""Mean and standard deviation of a normal variable that is kept within an interval.

Johnson, Kotz, Balakrishnan 1994, "Continuous Univariate Distributions" 1, §10.1.  With
a' = (a − μ)/σ, b' = (b − μ)/σ, φ and Φ the standard normal density and distribution function:

========================================================  ===================================
Z = Φ(b') − Φ(a')                                         what is kept
mean = μ + σ (φ(a') − φ(b')) / Z                          ``truncated_moments``
var = σ² (1 + (a'φ(a') − b'φ(b'))/Z − ((φ(a') − φ(b'))/Z)²)
========================================================  ===================================

For ±2σ the variance is 0.7737413035 σ²: what is drawn "with standard deviation 0.02" and truncated
there has 0.0175925.  The sampler is ``Rng.truncated_normal``.

Deviations: for narrow intervals and in the tails, where these differences lose their digits, the
same integrals are summed by the tanh-sinh rule (Takahasi & Mori 1974): the integrands are positive,
so nothing cancels.
"""

from __future__ import annotations

import math


def truncated_moments(
    mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> tuple[float, float]:
    """Mean and standard deviation of N(mean, std²) restricted to [a, b].

    Args:
        mean, std: before the truncation.
        a, b: the bounds, absolute (not in units of ``std``); either may be infinite.

    Raises:
        ValueError: ``std`` is not positive or the interval is empty.
    """
    if not (math.isfinite(mean) and 0.0 < std < math.inf and a < b):
        raise ValueError(
            "a truncated normal needs a finite mean, 0 < std < inf and a < b, got "
            f"mean={mean}, std={std}, a={a}, b={b}"
        )
    low, high = (a - mean) / std, (b - mean) / std
    if low > 0.0:  # the mirror image, where Φ has its digits
        centre, spread = truncated_moments(-mean, std, -b, -a)
        return -centre, spread
    root = math.sqrt(2.0)
    kept = (math.erfc(-high / root) - math.erfc(-low / root)) / 2.0
    if kept < 1e-2 or (b - a) / std < 0.1:
        return _by_quadrature(std, a, b, -high)
    tilt = (_density(low) - _density(high)) / kept
    ends = (_times_density(low) - _times_density(high)) / kept
    return mean + std * tilt, std * math.sqrt(1.0 + ends - tilt * tilt)


def _density(z: float) -> float:
    """φ(z)."""
    return math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)


def _times_density(z: float) -> float:
    """z φ(z), which is 0 at infinity."""
    return z * _density(z) if math.isfinite(z) else 0.0


def _by_quadrature(std: float, a: float, b: float, rate: float) -> tuple[float, float]:
    """Moments of the distance t below ``b``, of density ∝ exp(−rate t − t²/2) in units of std.

    For a positive rate the density at 45 / rate and at √90 is below e⁻⁴⁵ of its maximum.  With
    t = width / (1 + exp(−π sinh s)) the sum over equidistant s converges doubly exponentially.
    """
    width = (b - a) / std
    if rate > 0.0:
        width = min(width, 45.0 / rate, math.sqrt(90.0))
    points = []
    for k in range(-56, 57):
        s = k / 16.0
        part = 1.0 / (1.0 + math.exp(-math.pi * math.sinh(s)))
        t = width * part
        points.append((t, math.cosh(s) * part * (1.0 - part) * math.exp(-t * (rate + t / 2.0))))
    mass = sum(m for _, m in points)
    centre = sum(m * t for t, m in points) / mass
    spread = math.sqrt(sum(m * (t - centre) ** 2 for t, m in points) / mass)
    return b - std * centre, std * spread
