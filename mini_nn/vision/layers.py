"""Layers on top of deformable convolution, and the two older ways to move a grid.

====================================================================  ===========================
y = deform_conv(x, offset), offsets given   (torchvision)             ``DeformConv2d``
offsets by a convolution of x with the same grid  (1703.06211, 2.1)   ``DeformConvPack``
offsets and σ(mask) by such a convolution         (1811.11168, 3.2)   ``ModulatedDeformConvPack``
offsets that are parameters, shared by all pixels (1703.09076, 3.2)   ``ActiveConv2d``
one affine map for the whole image                (1506.02025, 3)     ``SpatialTransformer``
====================================================================  ===========================

Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168; Jeon & Kim 2017, *Active
Convolution: Learning the Shape of Convolution for Image Classification*, arXiv:1703.09076;
Jaderberg et al. 2015, *Spatial Transformer Networks*, arXiv:1506.02025.

The branches that make offsets start at 0: a layer begins as the convolution of its weight (times
σ(0) = ½ in v2, which is no drop-in for a trained convolution: ``mask_scale=2``).  They learn slower
than the rest, or offsets run away, read zeros, and get no gradient to come back: ``offset_groups``.

Deviations: the gradient of ActiveConv2d's offsets is not normalised to length 1, as its authors'
is, nor are they held for the first steps; give them a learning rate of their own.  ``padding`` is a
number or a pair, no word, in all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import ops
from ..backend import Array
from ..nn import Conv2d, Module, Parameter, init
from ..nn.conv import Size
from ..ops.conv import per_axis
from ..ops.elementwise import of
from ..rng import Rng
from .deform_conv import deform_conv2d
from .sampling import affine_grid, grid_sample

__all__ = [
    "ActiveConv2d", "DeformConv2d", "DeformConvPack", "ModulatedDeformConvPack",
    "SpatialTransformer", "from_mmcv", "offset_groups",
]  # fmt: skip


class DeformConv2d(Conv2d):
    """A deformable convolution whose offsets are an argument: torchvision.ops.DeformConv2d.

    Args and attributes are those of ``nn.Conv2d``; ``deform_conv2d`` says what is refused.
    """

    def forward(self, input: Array, offset: Array, mask: Array | None = None) -> Array:  # type: ignore[override]
        """See ``deform_conv2d``."""
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
        )


def _branch(layer: Conv2d, numbers: int, deform_groups: int, rng: Rng | None) -> Conv2d:
    """A convolution with the layer's grid to so many numbers a place and group, which starts at 0.

    It has the stride too: one of its pixels for one of the layer's.
    """
    if deform_groups < 1 or layer.in_channels % deform_groups:
        raise ValueError(
            f"deform_groups divides in_channels, got {deform_groups} and {layer.in_channels}"
        )
    kh, kw = layer.weight.shape[2:]
    branch = Conv2d(
        layer.in_channels,
        numbers * deform_groups * kh * kw,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        rng=rng,
    )
    for parameter in branch.parameters():
        init.zeros_(parameter)
    return branch


class DeformConvPack(Conv2d):
    """Deformable convolution with the convolution that makes its offsets, v1.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng: as
            for ``nn.Conv2d``.
        deform_groups: G, parts of the channels with offsets of their own.

    Attributes:
        weight, bias: of the convolution.
        conv_offset: Conv2d to 2 G kh kw channels, 0 at the start.

    Raises:
        ValueError: ``groups`` does not divide both channels, or G not the input's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng=rng
        )
        self.conv_offset = _branch(self, 2, deform_groups, rng)

    def offsets(self, input: Array) -> Array:
        """(n, 2 G kh kw, h', w'), what the layer would use."""
        return self.conv_offset(input)

    def forward(self, input: Array) -> Array:
        """(n, c, h, w) to (n, c', h', w')."""
        return deform_conv2d(
            input,
            self.offsets(input),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
        )


