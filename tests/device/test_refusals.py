"""What the stand-in refuses, as a GPU would, although NumPy accepts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special

from tests import device
from tests.device import strict

xp = strict.xp


def numbers(lib: Any) -> Any:
    return lib.asarray(lib.arange(12.0).reshape(3, 4) - 5.5)


REFUSED = {
    "NumPy's asarray": (TypeError, lambda lib, x: np.asarray(x)),
    "NumPy's array": (TypeError, lambda lib, x: np.array([x, x])),
    "NumPy's exp": (TypeError, lambda lib, x: np.exp(x)),
    "NumPy's concatenate": (TypeError, lambda lib, x: np.concatenate([x, x])),
    "NumPy's allclose": (TypeError, lambda lib, x: np.testing.assert_allclose(x, x)),
    "SciPy's erf": (TypeError, lambda lib, x: scipy.special.erf(x)),
    "host array on the right": (TypeError, lambda lib, x: x * np.ones(4)),
    "host array on the left": (TypeError, lambda lib, x: np.ones(4) * x),
    "host 0-d array": (TypeError, lambda lib, x: x * np.array(2.0)),
    "host array compared": (TypeError, lambda lib, x: x < np.ones(4)),
    "host matrix": (TypeError, lambda lib, x: x @ np.eye(4)),
    "host array in a ufunc": (TypeError, lambda lib, x: lib.maximum(x, np.zeros(4))),
    "host array in a function": (TypeError, lambda lib, x: lib.where(x > 0, x, np.zeros(4))),
    "host array in a list": (TypeError, lambda lib, x: lib.concatenate([x, np.ones((1, 4))])),
    "host array in einsum": (TypeError, lambda lib, x: lib.einsum("ij,j", x, np.ones(4))),
    "host array as out": (TypeError, lambda lib, x: lib.exp(x, out=np.empty((3, 4)))),
    "host array added in place": (TypeError, lambda lib, x: x.__iadd__(np.ones(4))),
    "device array added to a host one": (TypeError, lambda lib, x: np.ones((3, 4)).__iadd__(x)),
    "host array assigned": (ValueError, lambda lib, x: x.__setitem__(0, np.ones(4))),
    "list assigned": (ValueError, lambda lib, x: x.__setitem__(0, [1.0, 2.0, 3.0, 4.0])),
    "host array that takes": (TypeError, lambda lib, x: np.ones((3, 4)).__setitem__(0, x[0])),
    "list in an operator": (TypeError, lambda lib, x: x - [1.0, 2.0, 3.0, 4.0]),
    "list in a ufunc": (TypeError, lambda lib, x: lib.exp([1.0, 2.0])),
    "list in a reduction": (TypeError, lambda lib, x: lib.sum([1.0, 2.0])),
    "tuple in prod": (TypeError, lambda lib, x: lib.prod(x.shape)),
    "numbers joined with an array": (TypeError, lambda lib, x: lib.stack([x[0, 0], 1.0])),
    "numbers and arrays in asarray": (TypeError, lambda lib, x: lib.asarray([x[0, 0], 1.0])),
    "range of an array": (TypeError, lambda lib, x: range(lib.asarray(3))),
    "list index": (TypeError, lambda lib, x: [1, 2, 3][lib.asarray(1)]),
    "array as a shape": (TypeError, lambda lib, x: lib.zeros(lib.asarray(3))),
    "array as a length": (TypeError, lambda lib, x: x.reshape(lib.asarray(12))),
    "array as a count": (TypeError, lambda lib, x: lib.linspace(0.0, 1.0, lib.asarray(3))),
    "array in arange": (TypeError, lambda lib, x: lib.arange(lib.asarray(3))),
    "array as a split point": (TypeError, lambda lib, x: lib.split(x, [lib.asarray(1)])),
    "hash": (TypeError, lambda lib, x: hash(lib.asarray(1.0)[()])),
    "round": (TypeError, lambda lib, x: round(x[0, 0])),
    "in": (TypeError, lambda lib, x: 0.5 in x),
    "where of a Python bool": (AttributeError, lambda lib, x: lib.where(True, x, x)),
    "where= of sum": (TypeError, lambda lib, x: lib.sum(x, where=x > 0)),
    "where= of a method": (TypeError, lambda lib, x: x.mean(where=x > 0)),
    "initial= of max": (TypeError, lambda lib, x: x.max(initial=0.0)),
    "initial= of sum": (TypeError, lambda lib, x: lib.sum(x, initial=1.0)),
    "mean= of var": (TypeError, lambda lib, x: lib.var(x, mean=x.mean())),
    "where= of a ufunc": (TypeError, lambda lib, x: lib.exp(x, where=x > 0, out=x.copy())),
    "mode= of take": (TypeError, lambda lib, x: lib.take(x, lib.asarray([0]), mode="clip")),
    "min= of clip": (TypeError, lambda lib, x: lib.clip(x, min=0.0, max=1.0)),
    "out= of einsum": (TypeError, lambda lib, x: lib.einsum("ij->i", x, out=lib.empty(3))),
    "stable= of argsort": (TypeError, lambda lib, x: lib.argsort(x, stable=True)),
    "kind of sort": (ValueError, lambda lib, x: lib.sort(x, kind="quicksort")),
    "shape= of reshape": (TypeError, lambda lib, x: lib.reshape(x, shape=(12,))),
    "upper= of cholesky": (
        TypeError,
        lambda lib, x: lib.linalg.cholesky(x @ x.T + lib.eye(3), upper=True),
    ),
    "keys of lexsort": (TypeError, lambda lib, x: lib.lexsort((x[0], x[1]))),
    "dict of paddings": (TypeError, lambda lib, x: lib.pad(x, {0: 1})),
    "vecdot": (AttributeError, lambda lib, x: lib.vecdot(x, x)),
    "matvec": (AttributeError, lambda lib, x: lib.matvec(x, x[0])),
    "insert": (AttributeError, lambda lib, x: lib.insert(x, 0, 1.0)),
    "block": (AttributeError, lambda lib, x: lib.block([[x]])),
    "errstate": (AttributeError, lambda lib, x: lib.errstate(all="ignore")),
    "unstack": (AttributeError, lambda lib, x: lib.unstack(x)),
    "geomspace": (AttributeError, lambda lib, x: lib.geomspace(1.0, 2.0)),
    "vector_norm": (AttributeError, lambda lib, x: lib.linalg.vector_norm(x)),
    "multi_dot": (AttributeError, lambda lib, x: lib.linalg.multi_dot([x, x.T])),
    "linalg.trace": (AttributeError, lambda lib, x: lib.linalg.trace(x)),
    "names of a result": (AttributeError, lambda lib, x: lib.linalg.svd(x).S),
    "maximum.reduce": (NotImplementedError, lambda lib, x: lib.maximum.reduce(x)),
    "logaddexp.reduce": (NotImplementedError, lambda lib, x: lib.logaddexp.reduce(x)),
    "maximum.accumulate": (NotImplementedError, lambda lib, x: lib.maximum.accumulate(x)),
    "maximum.reduceat": (
        NotImplementedError,
        lambda lib, x: lib.maximum.reduceat(x, lib.asarray([0])),
    ),
    "multiply.at": (NotImplementedError, lambda lib, x: lib.multiply.at(x, lib.asarray([0]), 2.0)),
    "subtract.at of floats": (TypeError, lambda lib, x: lib.subtract.at(x, lib.asarray([0]), 2.0)),
    "add.at of int8": (TypeError, lambda lib, x: lib.add.at(x.astype("int8"), lib.asarray([0]), 1)),
    "writeable": (AttributeError, lambda lib, x: x.flags.writeable),
    "resize": (AttributeError, lambda lib, x: x.copy().resize),
    "ctypes": (AttributeError, lambda lib, x: x.ctypes),
    "item of a place": (TypeError, lambda lib, x: x.item(0)),
    "Unicode": (ValueError, lambda lib, x: lib.asarray(["a"])),
    "the same place twice": (ValueError, lambda lib, x: x.__setitem__(lib.asarray([0, 0]), x[:2])),
    "twice by wrapping": (ValueError, lambda lib, x: x.__setitem__(lib.asarray([0, -3]), x[:2])),
    "twice by pairs": (
        ValueError,
        lambda lib, x: x.__setitem__((lib.asarray([0, 0]), lib.asarray([1, -3])), x[0, :2]),
    ),
    "twice by a list": (ValueError, lambda lib, x: x.__setitem__((slice(None), [1, 1]), x[:, :2])),
    "twice along an axis": (
        ValueError,
        lambda lib, x: lib.put_along_axis(x, lib.asarray([[0, 0]] * 3), x[:, 2:].copy(), 1),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_numpy_accepts(case: str) -> None:
    error, body = REFUSED[case]
    with np.errstate(all="ignore"):
        body(np, numbers(np))
    with pytest.raises(error):
        body(xp, numbers(xp))


def test_adding_to_the_same_place_twice_is_refused() -> None:
    def count(lib: Any) -> Any:
        histogram = lib.zeros(3)
        histogram[lib.asarray([0, 0, 1])] += 1
        return histogram

    assert count(np).tolist() == [1, 1, 0]  # the classic bug: not [2, 1, 0]
    with pytest.raises(ValueError, match="scatter_add"):
        count(xp)


def test_one_value_may_be_written_twice() -> None:
    x = xp.zeros(3)
    x[xp.asarray([0, 0])] = 1.0
    x[xp.asarray([1, 1])] = xp.asarray(2.0)
    assert x.tolist() == [1.0, 2.0, 0.0]


WAITS = {
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0]),
    "item": lambda x: x[0].item(),
    "get": lambda x: x.get(),
    "tolist": lambda x: x.tolist(),
    "asnumpy": lambda x: xp.asnumpy(x),
    "text": lambda x: f"{x}",
    "if": lambda x: 1 if x[0] > 0 else 0,
    "max of Python": lambda x: max(x),
    "reading by a mask": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: xp.where(x > 0),
    "argwhere": lambda x: xp.argwhere(x),
    "unique": lambda x: xp.unique(x),
    "bincount": lambda x: xp.bincount(x.astype("int64")),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_wait_is_counted_and_can_be_forbidden(case: str) -> None:
    x = xp.arange(3.0)
    device.reset()
    WAITS[case](x)
    assert device.counts()["sync"] >= 1
    with device.no_sync(), pytest.raises(device.DeviceSynchronized):
        WAITS[case](x)


def test_work_on_the_device_waits_for_nothing() -> None:
    device.reset()
    with device.no_sync():
        x = xp.asarray(np.arange(6.0).reshape(2, 3))
        y = xp.where(x > 2, x @ x.T @ x, 0.0).sum(axis=0)[xp.asarray([0, 1])]
        x[0] = y.mean()
        xp.add.at(x, xp.asarray([0, 0]), 1.0)
        assert len(x) == 2 and x.shape == (2, 3) and x.dtype == np.float64
    counted = device.counts()
    assert counted["h2d"] == 3 and counted["d2h"] == counted["sync"] == 0 and counted["launch"] > 5


def test_copies_are_counted() -> None:
    x = xp.arange(4)
    device.reset()
    assert x[[0, 1]].shape == x[np.array([0, 1])].shape == (2,)  # host indices travel silently
    assert device.counts()["h2d"] == 2
    x.get()
    assert device.counts()["d2h"] == 1
