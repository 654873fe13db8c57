"""models.recurrent: what is carried on is all that is needed, and it does not grow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, no_grad
from mini_nn.attention import linear_attention, retention
from mini_nn.engine import data_of
from models.gpt import GPT, GPTConfig
from models.recurrent import RecurrentGPT, SelfAttention, TextState, _arrays
from tests.support import assert_close, host

TINY = GPTConfig(
    vocab_size=13, n_positions=24, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5
)
ATTENTIONS = {"linear": linear_attention, "retention": retention}


def model(name: str, seed: int = 0) -> RecurrentGPT:
    def mixer(config: GPTConfig, rng: Rng) -> SelfAttention:
        return SelfAttention(config, rng, ATTENTIONS[name])

    return RecurrentGPT(TINY, mixer, Rng(seed)).astype("float64")


def text(count: int, batch: int = 2) -> Any:
    return Rng(count).integers(0, TINY.vocab_size, (batch, count))


@pytest.mark.parametrize("name", ATTENTIONS)
@given(cuts=st.sets(st.integers(1, 19)))
def test_a_text_in_parts_is_the_text(xp: Any, name: str, cuts: set[int]) -> None:
    gpt, ids = model(name), text(20)
    whole = data_of(gpt(ids))
    cache, parts = gpt.new_cache(20), []
    places = [0, *sorted(cuts), 20]
    for start, stop in pairwise(places):
        parts.append(data_of(gpt(ids[:, start:stop], cache=cache)))
        assert cache.length == stop
    assert_close(xp.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_generation_is_the_loop_without_a_cache(xp: Any, name: str) -> None:
    gpt, ids = model(name), text(5)
    want = ids
    with no_grad():
        for _ in range(12):
            token = data_of(gpt(want))[:, -1].argmax(axis=-1)
            want = xp.concatenate([want, token[:, None]], axis=1)
    got = data_of(gpt.generate(ids, 12, temperature=0, eos_token_id=[]))
    assert (host(got) == host(want)).all()
    assert len({*host(want)[0, 5:].tolist()}) > 2  # the model says something


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_is_carried_does_not_grow(xp: Any, name: str) -> None:
    gpt, ids = model(name), text(24)
    cache, sizes = gpt.new_cache(24), []
    for t in range(24):
        gpt(ids[:, t : t + 1], cache=cache)
        sizes.append([[x.size for x in _arrays(layer.state)] for layer in cache.layers])
    assert sizes[0] == sizes[-1] and sizes[0][0]


def test_copies_go_on_by_themselves(xp: Any) -> None:
    gpt, ids = model("linear"), text(9, batch=3)
    cache = gpt.new_cache(12)
    gpt(ids[:, :6], cache=cache)
    rows = cache.fork([2, 0])
    again = cache.fork()
    mine = gpt(ids[:, 6:], cache=cache)
    assert (cache.length, rows.length, again.length) == (9, 6, 6)
    assert_close(gpt(ids[:, 6:], cache=again), mine)
    assert_close(gpt(ids[:, 6:][xp.asarray([2, 0])], cache=rows), mine[xp.asarray([2, 0])])
    cache.reserve(20)
    assert cache.layers[0].capacity == 20 and cache.length == 9


def test_a_cache_has_an_end(xp: Any) -> None:
    gpt, cache = model("linear"), TextState(2, 4)
    gpt(text(4), cache=cache)
    with pytest.raises(ValueError, match="capacity 4 cannot hold 5"):
        gpt(text(1), cache=cache)


def test_what_a_state_cannot_do_is_refused(xp: Any) -> None:
    gpt, ids = model("linear"), text(6)
    cache = gpt.new_cache(12)
    gpt(ids, cache=cache)
    cache.truncate(6)
    with pytest.raises(ValueError, match="from 6 tokens to 5"):
        cache.truncate(5)
    cache.select(range(6))
    for order in ([0, 2, 5], [1, 0, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="choose among the tokens"):
            cache.select(order)
    with pytest.raises(TypeError, match="use a KVCache"):
        cache.layers[0].append(xp.zeros((1, 1, 1, 1)), xp.zeros((1, 1, 1, 1)))
    mask = xp.ones((2, 6))
    assert_close(gpt(ids, mask), gpt(ids))
    for wrong in (mask[:, :5], xp.ones((2, 7)), mask[:1]):
        with pytest.raises(ValueError, match="attention_mask has the shape of ids"):
            gpt(ids, wrong)
    mask[0, 0] = 0
    for call in (lambda: gpt(ids, mask), lambda: gpt(ids, mask, cache)):
        with pytest.raises(ValueError, match="pads cannot be hidden"):
            call()
    with pytest.raises(ValueError, match="pads cannot be hidden"):
        gpt.generate(ids, 2, attention_mask=mask)
    with pytest.raises(ValueError, match="a mask cannot hide any"):
        gpt(ids, mask=xp.ones((6, 6)))


def test_names_are_those_of_gpt(xp: Any) -> None:
    """So a checkpoint of softmax attention can be gone on with."""
    names = {name.replace(".attn.mixer.", ".attn.") for name in model("linear").state_dict()}
    assert names == {*GPT(TINY).state_dict()}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_refused_call_leaves_the_cache_as_it_was(xp: Any, name: str) -> None:
    gpt, ids = model(name), text(9)
    cache = gpt.new_cache(12)
    gpt(ids[:, :3], cache=cache)
    with pytest.raises(ValueError):
        gpt(xp.concatenate([ids, ids], axis=0)[:, 3:5], cache=cache)  # another batch
    assert [layer.length for layer in cache.layers] == [3, 3]
    assert_close(gpt(ids[:, 3:], cache=cache), data_of(gpt(ids))[:, 3:], rtol=1e-9, atol=1e-10)


def test_dropout_is_behind_the_branch_and_not_on_pairs(xp: Any) -> None:
    config = replace(TINY, resid_pdrop=0.5)
    layer = SelfAttention(config, Rng(0), linear_attention)
    x = Rng(1).normal((1, 4, 8))
    first = host(layer(x))
    dropped = (first == 0).mean()
    assert 0.1 < dropped < 0.9 and (host(layer(x)) != first).any()
    assert (host(layer.eval()(x)) != 0).all()
    assert_close(layer(x), layer(x))
    with pytest.raises(ValueError, match=r"set attn_pdrop to 0, got 0\.1"):
        RecurrentGPT(replace(TINY, attn_pdrop=0.1), lambda c, r: SelfAttention(c, r))


def test_the_default_seed_is_0(xp: Any) -> None:
    def mixer(config: GPTConfig, rng: Rng) -> SelfAttention:
        return SelfAttention(config, rng, linear_attention)

    given, default = (RecurrentGPT(TINY, mixer, *rng).state_dict() for rng in ((Rng(0),), ()))
    for name, array in given.items():
        assert_close(default[name], array, rtol=0.0, atol=1e-300)
