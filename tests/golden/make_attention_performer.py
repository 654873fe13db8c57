"""Makes attention_performer.safetensors: what performer-pytorch answers, in float64.

``python tests/golden/make_attention_performer.py [FOLDER]`` (needs torch, einops and
performer-pytorch; FOLDER is where they were installed with ``pip install --target``) rewrites the
file beside this script.

    {query, key, value}    inputs, (1, 2, 9, 5) with 3 channels of values
    projection             (7, 5), injected
    {all, causal}.EPS      attention of softmax features with this ε, from linear_attention and
                           causal_linear_attention_noncuda (its own ε is 0)
    relu.{all, causal}     generalised attention, ε = 0.001
    relu.none              the same without a projection
    moved.{all, causal}    as {all, causal}.0.0001 after the last key was multiplied by 4
    grad.{all, causal}.X   gradients of Σ cos(0.7 i + 0.3) outᵢ for {all, causal}.0.0
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

EPS = (0.0, 1e-4)


def main() -> None:
    if len(sys.argv) > 1:
        sys.path.insert(0, sys.argv[1])
    import torch
    from performer_pytorch import performer_pytorch as theirs
    from safetensors.torch import save_file

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    query, key, value = (torch.randn(1, 2, 9, d).round(decimals=3) for d in (5, 5, 3))
    w = torch.randn(7, 5).round(decimals=3)

    def causal(q: Any, k: Any, v: Any) -> Any:
        return theirs.causal_linear_attention_noncuda(q, k, v, eps=0.0)

    forms = {"all": theirs.linear_attention, "causal": causal}

    def softmax(form: str, k: Any, eps: float, q: Any = query, v: Any = value) -> Any:
        features = [
            theirs.softmax_kernel(x, projection_matrix=w, is_query=is_query, eps=eps)
            for x, is_query in ((q, True), (k, False))
        ]
        return forms[form](*features, v)

    found: dict[str, Any] = {"query": query, "key": key, "value": value, "projection": w}
    far = key.clone()
    far[:, :, -1] *= 4.0
    for form, attend in forms.items():
        for eps in EPS:
            found[f"{form}.{eps}"] = softmax(form, key, eps)
        found[f"moved.{form}"] = softmax(form, far, EPS[1])
        rows = [theirs.generalized_kernel(x, projection_matrix=w) for x in (query, key)]
        found[f"relu.{form}"] = attend(*rows, value)
        q, k, v = leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = softmax(form, k, 0.0, q, v)
        wave = torch.cos(0.7 * torch.arange(out.numel()) + 0.3)
        (out.reshape(-1) * wave).sum().backward()
        for name, x in zip(("query", "key", "value"), leaves, strict=True):
            found[f"grad.{form}.{name}"] = x.grad
    rows = [theirs.generalized_kernel(x, projection_matrix=None) for x in (query, key)]
    found["relu.none"] = theirs.linear_attention(*rows, value)
    versions = {name: version(name) for name in ("torch", "performer-pytorch")}
    path = Path(__file__).with_name("attention_performer.safetensors")
    save_file({name: x.contiguous() for name, x in found.items()}, path, metadata=versions)


if __name__ == "__main__":
    main()
