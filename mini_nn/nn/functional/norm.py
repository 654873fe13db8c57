"""Normalisation: one formula over different axes, and what stands in its place.

normalize(x, over, centre, scale) subtracts the mean over some axes, divides what is left by its
root mean square or by its length, or does only one of the two.  For input (N, C, …):

=====================================  =================  ======  ======  ======================
                                       over               centre  scale   function
=====================================  =================  ======  ======  ======================
Ioffe & Szegedy 2015, 1502.03167, a.1  N, axes after C    yes     rms     ``batch_norm``
Ulyanov et al. 2016, 1607.08022, (3)   axes after C       yes     rms     ``instance_norm``
Karras et al. 2019, 1912.04958, 2.2    axes after C       no      rms     ``instance_rms_norm``
Wu & He 2018, 1803.08494, (7)          these and a group  yes     rms     ``group_norm``
Ba et al. 2016, 1607.06450, (4)        the last axes      yes     rms     ``layer_norm``
Zhang & Sennrich 2019, 1910.07467, 4   the last axes      no      rms     ``rms_norm``
Salimans & Kingma 2016, 1602.07868, 2  all but one        no      length  ``weight_norm``
Karras et al. 2019, 1912.04958, (3)    all but N and O    no      length  ``modulated_conv2d``
=====================================  =================  ======  ======  ======================

A weight and a bias follow where the paper has them.  Functions of each element that take the place
of a norm: ``dyt`` (J. Zhu, X. Chen, K. He, Y. LeCun, Z. Liu 2025, *Transformers without
Normalization*, arXiv:2503.10622, 4) and ``dyisru`` (F. Stollenwerk 2025, *On the Mathematical
Relationship Between Layer Normalization and Dynamic Activation Functions*, arXiv:2503.21708).

float16 is normalised in float32, because the square of 256 is beyond it, and comes back as float16.

Deviations: ε is where torch has it, within the root; the Annotated Transformer adds it to the
standard deviation.  ``layer_norm`` and ``rms_norm`` are one primitive each (``ops``) instead of the
four of ``normalize``, for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from ... import ops
from ...backend import Array
from ...engine import data_of
from ...ops.elementwise import of

Shape = int | Sequence[int]


def normalize(
    x: Array,
    over: int | tuple[int, ...],
    centre: bool = True,
    scale: Literal["rms", "length"] | None = "rms",
    eps: float = 1e-5,
) -> Array:
    """(x − mean) / √(mean (x − mean)² + ε), or less of it: the whole family.

    Without ε the result does not change when x is multiplied by a positive number, nor, if centred,
    when a number is added.  So the gradient of whatever follows is orthogonal to x and, if centred,
    to the ones.

    Args:
        x: any shape.
        over: the axes that share a mean and a scale.
        centre: subtract the mean.
        scale: divide by √(mean x² + ε) of what is left (``"rms"``), by √(Σ x² + ε) (``"length"``),
            or by nothing (None).
        eps: ε.

    Returns:
        The shape and dtype of x.  Where all that is left is 0 the result is 0, but nan for ε = 0.

    Raises:
        ValueError: another ``scale``.
    """
    if scale not in ("rms", "length", None):
        raise ValueError(f"normalize takes scale 'rms', 'length' or None, got {scale!r}")
    y = _wide(x)
    if centre:
        y = y - ops.mean(y, axis=over, keepdims=True)
    if scale is not None:
        total = ops.mean if scale == "rms" else ops.sum
        y = y * ops.rsqrt(total(ops.square(y), axis=over, keepdims=True) + eps)
    return _narrow(y, x)


def _wide(x: Array) -> Array:
    return ops.astype(x, "float32") if x.dtype.itemsize == 2 else x


def _narrow(y: Array, x: Array) -> Array:
    return ops.astype(y, x.dtype) if x.dtype.itemsize == 2 else y


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
    return _narrow(ops.layer_norm(_wide(rows), weight, bias, eps), input).reshape(input.shape)


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
    return _narrow(ops.rms_norm(_wide(rows), weight, eps), input).reshape(input.shape)


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
    rows = _wide(input).reshape(input.shape[0] * num_groups, -1)
    normal = ops.layer_norm(rows, eps=eps).reshape(input.shape)
    return _narrow(_affine(normal, weight, bias), input)


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
        x = _wide(data_of(input)).reshape(-1, channels, count)
        _follow(running_mean, x.mean(axis=2).mean(axis=0), momentum)
        _follow(running_var, x.var(axis=2, ddof=1).mean(axis=0), momentum)
    return group_norm(input, channels, weight, bias, eps)


def instance_rms_norm(
    input: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-8
) -> Array:
    """x / √(mean x² + ε) · weight + bias, the mean over each channel of each sample.

    Instance norm that leaves the mean in place: what StyleGAN2's demodulation replaces by its
    expectation (Karras et al. 2019, arXiv:1912.04958, section 2.2).

    Args:
        input: (N, C, …); a channel of one element becomes its sign.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        eps: ε.

    Raises:
        ValueError: a shape does not fit.
    """
    channels = _channels("instance_rms_norm", input, weight, bias)
    if not input.size:
        return _affine(input, weight, bias)
    rows = _wide(input).reshape(input.shape[0] * channels, -1)
    normal = ops.rms_norm(rows, eps=eps).reshape(input.shape)
    return _narrow(_affine(normal, weight, bias), input)


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
    x = _wide(input)
    if training:
        axes = (0, *range(2, input.ndim))
        count = input.size // channels if channels else 0
        if count <= 1:
            raise ValueError(
                "batch_norm in training needs several elements for each channel, got "
                f"{input.shape}: use a larger batch, or eval()"
            )
        mean = ops.mean(x, axis=axes, keepdims=True)
        centred = x - mean
        var = ops.mean(centred * centred, axis=axes, keepdims=True)
        _follow(running_mean, data_of(mean).reshape(-1), momentum)
        _follow(running_var, data_of(var).reshape(-1) * (count / (count - 1)), momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm outside training needs running_mean and running_var")
        centred = x - data_of(running_mean).reshape(shape)
        var = data_of(running_var).reshape(shape)
    rstd = ops.rsqrt(var + eps)
    y = centred * (rstd if weight is None else rstd * weight.reshape(shape))
    return _narrow(_affine(y, None, bias), input)


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


# Norms of weights


def weight_norm(v: Array, g: Array, dim: int | None = 0) -> Array:
    """w = g v / ‖v‖, with a length of their own for the weights of each output.

    Salimans & Kingma 2016, arXiv:1602.07868, eq. 2.  The gradient in v is orthogonal to v, so a
    step of plain gradient descent can only make v longer.

    Args:
        v: weights of any shape, none of them of length 0, where w is nan.
        g: the lengths, of a shape that broadcasts to that of v: (n, 1, …, 1) for ``dim`` 0.
        dim: the axis that counts the outputs; None for one length of the whole.

    Raises:
        ValueError: ``g`` does not broadcast to the shape of ``v``.
    """
    axis = None if dim is None else dim % v.ndim
    fits = len(g.shape) <= v.ndim and all(
        m in (1, n) for m, n in zip(g.shape[::-1], v.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"weight_norm takes lengths g that broadcast to the shape of v {v.shape}, got "
            f"{g.shape}: keep the other axes as ones, g.reshape(-1, 1, …)"
        )
    over = tuple(i for i in range(v.ndim) if i != axis)
    return g * normalize(v, over, centre=False, scale="length", eps=0.0)


def modulated_conv2d(
    input: Array,
    weight: Array,
    style: Array,
    demodulate: bool = True,
    padding: int | tuple[int, int] | str = 0,
    eps: float = 1e-8,
) -> Array:
    """A convolution whose weights are scaled for each sample, w″ = s w / √(Σ (s w)² + ε).

    Karras et al. 2019, arXiv:1912.04958, eqs. 1 and 3.  Σ runs over the inputs of one output
    channel, whose variance is therefore 1 if those of the inputs are and they are independent.  All
    samples are one grouped convolution (appendix B): N groups of C channels.  The same without it
    is to scale the channels of the input by s before and those of the output after an ordinary one.

    Args:
        input: (N, C, H, W).
        weight: w (O, C, kh, kw).
        style: s (N, C); a common factor of a sample's styles changes nothing, up to ε.
        demodulate: False leaves out the division.
        padding: as for ``conv2d``.
        eps: ε.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: the shapes do not fit.
    """
    fits = input.ndim == weight.ndim == 4 and style.shape == input.shape[:2]
    if not fits or weight.shape[1] != input.shape[1]:
        raise ValueError(
            "modulated_conv2d takes an input (N, C, H, W), a weight (O, C, kh, kw) and a style "
            f"(N, C), got {input.shape}, {weight.shape} and {style.shape}"
        )
    samples, channels, height, width = input.shape
    if not samples:
        return ops.conv2d(input, weight, padding=padding)
    w = weight * style.reshape(samples, 1, channels, 1, 1)
    if demodulate:
        w = normalize(w, (2, 3, 4), centre=False, scale="length", eps=eps)
    y = ops.conv2d(
        input.reshape(1, samples * channels, height, width),
        w.reshape(samples * weight.shape[0], *weight.shape[1:]),
        padding=padding,
        groups=samples,
    )
    return y.reshape(samples, weight.shape[0], *y.shape[2:])


# In the place of a norm


def dyt(
    input: Array, alpha: Array, weight: Array | None = None, bias: Array | None = None
) -> Array:
    """γ tanh(α x) + β, with one α for all (Zhu et al. 2025, arXiv:2503.10622, section 4).

    Args:
        input: (…, d).
        alpha: α, of shape () or (1,).
        weight: γ, which broadcasts to the input, or None for 1.
        bias: β likewise, or None for 0.
    """
    y = ops.tanh(alpha * input)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def dyisru(input: Array, c: Array, weight: Array | None = None, bias: Array | None = None) -> Array:
    """γ √d x / √(x² + C) + β (Stollenwerk 2025, arXiv:2503.21708).

    RMS norm is exactly this if C is the sum of the squares of the other d − 1 elements, different
    for each x; here C is one number that is learnt, so that elements no longer see each other.

    Args:
        input: (…, d).
        c: C > 0, of shape () or (1,).
        weight: γ, which broadcasts to the input, or None for 1.
        bias: β likewise, or None for 0.

    Raises:
        ValueError: the input has no axis.
    """
    if input.ndim == 0:
        raise ValueError("dyisru takes an input (…, d), got shape ()")
    x = _wide(input)
    y = math.sqrt(input.shape[-1]) * x * ops.rsqrt(ops.square(x) + c)
    y = y if weight is None else y * weight
    return _narrow(y if bias is None else y + bias, input)
