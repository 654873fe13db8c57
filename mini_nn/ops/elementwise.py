"""Functions of each element: arithmetic, comparison, exponentials, rounding.

Names, arguments and broadcasting are NumPy's.  Every function takes Tensors, arrays and numbers, in
any mixture, and returns a Tensor if one of them is a Tensor.  Conventions at kinks:

========================  ==================================================
``maximum, minimum``      a tie shares the gradient equally
``abs, sign``             0 at 0
``clip``                  1 at both bounds, as in torch
``power(x, 0)``           0 for every x, also x = 0
``where``                 the branch not taken gets 0, whatever it holds
``sqrt, log`` at 0        inf, as the limit says; mask with ``where`` before, not after
========================  ==================================================
"""

from __future__ import annotations

import math
from typing import Any

from .. import backend
from ..engine import data_of, primitive

__all__ = [
    "abs", "add", "arccos", "arctan", "astype", "clip", "cos", "divide", "equal", "erf", "exp",
    "expm1", "floor", "greater", "greater_equal", "isfinite", "isnan", "less", "less_equal",
    "log", "log1p", "maximum", "minimum", "multiply", "negative", "not_equal", "power", "round",
    "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "subtract", "tanh", "where",
]  # fmt: skip

LARGEST_EXPONENT = {2: 11.0, 4: 88.0, 8: 709.0, 16: 709.0}  # of exp, by the bytes of a number
TWO_OVER_SQRT_PI = 1.1283791670955126


def of(x: Any) -> Any:
    """The namespace of an array or of a Tensor's array."""
    known = backend.array_types.get(type(x))
    return known.xp if known is not None else backend.of(data_of(x))


def of_any(*xs: Any) -> Any:
    """The namespace of the first argument that is an array rather than a number."""
    for x in xs:
        if hasattr(x, "ndim") and not isinstance(x, backend.Scalar):  # NumPy's numbers have an ndim
            return of(x)
    return of(xs[0])


@primitive
def add(x1: Any, x2: Any) -> Any:
    """x₁ + x₂."""
    return x1 + x2


add.derivative(x1=lambda g: g, x2=lambda g: g)


@primitive
def subtract(x1: Any, x2: Any) -> Any:
    """x₁ − x₂."""
    return x1 - x2


subtract.derivative(x1=lambda g: g, x2=lambda g: -g)


@primitive
def multiply(x1: Any, x2: Any) -> Any:
    """x₁ · x₂."""
    return x1 * x2


multiply.derivative(x1=lambda g, x2: g * x2, x2=lambda g, x1: g * x1)


@primitive
def divide(x1: Any, x2: Any) -> Any:
    """x₁ / x₂; division by 0 gives ±inf or nan, with NumPy's warning."""
    return x1 / x2


divide.derivative(x1=lambda g, x2: g / x2, x2=lambda g, y, x2: -g * y / x2)


@primitive
def negative(x: Any) -> Any:
    """−x."""
    return -x


negative.derivative(x=lambda g: -g)


@primitive
def power(x1: Any, x2: Any) -> Any:
    """x₁ to the power x₂; small integer exponents are multiplied out, which is far faster."""
    if isinstance(x2, (int, float)):
        if x2 == 2:
            return x1 * x1
        if x2 == 3:
            return x1 * x1 * x1
        if x2 == 0.5:
            return of(x1).sqrt(x1)
        if x2 == -0.5:
            return 1 / of(x1).sqrt(x1)
    return of_any(x1, x2).power(x1, x2)


def _power_base(g: Any, x1: Any, x2: Any) -> Any:
    """g x₂ x₁^(x₂−1), and 0 where x₂ = 0 although x₁ may be 0 there."""
    if isinstance(x2, (int, float)):
        return of(g).zeros(g.shape, g.dtype) if x2 == 0 else g * x2 * power(x1, x2 - 1)
    return g * x2 * power(x1, where(equal(x2, 0), 1.0, x2 - 1))


def _power_exponent(g: Any, y: Any, x1: Any) -> Any:
    """g y ln x₁, and 0 where x₁ = 0, the limit for positive exponents."""
    if isinstance(x1, (int, float)):
        return g * y * (math.log(x1) if x1 > 0 else 0.0 if x1 == 0 else math.nan)
    positive = greater(x1, 0)
    outside = where(equal(x1, 0), 0.0, data_of(y) * math.nan)
    return g * where(positive, y * log(where(positive, x1, 1.0)), outside)


power.derivative(x1=_power_base, x2=_power_exponent)


@primitive
def square(x: Any) -> Any:
    """x²."""
    return x * x


square.derivative(x=lambda g, x: g * (2 * x))


@primitive
def exp(x: Any) -> Any:
    """eˣ."""
    return of(x).exp(x)


exp.derivative(x=lambda g, y: g * y)


@primitive
def expm1(x: Any) -> Any:
    """eˣ − 1, accurate near 0."""
    return of(x).expm1(x)


expm1.derivative(x=lambda g, y: g * (y + 1))


@primitive
def log(x: Any) -> Any:
    """ln x; −inf at 0 and nan below, with NumPy's warning."""
    return of(x).log(x)


log.derivative(x=lambda g, x: g / x)


@primitive
def log1p(x: Any) -> Any:
    """ln(1 + x), accurate near 0."""
    return of(x).log1p(x)


log1p.derivative(x=lambda g, x: g / (1 + x))


@primitive
def sqrt(x: Any) -> Any:
    """√x; nan below 0, with NumPy's warning."""
    return of(x).sqrt(x)


sqrt.derivative(x=lambda g, y: g / (2 * y))


@primitive
def rsqrt(x: Any) -> Any:
    """1 / √x."""
    return 1 / of(x).sqrt(x)


