"""How good is softmax attention by random features, and what does it cost?

The Performer (Choromanski et al. 2021, arXiv:2009.14794) writes e^(q·k) as the mean of a product of
two features, and with them attention in linear time.  Measured: the error of the kernel for four
kinds of features beside what theory says of it; how the error of attention falls with the number
of features, for logits of ordinary and of trained size; the bias of six ways to draw orthogonal
projections, one of them wrong; what a token learns of later ones through the stabiliser; and from
which length on it is faster than the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

import mini_nn
from mini_nn import Rng, backend, ops
from mini_nn.attention import (
    chi_norms,
    chunked,
    constant_norms,
    favor_attention,
    gaussian_matrix,
    hyperbolic_features,
    jittered_norms,
    midpoint_norms,
    mse_hyperbolic,
    mse_orthogonal,
    mse_positive,
    mse_trigonometric,
    orthogonal_matrix,
    positive_features,
    quantile_norms,
    regularized_matrix,
    softmax_attention,
    trigonometric_features,
)
from mini_nn.backend import Array

from .base import Config, Result, Study
from .measure import as_name, lengths, milliseconds, slope
from .performer_figure import CAPTION, draw
from .session import Session

D = 16
"""The size of queries and keys, but for the bias."""

NORMS = tuple(round(0.2 + 0.15 * i, 2) for i in range(12))
ANGLES = tuple(15 * i for i in range(13))
"""Degrees between query and key, both of a length in ``NORMS``."""

DEVIATIONS = (0.25, 1.0, 3.0)
"""Of the logits: small, those of random queries and keys, and about those of trained ones.

