"""How weights start: one law, and the named initialisers as instances of it.

A layer y = W x of independent weights with mean 0 gives E y² = fan_in · Var(w) · mean x², whatever
the mean of x; its backward pass does the same with fan_out.  So each classic proposal is a choice
of ``scale``, of the fan and of a distribution with variance scale / fan:

======================================================  ==============================
Var(w) = scale / fan                                    ``variance_scaling_``
1 / fan_in: LeCun, Bottou, Orr, Müller 1998, §4.6       ``lecun_normal_, lecun_uniform_``
1 / fan_out: the same for the gradients                 ``fan_out_normal_, fan_out_uniform_``
2 / (fan_in + fan_out): Glorot & Bengio 2010, eq. 12    ``xavier_normal_``; eq. 16 ``_uniform_``
2 / ((1 + a²) fan_in): He, Zhang, Ren, Sun 2015,
arXiv:1502.01852, eqs. 10, 14, 15                       ``kaiming_normal_, kaiming_uniform_``
Q of Haar measure: Saxe, McClelland, Ganguli 2013,
arXiv:1312.6120; Mezzadri 2006, arXiv:math-ph/0609050   ``orthogonal_``
N(μ, σ²) within [μ + aσ, μ + bσ]                        ``trunc_normal_``
======================================================  ==============================

Every function writes into ``tensor`` (a Parameter, a Tensor without history, or an array, also a
view such as ``weight.data[:, :d]``) in place, keeps its dtype and backend, and returns it.  Numbers
are drawn on the host, so a seed gives the same weights everywhere.  Names and argument order are
those of ``torch.nn.init``, whose ``generator`` is our ``rng`` (None: ``default_rng()``).

Deviations: the bounds of ``trunc_normal_`` are in units of ``std``; torch's are absolute, so that
there std = 0.02 with the default ±2 truncates nothing.  A truncated normal asked for by
``variance_scaling_`` has the variance of the law, as in JAX and Keras: its parent is wider by
1 / 0.8796.  Fans know ``groups`` and both layouts of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..backend import Array, backend_of, of, using
from ..engine import Tensor, data_of
from ..rng import Rng, default_rng
from .truncated import truncated_moments

T = TypeVar("T")

__all__ = [
    "calculate_gain", "constant_", "dirac_", "eye_", "fan_out_normal_", "fan_out_uniform_", "fans",
    "kaiming_normal_", "kaiming_uniform_", "lecun_normal_", "lecun_uniform_", "normal_", "ones_",
    "orthogonal_", "trunc_normal_", "truncated_moments", "uniform_", "variance_scaling_",
    "xavier_normal_", "xavier_uniform_", "zeros_",
]  # fmt: skip


# The law


def fans(shape: Sequence[int], layout: str = "out_in", groups: int = 1) -> tuple[int, int]:
    """How many inputs an output sums over, and how many outputs an input goes to.

    ==============  =======================================  ====================================
    layout          weight                                   layer
    ==============  =======================================  ====================================
    ``out_in``      (out, in/groups, *kernel)                Linear, convolutions
    ``conv``        the same, with a kernel                  convolutions
    ``in_out``      (in, out/groups, *kernel)                GPT-2's Conv1D, transposed conv.
    ==============  =======================================  ====================================

    torch has neither ``in_out`` nor ``groups``: it reads a transposed convolution's fans
    interchanged, and its fan_out of a grouped convolution is ``groups`` times too large.  Strides
    and borders are not looked at: with a stride s per axis, a convolution's inputs reach 1/s of the
    outputs counted here, and a transposed one's outputs sum over 1/s of the inputs.

    Returns:
        fan_in, fan_out.

    Raises:
        ValueError: fewer than two axes (a bias has no fan), an unknown layout, or a first axis
            that is not divisible by ``groups``.
    """
    if layout not in ("out_in", "in_out", "conv"):
        raise ValueError(f"layout is 'out_in', 'in_out' or 'conv', got {layout!r}")
    if len(shape) < (3 if layout == "conv" else 2):
        raise ValueError(
            f"a weight of shape {tuple(shape)} has no fans in layout {layout!r}: they need an axis "
            "of inputs and one of outputs"
            + (", and a kernel" if layout == "conv" else "; use zeros_ or normal_ for a vector")
        )
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"the first axis of {tuple(shape)} does not split into {groups} groups")
    window = math.prod(shape[2:])
    first, second = shape[0] // groups * window, shape[1] * window
    return (first, second) if layout == "in_out" else (second, first)


def variance_scaling_(
    tensor: T,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    *,
    layout: str = "out_in",
    groups: int = 1,
    rng: Rng | None = None,
) -> T:
    """Independent weights of mean 0 and variance scale / fan.

    Args:
        tensor: a weight of two or more axes.
        scale: the gain squared.
        mode: ``fan_in``, ``fan_out`` or ``fan_avg``, their mean.
        distribution: ``normal``, ``uniform`` on ±√3 standard deviations, or ``truncated_normal``:
            the normal that has this variance after it is truncated at 2 of its own standard
            deviations, which is 2.2737 of the result's.
        layout, groups: see ``fans``.
        rng: None for ``default_rng()``.

    Raises:
        ValueError: a negative ``scale``, an unknown ``mode`` or ``distribution``, a shape without
            fans.
        TypeError: ``tensor`` is no floating-point array.
    """
    fan_in, fan_out = fans(_data(tensor).shape, layout, groups)
    choice = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if mode not in choice:
        raise ValueError(f"mode is one of {', '.join(choice)}, got {mode!r}")
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale is a variance, finite and at least 0, got {scale}")
    if distribution not in ("normal", "uniform", "truncated_normal"):
        raise ValueError(
            f"distribution is normal, uniform or truncated_normal, got {distribution!r}"
        )
    std = math.sqrt(scale / max(choice[mode], 1))  # a fan of 0 is that of an empty tensor
    if distribution == "normal":
        return normal_(tensor, 0.0, std, rng=rng)
    if distribution == "uniform":
        return uniform_(tensor, -math.sqrt(3.0) * std, math.sqrt(3.0) * std, rng=rng)
    if std == 0.0:
        return zeros_(tensor)
    return trunc_normal_(tensor, 0.0, std, corrected=True, rng=rng)


def lecun_normal_(tensor: T, *, layout: str = "out_in", rng: Rng | None = None) -> T:
    """N(0, 1 / fan_in): y keeps the mean square of x; what SELU wants."""
    return variance_scaling_(tensor, 1.0, "fan_in", "normal", layout=layout, rng=rng)


def lecun_uniform_(tensor: T, *, layout: str = "out_in", rng: Rng | None = None) -> T:
    """U(−b, b) with b = √(3 / fan_in)."""
    return variance_scaling_(tensor, 1.0, "fan_in", "uniform", layout=layout, rng=rng)


def fan_out_normal_(tensor: T, *, layout: str = "out_in", rng: Rng | None = None) -> T:
    """N(0, 1 / fan_out), LeCun's for the backward pass: the gradient keeps its mean square."""
    return variance_scaling_(tensor, 1.0, "fan_out", "normal", layout=layout, rng=rng)


