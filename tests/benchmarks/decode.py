"""Greedy decoding with a KV cache, batch 1, in milliseconds per token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import gpt_step
from .workloads import milliseconds

PROMPT = 8


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """Tokens until the context is nearly full, from a prompt of eight."""
    size = gpt_step.SIZES[name.rsplit("_", 1)[1]]
    prompt = np.random.default_rng(1).integers(0, size.vocabulary, (1, PROMPT))
    count = size.context - PROMPT
    if implementation == "torch":
        import torch

        torch.manual_seed(0)
        model = gpt_step.torch_gpt(size).eval()

        def theirs() -> None:
            with torch.no_grad():
                cache: list[dict[str, torch.Tensor]] = [{} for _ in range(size.layers)]
                ids, start = torch.from_numpy(prompt), 0
                for _ in range(count):
                    logits = model(ids, start, cache)
                    start += ids.shape[1]
                    ids = logits[:, -1:].argmax(-1)

        measure = milliseconds(theirs, threads)
    else:
        ours = gpt_step.our_gpt(size)
        measure = milliseconds(
            lambda: ours.generate(prompt, max_new_tokens=count, temperature=0.0), threads
        )
    return lambda: measure() / count
