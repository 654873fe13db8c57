"""What ``import mini_nn`` takes, beside NumPy and SciPy's special functions alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

CODE = {"mini_nn": "import mini_nn", "scipy": "import numpy, scipy.special"}


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """The wall time, in milliseconds, of a fresh interpreter that imports it, compiled before."""

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", CODE[implementation]], check=True, env=environment)
        return (time.perf_counter() - start) * 1e3

    return measure
