"""What transformers answers: prompt lookup, processors, how many drafts stand for given coins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from mini_nn import Rng
from mini_nn.decoding import (
    PromptLookup,
    RngSource,
    Warper,
    no_repeat_ngram,
    repetition_penalty,
    speculative_sampling,
)
from tests.support import assert_close

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "decoding.safetensors", framework="np"
) as _file:
    GOLDEN = {name: _file.get_tensor(name) for name in [*_file.keys()]}
CASES = range(40)


def case(name: str, k: int) -> dict[str, Any]:
    start = f"{name}.{k}."
    return {key.removeprefix(start): x for key, x in GOLDEN.items() if key.startswith(start)}


@pytest.mark.parametrize("k", CASES)
def test_prompt_lookup(k: int) -> None:
    given = case("lookup", k)
    draft = PromptLookup(given["most"].item())
    found = draft.propose(
        given["text"].tolist(), given["count"].item(), Warper(0.0), RngSource(Rng(0))
    )
    assert found.tokens == given["found"].tolist()


def test_the_lookups_of_the_golden_find_something() -> None:
    assert sum(len(case("lookup", k)["found"]) > 0 for k in CASES) > 20


@pytest.mark.parametrize("k", CASES)
def test_processors(k: int) -> None:
    given = case("penalty", k)
    out = repetition_penalty(given["logits"], given["text"].tolist(), given["factor"].item())
    assert_close(out, given["out"], rtol=1e-12)
    given = case("ban", k)
    out = no_repeat_ngram(given["logits"], given["text"].tolist(), given["size"].item())
    assert_close(out, given["out"], rtol=1e-12)


class Coins:
    """Coins that were thrown before; a token is never of interest here."""

    def __init__(self, coins: Any) -> None:
        self.coins = coins
        self.at = 0

    def place(self, i: int) -> None:
        self.at = i

    def bernoulli(self, a: float) -> bool:
        return bool(self.coins[self.at] < a)

    def categorical(self, p: Any) -> int:
        return int(np.argmax(p))


@pytest.mark.parametrize("k", CASES)
def test_as_many_drafts_stand_for_the_same_coins(k: int) -> None:
    """One coin is kept for each draft, also where its answer is sure and none is asked for."""
    given = case("verify", k)
    q, p = (np.exp(given[n] - given[n].max(axis=-1, keepdims=True)) for n in "qp")
    q, p = (x / x.sum(axis=-1, keepdims=True) for x in (q, p))
    tokens, source, count = given["tokens"].tolist(), Coins(given["coins"]), 0
    for i, token in enumerate(tokens):
        source.place(i)
        verdict = speculative_sampling([token], q[i : i + 1], p[i : i + 2], source)
        if not verdict.accepted:
            break
        count += 1
    assert count == given["count"].item()


def test_the_golden_has_all_counts() -> None:
    assert {case("verify", k)["count"].item() for k in CASES} >= {0, 1, 2, 3}
