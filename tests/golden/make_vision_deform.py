"""Makes vision_deform.safetensors: what torchvision and torch answer, in float64.

``python -m tests.golden.make_vision_deform`` (needs torch and torchvision) rewrites the file beside
this script.  A case of deform_conv2d is a prefix ``deform.K.`` with ``in.NAME``, ``out`` and
``grad.NAME``, its options in the metadata; one of grid_sample is ``grid.MODE.PADDING.CORNERS.``
with ``out``, ``grad.input`` and ``grad.grid`` for the shared ``grid.input`` and ``grid.grid``; one
of affine_grid is ``affine.CORNERS``.  Gradients are those of Σ cos(0.7 i + 0.3) outᵢ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# input, out channels, kernel, groups, offset groups, mask, options
CASES: list[Any] = [
    ((2, 4, 5, 6), 3, (3, 3), 1, 1, True, {"padding": 1}),
    ((2, 4, 5, 6), 3, (3, 3), 1, 1, False, {"padding": 1}),
    ((1, 4, 7, 6), 6, (3, 2), 2, 2, True, {"stride": (2, 1), "padding": (1, 2)}),
    ((2, 6, 7, 8), 4, (2, 3), 2, 3, True, {"dilation": (1, 2), "padding": 1}),
    ((1, 8, 4, 4), 8, (1, 1), 4, 2, False, {"stride": 2}),
    ((2, 2, 9, 9), 2, (3, 3), 1, 1, True, {"dilation": 3, "padding": 3, "stride": 2}),
]
MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")

_rng = np.random.default_rng(5)


def normal(*shape: int, scale: float = 1.0) -> Any:
    return np.round(scale * _rng.standard_normal(shape), 3)


def wave(shape: tuple[int, ...]) -> Any:
    return np.cos(0.7 * np.arange(int(np.prod(shape))) + 0.3).reshape(shape)


def answer(f: Any, inputs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The result of f(**inputs) and its gradients."""
    import torch

    leaves = {k: torch.tensor(x, requires_grad=True) for k, x in inputs.items()}
    out = f(**leaves)
    (out * torch.tensor(wave(tuple(out.shape)))).sum().backward()
    found = {f"{prefix}out": out.detach().numpy()}
    return found | {f"{prefix}grad.{k}": leaf.grad.numpy() for k, leaf in leaves.items()}


def main() -> None:
    import torch
    import torchvision
    from safetensors.numpy import save_file
    from torch.nn import functional as F

    arrays: dict[str, Any] = {}
    for k, (shape, out, kernel, groups, parts, masked, options) in enumerate(CASES):
        places = kernel[0] * kernel[1]
        weight = normal(out, shape[1] // groups, *kernel)
        plain = F.conv2d(torch.tensor(normal(*shape)), torch.tensor(weight), None,
                         groups=groups, **options)  # fmt: skip
        size = tuple(plain.shape[2:])
        inputs = {
            "input": normal(*shape),
            "offset": normal(shape[0], 2 * parts * places, *size, scale=1.5),
            "weight": weight,
            "bias": normal(out),
        }
        if masked:
            inputs["mask"] = np.round(_rng.uniform(size=(shape[0], parts * places, *size)), 3)
        arrays |= {f"deform.{k}.in.{name}": x for name, x in inputs.items()}
        arrays |= answer(
            lambda options=options, **leaves: torchvision.ops.deform_conv2d(**leaves, **options),
            inputs,
            f"deform.{k}.",
        )
    inputs = {
        "input": normal(2, 2, 4, 5),
        "grid": np.round(_rng.uniform(-2.5, 2.5, (2, 5, 6, 2)), 3),
    }
    arrays |= {f"grid.{name}": x for name, x in inputs.items()}
    theta = normal(2, 2, 3)
    arrays["affine.theta"] = theta
    for corners in (False, True):
        for mode in MODES:
            for padding in PADDINGS:
                arrays |= answer(
                    lambda input, grid, mode=mode, padding=padding, corners=corners: F.grid_sample(
                        input, grid, mode, padding, corners
                    ),
                    inputs,
                    f"grid.{mode}.{padding}.{corners}.",
                )
        arrays[f"affine.{corners}"] = F.affine_grid(
            torch.tensor(theta), [2, 1, 3, 4], align_corners=corners
        ).numpy()
    metadata = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "options": json.dumps([case[-1] for case in CASES]),
    }
    path = Path(__file__).with_name("vision_deform.safetensors")
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
