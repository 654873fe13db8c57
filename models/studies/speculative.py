"""How many tokens does a call of a large model give, if something cheap guesses the next ones?

The target and the draft are the pair that ships with the repository, or any two checkpoints in
GPT-2's layout; the prompts are from text that neither was trained on.  Three questions: does a call
give as many tokens as the formula says (Leviathan et al. 2022, 2211.17192, eq. 1)?  Which scheme
saves how many calls, and how much time?  What do several candidates for one place add, and what is
the most that they could?
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import mean, median
from typing import Any

import numpy as np

import mini_nn
from mini_nn import Rng
from mini_nn.decoding import (
    NGramDraft,
    NGramModel,
    PromptLookup,
    RngSource,
    TokenTree,
    Warper,
    acceptance,
    draw_iid,
    draw_without_replacement,
    expected_tokens,
    k_seq,
    lookahead_decode,
    match_children,
    multi_step,
    optimal_acceptance,
    without_replacement,
)
from mini_nn.decoding.draft import Proposal

from ..cached import CachedModel
from ..data import corpus, split
from ..drafts import EarlyExit, ModelDraft, SkippedLayers
from ..gpt import GPT
from ..pair import FOLDER
from ..speculative import speculative_generate
from .base import Config, Result, Study
from .session import Session
from .speculative_figure import CAPTION, draw

GREEDY = Warper(0.0)
LENGTHS = (1, 2, 3, 4, 6, 8)
CANDIDATES = (1, 2, 3, 4)
DRAWS = 40
"""Draws of candidates for each pair of laws."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(Config):
    """What is asked; ``steps`` are the new tokens of each text.

    Args:
        target, draft: folders with config.json and model.safetensors; empty for the shipped pair.
        prompts: how many texts.
        prompt_tokens: of each.
        drafts: per round, where it is not what is varied.
        rows: pairs of laws over which candidates are compared.
    """

    target: str = ""
    draft: str = ""
    prompts: int = 3
    prompt_tokens: int = 32
    drafts: int = 6
    rows: int = 60


class TopTree:
    """A tree of a small model's most probable tokens: ``width`` below the text, then chains."""

    def __init__(self, model: GPT, width: int = 2) -> None:
        self.model, self.width = CachedModel(model), width

    def propose(self, text: Any, count: int, warper: Warper, source: Any) -> Proposal:
        """The best continuation of each of the best first tokens."""
        known = [*text]
        first = self.model.logits(known)[0]
        chains = []
        for start in np.argsort(-first, kind="stable")[: self.width]:
            chain = [int(start)]
            while len(chain) < count:
                chain.append(int(self.model.logits(known + chain)[0].argmax()))
            chains.append(chain)
        return Proposal(TokenTree.from_chains(known[-1], chains), None)


