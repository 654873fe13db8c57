"""The workloads: what is measured, against whom, and the module that builds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

ALL = ("torch", "autograd", "mygrad")

PACKAGES = {"grid_sample": "torch", "sdpa": "torch"}
"""What has to be installed for a peer that is not called like a package."""

OURS = ("cached_decode", "dense", "recurrent")
"""Peers that are other ways to do it with our own code."""

FIGURES = {"overhead": "share", "exponent": "slope", "memory": "share"}
"""Peers that are none, with the unit of the figure that stands where the ratio does."""

ON_TORCH = ("torch", "torchvision", "grid_sample", "sdpa")
"""Peers whose threads are torch's."""


@dataclass(frozen=True)
class Workload:
    """One thing to measure; ``module.build(name, implementation, threads)`` gives the meter."""

    name: str
    module: str
    peers: tuple[str, ...]
    unit: str = "ms"
    rounds: int = 15
    warmup: int = 2
    threads: tuple[int, ...] = (1, 2)


def milliseconds(work: Callable[[], object], threads: int, repeat: int = 1) -> Callable[[], float]:
    """Measure ``repeat`` runs: CPU time of this process on one thread, else wall time; per run."""
    clock = time.process_time if threads == 1 else time.perf_counter

    def measure() -> float:
        start = clock()
        for _ in range(repeat):
            work()
        return (clock() - start) / repeat * 1e3

    return measure


PRIMITIVES = ("exp", "tanh", "erf", "gelu", "softmax", "layer_norm")

_LIST = [
    Workload("gpt_step_small", "gpt_step", ALL),
    Workload("gpt_step_nano", "gpt_step", ("torch",), rounds=9),
    Workload("decode_small", "decode", ("torch",), rounds=9),
    Workload("decode_nano", "decode", ("torch",), rounds=7),
    Workload("conv2d", "convolution", ("torch",), rounds=25),
    Workload("conv2d_depthwise", "convolution", ("torch",), rounds=25),
    Workload("deform_conv2d", "deform_conv", ("torchvision", "grid_sample"), rounds=15),
    Workload("deformable_attention", "deformable_attention", ("grid_sample",), rounds=9),
    Workload("speculative", "speculative", ("cached_decode", "overhead"), rounds=9),
    Workload("linear_attention", "linear_attention", ("torch", "sdpa", "exponent"), rounds=9),
    *(
        Workload(name, "softmax_blocks", ("dense", "torch", "memory"))
        for name in ("softmax_blocks", "softmax_blocks_causal")
    ),
    *(
        Workload(name, "recurrences", ("recurrent",), rounds=7)
        for name in ("delta_rule", "gated_linear_attention")
    ),
    Workload("primitives", "primitives", ("torch",), rounds=9),
    *(Workload(f"primitives.{p}", "primitives", ("torch",), rounds=9) for p in PRIMITIVES),
    Workload("op_overhead", "overhead", ALL, unit="us", rounds=25, threads=(1,)),
    Workload("peak_memory", "memory", ALL, unit="MiB", rounds=1, warmup=0, threads=(1,)),
    Workload("import_time", "imports", ("scipy",), rounds=11, threads=(1,)),
]

WORKLOADS = {workload.name: workload for workload in _LIST}
