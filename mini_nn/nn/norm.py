"""Normalisation layers; the formula they share is in ``nn.functional.norm``."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..backend import Array, current
from . import functional as F
from .functional.norm import Shape
from .module import Module, Parameter


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
        if len(self.normalized_shape) == 1:  # no axes to join: decoding feels the detour
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
