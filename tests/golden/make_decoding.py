"""Makes decoding.safetensors: what the generation code of transformers answers on random texts.

``python -m tests.golden.make_decoding`` (needs torch and transformers) rewrites the file beside
this script.  Per case k:

    lookup.K.text, .count, .most, .found      PromptLookupCandidateGenerator: the proposed tokens
    penalty.K.logits, .text, .factor, .out    RepetitionPenaltyLogitsProcessor
    ban.K.logits, .text, .size, .out          NoRepeatNGramLogitsProcessor
    verify.K.tokens, .q, .p, .coins, .count   _speculative_sampling: logits of the draft (g, V) and
                                              the target (g + 1, V), its coins, how many it accepts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CASES = 40
VOCABULARY = 7

_rng = np.random.default_rng(3)


def texts() -> Any:
    return _rng.integers(0, 3, _rng.integers(4, 24))


def lookup(k: int) -> dict[str, Any]:
    import torch
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    text, count, most = texts(), int(_rng.integers(1, 6)), int(_rng.integers(1, 4))
    generator = PromptLookupCandidateGenerator(
        num_output_tokens=count, max_matching_ngram_size=most, max_length=1000
    )
    found, _ = generator.get_candidates(torch.tensor(text)[None])
    numbers = {"count": count, "most": most}
    return {
        f"lookup.{k}.text": text,
        f"lookup.{k}.found": found[0, len(text) :].numpy(),
        **{f"lookup.{k}.{name}": np.array(x) for name, x in numbers.items()},
    }


def processors(k: int) -> dict[str, Any]:
    import torch
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    text, logits = texts(), _rng.standard_normal(VOCABULARY)
    factor, size = float(np.round(_rng.uniform(0.5, 2.0), 3)), int(_rng.integers(1, 4))
    if size == 1:  # would forbid all three letters
        size = 2
    rows, ids = torch.tensor(logits)[None], torch.tensor(text)[None]
    penalised = RepetitionPenaltyLogitsProcessor(factor)(ids, rows.clone())
    banned = NoRepeatNGramLogitsProcessor(size)(ids, rows.clone())
    found = {"penalty": (penalised, "factor", factor), "ban": (banned, "size", size)}
    arrays = {}
    for name, (out, option, value) in found.items():
        arrays |= {
            f"{name}.{k}.logits": logits,
            f"{name}.{k}.text": text,
            f"{name}.{k}.{option}": np.array(value),
            f"{name}.{k}.out": out[0].numpy(),
        }
    return arrays


def verify(k: int) -> dict[str, Any]:
    import torch
    from transformers.generation import utils

    g = int(_rng.integers(1, 5))
    q, p = _rng.standard_normal((g, VOCABULARY)), _rng.standard_normal((g + 1, VOCABULARY))
    p[:g] = 0.5 * p[:g] + q  # close enough that some stand
    tokens, coins = _rng.integers(0, VOCABULARY, g), np.round(_rng.uniform(size=g), 6)
    drawn, torch.rand_like = torch.rand_like, lambda x: torch.tensor(coins)[None]
    try:
        _, count = utils._speculative_sampling(
            torch.tensor(tokens)[None], torch.tensor(q)[None], g, torch.tensor(p)[None]
        )
    finally:
        torch.rand_like = drawn
    arrays = {"tokens": tokens, "q": q, "p": p, "coins": coins, "count": np.array(int(count))}
    return {f"verify.{k}.{name}": x for name, x in arrays.items()}


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file

    torch.manual_seed(0)
    arrays: dict[str, Any] = {}
    for k in range(CASES):
        arrays |= lookup(k) | processors(k) | verify(k)
    metadata = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = Path(__file__).with_name("decoding.safetensors")
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
