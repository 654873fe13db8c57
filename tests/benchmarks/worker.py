"""One implementation of one workload in a process of its own; driven by ``__main__``."""

from __future__ import annotations

import importlib
import sys

from .workloads import FIGURES, ON_TORCH, OURS, WORKLOADS


def main() -> None:
    """Build the workload, say so, then answer each line with the figure of one unit of work."""
    name, implementation, threads = sys.argv[1:]
    workload = WORKLOADS[name]
    if implementation in ON_TORCH:
        import torch

        torch.set_num_threads(int(threads))
    elif implementation in ("mini_nn", *OURS, *FIGURES):
        import mini_nn

        mini_nn.tune_allocator()
    module = importlib.import_module(f".{workload.module}", __package__)
    measure = module.build(name, implementation, int(threads))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measure(), flush=True)


if __name__ == "__main__":
    main()
