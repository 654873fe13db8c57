"""Makes norm.safetensors: what torch answers about norms of weights, float16 and alpha-dropout.

``python tests/golden/make_norm.py`` (needs torch) rewrites the file beside this script.

    weight_norm.{v, g, h}  a weight and lengths for its first and its second axis
    weight_norm.dim{0, 1}  g v / ‖v‖ and h v / ‖v‖
    half.{x, weight, …}    float16 with rows beyond 256, whose squares are not float16
    half.NAME              four norms of it, eps = 1e-5
    alpha_dropout.P        for p = P the two numbers that 1 can become, kept first
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

PROBABILITIES = (0.05, 0.3, 0.5, 0.9)


def weight_norms() -> dict[str, Any]:
    v, g = torch.randn(4, 3, 2, 2), torch.rand(4, 1, 1, 1) + 0.5
    h = torch.rand(1, 3, 1, 1) + 0.5
    return {
        "v": v, "g": g, "h": h,
        "dim0": torch._weight_norm(v, g, 0),
        "dim1": torch._weight_norm(v.transpose(0, 1), h.transpose(0, 1), 0).transpose(0, 1),
    }  # fmt: skip


def halves() -> dict[str, Any]:
    x = (torch.randn(3, 4, 5) * torch.tensor([1.0, 400.0, 9000.0])[:, None, None]).half()
    weight, bias = torch.randn(5).half(), torch.randn(5).half()
    one, other = torch.randn(4).half(), torch.randn(4).half()
    return {
        "x": x, "weight": weight, "bias": bias, "channel_weight": one, "channel_bias": other,
        "layer_norm": F.layer_norm(x, (5,), weight, bias, 1e-5),
        "rms_norm": F.rms_norm(x, (5,), weight, 1e-5),
        "group_norm": F.group_norm(x, 2, one, other, 1e-5),
        "batch_norm": F.batch_norm(
            x.float(), None, None, one.float(), other.float(), True, 0.1, 1e-5
        ).half(),
    }  # fmt: skip


def alpha_dropouts() -> dict[str, Any]:
    found = {}
    for p in PROBABILITIES:
        ones = torch.ones(2000, dtype=torch.float64)
        low, high = F.alpha_dropout(ones, p, True).unique().tolist()
        found[str(p)] = torch.tensor([high, low])
    return found


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    parts = {"weight_norm": weight_norms(), "half": halves(), "alpha_dropout": alpha_dropouts()}
    arrays = {
        f"{part}.{name}": array.contiguous()
        for part, found in parts.items()
        for name, array in found.items()
    }
    metadata = {"torch": torch.__version__, "made_by": "tests/golden/make_norm.py"}
    target = Path(__file__).with_name("norm.safetensors")
    save_file(arrays, target, metadata=metadata)
    target.chmod(0o644)


if __name__ == "__main__":
    main()