rsqrt.derivative(x=lambda g, y: g * (-0.5 * y * y * y))


@primitive
def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return of(x).tanh(x)


tanh.derivative(x=lambda g, y: g * (1 - y * y))


@primitive
def sigmoid(x: Any) -> Any:
    """1 / (1 + e⁻ˣ), accurate far into the left tail; it ends where e⁻ˣ would overflow."""
    largest = LARGEST_EXPONENT[x.dtype.itemsize]
    y = -x.clip(-largest, largest)  # three times as fast as a one-sided minimum
    out = y if y.ndim else None  # NumPy's 0-d results are scalars, which cannot be written to
    y = of(x).exp(y, out=out)
    y += 1
    return of(x).divide(1.0, y, out=out)


sigmoid.derivative(x=lambda g, y: g * (y * (1 - y)))


@primitive
def erf(x: Any) -> Any:
    """The error function 2/√π ∫₀ˣ e^(−t²) dt."""
    return backend.special(x).erf(x)


erf.derivative(x=lambda g, x: g * (TWO_OVER_SQRT_PI * exp(-x * x)))


@primitive
def sin(x: Any) -> Any:
    """The sine of an angle in radians."""
    return of(x).sin(x)


@primitive
def cos(x: Any) -> Any:
    """The cosine of an angle in radians."""
    return of(x).cos(x)


sin.derivative(x=lambda g, x: g * cos(x))
cos.derivative(x=lambda g, x: -g * sin(x))


@primitive
def arctan(x: Any) -> Any:
    """The angle in (−π/2, π/2) with tangent x."""
    return of(x).arctan(x)


arctan.derivative(x=lambda g, x: g / (1 + x * x))


@primitive
def arccos(x: Any) -> Any:
    """The angle in [0, π] with cosine x; the derivative is infinite at ±1."""
    return of(x).arccos(x)


arccos.derivative(x=lambda g, x: -g / sqrt(1 - x * x))


@primitive
def sign(x: Any) -> Any:
    """−1, 0 or 1; its derivative is 0 everywhere."""
    return of(x).sign(x)


@primitive
def abs(x: Any) -> Any:
    """|x|."""
    return of(x).abs(x)


abs.derivative(x=lambda g, x: g * sign(x))


@primitive
def floor(x: Any) -> Any:
    """The largest integer not above x; its derivative is 0 everywhere."""
    return of(x).floor(x)


@primitive
def round(x: Any) -> Any:
    """The nearest integer, ties to even; its derivative is 0 everywhere."""
    return of(x).rint(x)


for _step in (sign, floor, round):
    _step.derivative(x=lambda g: of(g).zeros(g.shape, g.dtype))


@primitive
def maximum(x1: Any, x2: Any) -> Any:
    """The larger of the two; nan if one is nan."""
    return of_any(x1, x2).maximum(x1, x2)


@primitive
def minimum(x1: Any, x2: Any) -> Any:
    """The smaller of the two; nan if one is nan."""
    return of_any(x1, x2).minimum(x1, x2)


def _share(g: Any, y: Any, mine: Any, other: Any) -> Any:
    """All of g to the one that was taken, half to each where they tie."""
    return where(equal(mine, y), where(equal(mine, other), 0.5 * g, g), 0.0)


for _extreme in (maximum, minimum):
    _extreme.derivative(
        x1=lambda g, y, x1, x2: _share(g, y, x1, x2),
        x2=lambda g, y, x1, x2: _share(g, y, x2, x1),
    )


@primitive
def clip(x: Any, min: Any = None, max: Any = None) -> Any:
    """x limited to [min, max]; a bound that is None does not limit, and bounds get no gradient."""
    return of(x).clip(x, min, max)


def _clip_rule(g: Any, x: Any, min: Any, max: Any) -> Any:
    x = data_of(x)
    if min is not None:
        g = where(x >= min, g, 0.0)
    return g if max is None else where(x <= max, g, 0.0)


clip.derivative(x=_clip_rule)


@primitive
def where(condition: Any, x1: Any, x2: Any) -> Any:
    """x₁ where the condition holds, else x₂; the branch not taken gets gradient 0, never nan."""
    return of_any(condition, x1, x2).where(condition, x1, x2)


where.derivative(
    x1=lambda g, condition: where(condition, g, 0.0),
    x2=lambda g, condition: where(condition, 0.0, g),
)


@primitive
def equal(x1: Any, x2: Any) -> Any:
    """x₁ = x₂."""
    return x1 == x2


@primitive
def not_equal(x1: Any, x2: Any) -> Any:
    """x₁ ≠ x₂."""
    return x1 != x2


@primitive
def less(x1: Any, x2: Any) -> Any:
    """x₁ < x₂."""
    return x1 < x2


@primitive
def less_equal(x1: Any, x2: Any) -> Any:
    """x₁ ≤ x₂."""
    return x1 <= x2


@primitive
def greater(x1: Any, x2: Any) -> Any:
    """x₁ > x₂."""
    return x1 > x2


@primitive
def greater_equal(x1: Any, x2: Any) -> Any:
    """x₁ ≥ x₂."""
    return x1 >= x2


@primitive
def isnan(x: Any) -> Any:
    """Whether an element is nan."""
    return of(x).isnan(x)


@primitive
def isfinite(x: Any) -> Any:
    """Whether an element is neither nan nor infinite."""
    return of(x).isfinite(x)


@primitive
def astype(x: Any, dtype: Any, copy: bool = False) -> Any:
    """The same numbers in another dtype; the gradient comes back in the input's own."""
    return x.astype(dtype, copy=copy)


astype.derivative(x=lambda g: g)
