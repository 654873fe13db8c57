"""Normalisation layers; the formula they share, ``normalize``, is in ``nn.functional.norm``.

The papers and equations are in the table there.  Not in torch: ``InstanceRMSNorm2d``,
``ModulatedConv2d``, ``DyT`` and ``DyISRU``.

Deviations: none but those stated there.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..backend import Array, current
from ..rng import Rng, default_rng
from . import functional as F
from .functional.norm import (
    Shape,
    dyisru,
    dyt,
    instance_rms_norm,
    modulated_conv2d,
    normalize,
    weight_norm,
)
from .module import Module, Parameter

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "DyISRU", "DyT", "GroupNorm", "InstanceNorm2d",
    "InstanceRMSNorm2d", "LayerNorm", "ModulatedConv2d", "RMSNorm", "dyisru", "dyt",
    "instance_rms_norm", "modulated_conv2d", "normalize", "weight_norm",
]  # fmt: skip


def _constant(value: float, shape: tuple[int, ...]) -> Parameter:
    return Parameter(current().xp.full(shape, value, "float32"))


class LayerNorm(Module):
    """(x − mean) / √(var + ε) · weight + bias over the last axes.

    Args:
        normalized_shape: the lengths of these axes; an int for one.
        eps: ε.
        elementwise_affine: whether there are a weight and a bias.
        bias: whether there is a bias.

    Attributes:
        weight: ones of shape ``normalized_shape``, or None.
        bias: zeros likewise, or None.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        self.normalized_shape = _lengths(normalized_shape)
        self.eps = eps
        self.weight = _constant(1.0, self.normalized_shape) if elementwise_affine else None
        self.bias = _constant(0.0, self.normalized_shape) if elementwise_affine and bias else None

    def forward(self, input: Array) -> Array:
        """(…, *normalized_shape)."""
        # no axes to join, no float16 to widen: decoding feels the detour
        if len(self.normalized_shape) == 1 and input.dtype.itemsize > 2:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """x / √(mean x² + ε) · weight over the last axes.

    Args:
        normalized_shape: the lengths of these axes; an int for one.
        eps: ε; None for the distance from 1 to the next number of the input's dtype.
        elementwise_affine: whether there is a weight.

    Attributes:
        weight: ones of shape ``normalized_shape``, or None.
    """

    def __init__(
        self, normalized_shape: Shape, eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        self.normalized_shape = _lengths(normalized_shape)
        self.eps = eps
        self.weight = _constant(1.0, self.normalized_shape) if elementwise_affine else None

    def forward(self, input: Array) -> Array:
        """(…, *normalized_shape)."""
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)


def _lengths(normalized_shape: Shape) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


class GroupNorm(Module):
    """Normalise each sample over groups of channels.

    Args:
        num_groups: a divisor of ``num_channels``.
        num_channels: C.
        eps: ε.
        affine: whether there are a weight and a bias for each channel.

    Raises:
        ValueError: ``num_channels`` is not divisible by ``num_groups``.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        if num_channels % num_groups:
            raise ValueError(f"{num_channels} channels do not split into {num_groups} equal groups")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.weight = _constant(1.0, (num_channels,)) if affine else None
        self.bias = _constant(0.0, (num_channels,)) if affine else None

    def forward(self, input: Array) -> Array:
        """(N, C, …)."""
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _RunningNorm(Module):
    """What batch and instance norm share: parameters and running statistics for each channel."""

    axes: tuple[int, ...] = ()
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = _constant(1.0, (num_features,)) if affine else None
        self.bias = _constant(0.0, (num_features,)) if affine else None
        xp, tracked = current().xp, track_running_stats
        self.register_buffer("running_mean", xp.zeros(num_features, "float32") if tracked else None)
        self.register_buffer("running_var", xp.ones(num_features, "float32") if tracked else None)
        self.register_buffer("num_batches_tracked", xp.zeros((), "int64") if tracked else None)

    def _check(self, input: Array) -> None:
        if input.ndim not in self.axes or input.shape[1] != self.num_features:
            axes = " or ".join(map(str, self.axes))
            raise ValueError(
                f"{type(self).__name__} takes (N, {self.num_features}, …) of {axes} axes, got "
                f"{input.shape}"
            )


class _BatchNorm(_RunningNorm):
    def _momentum(self) -> Any:
        """Counts the batch; the part of its statistics in the running ones."""
        if self.num_batches_tracked is None or self.running_mean is None or not self.training:
            return 0.0
        self.num_batches_tracked[...] += 1
        if self.momentum is not None:
            return self.momentum
        # the mean over all batches, counted where the batches are
        return 1.0 / self.num_batches_tracked.astype(self.running_mean.dtype)

    def forward(self, input: Array) -> Array:
        """(N, C, …)."""
        self._check(input)
        mean, var = self.running_mean, self.running_var
        training = self.training or mean is None
        return F.batch_norm(
            input, mean, var, self.weight, self.bias, training, self._momentum(), self.eps
        )


class BatchNorm1d(_BatchNorm):
    """Normalise each channel over the batch: input (N, C) or (N, C, L).

    In training by the batch's own mean and variance, which the running ones follow; in evaluation
    by the running ones.

    Args:
        num_features: C.
        eps: ε.
        momentum: the part of a new batch in the running statistics; None for their plain mean.
        affine: whether there are a weight and a bias for each channel.
        track_running_stats: False keeps none and normalises by the batch in evaluation too.

    Attributes:
        weight, bias: (C,) or None.
        running_mean, running_var, num_batches_tracked: buffers; the variance is the unbiased one.

    Raises:
        ValueError: another shape, or in training a single element for each channel.
    """

    axes = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Normalise each channel over the batch: images (N, C, H, W); see ``BatchNorm1d``."""

    axes = (4,)