def fan_out_uniform_(tensor: T, *, layout: str = "out_in", rng: Rng | None = None) -> T:
    """U(−b, b) with b = √(3 / fan_out)."""
    return variance_scaling_(tensor, 1.0, "fan_out", "uniform", layout=layout, rng=rng)


def xavier_normal_(tensor: T, gain: float = 1.0, *, rng: Rng | None = None) -> T:
    """N(0, gain² · 2 / (fan_in + fan_out)): between LeCun's and its dual."""
    return variance_scaling_(tensor, gain * gain, "fan_avg", "normal", rng=rng)


def xavier_uniform_(tensor: T, gain: float = 1.0, *, rng: Rng | None = None) -> T:
    """U(−b, b) with b = gain · √(6 / (fan_in + fan_out))."""
    return variance_scaling_(tensor, gain * gain, "fan_avg", "uniform", rng=rng)


def kaiming_normal_(
    tensor: T,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    *,
    layout: str = "out_in",
    rng: Rng | None = None,
) -> T:
    """N(0, gain² / fan), with the gain of ``calculate_gain(nonlinearity, a)``.

    Args:
        a: the slope of a leaky ReLU; 0 is that of ReLU, which halves the mean square.
        mode: ``fan_in`` keeps the mean square of the outputs, ``fan_out`` that of the gradients.
    """
    gain = calculate_gain(nonlinearity, a)
    return variance_scaling_(tensor, gain * gain, mode, "normal", layout=layout, rng=rng)


