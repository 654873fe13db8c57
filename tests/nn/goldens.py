"""What torch answered: the contents of golden/nn.safetensors, whose maker describes them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mini_nn import nn
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "nn.safetensors", framework="np"
) as _file:
    ARRAYS = {name: _file.get_tensor(name) for name in [*_file.keys()]}
    CALLS, LAYERS, SIGNATURES = (
        json.loads(_file.metadata()[part]) for part in ("calls", "layers", "signatures")
    )
for _array in ARRAYS.values():
    _array.flags.writeable = False  # a call that changes its argument needs a copy


def part(prefix: str) -> dict[str, Any]:
    """The arrays whose names start so, by the rest of their names."""
    return {k.removeprefix(prefix): a for k, a in ARRAYS.items() if k.startswith(prefix)}


def wave(shape: tuple[int, ...]) -> Any:
    """The cotangent of make_nn.py."""
    return np.cos(0.7 * np.arange(int(np.prod(shape))) + 0.3).reshape(shape)


def close(actual: Any, desired: Any, rtol: float) -> None:
    """Within ``rtol``; of the largest number, for those that are differences of larger ones."""
    scale = np.abs(desired[np.isfinite(desired)]).max(initial=1.0)
    assert_close(host(actual).astype("float64"), desired, rtol=rtol, atol=0.1 * rtol * scale)


def layer_answers_as_torch(i: int, xp: Any) -> None:
    """State names, layouts, outputs in training and evaluation, running statistics."""
    name, args, options, names = LAYERS[i]
    layer = getattr(nn, name)(*args, **options).astype("float64")
    before, after = part(f"layer.{i}.before."), part(f"layer.{i}.after.")
    assert [*layer.state_dict()] == names
    layer.load_state_dict(before)
    for mode in ("train", "eval"):
        layer.train(mode == "train")
        for k, x in part(f"layer.{i}.x.").items():
            close(layer(xp.asarray(x)), ARRAYS[f"layer.{i}.{mode}.{k}"], 1e-11)
    for name, array in (before | after).items():
        close(layer.state_dict()[name], array, 1e-11)


def has_torchs_signature(ours: Any, name: str) -> None:
    """Our arguments are among torch's, in torch's order, with torch's defaults; ours adds ``rng``.

    ``dim`` is required where torch only warns that it is missing.
    """
    torchs = dict(SIGNATURES[name])
    mine = inspect.signature(ours).parameters
    names = [n for n in mine if n != "rng"]
    assert names == [n for n in torchs if n in names]
    for n in names:
        default = "required" if mine[n].default is inspect.Parameter.empty else mine[n].default
        assert default == torchs[n] or (n, default) == ("dim", "required"), n
    left_out = {n for n, default in torchs.items() if n not in names and default == "required"}
    assert not left_out
