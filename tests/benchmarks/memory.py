"""The peak resident memory of a process that does training steps of the small GPT, in MiB."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

from . import gpt_step

STEPS = 3


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """Some steps, then the high-water mark of the whole process, imports included."""
    step = gpt_step.build("gpt_step_small", implementation, threads)

    def measure() -> float:
        for _ in range(STEPS):
            step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)

    return measure
