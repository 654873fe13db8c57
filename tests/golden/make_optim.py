"""Makes optim.safetensors: what torch.optim does to three parameters in eight steps.

Run ``python tests/golden/make_optim.py`` with torch installed.  Gradients are given, not computed;
parameter 1 has none in steps 2 and 3.  The metadata hold the cases and the versions used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mini_nn.io import save_file

SHAPES = [(3, 4), (5,), ()]
STEPS = 8
SKIPPED = {"1": [2, 3]}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"class": "SGD", "options": {"lr": 0.1}},
    "sgd_momentum": {"class": "SGD", "options": {"lr": 0.1, "momentum": 0.9}},
    "sgd_dampening": {
        "class": "SGD",
        "options": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
    },
    "sgd_nesterov": {
        "class": "SGD",
        "options": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    },
    "adam": {"class": "Adam", "options": {}},
    "adam_l2": {
        "class": "Adam",
        "options": {"lr": 0.05, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1},
    },
    "adamw": {"class": "AdamW", "options": {"lr": 0.05}},
    "adamw_groups": {
        "class": "AdamW",
        "options": {"lr": 0.02, "weight_decay": 0.3},
        "groups": [
            {"params": [0, 2], "betas": [0.5, 0.9]},
            {"params": [1], "lr": 0.2, "weight_decay": 0.0, "eps": 1e-2},
        ],
    },
}
NORMS = [1.0, 2.0, 3.0, math.inf]


def run(case: dict[str, Any], start: Any, grads: Any, dtype: torch.dtype) -> list[Any]:
    """The values of each parameter after each step."""
    params = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in start]
    options = {**case["options"], "foreach": False}
    groups: Any = params
    if "groups" in case:
        groups = [{**g, "params": [params[i] for i in g["params"]]} for g in case["groups"]]
    optimizer = getattr(torch.optim, case["class"])(groups, **options)
    seen: list[list[Any]] = [[] for _ in params]
    for step in range(STEPS):
        for i, p in enumerate(params):
            skipped = step in SKIPPED.get(str(i), [])
            p.grad = None if skipped else torch.tensor(grads[i][step], dtype=dtype)
        optimizer.step()
        for values, p in zip(seen, params, strict=True):
            values.append(p.detach().numpy().copy())
    return [np.stack(values) for values in seen]


def main() -> None:
    """Write the file beside this script."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in SHAPES]
    grads = [rng.standard_normal((STEPS, *shape)) for shape in SHAPES]
    arrays: dict[str, Any] = {f"start.{i}": x for i, x in enumerate(start)}
    arrays |= {f"grads.{i}": x for i, x in enumerate(grads)}
    for name, case in CASES.items():
        for dtype in ("float32", "float64"):
            for i, values in enumerate(run(case, start, grads, getattr(torch, dtype))):
                arrays[f"{name}.{dtype}.{i}"] = values
    for order in NORMS:
        params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g[0])
        arrays[f"norm.{order}"] = torch.nn.utils.clip_grad_norm_(params, 0.7, order).numpy()
        for i, p in enumerate(params):
            arrays[f"clipped.{order}.{i}"] = p.grad.numpy()
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    about = {"versions": versions, "cases": CASES, "skipped": SKIPPED, "steps": STEPS}
    path = Path(__file__).with_name("optim.safetensors")
    save_file(arrays, path, {"about": json.dumps(about)})


if __name__ == "__main__":
    main()
