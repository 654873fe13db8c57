"""Makes attention_linformer.safetensors: Linformer's attention by lucidrains/linformer.

``python -m tests.golden.make_attention_linformer CLONE`` (needs torch, and a clone of
github.com/lucidrains/linformer) rewrites the file beside this script.

    full.*, short.*, shared.*: query, key, value, e, f → out
        LinformerSelfAttention in float64 between its projections of the input and of the output;
        ``short`` has a text shorter than E and F, ``shared`` one matrix for both and V = K
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

B, H, LONGEST, D, K = 2, 3, 9, 4, 5
RNG = np.random.default_rng(6)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).round(3)


def case(n: int, shared: bool) -> dict[str, Any]:
    import torch
    from linformer.linformer import LinformerSelfAttention

    module = LinformerSelfAttention(H * D, LONGEST, k=K, heads=H, share_kv=shared).eval()
    for parameter in module.parameters():
        parameter.data = torch.tensor(normal(*parameter.shape))
    x = torch.tensor(normal(B, n, H * D))
    found: list[Any] = []
    module.to_out.register_forward_pre_hook(lambda _, args: found.append(args[0]))

    def heads(y: Any) -> Any:
        return y.reshape(B, n, H, D).transpose(1, 2).contiguous().numpy()

    with torch.no_grad():
        module(x)
        value = module.to_k(x) if shared else module.to_v(x)
        arrays = {"query": module.to_q(x), "key": module.to_k(x), "value": value, "out": found[0]}
        f = module.proj_k if shared else module.proj_v
        matrices = {"e": module.proj_k.mT.contiguous().numpy(), "f": f.mT.contiguous().numpy()}
    return {name: heads(y) for name, y in arrays.items()} | matrices


def main() -> None:
    import torch
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    clone = Path(sys.argv[1])
    sys.path.insert(0, str(clone))
    head = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    cases = {
        "full": case(LONGEST, False),
        "short": case(LONGEST - 2, False),
        "shared": case(LONGEST, True),
    }
    arrays = {f"{part}.{name}": x for part, xs in cases.items() for name, x in xs.items()}
    metadata = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "linformer": head.stdout.strip(),
    }
    path = Path(__file__).with_name("attention_linformer.safetensors")
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