With queries and keys of normal numbers the mean of ‖q + k‖², of which the error is an exponential,
is 2 √d times this: 2, 8 and 24 for d = 16.
"""

BIAS_SIZES = (8, 16, 64)


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(Config):
    """How much is drawn; ``steps`` is how often the projection of attention is drawn anew.

    Args:
        kernel_draws: projections of 16 rows for the error of the kernel.
        bias_rows: rows of projections for the bias.
        tokens: queries and keys whose attention is compared.
        most_features: up to which the error of attention is measured: a power of 2.
        longest: tokens, up to which time is measured: a power of 2.
    """

    kernel_draws: int = 4000
    bias_rows: int = 500_000
    tokens: int = 256
    most_features: int = 1024
    longest: int = 8192


# the kernel

Features = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Kernel:
    """An estimator of e^(q·k).

    Args:
        law: draws projections (m, d).
        features: of (…, d) with a projection.
        error: its mean square error in theory, ``error(q, k, m)``.
    """

    law: Callable[..., Array]
    features: Features
    error: Callable[..., Array]


KERNELS = {
    "trigonometric": Kernel(gaussian_matrix, trigonometric_features, mse_trigonometric),
    "positive": Kernel(gaussian_matrix, positive_features, mse_positive),
    "hyperbolic": Kernel(gaussian_matrix, hyperbolic_features, mse_hyperbolic),
    "positive, orthogonal": Kernel(orthogonal_matrix, positive_features, mse_orthogonal),
}


def pairs() -> tuple[Array, Array]:
    """Queries and keys (norms, angles, d) of every length and angle."""
    xp = backend.current().xp
    query = np.zeros((len(NORMS), len(ANGLES), D))
    key = np.zeros_like(query)
    for i, norm in enumerate(NORMS):
        for j, angle in enumerate(ANGLES):
            query[i, j, 0] = norm
            key[i, j, :2] = (
                norm * math.cos(math.radians(angle)),
                norm * math.sin(math.radians(angle)),
            )
    return xp.asarray(query), xp.asarray(key)


def kernel_errors(config: PerformerConfig, rng: Rng) -> dict[str, dict[str, Any]]:
    """log₁₀ of the mean square error over SM² of 16 rows, (norms, angles): measured and in theory.

    The blocks of one projection of many rows are so many projections of D rows.
    """
    query, key = pairs()
    exact = np.exp((backend.to_host(query) * backend.to_host(key)).sum(axis=-1))
    found = {}
    for name, kernel in KERNELS.items():
        total = np.zeros(exact.shape)
        for stream in rng.split(10):
            many = kernel.law(config.kernel_draws // 10 * D, D, stream, dtype="float64")
            for w in many.reshape(-1, D, D):
                got = (kernel.features(query, w) * kernel.features(key, w)).sum(axis=-1)
                total += (backend.to_host(got) / exact - 1.0) ** 2
        measured = total / (config.kernel_draws // 10 * 10)
        theory = backend.to_host(kernel.error(query, key, D)) / exact**2
        found[name] = {
            "measured": np.log10(np.maximum(measured, 1e-12)).tolist(),
            "theory": np.log10(np.maximum(theory, 1e-12)).tolist(),
        }
    return found


# attention

FEATURES = {"trigonometric": 2, "positive": 1, "hyperbolic": 2}
"""Features for each row of the projection."""

LAWS = {"independent": gaussian_matrix, "orthogonal": orthogonal_matrix}


def attention_errors(deviation: float, config: PerformerConfig, rng: Rng) -> dict[str, list[Any]]:
    """‖Ô − O‖ / ‖O‖ by kind and law: [(features, lower quartile, median, upper quartile), …]."""
    streams = rng.split(2)
    scale = deviation**0.5
    query, key = (scale * streams[0].normal((config.tokens, D)) for _ in range(2))
    value = streams[0].normal((config.tokens, D))
    exact = backend.to_host(softmax_attention(query, key, value))
    found: dict[str, list[Any]] = {}
    for feature, per_row in FEATURES.items():
        for law_name, law in LAWS.items():
            for count in lengths(8, config.most_features):
                errors = []
                for _ in range(config.steps):
                    w = law(count // per_row, D, streams[1])
                    got = backend.to_host(favor_attention(query, key, value, w, feature))
                    errors.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
                quartiles = [float(q) for q in np.quantile(errors, (0.25, 0.5, 0.75))]
                found.setdefault(f"{feature}, {law_name}", []).append((count, *quartiles))
    return found


# bias


def raw_qr_directions(m: int, d: int, rng: Rng) -> Array:
    """What many codes do: the Q of LAPACK as it comes, whose signs are not random.

    Householder's method makes the diagonal of R negative, so Q is not Haar-distributed: the mean of
    its diagonal is not 0.  Returns (m, d), in blocks of d rows; d divides m.
    """
    blocks = np.linalg.qr(rng.host.standard_normal((m // d, d, d)))[0].swapaxes(1, 2)
    return backend.current().xp.asarray(blocks.reshape(m, d))


DRAWN = {
    "orthogonal": (chi_norms, 1.0), "raw QR, u > 0": (chi_norms, 1.0),
    "raw QR, u < 0": (chi_norms, -1.0), "all of length √d": (constant_norms, 1.0),
    "quantiles": (quantile_norms, 1.0), "midpoints": (midpoint_norms, 1.0),
    "jittered": (jittered_norms, 1.0),
}  # fmt: skip


def row_lengths(norms: Callable[..., Any], rows: int, d: int, rng: Rng) -> Any:
    """Lengths of so many rows: those of some laws depend on each other within a block of d."""
    if norms in (chi_norms, constant_norms):
        return norms(rows, d, rng)
    if norms is jittered_norms:
        return np.concatenate([norms(d, d, rng) for _ in range(rows // d)])
    return np.tile(norms(d, d, rng), rows // d)


def biases(config: PerformerConfig, rng: Rng) -> dict[str, list[float]]:
    """Mean estimate over e^(q·k) for q = k = ±(1, …, 1)/√d, for each of ``BIAS_SIZES``."""
    found: dict[str, list[float]] = {}
    xp = backend.current().xp
    for d, stream in zip(BIAS_SIZES, rng.split(len(BIAS_SIZES)), strict=True):
        rows = config.bias_rows // d * d
        haar = regularized_matrix(rows, d, stream, dtype="float64") * d**-0.5
        raw = raw_qr_directions(rows, d, stream)
        for name, (norms, sign) in DRAWN.items():
            many = xp.asarray(row_lengths(norms, rows, d, stream))[:, None]
            w = (raw if name.startswith("raw") else haar) * many
            features = positive_features(xp.full((1, d), sign * d**-0.5, dtype="float64"), w)
            mean = float(backend.to_host((features * features).sum()))
            found.setdefault(name, []).append(mean / math.e)
    return found


# causality

FACTORS = tuple(2.0**k for k in range(6))
"""By which the last key is multiplied."""


def with_one_maximum(query: Array, key: Array, value: Array, w: Array, eps: float = 1e-4) -> Array:
    """Causal attention as it is often stabilised: by one maximum of all keys' w·k, and + ε.

    The maximum is of the future of most tokens, and because of ε it does not divide out.
    """
    query, key = query * D**-0.25, key * D**-0.25
    heights = [x @ w.T for x in (query, key)]
    logs = [
        w_x - 0.5 * (x * x).sum(-1)[:, None] for x, w_x in zip((query, key), heights, strict=True)
    ]
    q = ops.exp(logs[0] - heights[0].max(axis=-1, keepdims=True)) + eps
    k = ops.exp(logs[1] - heights[1].max()) + eps
    ones = backend.of(value).ones((*value.shape[:-1], 1), value.dtype)
    sums, _ = chunked(q, k, ops.concatenate([value, ones], axis=-1))
    return sums[..., :-1] / sums[..., -1:]


def leaks(rng: Rng, n: int = 64) -> dict[str, list[tuple[float, float]]]:
    """The largest change of all outputs but the last when the last key is multiplied."""
    query, key, value = (rng.normal((n, D), dtype="float64") for _ in range(3))
    w = orthogonal_matrix(4 * D, D, rng, dtype="float64")
    ways = {
        "one maximum of all keys": with_one_maximum,
        "running maximum": partial(favor_attention, is_causal=True),
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for name, attention in ways.items():
        before = attention(query, key, value, w)
        for factor in FACTORS:
            changed = key.copy()
            changed[-1] *= factor
            gap = abs(attention(query, changed, value, w) - before)[:-1].max()
            found.setdefault(name, []).append((factor, float(backend.to_host(gap))))
    return found


# cost


def costs(config: PerformerConfig, rng: Rng, d: int = 64) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds of a forward pass of one head over n tokens, with 4 d features."""
    w = orthogonal_matrix(4 * d, d, rng)
    found: dict[str, list[tuple[int, float]]] = {}
    ways = {
        "softmax": softmax_attention,
        "Performer": lambda q, k, v: favor_attention(q, k, v, w),
        "softmax, causal": partial(softmax_attention, is_causal=True),
        "Performer, causal": lambda q, k, v: favor_attention(q, k, v, w, is_causal=True),
    }
    for n in lengths(256, config.longest):
        arrays = [rng.normal((n, d)) for _ in range(3)]
        for name, attention in ways.items():
            took = milliseconds(lambda: attention(*arrays), 3)  # noqa: B023 - called at once
            found.setdefault(name, []).append((n, took))
    return found


