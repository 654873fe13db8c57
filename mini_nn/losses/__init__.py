"""Losses that belong to a paper; those under torch's names are in ``nn.functional``."""

from .distillation import (
    OnlineBuffer,
    Rejected,
    acceptance_rate,
    before_end,
    cllm_loss,
    forward_kl,
    global_consistency,
    jensen_shannon,
    local_consistency,
    reverse_kl,
    total_variation,
)

__all__ = [
    "OnlineBuffer", "Rejected", "acceptance_rate", "before_end", "cllm_loss", "forward_kl",
    "global_consistency", "jensen_shannon", "local_consistency", "reverse_kl", "total_variation",
]  # fmt: skip
