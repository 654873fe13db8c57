"""Where CuPy differs from NumPy, the stand-in does what CuPy does; and it has CuPy's names."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device import make_surface, strict
from tests.device.array import ndarray
from tests.device.functions import scatter_add
from tests.device.test_arithmetic import assert_same

xp, special = strict.xp, strict.special


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6), st.integers(1, 7))
def test_an_index_out_of_range_wraps(places: list[int], n: int) -> None:
    host = np.arange(10.0, 10.0 + n)
    want = host[np.array(places) % n]
    x, index = xp.asarray(host), xp.asarray(places)
    for got in (
        x[index],
        x.take(index),
        xp.take(x, index, axis=0),
        xp.take_along_axis(x, index, 0),
    ):
        assert_same(got, want)
    counted, target = xp.zeros(n), np.zeros(n)
    xp.add.at(counted, index, 1.0)
    np.add.at(target, np.array(places) % n, 1.0)
    assert_same(counted, target)
    x[index] = -1.0
    host[np.array(places) % n] = -1.0
    assert_same(x, host)


def test_an_integer_out_of_range_raises() -> None:
    for key in (3, xp.asarray([0.0]), "a", 1.0):
        with pytest.raises(IndexError):
            xp.zeros(3)[key]


@given(st.data())
def test_scatter_add_is_a_sum_over_places(data: Any) -> None:
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    values = np.arange(2.0 * len(rows)).reshape(len(rows), 2)
    want = np.stack([values[np.array(rows) == i].sum(0) for i in range(4)])
    target = xp.zeros((4, 2), "float32")
    scatter_add(target, xp.asarray(rows), xp.asarray(values))
    assert_same(target, want.astype("float32"))


def test_maximum_at() -> None:
    target = xp.zeros(3)
    xp.maximum.at(target, xp.asarray([0, 0, 2]), xp.asarray([1.0, 3.0, -1.0]))
    assert target.tolist() == [3.0, 0.0, 0.0]


def test_results_are_arrays_and_views_are_views() -> None:
    x = xp.arange(3.0)
    for one in (x.sum(), x[0], x.argmax(), xp.exp(1.0), xp.allclose(x, x), xp.count_nonzero(x)):
        assert type(one) is ndarray and one.shape == ()
    first = x[0]
    first += 5.0
    assert x[0].item() == 5.0  # in NumPy x[0] is a copy
    assert not hasattr(xp.asarray(1), "__index__")


def test_matmul_in_place_binds_a_new_array() -> None:
    def alias_survives(lib: Any) -> bool:
        a = lib.eye(2)
        before = a
        a @= 2 * lib.eye(2)
        return float(before[0, 0]) == 2.0

    assert alias_survives(np)
    assert not alias_survives(xp)


def test_in_place_operators_keep_array_and_dtype() -> None:
    x = xp.ones(3, "float32")
    same = x
    x += np.float64(1)
    x *= xp.asarray([1.0, 2.0, 3.0])
    assert same is x and x.dtype == np.float32 and x.tolist() == [2.0, 4.0, 6.0]
    out = xp.empty(3, "float32")
    assert xp.multiply(x, 2.0, out=out) is out and out.tolist() == [4.0, 8.0, 12.0]
    with pytest.raises(TypeError):
        xp.arange(3).__iadd__(0.5)


def test_truth_of_an_empty_array_is_false_and_deprecated() -> None:
    with pytest.warns(DeprecationWarning):
        assert not xp.zeros(0)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(xp.zeros(2))


def test_no_floating_point_warnings_also_in_threads() -> None:
    seen: list[Any] = []

    def divide() -> None:
        seen.append([*(xp.ones(2) / 0).tolist(), xp.zeros(0).mean().item()])

    threads = [threading.Thread(target=divide) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    divide()
    assert len(seen) == 4 and all(one[:2] == [math.inf] * 2 and math.isnan(one[2]) for one in seen)
    with pytest.warns(RuntimeWarning):  # and the host's own warnings stay on
        np.ones(2) / np.zeros(2)


def test_memory_is_the_devices_own() -> None:
    host = np.zeros(3)
    x = xp.asarray(host)
    host[0] = 1.0
    back = x.get()
    back[1] = 1.0
    assert x.tolist() == [0.0, 0.0, 0.0]
    assert xp.asarray(x) is x and xp.array(x) is not x


def test_empty_is_not_zeros() -> None:
    assert xp.isnan(xp.empty((2, 2), "float16")).all()
    assert not (xp.empty_like(xp.zeros(3, "int32")) == 0).any()


def test_copies_and_pickles() -> None:
    x = xp.arange(3.0)
    for twin in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        twin += 1
        assert twin.tolist() == [1.0, 2.0, 3.0]
    assert x.tolist() == [0.0, 1.0, 2.0]


def test_an_unknown_type_may_know_better() -> None:
    class Reflecting:
        __array_ufunc__ = None

        def __radd__(self, other: Any) -> str:
            return "reflected"

    assert xp.zeros(2) + Reflecting() == "reflected"
    with pytest.raises(TypeError):
        xp.zeros(2).__iadd__(Reflecting())


def test_has_no_name_that_cupy_lacks() -> None:
    surface = make_surface.load()
    for section, module in (
        ("cupy", xp),
        ("linalg", xp.linalg),
        ("fft", xp.fft),
        ("special", special),
    ):
        known = {
            *surface[f"{section}.ufuncs"],
            *surface[f"{section}.functions"],
            *surface[f"{section}.names"],
        }
        assert {name for name in vars(module) if not name.startswith("__")} <= known
    members = {name for name in dir(ndarray) if name not in dir(object)} - {
        "_host",
        "_key",
        "_twice",
        "_assigned",
    }
    allowed = {
        *surface["methods"],
        *surface["attributes"],
        *surface["operators"],
        "__contains__",
        "__weakref__",
    }
    assert members <= allowed | {"__slots__", "__module__", "__annotations__"}
    assert ndarray.__contains__ is None


def test_most_of_the_surface_is_there() -> None:
    surface = make_surface.load()
    wanted = [*surface["cupy.ufuncs"], *surface["cupy.functions"]]
    missing = [name for name in wanted if hasattr(np, name) and not hasattr(xp, name)]
    assert not missing
    methods = [
        name
        for name in surface["methods"]
        if hasattr(np.ndarray, name) and not hasattr(ndarray, name)
    ]
    assert {*methods} <= {"byteswap", "dump", "dumps", "put", "partition", "tofile"}


def test_surface_is_that_of_the_installed_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    surface = make_surface.load()
    if cupy.__version__ != surface["version"]:
        pytest.skip(f"CuPy {cupy.__version__} is installed, the surface is of {surface['version']}")
    assert make_surface.installed() == surface
