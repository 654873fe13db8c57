"""Linear recurrences in logarithmically many steps, and the diagonal linear RNN that uses them.

x ↦ a x + b and then x ↦ a′x + b′ is x ↦ a a′ x + (a′ b + b′): maps of this form are closed under
composition, and composition is associative, so all states of xₜ = aₜ xₜ₋₁ + bₜ are the prefixes
of one long product and can be had by bracketing it as a tree.

==========================================  =========================  ===========================
(a, b) ∘ (a′, b′) = (a a′, a′ b + b′)       Blelloch 1990, "Prefix     ``compose_affine``,
                                            Sums and Their             ``linear_scan``
                                            Applications",
                                            CMU-CS-90-190, 1.4
a tree, 2n compositions, 2 log₂ n deep      the same, 1.2              ``associative_scan``
n log₂ n compositions, log₂ n deep          Hillis & Steele 1986,      ``hillis_steele_scan``
                                            CACM 29(12), p. 1173
xₜ = λ xₜ₋₁ + γ uₜ, λ = e^(−ν + iθ),        Orvieto et al. 2023,       ``lru``
γ = √(1 − |λ|²)                             "Resurrecting Recurrent
                                            Neural Networks for Long
                                            Sequences",
                                            arXiv:2303.06349, 3.3, 3.4
u = B·input, output = Re(C x) + D ∘ input   the same, eq. 1 and A      ``LRU``
ν = e^ν′, θ = e^θ′; λ uniform on a ring     the same, 3.3, lemma 3.2   ``LRU``
==========================================  =========================  ===========================

γ keeps the variance of the state at that of its white input, however close λ is to the circle.

Deviations: complex numbers are pairs of real arrays, since the engine differentiates real ones.
``lru`` sums float16 in float32: outputs are float16, states float32.
The uniform |λ|² of the initialisation is kept 10⁻⁷ away from 0 and 1, where ν′ would be infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..nn.module import Module, Parameter
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .arguments import narrow, rate_of, wide

__all__ = [
    "LRU", "Complex", "associative_scan", "compose_affine", "hillis_steele_scan", "linear_scan",
    "lru",
]  # fmt: skip

Elements = tuple[Any, ...]
Combine = Callable[[Elements, Elements], Elements]

SMALLEST = 1e-7


class Complex(NamedTuple):
    """An array of complex numbers as two real ones of the same shape."""

    real: Array
    imag: Array


def compose_affine(first: Elements, then: Elements) -> Elements:
    """(a, b) ∘ (a′, b′) = (a a′, a′ b + b′): the map x ↦ a x + b, followed by the other one."""
    (a, b), (next_a, next_b) = first, then
    return a * next_a, next_a * b + next_b


def _compose_complex(first: Elements, then: Elements) -> Elements:
    """The same with the complex numbers a = p + iq and b = r + is."""
    p, q, r, s = first
    next_p, next_q, next_r, next_s = then
    return (
        p * next_p - q * next_q,
        p * next_q + q * next_p,
        next_p * r - next_q * s + next_r,
        next_p * s + next_q * r + next_s,
    )


# Scans


def associative_scan(combine: Combine, elements: Elements, axis: int = -2) -> Elements:
    """e₁, e₁ ∘ e₂, e₁ ∘ e₂ ∘ e₃, …: neighbours are joined, the pairs scanned, the gaps filled.

    Args:
        combine: ∘, an associative function of two tuples of arrays to one, elementwise along
            ``axis``; it is called at most 2 log₂ n times, with fewer than 2n elements in all.
        elements: arrays with n elements along ``axis``.  Their other axes are what ``combine``
            makes of them: each of its results has to have the shape of its operands.
        axis: counted from the end, so that the arrays need not have equally many axes.

    Returns:
        Arrays of the same shapes, of which element t joins those from the first to t.

    Raises:
        ValueError: ``axis`` is not negative, or the lengths along it differ.
    """
    n = _length(elements, axis)
    if n < 2:
        return elements
    pairs = combine(_part(elements, axis, 0, n - 1, 2), _part(elements, axis, 1, n, 2))
    odd = associative_scan(combine, pairs, axis)
    even = _part(elements, axis, 0, 1)
    if n > 2:
        gaps = combine(_part(odd, axis, 0, (n - 1) // 2), _part(elements, axis, 2, n, 2))
        even = _joined(even, gaps, axis)
    return tuple(_interleaved(x, y, axis) for x, y in zip(even, odd, strict=True))


def hillis_steele_scan(combine: Combine, elements: Elements, axis: int = -2) -> Elements:
    """As ``associative_scan``: half as deep, log₂ n / 2 times the work; for short sequences."""
    n, step = _length(elements, axis), 1
    while step < n:
        joined = combine(_part(elements, axis, 0, n - step), _part(elements, axis, step, n))
        elements = _joined(_part(elements, axis, 0, step), joined, axis)
        step *= 2
    return elements


def _length(elements: Elements, axis: int) -> int:
    if axis >= 0:
        raise ValueError(f"the axis of a scan is counted from the end (−1, −2, …), got {axis}")
    shapes = [tuple(x.shape) for x in elements]
    lengths = {shape[axis] if len(shape) >= -axis else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"a scan along axis {axis} takes arrays of one length there, got shapes {shapes}"
        )
    return int(lengths.pop() or 0)


def _part(elements: Elements, axis: int, start: int, stop: int, step: int = 1) -> Elements:
    key = (..., slice(start, stop, step), *(slice(None),) * (-axis - 1))
    return tuple(x[key] for x in elements)


def _joined(first: Elements, then: Elements, axis: int) -> Elements:
    return tuple(ops.concatenate(pair, axis=axis) for pair in zip(first, then, strict=True))


def _interleaved(even: Array, odd: Array, axis: int) -> Array:
    """even₁, odd₁, even₂, …; there may be one more of the first."""
    (same,) = _part((even,), axis, 0, odd.shape[axis])
    both = ops.stack([same, odd], axis=axis)
    at = even.ndim + axis
    both = both.reshape((*odd.shape[:at], 2 * odd.shape[at], *odd.shape[at + 1 :]))
    if even.shape[at] == odd.shape[at]:
        return both
    (last,) = _part((even,), axis, odd.shape[at], even.shape[at])
    return ops.concatenate([both, last], axis=axis)


def linear_scan(decay: Array, update: Array, initial: Array | None = None, axis: int = -2) -> Array:
    """All states of xₜ = aₜ xₜ₋₁ + bₜ.

    Only products of neighbouring a are ever formed, so nothing overflows as long as |a| ≤ 1.

    Args:
        decay: a, with n elements along ``axis``.
        update: b, likewise; the two broadcast to each other.
        initial: x₀, of their shape without ``axis``; None for 0.
        axis: the axis of time, counted from the end.

    Returns:
        x₁ … xₙ, of the shape to which a and b broadcast.

    Raises:
        ValueError: ``axis`` is not negative, or the lengths along it differ.
    """
    _length((decay, update), axis)
    update = update + _zero(decay)
    products, states = associative_scan(compose_affine, (decay, update), axis)
    if initial is None:
        return states
    return states + products * ops.expand_dims(initial, axis)


def _zero(x: Array) -> Array:
    """Zeros of this shape, which broadcast another array and add nothing."""
    return of(x).zeros(x.shape, x.dtype)


# The linear recurrent unit


def lru(
    update: Complex,
    nu: Array,
    theta: Array,
    gamma: Array | None = None,
    state: tuple[Array, ...] | None = None,
) -> Any:
    """xₜ = λ ∘ xₜ₋₁ + γ ∘ uₜ with λ = e^(−ν + iθ), for each unit alone.

    Args:
        update: u, two arrays (…, n, d).
        nu: ν (d,), positive: |λ| = e^(−ν).
        theta: θ (d,), in radians a step.
        gamma: γ (d,); None for √(1 − |λ|²).
        state: None; or x₀, two arrays (…, d), or () for 0.

    Returns:
        x₁ … xₙ, two arrays (…, n, d); with a state also the next one, xₙ.

    Raises:
        ValueError: the shapes do not fit.
    """
    u, v = update
    if u.shape != v.shape or u.ndim < 2 or not nu.shape == theta.shape == u.shape[-1:]:
        raise ValueError(
            "lru takes an update of two arrays (…, n, d), nu (d,) and theta (d,), got "
            f"{u.shape}, {v.shape}, {nu.shape} and {theta.shape}"
        )
    like, u, v = u, wide(u), wide(v)
    nu, theta, gamma = (rate_of(x, u) for x in (nu, theta, gamma))
    if gamma is None:
        gamma = ops.sqrt(-ops.expm1(-2.0 * nu))
    n, radius = u.shape[-2], ops.exp(-nu)
    p, q = (
        ops.broadcast_to(part, (n, u.shape[-1]))
        for part in (radius * ops.cos(theta), radius * ops.sin(theta))
    )
    p, q, r, s = associative_scan(_compose_complex, (p, q, gamma * u, gamma * v))
    if not state:
        x = Complex(r, s)
        start = Complex(*(of(u).zeros((*u.shape[:-2], u.shape[-1]), u.dtype) for _ in range(2)))
    else:
        start = Complex(*state)
        a, b = (ops.expand_dims(part, -2) for part in start)
        x = Complex(p * a - q * b + r, p * b + q * a + s)
    outputs = Complex(narrow(x.real, like), narrow(x.imag, like))
    if state is None:
        return outputs
    return outputs, Complex(x.real[..., -1, :], x.imag[..., -1, :]) if n else start


class LRU(Module):
    """A linear recurrent unit: a diagonal linear RNN between two dense maps.

    Args:
        features: of the input and the output, d.
        units: of the state, N.
        r_min, r_max: the ring on which λ starts, uniformly by area.
        max_phase: its angles start between 0 and this, in radians.
        rng: what the parameters are drawn from (None: ``default_rng()``).

    Attributes:
        nu_log, theta_log, gamma_log: (N,), the logarithms of ν, θ and γ; γ starts as √(1 − |λ|²)
            and is then learned.
        B_re, B_im: (N, d), from N(0, 1/2d).
        C_re, C_im: (d, N), from N(0, 1/N).
        D: (d,), from N(0, 1).

    Raises:
        ValueError: not 0 ≤ r_min < r_max ≤ 1, or ``max_phase`` is not positive.
    """

    def __init__(
        self,
        features: int,
        units: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2.0 * math.pi,
        *,
        rng: Rng | None = None,
    ) -> None:
        if not 0.0 <= r_min < r_max <= 1.0 or max_phase <= 0.0:
            raise ValueError(
                "LRU takes 0 ≤ r_min < r_max ≤ 1 and max_phase > 0, got "
                f"{r_min}, {r_max} and {max_phase}"
            )
        rng = default_rng() if rng is None else rng
        self.features = features
        self.units = units
        drawn = rng.uniform((units,), r_min * r_min, r_max * r_max, dtype="float64")
        square = ops.clip(drawn, SMALLEST, 1.0 - SMALLEST)
        phase = ops.maximum(rng.uniform((units,), 0.0, max_phase, dtype="float64"), SMALLEST)
        nu = -0.5 * ops.log(square)
        self.nu_log = _float32(ops.log(nu))
        self.theta_log = _float32(ops.log(phase))
        self.gamma_log = _float32(0.5 * ops.log(1.0 - square))
        inner = (units, features)
        self.B_re, self.B_im = (
            Parameter(rng.normal(inner, std=1.0 / math.sqrt(2.0 * features))) for _ in range(2)
        )
        self.C_re, self.C_im = (
            Parameter(rng.normal(inner[::-1], std=1.0 / math.sqrt(units))) for _ in range(2)
        )
        self.D = Parameter(rng.normal((features,)))

    def forward(self, input: Array, state: tuple[Array, ...] | None = None) -> Any:
        """(…, n, d) → (…, n, d); with a state, see ``lru``, also the next one."""
        update = Complex(ops.linear(input, self.B_re), ops.linear(input, self.B_im))
        nu, theta, gamma = (ops.exp(p) for p in (self.nu_log, self.theta_log, self.gamma_log))
        x, state_after = lru(update, nu, theta, gamma, () if state is None else state)
        y = ops.linear(x.real, self.C_re) - ops.linear(x.imag, self.C_im) + self.D * input
        return y if state is None else (y, state_after)


def _float32(x: Array) -> Parameter:
    return Parameter(ops.astype(x, "float32"))
