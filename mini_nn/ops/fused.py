"""The layers of a Transformer as single primitives, with their readable twins.

A fused primitive makes few passes over memory, shares work between the gradients of its inputs, and
works in place on arrays of its own.  ``f.composite`` is the definition in plain primitives: it is
what is differentiated at second order, and the tests hold the two equal to order 2.

Two formulations recur because NumPy's row operations are slow where its matrix products are fast:
sums over rows or columns are products with a vector, and a factor that belongs to a row is applied
to the smaller operand.
"""

from __future__ import annotations

import math
from typing import Any

from .. import backend
from ..engine import data_of, primitive
from ..tape import Kept
from .elementwise import equal, exp, log, of, rsqrt, where
from .index import take, take_along_axis
from .products import matmul
from .reduce import logsumexp, mean
from .shape import expand_dims, matrix_transpose, reshape

__all__ = [
    "addmm", "cross_entropy", "embedding", "layer_norm", "linear", "log_softmax", "rms_norm",
    "segment_sum", "softmax",
]  # fmt: skip


def as_rows(x: Any) -> Any:
    """All leading axes as one; ``-1`` could not be inferred where the last axis is empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _column_sums(x: Any) -> Any:
    return of(x).ones(x.shape[0], x.dtype) @ x


# Linear maps


def _linear_definition(x: Any, weight: Any, bias: Any = None) -> Any:
    y = matmul(x, matrix_transpose(weight))
    return y if bias is None else y + bias


@primitive(composite=_linear_definition)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x Wᵀ + b, as torch.nn.functional.linear.

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (…, out).

    Raises:
        ValueError: the shapes do not fit together.
    """
    return _affine("linear", x, weight.T if weight.ndim == 2 else weight, bias, "(out, in)")


def _affine(name: str, x: Any, matrix: Any, bias: Any, layout: str) -> Any:
    fits = matrix.ndim == 2 and x.ndim >= 1 and x.shape[-1] == matrix.shape[0]
    if not fits or not (bias is None or bias.shape == (matrix.shape[1],)):
        needs = matrix.shape if layout == "(in, out)" else matrix.shape[::-1]
        raise ValueError(
            f"{name} takes an input (…, in), a weight {layout} and a bias (out,); got input "
            f"{x.shape}, weight {needs}, bias {None if bias is None else bias.shape}"
        )
    y = as_rows(x).dot(matrix)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], matrix.shape[1])


@linear.joint_derivative("x", "weight", "bias")
def _linear_rule(g: Any, needs: Any, x: Any, weight: Any) -> tuple[Any, Any, Any]:
    rows = as_rows(g)
    return (
        (rows @ weight).reshape(x.shape) if needs[0] else None,  # X̄ = Ȳ W
        rows.T @ as_rows(x) if needs[1] else None,  # W̄ = Ȳᵀ X
        _column_sums(rows) if needs[2] else None,
    )


def _addmm_definition(bias: Any, x: Any, weight: Any) -> Any:
    return matmul(x, weight) + bias


@primitive(composite=_addmm_definition)
def addmm(bias: Any, x: Any, weight: Any) -> Any:
    """b + x W with W (in, out), the layout of GPT-2's checkpoints; torch.addmm for any (…, in)."""
    return _affine("addmm", x, weight, bias, "(in, out)")


@addmm.joint_derivative("bias", "x", "weight")
def _addmm_rule(g: Any, needs: Any, x: Any, weight: Any) -> tuple[Any, Any, Any]:
    rows = as_rows(g)
    return (
        _column_sums(rows) if needs[0] else None,
        (rows @ weight.T).reshape(x.shape) if needs[1] else None,
        as_rows(x).T @ rows if needs[2] else None,
    )


# Rows by number


@primitive
def segment_sum(values: Any, index: Any, count: int) -> Any:
    """The sum of the rows that share a number: row i of the result adds the values with index i.

    Args:
        values: (n, …).
        index: (n,) integers in [0, count); not checked.
        count: the number of rows of the result; a number that does not occur gives zeros.

    Returns:
        (count, …).
    """
    return backend.segment_sum(values, index, count)


segment_sum.derivative(values=lambda g, index: take(g, index, axis=0))


@primitive
def embedding(indices: Any, weight: Any) -> Any:
    """The rows of ``weight`` with these numbers, as torch.nn.functional.embedding.

    Args:
        indices: integers of any shape, in [0, n).
        weight: (n, d).

    Returns:
        (…, d).

    Raises:
        TypeError: the indices are not integers.
        IndexError: one is out of range (on a GPU, where looking would wait for the device, a row of
            nan instead).
    """
    xp = of(weight)
    indices = check_integers(xp.asarray(indices), "embedding")
    outside = out_of_range(indices, weight.shape[0], "embedding")
    rows = xp.take(weight, indices, axis=0)
    return rows if outside is None else xp.where(outside[..., None], float("nan"), rows)


def _embedding_rule(g: Any, indices: Any, like: Any) -> Any:
    index = of(g).asarray(indices).reshape(-1)
    return segment_sum(reshape(g, (index.size, *like.shape[1:])), index, like.shape[0])


