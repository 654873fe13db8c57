"""What torch and torchvision answered: the contents of golden/vision_deform.safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mini_nn import Tensor, grad
from tests.support import assert_close

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "vision_deform.safetensors", framework="np"
) as _file:
    ARRAYS = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    OPTIONS = json.loads(_file.metadata()["options"])
for _array in ARRAYS.values():
    _array.flags.writeable = False


def part(prefix: str) -> dict[str, Any]:
    """The arrays whose names start so, by the rest of their names."""
    return {k.removeprefix(prefix): a for k, a in ARRAYS.items() if k.startswith(prefix)}


def wave(shape: tuple[int, ...]) -> Any:
    """The cotangent of make_vision_deform.py."""
    return np.cos(0.7 * np.arange(math.prod(shape)) + 0.3).reshape(shape)


def answers_alike(f: Any, inputs: dict[str, Any], prefix: str, xp: Any, rtol: float) -> None:
    """f(**inputs) and its gradients are the golden ones of this prefix."""
    leaves = {k: Tensor(xp.asarray(x), requires_grad=True) for k, x in inputs.items()}
    out = f(**leaves)
    assert_close(out, ARRAYS[f"{prefix}out"], rtol=rtol, atol=rtol)
    cotangent = xp.asarray(wave(out.shape))
    found = grad(out, [*leaves.values()], cotangent, allow_unused=True)
    for name, g in zip(leaves, found, strict=True):
        want = ARRAYS[f"{prefix}grad.{name}"]
        assert_close(np.zeros_like(want) if g is None else g, want, rtol=rtol, atol=rtol)