def crossing(slow: list[tuple[int, float]], fast: list[tuple[int, float]]) -> float:
    """The length from which ``fast`` is below ``slow`` for good, between points by their lines.

    Infinite if it is above at the last length, the first length if it never is.
    """
    gaps = [(n, math.log(a / b)) for (n, a), (_, b) in zip(slow, fast, strict=True)]
    if gaps[-1][1] <= 0:
        return math.inf
    for (n, gap), (after, later) in reversed([*pairwise(gaps)]):
        if gap <= 0:
            return float(n * (after / n) ** (-gap / (later - gap)))
    return float(gaps[0][0])


def run(config: PerformerConfig, session: Session) -> Result:
    """All parts, and the figure."""
    mini_nn.tune_allocator()
    rngs = Rng(config.seed).split(5)
    with session.timed("kernel"):
        kernel = kernel_errors(config, rngs[0])
    with session.timed("attention"):
        attention = {f"{s:g}": attention_errors(s, config, rngs[1]) for s in DEVIATIONS}
    with session.timed("bias"):
        bias = biases(config, rngs[2])
    with session.timed("cost"):
        cost = costs(config, rngs[3])
    series = {
        "kernel": kernel, "attention": attention, "bias": bias, "leak": leaks(rngs[4]),
        "cost": cost,
    }  # fmt: skip
    metrics = metrics_of(series)
    exponent = metrics["positive_orthogonal_exponent_at_0_25"]
    return Result(
        headline=f"error of attention falls as m^{exponent:.2f} for small logits; "
        f"raw QR is off by {metrics['raw_qr_u_positive_at_8'] - 1:+.0%} at d = 8",
        metrics=metrics,
        figure=draw(series, NORMS, ANGLES, BIAS_SIZES),
        caption=CAPTION.format(**vars(config), d=D),
        series=series,
    )


def metrics_of(series: dict[str, Any]) -> dict[str, float | int | str]:
    """What the page quotes."""
    found: dict[str, float | int | str] = {}
    for name, maps in series["kernel"].items():
        measured, theory = np.array(maps["measured"]), np.array(maps["theory"])
        gaps = (measured - theory)[theory > -6.0]  # some errors are 0
        found[f"{as_name(name)}_median_measured_over_theory"] = float(10 ** np.median(gaps))
        found[f"{as_name(name)}_worst_relative_error"] = float(10 ** theory.max())
    for deviation, lines in series["attention"].items():
        for name, rows in lines.items():
            middle = [(m, error) for m, _, error, _ in rows]
            short, at = as_name(name), as_name(deviation)
            found[f"{short}_exponent_at_{at}"] = slope(middle)
            for m, error in middle:
                if m in (64, 1024):
                    found[f"{short}_error_of_{m}_at_{at}"] = error
    for name, ratios in series["bias"].items():
        for d, ratio in zip(BIAS_SIZES, ratios, strict=True):
            found[f"{as_name(name)}_at_{d}"] = ratio
    for name, rows in series["leak"].items():
        found[f"{as_name(name)}_leak"] = rows[-1][1]
    for suffix in ("", ", causal"):
        pair = (series["cost"][f"softmax{suffix}"], series["cost"][f"Performer{suffix}"])
        length = crossing(*pair)
        name = f"tokens_from_which_it_is_faster{as_name(suffix) and '_' + as_name(suffix)}"
        found[name] = round(length, -2) if math.isfinite(length) else "none"
    return found


STUDY = Study(
    name="performer",
    title="Softmax attention by random features",
    about="The kernel's error beside its theory, for four kinds of features; the error of "
    "attention by the number of features; the bias of ways to draw projections; and what it "
    "costs beside the softmax.",
    quick=PerformerConfig(
        steps=3, kernel_draws=400, bias_rows=50_000, tokens=128, most_features=256, longest=2048
    ),
    full=PerformerConfig(steps=20),
    run=run,
)