embedding.derivative(weight=_embedding_rule)


def check_integers(numbers: Any, name: str) -> Any:
    """The numbers; TypeError if they are of another kind."""
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{name} takes integers, got {numbers.dtype}: convert with astype('int64')")
    return numbers


def out_of_range(numbers: Any, count: int, name: str) -> Any:
    """Which numbers are not in [0, count): refused on the host, a mask on a device."""
    if backend.backend_of(numbers).name != "numpy":
        return (numbers < 0) | (numbers >= count)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        raise IndexError(
            f"{name} takes numbers in [0, {count}), got some in [{numbers.min()}, {numbers.max()}]"
        )
    return None


# Softmax


def _finite_or_zero(m: Any) -> Any:
    """The shift of a row: its maximum, but 0 where that is −inf, so that no nan arises."""
    return of(m).where(m == float("-inf"), 0.0, m)


def _shifted(x: Any, axis: int) -> Any:
    """x less its maximum, as a constant: what is made of it does not depend on the shift."""
    values = data_of(x)
    if not values.size:  # a copy all the same: callers go on in place
        return x + 0.0
    return x - _finite_or_zero(values.max(axis=axis, keepdims=True))


def _softmax_definition(x: Any, axis: int = -1) -> Any:
    e = exp(_shifted(x, axis))
    total = e.sum(axis=axis, keepdims=True)
    return e / where(equal(total, 0), 1.0, total)


@primitive(composite=_softmax_definition)
def softmax(x: Any, axis: int = -1) -> Any:
    """exp(x) / Σ exp(x) along an axis.

    A row of −inf alone (fully masked) gives zeros with gradient 0, where torch gives nan.
    """
    e = of(x).exp(_shifted(x, axis))
    total = e.sum(axis=axis, keepdims=True)
    e *= 1.0 / of(x).where(total == 0, 1.0, total)
    return e


softmax.derivative(x=lambda g, y, axis: _softmax_rule(g, y, axis))


def _softmax_rule(g: Any, y: Any, axis: int) -> Any:
    """y ∘ (g − Σ g y)."""
    d = g * y
    d -= y * d.sum(axis=axis, keepdims=True)
    return d


def _log_softmax_definition(x: Any, axis: int = -1) -> Any:
    y = _shifted(x, axis)
    total = exp(y).sum(axis=axis, keepdims=True)
    y = y - log(where(equal(total, 0), 1.0, total))
    return where(equal(y, float("-inf")), float("-inf"), y)


@primitive(composite=_log_softmax_definition)
def log_softmax(x: Any, axis: int = -1) -> Any:
    """x − ln Σ exp(x) along an axis; a row of −inf alone stays −inf, with gradient 0."""
    y = _shifted(x, axis)
    total = of(x).exp(y).sum(axis=axis, keepdims=True)
    y -= of(x).log(of(x).where(total == 0, 1.0, total))
    return y


def _log_softmax_rule(g: Any, y: Any, axis: int) -> Any:
    """g − eʸ Σ g, over the entries that are not −inf."""
    e = of(y).exp(y)
    total = of(g).where(y == float("-inf"), 0.0, g)
    return total - e * total.sum(axis=axis, keepdims=True)


log_softmax.derivative(x=_log_softmax_rule)