class ModulatedDeformConvPack(Conv2d):
    """Modulated deformable convolution with the convolution that makes offsets and masks, v2.

    Args:
        in_channels, …, bias, rng: as ``DeformConvPack``.
        mask_scale: what σ is multiplied by; 1 as in the paper, 2 to start as the convolution.

    Attributes:
        weight, bias: of the convolution.
        conv_offset_mask: Conv2d to 3 G kh kw channels, 0 at the start: the first two thirds are
            the offsets as ``deform_conv2d`` takes them (pairs Δy, Δx: neither third is all of one),
            the last the masks before σ.

    Raises:
        ValueError: as ``DeformConvPack``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        mask_scale: float = 1.0,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng=rng
        )
        self.mask_scale = mask_scale
        self.conv_offset_mask = _branch(self, 3, deform_groups, rng)
        self.places = self.conv_offset_mask.out_channels // 3

    def offsets(self, input: Array) -> Array:
        """(n, 2 G kh kw, h', w'), what the layer would use."""
        return self.conv_offset_mask(input)[:, : 2 * self.places]

    def forward(self, input: Array) -> Array:
        """(n, c, h, w) to (n, c', h', w')."""
        found = self.conv_offset_mask(input)
        mask = ops.sigmoid(found[:, 2 * self.places :])
        return deform_conv2d(
            input,
            found[:, : 2 * self.places],
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask if self.mask_scale == 1.0 else self.mask_scale * mask,
        )


def from_mmcv(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of mmcv's modulated layers under the names here.

    There the branch is called ``conv_offset``, as that of v1; so use it for models whose deformable
    layers are all modulated.
    """
    return {name.replace("conv_offset.", "conv_offset_mask."): x for name, x in state_dict.items()}


def offset_groups(model: Module, lr: float, multiplier: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser in which whatever makes offsets learns slower.

    Args:
        model: of whose parameters those are meant that have ``offset`` in their names, such as
            ``conv_offset.weight``; in v2 and v4 these make the masks too.
        lr: of all others.
        multiplier: of it, for these; 0.1 as in v2.

    Returns:
        Two groups, the others and these; one of them may have no parameters.
    """
    slow: list[Parameter] = []
    usual: list[Parameter] = []
    for name, parameter in model.named_parameters():
        (slow if "offset" in name else usual).append(parameter)
    return [{"params": usual, "lr": lr}, {"params": slow, "lr": multiplier * lr}]


class ActiveConv2d(Conv2d):
    """A convolution whose grid is learned once for all pixels.

    Args and errors are those of ``nn.Conv2d``.

    Attributes:
        weight, bias: of the convolution.
        offset: (kh kw, 2), (Δy, Δx) in pixels, 0 at the start.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng=rng
        )
        kh, kw = self.weight.shape[2:]
        self.offset = Parameter(of(self.weight.data).zeros((kh * kw, 2), "float32"))

    def forward(self, input: Array) -> Array:
        """(n, c, h, w) to (n, c', h', w')."""
        padding = per_axis("ActiveConv2d", "padding", self.padding, 2, 0)
        axes = zip(
            input.shape[2:], self.weight.shape[2:], self.stride, padding, self.dilation, strict=True
        )
        size = (max(0, (a + 2 * p - d * (k - 1) - 1) // s + 1) for a, k, s, p, d in axes)
        shape = (input.shape[0], self.offset.size, *size)
        offset = ops.broadcast_to(self.offset.reshape(1, -1, 1, 1), shape)
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, padding, self.dilation
        )


class SpatialTransformer(Module):
    """Looks at the image, chooses one affine map, and reads the image through it.

    Args:
        localization: a Module from the image to 6 numbers a row, θ = (2, 3) row by row.  Its last
            layer should start at weight 0 and the bias of the identity, (1, 0, 0, 0, 1, 0).
        size: (h, w) of the output; None for the input's.
        align_corners: as for ``grid_sample``.
    """

    def __init__(
        self,
        localization: Callable[[Array], Array],
        size: tuple[int, int] | None = None,
        align_corners: bool = False,
    ) -> None:
        self.localization = localization
        self.size = size
        self.align_corners = align_corners

    def forward(self, input: Array) -> Array:
        """(n, c, h, w) to (n, c, *size).

        Raises:
            ValueError: the localization does not put out 6 numbers for each image.
        """
        theta = self.localization(input)
        n, c, *size = input.shape
        if theta.size != 6 * n:
            raise ValueError(f"a localization puts out (n, 6) for {n} images, got {theta.shape}")
        shape = (n, c, *(self.size or size))
        grid = affine_grid(theta.reshape(n, 2, 3), shape, self.align_corners)
        return grid_sample(input, grid, align_corners=self.align_corners)
