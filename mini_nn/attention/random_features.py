"""Random features: maps φ whose products φ(q)·φ(k) are, on average, the kernel of attention.

Letters: x is a query or a key (…, n, d), W (m, d) the projection of ``random_matrix`` with rows
w ~ N(0, I), z = q + k, δ = q − k, and SM = e^{q·k}.

===================================================  ==========================  ==================
m^{−½} e^{‖x‖²/2} [cos Wx, sin Wx]                   Rahimi & Recht 2007         ``trigonometric_``
m^{−½} e^{Wx − ‖x‖²/2}                               Choromanski et al. 2021,    ``positive_``
                                                     arXiv:2009.14794, Lemma 1
(2m)^{−½} e^{−‖x‖²/2} [e^{Wx}, e^{−Wx}]              the same, Lemma 1, SM^hyp+  ``hyperbolic_``
D e^{A‖w‖² + B w·x − ‖x‖²/2}                         Likhosherstov et al. 2022,  ``oprf_``
                                                     arXiv:2205.15317
m^{−½} f(Wx) + ε                                     arXiv:2009.14794, 2.2       ``generalized_``
m^{−½} e^{Wx}, W trained                             J. Su 2021, kexue.fm 8338   ``exponential_``
m^{−½} e^{λ‖x‖²} [cos Wx, sin Wx]                    J. Su 2020, kexue.fm 7921   ``fourier_``
===================================================  ==========================  ==================

(each ``…features``).  The positive ones are written in the log domain first (``…_log_features``),
where nothing overflows and a stabiliser is a subtraction.  The projection is cast to the dtype of
``x``.  Attention's scale is the caller's: feed d^{−¼} q and d^{−¼} k for exp(q·k/√d).  Scaling one
side by d^{−½} has the same mean and another variance.

How far an estimate φ(q)·φ(k) is from SM is known exactly, as a mean square over W; all but the
last two are for independent rows.

==========================================================  ==============================
e^{‖q‖² + ‖k‖²} (1 − e^{−‖δ‖²})² / 2m                       ``mse_trigonometric``
e^{‖z‖²} SM² (1 − e^{−‖z‖²}) / m                            ``mse_positive``
(1 − e^{−‖z‖²}) / 2 of that: arXiv:2009.14794, Lemma 2      ``mse_hyperbolic``
SM² (((1 + ρ)²/4ρ)^{d/2} e^{ρ‖z‖²} − 1) / m                 ``mse_oprf``
of rows that are orthogonal in blocks                       ``mse_orthogonal``
a bound of what they gain: Theorem 2 there                  ``orthogonal_gain_bound``
‖q‖ ‖k‖ (sin t + (π − t) cos t) / 2π: Cho & Saul 2009       ``arc_cosine_kernel``
==========================================================  ==============================

Deviations: ``generalized_features`` has the factor m^{−½} of the paper, which released code leaves
out (ε aside it cancels in attention); without W there is no mean over rows, and no factor.  Su
writes one expectation for a pair of projections whose law is a Fourier transform, which exists for
λ > ½; at λ = ½ the two coincide, and it is ``trigonometric_features``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import primitive
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import matched

__all__ = [
    "KERNELS", "arc_cosine_kernel", "exponential_features", "exponential_log_features",
    "fourier_features", "fourier_matrices", "generalized_features", "hyperbolic_features",
    "hyperbolic_log_features", "mse_hyperbolic", "mse_oprf", "mse_orthogonal", "mse_positive",
    "mse_trigonometric", "oprf_features", "oprf_log_features", "oprf_rho",
    "orthogonal_gain_bound", "positive_features", "positive_log_features",
    "trigonometric_features",
]  # fmt: skip


# In the log domain


def exponential_log_features(x: Array, w: Array) -> Array:
    """W x − ½ ln m: log of what estimates e^{‖q + k‖²/2}, and of trained exponential features.

    Args:
        x: (…, n, d).
        w: (m, d); a Tensor to train it.

    Returns:
        (…, n, m), of the dtype of ``x``.

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    return _projected(x, w) - 0.5 * math.log(w.shape[0])


def positive_log_features(x: Array, w: Array) -> Array:
    """W x − ‖x‖²/2 − ½ ln m: log of ``positive_features``; arguments as there.

    Queries may drop ‖x‖²/2, since a factor of a query cancels in attention; keys may not.
    """
    return exponential_log_features(x, w) - _half_square(x)


def hyperbolic_log_features(x: Array, w: Array) -> Array:
    """[W x, −W x] − ‖x‖²/2 − ½ ln 2m: log of ``hyperbolic_features``; arguments as there."""
    u = _projected(x, w)
    both = ops.concatenate([u, -u], axis=-1)
    return both - _half_square(x) - 0.5 * math.log(2 * w.shape[0])


