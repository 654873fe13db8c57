"""Losses under torch's names.

``reduction`` is ``"none"`` for the loss of each element, ``"sum"``, or ``"mean"``: the mean over
the elements, which is nan where there are none, as in torch.  A target has its input's shape;
nothing is broadcast, except where a docstring says so.
"""

from __future__ import annotations

import math
from typing import Any

from ... import ops
from ...backend import Array
from ...engine import data_of, primitive
from ...ops.elementwise import of
from ...ops.fused import out_of_range as outside

SMALLEST_LOG = -100.0  # what torch's binary_cross_entropy takes for ln 0
SMALLEST_PRODUCT = 1e-12  # what it takes for x (1 − x) at 0 and 1


def cross_entropy(
    input: Array,
    target: Any,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """−Σ q ln softmax(input) over the classes.

    Args:
        input: logits (C,), (N, C) or (N, C, d₁, …).
        target: the class, integers () , (N,) or (N, d₁, …), as a Tensor, an array or a list; or the
            distribution q, floating point, of the input's shape.
        weight: (C,), the weight of each class, or None for 1.
        ignore_index: elements of this class have loss 0 and do not count in the mean.
        reduction: ``"mean"`` divides by the summed weights of the targets; with distributions, by
            their number.
        label_smoothing: ε in q = (1 − ε) one-hot + ε / C.

    Returns:
        A 0-d array, or the target's shape (without C) for ``"none"``.  If every element is ignored,
        the mean is nan and its gradient 0, as in torch.

    Raises:
        ValueError: the shapes do not fit or ``reduction`` is unknown.
        TypeError: the classes are not integers.
        IndexError: a class is out of range (on a GPU: its loss is nan).
    """
    axis = _class_axis("cross_entropy", input)
    classes = input.shape[axis]
    q = target if hasattr(target, "shape") else of(input).asarray(target)
    if data_of(q).dtype.kind == "f":
        if q.shape != input.shape:
            raise ValueError(
                f"cross_entropy takes distributions of the input's shape {input.shape}, got "
                f"{q.shape}; classes are integers: convert them with astype('int64')"
            )
        if label_smoothing:
            q = (1 - label_smoothing) * q + label_smoothing / classes
        logp = ops.log_softmax(input, axis=axis)
        weighted = logp if weight is None else logp * _for_classes(weight, input, axis)
        losses = -ops.sum(q * weighted, axis=axis)
        return _reduced(losses, reduction)
    label = _labels("cross_entropy", input, target, axis)
    rows = _class_last(input, axis)
    if weight is None:
        losses = ops.cross_entropy(rows, label.reshape(-1), ignore_index, label_smoothing)
        share = (label != ignore_index).astype(input.dtype)
        return _averaged(losses.reshape(label.shape), share, reduction)
    logp = ops.log_softmax(rows, axis=-1)
    losses, share = _picked(logp, label, weight, ignore_index)
    if label_smoothing:
        even = ops.sum(logp * weight, axis=-1).reshape(label.shape) * (label_smoothing / classes)
        losses = (1 - label_smoothing) * losses - ops.where(label == ignore_index, 0.0, even)
    return _averaged(losses, share, reduction)


def nll_loss(
    input: Array,
    target: Any,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Array:
    """−input[target]: ``cross_entropy`` of log-probabilities; arguments and errors as there."""
    axis = _class_axis("nll_loss", input)
    label = _labels("nll_loss", input, target, axis)
    losses, share = _picked(_class_last(input, axis), label, weight, ignore_index)
    return _averaged(losses, share, reduction)


def _class_axis(name: str, input: Array) -> int:
    if input.ndim == 0:
        raise ValueError(f"{name} takes an input (C,), (N, C) or (N, C, d₁, …), got a 0-d one")
    return 0 if input.ndim == 1 else 1


def _class_last(input: Array, axis: int) -> Array:
    """The classes as the last axis of two."""
    x = input if input.ndim <= 2 else ops.moveaxis(input, axis, -1)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _labels(name: str, input: Array, target: Any, axis: int) -> Array:
    label = of(input).asarray(data_of(target))
    wanted = (*input.shape[:axis], *input.shape[axis + 1 :])
    if label.shape != wanted:
        raise ValueError(
            f"{name} of an input {input.shape} takes a target {wanted}, got {label.shape}"
        )
    if label.dtype.kind not in "iu":
        raise TypeError(f"{name} takes classes as integers, got {label.dtype}")
    return label


def _for_classes(weight: Array, input: Array, axis: int) -> Array:
    return weight.reshape(-1, *(1,) * (input.ndim - axis - 1))


def _picked(logp: Array, label: Array, weight: Array | None, ignore_index: int) -> tuple[Any, Any]:
    """The weighted loss at each label and its weight; both 0 where the label is ignored."""
    xp, flat = of(logp), label.reshape(-1)
    ignored = flat == ignore_index
    known = xp.where(ignored, 0, flat)
    beyond = outside(known, logp.shape[-1], "a loss")
    share = 1.0 - ignored.astype(logp.dtype)
    if weight is not None:
        share = share * data_of(weight)[known]
    if beyond is not None:
        share = xp.where(beyond, math.nan, share)
    picked = ops.take_along_axis(logp, known[:, None], axis=-1).reshape(label.shape)
    share = share.reshape(label.shape)
    return share * ops.where(ignored.reshape(label.shape), 0.0, -picked), share


def _averaged(losses: Array, share: Array, reduction: str) -> Array:
    """``_reduced``, where an element counts in the mean by its share."""
    if reduction != "mean":
        return _reduced(losses, reduction)
    total = share.sum()
    some = total != 0
    xp = of(losses)
    return ops.where(some, ops.sum(losses) / xp.where(some, total, 1.0), math.nan)


def _reduced(losses: Array, reduction: str) -> Array:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return ops.sum(losses)
    if reduction != "mean":
        raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
    return ops.sum(losses) * (1.0 / losses.size if losses.size else math.nan)


def _difference(name: str, input: Array, target: Array) -> Array:
    _same_shape(name, input, target)
    return input - target


def _same_shape(name: str, input: Array, target: Array) -> None:
    if input.shape != target.shape:
        raise ValueError(
            f"{name} takes a target of the input's shape {input.shape}, got {target.shape}"
        )


def mse_loss(input: Array, target: Array, reduction: str = "mean") -> Array:
    """(input − target)²."""
    d = _difference("mse_loss", input, target)
    return _reduced(d * d, reduction)


def l1_loss(input: Array, target: Array, reduction: str = "mean") -> Array:
    """|input − target|; the derivative at 0 is 0."""
    return _reduced(ops.abs(_difference("l1_loss", input, target)), reduction)


def smooth_l1_loss(
    input: Array, target: Array, reduction: str = "mean", beta: float = 1.0
) -> Array:
    """d² / 2β where |d| < β, |d| − β/2 elsewhere (Girshick 2015, arXiv:1504.08083, eq. 3).

    Args:
        input: any shape.
        target: the same shape.
        reduction: see the module.
        beta: β ≥ 0; 0 gives ``l1_loss``.

    Raises:
        ValueError: ``beta`` is negative or the shapes differ.
    """
    if beta < 0:
        raise ValueError(f"smooth_l1_loss takes beta ≥ 0, got {beta}")
    d = _difference("smooth_l1_loss", input, target)
    size = ops.abs(d)
    if not beta:
        return _reduced(size, reduction)
    return _reduced(
        ops.where(data_of(size) < beta, d * d * (0.5 / beta), size - 0.5 * beta), reduction
    )


def huber_loss(input: Array, target: Array, reduction: str = "mean", delta: float = 1.0) -> Array:
    """d² / 2 where |d| ≤ δ, δ (|d| − δ/2) elsewhere (Huber 1964): δ · smooth_l1_loss with β = δ.

    Raises:
        ValueError: ``delta`` is not positive or the shapes differ.
    """
    if delta <= 0:
        raise ValueError(f"huber_loss takes delta > 0, got {delta}")
    return delta * smooth_l1_loss(input, target, reduction, delta)


def binary_cross_entropy_with_logits(
    input: Array,
    target: Array,
    weight: Array | None = None,
    reduction: str = "mean",
    pos_weight: Array | None = None,
) -> Array:
    """−p t ln σ(x) − (1 − t) ln(1 − σ(x)), which overflows nowhere.

    Args:
        input: logits x, any shape.
        target: t in [0, 1], the same shape.
        weight: a factor of each loss, broadcastable to the shape.
        reduction: see the module.
        pos_weight: p, broadcastable to the shape; None for 1.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("binary_cross_entropy_with_logits", input, target)
    surprise = ops.softplus(-input)  # −ln σ(x); and −ln(1 − σ(x)) is x more
    if pos_weight is not None:
        surprise = surprise * (1 + (pos_weight - 1) * target)
    losses = (1 - target) * input + surprise
    return _reduced(losses if weight is None else losses * weight, reduction)


def binary_cross_entropy(
    input: Array, target: Array, weight: Array | None = None, reduction: str = "mean"
) -> Array:
    """−t ln x − (1 − t) ln(1 − x) for probabilities x; as in torch, ln 0 is taken for −100.

    Args:
        input: any shape; a number outside [0, 1] gives nan.
        target: t in [0, 1], the same shape.
        weight: a factor of each loss, broadcastable to the shape.
        reduction: see the module.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("binary_cross_entropy", input, target)
    losses = _binary_cross_entropy(input, target)
    return _reduced(losses if weight is None else losses * weight, reduction)


def _bounded_log(x: Array) -> Array:
    """ln x, and at 0 the bound, with derivative 0 there."""
    positive = data_of(x) != 0
    return ops.where(
        positive, ops.maximum(ops.log(ops.where(positive, x, 1.0)), SMALLEST_LOG), SMALLEST_LOG
    )


@primitive
def _binary_cross_entropy(x: Array, t: Array) -> Array:
    return -(t * _bounded_log(x) + (1 - t) * _bounded_log(1 - x))


_binary_cross_entropy.derivative(
    x=lambda g, x, t: g * ((x - t) / ops.maximum(x * (1 - x), SMALLEST_PRODUCT)),
    t=lambda g, x: g * (_bounded_log(1 - x) - _bounded_log(x)),
)


def kl_div(input: Array, target: Array, reduction: str = "mean", log_target: bool = False) -> Array:
    """t (ln t − input), whose sum is the divergence KL(t ‖ exp input).

    Args:
        input: log-probabilities, any shape.
        target: t ≥ 0, or ln t if ``log_target``, the same shape; t = 0 gives loss 0.
        reduction: also ``"batchmean"``, the sum over the first axis' length, which is what the
            definition asks for; ``"mean"`` divides by the number of elements.
        log_target: see ``target``.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("kl_div", input, target)
    if log_target:
        losses = ops.exp(target) * (target - input)
    else:
        positive = data_of(target) > 0
        losses = target * ops.log(ops.where(positive, target, 1.0)) - target * input
    if reduction == "batchmean":
        return ops.sum(losses) * (1.0 / input.shape[0] if input.shape[0] else math.nan)
    return _reduced(losses, reduction)


def normalize(input: Array, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Array:
    """x / max(‖x‖ₚ, ε) along the axis ``dim``; a zero vector stays zero."""
    norm = ops.norm(input, ord=p, axis=dim, keepdims=True)
    return input / ops.clip(norm, eps)


def cosine_similarity(x1: Array, x2: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    """⟨x₁, x₂⟩ / (max(‖x₁‖, ε) max(‖x₂‖, ε)) along the axis ``dim``; x₁ and x₂ are broadcast.

    A zero vector has similarity 0 to every other.
    """
    dot = ops.sum(x1 * x2, axis=dim)
    norms = [ops.clip(ops.norm(x, axis=dim), eps) for x in (x1, x2)]
    return dot / (norms[0] * norms[1])
