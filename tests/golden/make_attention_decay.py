"""Makes attention_decay.safetensors: what other implementations of decaying attention answer.

``python -m tests.golden.make_attention_decay FLA TORCHSCALE`` rewrites the file beside this
script.  It needs torch, einops, transformers and clones of two repositories, whose paths are the
arguments: fla-org/flash-linear-attention and microsoft/torchscale.  Of the first only the
``naive.py`` of three functions are run, in plain torch.  Each case is a prefix, CASE.in.NAME its
arguments:

    retention   naive_retention (b, h, n, d) → out
    simple_gla  naive_recurrent_simple_gla (b, n, h, d), with a first state → out, state; the same
                as naive_chunk_simple_gla → chunked
    gla         naive_recurrent_gla, likewise → out, state
    relpos      RetNetRelPos for 3 heads of 4 channels → angle, log_decay, sin, cos, mask: D over
                the roots of its rows' sums
    msr         MultiScaleRetention → out, grad.x of Σ cos(0.7 i + 0.3) outᵢ; msr.state.NAME
    wkv         rwkv_linear_attention_cpu → out, numerator, denominator, exponent

The functions of the first repository compute in float32, and so does torchscale's RMSNorm.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

B, H, N, D, E = 2, 3, 18, 4, 5
EMBED, VALUES = 12, 18

_rng = np.random.default_rng(34)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def module_at(path: Path) -> Any:
    """The module in this file, without the package around it."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def class_at(path: Path, name: str, namespace: dict[str, Any]) -> Any:
    """One class of a file whose imports are not to be had."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == name]
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace[name]


def commit(clone: Path) -> str:
    """The commit of a clone; of a copy without git, what its file COMMIT says."""
    if (clone / "COMMIT").exists():
        return (clone / "COMMIT").read_text().strip()
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(fla: Path, torchscale: Path) -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    stored: dict[str, Any] = {}

    def record(case: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        stored.update({f"{case}.in.{name}": a for name, a in inputs.items()})
        stored.update({f"{case}.{name}": a.detach().numpy() for name, a in outputs.items()})

    def tensors(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(a) for name, a in inputs.items()}

    def operators(name: str) -> Any:
        return module_at(fla / "fla" / "ops" / name / "naive.py")

    inputs = {"q": normal(B, H, N, D), "k": normal(B, H, N, D), "v": normal(B, H, N, E)}
    out = operators("retention").naive_retention(**tensors(inputs))
    record("retention", inputs, {"out": out})

    inputs = {"q": normal(B, N, H, D), "k": normal(B, N, H, D), "v": normal(B, N, H, E)}
    inputs |= {"g": -np.abs(normal(B, N, H)), "initial_state": normal(B, H, D, E)}
    simple = operators("simple_gla")
    given = tensors(inputs)
    given["initial_state"] = given["initial_state"].float()
    out, state = simple.naive_recurrent_simple_gla(**given)
    chunks, _ = simple.naive_chunk_simple_gla(**given, chunk_size=8)
    record("simple_gla", inputs, {"out": out, "state": state, "chunked": chunks})

    inputs = {"q": normal(B, N, H, D), "k": normal(B, N, H, D), "v": normal(B, N, H, E)}
    inputs |= {"gk": -np.abs(normal(B, N, H, D)), "initial_state": normal(B, H, D, E)}
    out, state = operators("gla").naive_recurrent_gla(**tensors(inputs), output_final_state=True)
    record("gla", inputs, {"out": out, "state": state})

    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, str(torchscale))
    from torchscale.component.multiscale_retention import MultiScaleRetention

    args = SimpleNamespace(
        decoder_embed_dim=EMBED,
        decoder_retention_heads=H,
        recurrent_chunk_size=8,
        layernorm_eps=1e-12,
        multiway=False,
    )
    names = {"torch": torch, "nn": torch.nn}
    path = torchscale / "torchscale" / "architecture" / "retnet.py"
    positions = class_at(path, "RetNetRelPos", names)(args)
    (sin, cos), mask = positions(N)
    relpos = {"angle": positions.angle, "log_decay": positions.decay}
    record("relpos", {}, relpos | {"sin": sin, "cos": cos, "mask": mask})

    layer = MultiScaleRetention(args, EMBED, VALUES, H)
    for p in layer.parameters():
        p.data = torch.from_numpy(np.round(0.4 * normal(*p.shape), 3))
    inputs = {"x": normal(B, N, EMBED)}
    x = torch.from_numpy(inputs["x"]).requires_grad_()
    out = layer(x, ((sin, cos), mask))
    wave = torch.cos(0.7 * torch.arange(out.numel()) + 0.3)
    (out.reshape(-1) * wave).sum().backward()
    record("msr", inputs, {"out": out, "grad.x": x.grad})
    stored.update({f"msr.state.{k}": p.detach().numpy() for k, p in layer.named_parameters()})

    inputs = {"key": 3.0 * normal(B, N, D), "value": normal(B, N, D)}
    inputs |= {"time_decay": normal(D), "time_first": normal(D)}
    out, state = rwkv_linear_attention_cpu(**tensors(inputs), return_state=True)
    names_of_state = ("numerator", "denominator", "exponent")
    record("wkv", inputs, {"out": out} | dict(zip(names_of_state, state, strict=True)))

    metadata = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commits": json.dumps(
            {
                "fla-org/flash-linear-attention": commit(fla),
                "microsoft/torchscale": commit(torchscale),
            }
        ),
    }
    single = ("retention", "simple_gla", "gla")
    arrays = {
        name: np.ascontiguousarray(a, "float32" if name.startswith(single) else a.dtype)
        for name, a in stored.items()
    }
    save_file(arrays, Path(__file__).with_name("attention_decay.safetensors"), metadata)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