def kaiming_uniform_(
    tensor: T,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    *,
    layout: str = "out_in",
    rng: Rng | None = None,
) -> T:
    """U(−b, b) with b = gain · √(3 / fan); the arguments are those of ``kaiming_normal_``.

    torch's layers call it with a = √5: b = 1 / √fan_in, a variance of 1 / (3 fan_in).
    """
    gain = calculate_gain(nonlinearity, a)
    return variance_scaling_(tensor, gain * gain, mode, "uniform", layout=layout, rng=rng)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """torch's table of gains, by the names of its functions.

    Exact for what it is derived for, E f(z)² = 1 / gain² with z ~ N(0, 1): ``linear`` 1, ``relu``
    √2, ``leaky_relu`` √(2 / (1 + param²)) with a slope of 0.01 by default.  The others are
    heuristics: ``tanh`` 5/3 where the mean square asks for 1.5925, ``sigmoid`` 1 where it asks for
    1.8462, ``selu`` 3/4 where SELU is made for 1.

    Raises:
        ValueError: a function that is not in the table.
    """
    layers = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
    table = {"sigmoid": 1.0, "tanh": 5.0 / 3.0, "relu": math.sqrt(2.0), "selu": 0.75}
    table |= dict.fromkeys(["linear", *layers], 1.0)
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2.0 / (1.0 + slope * slope))
    if nonlinearity not in table:
        raise ValueError(
            f"no gain is known for {nonlinearity!r}: choose one of {', '.join(table)}, leaky_relu, "
            "or pass scale = 1 / E f(z)² to variance_scaling_"
        )
    return table[nonlinearity]


# Distributions


def normal_(tensor: T, mean: float = 0.0, std: float = 1.0, *, rng: Rng | None = None) -> T:
    """N(mean, std²); a ``std`` of 0 gives the mean.

    Raises:
        ValueError: ``std`` is negative.
    """
    if not std >= 0.0:
        raise ValueError(f"a standard deviation is at least 0, got {std}")
    return _draw(tensor, rng, lambda r, data: r.normal(data.shape, mean, std, data.dtype))


def uniform_(tensor: T, a: float = 0.0, b: float = 1.0, *, rng: Rng | None = None) -> T:
    """U(a, b), of standard deviation (b − a) / √12.

    Raises:
        ValueError: ``b`` is below ``a``.
    """
    if not a <= b:
        raise ValueError(f"U(a, b) needs a ≤ b, got a={a}, b={b}")
    return _draw(tensor, rng, lambda r, data: r.uniform(data.shape, a, b, data.dtype))


def trunc_normal_(
    tensor: T,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    *,
    corrected: bool = False,
    rng: Rng | None = None,
) -> T:
    """A normal distribution without its tails; no result is ever outside of the bounds.

    Args:
        mean, std: of the normal that is truncated, which is TensorFlow's ``truncated_normal``; or
            with ``corrected`` of the result.  Truncation at ±2 takes a std of 0.02 to 0.017593.
        a, b: the bounds in standard deviations of the normal that is truncated, from its mean.
            torch's bounds are absolute: its ``trunc_normal_(w, m, s, a, b)`` is ours with
            ``a=(a - m) / s, b=(b - m) / s``.
        corrected: draw from the normal whose truncation has ``mean`` and ``std``.
        rng: None for ``default_rng()``.

    Raises:
        ValueError: ``std`` is not positive, or a ≥ b.
    """
    if not (0.0 < std < math.inf and a < b):
        raise ValueError(f"trunc_normal_ needs std > 0 and a < b, got std={std}, a={a}, b={b}")
    if corrected:
        centre, spread = truncated_moments(0.0, 1.0, a, b)
        std = std / spread
        mean = mean - std * centre
    low, high = mean + a * std, mean + b * std

    def draw(rng: Rng, data: Array) -> Array:
        return rng.truncated_normal(data.shape, mean, std, low, high, data.dtype)

    return _draw(tensor, rng, draw)


