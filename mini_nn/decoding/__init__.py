"""Decoding: drafts of several tokens, verified in one call without changing the law of the text."""

from .cascade import Fallback, Rollback, Router, StagedDraft, Timed, pearl
from .draft import (
    Draft,
    NGramDraft,
    NGramModel,
    NoDraft,
    PromptLookup,
    Proposal,
    Rows,
    draw_chain,
)
from .jacobi import (
    JacobiRun,
    Lookahead,
    NGramPool,
    TreeRows,
    Window,
    jacobi_decode,
    jacobi_iterate,
    lookahead_decode,
    rows_by_paths,
    tree_laws,
)
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
from .retrieval import Datastore, RetrievalDraft, suffix_array
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
    "Acceptance", "Choice", "Datastore", "Draft", "Fallback", "GumbelCoupled", "JacobiRun",
    "Lenient", "Lookahead", "NGramDraft", "NGramModel", "NGramPool", "NoDraft", "NodeRule",
    "PromptLookup", "Proposal", "Relaxed", "RetrievalDraft", "RngSource", "Rollback", "Router",
    "Rows", "Rule", "Source", "StagedDraft", "Timed", "TokenTree", "TreeRows", "TreeShape",
    "TreeSpeed", "Verdict", "Warper", "Window", "accept", "acceptance", "best_gamma",
    "best_tree", "best_tree_size", "block_verification", "coupling_bounds", "deterministic",
    "deterministic_children", "draw_chain", "draw_iid", "draw_without_replacement",
    "expected_tokens", "expected_tokens_chain", "expected_tokens_tree", "filter_logits",
    "greedy", "greedy_children", "gumbel_match", "gumbel_token", "jacobi_decode",
    "jacobi_iterate", "k_seq", "k_seq_rho", "laws", "lookahead_decode", "match_children",
    "min_p_filter", "multi_step", "no_repeat_ngram", "one_hot", "operations",
    "optimal_acceptance", "pearl", "positional_acceptance", "product_choices", "ratio",
    "repetition_penalty", "residual", "rows_by_paths", "sample_match", "speculative_sampling",
    "speedup", "suffix_array", "top_children", "top_k_filter", "top_p_filter", "tree_laws",
    "verify_tree", "verify_tree_greedily", "without_replacement",
]  # fmt: skip
