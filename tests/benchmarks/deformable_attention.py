"""Multi-scale deformable attention, forward and backward: N 2, four maps, 8 heads of 32, 4 points.

The peer ``grid_sample`` is the form of it in PyTorch that the authors give for CPUs: a grid_sample
for each level, its results weighted and summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .workloads import milliseconds

SHAPES = [(32, 32), (16, 16), (8, 8), (4, 4)]
N, HEADS, CHANNELS, POINTS = 2, 8, 32, 4


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """One forward and backward pass with gradients of values, locations and weights."""
    rng, pixels = np.random.default_rng(0), sum(h * w for h, w in SHAPES)
    points = (N, pixels, HEADS, len(SHAPES), POINTS)
    value = rng.standard_normal((N, pixels, HEADS, CHANNELS)).astype(np.float32)
    at = rng.random((*points, 2)).astype(np.float32)
    weights = (rng.random(points) / (len(SHAPES) * POINTS)).astype(np.float32)
    g = rng.standard_normal((N, pixels, HEADS * CHANNELS)).astype(np.float32)
    if implementation == "grid_sample":
        import torch

        leaves = [torch.from_numpy(a).requires_grad_() for a in (value, at, weights)]
        tg = torch.from_numpy(g)

        def theirs() -> None:
            for leaf in leaves:
                leaf.grad = None
            in_torch(*leaves).backward(tg)

        return milliseconds(theirs, threads)
    import mini_nn
    from mini_nn.vision.deformable_attention import ms_deform_attn

    v, p, a = (mini_nn.tensor(x, requires_grad=True) for x in (value, at, weights))

    def ours() -> None:
        v.grad = p.grad = a.grad = None
        ms_deform_attn(v, SHAPES, p, a).backward(g)

    return milliseconds(ours, threads)


def in_torch(value: Any, at: Any, weights: Any) -> Any:
    """What ``ms_deform_attn`` computes, by torch's grid_sample level by level."""
    import torch
    import torch.nn.functional as F

    n, pixels, heads, channels = value.shape
    queries, points = at.shape[1], at.shape[4]
    images = value.permute(0, 2, 3, 1).reshape(n * heads, channels, pixels)
    grid = (2 * at - 1).permute(3, 0, 2, 1, 4, 5).reshape(-1, n * heads, queries, points, 2)
    sampled = [
        F.grid_sample(part.reshape(n * heads, channels, *shape), g, align_corners=False)
        for part, shape, g in zip(
            images.split([h * w for h, w in SHAPES], dim=2), SHAPES, grid, strict=True
        )
    ]
    a = weights.permute(0, 2, 1, 3, 4).reshape(n * heads, 1, queries, -1)
    y = (torch.cat(sampled, dim=-1) * a).sum(-1)
    return y.reshape(n, heads * channels, queries).transpose(1, 2)
