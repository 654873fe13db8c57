"""Modulated deformable convolution 3 × 3, forward and backward: 4 images 32 × 32, 32 → 32 channels.

The peers are torchvision's operator and the same function in PyTorch around grid_sample, which
torchvision's path for CPUs falls far behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import milliseconds

N, CHANNELS, SIDE, PLACES = 4, 32, 32, 9


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One forward and backward pass with the gradients of all five arguments."""
    rng = np.random.default_rng(0)
    arrays = {
        "input": rng.standard_normal((N, CHANNELS, SIDE, SIDE)),
        "offset": rng.standard_normal((N, 2 * PLACES, SIDE, SIDE)),
        "weight": rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 17.0,
        "bias": rng.standard_normal(CHANNELS),
        "mask": rng.random((N, PLACES, SIDE, SIDE)),
    }
    arrays = {k: a.astype(np.float32) for k, a in arrays.items()}
    g = rng.standard_normal((N, CHANNELS, SIDE, SIDE)).astype(np.float32)
    if implementation == "mini_nn":
        import mini_nn
        from mini_nn.vision import deform_conv2d

        leaves: Any = {k: mini_nn.tensor(a, requires_grad=True) for k, a in arrays.items()}
        cotangent: Any = g
        f: Any = deform_conv2d
    else:
        import torch

        leaves = {k: torch.from_numpy(a).requires_grad_() for k, a in arrays.items()}
        cotangent = torch.from_numpy(g)
        f = by_grid_sample
        if implementation == "torchvision":
            from torchvision.ops import deform_conv2d as f

    def work() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        f(**leaves, padding=1).backward(cotangent)

    return milliseconds(work, threads)


def by_grid_sample(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, padding: int) -> Any:
    """The same in torch: all places of the kernel are sampled at once, then weighed."""
    import torch
    import torch.nn.functional as F

    n, c, h, w = input.shape
    out, _, kh, kw = weight.shape
    rows, columns = torch.arange(h) - padding, torch.arange(w) - padding
    y = rows[:, None] + torch.arange(kh)[:, None, None, None]
    x = columns + torch.arange(kw)[:, None, None]
    base = torch.stack([y.expand(kh, kw, h, w), x.expand(kh, kw, h, w)], -1)
    moved = offset.reshape(n, kh, kw, 2, h, w).permute(0, 1, 2, 4, 5, 3)
    places = (base + moved + 0.5) * torch.tensor([2.0 / h, 2.0 / w]) - 1.0
    grid = places.flip(-1).reshape(n, kh * kw * h, w, 2)
    sampled = F.grid_sample(input, grid, align_corners=False).reshape(n, c, kh * kw, h, w)
    weighed = sampled * mask[:, None]
    y = torch.einsum("nckhw,ock->nohw", weighed, weight.reshape(out, c, kh * kw))
    return y + bias[:, None, None]
