"""Arrays decide the backend; where there is no array, use and using do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.special

import mini_nn
from mini_nn import Tensor, backend, from_dlpack, ops, tune_allocator
from tests.support import host


class Other(np.ndarray):
    """The arrays of a second library, for tests that need one everywhere."""


@pytest.fixture
def other() -> Iterator[str]:
    """A backend that is registered for one test."""
    loaded = backend._numpy()
    fields = {**vars(loaded), "name": "other", "array_type": Other}
    backend.register("other", lambda: backend.Backend(**fields))
    try:
        yield "other"
    finally:
        backend._loaders.pop("other")
        backend._loaded.pop("other", None)
        backend.array_types.pop(Other, None)


@pytest.fixture
def chosen() -> Iterator[None]:
    """Undo what a test does with ``use``."""
    before = backend._chosen
    try:
        yield
    finally:
        backend._chosen = before


def test_an_array_decides(xp: Any) -> None:
    assert backend.of(xp.ones(2)) is xp
    assert backend.special(xp.ones(2)) is backend.current().special
    for x in (np.ones(2), np.float32(1.0), 1.0, True, [1.0], (2,)):
        assert backend.of(x) is np
        assert backend.special(x) is scipy.special
    with pytest.raises(
        TypeError, match=r"known backend \(.*numpy.*got builtins\.dict.*from_dlpack"
    ):
        backend.of({})


def test_subclasses_belong_to_their_class(other: str) -> None:
    class Matrix(np.ndarray):
        pass

    assert backend.backend_of(np.zeros(2).view(Matrix)).name == "numpy"
    backend.get(other)
    assert backend.backend_of(np.zeros(2).view(Other)).name == "other"


def test_use_and_using(other: str, chosen: None) -> None:
    start = backend.current().name
    with mini_nn.using("numpy") as outer:
        assert outer.name == backend.current().name == "numpy"
        with mini_nn.using(other):
            assert backend.current().name == "other"
        assert backend.current().name == "numpy"
        with pytest.raises(KeyError), mini_nn.using(other):
            raise KeyError
        assert backend.current().name == "numpy"
        mini_nn.use(other)
        assert backend.current().name == "numpy", "the block around it decides"
    assert backend.current().name == "other"
    mini_nn.use(start)
    assert backend.current().name == start


def test_using_holds_for_its_thread_only(other: str) -> None:
    start = backend.current().name
    seen: list[str] = []
    with mini_nn.using(other):
        thread = threading.Thread(target=lambda: seen.append(backend.current().name))
        thread.start()
        thread.join()
        assert backend.current().name == "other"
    assert seen == [start]


def test_creation_goes_to_the_current_backend(xp: Any) -> None:
    for made in (ops.zeros((2,)), Tensor([1.0]), Tensor(3), ops.arange(3), mini_nn.tensor([True])):
        assert type(made.data) is backend.current().array_type


def test_unknown_names() -> None:
    before = backend.current()
    for call in (mini_nn.use, backend.get):
        with pytest.raises(ValueError, match="no backend 'nump': choose one of cupy, numpy"):
            call("nump")
    with pytest.raises(ValueError, match="no backend"), mini_nn.using("nump"):
        pass
    assert backend.current() is before


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_environment_variable_chooses() -> None:
    program = "import mini_nn; print(mini_nn.backend.current().name)"
    assert run(program, MINI_NN_BACKEND="numpy").stdout.strip() == "numpy"
    assert run(program, MINI_NN_BACKEND="").stdout.strip() == "numpy"
    failed = run(program, MINI_NN_BACKEND="wrong")
    assert failed.returncode and "no backend 'wrong'" in failed.stderr


def test_without_cupy_the_message_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "import mini_nn\n"
        "try:\n    mini_nn.use('cupy')\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(mini_nn.backend.current().name)"
    )
    done = run(program)
    message, name = done.stdout.splitlines()
    assert "pip install 'mini-nn[cuda]'" in message
    assert name == "numpy", "a failure changes nothing"


def test_without_a_gpu_the_message_says_so() -> None:
    program = (
        "import sys, types\n"
        "cupy, cupyx, scipy = (types.ModuleType(n) for n in ('cupy', 'cupyx', 'cupyx.scipy'))\n"
        "special = types.ModuleType('cupyx.scipy.special')\n"
        "def zeros(n): raise OSError('no driver')\n"
        "cupy.zeros, cupyx.scipy, scipy.special = zeros, scipy, special\n"
        "for m in (cupy, cupyx, scipy, special): sys.modules[m.__name__] = m\n"
        "import mini_nn\n"
        "try:\n    mini_nn.use('cupy')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert "nvidia-smi" in run(program).stdout and "no driver" in run(program).stdout


def test_importing_needs_no_cupy_and_not_all_of_scipy() -> None:
    program = (
        "import sys, mini_nn\n"
        "print([m for m in ('cupy', 'hypothesis', 'scipy.sparse', 'scipy.signal')"
        " if m in sys.modules])"
    )
    assert run(program).stdout.strip() == "[]"


# in and out


def test_as_array_shares_arrays_and_places_numbers(xp: Any) -> None:
    x = xp.ones(2)
    assert backend.as_array(x) is x and backend.as_array(x, "float64") is x
    assert backend.as_array(x, "float32").dtype == "float32"
    assert backend.as_array([1.0, 2.0]).dtype == "float32"
    assert backend.as_array([1, 2]).dtype == "int64"
    assert backend.as_array(np.float64(1.0)).dtype == "float64"
    with pytest.raises(ValueError, match="inhomogeneous"):
        backend.as_array([[1.0], [1.0, 2.0]])


def test_to_host(xp: Any) -> None:
    x = np.ones(2)
    assert backend.to_host(x) is x
    there = backend.to_host(xp.ones(2))
    assert type(there) is np.ndarray and there.tolist() == [1.0, 1.0]


def test_dlpack_shares_memory_in_both_directions() -> None:
    x = np.zeros(3, "float32")
    t = from_dlpack(x)
    assert isinstance(t, Tensor) and np.shares_memory(t.data, x)
    x[0] = 5.0
    assert host(t)[0] == 5.0
    back = np.from_dlpack(t)
    assert np.shares_memory(back, x) and t.__dlpack_device__() == (1, 0)
    again = from_dlpack(t)
    assert np.shares_memory(again.data, x)
    with pytest.raises(TypeError, match=r"list has no __dlpack__.*torch, CuPy or NumPy"):
        from_dlpack([1.0])


def test_scatter_add_adds_up_duplicates(xp: Any) -> None:
    target = xp.zeros(3)
    index = xp.asarray(np.array([0, 2, 0, -1]))
    backend.scatter_add(target, index, xp.asarray(np.array([1.0, 2.0, 3.0, 4.0])))
    assert host(target).tolist() == [4.0, 0.0, 6.0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("n", [5, 0])
def test_segment_sum(xp: Any, dtype: str, shape: tuple[int, ...], n: int) -> None:
    """By a sparse product where there is one, else by the scatter: both add up rows by number."""
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 9, (n, *shape)).astype(dtype)
    index = rng.integers(0, 4, n)
    out = backend.segment_sum(xp.asarray(values), xp.asarray(index), 4)
    wanted = np.zeros((4, *shape), dtype)
    np.add.at(wanted, index, values)
    assert out.dtype == dtype
    np.testing.assert_array_equal(host(out), wanted)


# the allocator


def test_tune_allocator_says_whether_it_took_effect() -> None:
    """In a process of its own, for it holds as long as the process does."""
    program = (
        "import platform, numpy, mini_nn\n"
        "tuned = mini_nn.tune_allocator()\n"
        "assert type(tuned) is bool\n"
        "assert tuned == (platform.libc_ver()[0] == 'glibc')\n"
        "assert numpy.ones(10**6).sum() == 10**6\n"
        "print(tuned)"
    )
    done = run(program)
    assert done.stdout.strip() in ("True", "False"), done.stderr


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: object())
    assert tune_allocator() is False
