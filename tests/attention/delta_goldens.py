"""What flash-linear-attention answered: golden/attention_delta.safetensors, see its maker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

ARRAYS = safetensors.numpy.load_file(
    Path(__file__).parents[1] / "golden" / "attention_delta.safetensors"
)


def heads_first(name: str) -> Any:
    """(b, n, h, …) as (b, h, n, …), in float64, so that what differs is the golden's rounding."""
    return np.ascontiguousarray(ARRAYS[name].swapaxes(1, 2)).astype("float64")


def inputs(xp: Any) -> dict[str, Any]:
    """The arrays, with the scale 1/√d that the reference gives its queries as ``scaled``."""
    names = ("q", "k", "v", "p", "w", "beta", "g")
    arrays = {name: xp.asarray(heads_first(name)) for name in names}
    for name in ("state", "lamb"):
        arrays[name] = xp.asarray(ARRAYS[name].astype("float64"))
    return {**arrays, "scaled": arrays["q"] * arrays["q"].shape[-1] ** -0.5}
