"""Causal linear attention with elu + 1, forward and backward: one head, d = 64, n = 4096, float32.

The peer ``torch`` is the same chunks in PyTorch, ``sdpa`` its softmax attention.  ``exponent`` is
the slope of log time over log n from 1024 to 8192 tokens: 1 says that time grows as n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import milliseconds

D, N, CHUNK = 64, 4096, 64
LENGTHS = (1024, 2048, 4096, 8192)


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """Milliseconds of one forward and backward pass, or the exponent."""
    if implementation == "exponent":
        meters = [milliseconds(_ours(n), threads, repeat=8192 // n) for n in LENGTHS]
        return lambda: _slope([min(meter() for _ in range(3)) for meter in meters])
    work = {"torch": _torch, "sdpa": _torch}.get(implementation, _ours)
    return milliseconds(work(N) if work is _ours else work(N, implementation), threads, repeat=3)


def _slope(times: list[float]) -> float:
    """Of the straight line that fits log time over log n best."""
    x = np.log(LENGTHS)
    return float(np.polyfit(x, [math.log(t) for t in times], 1)[0])


def _data(n: int) -> list[Any]:
    """Query, key, value and the gradient of the result."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, D)).astype(np.float32) for _ in range(4)]


def _ours(n: int) -> Callable[[], object]:
    import mini_nn
    from mini_nn.attention import linear_attention

    *inputs, g = _data(n)
    leaves = [mini_nn.tensor(x, requires_grad=True) for x in inputs]

    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        linear_attention(*leaves, is_causal=True).backward(g)

    return work


def _torch(n: int, implementation: str) -> Callable[[], object]:
    import torch
    import torch.nn.functional as F

    *inputs, g = [torch.from_numpy(x) for x in _data(n)]
    leaves = [x.requires_grad_() for x in inputs]

    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        if implementation == "torch":
            in_torch(*leaves).backward(g)
        else:
            batch = [leaf[None, None] for leaf in leaves]
            F.scaled_dot_product_attention(*batch, is_causal=True)[0, 0].backward(g)

    return work


def in_torch(query: Any, key: Any, value: Any) -> Any:
    """What ``linear_attention`` computes: chunks, and the sums of all chunks before each."""
    import torch
    import torch.nn.functional as F

    ones = torch.ones(*value.shape[:-1], 1)
    q, k, v = (
        x.reshape(-1, CHUNK, x.shape[-1])
        for x in (F.elu(query) + 1, F.elu(key) + 1, torch.cat([value, ones], -1))
    )
    added = k.mT @ v
    states = F.pad(added.cumsum(0)[:-1], (0, 0, 0, 0, 1, 0))
    sums = torch.tril(q @ k.mT) @ v + q @ states
    return (sums[..., :-1] / sums[..., -1:]).reshape(value.shape)