def orthogonal_(tensor: T, gain: float = 1.0, *, rng: Rng | None = None) -> T:
    """A matrix with orthonormal rows or columns, whichever are fewer, uniform among all of them.

    The axes after the first count as one.  QR gives Q of a normal matrix only up to the signs that
    the algorithm likes best; with those of R's diagonal the decomposition is unique, and Q has the
    Haar measure: E Q = 0, and a rotation of Q has its distribution.

    Raises:
        ValueError: fewer than two axes.
    """
    data = _data(tensor)
    if data.ndim < 2:
        raise ValueError(f"an orthogonal matrix has two axes or more, got shape {data.shape}")
    rows, columns = data.shape[0], math.prod(data.shape[1:])
    tall = (max(rows, columns), min(rows, columns))
    with using("numpy"):  # another library's QR would give other digits
        normal = (default_rng() if rng is None else rng).normal(tall, dtype="float64")
    xp = of(normal)
    q, r = xp.linalg.qr(normal)
    q = gain * q * xp.where(xp.diagonal(r) < 0.0, -1.0, 1.0)
    q = (q if rows >= columns else q.T).reshape(data.shape)
    data[...] = of(data).asarray(q.astype(data.dtype))
    return tensor


# Constants


def constant_(tensor: T, val: float) -> T:
    """``val`` everywhere."""
    _data(tensor)[...] = val
    return tensor


def zeros_(tensor: T) -> T:
    """0 everywhere."""
    return constant_(tensor, 0.0)


def ones_(tensor: T) -> T:
    """1 everywhere."""
    return constant_(tensor, 1.0)


def eye_(tensor: T) -> T:
    """The identity, with rows or columns of zeros where the matrix is not square.

    Raises:
        ValueError: not two axes.
    """
    data = _data(tensor)
    if data.ndim != 2:
        raise ValueError(f"eye_ takes a matrix, got shape {data.shape}")
    data[...] = of(data).eye(*data.shape, dtype=data.dtype)
    return tensor


def dirac_(tensor: T, groups: int = 1) -> T:
    """The identity as a convolution: 1 in the middle of the kernel from channel i to channel i.

    Each group of (out, in/groups, *kernel) keeps as many channels as it has both of.

    Raises:
        ValueError: not one to three kernel axes, or outputs that do not split into the groups.
    """
    data = _data(tensor)
    if data.ndim not in (3, 4, 5):
        raise ValueError(f"dirac_ takes (out, in, *kernel) of 3 to 5 axes, got shape {data.shape}")
    if groups < 1 or data.shape[0] % groups:
        raise ValueError(f"{data.shape[0]} output channels do not split into {groups} groups")
    data[...] = 0.0
    middle = tuple(length // 2 for length in data.shape[2:])
    per_group = data.shape[0] // groups
    kept = of(data).eye(per_group, data.shape[1], dtype=data.dtype)
    for group in range(groups):
        data[(slice(group * per_group, (group + 1) * per_group), slice(None), *middle)] = kept
    return tensor


def _data(tensor: Any) -> Array:
    """The array to write into."""
    data = data_of(tensor)
    if getattr(getattr(data, "dtype", None), "kind", "") != "f" or not hasattr(data, "__setitem__"):
        raise TypeError(
            "an initialiser fills a floating-point Parameter, Tensor or array in place, got "
            f"{type(tensor).__name__} of dtype {getattr(data, 'dtype', 'none')}"
        )
    if isinstance(tensor, Tensor) and tensor.node is not None and tensor.node.primitive is not None:
        raise ValueError(
            "an initialiser would change a Tensor that was computed from others: pass its "
            "detach(), or the Parameter itself"
        )
    return data


def _draw(tensor: T, rng: Rng | None, draw: Callable[[Rng, Array], Array]) -> T:
    data = _data(tensor)
    with using(backend_of(data).name):
        data[...] = draw(default_rng() if rng is None else rng, data)
    return tensor
