"""Every function of ``mini_nn.ops`` with an oracle and inputs: the table of test_primitives.py.

An entry names a function, what NumPy, SciPy or a plain loop says it gives, and inputs as text:
``"2x3 3 -"`` stands for three arrays of numbers, of shapes (2, 3), (3,) and (), and ``#`` for the
next of the ready arrays ``given`` (indices, masks).  What follows the arrays is the same for the
function and its oracle: ``then`` by position, other options by keyword.  The shapes include 0-d and
empty ones wherever they are legal.  Linear algebra, convolutions and layers stand in
catalogue_layers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special

from mini_nn import ops

from . import oracles
from .cases import apart, bools, case, inside, ints, normal, positive


def constant(x: Any, values: Any) -> Any:
    """A constant of the dtype of x on its backend."""
    return ops.elementwise.of(x).asarray(np.array(values, x.dtype))


# elementwise

UNARY = ("2x3", "-", "0", "2x0x3")
BINARY = ("2x3 2x3", "2x3 3", "2x1 1x3", "- 3", "- -", "0x3 3")
MASK = bools([True, False, True], [False, False, True])
ZEROS = np.array([[0.0, 1.0, 0.0], [2.0, 3.0, -1.0]])
ODD = np.array([1.0, np.nan, np.inf, -np.inf])

case("add subtract multiply", np, *BINARY)
case("divide", np.divide, *BINARY, draw=positive)
case("power", np.power, *BINARY, draw=(positive, normal))
for _p in (-1, 0, 1, 2, 3, 5, 0.5, -0.5, 2.5):
    case("power", np.power, *UNARY, then=(float(_p),), draw=positive)
case("power", np.exp2, *UNARY, call=lambda x: ops.power(2.0, x))
case("negative exp expm1 tanh sin cos arctan square", np, *UNARY)
case("log log1p sqrt", np, *UNARY, draw=positive)
case("rsqrt", lambda x: 1 / np.sqrt(x), *UNARY, draw=positive)
case("arccos", np.arccos, *UNARY, draw=inside)
case("erf", scipy.special.erf, *UNARY)
case("sigmoid", scipy.special.expit, *UNARY)
case("abs sign floor", np, *UNARY, draw=apart)
case("round", np.rint, *UNARY, draw=apart)
case("maximum minimum", np, *BINARY, draw=apart)
case("maximum minimum", np, *UNARY, then=(0.04,), draw=apart)
for _bounds in ((-0.41, 0.47), (None, 0.47), (-0.41, None)):
    case("clip", np.clip, *UNARY, then=_bounds, draw=apart)
case("where", np.where, "# 2x3 2x3", "# 3 -", "# 2x1 2x3", given=(MASK,))
case("where", np.where, "# 2x3", "# 3", given=(MASK,), then=(0.0,))
case(
    "where",
    lambda x, m: np.where(m, 1, x),
    "2x3 #",
    given=(MASK,),
    call=lambda x, m: ops.where(m, 1.0, x),
)
_COMPARE = "equal not_equal less less_equal greater greater_equal"
case(_COMPARE, np, *BINARY)
case(_COMPARE, np, "# #", given=(ints(1, 2, 3), ints(3, 2, 1)))
case("isnan isfinite", np, *UNARY)
case("isnan isfinite", np, "#", given=(ODD,))
case("astype", lambda x: x, *UNARY, call=lambda x: ops.astype(x, x.dtype))

# reductions and scans

for _names, _draw in (("sum mean prod var std", normal), ("max min", apart)):
    case(_names, np, "2x3", "4", "2x1x3", draw=_draw)
    case(_names, np, "2x3x2", "0x3", draw=_draw, axis=1)
    case(_names, np, "2x3x2", draw=_draw, axis=(0, -1))
    case(_names, np, "2x3x2", draw=_draw, axis=(0, -1), keepdims=True)
    case(_names, np, "2x3", draw=_draw, axis=-2, keepdims=True)
    case(_names.removesuffix(" std"), np, "2x3", draw=_draw, axis=())
    case(_names.removesuffix(" std"), np, "-", draw=_draw)  # std: its kink
case("sum prod", np, "0", "2x0")
case("sum prod", np, "2x0x3", axis=1)
case("var std", np, "3x4", axis=1, ddof=1)
for _holes in ([1.0, 0.0, 2.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]):
    for _n in ("prod", "cumprod"):
        case(
            _n,
            lambda x, f=_n, holes=_holes: getattr(np, f)(x * np.array(holes), 1),
            "2x3",
            call=lambda x, f=_n, holes=_holes: getattr(ops, f)(x * constant(x, holes), 1),
        )
case("cumsum cumprod", np, "5", "2x3", "0", "-")
case("cumsum cumprod", np, "2x3", "2x0", axis=1)
case("cumsum cumprod", np, "5x2", axis=0)
case("logsumexp", scipy.special, "2x3", "-")
case("logsumexp", scipy.special, "2x3x2", axis=1)
case("logsumexp", scipy.special, "2x3x2", axis=(0, -1), keepdims=True)
case("argmax argmin", np, "2x3", "-", draw=apart)
case("argmax argmin", np, "2x3", "0x3", draw=apart, axis=1)
case("argmax argmin", np, "2x3", draw=apart, axis=0, keepdims=True)
for _zeros in (ZEROS, ZEROS > 0, ZEROS[:0]):
    case("any all count_nonzero", np, "#", given=(_zeros,))
    case("any all count_nonzero", np, "#", given=(_zeros,), axis=1, keepdims=True)
    case("any all count_nonzero", np, "#", given=(_zeros,), axis=(0, 1))

# shapes

case("reshape", np.reshape, "2x3", "6", then=((3, 2),))
case("reshape", np.reshape, "2x3", "-", "2x0", then=((-1,),))
case("transpose", np.transpose, "2x3x4", "3", "-", "0x2")
case("transpose", np.transpose, "2x3x4", axes=(1, 2, 0))
case("transpose", np.transpose, "2x3x4", axes=(-1, 0, -2))
case("swapaxes moveaxis", np, "2x3x4", "0x2", then=(0, -1))
case("moveaxis", np.moveaxis, "2x3x4", then=((0, 2), (-1, 0)))
case("matrix_transpose", lambda x: x.swapaxes(-1, -2), "2x3", "2x3x4", "0x2")
case("squeeze", np.squeeze, "1x3x1", "-", "1x0")
case("squeeze", np.squeeze, "1x3x1", axis=-1)
case("expand_dims", np.expand_dims, "2x3", "-", "0", axis=0)
case("expand_dims", np.expand_dims, "2x3", axis=(0, -1))
case("broadcast_to", np.broadcast_to, "4x3", "3", "2x1x3", "-", then=((2, 4, 3),))
case("broadcast_to", np.broadcast_to, "3", "1x3", then=((0, 3),))
for _axis in (0, -1, None):
    case("concatenate", np.concatenate, "2x3 2x3 2x3", "2x0 2x0", listed=True, axis=_axis)
case("concatenate", np.concatenate, "2x1 2x0 2x3", listed=True, axis=1)
for _axis in (0, 1, -1):
    case("stack", np.stack, "2x3 2x3", "0x3 0x3", listed=True, axis=_axis)
case("stack", np.stack, "- - -", "3", listed=True)
case("split", lambda x, *a: tuple(np.split(x, *a)), "2x6", "0x3", then=(3, 1))
case("split", lambda x, *a: tuple(np.split(x, *a)), "2x5", then=([1, 1, 4], -1))
for _mode in ("constant", "edge", "reflect", "wrap"):
    case("pad", np.pad, "2x3", "2", then=(1, _mode))
    case("pad", np.pad, "3x4", then=(((0, 2), (3, 1)), _mode))
    case("pad", np.pad, "2", then=((3, 4), _mode))
case("pad", np.pad, "2x3", "0x3", then=(((1, 0), (0, 2)),), constant_values=7.0)
case("flip", np.flip, "2x3", "-", "0x2")
case("flip", np.flip, "2x3x2", axis=(0, -1))
case("roll", np.roll, "2x3", "0", shift=2)
case("roll", np.roll, "4x3", shift=(-1, 2), axis=(0, 1))
case("repeat", np.repeat, "2x3", "-", "0", repeats=2)
case("repeat", np.repeat, "2x3", repeats=2, axis=1)
case("repeat", np.repeat, "2x3", repeats=[2, 0, 1], axis=-1)
case("tile", np.tile, "2x3", "-", "0x2", reps=2)
case("tile", np.tile, "3", "1x2x3", reps=(2, 2))
case("tril triu", np, "3x3", "2x4x3", "0x3")
case("tril triu", np, "3x4", k=-1)
case("tril triu", np, "4x3", k=1)
case("to_backend", lambda x, *_: x, *UNARY, then=("numpy", "numpy"))
case("zeros_like ones_like", np, *UNARY)
case("full_like", np.full_like, *UNARY, then=(2.5,))
_f32: dict[str, Any] = {"dtype": "float32"}
case("zeros", np.zeros, "", then=((2, 3),), **_f32)
case("ones", np.ones, "", then=((2, 0),), **_f32)
case("full", np.full, "", then=((3,), 2.5), **_f32)
case("eye", np.eye, "", then=(2, 3, 1), **_f32)
case("arange", np.arange, "", then=(5, 1, -2))
case("arange", lambda *a: np.arange(*a, dtype="float32"), "", then=(0, 1, 0.25))
for _ends in ((0, 1, 5), (1, -1, 4, False)):
    case("linspace", lambda *a: np.linspace(*a, dtype="float32"), "", then=_ends)

# indices

_I, _J, _NONE = ints(2, 0, 2, -1), ints([0, 1], [1, 0]), np.zeros(0, "int64")
_ONES, _COLUMN, _ALONG = ints(1, 1, 0), bools(True, False, True), ints([2, 0], [1, 1])
_every = slice(None)
KEYS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("3x2", (), lambda: 1),
    ("3", (), lambda: -1),
    ("5x2", (), lambda: slice(None, None, -2)),
    ("4x2", (), lambda: (slice(1, 3), 0)),
    ("2x3x2", (), lambda: (None, ..., slice(0, 1))),
    ("2x3", (), lambda: ()),
    ("-", (), lambda: ...),
    ("-", (), lambda: None),
    ("2x3", (), lambda: slice(0, 0)),
    ("3x2", (), lambda: [1, 1, 0]),
    ("3x2 #", (_I,), lambda i: i),
    ("3 #", (_J,), lambda i: i),
    ("3x2 #", (_NONE,), lambda i: i),
    ("2x3 #", (_I,), lambda i: (_every, i)),
    ("3x2 # #", (_I, ints(1, 1, 1, 0)), lambda i, j: (i, j)),
    ("3x4x2 # #", (_I, ints(1, 1, 1, 0)), lambda i, j: (i, _every, j)),
    ("3x4x2 #", (_ONES,), lambda i: (0, _every, i)),
    ("3x4x2 #", (_ONES,), lambda i: (i, None, ..., 1)),
    ("2x3 #", (MASK,), lambda m: m),
    ("2x3 #", (_COLUMN,), lambda m: (_every, m)),
    ("2x3 #", (np.zeros((2, 3), bool),), lambda m: m),
]
for _inputs, _given, _key in KEYS:
    case(
        "getitem",
        lambda x, *i, key=_key: x[key(*i)],
        _inputs,
        given=_given,
        call=lambda x, *i, key=_key: ops.getitem(x, key(*i)),
    )


def swapped(function: Any, *order: int) -> Any:
    """The function with its arguments in this order."""
    return lambda *xs, **options: function(*[xs[i] for i in order], **options)


case("scatter", oracles.scatter, "4x2 #", "2 #", given=(_I,), then=((3, 2),))
case("scatter", oracles.scatter, "0x2 #", given=(_NONE,), then=((3, 2),))
case("scatter", oracles.scatter, "3 #", "- #", given=(MASK,), then=((2, 3),))
case("scatter", oracles.scatter, "2", then=((slice(1, 3), 0), (4, 2)))
_added, _add = swapped(oracles.scatter_add, 0, 2, 1), swapped(ops.scatter_add, 0, 2, 1)
case("scatter_add", _added, "3x2 4x2 #", "3x2 2 #", "3x2 - #", given=(_I,), call=_add)
case("scatter_add", _added, "2x3 3 #", "2x3 - #", given=(MASK,), call=_add)
case("scatter_add", _added, "3x2 2 #", given=(ints(1)[0],), call=_add)
for _axis in (0, 1, -1, None):
    case("take", np.take, "3x3 #", given=(_I,), axis=_axis)
    case("take", np.take, "3x3 #", given=(_J,), axis=_axis)
case("take_along_axis", np.take_along_axis, "2x3 #", "1x3 #", given=(_ALONG,), axis=1)
case("take_along_axis", np.take_along_axis, "3x2 #", given=(_ALONG,), axis=0)
for _dim in (0, -1):
    case(
        "gather",
        lambda x, i, dim: oracles.gather(x, dim, i),
        *("3x3 #", "2x4 #" if _dim else "4x2 #"),
        given=(_ALONG,),
        call=lambda x, i, dim: ops.gather(x, dim, i),
        dim=_dim,
    )
for _axis in (-1, 0):
    case("sort argsort", np, "3x4", "5", "0x3", draw=apart, axis=_axis)
    case("topk", oracles.topk, "3x4", "5", draw=apart, k=2, axis=_axis)
case("nonzero", np.nonzero, "#", "3", given=(ZEROS,))
for _index in (ints(2, 0, 3), _J, _NONE):
    case("one_hot", lambda i, n: np.eye(n, dtype="float32")[i], "#", given=(_index,), then=(4,))
    case("embedding", lambda i, w: w[i], "# 4x2", given=(_index,))
case("segment_sum", oracles.segment_sum, "3x2 #", "3 #", given=(ints(1, 1, 3),), then=(4,))
case("segment_sum", oracles.segment_sum, "0x2 #", given=(_NONE,), then=(4,))
