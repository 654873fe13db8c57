"""What every test shares: the backend under test, Hypothesis profiles, one BLAS thread a process.

``pytest --backend NAME`` runs the same bodies on another array library; ``strict`` is the stand-in
for a device in ``tests/device``.  ``HYPOTHESIS_PROFILE`` chooses how hard the theorems are tried:
``dev`` (the default), ``ci`` (the default where ``CI`` is set), ``deep``, or ``rig`` for CuPy on a
CPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The workers of xdist inherit these before they import NumPy: there are as many workers as cores,
# so threads inside each of them would only wait for one another.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ["MINI_NN_CHECK_SHAPES"] = "1"

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
# each new combination of dtypes and shapes is a kernel for g++ to compile: tests/cupy_on_cpu
settings.register_profile("rig", max_examples=5, derandomize=True, database=None, **_COMMON)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", default="numpy", help="the array library to test on: numpy, cupy or strict"
    )


@pytest.fixture(scope="session", autouse=True)
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name of the backend under test, which is made the current one for the whole session."""
    from mini_nn import backend

    name: str = request.config.getoption("--backend")
    if name == "strict":
        from tests import device

        device.register()
    if name == "cupy" and "FAKECUDA_CC" in os.environ:
        from tests.cupy_on_cpu import fakecupy

        fakecupy.install()
    backend.use(name)
    return name


@pytest.fixture(scope="session")
def xp(backend_name: str) -> Any:
    """The namespace of the backend under test; of session scope, so Hypothesis may share it."""
    from mini_nn import backend

    return backend.get(backend_name).xp
