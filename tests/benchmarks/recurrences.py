"""Recurrences in chunks, forward and backward, beside the same token by token.

Four heads of 32 over 512 tokens, float32: the gated delta rule, and gated linear attention with a
decay for each channel.  The peer ``recurrent`` is our own definition in plain primitives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import milliseconds

HEADS, N, D = 4, 512, 32


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One pass with the gradients of queries, keys, values and decays."""
    import mini_nn
    from mini_nn import attention

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, HEADS, N, D)).astype(np.float32) for _ in range(4)]
    arrays[1] /= np.linalg.norm(arrays[1], axis=-1, keepdims=True)
    *inputs, g = arrays
    rates = rng.uniform(0.01, 0.3, (1, HEADS, N, D)).astype(np.float32)
    twin = implementation == "recurrent"
    attend: Callable[..., Any]
    if name == "delta_rule":
        beta = mini_nn.tensor(rates[..., 0] * 3)
        decays = -rates[..., 1]
        rule = attention.gated_delta_rule_recurrent if twin else attention.gated_delta_rule

        def attend(query: Any, key: Any, value: Any, decay: Any) -> Any:
            return rule(query, key, value, beta, decay, is_causal=True)
    elif twin:
        decays = -rates

        def attend(*leaves: Any) -> Any:
            return attention.recurrent_gated(*leaves)[0]
    else:
        decays, attend = -rates, attention.gated_linear_attention
    leaves = [mini_nn.tensor(x, requires_grad=True) for x in (*inputs, decays)]

    def run() -> None:
        mini_nn.grad(attend(*leaves), leaves, g)

    return milliseconds(run, threads)
