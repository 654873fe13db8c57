"""Softmax attention in blocks, forward and backward: 2,048 tokens, one head of 64, float32.

``softmax_blocks`` looks at all tokens, ``softmax_blocks_causal`` at earlier ones.  The peer
``dense`` is our own ``ops.scaled_dot_product_attention``, ``torch`` its original; ``memory`` is no
time but a share: what the blocks take at their peak above the inputs, of what the dense one takes.
"""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import milliseconds

N, D = 2048, 64


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One forward and backward pass with gradients of queries, keys and values."""
    rng, causal = np.random.default_rng(0), name.endswith("causal")
    arrays = [rng.standard_normal((1, 1, N, D)).astype(np.float32) for _ in range(3)]
    g = rng.standard_normal((1, 1, N, D)).astype(np.float32)
    if implementation == "torch":
        import torch

        theirs = [torch.from_numpy(a).requires_grad_() for a in arrays]
        tg = torch.from_numpy(g)

        def in_torch() -> None:
            y = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=causal)
            torch.autograd.grad(y, theirs, tg)

        return milliseconds(in_torch, threads)
    import mini_nn
    from mini_nn.attention import blockwise_attention

    leaves = [mini_nn.tensor(a, requires_grad=True) for a in arrays]

    def run(attend: Any) -> None:
        mini_nn.grad(attend(*leaves, is_causal=causal), leaves, g)

    def peak(attend: Any) -> int:
        tracemalloc.start()
        run(attend)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    dense = mini_nn.ops.scaled_dot_product_attention
    if implementation == "memory":
        return lambda: peak(blockwise_attention) / peak(dense)
    attend = dense if implementation == "dense" else blockwise_attention
    return milliseconds(functools.partial(run, attend), threads)
