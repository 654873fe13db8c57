"""Drafts with a model: a small GPT that guesses what a large one will say.

Leviathan, Kalman & Matias 2022, 2211.17192, algorithm 1, lines 1–4; C. Chen et al. 2023,
2302.01318.

Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from mini_nn.decoding import Source, Warper
from mini_nn.decoding.draft import Proposal, draw_chain

from .cached import CachedModel
from .gpt import GPT

__all__ = ["ModelDraft"]


class ModelDraft:
    """A GPT with the target's vocabulary, which draws one token after the other.

    Its cache is that of the text it was asked about last; asked about another one, it keeps what
    the two have in common, so a rejected draft costs nothing but the rows that were wrong.

    Args:
        model: shared, not copied.

    Attributes:
        model: a ``CachedModel``, which counts calls and seconds.
    """

    def __init__(self, model: GPT) -> None:
        self.model = CachedModel(model)

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As ``Draft``: ``count`` tokens, each drawn from its row of q; fewer at the last position.

        At temperature 0 they are the model's greedy choices, and q is one-hot.
        """
        room = self.model.model.config.n_positions - len(text) + 1
        return draw_chain(self.model.logits, text, max(min(count, room), 0), warper, source)