def oprf_log_features(x: Array, w: Array, s: Array | float) -> Array:
    """A‖w‖² + B w·x − ‖x‖²/2 + ln D − ½ ln m: log of ``oprf_features``; arguments as there."""
    u, d = _projected(x, w), w.shape[1]
    inverse = 1.0 / oprf_rho(s if isinstance(s, (int, float)) else s.astype(x.dtype), d)
    a = 0.125 - 0.125 * inverse
    b = (0.5 + 0.5 * inverse) ** 0.5  # √(1 − 4A)
    length = ops.sum(w * w, axis=-1).astype(x.dtype)
    constant = 0.5 * d * _log(b) - 0.5 * math.log(w.shape[0])  # D = (1 − 4A)^{d/4}
    return b * u + a * length + constant - _half_square(x)


def oprf_rho(s: Array | float, d: int) -> Array | float:
    """ρ* ∈ (0, 1]: (√((2s + d)² + 8ds) − 2s − d) / 4s, which minimises the variance at ‖z‖² = s.

    Args:
        s: ‖q + k‖² ≥ 0, or its mean over a batch: a number or an array.
        d: the dimension.

    Returns:
        ρ*, as ``s``: 1 at s = 0, where nothing is gained, and about d / 2s for large s.

    Raises:
        ValueError: ``s`` is a number below 0; in an array that gives nan, or no such features.
    """
    if isinstance(s, (int, float)):
        s = float(s)
        if s < 0.0:
            raise ValueError(f"‖q + k‖² is at least 0, and so is its mean s, got {s}")
    t = 2.0 * s + d
    return 2.0 * d / (t + (t * t + 8.0 * d * s) ** 0.5)  # the root without its cancellation


# Features


def trigonometric_features(x: Array, w: Array) -> Array:
    """m^{−½} e^{‖x‖²/2} [cos Wx, sin Wx]: products are e^{(‖q‖² + ‖k‖²)/2} times a mean of cosines.

    Unbiased, but of either sign: the error is largest where SM is small, and a normaliser may be 0
    or negative.  e^{‖x‖²/2} overflows in float32 from ‖x‖ = 13.3 on.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).

    Returns:
        (…, n, 2m): all cosines, then all sines.

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    return fourier_features(x, w, 0.5)


def positive_features(x: Array, w: Array) -> Array:
    """m^{−½} e^{Wx − ‖x‖²/2}: the positive random features of FAVOR+.

    A feature is at most m^{−½} e^{‖w‖²/2}, whatever x; features of a long x may all underflow to
    0, which ``positive_log_features`` does not.  x = 0 has m^{−½} everywhere.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).

    Returns:
        (…, n, m).

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    return ops.exp(positive_log_features(x, w))


def hyperbolic_features(x: Array, w: Array) -> Array:
    """(2m)^{−½} e^{−‖x‖²/2} [e^{Wx}, e^{−Wx}]: positive features of W and of −W.

    The products are means of cosh w·z; a law of W that is wrong in its odd moments does no harm.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).

    Returns:
        (…, n, 2m): first those of W, then those of −W.

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    return ops.exp(hyperbolic_log_features(x, w))


def oprf_features(x: Array, w: Array, s: Array | float) -> Array:
    """D e^{A‖w‖² + B w·x − ‖x‖²/2} m^{−½}: positive features with the variance least at ‖z‖² = s.

    A = (1 − 1/ρ)/8, B = √(1 − 4A), D = (1 − 4A)^{d/4}.  Unbiased for every s, with rows of law
    N(0, I); A ≤ 0 holds down the long rows, from which the heavy tail comes, so that features are
    bounded in w as well.  s = 0 gives ``positive_features``.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).
        s: ‖q + k‖², usually its mean over the batch: a number, or an array that broadcasts against
            (…, n, m).  It has to be the same for queries and keys.

    Returns:
        (…, n, m).

    Raises:
        ValueError: ``w`` is not (m, d), ``x`` has another d, or ``s`` is a number below 0.
    """
    return ops.exp(oprf_log_features(x, w, s))


def exponential_features(x: Array, w: Array) -> Array:
    """m^{−½} e^{Wx}: positive features without ‖x‖²/2, for a W that is trained.

    With W a parameter, this is linear attention with φ = exp on projections of size m; nothing
    random is left, and the target is no longer e^{q·k}.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).

    Returns:
        (…, n, m); inf where W x is beyond the dtype's exponents (88 in float32).

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    return ops.exp(exponential_log_features(x, w))


def identity(x: Array) -> Array:
    """x itself: linear attention without a feature map."""
    return x