def _cross_entropy_definition(
    logits: Any, target: Any, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Any:
    target = of(logits).asarray(target)
    ignored = target == ignore_index
    logp = _shifted(logits, -1)
    logp = logp - logsumexp(logp, axis=-1, keepdims=True)
    label = expand_dims(of(target).where(ignored, 0, target), -1)
    picked = reshape(take_along_axis(logp, label, axis=-1), target.shape)
    losses = -(1 - label_smoothing) * picked
    if label_smoothing:
        losses = losses - label_smoothing * mean(logp, axis=-1)
    return where(ignored, 0.0, losses)


@primitive(composite=_cross_entropy_definition)
def cross_entropy(
    logits: Any, target: Any, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Any:
    """The loss of each row, −Σ q ln softmax(logits), with q the smoothed one-hot target.

    ``nn.functional.cross_entropy`` reduces it and takes torch's other forms.

    Args:
        logits: (n, classes).
        target: (n,) integers in [0, classes), or ``ignore_index``.
        ignore_index: rows with this target give loss 0 and gradient 0.
        label_smoothing: ε in q = (1 − ε) one-hot + ε / classes (Szegedy et al. 2015,
            arXiv:1512.00567, section 7).

    Returns:
        (n,).

    Raises:
        ValueError: the shapes do not fit.
        TypeError, IndexError: a target is not an integer or out of range (on a GPU: loss nan).
    """
    xp = of(logits)
    target = check_integers(xp.asarray(target), "cross_entropy")
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy takes logits (n, classes) and targets (n,), got {logits.shape} and "
            f"{target.shape}: put the classes last and flatten the rest"
        )
    ignored = target == ignore_index
    label = xp.where(ignored, 0, target)
    outside = out_of_range(label, logits.shape[1], "cross_entropy")
    top = logits.max(axis=1, keepdims=True) if logits.size else logits[:, :1]
    e = logits - top
    picked = e[xp.arange(target.size), label]
    lse = xp.log(xp.exp(e).sum(axis=1))
    losses = lse - picked if not label_smoothing else lse - (1 - label_smoothing) * picked
    if label_smoothing:
        losses -= label_smoothing * e.mean(axis=1)
    if outside is not None:
        losses = xp.where(outside, float("nan"), losses)
    return Kept(xp.where(ignored, 0.0, losses), ignored=ignored, label=label, shift=lse + top[:, 0])


@cross_entropy.joint_derivative("logits")
def _cross_entropy_rule(
    g: Any, logits: Any, ignored: Any, label: Any, shift: Any, label_smoothing: float
) -> tuple[Any]:
    """g (softmax(logits) − q) for each row."""
    xp = of(logits)
    g = xp.where(ignored, 0.0, g)
    p = logits - shift[:, None]
    p = xp.exp(p)
    p *= g[:, None]
    p[xp.arange(label.size), label] -= (1 - label_smoothing) * g
    if label_smoothing:
        p -= (label_smoothing / logits.shape[1]) * g[:, None]
    return (p,)


# Normalisation


def _layer_norm_definition(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    centred = x - mean(x, axis=-1, keepdims=True)
    y = centred * rsqrt(mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@primitive(composite=_layer_norm_definition)
def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """(x − mean) / √(var + ε) · weight + bias over the last axis (Ba et al. 2016, 1607.06450).

    Args:
        x: (…, d).
        weight, bias: (d,) or None.
        eps: ε, added to the (biased) variance.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_norm("layer_norm", x, weight, bias)
    xp, rows = of(x), as_rows(x)
    ones = _ones_over_length(rows)
    normal = rows - rows.dot(ones)[:, None]
    y = normal * normal
    rstd = 1 / xp.sqrt(y.dot(ones) + eps)
    normal *= rstd[:, None]
    xp.multiply(normal, 1.0 if weight is None else weight, out=y)
    if bias is not None:
        y += bias
    return Kept(y.reshape(x.shape), normal=normal, rstd=rstd)


@layer_norm.joint_derivative("x", "weight", "bias")
def _layer_norm_rule(g: Any, needs: Any, weight: Any, normal: Any, rstd: Any) -> tuple[Any, ...]:
    rows = as_rows(g)
    products = rows * normal
    grads: list[Any] = [None, None, None]
    if needs[0]:
        vector = _ones_over_length(rows) if weight is None else weight * (1 / rows.shape[1])
        x = rows + 0.0 if weight is None else rows * weight
        x -= (rows @ vector)[:, None]
        x -= normal * (products @ vector)[:, None]
        x *= rstd[:, None]
        grads[0] = x.reshape(g.shape)
    if needs[1]:
        grads[1] = _column_sums(products)
    if needs[2]:
        grads[2] = _column_sums(rows)
    return tuple(grads)


def _rms_norm_definition(x: Any, weight: Any = None, eps: float = 1e-6) -> Any:
    y = x * rsqrt(mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


@primitive(composite=_rms_norm_definition)
def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6) -> Any:
    """x / √(mean x² + ε) · weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (…, d).
        weight: (d,) or None.
        eps: ε.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_norm("rms_norm", x, weight, None)
    rows = as_rows(x)
    rstd = 1 / of(x).sqrt(_row_products(rows, rows) * (1 / rows.shape[1]) + eps)
    normal = rows * rstd[:, None]
    y = normal if weight is None else normal * weight
    return Kept(y.reshape(x.shape), normal=normal, rstd=rstd)


@rms_norm.joint_derivative("x", "weight")
def _rms_norm_rule(g: Any, needs: Any, weight: Any, normal: Any, rstd: Any) -> tuple[Any, Any]:
    rows = as_rows(g)
    products = rows * normal
    x = None
    if needs[0]:
        vector = _ones_over_length(rows) if weight is None else weight * (1 / rows.shape[1])
        x = rows + 0.0 if weight is None else rows * weight
        x -= normal * (products @ vector)[:, None]
        x *= rstd[:, None]
        x = x.reshape(g.shape)
    return x, _column_sums(products) if needs[1] else None


def _ones_over_length(rows: Any) -> Any:
    ones = of(rows).empty(rows.shape[1], rows.dtype)
    ones.fill(1 / rows.shape[1] if rows.shape[1] else 0.0)  # xp.full takes three times as long
    return ones


def _row_products(a: Any, b: Any) -> Any:
    return of(a).einsum("ij,ij->i", a, b)


def _check_norm(name: str, x: Any, weight: Any, bias: Any) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} needs a last axis of at least one element, got shape {x.shape}")
    for what, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} takes a {what} of the shape of the last axis, {x.shape[-1:]}, got "
                f"{parameter.shape} with input {x.shape}"
            )
