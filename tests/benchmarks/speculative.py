"""Greedy text of the shipped target: six drafts of the shipped draft a round, or one by one.

``cached_decode`` is our own decoding with a cache; ``overhead`` the share of the time that is not
spent in passes of the two models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

NEW, DRAFTS = 90, 6
PLACES = (100, 5_000, 12_000)
"""Where the prompts of 32 bytes begin, in held-out text."""


def build(name: str, implementation: str, threads: int) -> Callable[[], float]:
    """Milliseconds for three texts, or the share."""
    from mini_nn.decoding import Warper
    from models.data import corpus, split
    from models.pair import load
    from models.speculative import speculative_generate

    target, draft = load()
    text = [*split(corpus("shakespeare"))[1]]
    prompts = [text[place : place + 32] for place in PLACES]
    clock = time.process_time if threads == 1 else time.perf_counter

    def one_by_one() -> float:
        began = clock()
        for prompt in prompts:
            target.generate([prompt], NEW, temperature=0)
        return (clock() - began) * 1e3

    def drafted() -> float:
        began = clock()
        for prompt in prompts:
            speculative_generate(target, draft, [prompt], NEW, count=DRAFTS, warper=Warper(0.0))
        return (clock() - began) * 1e3

    def share() -> float:
        runs = [
            speculative_generate(target, draft, [prompt], NEW, count=DRAFTS, warper=Warper(0.0))
            for prompt in prompts
        ]
        return statistics.mean(run.overhead for run in runs)

    return {"cached_decode": one_by_one, "overhead": share}.get(implementation, drafted)