KERNELS: dict[str, Callable[[Array], Array]] = {
    "relu": ops.relu, "sigmoid": ops.sigmoid, "exp": ops.exp, "abs": ops.abs, "gelu": ops.gelu,
    "cos": ops.cos, "tanh": ops.tanh, "identity": identity,
}  # fmt: skip
"""The functions f that Choromanski et al. compare; relu, sigmoid, exp and abs are never negative,
so that with ε > 0 a normaliser is positive."""


def generalized_features(
    x: Array, w: Array | None = None, f: Callable[[Array], Array] = ops.relu, eps: float = 1e-3
) -> Array:
    """m^{−½} f(Wx) + ε: generalised attention, of which f = ReLU is the usual case.

    With ReLU and ε = 0 the features of a vector may all be 0, and attention's weights 0/0; the mean
    of the products is ``arc_cosine_kernel`` then.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d), or None for f(x) + ε.
        f: elementwise; see ``KERNELS``.
        eps: added to every feature.

    Returns:
        (…, n, m), or (…, n, d) without ``w``.

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    eps = matched(eps, x)
    if w is None:
        return f(x) + eps
    return f(_projected(x, w)) * (w.shape[0] ** -0.5) + eps


# The general Fourier recipe


def fourier_matrices(
    m: int, d: int, rng: Rng, lam: float = 0.5, dtype: Any = "float32"
) -> tuple[Array, Array]:
    """Projections (W_q, W_k) whose law is the Fourier transform of e^{q·k − λ(‖q‖² + ‖k‖²)}.

    Each coordinate of (w_q, −w_k) is normal with covariance [[2λ, −1], [−1, 2λ]], positive definite
    iff λ > ½, which is where the function is integrable.  At λ = ½ the law is degenerate,
    w_q = w_k; below there is none.

    Args:
        m, d: rows and columns.
        rng: the stream to draw from.
        lam: λ.
        dtype: of the result.

    Returns:
        W_q and W_k, each (m, d), on the current backend.

    Raises:
        ValueError: λ < ½, or m or d is below 1.
    """
    if not 0.5 <= lam < math.inf:
        raise ValueError(
            f"e^(q·k − λ(‖q‖² + ‖k‖²)) has a Fourier transform that is a law for λ ≥ ½, got λ={lam}"
        )
    if m < 1 or d < 1:
        raise ValueError(f"a projection has m ≥ 1 features of d ≥ 1 dimensions, got m={m}, d={d}")
    std = math.sqrt(2.0 * lam)
    first = rng.normal((m, d), dtype="float64")
    rest = rng.normal((m, d), dtype="float64") * math.sqrt(std * std - 1.0 / (std * std))
    return (std * first).astype(dtype), (first / std + rest).astype(dtype)


def fourier_features(x: Array, w: Array, lam: float = 0.5) -> Array:
    """m^{−½} e^{λ‖x‖²} [cos Wx, sin Wx]: queries with W_q, keys with W_k of ``fourier_matrices``.

    Unbiased for every λ ≥ ½; the variance grows with λ, so that λ = ½, the trigonometric features,
    is the best choice.

    Args:
        x: (…, n, d), arrays or Tensors.
        w: (m, d).
        lam: λ.

    Returns:
        (…, n, 2m).

    Raises:
        ValueError: ``w`` is not (m, d), or ``x`` has another d.
    """
    u = _projected(x, w)
    waves = ops.concatenate([ops.cos(u), ops.sin(u)], axis=-1)
    return waves * ops.exp((2.0 * lam) * _half_square(x) - 0.5 * math.log(w.shape[0]))


# What the error is: functions of q and k (…, d), giving (…)


def mse_trigonometric(q: Array, k: Array, m: int) -> Array:
    """Mean square error of ``trigonometric_features`` with m independent rows.

    Relative to SM² it is e^{‖z‖²} SM^{−4} (1 − e^{−‖δ‖²})² / 2m: it explodes as SM goes to 0.

    Args:
        q, k: (…, d).
        m: rows of the projection.

    Returns:
        (…).
    """
    gap = -ops.expm1(-_square(q - k))
    return ops.exp(_square(q) + _square(k)) * gap * gap * (0.5 / m)


def mse_positive(q: Array, k: Array, m: int) -> Array:
    """Mean square error of ``positive_features`` with m independent rows.

    Relative to SM² it is (e^{‖z‖²} − 1) / m, so that m has to grow like e^{‖q + k‖²}; where SM goes
    to 0 for a given ‖z‖, so does the error.  Arguments as for ``mse_trigonometric``.
    """
    sm = ops.exp(_dot(q, k))
    return ops.expm1(_square(q + k)) * sm * sm * (1.0 / m)


def mse_hyperbolic(q: Array, k: Array, m: int) -> Array:
    """Mean square error of ``hyperbolic_features`` with m independent rows, 2m features.

    With as many features, ``mse_positive(q, k, 2 * m)``, it is better by the factor 1 − e^{−‖z‖²}
    only.  Arguments as for ``mse_trigonometric``.
    """
    return -0.5 * ops.expm1(-_square(q + k)) * mse_positive(q, k, m)


def mse_oprf(q: Array, k: Array, m: int, s: Array | float) -> Array:
    """Mean square error of ``oprf_features`` with m independent rows; least for s = ‖z‖².

    Args:
        q, k, m: as for ``mse_trigonometric``.
        s: as for ``oprf_features``.

    Returns:
        (…).
    """
    d, z2, rho = q.shape[-1], _square(q + k), oprf_rho(s, q.shape[-1])
    spread = 0.5 * d * _log(0.25 * (1.0 + rho) * (1.0 + rho) / rho)
    sm = ops.exp(_dot(q, k))
    return ops.expm1(spread + rho * z2) * sm * sm * (1.0 / m)


def mse_orthogonal(q: Array, k: Array, m: int, terms: int = 256) -> Array:
    """Mean square error of ``positive_features`` with m rows of ``orthogonal_matrix``.

    w·z and w'·z of two rows of one block are lengths times two coordinates of one unit vector, so
    that E e^{(w + w')·z} = ₁F₁(d; d/2; ‖z‖²/2), where independent rows have e^{‖z‖²}.  The quotient
    of the two is the mean of Π_{i<N} (d + i) / (d + 2i) over N, Poisson with mean ‖z‖².

    Args:
        q, k, m: as for ``mse_trigonometric``; any m, in blocks of d.
        terms: of the mean over N; 256 suffice for ‖z‖² ≤ 80.

    Returns:
        (…).
    """
    d, z2, sm = q.shape[-1], _square(q + k), ops.exp(_dot(q, k))
    gain, probability, quotient = 0.0 * z2, ops.exp(-z2), 1.0
    for n in range(terms):
        gain = gain + probability * (1.0 - quotient)
        probability = probability * z2 * (1.0 / (n + 1))
        quotient *= (d + n) / (d + 2 * n)
    return mse_positive(q, k, m) - _paired(m, d) * gain * sm * sm


def orthogonal_gain_bound(q: Array, k: Array, m: int) -> Array:
    """At least so much is the error of ``orthogonal_matrix`` below ``mse_positive``.

    2 (m − 1) / (m (d + 2)) (SM − e^{−(‖q‖² + ‖k‖²)/2})² for m ≤ d; the blocks of a larger m are
    independent, so that with m_b rows in a block (m − 1)/m becomes Σ m_b (m_b − 1) / m².

    Args:
        q, k, m: as for ``mse_trigonometric``.

    Returns:
        (…).
    """
    d = q.shape[-1]
    gap = ops.exp(_dot(q, k)) - ops.exp(-0.5 * (_square(q) + _square(k)))
    return gap * gap * (2.0 * _paired(m, d) / (d + 2))


def arc_cosine_kernel(q: Array, k: Array) -> Array:
    """E relu(w·q) relu(w·k) = ‖q‖ ‖k‖ (sin t + (π − t) cos t) / 2π, t the angle between q and k.

    Args:
        q, k: (…, d).

    Returns:
        (…); 0 where one of them is 0, and so is the gradient of that one.
    """
    lengths = ops.norm(q, axis=-1) * ops.norm(k, axis=-1)
    safe = ops.where(lengths > 0.0, lengths, 1.0)
    return lengths * _of_the_cosine(ops.clip(_dot(q, k) / safe, -1.0, 1.0))


@primitive
def _of_the_cosine(c: Any) -> Any:
    """(sin t + (π − t) c) / 2π with c = cos t: both terms have infinite slopes at c = ±1."""
    t = of(c).arccos(c)
    return (of(c).sin(t) + (math.pi - t) * c) * (0.5 / math.pi)


_of_the_cosine.derivative(c=lambda g, c: g * ((math.pi - ops.arccos(c)) * (0.5 / math.pi)))


def _paired(m: int, d: int) -> float:
    """The share of ordered pairs of rows, m² in all, that are two rows of one block of d."""
    full, rest = divmod(m, d)
    return (full * d * (d - 1) + rest * (rest - 1)) / (m * m)


def _dot(q: Array, k: Array) -> Array:
    return ops.sum(q * k, axis=-1)


def _square(x: Array) -> Array:
    return ops.sum(x * x, axis=-1)


def _projected(x: Array, w: Array) -> Array:
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"random features take x (…, n, d) and a projection (m, d), got {tuple(x.shape)} and "
            f"{tuple(w.shape)}"
        )
    return ops.linear(x, w.astype(x.dtype))


def _half_square(x: Array) -> Array:
    return 0.5 * ops.sum(x * x, axis=-1, keepdims=True)


def _log(x: Array | float) -> Array | float:
    return math.log(x) if isinstance(x, float) else ops.log(x)
