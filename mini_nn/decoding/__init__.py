"""Decoding: drafts of several tokens, verified in one call without changing the law of the text."""

from .multi import (
    Choice,
    NodeRule,
    deterministic_children,
    draw_iid,
    draw_without_replacement,
    greedy_children,
    k_seq,
    k_seq_rho,
    match_children,
    multi_step,
    optimal_acceptance,
    top_children,
    without_replacement,
)
from .processors import (
    Warper,
    filter_logits,
    min_p_filter,
    no_repeat_ngram,
    repetition_penalty,
    top_k_filter,
    top_p_filter,
)
from .sequoia import (
    TreeShape,
    TreeSpeed,
    best_tree,
    best_tree_size,
    expected_tokens_tree,
    positional_acceptance,
)
from .source import RngSource, Source, Verdict, accept, laws, one_hot, ratio, residual
from .speedup import (
    Acceptance,
    acceptance,
    best_gamma,
    coupling_bounds,
    expected_tokens,
    expected_tokens_chain,
    gumbel_match,
    operations,
    speedup,
)
from .tree import (
    TokenTree,
    product_choices,
    verify_tree,
    verify_tree_greedily,
)
from .verify import (
    GumbelCoupled,
    Lenient,
    Relaxed,
    Rule,
    block_verification,
    deterministic,
    greedy,
    gumbel_token,
    sample_match,
    speculative_sampling,
)

__all__ = [
    "Acceptance", "Choice", "GumbelCoupled", "Lenient", "NodeRule", "Relaxed", "RngSource",
    "Rule", "Source", "TokenTree", "TreeShape", "TreeSpeed", "Verdict", "Warper", "accept",
    "acceptance", "best_gamma", "best_tree", "best_tree_size", "block_verification",
    "coupling_bounds", "deterministic", "deterministic_children", "draw_iid",
    "draw_without_replacement", "expected_tokens", "expected_tokens_chain",
    "expected_tokens_tree", "filter_logits", "greedy", "greedy_children", "gumbel_match",
    "gumbel_token", "k_seq", "k_seq_rho", "laws", "match_children", "min_p_filter", "multi_step",
    "no_repeat_ngram", "one_hot", "operations", "optimal_acceptance", "positional_acceptance",
    "product_choices", "ratio", "repetition_penalty", "residual", "sample_match",
    "speculative_sampling", "speedup", "top_children", "top_k_filter", "top_p_filter",
    "verify_tree", "verify_tree_greedily", "without_replacement",
]  # fmt: skip
