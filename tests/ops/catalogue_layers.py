"""The catalogue's second half: linear algebra, convolutions, activations and layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special

from mini_nn import ops

from . import oracles
from .cases import apart, bools, case, definite, ints, normal, regular
from .catalogue import UNARY

# linear algebra

case("matmul", np.matmul, "2x3 3x4", "3 3", "3 3x2", "2x3 3", "0x3 3x2", "2x0 0x3", "3x3 3x3")
case("matmul", np.matmul, "2x2x3 3x2", "2x3 4x3x2", "2x1x2x3 3x3x2", "3 2x3x2", "2x2x3 3")
case("dot", np.dot, "3 3", "2x3 3x2", "2x3 3", "2x3 2x3x2", "- 2x3")
case("inner", np.inner, "3 3", "2x3 4x3", "- 3")
case("outer", np.outer, "2 3", "2x2 3", "- 2", "0 2")
for _axes in (0, 1, 2, ([0], [1]), ([0, 1], [1, 0])):
    case("tensordot", np.tensordot, "2x2 2x2", axes=_axes)
case("tensordot", np.tensordot, "2x3 3x4x2", "2x0 0x3", axes=1)
EQUATIONS = {
    "ij,jk->ik": "2x3 3x4",
    "ij,jk": "2x3 3x4",
    "bhqd,bhkd->bhqk": "2x2x3x2 2x2x4x2",
    "bhqk,bhkd->bqhd": "2x2x3x4 2x2x4x2",
    "i,i->": "3 3",
    "i,j->ij": "2 3",
    "ij->ji": "2x3",
    "ij->": "2x3",
    "ii->i": "3x3",
    "ii": "3x3",
    "ijj->ij": "2x3x3",
    "iij,ij->i": "2x2x3 2x3",
    "...ij,...jk->...ik": "2x2x3 3x2",
    "...i,...i->...": "2x3 3",
    "ij,jk,kl->il": "2x3 3x2 2x4",
    "a,ab,abc->c": "2 2x3 2x3x2",
    "ij,j->i": "2x1 3",
    "ij,kj->ik": "2x0 3x0",
    ",i->i": "- 3",
}
for _equation, _shapes in EQUATIONS.items():
    case(
        "einsum",
        lambda *xs, equation: np.einsum(equation, *xs),
        _shapes,
        call=lambda *xs, equation: ops.einsum(equation, *xs),
        equation=_equation,
    )
case("diagonal", np.diagonal, "3x3", "2x4", "3x2x2", "0x2")
case("diagonal", np.diagonal, "3x2x4", offset=1, axis1=0, axis2=-1)
case("diag diagonal", np, "3x3", then=(-1,))
case("diag", np.diag, "3", "3x2", "0")
case("diag", np.diag, "2", "3x3", k=1)
case("trace", np.trace, "3x3", "2x3", "2x2x3")
case("trace", np.trace, "2x3x3", offset=1, axis1=1, axis2=-1)
case("norm", np.linalg.norm, "3", "2x3", "2x3x2")
for _ord in (1, 2, 3, 1.5, np.inf, -np.inf, 0):
    case("norm", np.linalg.norm, "2x3", draw=apart, ord=_ord, axis=1)
    case("norm", np.linalg.norm, "2x3", draw=apart, ord=_ord, axis=0, keepdims=True)
for _ord in (None, "fro", 1, -1, np.inf, -np.inf):
    case("norm", np.linalg.norm, "3x2x4", draw=apart, ord=_ord, axis=(0, 2))
    case("norm", np.linalg.norm, "3x2", draw=apart, ord=_ord, keepdims=True)
_system = (regular, normal)
case("solve", np.linalg.solve, "3x3 3x2", "2x3x3 3x2", "3x3 2x3x1", "3x3 3", draw=_system)
case("solve", np.linalg.solve, "3x3 3x3", "0x0 0x2", draw=_system)
case("inv", np.linalg.inv, "3x3", "2x2x2", "0x0", draw=regular)
case("det", np.linalg.det, "3x3", "2x2x2", "1x1", draw=regular)
case("slogdet", lambda a: tuple(np.linalg.slogdet(a)), "3x3", "2x2x2", "1x1", draw=regular)
case(
    "cholesky",  # of a symmetric function of the input, for whose elements no symmetry is needed
    lambda a: np.linalg.cholesky((a + a.swapaxes(-1, -2)) / 2),
    *("3x3", "2x2x2", "1x1"),
    call=lambda a: ops.cholesky((a + a.swapaxes(-1, -2)) / 2),
    draw=definite,
)
case("qr", lambda a: tuple(np.linalg.qr(a)), "3x3", "4x2", "2x3x2", draw=regular)

# convolution

_images: list[tuple[str, dict[str, Any]]] = [
    ("2x2x4x5 3x2x3x2 3", {}),
    ("1x2x3x3 2x2x1x1", {}),
    ("2x2x5x4 2x2x3x3 2", {"stride": 2, "padding": 1}),
    ("1x2x5x6 2x2x2x3", {"stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)}),
    ("1x4x4x4 4x2x3x3 4", {"groups": 2, "padding": 1}),
    ("2x3x4x4 3x1x3x3 3", {"groups": 3, "padding": 1}),
    ("1x2x4x4 4x1x3x3", {"groups": 2, "stride": 3, "padding": 2}),
    ("0x2x4x4 3x2x3x3 3", {}),
]
for _shapes, _options in _images:
    case("conv2d", oracles.conv, _shapes, **_options)
case("conv1d", oracles.conv, "2x2x6 3x2x3 3", "1x2x7 4x2x1")
case("conv1d", oracles.conv, "1x2x7 2x1x2", stride=2, padding=1, dilation=2, groups=2)
case("conv_transpose2d", oracles.conv_transpose, "2x2x3x3 2x3x2x3 3")
_twice = {"stride": 2, "padding": 1, "output_padding": 1}
case("conv_transpose2d", oracles.conv_transpose, "1x2x3x2 2x2x3x3 2", **_twice)
_uneven = {"groups": 2, "stride": (1, 2), "dilation": (2, 1)}
case("conv_transpose2d", oracles.conv_transpose, "1x4x2x3 4x2x2x2", **_uneven)
case("conv_transpose2d", oracles.conv_transpose, "1x2x3x3 2x1x3x3", groups=2, padding=1)
case("conv_transpose1d", oracles.conv_transpose, "2x2x3 2x3x2 3")
case("conv_transpose1d", oracles.conv_transpose, "1x4x3 4x1x3", groups=2, **_twice)
for _columns, _options in (
    (6, {}),
    (6, {"padding": 1, "stride": 2}),
    (8, {"dilation": 2, "padding": 1}),
):
    case("unfold", oracles.unfold, "2x2x4x5", then=((2, 3),), **_options)
    case("fold", oracles.fold, f"2x12x{_columns}", then=((4, 4), (2, 3)), **_options)
for _pool, _expected in (("avg_pool", oracles.avg_pool), ("max_pool", oracles.max_pool)):
    case(f"{_pool}2d", _expected, "2x2x4x5", "0x2x4x4", then=((2, 3),), draw=apart)
    case(f"{_pool}2d", _expected, "1x2x5x5", then=(3,), stride=(1, 2), padding=1, draw=apart)
    case(f"{_pool}1d", _expected, "2x2x6", then=(2,), draw=apart)
    case(f"{_pool}1d", _expected, "2x1x6", then=(3, 1, 1), draw=apart)
case("max_pool2d", oracles.max_pool, "1x2x5x5", then=(2, 2, 1, 2), draw=apart)

# activations and layers

case("relu", lambda x: np.maximum(x, 0), *UNARY, draw=apart)
case("gelu", oracles.gelu, *UNARY)
case("gelu", oracles.gelu, *UNARY, approximate="tanh")
case("silu", lambda x: x / (1 + np.exp(-x)), *UNARY)
case("softplus", lambda x: np.logaddexp(x, 0), *UNARY)
for _axis in (-1, 0):
    case("softmax log_softmax", scipy.special, "2x3", "2x3x2", axis=_axis)
    case("softmax log_softmax", lambda x, axis: x, "0x3", axis=_axis)
for _target in (ints(2, 0, 3), ints(2, -100, 3)):
    case("cross_entropy", oracles.cross_entropy, "3x4 #", given=(_target,))
case("cross_entropy", oracles.cross_entropy, "0x4 #", given=(ints(),))
_smooth = {"label_smoothing": 0.1, "ignore_index": 1}
case("cross_entropy", oracles.cross_entropy, "3x4 #", given=(ints(2, 1, 3),), **_smooth)
case("layer_norm", oracles.layer_norm, "2x3", "2x2x3 3 3", "3 3 3", "2x3 3", "0x3 3 3")
case("layer_norm", oracles.layer_norm, "2x3 3 3", eps=0.5)
case("rms_norm", oracles.rms_norm, "2x3", "2x2x3 3", "3 3", "0x3 3")
case("rms_norm", oracles.rms_norm, "2x3 3", eps=0.5)
_affine = ("2x3 4x3 4", "2x2x3 4x3", "3 2x3 2", "0x3 2x3 2", "3x3 3x3")
case("linear", lambda x, w, b=0.0: x @ w.T + b, *_affine)
case("addmm", lambda b, x, w: x @ w + b, "4 2x3 3x4", "4 2x2x3 3x4", "2 3 3x2", "2 0x3 3x2")
_qkv, _square = "2x3x2 2x4x2 2x4x3", "2x2x3x2 2x2x3x2 2x2x3x2"
_LOOK = bools([True, False, True, True], [False, True, False, False], [True] * 4)
_sdpa = "scaled_dot_product_attention"
case(_sdpa, oracles.attention, _qkv, _square, "3x2 4x2 4x2", f"{_qkv} 3x4")
case(_sdpa, oracles.attention, f"{_qkv} #", given=(_LOOK,))
case(_sdpa, oracles.attention, "2x4x2 2x4x2 2x4x3", _square, is_causal=True)
case(_sdpa, oracles.attention, _qkv, scale=0.7)
