"""Makes attention_delta.safetensors: what flash-linear-attention's naive forms answer, in float32.

``python -m tests.golden.make_attention_delta CHECKOUT`` (needs torch and einops) rewrites the file
beside this script; CHECKOUT is a work tree of flash-linear-attention (MIT licence), of which
``fla/ops/*/naive.py`` are run, each alone.  The inputs are ``q, k, v, p, w`` (b, n, h, d), keys and
directions of length 1, ``beta, g`` (b, n, h), ``lamb`` (h, d) and ``state`` (b, h, d, d); the
outputs have the functions' names, with ``.state`` for the last state.  The metadata has the
versions, the commit, and the hash of each file.

Two forms of Comba are there because they differ: ``naive_recurrent_comba`` decays the state before
it takes the error, ``naive_chunk_comba`` after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

B, N, H, D = 2, 16, 2, 4
FILES = ("delta_rule", "gated_delta_rule", "comba", "mesa_net", "path_attn", "deltaformer")


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    arrays = {name: rng.standard_normal((B, N, H, D)) for name in "qkvpw"}
    for name in "kpw":
        arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    arrays["beta"] = rng.uniform(0.1, 0.95, (B, N, H))
    arrays["g"] = -rng.uniform(0.02, 0.6, (B, N, H))
    arrays["lamb"] = rng.uniform(0.3, 1.5, (H, D))
    arrays["state"] = rng.standard_normal((B, H, D, D))
    return {name: np.round(a, 4).astype("float32") for name, a in arrays.items()}


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"naive_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    import einops
    import torch
    from safetensors.numpy import save_file

    checkout = Path(sys.argv[1])
    paths = {name: checkout / "fla" / "ops" / name / "naive.py" for name in FILES}
    delta, gated, comba, mesa, path, former = (load(paths[name]) for name in FILES)
    arrays = inputs()
    q, k, v, p, w, beta, g, lamb, state = (torch.tensor(a) for a in arrays.values())
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v, beta)]
    answers: dict[str, Any] = {}

    def note(name: str, answer: Any) -> None:
        y, last, *_ = answer if isinstance(answer, tuple) else (answer, None)
        answers[name] = y
        if last is not None:
            answers[f"{name}.state"] = last

    note("delta_rule_recurrence", delta.delta_rule_recurrence(*swapped, initial_state=state))
    note("delta_rule_chunkwise", delta.delta_rule_chunkwise(*swapped, chunk_size=8))
    rest = {"initial_state": state, "output_final_state": True}
    note("recurrent_gated", gated.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **rest))
    note("chunk_gated", gated.naive_chunk_gated_delta_rule(q, k, v, g, beta, 8, **rest))
    note("recurrent_comba", comba.naive_recurrent_comba(q, k, v, p, beta, g, **rest))
    note("chunk_comba", comba.naive_chunk_comba(q, k, v, p, g, beta, 8, **rest))
    y, kk, kv = mesa.naive_mesa_net_exact(q, k, v, g, lamb, beta)
    answers |= {"mesa": y, "mesa.gram": kk, "mesa.moment": kv}
    zeros = torch.zeros_like(g)
    answers["path"] = path.naive_path_attn(q, k, v, w, beta, zeros, D**-0.5, 8)
    answers["path_forget"] = path.naive_path_attn(q, k, v, w, beta, g, 1.0, 8)
    answers["deltaformer"] = former.naive_deltaformer_attn(q, k, v, beta)

    arrays |= {f"out.{name}": y.contiguous().numpy() for name, y in answers.items()}
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    metadata = {
        "flash-linear-attention": commit,
        "torch": torch.__version__,
        "einops": einops.__version__,
        "numpy": np.__version__,
    }
    for name, file in paths.items():
        metadata[f"{name}/naive.py"] = f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    target = Path(__file__).with_name("attention_delta.safetensors")
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, target, metadata)


if __name__ == "__main__":
    main()