def schemes(target: GPT, draft: GPT, text: list[int]) -> dict[str, Callable[[], Any]]:
    """A fresh draft of each kind."""
    layers = target.config.n_layer
    counts = NGramModel(5, target.config.vocab_size, text)
    return {
        "small model": lambda: ModelDraft(draft),
        "small model, tree": lambda: TopTree(draft),
        "5-gram counts": lambda: NGramDraft(counts),
        "prompt lookup": lambda: PromptLookup(),
        "early exit": lambda: EarlyExit(target, max(1, layers // 4)),
        "skipped layers": lambda: SkippedLayers(target, range(1, layers, 2), range(1, layers, 2)),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def greedy_schemes(
    target: GPT, draft: GPT, prompts: list[list[int]], text: list[int], config: SpeculativeConfig
) -> dict[str, dict[str, float]]:
    """For each scheme tokens per call and time against plain decoding, at temperature 0.

    The texts are compared; one that differs from the plain one stops the study.
    """
    plain = [timed(lambda p=p: target.generate([p], config.steps, temperature=0)) for p in prompts]
    found: dict[str, dict[str, float]] = {}
    for name, make in schemes(target, draft, text).items():
        speed, calls, share = [], 0, []
        for prompt, (seconds, whole) in zip(prompts, plain, strict=True):
            one = make()
            judge = getattr(one, "target", target)  # what drafts for itself shares the cache

            def continued(prompt: Any = prompt, one: Any = one, judge: Any = judge) -> Any:
                return speculative_generate(
                    judge, one, [prompt], config.steps, count=config.drafts, warper=GREEDY
                )

            spent, run = timed(continued)
            check(name, run.texts[0], whole)
            speed.append(seconds / spent)
            calls += run.target_calls
            share.append(run.overhead)
        tokens = config.steps * len(prompts) / calls
        found[name] = {"tokens": tokens, "speed": median(speed), "overhead": mean(share)}
    speed, calls = [], 0
    for prompt, (seconds, whole) in zip(prompts, plain, strict=True):
        model = CachedModel(target)

        def looked(prompt: Any = prompt, model: Any = model) -> Any:
            source = RngSource(Rng(config.seed))
            return lookahead_decode(
                model.tree_logits, prompt, config.steps, 5, 4, 5, GREEDY, source
            )

        spent, run = timed(looked)
        check("lookahead", prompt + run, whole)
        speed.append(seconds / spent)
        calls += model.calls
    tokens = config.steps * len(prompts) / calls
    found["lookahead"] = {"tokens": tokens, "speed": median(speed), "overhead": 0.0}
    return found


def check(name: str, text: list[int], plain: Any) -> None:
    """Greedy speculation says what greedy decoding says."""
    if [*text] != plain.numpy()[0].tolist():
        raise RuntimeError(f"{name} changed the greedy text: ties of float32, or a bug")


# the formula


def by_length(
    target: GPT, draft: GPT, prompts: list[list[int]], config: SpeculativeConfig
) -> tuple[float, list[tuple[int, float, float]]]:
    """α, and for each number of drafts: tokens per call as counted, and as the formula has them.

    Texts are drawn from the models' laws as they are.  α is the mean of Σ min(p, q) over the texts
    that plain sampling of the target writes.
    """
    source = RngSource(Rng(config.seed + 1))
    overlaps = []
    for k, prompt in enumerate(prompts):
        rng = Rng(config.seed + 10 + k)
        text = target.generate([prompt], config.steps, rng=rng).numpy()[0].tolist()
        p, q = (laws_of(model, text, config.steps) for model in (target, draft))
        overlaps += [float(acceptance(a, b)) for a, b in zip(p, q, strict=True)]
    alpha = mean(overlaps)
    rows = []
    for length in LENGTHS:
        emitted = calls = 0
        for prompt in prompts:
            run = speculative_generate(
                target, draft, [prompt], config.steps, count=length, rng=source
            )
            emitted += run.counts[0].emitted
            calls += run.target_calls
        rows.append((length, emitted / calls, float(expected_tokens(alpha, length))))
    return alpha, rows


def laws_of(model: GPT, text: list[int], rows: int) -> Any:
    """The model's laws of the last ``rows`` tokens of a text, float64 on the host."""
    logits = CachedModel(model).logits(text[:-1], rows).astype("float64")
    return Warper()(logits, text[:-rows], text[len(text) - rows : -1])


# several candidates for one place


def candidates(
    target: GPT, draft: GPT, prompts: list[list[int]], config: SpeculativeConfig
) -> dict[str, list[float]]:
    """How often one of k candidates stands, by k, over laws of the two models in real text."""
    source = RngSource(Rng(config.seed + 2))
    pairs = []
    for prompt in prompts:
        p, q = (laws_of(model, prompt, len(prompt) - 1) for model in (target, draft))
        pairs += [*zip(p, q, strict=True)]
    pairs = pairs[:: max(1, len(pairs) // config.rows)][: config.rows]
    rules: dict[str, Any] = {
        "sample and match": (draw_iid, match_children),
        "with replacement": (draw_iid, multi_step),
        "k-SEQ": (draw_iid, k_seq),
        "without replacement": (draw_without_replacement, without_replacement),
    }
    found: dict[str, list[float]] = {name: [] for name in rules}
    for (name, (drawn, rule)), k in product(rules.items(), CANDIDATES):
        stood = [
            rule(drawn(q, k, source), q, p, source).child is not None
            for p, q in pairs
            for _ in range(DRAWS)
        ]
        found[name].append(float(np.mean(stood)))
    found["the most possible"] = [
        mean(optimal_acceptance(p, q, k) for p, q in pairs) for k in CANDIDATES
    ]
    return found


def run(config: SpeculativeConfig, session: Session) -> Result:
    """All three, and the figure."""
    mini_nn.tune_allocator()
    target = GPT.from_pretrained(config.target or FOLDER / "target")
    draft = GPT.from_pretrained(config.draft or FOLDER / "draft")
    train, held_out = split(corpus("shakespeare"))
    step = (len(held_out) - config.prompt_tokens) // config.prompts
    prompts = [
        [*held_out[k * step : k * step + config.prompt_tokens]] for k in range(config.prompts)
    ]
    with session.timed("greedy"):
        found = greedy_schemes(target, draft, prompts, [*train], config)
    with session.timed("formula"):
        alpha, lengths = by_length(target, draft, prompts, config)
    with session.timed("candidates"):
        several = candidates(target, draft, prompts, config)
    best = max(found, key=lambda name: found[name]["speed"])
    metrics: dict[str, float | int | str] = {
        "target_parameters": target.num_parameters(),
        "draft_parameters": draft.num_parameters(),
        "acceptance": alpha,
        "largest_error_of_the_formula": max(abs(a - b) for g, a, b in lengths if g <= 4),
        "best_scheme": best,
    }
    for name, row in found.items():
        word = name.replace(",", "").replace(" ", "_").replace("-", "_")
        metrics[f"{word}_tokens_per_call"] = row["tokens"]
        metrics[f"{word}_times_as_fast"] = row["speed"]
    return Result(
        headline=f"{best}: {found[best]['speed']:.2f} times as fast, "
        f"{found[best]['tokens']:.1f} tokens per call; alpha {alpha:.2f}",
        metrics=metrics,
        figure=draw(found, alpha, lengths, several),
        caption=CAPTION.format(**{**vars(config), **metrics}),
        series={"schemes": found, "lengths": lengths, "candidates": several},
    )


STUDY = Study(
    name="speculative",
    title="Guess ahead, and let the model judge",
    about="A model of twelve layers writes text with the help of guesses: by a small model that "
    "was distilled from it, by its own first layers, by counts, by what the text said before. "
    "Greedy text stays what it was, token by token; sampled text keeps its law. How many tokens "
    "does a call give, beside the formula, and how much time does that save?",
    quick=SpeculativeConfig(steps=60, prompts=2, rows=20),
    full=SpeculativeConfig(steps=90, prompts=8),
    run=run,
)
