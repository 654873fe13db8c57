"""What one recorded operation on four numbers costs, forward and backward, in microseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .workloads import milliseconds

LENGTH = 600


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """A chain of products x ← x w, summed and differentiated for x and w."""
    work = {"mini_nn": _ours, "torch": _torch, "autograd": _autograd, "mygrad": _mygrad}
    measure = milliseconds(work[implementation](), threads)
    return lambda: measure() / LENGTH * 1e3


def _chain(x: Any, w: Any) -> Any:
    for _ in range(LENGTH):
        x = x * w
    return x.sum()


def _ours() -> Callable[[], object]:
    import mini_nn

    x = mini_nn.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    w = mini_nn.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    return lambda: _chain(x, w).backward()


def _torch() -> Callable[[], object]:
    import torch

    x = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    w = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    return lambda: _chain(x, w).backward()


def _autograd() -> Callable[[], object]:
    import autograd
    import autograd.numpy as anp
    import numpy as np

    x, w = np.array([1.0, 2.0, 3.0, 4.0], np.float32), np.ones(4, np.float32)

    def chain(x: Any, w: Any) -> Any:
        for _ in range(LENGTH):
            x = x * w
        return anp.sum(x)

    slope = autograd.grad(chain, (0, 1))
    return lambda: slope(x, w)


def _mygrad() -> Callable[[], object]:
    import mygrad
    import numpy as np

    x = mygrad.tensor(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    w = mygrad.tensor(np.ones(4, np.float32))
    return lambda: _chain(x, w).backward()
