"""A 3×3 convolution with padding 1, forward and backward: N 8, 32 → 64 channels or 64 depthwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .workloads import milliseconds


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One forward and backward pass with gradients of input, weight and bias."""
    depthwise = name == "conv2d_depthwise"
    channels, groups, per_group = (64, 64, 1) if depthwise else (32, 1, 32)
    rng = np.random.default_rng(0)
    x, w, b, g = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((8, channels, 32, 32), (64, per_group, 3, 3), (64,), (8, 64, 32, 32))
    )
    if implementation == "torch":
        import torch
        import torch.nn.functional as F

        tx, tw, tb = (torch.from_numpy(a).requires_grad_() for a in (x, w, b))
        tg = torch.from_numpy(g)

        def theirs() -> None:
            tx.grad = tw.grad = tb.grad = None
            F.conv2d(tx, tw, tb, padding=1, groups=groups).backward(tg)

        return milliseconds(theirs, threads)
    import mini_nn
    from mini_nn import ops

    mx, mw, mb = (mini_nn.tensor(a, requires_grad=True) for a in (x, w, b))

    def ours() -> None:
        mx.grad = mw.grad = mb.grad = None
        ops.conv2d(mx, mw, mb, padding=1, groups=groups).backward(g)

    return milliseconds(ours, threads)
