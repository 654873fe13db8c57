"""Makes vision_roi.safetensors: what torchvision answers to the RoI operators, in float64.

``python -m tests.golden.make_vision_roi`` (needs torch and torchvision) rewrites the file beside
this script.  ``input`` is (2, 12, 7, 8), ``boxes`` (k, 5).  The metadata's ``calls`` are rows of
(function, arguments after the boxes); row i has ``i.out`` and ``i.grad``, the gradient of
Σ cos(0.7 j + 0.3) outⱼ with respect to the input.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

BOXES = [
    [0, 1.0, 2.0, 6.0, 5.0],
    [1, 0.0, 0.0, 8.0, 7.0],
    [1, 2.3, 1.1, 5.8, 6.4],
    [0, -3.2, -2.6, 4.1, 3.3],
    [1, 5.7, 4.2, 12.9, 10.4],
    [0, 4.2, 3.1, 4.6, 3.3],
    [0, 5.0, 5.0, 5.0, 5.0],
    [1, 2.5, 0.5, 6.5, 4.5],
    [0, -9.0, 1.0, -4.0, 6.0],
    [1, 20.0, 20.0, 30.0, 25.0],
    [0, 0.5, -1.5, 6.5, 5.5],
]
"""Inside, everything, fractions, over each edge, tiny, empty, halves, all outside."""


def calls() -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for size, scale in (([2, 3], 1.0), ([3, 2], 0.5)):
        shared = {"output_size": size, "spatial_scale": scale}
        rows += [("roi_pool", shared), ("ps_roi_pool", shared)]
        for ratio, aligned in itertools.product((-1, 2), (False, True)):
            rows.append(("roi_align", {**shared, "sampling_ratio": ratio, "aligned": aligned}))
        rows += [("ps_roi_align", {**shared, "sampling_ratio": ratio}) for ratio in (-1, 2)]
    rows.append(("roi_align", {"output_size": 1, "sampling_ratio": 3}))
    return rows


def main() -> None:
    import safetensors.numpy
    import torch
    import torchvision

    rng = np.random.default_rng(12)
    x = np.round(rng.standard_normal((2, 12, 7, 8)), 3)
    boxes = np.array(BOXES)
    stored = {"input": x, "boxes": boxes}
    for i, (name, options) in enumerate(calls()):
        leaf = torch.from_numpy(x).requires_grad_()
        y = getattr(torchvision.ops, name)(leaf, torch.from_numpy(boxes), **options)
        wave = torch.cos(0.7 * torch.arange(y.numel(), dtype=torch.float64) + 0.3)
        # a box without samples is 0 / 0 in one of them, and so would be its gradient
        (torch.nan_to_num(y).reshape(-1) * wave).sum().backward()
        stored |= {f"{i}.out": y.detach().numpy(), f"{i}.grad": leaf.grad.numpy()}
    metadata = {
        "calls": json.dumps(calls()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    stored = {name: np.ascontiguousarray(a) for name, a in stored.items()}
    safetensors.numpy.save_file(
        stored, Path(__file__).with_name("vision_roi.safetensors"), metadata
    )


if __name__ == "__main__":
    main()
