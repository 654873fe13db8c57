"""The stand-in for CUDA under ``tests/cupy_on_cpu``: it counts, refuses and computes as it should.

Only where it is set up (its README says how) and ``--backend cupy`` is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    "FAKECUDA_CC" not in os.environ, reason="needs the environment of tests/cupy_on_cpu"
)


@pytest.fixture
def cupy(backend_name: str) -> Iterator[Any]:
    if backend_name != "cupy":
        pytest.skip("tests the rig of --backend cupy")
    yield pytest.importorskip("cupy")


def _change(run: Any) -> dict[str, int]:
    from tests.cupy_on_cpu import fakecupy

    before = fakecupy.stats()
    run()
    return {name: n - before[name] for name, n in fakecupy.stats().items() if n != before[name]}


def test_it_is_the_wheel_and_no_gpu(cupy: Any) -> None:
    assert cupy.__version__ == "14.2.0"
    assert cupy.cuda.runtime.getDeviceProperties(0)["name"] == b"CPU stand-in"


def test_copies_are_counted_by_direction(cupy: Any) -> None:
    x = np.arange(5.0)
    there = cupy.asarray(x)
    assert _change(lambda: cupy.asarray(x))["h2d"] == 1
    assert _change(there.get)["d2h"] == 1
    assert _change(lambda: float(there[3]))["d2h"] == 1
    target = cupy.empty_like(there)
    assert _change(lambda: target.data.copy_from_device(there.data, 40)) == {"d2d": 1, "sync": 1}
    assert _change(lambda: there + there).keys() <= {"launch", "malloc"}


def test_a_copy_from_the_wrong_side_is_refused(cupy: Any, capfd: Any) -> None:
    there, x = cupy.zeros(4), np.zeros(4)
    runtime, to_host = cupy.cuda.runtime, 2

    def wrong() -> None:
        with pytest.raises(runtime.CUDARuntimeError):
            runtime.memcpy(there.data.ptr, x.ctypes.data, 32, to_host)

    assert _change(wrong) == {"badcopy": 1, "sync": 1}
    assert "from the host to the device" in capfd.readouterr().err


def test_new_memory_holds_no_zeros(cupy: Any) -> None:
    runtime, out, to_host = cupy.cuda.runtime, np.zeros(64, "uint8"), 2
    raw = runtime.malloc(64)
    runtime.memcpy(out.ctypes.data, raw, 64, to_host)
    runtime.free(raw)
    assert (out == 0xCB).all()


def test_a_kernel_that_does_not_compile_says_why(cupy: Any) -> None:
    kernel = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[0] = nonsense; }', "f")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="nonsense"):
        kernel((1,), (1,), (cupy.zeros(1, "float32"),))


REVERSE = """
extern "C" __global__ void reverse(const float* x, float* y) {
  __shared__ float all[256];
  all[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 256 + threadIdx.x] = all[255 - threadIdx.x];
}
"""

WARP_SUM = """
extern "C" __global__ void warp_sum(const float* x, float* y) {
  float v = x[threadIdx.x];
  for (int by = 16; by; by /= 2) v += __shfl_down_sync(0xffffffff, v, by);
  if (threadIdx.x % 32 == 0) y[threadIdx.x / 32] = v;
}
"""


def test_threads_of_a_block_wait_for_one_another(cupy: Any) -> None:
    x = cupy.arange(512, dtype="float32")
    y = cupy.empty_like(x)
    cupy.RawKernel(REVERSE, "reverse")((2,), (256,), (x, y))
    np.testing.assert_array_equal(y.get().reshape(2, 256), x.get().reshape(2, 256)[:, ::-1])


def test_threads_of_a_warp_exchange_values(cupy: Any) -> None:
    x = cupy.arange(96, dtype="float32")
    y = cupy.empty(3, "float32")
    cupy.RawKernel(WARP_SUM, "warp_sum")((1,), (96,), (x, y))
    np.testing.assert_array_equal(y.get(), x.get().reshape(3, 32).sum(axis=1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_reductions_scatter_and_products_are_numpys(cupy: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-3, 4, shape).astype(dtype) for shape in ((5, 700), (700, 3)))
    np.testing.assert_array_equal(cupy.asarray(x).max(axis=1).get(), x.max(axis=1))
    np.testing.assert_array_equal((cupy.asarray(x) @ cupy.asarray(y)).get(), x @ y)
    index = rng.integers(0, 5, 9)
    sums, wanted = cupy.zeros((5, 3), dtype), np.zeros((5, 3), dtype)
    cupy.add.at(sums, cupy.asarray(index), cupy.asarray(y[:9]))
    np.add.at(wanted, index, y[:9])
    np.testing.assert_array_equal(sums.get(), wanted)


def test_what_numpy_answers_keeps_cupys_manners(cupy: Any) -> None:
    x = np.random.default_rng(0).normal(size=(4, 4))
    there = cupy.asarray(x)
    q, r = cupy.linalg.qr(there)
    assert type(q) is type(r) is cupy.ndarray
    np.testing.assert_allclose((q @ r).get(), x, atol=1e-12)
    np.testing.assert_array_equal(cupy.argsort(there, axis=0).get(), x.argsort(axis=0))
    with pytest.raises(TypeError, match="array of NumPy"):
        cupy.linalg.qr(x)
    with pytest.raises(TypeError):
        cupy.linalg.qr(there, nonsense=1)
