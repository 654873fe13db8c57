"""Layers and losses as functions, under torch.nn.functional's names, argument names and defaults.

Each takes Tensors or plain arrays and returns what it was given; integers (indices, classes) may
be Tensors, arrays or lists.  ``dim`` counts axes, also from the end.  Left out of torch's arguments
are ``inplace`` (a Tensor does not change) and those that torch calls deprecated.
"""

from ...ops import (
    avg_pool1d,
    avg_pool2d,
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    fold,
    max_pool1d,
    max_pool2d,
    unfold,
)
from .activation import (
    alpha_dropout,
    dropout,
    elu,
    gelu,
    glu,
    hardtanh,
    leaky_relu,
    log_softmax,
    logsigmoid,
    mish,
    relu,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from .image import adaptive_avg_pool2d, interpolate, pad, pixel_shuffle
from .layers import embedding, linear, one_hot, scaled_dot_product_attention
from .loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    nll_loss,
    normalize,
    smooth_l1_loss,
)
from .norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm

__all__ = [
    "adaptive_avg_pool2d", "alpha_dropout", "avg_pool1d", "avg_pool2d", "batch_norm",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "conv1d", "conv2d",
    "conv_transpose1d", "conv_transpose2d", "cosine_similarity", "cross_entropy", "dropout", "elu",
    "embedding", "fold", "gelu", "glu", "group_norm", "hardtanh", "huber_loss", "instance_norm",
    "interpolate", "kl_div", "l1_loss", "layer_norm", "leaky_relu", "linear", "log_softmax",
    "logsigmoid", "max_pool1d", "max_pool2d", "mish", "mse_loss", "nll_loss", "normalize",
    "one_hot", "pad", "pixel_shuffle", "relu", "rms_norm", "scaled_dot_product_attention", "selu",
    "sigmoid", "silu", "smooth_l1_loss", "softmax", "softplus", "tanh", "unfold",
]  # fmt: skip
