"""Losses as modules; the functions are in ``nn.functional``."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from . import functional as F
from .module import Module


class CrossEntropyLoss(Module):
    """``functional.cross_entropy`` with fixed options; a weight of the classes is a buffer."""

    weight: Array | None

    def __init__(
        self,
        weight: Array | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Array, target: Any) -> Array:
        """Logits (N, C, …) and classes (N, …), or distributions of the input's shape."""
        return F.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class MSELoss(Module):
    """(input − target)²."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def forward(self, input: Array, target: Array) -> Array:
        """Two arrays of one shape."""
        return F.mse_loss(input, target, self.reduction)


class SmoothL1Loss(Module):
    """Quadratic below β, linear above; see ``functional.smooth_l1_loss``."""

    def __init__(self, reduction: str = "mean", beta: float = 1.0) -> None:
        self.reduction = reduction
        self.beta = beta

    def forward(self, input: Array, target: Array) -> Array:
        """Two arrays of one shape."""
        return F.smooth_l1_loss(input, target, self.reduction, self.beta)


class BCEWithLogitsLoss(Module):
    """``functional.binary_cross_entropy_with_logits`` with fixed options; weights are buffers."""

    weight: Array | None
    pos_weight: Array | None

    def __init__(
        self,
        weight: Array | None = None,
        reduction: str = "mean",
        pos_weight: Array | None = None,
    ) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction = reduction

    def forward(self, input: Array, target: Array) -> Array:
        """Logits and probabilities of one shape."""
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, self.reduction, self.pos_weight
        )
