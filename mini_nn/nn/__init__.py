"""Modules and layers under torch.nn's names, arguments, layouts and defaults."""

from . import functional, gaussian, init, layer_drop, parametrization, residual, schemes
from .activation import (
    ELU,
    GELU,
    SELU,
    AlphaDropout,
    Corrected,
    Erf,
    LeakyReLU,
    LogSoftmax,
    Mish,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .chunked_ff import ChunkedFeedForward, by_chunks
from .container import ModuleDict, ModuleList, Sequential
from .conv import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    MaxPool2d,
)
from .layers import Dropout, Embedding, Flatten, Identity, Linear
from .loss import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss, SmoothL1Loss
from .module import Mismatch, Module, Parameter
from .norm import (
    BatchNorm1d,
    BatchNorm2d,
    DyISRU,
    DyT,
    GroupNorm,
    InstanceNorm2d,
    InstanceRMSNorm2d,
    LayerNorm,
    ModulatedConv2d,
    RMSNorm,
)
from .reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "ELU", "GELU", "SELU", "AdaptiveAvgPool2d", "AlphaDropout", "AvgPool2d", "BCEWithLogitsLoss",
    "BatchNorm1d", "BatchNorm2d", "ChunkedFeedForward", "Conv1d", "Conv2d", "ConvTranspose2d",
    "Corrected", "CrossEntropyLoss", "Dropout", "DyISRU", "DyT", "Embedding", "Erf", "Flatten",
    "GroupNorm", "Identity", "InstanceNorm2d", "InstanceRMSNorm2d", "LayerNorm", "LeakyReLU",
    "Linear", "LogSoftmax", "MSELoss", "MaxPool2d", "Mish", "Mismatch", "ModulatedConv2d", "Module",
    "ModuleDict", "ModuleList", "Parameter", "RMSNorm", "ReLU", "ReversibleBlock",
    "ReversibleSequence", "Sequential", "SiLU", "Sigmoid", "SmoothL1Loss", "Softmax", "Softplus",
    "Tanh", "by_chunks", "functional", "gaussian", "init", "layer_drop", "parametrization",
    "residual", "schemes",
]  # fmt: skip
