"""Activation functions under torch's names, and dropout.

At a kink the derivative is torch's: 0 for relu and hardtanh, that of the left branch for elu, selu
and leaky_relu.
"""

from __future__ import annotations

from ... import ops
from ...backend import Array, backend_of, using
from ...engine import data_of
from ...rng import Rng, default_rng

SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805
"""Literals, for speed of import; ``nn.gaussian.selu_constants`` derives them."""


def relu(input: Array) -> Array:
    """max(x, 0)."""
    return ops.relu(input)


def gelu(input: Array, approximate: str = "none") -> Array:
    """x Φ(x); ``approximate="tanh"`` for GPT-2's approximation. See ``ops.gelu``."""
    return ops.gelu(input, approximate)


def silu(input: Array) -> Array:
    """x σ(x), also called swish."""
    return ops.silu(input)


def sigmoid(input: Array) -> Array:
    """1 / (1 + e⁻ˣ)."""
    return ops.sigmoid(input)


def tanh(input: Array) -> Array:
    """The hyperbolic tangent."""
    return ops.tanh(input)


def elu(input: Array, alpha: float = 1.0) -> Array:
    """x above 0, α (eˣ − 1) elsewhere (Clevert et al. 2015, arXiv:1511.07289, eq. 3)."""
    positive = data_of(input) > 0
    return ops.where(positive, input, alpha * ops.expm1(ops.where(positive, 0.0, input)))


def selu(input: Array) -> Array:
    """λ · elu(x, α) with the λ, α whose fixed point is mean 0, variance 1.

    Klambauer et al. 2017, arXiv:1706.02515, eq. 2 and 14.
    """
    return SELU_SCALE * elu(input, SELU_ALPHA)


def leaky_relu(input: Array, negative_slope: float = 0.01) -> Array:
    """x above 0, ``negative_slope`` · x elsewhere."""
    return ops.where(data_of(input) > 0, input, negative_slope * input)


def softplus(input: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """ln(1 + e^(βx)) / β, and x itself where βx > ``threshold``, as torch has it."""
    scaled = beta * input
    return ops.where(data_of(scaled) > threshold, input, ops.softplus(scaled) / beta)


def logsigmoid(input: Array) -> Array:
    """ln σ(x) = −ln(1 + e⁻ˣ), which overflows nowhere."""
    return -ops.softplus(-input)


def mish(input: Array) -> Array:
    """x tanh(ln(1 + eˣ)) (Misra 2019, arXiv:1908.08681)."""
    return input * ops.tanh(ops.softplus(input))


def hardtanh(input: Array, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    """x limited to [``min_val``, ``max_val``]; the derivative is 0 at the limits, unlike clip's."""
    x = data_of(input)
    return ops.where((x > min_val) & (x < max_val), input, ops.clip(x, min_val, max_val))


def glu(input: Array, dim: int = -1) -> Array:
    """a σ(b) of the two halves a, b of an axis (Dauphin et al. 2016, arXiv:1612.08083, eq. 1).

    Raises:
        ValueError: the axis has odd length.
    """
    if input.shape[dim] % 2:
        raise ValueError(f"glu halves axis {dim}, which has odd length in shape {input.shape}")
    a, b = ops.split(input, 2, axis=dim)
    return a * ops.sigmoid(b)


def softmax(input: Array, dim: int) -> Array:
    """exp(x) / Σ exp(x) along the axis ``dim``; a row of −inf gives 0, where torch gives nan."""
    return ops.softmax(input, axis=dim)


def log_softmax(input: Array, dim: int) -> Array:
    """ln softmax(x) along the axis ``dim``."""
    return ops.log_softmax(input, axis=dim)


def dropout(input: Array, p: float = 0.5, training: bool = True, rng: Rng | None = None) -> Array:
    """Zero each element with probability ``p`` and divide the others by 1 − p.

    Srivastava et al. 2014, JMLR 15, section 4, with the division moved to training time.

    Args:
        input: any shape.
        p: in [0, 1]; 1 gives zeros.
        training: False returns the input itself.
        rng: what is drawn from (None: ``default_rng()``); one draw per element.

    Raises:
        ValueError: ``p`` is not a probability.
    """
    _probability("dropout", p)
    if not training or p == 0.0:
        return input
    return input * (_kept(input, 1.0 - p, rng) * (1.0 / (1.0 - p) if p < 1.0 else 0.0))


def _probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} takes a probability p in [0, 1], got {p}")


def _kept(input: Array, q: float, rng: Rng | None) -> Array:
    """1 with probability q, else 0, for each element."""
    with using(backend_of(data_of(input)).name):
        keep = (default_rng() if rng is None else rng).bernoulli(q, input.shape)
    return keep.astype(input.dtype)


def alpha_dropout(
    input: Array, p: float = 0.5, training: bool = False, rng: Rng | None = None
) -> Array:
    """Replace each element with probability ``p`` by the lower limit of selu, −λα, then rescale.

    Klambauer et al. 2017, arXiv:1706.02515, section 3.  With α′ = −λα and q = 1 − p the result is
    a (x or α′) + b, where a = (q + α′² p q)^(−1/2) and b = −a p α′: inputs of mean 0 and variance 1
    stay so, where plain dropout would raise their variance to 1/q.

    Args:
        input: any shape.
        p: in [0, 1]; 1 gives zeros.
        training: False returns the input itself.
        rng: what is drawn from (None: ``default_rng()``); one draw per element.

    Raises:
        ValueError: ``p`` is not a probability.
    """
    _probability("alpha_dropout", p)
    if not training or p == 0.0:
        return input
    if p == 1.0:
        return input * 0.0
    low, q = -SELU_SCALE * SELU_ALPHA, 1.0 - p
    a = (q + low * low * p * q) ** -0.5
    keep = _kept(input, q, rng)
    return input * (a * keep) + (a * low * (1.0 - keep) - a * p * low)
