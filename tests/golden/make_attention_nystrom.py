"""Makes attention_nystrom.safetensors: Nyström attention as released.

``python -m tests.golden.make_attention_nystrom CLONE`` (needs torch and transformers, and a clone
of github.com/mlpen/Nystromformer) rewrites the file beside this script.  All in float64.

    transformers.query, .key, .value, .conv → .out
        NystromformerSelfAttention between its projections, whose results are the queries, keys and
        values; Z₀ by one maximum for the whole batch
    mlpen.query, .key, .value, .conv → .shared, .matrix
        code/attention_nystrom.py with both of its Z₀, the second by the keys of two spellings that
        its configuration then needs
    mlpen.inverse.START.k
        iterates 0 … 8 of its ``iterative_inv`` for mlpen.matrices, which are stochastic
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

B, H, N, D, LANDMARKS, KERNEL = 2, 2, 12, 3, 4, 5
RNG = np.random.default_rng(5)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).round(3)


def from_transformers() -> tuple[dict[str, Any], str]:
    import torch
    import transformers
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = transformers.NystromformerConfig(
        hidden_size=H * D,
        num_attention_heads=H,
        num_landmarks=LANDMARKS,
        segment_means_seq_len=N,
        conv_kernel_size=KERNEL,
        attention_probs_dropout_prob=0.0,
    )
    module = NystromformerSelfAttention(config).eval()
    states = torch.tensor(normal(B, N, H * D))
    for layer in (module.query, module.key, module.value):
        layer.weight.data = torch.tensor(normal(H * D, H * D))
        layer.bias.data = torch.tensor(normal(H * D))
    module.conv.weight.data = torch.tensor(normal(H, 1, KERNEL, 1))
    with torch.no_grad():

        def heads(x: Any) -> Any:
            return x.reshape(B, N, H, D).transpose(1, 2).contiguous().numpy()

        arrays = {
            "query": heads(module.query(states)),
            "key": heads(module.key(states)),
            "value": heads(module.value(states)),
            "conv": module.conv.weight.numpy(),
            "out": heads(module(states)[0]),
        }
    return arrays, transformers.__version__


def from_mlpen(clone: Path) -> dict[str, Any]:
    import torch

    path = clone / "code" / "attention_nystrom.py"
    spec = importlib.util.spec_from_file_location("attention_nystrom", path)
    assert spec is not None and spec.loader is not None
    released = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(released)
    config = {
        "head_dim": D,
        "num_head": H,
        "num_landmarks": LANDMARKS,
        "seq_len": N,
        "conv_kernel_size": KERNEL,
    }
    exact = config | {"inv_coeff_init_option": "exact", "inv_init_coeff_option": "exact"}
    arrays = {name: normal(B, H, N, D) for name in ("query", "key", "value")}
    inputs = [torch.tensor(x) for x in arrays.values()]
    conv = torch.tensor(normal(H, 1, KERNEL, 1))
    matrices = torch.softmax(torch.tensor(2.0 * normal(B, H, 5, 5)), dim=-1)
    arrays |= {"conv": conv.numpy(), "matrices": matrices.numpy()}
    for name, options in (("shared", config), ("matrix", exact)):
        module = released.NystromAttention(options).eval()
        module.conv.weight.data = conv
        with torch.no_grad():
            arrays[name] = module(*inputs, torch.ones(B, N)).numpy()
            for k in range(9):
                arrays[f"inverse.{name}.{k}"] = module.iterative_inv(matrices, k).numpy()
    return arrays


def main() -> None:
    import torch
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    clone = Path(sys.argv[1])
    head = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    ours, version = from_transformers()
    parts = {"transformers": ours, "mlpen": from_mlpen(clone)}
    arrays = {f"{part}.{name}": x for part, xs in parts.items() for name, x in xs.items()}
    metadata = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": version,
        "Nystromformer": head.stdout.strip(),
    }
    path = Path(__file__).with_name("attention_nystrom.safetensors")
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