class InstanceNorm2d(_RunningNorm):
    """Normalise each channel of each image (N, C, H, W).

    Args:
        num_features: C.
        eps: ε.
        momentum: the part of new statistics in the running ones.
        affine: whether there are a weight and a bias for each channel.
        track_running_stats: follow the statistics in training and normalise by them in evaluation.

    Raises:
        ValueError: another shape, or images of one pixel.
    """

    axes = (4,)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, input: Array) -> Array:
        """(N, C, H, W)."""
        self._check(input)
        mean, var = self.running_mean, self.running_var
        own = self.training or mean is None
        return F.instance_norm(
            input, mean, var, self.weight, self.bias, own, self.momentum or 0.0, self.eps
        )


class InstanceRMSNorm2d(Module):
    """x / √(mean x² + ε) for each channel of each image (N, C, H, W): instance norm, not centred.

    Args:
        num_features: C.
        eps: ε.
        affine: whether there are a weight and a bias for each channel.

    Attributes:
        weight, bias: (C,) or None.

    Raises:
        ValueError: another shape.
    """

    def __init__(self, num_features: int, eps: float = 1e-8, affine: bool = False) -> None:
        self.num_features = num_features
        self.eps = eps
        self.weight = _constant(1.0, (num_features,)) if affine else None
        self.bias = _constant(0.0, (num_features,)) if affine else None

    def forward(self, input: Array) -> Array:
        """(N, C, H, W)."""
        if input.ndim != 4 or input.shape[1] != self.num_features:
            raise ValueError(
                f"InstanceRMSNorm2d takes (N, {self.num_features}, H, W), got {input.shape}"
            )
        return instance_rms_norm(input, self.weight, self.bias, self.eps)


class ModulatedConv2d(Module):
    """StyleGAN2's convolution, whose weights are scaled for each sample and brought to length 1.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: pixels of the square kernel.
        demodulate: bring the weights of each output channel to length 1.
        padding: as for ``conv2d``.
        eps: ε.
        rng: what the weights are drawn from, N(0, 1) (None: ``default_rng()``).

    Attributes:
        weight: (O, C, kernel_size, kernel_size); multiplied by 1 / √fan_in whenever it is used
            (Karras et al. 2017, arXiv:1710.10196, section 4.1), which demodulation takes out again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        demodulate: bool = True,
        padding: int | tuple[int, int] | str = 0,
        eps: float = 1e-8,
        *,
        rng: Rng | None = None,
    ) -> None:
        self.demodulate = demodulate
        self.padding = padding
        self.eps = eps
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.gain = 1.0 / math.sqrt(in_channels * kernel_size * kernel_size)
        self.weight = Parameter((default_rng() if rng is None else rng).normal(shape))

    def forward(self, input: Array, style: Array) -> Array:
        """(N, C, H, W), (N, C) → (N, O, H', W')."""
        weight = self.weight * self.gain
        return modulated_conv2d(input, weight, style, self.demodulate, self.padding, self.eps)


class DyT(Module):
    """γ tanh(α x) + β: a norm's place taken by a function of each element.

    Args:
        normalized_shape: the lengths of the last axes, for which there are γ and β.
        alpha0: the first α.

    Attributes:
        alpha: (1,), one for all.
        weight, bias: γ, ones, and β, zeros, of shape ``normalized_shape``.
    """

    def __init__(self, normalized_shape: Shape, alpha0: float = 0.5) -> None:
        self.normalized_shape = _lengths(normalized_shape)
        self.alpha = _constant(alpha0, (1,))
        self.weight = _constant(1.0, self.normalized_shape)
        self.bias = _constant(0.0, self.normalized_shape)

    def forward(self, input: Array) -> Array:
        """(…, *normalized_shape)."""
        _check_last("DyT", input, self.normalized_shape)
        return dyt(input, self.alpha, self.weight, self.bias)


class DyISRU(Module):
    """γ √d x / √(x² + C) + β: what RMS norm is if the other elements' squares add up to C.

    Args:
        dim: d, the length of the last axis.
        c0: the first C, above 0; None for d, with which an input of variance 1 keeps its size.

    Attributes:
        c: (1,), one for all; if training takes it below 0 the result is nan.
        weight, bias: γ, ones, and β, zeros, of shape (d,).

    Raises:
        ValueError: ``c0`` is not positive, or the input has another last axis.
    """

    def __init__(self, dim: int, c0: float | None = None) -> None:
        c0 = float(dim) if c0 is None else c0
        if not c0 > 0.0:
            raise ValueError(f"DyISRU needs C > 0, the square of a length, got {c0}")
        self.dim = dim
        self.c = _constant(c0, (1,))
        self.weight = _constant(1.0, (dim,))
        self.bias = _constant(0.0, (dim,))

    def forward(self, input: Array) -> Array:
        """(…, d)."""
        _check_last("DyISRU", input, (self.dim,))
        return dyisru(input, self.c, self.weight, self.bias)


def _check_last(name: str, input: Array, shape: tuple[int, ...]) -> None:
    if input.shape[-len(shape) :] != shape:
        raise ValueError(f"{name} over {shape} takes an input that ends so, got {input.shape}")
