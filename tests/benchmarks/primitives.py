"""Elementwise and row functions of a float32 array (2048, 512), forward without a tape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import PRIMITIVES, milliseconds

SHAPE = (2048, 512)


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One function, or for ``primitives`` the geometric mean of all of them."""
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    functions = _ours(x) if implementation == "mini_nn" else _torch(x)
    _, _, wanted = name.partition(".")
    chosen = [wanted] if wanted else PRIMITIVES
    measures = [milliseconds(functions[p], threads, repeat=10) for p in chosen]
    return lambda: math.exp(sum(math.log(measure()) for measure in measures) / len(measures))


def _ours(x: np.ndarray) -> dict[str, Callable[[], Any]]:
    import mini_nn
    from mini_nn import ops

    t = mini_nn.Tensor(x)
    weight, bias = (mini_nn.Tensor(np.ones(SHAPE[1], np.float32)) for _ in range(2))
    return {
        "exp": lambda: ops.exp(t),
        "tanh": lambda: ops.tanh(t),
        "erf": lambda: ops.erf(t),
        "gelu": lambda: ops.gelu(t, "tanh"),
        "softmax": lambda: ops.softmax(t),
        "layer_norm": lambda: ops.layer_norm(t, weight, bias),
    }


def _torch(x: np.ndarray) -> dict[str, Callable[[], Any]]:
    import torch
    import torch.nn.functional as F

    t = torch.from_numpy(x)
    weight, bias = torch.ones(SHAPE[1]), torch.ones(SHAPE[1])
    return {
        "exp": lambda: torch.exp(t),
        "tanh": lambda: torch.tanh(t),
        "erf": lambda: torch.erf(t),
        "gelu": lambda: F.gelu(t, approximate="tanh"),
        "softmax": lambda: torch.softmax(t, -1),
        "layer_norm": lambda: F.layer_norm(t, SHAPE[1:], weight, bias),
    }
