"""Any attention of the room in the place of GPT-2's: with a cache of keys, with its own state."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from mini_nn import Rng, no_grad
from mini_nn import attention as A
from mini_nn.engine import data_of
from models.gpt import GPT, Block, GPTConfig
from models.recurrent import Mixer, RecurrentGPT, SelfAttention
from tests.attention.methods import CAUSAL, NEED_ALL_TOKENS, D
from tests.support import assert_close

TINY = GPTConfig(
    vocab_size=11, n_positions=20, n_embd=2 * D, n_layer=2, n_head=2, initializer_range=0.3
)


def text() -> Any:
    return Rng(60).integers(0, 11, (2, 13))


@pytest.mark.parametrize("name", sorted({*CAUSAL} - NEED_ALL_TOKENS))
def test_one_token_after_the_other_with_a_cache_of_keys(xp: Any, name: str) -> None:
    attention = CAUSAL[name]
    rng = Rng(0)
    model = GPT(TINY, rng, [Block(TINY, rng, attention) for _ in range(2)]).astype("float64")
    ids = text()
    with no_grad():
        whole = data_of(model(ids))
    cache = model.new_cache(13)
    parts = [data_of(model(ids[:, t : t + 1], cache=cache)) for t in range(13)]
    assert_close(xp.concatenate(parts, axis=1), whole, rtol=1e-7, atol=1e-8)


WITH_STATE: dict[str, Any] = {
    "softmax": A.softmax_attention,
    "in blocks": A.blockwise_attention,
    "top-k": partial(A.topk_attention, k=3),
    "Taylor": A.taylor_attention,
    "generalized": partial(A.generalized_attention, similarity=A.gaussian_similarity),
    "local": partial(A.local_attention, window=3),
    "atrous": partial(A.atrous_attention, dilation=3),
    "strided": partial(A.strided_attention, window=2, stride=3),
    "fixed": partial(A.fixed_attention, block=4),
    "linear": A.linear_attention,
    "unnormalized": A.unnormalized_attention,
    "efficient": A.causal_efficient_attention,
    "TransNormer": A.norm_attention,
    "retention": A.retention,
    "delta rule": partial(A.delta_rule, beta=0.1),
    "gated delta rule": partial(A.gated_delta_rule, beta=0.1, log_decay=-0.1),
    "Comba": partial(A.comba, beta=0.1, log_decay=-0.1),
    "mesa": A.mesa,
    "exp features": A.exponential_attention,
    "DeltaFormer": A.deltaformer,
}


def continues(xp: Any, mixer: Mixer) -> None:
    """In three parts, of which one is a single token, a text gets the logits that it gets whole."""
    model, ids = RecurrentGPT(TINY, mixer, Rng(0)).astype("float64").eval(), text()
    with no_grad():
        whole = data_of(model(ids))
    cache = model.new_cache(13)
    parts = [data_of(model(ids[:, a:b], cache=cache)) for a, b in ((0, 5), (5, 6), (6, 13))]
    assert_close(xp.concatenate(parts, axis=1), whole, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_text_in_three_parts_with_a_state(xp: Any, name: str) -> None:
    def mixer(config: GPTConfig, rng: Rng) -> SelfAttention:
        return SelfAttention(config, rng, WITH_STATE[name])

    continues(xp, mixer)


@pytest.mark.parametrize("layer", [A.DeltaNet, A.GatedDeltaNet])
def test_a_layer_of_its_own_with_a_state(xp: Any, layer: Any) -> None:
    def mixer(config: GPTConfig, rng: Rng) -> Any:
        return layer(config.n_embd, config.n_head, rng=rng)

    continues(xp, mixer)


def test_the_performers_layer_with_a_state(xp: Any) -> None:
    def mixer(config: GPTConfig, rng: Rng) -> SelfAttention:
        return SelfAttention(config, rng, A.PerformerAttention(D, rng=rng))

    continues(xp, mixer)


@pytest.mark.parametrize("attention", [A.linear_attention, partial(A.local_attention, window=3)])
def test_pads_are_refused_where_nothing_can_hide_them(xp: Any, attention: Any) -> None:
    rng = Rng(0)
    model = GPT(TINY, rng, [Block(TINY, rng, attention) for _ in range(2)])
    mask = xp.asarray([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="takes no attn_mask"):
        model.generate(text()[:, :3], 2, attention_mask=mask)
    cache = model.new_cache(13)
    model(text()[:, :5], cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(text()[:, 5:8], cache=cache)
    softmax = [Block(TINY, rng, A.softmax_attention) for _ in range(2)]
    assert GPT(TINY, rng, softmax).generate(text()[:, :3], 2, attention_mask=mask).shape == (2, 5)
