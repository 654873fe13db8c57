"""Normalisation under torch's names: the same formula over different axes.

y = (x − mean) / √(var + ε) · weight + bias, where mean and var (the biased one) are taken for input
(N, C, …) over

==================  ====================================================
batch_norm          N and the axes after C: one mean for each channel
instance_norm       the axes after C: one for each sample and channel
group_norm          these and the channels of one group
layer_norm          the last axes, whatever they are
rms_norm            these, with mean 0 and no bias
==================  ====================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ... import ops
from ...backend import Array
from ...engine import data_of
from ...ops.elementwise import of

Shape = int | Sequence[int]


def layer_norm(
    input: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """Normalise over the last axes (Ba et al. 2016, arXiv:1607.06450, eq. 4).

    Args:
        input: (…, *normalized_shape).
        normalized_shape: the lengths of the axes to normalise over.
        weight: of shape ``normalized_shape``, or None for 1.
        bias: likewise, or None for 0.
        eps: ε.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, weight, bias = _last_axes("layer_norm", input, normalized_shape, weight, bias)
    return ops.layer_norm(rows, weight, bias, eps).reshape(input.shape)


def rms_norm(
    input: Array, normalized_shape: Shape, weight: Array | None = None, eps: float | None = None
) -> Array:
    """x / √(mean x² + ε) · weight over the last axes.

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    Args:
        input: (…, *normalized_shape).
        normalized_shape: the lengths of the axes to normalise over.
        weight: of shape ``normalized_shape``, or None for 1.
        eps: ε; None for the distance from 1 to the next number of the input's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, weight, _ = _last_axes("rms_norm", input, normalized_shape, weight, None)
    eps = float(of(input).finfo(input.dtype).eps) if eps is None else eps
    return ops.rms_norm(rows, weight, eps).reshape(input.shape)


def _last_axes(
    name: str, input: Array, normalized_shape: Shape, weight: Array | None, bias: Array | None
) -> tuple[Any, Any, Any]:
    """The axes to normalise over as one, in the input and in the parameters."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    parameters = [weight, bias]
    unfit = [p.shape for p in parameters if p is not None and tuple(p.shape) != shape]
    if not shape or input.shape[-len(shape) :] != shape or unfit:
        raise ValueError(
            f"{name} over {shape} takes an input whose last axes are these and parameters of this "
            f"shape, got an input {input.shape}" + (f" and a parameter {unfit[0]}" if unfit else "")
        )
    if len(shape) == 1:
        return input, weight, bias
    lead = input.shape[: input.ndim - len(shape)]
    flat = [None if p is None else p.reshape(-1) for p in parameters]
    return input.reshape(*lead, math.prod(shape)), *flat


def group_norm(
    input: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """Normalise each sample over groups of channels (Wu & He 2018, arXiv:1803.08494, eq. 7).

    Args:
        input: (N, C, …).
        num_groups: a divisor of C; 1 normalises over everything, C is ``instance_norm``.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        eps: ε.

    Raises:
        ValueError: C is not divisible by ``num_groups``, or a shape does not fit.
    """
    channels = _channels("group_norm", input, weight, bias)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm splits {channels} channels into equal groups, got {num_groups}"
        )
    if not input.size:
        return _affine(input, weight, bias)
    normal = ops.layer_norm(input.reshape(input.shape[0] * num_groups, -1), eps=eps)
    return _affine(normal.reshape(input.shape), weight, bias)


def instance_norm(
    input: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """Normalise each channel of each sample (Ulyanov et al. 2016, arXiv:1607.08022, eq. 3).

    Args:
        input: (N, C, …).
        running_mean, running_var: (C,) arrays that follow the statistics of the samples, averaged
            over N; changed in place.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        use_input_stats: False normalises by the running statistics.
        momentum: the part of the new statistics in the running ones.
        eps: ε.

    Raises:
        ValueError: a channel has one element (its variance means nothing), or a shape does not fit.
    """
    channels = _channels("instance_norm", input, weight, bias)
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    count = math.prod(input.shape[2:])
    if count <= 1:
        raise ValueError(
            f"instance_norm needs several elements for each channel, got {input.shape}"
        )
    if running_mean is not None or running_var is not None:
        x = data_of(input).reshape(-1, channels, count)
        _follow(running_mean, x.mean(axis=2).mean(axis=0), momentum)
        _follow(running_var, x.var(axis=2, ddof=1).mean(axis=0), momentum)
    return group_norm(input, channels, weight, bias, eps)


def batch_norm(
    input: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Array:
    """Normalise each channel over the batch (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1).

    Args:
        input: (N, C, …).
        running_mean, running_var: (C,) arrays; in training they are changed in place, to follow
            the mean and the unbiased variance of the batches; otherwise they are what is used.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        training: use the statistics of this batch.
        momentum: the part of the new statistics in the running ones.
        eps: ε.

    Raises:
        ValueError: in training, a channel has fewer than two elements; in evaluation, a running
            statistic is missing; or a shape does not fit.
    """
    channels = _channels("batch_norm", input, weight, bias)
    shape = (1, channels, *(1,) * (input.ndim - 2))
    if training:
        axes = (0, *range(2, input.ndim))
        count = input.size // channels if channels else 0
        if count <= 1:
            raise ValueError(
                "batch_norm in training needs several elements for each channel, got "
                f"{input.shape}: use a larger batch, or eval()"
            )
        mean = ops.mean(input, axis=axes, keepdims=True)
        centred = input - mean
        var = ops.mean(centred * centred, axis=axes, keepdims=True)
        _follow(running_mean, data_of(mean).reshape(-1), momentum)
        _follow(running_var, data_of(var).reshape(-1) * (count / (count - 1)), momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm outside training needs running_mean and running_var")
        centred = input - data_of(running_mean).reshape(shape)
        var = data_of(running_var).reshape(shape)
    rstd = ops.rsqrt(var + eps)
    y = centred * (rstd if weight is None else rstd * weight.reshape(shape))
    return _affine(y, None, bias)


def _channels(name: str, input: Array, weight: Array | None, bias: Array | None) -> int:
    parameters = [p.shape for p in (weight, bias) if p is not None]
    if input.ndim < 2 or any(shape != input.shape[1:2] for shape in parameters):
        raise ValueError(
            f"{name} takes an input (N, C, …) and parameters (C,), got {input.shape} and "
            f"{parameters}"
        )
    return int(input.shape[1])


def _affine(normal: Array, weight: Array | None, bias: Array | None) -> Array:
    """One weight and one bias for each channel."""
    shape = (-1, *(1,) * (normal.ndim - 2))
    y = normal if weight is None else normal * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _follow(running: Array | None, new: Array, momentum: Any) -> None:
    if running is not None:
        running = data_of(running)
        running[...] = (1 - momentum) * running + momentum * new
