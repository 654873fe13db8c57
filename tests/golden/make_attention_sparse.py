"""Makes attention_sparse.safetensors: Longformer's attention and Sparse Transformer's patterns.

``python -m tests.golden.make_attention_sparse CLONE`` (needs torch and transformers, and a clone of
github.com/openai/sparse_attention) rewrites the file beside this script.

    longformer.CASE.x, .key_mask, .global_mask → .out, .grad.x, .grad.state.NAME
        LongformerSelfAttention of transformers, in float32 as its softmax always is (in float64 its
        gradients are nan for pads that see pads only, and for a text with fewer global tokens than
        another); gradients are those of Σ cos(0.7 i + 0.3) outᵢ; longformer.state.NAME its weights
    pattern.local.n.ctx, pattern.strided.n.ctx
        get_attn_mask(n, mode, ctx): a window of ctx keys, every ctx-th key, both causal
    pattern.fixed.n.block.summary
        the layout of get_blocksparse_obj for blocks of one position: the fixed pattern

The clone's module is imported with stand-ins, in NumPy, for the few functions of TensorFlow 1 and
blocksparse that these two need.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

HIDDEN, HEADS, WINDOW, N = 8, 2, 4, 12
CASES: dict[str, tuple[list[int], list[list[int]]]] = {  # lengths of two texts, global tokens
    "window": ([12, 12], [[], []]),
    "pads": ([12, 9], [[], []]),
    "globals": ([12, 12], [[0], [0, 5, 6]]),
    "both": ([11, 7], [[0, 10], [3]]),
    "one": ([12, 10], [[], [2, 9]]),
}


def longformer() -> tuple[dict[str, Any], dict[str, str]]:
    import torch
    import transformers
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    rng = np.random.default_rng(3)
    config = transformers.LongformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        attention_window=[WINDOW],
        attention_probs_dropout_prob=0.0,
    )

    def normal(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape).round(3).astype("float32"))

    module = LongformerSelfAttention(config, 0).eval()
    stored = {}
    for name, p in module.named_parameters():
        p.data = 0.5 * normal(*p.shape)
        stored[f"longformer.state.{name}"] = p.detach().numpy()
    for case, (lengths, tokens) in CASES.items():
        real = np.arange(N) < np.asarray(lengths)[:, None]
        chosen = np.zeros((2, N), bool)
        for row, places in enumerate(tokens):
            chosen[row, places] = True
        x = normal(2, N, HIDDEN).requires_grad_()
        mask = np.where(real, np.where(chosen, 10000.0, 0.0), -10000.0)
        module.zero_grad()
        (out,) = module(
            x,
            attention_mask=torch.from_numpy(mask.astype("float32")),
            is_index_masked=torch.from_numpy(~real),
            is_index_global_attn=torch.from_numpy(chosen),
            is_global_attn=bool(chosen.any()),
        )
        wave = torch.cos(0.7 * torch.arange(out.numel(), dtype=torch.float32) + 0.3)
        (out.reshape(-1) * wave).sum().backward()
        case = f"longformer.{case}"
        stored |= {f"{case}.x": x.detach().numpy(), f"{case}.out": out.detach().numpy()}
        stored |= {f"{case}.key_mask": real, f"{case}.global_mask": chosen}
        stored[f"{case}.grad.x"] = x.grad.numpy()
        for name, p in module.named_parameters():
            if p.grad is not None:
                stored[f"{case}.grad.state.{name}"] = p.grad.numpy()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return stored, versions


def stand_ins() -> SimpleNamespace:
    """What get_attn_mask takes from TensorFlow 1."""

    def matrix_band_part(x: Any, lower: int, upper: int) -> Any:
        i, j = np.indices(x.shape)
        return x * ((lower < 0) | (i - j <= lower)) * ((upper < 0) | (j - i <= upper))

    return SimpleNamespace(
        matrix_band_part=matrix_band_part,
        minimum=min,
        ones=np.ones,
        zeros=lambda shape, dtype: np.zeros(shape, int),
        range=lambda n, dtype: np.arange(n),
        reshape=np.reshape,
        transpose=np.transpose,
        equal=np.equal,
        floormod=np.mod,
        logical_and=np.logical_and,
        cast=lambda x, dtype: x,
        int32=int,
        float32=float,
    )


def patterns(clone: Path) -> tuple[dict[str, Any], dict[str, str]]:
    modules = {name: ModuleType(name) for name in ("tensorflow", "blocksparse", "utils")}
    vars(modules["tensorflow"]).update(vars(stand_ins()))
    vars(modules["utils"]).update(
        shape_list=None, recomputable=lambda name: lambda function: function
    )
    vars(modules["blocksparse"]).update(
        BlocksparseTransformer=lambda layout, **options: layout,
    )
    sys.modules.update(modules)
    module = ModuleType("attention")
    exec(compile((clone / "attention.py").read_text(), "attention.py", "exec"), vars(module))
    stored = {}
    for n, ctx in ((7, 3), (16, 4), (13, 1)):
        for mode in ("local", "strided"):
            mask = module.get_attn_mask(n, mode, ctx)
            stored[f"pattern.{mode}.{n}.{ctx}"] = mask.reshape(n, n).astype(bool)
    for n, block, summary in ((12, 4, 1), (16, 4, 2), (10, 5, 5), (15, 6, 3)):
        layout = module.get_blocksparse_obj(
            n, 1, "fixed", blocksize=1, local_attn_ctx=block, num_verts=1, vertsize=summary
        )
        stored[f"pattern.fixed.{n}.{block}.{summary}"] = layout.astype(bool)
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return stored, {"openai/sparse_attention": commit}


def main() -> None:
    from safetensors.numpy import save_file

    stored, versions = longformer()
    more, commit = patterns(Path(sys.argv[1]))
    stored = {k: np.ascontiguousarray(a) for k, a in (stored | more).items()}
    save_file(stored, Path(__file__).with_name("attention_sparse.safetensors"), versions | commit)


if __name__ == "__main__":
    main()
