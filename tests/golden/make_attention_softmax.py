"""Writes attention_softmax.safetensors: softmax attention by torch in float64, with gradients.

    python tests/golden/make_attention_softmax.py        (torch 2.5 or newer, for fully masked rows)

Of each case: ``in.query``, ``in.key``, ``in.value`` and, if there is one, ``in.mask``; ``out``;
``grad.*`` of the sum of ``out`` times cos(0.7 i + 0.3), i its flat index; ``logsumexp`` of the
scores.  Options of the calls are in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, tuple[tuple[int, int], str | None, dict[str, Any]]] = {
    "plain": ((5, 7), None, {}),
    "causal": ((7, 7), None, {"is_causal": True}),
    "causal_short": ((4, 7), None, {"is_causal": True}),
    "causal_long": ((7, 4), None, {"is_causal": True}),
    "scale": ((5, 7), None, {"scale": 3.0}),
    "booleans": ((5, 7), "booleans", {}),
    "numbers": ((5, 7), "numbers", {"scale": 0.5}),
}
HEADS, D, E = (2, 2), 5, 3


def main() -> None:
    import torch
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    stored: dict[str, Any] = {}
    for name, ((n, m), kind, options) in CASES.items():
        arrays = {
            "query": rng.standard_normal((*HEADS, n, D)),
            "key": rng.standard_normal((*HEADS, m, D)),
            "value": rng.standard_normal((*HEADS, m, E)),
        }
        leaves = {k: torch.from_numpy(a.round(4)).requires_grad_() for k, a in arrays.items()}
        mask = None
        if kind == "booleans":
            mask = torch.from_numpy(rng.random((n, m)) < 0.6)
            mask[2] = False
        if kind == "numbers":
            mask = torch.from_numpy(rng.standard_normal((n, m)).round(4))
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves.values(), attn_mask=mask, **options
        )
        wave = torch.cos(0.7 * torch.arange(out.numel(), dtype=torch.float64) + 0.3)
        (out.reshape(-1) * wave).sum().backward()
        with torch.no_grad():
            scores = leaves["query"] @ leaves["key"].mT * options.get("scale", D**-0.5)
            if "is_causal" in options:
                scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(), -torch.inf)
            if kind == "booleans":
                scores = scores.masked_fill(~mask, -torch.inf)
            if kind == "numbers":
                scores = scores + mask
            stored[f"{name}.logsumexp"] = scores.logsumexp(-1).numpy()
        for k, leaf in leaves.items():
            stored[f"{name}.in.{k}"] = leaf.detach().numpy()
            stored[f"{name}.grad.{k}"] = leaf.grad.numpy()
        stored[f"{name}.out"] = out.detach().numpy()
        if mask is not None:
            stored[f"{name}.in.mask"] = mask.numpy()
    stored = {k: np.ascontiguousarray(a) for k, a in stored.items()}
    options = {name: case[2] for name, case in CASES.items()}
    metadata = {"torch": torch.__version__, "options": json.dumps(options)}
    save_file(stored, Path(__file__).with_name("attention_softmax.safetensors"), metadata)


if __name__ == "__main__":
    main()
