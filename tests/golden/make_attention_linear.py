"""Makes attention_linear.safetensors: what three published linear attentions answer.

``python -m tests.golden.make_attention_linear FOLDER`` (needs torch and einops) rewrites the file
beside this script.  FOLDER holds work trees of the authors' repositories, all of MIT licence:

* fast-transformers (idiap), of which ``LinearAttention``, ``CausalLinearAttention`` and
  ``RecurrentLinearAttention`` are run with their ε = 1e-6.  The compiled sum that the causal one
  imports is replaced by its definition, a masked product in torch;
* flash-linear-attention (fla-org), of which the naive forms of linear attention and Based are
  run.  They divide queries by √d themselves, and add 1e-10 and 1e-6 to the normaliser;
* efficient-attention (cmsflash), one head, of which what enters the last convolution is kept.

Prefixes are ``fast.``, ``fla.``, ``based.`` and ``efficient.``; all arrays are (…, n, d).  The
metadata has the versions and the commits.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_rng = np.random.default_rng(3)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def package(name: str, folder: Path) -> None:
    """A package whose modules can be imported without running its ``__init__``."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def by_path(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fast_transformers(folder: Path) -> dict[str, Any]:
    import torch

    root = folder / "fast_transformers"
    names = ("", ".attention", ".recurrent", ".recurrent.attention")
    for name in (*names, ".recurrent.attention.self_attention"):
        package(f"fast_transformers{name}", root.joinpath(*name.split(".")))
    product = ModuleType("fast_transformers.causal_product")
    product.causal_dot_product = lambda q, k, v: torch.tril(q @ k.mT) @ v  # type: ignore[attr-defined]
    sys.modules["fast_transformers.causal_product"] = product
    find = importlib.import_module
    masking = find("fast_transformers.masking")
    full = find("fast_transformers.attention.linear_attention").LinearAttention(4)
    causal = find("fast_transformers.attention.causal_linear_attention").CausalLinearAttention(4)
    place = "fast_transformers.recurrent.attention.self_attention.linear_attention"
    recurrent = find(place).RecurrentLinearAttention(4)

    q, k, v = normal(2, 7, 2, 4), normal(2, 7, 2, 4), normal(2, 7, 2, 3)
    lengths = torch.tensor([7, 4])
    tensors = [torch.tensor(x) for x in (q, k, v)]
    queries = masking.LengthMask(torch.tensor([7, 7]))
    keys = masking.LengthMask(lengths)
    outputs = {
        "full": full(*tensors, masking.FullMask(7), queries, queries),
        "padded": full(*tensors, masking.FullMask(7), queries, keys),
        "causal": causal(*tensors, masking.TriangularCausalMask(7), queries, queries),
        "causal_padded": causal(*tensors, masking.TriangularCausalMask(7), queries, keys),
    }
    state, steps = None, []
    for t in range(7):
        y, state = recurrent(*(x[:, t] for x in tensors), state)
        steps.append(y)
        state = [x.clone() for x in state]
    outputs["recurrent"] = torch.stack(steps, 1)
    rows = {"query": q, "key": k, "value": v} | {n: y.numpy() for n, y in outputs.items()}
    arrays = {name: np.swapaxes(x, 1, 2) for name, x in rows.items()}
    arrays["mask"] = np.arange(7) < lengths.numpy()[:, None]
    assert state is not None
    return arrays | {"kv": state[0].numpy(), "normalizer": state[1].numpy()}


def fla(folder: Path) -> dict[str, Any]:
    import torch

    naive = by_path(folder / "fla" / "ops" / "linear_attn" / "naive.py")
    q, k, v = np.abs(normal(2, 6, 2, 4)), np.abs(normal(2, 6, 2, 4)), normal(2, 6, 2, 3)
    kv, z = np.abs(normal(2, 2, 4, 3)), np.abs(normal(2, 1, 2, 4))
    t = [torch.tensor(x.astype("float32")) for x in (q, k, v, kv, z)]
    run = naive.naive_recurrent_linear_attn
    plain, last = run(*t[:3], initial_state=t[3], output_final_state=True)
    shared, state = run(*t[:3], initial_state=(t[3], t[4]), output_final_state=True, normalize=True)
    rows = {"query": q, "key": k, "value": v, "plain": plain.numpy(), "normal": shared.numpy()}
    arrays = {name: np.swapaxes(x, 1, 2).astype("float32") for name, x in rows.items()}
    arrays |= {"kv": kv.astype("float32"), "normalizer": z[:, 0].astype("float32")}
    arrays |= {"kv_last": state[0].numpy(), "normalizer_last": state[1].numpy()[:, 0]}
    assert torch.equal(last, state[0])
    long = [np.abs(normal(1, 128, 1, 2)), np.abs(normal(1, 128, 1, 2)), normal(1, 128, 1, 2)]
    y = naive.naive_chunk_linear_attn(*(torch.tensor(x) for x in long), normalize=True)
    names = ("long_query", "long_key", "long_value")
    rows = dict(zip(names, long, strict=True)) | {"long_normal": y.numpy()}
    return arrays | {name: np.swapaxes(x, 1, 2) for name, x in rows.items()}


def based(folder: Path) -> dict[str, Any]:
    import torch

    naive = by_path(folder / "fla" / "ops" / "based" / "naive.py")
    arrays = {"query": normal(2, 2, 9, 3), "key": normal(2, 2, 9, 3), "value": normal(2, 2, 9, 4)}
    inputs = [torch.tensor(x) for x in arrays.values()]
    arrays["parallel"] = naive.naive_parallel_based(*inputs).numpy()
    arrays["plain"] = naive.naive_parallel_based(*inputs, use_norm=False).numpy()
    arrays["chunked"] = naive.naive_chunk_based(*inputs, chunk_size=3).numpy()
    return arrays


def efficient(folder: Path) -> dict[str, Any]:
    import torch

    module = by_path(folder / "efficient_attention.py").EfficientAttention(5, 4, 1, 3)
    caught: list[Any] = []
    module.reprojection.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    for parameter in module.parameters():
        parameter.data = torch.tensor(normal(*parameter.shape))
    image = torch.tensor(normal(2, 5, 3, 4))
    with torch.no_grad():
        module(image)
        parts = {"query": module.queries, "key": module.keys, "value": module.values}
        images = {name: part(image) for name, part in parts.items()} | {"output": caught[0]}
    return {name: x.flatten(2).mT.numpy() for name, x in images.items()}


def main() -> None:
    import einops
    import torch
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    folder = Path(sys.argv[1])
    metadata = {"torch": torch.__version__, "numpy": np.__version__, "einops": einops.__version__}
    arrays: dict[str, Any] = {}
    for prefix, run, name in (
        ("fast", fast_transformers, "fast-transformers"),
        ("fla", fla, "flash-linear-attention"),
        ("based", based, "flash-linear-attention"),
        ("efficient", efficient, "efficient-attention"),
    ):
        tree = folder / name
        head = subprocess.run(
            ["git", "-C", str(tree), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        metadata[name] = head.stdout.strip()
        arrays |= {f"{prefix}.{key}": x for key, x in run(tree).items()}
    path = Path(__file__).with_name("attention_linear.safetensors")
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
