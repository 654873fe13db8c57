"""Convolution and pooling layers; the functions are in ``ops.conv`` and ``nn.functional``."""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array
from ..rng import Rng
from . import functional as F
from .layers import uniform_parameter
from .module import Module

Size = int | tuple[int, ...]


def _tuple(value: Any, axes: int) -> Any:
    """One number for each axis; a word ("same", "valid") stays one."""
    if isinstance(value, str):
        return value
    return (value,) * axes if isinstance(value, int) else tuple(value)


class _Conv(Module):
    """The parameters of a convolution over one or two axes."""

    axes = 2
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: Rng | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{type(self).__name__} splits both channels into {groups} groups, got "
                f"{in_channels} in and {out_channels} out"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _tuple(kernel_size, self.axes)
        self.stride = _tuple(stride, self.axes)
        self.padding = _tuple(padding, self.axes)
        self.dilation = _tuple(dilation, self.axes)
        self.groups = groups
        first, second = out_channels, in_channels
        if self.transposed:
            first, second = in_channels, out_channels
        shape = (first, second // groups, *self.kernel_size)
        fan_in = math.prod(shape[1:])
        self.weight = uniform_parameter(shape, fan_in, rng)
        self.bias = uniform_parameter((out_channels,), fan_in, rng) if bias else None


class Conv2d(_Conv):
    """Each output channel is a sum of correlations of input channels with small kernels.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: (kh, kw) or one number for both; so are the next three.
        stride: steps between outputs.
        padding: zeros around the input; ``"same"`` keeps its size, ``"valid"`` is 0.
        dilation: steps between the inputs that a kernel sees.
        groups: output group i sees input group i only; C gives a depthwise convolution.
        bias: whether there is one for each output channel.
        rng: what the weights are drawn from, U(−1/√f, 1/√f) with f = C/groups · kh · kw.

    Attributes:
        weight: (C', C/groups, kh, kw).
        bias: (C',) or None.

    Raises:
        ValueError: ``groups`` does not divide both channels.
    """

    def forward(self, input: Array) -> Array:
        """(N, C, H, W) → (N, C', H', W')."""
        return F.conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv1d(_Conv):
    """As ``Conv2d`` over one axis: weight (C', C/groups, k)."""

    axes = 1

    def forward(self, input: Array) -> Array:
        """(N, C, L) → (N, C', L')."""
        return F.conv1d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ConvTranspose2d(_Conv):
    """The transpose of the linear map that ``Conv2d`` with the same arguments is.

    Args:
        in_channels: C, the output channels of that convolution.
        out_channels: C', its input channels.
        kernel_size: (kh, kw) or one number for both; so are the next three and ``dilation``.
        stride: steps between the places where an input is spread.
        padding: what is cut off around the output.
        output_padding: rows and columns added at one side of the output: which of the sizes that
            the convolution maps to the same one is meant.
        groups, bias, dilation, rng: as for ``Conv2d``.

    Attributes:
        weight: (C, C'/groups, kh, kw).
        bias: (C',) or None.

    Raises:
        ValueError: ``groups`` does not divide both channels.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng=rng
        )
        self.output_padding = _tuple(output_padding, 2)

    def forward(self, input: Array) -> Array:
        """(N, C, H, W) → (N, C', H', W')."""
        return F.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class MaxPool2d(Module):
    """The largest element of each window; see ``functional.max_pool2d``."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def forward(self, input: Array) -> Array:
        """(N, C, H, W) → (N, C, H', W')."""
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class AvgPool2d(Module):
    """The mean of each window; see ``functional.avg_pool2d``."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad

    def forward(self, input: Array) -> Array:
        """(N, C, H, W) → (N, C, H', W')."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AdaptiveAvgPool2d(Module):
    """Means of equal parts, whatever the input's size; see ``functional.adaptive_avg_pool2d``."""

    def __init__(self, output_size: Any) -> None:
        self.output_size = output_size

    def forward(self, input: Array) -> Array:
        """(…, H, W) → (…, *output_size)."""
        return F.adaptive_avg_pool2d(input, self.output_size)
