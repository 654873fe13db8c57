"""What the stand-in computes is what NumPy computes: values, dtypes and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special

from tests.device import strict
from tests.device.array import ndarray

xp, special = strict.xp, strict.special


def numbers(lib: Any) -> Any:
    return lib.asarray(lib.arange(12.0).reshape(3, 4) - 5.5)


def assert_same(got: Any, want: Any) -> None:
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(got, ndarray):
        want = np.asarray(want)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got.get(), want, rtol=1e-6, atol=1e-12)
    else:
        assert got == want
        assert not isinstance(got, np.ndarray)


SAME = [
    lambda lib, x: x + 1,
    lambda lib, x: 2.5 - x,
    lambda lib, x: np.float32(2) * x,
    lambda lib, x: x.astype("float32") * np.float64(2),
    lambda lib, x: x.astype("float32") * 2.0,
    lambda lib, x: x.astype("float16") / 3,
    lambda lib, x: x.astype("float32")[0, 0] * 2.0,
    lambda lib, x: x.astype("float32") * x[0, 0],
    lambda lib, x: 2 ** x.astype("int64").clip(0),
    lambda lib, x: x % 3,
    lambda lib, x: x // 2,
    lambda lib, x: (x > 0) & ~(x > 2) | (x == 0.5),
    lambda lib, x: -abs(x),
    lambda lib, x: x @ x.T,
    lambda lib, x: x.sum(),
    lambda lib, x: x.sum(0),
    lambda lib, x: x.sum(axis=(0, 1), keepdims=True),
    lambda lib, x: x.astype("float32").mean(1),
    lambda lib, x: x.var(1, ddof=1),
    lambda lib, x: lib.std(x, 0, keepdims=True),
    lambda lib, x: (x > 0).sum(),
    lambda lib, x: x.max(),
    lambda lib, x: x.min(1),
    lambda lib, x: x.argmax(1),
    lambda lib, x: (x > 0).all(0),
    lambda lib, x: (x > 0).any(),
    lambda lib, x: x.prod(0, keepdims=True),
    lambda lib, x: x.cumsum(1),
    lambda lib, x: lib.cumprod(x),
    lambda lib, x: x.clip(0),
    lambda lib, x: x.clip(max=2.0),
    lambda lib, x: lib.clip(x, None, x[0, 3]),
    lambda lib, x: lib.exp(x, dtype="float64"),
    lambda lib, x: lib.modf(x),
    lambda lib, x: lib.logaddexp(x, 0.0),
    lambda lib, x: lib.exp(1.0),
    lambda lib, x: lib.sinc(x),
    lambda lib, x: lib.where(x > 0, x, 0.0),
    lambda lib, x: lib.where(x > 0, 1.0, 0.0),
    lambda lib, x: lib.where(x > 0),
    lambda lib, x: lib.concatenate([x, x], axis=1),
    lambda lib, x: lib.stack((x, x), -1),
    lambda lib, x: lib.split(x, 2, axis=1),
    lambda lib, x: lib.split(x, [1, 3], axis=-1),
    lambda lib, x: lib.pad(x, ((1, 0), (0, 2)), constant_values=3.0),
    lambda lib, x: lib.pad(x, 1, mode="reflect"),
    lambda lib, x: lib.flip(x, 1),
    lambda lib, x: lib.roll(x, 2, axis=1),
    lambda lib, x: lib.broadcast_to(x[0], (3, 4)),
    lambda lib, x: lib.repeat(x, 2, axis=0),
    lambda lib, x: lib.tile(x, (2, 1)),
    lambda lib, x: lib.moveaxis(x[None], 0, -1),
    lambda lib, x: x.reshape(2, -1),
    lambda lib, x: x.reshape((4, 3), order="F"),
    lambda lib, x: lib.reshape(x, -1),
    lambda lib, x: x.transpose(1, 0),
    lambda lib, x: x.transpose(),
    lambda lib, x: x.T.ravel(),
    lambda lib, x: x.swapaxes(0, 1),
    lambda lib, x: x[None].squeeze(0),
    lambda lib, x: lib.expand_dims(x, (0, 2)),
    lambda lib, x: lib.tril(x, -1),
    lambda lib, x: lib.einsum("ij,kj->ik", x, x),
    lambda lib, x: lib.einsum(x, [0, 1], x, [0, 1], [1]),
    lambda lib, x: lib.tensordot(x, x, axes=((0, 1), (0, 1))),
    lambda lib, x: lib.outer(x[0], x[1]),
    lambda lib, x: lib.add.outer(x[0], x[:, 0]),
    lambda lib, x: lib.multiply.reduce(x, 1),
    lambda lib, x: lib.sort(-x, axis=0),
    lambda lib, x: lib.argsort(-x),
    lambda lib, x: lib.searchsorted(x[0], x[1]),
    lambda lib, x: lib.bincount(lib.asarray([0, 2, 2]), minlength=4),
    lambda lib, x: lib.unique(lib.asarray([3, 1, 3]), return_counts=True),
    lambda lib, x: lib.nonzero(x > 0),
    lambda lib, x: lib.percentile(x, [10, 50]),
    lambda lib, x: lib.median(x, axis=0),
    lambda lib, x: lib.diagonal(x, 1),
    lambda lib, x: lib.trace(x),
    lambda lib, x: lib.linalg.norm(x, axis=1),
    lambda lib, x: lib.linalg.solve(x @ x.T + 9 * lib.eye(3), x),
    lambda lib, x: lib.linalg.inv(x @ x.T + 9 * lib.eye(3)),
    lambda lib, x: lib.linalg.cholesky(x @ x.T + 9 * lib.eye(3)),
    lambda lib, x: tuple(lib.linalg.slogdet(x @ x.T + 9 * lib.eye(3))),
    lambda lib, x: tuple(lib.linalg.qr(x)),
    lambda lib, x: lib.fft.rfft(x.astype("float32")),
    lambda lib, x: lib.lib.stride_tricks.sliding_window_view(x, 2, axis=1),
    lambda lib, x: lib.full((2, 2), x[0, 0]),
    lambda lib, x: lib.full_like(x, 2.0, dtype="float32"),
    lambda lib, x: lib.zeros((2, 0), "float16"),
    lambda lib, x: lib.ones_like(x[:0]),
    lambda lib, x: lib.eye(3, k=1, dtype="float32"),
    lambda lib, x: lib.linspace(0.0, 1.0, 5),
    lambda lib, x: lib.meshgrid(lib.arange(2), lib.arange(3), indexing="ij"),
    lambda lib, x: lib.asarray([[1, 2], [3, 4]]),
    lambda lib, x: lib.asarray([x[0], x[1]]),
    lambda lib, x: lib.array(x, dtype="float32"),
    lambda lib, x: lib.ascontiguousarray(x.T),
    lambda lib, x: lib.isclose(x, 0.5),
    lambda lib, x: lib.allclose(x, x),
    lambda lib, x: lib.array_equal(x, x),
    lambda lib, x: lib.result_type(x, "float16"),
    lambda lib, x: lib.broadcast_shapes((3, 1), (4,)),
    lambda lib, x: lib.shape(x),
    lambda lib, x: lib.nan_to_num(x / 0, posinf=1.0),
    lambda lib, x: lib.finfo("float32").max,
    lambda lib, x: lib.pi,
    lambda lib, x: x[1],
    lambda lib, x: x[1, 2],
    lambda lib, x: x[..., ::-1],
    lambda lib, x: x[:, None, 1:3],
    lambda lib, x: x[[0, -1]],
    lambda lib, x: x[np.array([0, 2])],
    lambda lib, x: x[lib.asarray([0, 2]), lib.asarray([1, 1])],
    lambda lib, x: x[:, lib.asarray([[1], [0]])],
    lambda lib, x: x[None, lib.asarray([1, 0]), :, None],
    lambda lib, x: x[lib.asarray([0, 2]), ..., None, 1],
    lambda lib, x: x[1, lib.asarray([0, 2])],
    lambda lib, x: x[x > 0],
    lambda lib, x: x[lib.asarray([True, False, True]), 1:],
    lambda lib, x: x[:, lib.asarray([True, False, True, True])],
    lambda lib, x: x[lib.asarray(1)],
    lambda lib, x: x[[]],
    lambda lib, x: lib.take(x, lib.asarray([2, 0]), axis=1),
    lambda lib, x: x.take([1]),
    lambda lib, x: lib.take_along_axis(x, lib.argsort(x, axis=1), 1),
    lambda lib, x: [row.sum() for row in x],
    lambda lib, x: (len(x), x.ndim, x.size, x.nbytes, x.itemsize, x.strides),
    lambda lib, x: (x.T.flags.f_contiguous, x.T.flags.c_contiguous),
    lambda lib, x: (float(x[0, 0]), int(x[0, 3]), bool(x[0, 0]), f"{x[0, 0]:.2f}", x[0].tolist()),
    lambda lib, x: (str(x), repr(x)),
]  # fmt: skip


@pytest.mark.parametrize("body", SAME)
def test_computes_what_numpy_computes(body: Any) -> None:
    with np.errstate(all="ignore"):
        want = body(np, numbers(np))
    assert_same(body(xp, numbers(xp)), want)


NAMES = [
    "erf",
    "erfinv",
    "expit",
    "log_expit",
    "ndtr",
    "log_ndtr",
    "gammaln",
    "digamma",
    "i0",
    "entr",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_functions_are_scipys(name: str, dtype: str) -> None:
    x = np.linspace(0.1, 0.9, 5).astype(dtype)
    assert_same(getattr(special, name)(xp.asarray(x)), getattr(scipy.special, name)(x))


def test_special_functions_of_an_axis() -> None:
    x = np.arange(6.0).reshape(2, 3)
    assert_same(
        special.logsumexp(xp.asarray(x), axis=1, keepdims=True),
        scipy.special.logsumexp(x, axis=1, keepdims=True),
    )
    assert_same(special.softmax(xp.asarray(x), axis=0), scipy.special.softmax(x, axis=0))
    assert not hasattr(special, "owens_t") and hasattr(scipy.special, "owens_t")
