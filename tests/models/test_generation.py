"""models.generation: filters and sampling against their definitions, cache and padding laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chi2

from mini_nn import Rng, Tensor, default_rng, io, nn
from mini_nn.decoding import TokenTree
from mini_nn.decoding.draft import PromptLookup, Proposal
from models.generation import (
    KVCache,
    filter_logits,
    min_p_filter,
    on_arrays,
    sample,
    top_k_filter,
    top_p_filter,
)
from models.gpt import GPT, GPTConfig
from tests.support import assert_close, host

GOLDEN = Path(__file__).parent.parent / "golden" / "gpt2"
TINY = GPTConfig(
    vocab_size=13, n_positions=12, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5
)
PAD = 0


def expected() -> dict[str, Any]:
    return io.load_file(GOLDEN / "expected.safetensors")


def lively(seed: int, **options: Any) -> GPT:
    """A model whose weights are large enough for its continuations to differ."""
    return GPT(replace(TINY, **options), Rng(seed)).astype("float64")


def prompts(seed: int, batch: int, count: int) -> Any:
    return Rng(seed).integers(1, TINY.vocab_size, (batch, count))


def left_padded(xp: Any, ids: Any, pads: Any) -> tuple[Any, Any]:
    """Each row moved right by its number of pads, which cuts its end off, and the mask."""
    rows = [
        [PAD] * pad + row[: len(row) - pad] for row, pad in zip(ids.tolist(), pads, strict=True)
    ]
    mask = [[0] * pad + [1] * (ids.shape[1] - pad) for pad in pads]
    return xp.asarray(rows), xp.asarray(mask)


def greedy_without_cache(model: GPT, ids: Any, steps: int) -> list[list[int]]:
    texts = host(ids).tolist()
    for _ in range(steps):
        best = host(model(texts))[:, -1].argmax(axis=-1)
        texts = [[*text, int(token)] for text, token in zip(texts, best, strict=True)]
    return texts


# Hugging Face's continuations


def test_greedy_texts_are_those_of_hugging_face(xp: Any) -> None:
    want = expected()
    model = GPT.from_pretrained(GOLDEN, "float64")
    assert_close(model.generate(want["ids"], 12, temperature=0), want["tokens"], 0, 0)
    padded = model.generate(
        want["padded.ids"], 12, temperature=0, attention_mask=want["padded.mask"]
    )
    assert_close(padded, want["padded.tokens"], 0, 0)


def test_rows_end_as_in_hugging_face(xp: Any) -> None:
    want = expected()
    model = GPT.from_pretrained(GOLDEN, "float64")
    texts = model.generate(
        want["padded.ids"],
        12,
        temperature=0,
        eos_token_id=int(want["eos"]),
        pad_token_id=0,
        attention_mask=want["padded.mask"],
    )
    assert_close(texts, want["eos.tokens"], 0, 0)


def test_filters_are_those_of_hugging_face(xp: Any) -> None:
    want = expected()
    logits = want["filter.logits"]
    assert_close(filter_logits(logits, 0.7), want["filter.temperature"], 1e-15)
    assert_close(top_k_filter(logits, 4), want["filter.top_k"], 0, 0)
    assert_close(top_p_filter(logits, 0.6), want["filter.top_p"], 0, 0)
    assert_close(min_p_filter(logits, 0.2), want["filter.min_p"], 0, 0)
    assert_close(filter_logits(logits, 0.7, 4, 0.6, 0.2), want["filter.all"], 1e-15)


# The cache


@given(seed=st.integers(0, 10_000), data=st.data())
def test_any_cut_of_a_text_through_the_cache_gives_the_logits_of_the_whole(
    xp: Any, seed: int, data: Any
) -> None:
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, TINY.n_positions))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(count - 1, 1)))) - {count})
    model, ids = lively(seed), prompts(seed, batch, count)
    pads = data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch))
    ids, mask = left_padded(xp, ids, pads)
    masked = data.draw(st.booleans())
    whole = model(ids, mask if masked else None)
    cache = model.new_cache(count)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        part_mask = (
            mask[:, start:stop] if masked and (stop - start > 1 or start < max(pads)) else None
        )
        parts.append(host(model(ids[:, start:stop], part_mask, cache)))
    seen = host(mask) == 1 if masked else np.ones((batch, count), bool)
    assert cache.length == count
    assert_close(np.concatenate(parts, axis=1)[seen], host(whole)[seen], 1e-9, 1e-9)


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), count=st.integers(1, 8))
def test_generation_with_the_cache_is_generation_without(
    xp: Any, seed: int, batch: int, count: int
) -> None:
    model, ids = lively(seed), prompts(seed, batch, count)
    texts = model.generate(ids, 4, temperature=0)
    assert host(texts).tolist() == greedy_without_cache(model, ids, 4)


@given(seed=st.integers(0, 10_000), kept=st.integers(0, 6), padded=st.booleans())
def test_a_truncated_cache_is_as_if_nothing_had_followed(
    xp: Any, seed: int, kept: int, padded: bool
) -> None:
    model = lively(seed)
    ids, mask = left_padded(xp, prompts(seed, 2, 6), [0, 3])
    cache = model.new_cache(12)
    model(ids, mask if padded else None, cache)
    cache.truncate(kept)
    assert cache.length == kept
    again = mask[:, kept:] if padded else None
    if kept < 6:
        model(ids[:, kept:], again, cache)
    whole = model(xp.concatenate([ids, ids], axis=1), xp.concatenate([mask, mask**0], axis=1))
    if not padded:
        whole = model(xp.concatenate([ids, ids], axis=1))
    assert_close(model(ids, cache=cache), whole[:, 6:], 1e-9, 1e-9)


def test_layers_may_be_filled_to_different_lengths(xp: Any) -> None:
    cache = KVCache(2, 8)
    key = Rng(0).normal((1, 2, 5, 4))
    cache.layers[0].append(key, key)
    cache.layers[1].append(key[:, :, :3], key[:, :, :3])
    cache.truncate(4)
    assert [layer.length for layer in cache.layers] == [4, 3]
    keys, values = cache.layers[1].append(key[:, :, 3:], key[:, :, 3:])
    assert_close(keys, key, 0, 0)
    assert_close(values, key, 0, 0)


def test_a_cache_refuses_what_does_not_belong_into_it(xp: Any) -> None:
    model = lively(0)
    cache = model.new_cache(4)
    with pytest.raises(ValueError, match="capacity 4 cannot hold 5"):
        model([[1] * 5], cache=cache)
    model([[1, 2]] * 3, cache=cache)
    with pytest.raises(ValueError, match=r"\(3, 2\) rows and heads in float64, got \(1, 2\)"):
        model([[1]], cache=cache)
    with pytest.raises(ValueError, match=r"got \(3, 2\) in float32"):
        GPT(TINY)([[1]] * 3, cache=cache)
    cache = model.new_cache(20)
    with pytest.raises(ValueError, match="13 tokens do not fit into the 12 positions"):
        model([[1] * 13], cache=cache)


@given(seed=st.integers(0, 10_000), kept=st.sets(st.integers(0, 6)), padded=st.booleans())
def test_selected_positions_are_as_if_the_others_had_been_hidden(
    xp: Any, seed: int, kept: set[int], padded: bool
) -> None:
    model = lively(seed)
    ids, mask = left_padded(xp, prompts(seed, 2, 7), [0, 3])
    cache = model.new_cache(12)
    model(ids, mask if padded else None, cache)
    whole = cache.fork()
    cache.select(sorted(kept))
    assert cache.length == len(kept) and whole.length == 7
    hidden = np.asarray([[[at in kept or at >= 7 for at in range(9)]] * 2] * 2)
    hidden[:, 0, 8] = False  # the first of the two new ones does not see the second
    if padded:
        hidden[:, :, :7] &= host(mask)[:, None, :] != 0
    more, places = prompts(seed + 1, 2, 2), [7, 8]
    wanted = model(more, cache=whole, positions=places, mask=hidden)
    # the cache knows by itself which of the selected positions are pads
    assert_close(model(more, cache=cache, positions=places), wanted, 1e-9, 1e-9)


def test_each_row_may_select_its_own_positions(xp: Any) -> None:
    model, ids = lively(0), prompts(0, 2, 6)
    ids, mask = left_padded(xp, ids, [0, 2])
    cache = model.new_cache(8)
    model(ids, mask, cache)
    # row 0 keeps 0, 1, 4; row 1 keeps its first two tokens, with a pad on their left
    cache.select([[0, 1, 4], [0, 2, 3]])
    assert cache.length == 3
    assert host(cache.real)[:, :3].tolist() == [[True] * 3, [False, True, True]]
    again = model([[9], [9]], cache=cache)
    rows = host(ids).tolist()
    assert_close(again[1, 0], model([[*rows[1][2:4], 9]])[0, -1], 1e-9, 1e-9)
    fresh = model.new_cache(8)
    model(ids, mask, fresh)
    sees = [[True, True, False, False, True, False, True]]
    wanted = model([[9], [9]], cache=fresh, positions=[3], mask=sees)
    assert_close(again[0], wanted[0], 1e-9, 1e-9)


def test_a_layer_selects_what_it_has(xp: Any) -> None:
    cache = KVCache(2, 8)
    key = Rng(0).normal((1, 2, 6, 4))
    cache.layers[0].append(key, key)
    cache.layers[1].append(key[:, :, :3], key[:, :, :3])
    cache.select([0, 2, 4])
    assert [layer.length for layer in cache.layers] == [3, 2]
    assert_close(cache.layers[0].keys[:, :, :3], host(key)[:, :, [0, 2, 4]], 0, 0)
    assert_close(cache.layers[1].values[:, :, :2], host(key)[:, :, [0, 2]], 0, 0)
    cache.select([])
    assert cache.length == 0
    for positions in ([0], [1, 0], [-1]):
        with pytest.raises(ValueError, match="increasing positions"):
            cache.select(positions)
    with pytest.raises(ValueError, match="rows of as many positions"):
        cache.select([[0], [0]])


def test_a_fork_goes_on_by_itself(xp: Any) -> None:
    model, ids = lively(0), prompts(0, 2, 5)
    ids, mask = left_padded(xp, ids, [0, 2])
    cache = model.new_cache(8)
    assert model.new_cache(8).fork([0, 0]).length == 0
    model(ids, mask, cache)
    copied, twice = cache.fork(), cache.fork([1, 1, 0])
    wanted = model([[3], [4]], cache=cache)  # the first goes on, the others stay
    assert (cache.length, copied.length, twice.length) == (6, 5, 5)
    assert_close(model([[3], [4]], cache=copied), wanted, 1e-12, 1e-12)
    found = model([[4], [5], [3]], cache=twice)
    assert_close(found[0], wanted[1], 1e-9, 1e-9)
    assert_close(found[2], wanted[0], 1e-9, 1e-9)


def test_a_cache_grows_without_losing_anything(xp: Any) -> None:
    model, ids = lively(0), prompts(0, 2, 5)
    ids, mask = left_padded(xp, ids, [0, 2])
    cache, roomy = model.new_cache(5), model.new_cache(12)
    for one in (cache, roomy):
        model(ids, mask, one)
    cache.reserve(3)
    with pytest.raises(ValueError, match="capacity 5 cannot hold 6"):
        model([[1], [2]], cache=cache)
    cache.reserve(7)
    assert_close(model([[1], [2]], cache=cache), model([[1], [2]], cache=roomy), 1e-12, 1e-12)


@given(seed=st.integers(0, 10_000), data=st.data())
def test_a_tree_in_one_pass_is_each_path_by_itself(xp: Any, seed: int, data: Any) -> None:
    token = st.integers(0, TINY.vocab_size - 1)
    chains = st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=4)
    model, count = lively(seed), data.draw(st.integers(1, 6))
    texts = host(prompts(seed, 2, count)).tolist()
    trees = [TokenTree.from_chains(text[-1], data.draw(chains)) for text in texts]
    nodes = min(map(len, trees))  # rows of a batch with trees of their own
    trees = [tree.subtree(range(1, nodes))[0] for tree in trees]
    start = count - 1
    cache = model.new_cache(start + nodes) if start else None
    if cache is not None:
        model([text[:-1] for text in texts], cache=cache)
    found = model(
        [[*tree.tokens] for tree in trees],
        cache=cache,
        positions=np.stack([tree.positions(start) for tree in trees]),
        mask=np.stack([tree.mask(start) for tree in trees]),
    )
    for row, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        for node in range(nodes):
            way = [*text, *(tree.tokens[step] for step in tree.path(node))]
            assert_close(found[row, node], model([way])[0, -1], 1e-9, 1e-9)
    # the twin: slots for positions, hence siblings behind one another
    if nodes > 2 and start + nodes <= TINY.n_positions:
        deep = [tree.depths.tolist() != [*range(nodes)] for tree in trees]
        cache = model.new_cache(start + nodes)
        if start:
            model([text[:-1] for text in texts], cache=cache)
        slots = model(
            [[*tree.tokens] for tree in trees],
            cache=cache,
            mask=np.stack([tree.mask(start) for tree in trees]),
        )
        for row in range(2):
            assert deep[row] == bool(abs(host(slots)[row] - host(found)[row]).max() > 1e-6)


def test_masks_and_positions_that_do_not_fit_are_refused(xp: Any) -> None:
    model = lively(0)
    with pytest.raises(ValueError, match=r"\(2, 2\) or \(b, 2, 2\), got \(2, 3\)"):
        model([[1, 2]], mask=[[1, 1, 1]] * 2)
    if xp is np:
        with pytest.raises(IndexError):
            model([[1, 2]], positions=[0, 12])
    else:  # a device does not look, and answers with nan
        assert bool(np.isnan(host(model([[1, 2]], positions=[0, 12]))[0, 1]).all())
    far = model([[1, 2]], positions=[10, 11])  # the last ones
    assert not bool((abs(host(far) - host(model([[1, 2]]))) < 1e-6).all())


def test_a_pass_with_a_cache_is_inference(xp: Any) -> None:
    model, ids = lively(0, resid_pdrop=0.5, attn_pdrop=0.5), prompts(0, 2, 5)
    logits = model(ids, cache=model.new_cache(5))
    assert logits.node is None and model.training
    assert_close(logits, model.eval()(ids), 1e-12, 1e-12)


def test_the_view_on_arrays_shares_them_and_leaves_the_module_alone(xp: Any) -> None:
    model, ids = lively(0), prompts(0, 2, 5)
    view = on_arrays(model)
    bare = view.transformer(ids)
    assert not isinstance(bare, Tensor) and isinstance(model.transformer(ids), Tensor)
    assert_close(bare, model.transformer(ids), 0, 0)
    assert view.lm_head.weight is model.lm_head.weight.data
    assert model.training and not view.training and not view.transformer.h[0].training
    model.transformer.wte.weight.data[...] = 0  # as an optimiser does it
    assert_close(view.lm_head(bare), 0.0, 0, 0)


# Padding


class UncountedPads(nn.Embedding):
    """The classic bug: positions counted from the first column, pads included."""

    def forward(self, input: Any) -> Any:
        return self.weight[: input.shape[-1]]


@given(seed=st.integers(0, 10_000), data=st.data())
def test_a_padded_row_is_continued_as_it_would_be_alone(xp: Any, seed: int, data: Any) -> None:
    pads = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    model = lively(seed)
    ids, mask = left_padded(xp, prompts(seed, len(pads), 7), pads)
    logits = model(ids, mask)
    texts = model.generate(ids, 5, temperature=0, attention_mask=mask)
    inferred = model.generate(ids, 5, temperature=0, pad_token_id=PAD)
    assert_close(inferred, texts, 0, 0)
    for row, pad in enumerate(pads):
        alone = ids[row : row + 1, pad:]
        assert_close(logits[row : row + 1, pad:], model(alone), 1e-9, 1e-9)
        text = model.generate(alone, 5, temperature=0)
        assert_close(texts[row : row + 1, pad:], text, 0, 0)


def test_padding_without_mask_or_without_positions_is_noticed(xp: Any) -> None:
    model = lively(0)
    ids, mask = left_padded(xp, prompts(0, 1, 7), [3])
    alone = host(model(ids[:, 3:]))
    assert abs(host(model(ids))[:, 3:] - alone).max() > 1e-3
    broken = UncountedPads(TINY.n_positions, TINY.n_embd)
    broken.weight = model.transformer.wpe.weight
    model.transformer.wpe = broken
    assert abs(host(model(ids, mask))[:, 3:] - alone).max() > 1e-3


def test_pads_may_lie_outside_the_vocabulary(xp: Any) -> None:
    model = lively(0)
    ids, mask = left_padded(xp, prompts(0, 2, 7), [3, 0])
    outside = xp.where(mask == 1, ids, -1)
    assert_close(model(outside, mask)[:1, 3:], model(ids, mask)[:1, 3:], 0, 0)
    want = model.generate(ids, 5, temperature=0, attention_mask=mask)
    got = model.generate(outside, 5, temperature=0, pad_token_id=-1)
    assert_close(got[:, 3:], want[:, 3:], 0, 0)


def test_only_pads_at_the_start_are_taken_for_padding(xp: Any) -> None:
    texts = xp.asarray([[PAD, PAD, row, PAD, 5, 6] for row in range(1, 13)])
    model = lively(1)
    want = model.generate(texts[:, 2:], 5, temperature=0)
    assert_close(model.generate(texts, 5, temperature=0, pad_token_id=PAD)[:, 2:], want, 0, 0)
    inner_hidden = model.generate(texts, 5, temperature=0, attention_mask=texts != PAD)
    assert host(inner_hidden)[:, 2:].tolist() != host(want).tolist()
    # a pad that is an EOS token too may be how the text starts
    plain = model.generate(texts, 1, temperature=0, eos_token_id=())
    both = model.generate(texts, 1, temperature=0, pad_token_id=PAD, eos_token_id=PAD)
    assert_close(both, plain, 0, 0)
    assert host(plain)[:, -1].tolist() != host(want)[:, 4].tolist()


def test_wrong_padding_is_refused(xp: Any) -> None:
    model = lively(0)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate([[1, 2, 3]], 1, attention_mask=[[1, 1, 0]])
    with pytest.raises(ValueError, match="drop rows that are empty"):
        model.generate([[1, 2], [PAD, PAD]], 1, pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"shape of ids, \(1, 2\), got \(2,\)"):
        model.generate([[1, 2]], 1, attention_mask=[1, 1])


# Ends


def test_a_row_that_has_ended_is_filled_and_the_last_one_ends_the_batch(xp: Any) -> None:
    model, ids = lively(3), prompts(3, 4, 3)
    free = host(model.generate(ids, 8, temperature=0)).tolist()
    eos = free[0][5]
    ends = [row.index(eos, 3) if eos in row[3:] else len(row) - 1 for row in free]
    assert len({*ends}) > 1  # the rows of this seed end at different places
    texts = host(model.generate(ids, 8, temperature=0, eos_token_id=eos, pad_token_id=99)).tolist()
    width = max(ends) + 1
    assert texts == [
        [*row[: end + 1], *[99] * (width - end - 1)] for row, end in zip(free, ends, strict=True)
    ]
    filled = host(model.generate(ids, 8, temperature=0, eos_token_id=[eos])).tolist()
    assert filled == [[eos if token == 99 else token for token in row] for row in texts]


def test_each_of_several_tokens_ends_a_row_and_the_config_may_name_them(xp: Any) -> None:
    ids = prompts(3, 1, 3)
    free = host(lively(3).generate(ids, 8, temperature=0)).tolist()[0]
    ends = [free[6], free[4]]
    stop = min(free.index(end, 3) for end in ends) + 1
    want = [free[:stop]]
    assert host(lively(3).generate(ids, 8, temperature=0, eos_token_id=ends)).tolist() == want
    model = lively(3, eos_token_id=ends)
    assert host(model.generate(ids, 8, temperature=0)).tolist() == want
    assert host(model.generate(ids, 8, temperature=0, eos_token_id=())).tolist() == [free]
    one = lively(3, eos_token_id=free[4])
    assert host(one.generate(ids, 8, temperature=0)).tolist()[0][-1] == free[4]


# Filters, against their definitions

LOGITS = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=8)
"""A coarse grid, so that ties occur."""


def survivors(filtered: Any) -> list[int]:
    return np.flatnonzero(np.isfinite(host(filtered))).tolist()


def order_of(logits: list[float]) -> list[int]:
    """Most probable first; of those that tie the lowest number first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@given(logits=LOGITS, k=st.integers(1, 9))
def test_top_k_keeps_k_and_what_ties_with_the_last_of_them(
    xp: Any, logits: list[float], k: int
) -> None:
    kept = survivors(top_k_filter(xp.asarray(logits), k))
    first = order_of(logits)[:k]
    assert {*first} <= {*kept}
    assert all(logits[i] == logits[first[-1]] for i in kept if i not in first)
    if len({*logits}) == len(logits):
        assert len(kept) == min(k, len(logits))


@given(logits=LOGITS, p=st.floats(0, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    xp: Any, logits: list[float], p: float
) -> None:
    kept = survivors(top_p_filter(xp.asarray(logits), p))
    weights = [math.exp(logit) for logit in logits]
    order = order_of(logits)
    mass = [
        math.fsum(weights[i] for i in order[:n]) / math.fsum(weights) for n in range(len(logits))
    ]
    assume(all(abs(m - p) > 1e-12 for m in mass))  # where rounding decides
    wanted = [i for i, before in zip(order, mass, strict=True) if before < p]
    assert kept == sorted(wanted or order[:1])


@given(logits=LOGITS, p=st.floats(0, 1))
def test_min_p_keeps_what_is_p_times_as_probable_as_the_best(
    xp: Any, logits: list[float], p: float
) -> None:
    best = max(logits)
    assume(all(abs(math.exp(logit - best) - p) > 1e-12 for logit in logits if logit != best))
    kept = survivors(min_p_filter(xp.asarray(logits), p))
    assert kept == [i for i, x in enumerate(logits) if x == best or math.exp(x - best) >= p]


def test_filters_at_their_edges(xp: Any) -> None:
    logits = xp.asarray([[1.0, 3.0, 3.0, -2.0], [0.0, -200.0, float("-inf"), 0.5]], dtype="float32")
    assert survivors(top_p_filter(logits, 0)[0]) == [1]
    assert survivors(top_k_filter(logits, 1)[0]) == [1, 2]
    assert survivors(min_p_filter(logits, 1)[0]) == [1, 2]
    # two halves: the first alone reaches one half
    halves = xp.asarray([0.0, 0.0])
    assert survivors(top_p_filter(halves, 0.5)) == [0]
    assert survivors(top_p_filter(halves, 0.5 + 1e-9)) == [0, 1]
    for all_kept in (top_p_filter(logits, 1), min_p_filter(logits, 0), top_k_filter(logits, 4)):
        assert_close(all_kept, logits, 0, 0)
    for name in (top_k_filter, top_p_filter, min_p_filter):
        assert name(logits, 1).dtype == "float32"
    for broken, value in ((top_k_filter, 0), (top_p_filter, 1.1), (min_p_filter, -0.1)):
        with pytest.raises(ValueError, match=broken.__name__.removesuffix("_filter")):
            broken(logits, value)
    with pytest.raises(ValueError, match="temperature"):
        filter_logits(logits, 0)


def test_filters_of_tensors_pass_gradients_to_what_is_kept(xp: Any) -> None:
    x = Tensor(xp.asarray([0.0, 1.0, 2.0, 3.0]), requires_grad=True)
    for filtered in (top_k_filter(x, 2), top_p_filter(x, 0.8), min_p_filter(x, 0.3)):
        x.grad = None
        filtered[2:].sum().backward()
        assert survivors(filtered) == [2, 3]
        assert_close(x.grad, xp.asarray([0.0, 0.0, 1.0, 1.0]), 0, 0)


def test_filters_follow_one_another_in_hugging_faces_order(xp: Any) -> None:
    logits = xp.asarray([2.0, 1.5, 1.0, 0.0, -1.0])
    chain = min_p_filter(top_p_filter(top_k_filter(logits / 0.5, 4), 0.86), 0.1)
    assert_close(filter_logits(logits, 0.5, 4, 0.86, 0.1), chain, 0, 0)
    late_temperature = min_p_filter(top_p_filter(top_k_filter(logits, 4), 0.86), 0.1) / 0.5
    late_top_k = top_k_filter(min_p_filter(top_p_filter(logits / 0.5, 0.86), 0.1), 4)
    assert survivors(late_temperature) != survivors(chain)
    assert survivors(chain) == survivors(late_top_k) == [0, 1]
    # top-p counts the mass of what top-k has left: here 2 of 5 equal ones are 2/3 of 3
    equal = xp.asarray([4.0, 3.9, 3.8, 3.7, 3.6])
    assert survivors(filter_logits(equal, 1, 3, 0.6)) == [0, 1]
    assert survivors(top_k_filter(top_p_filter(equal, 0.6), 3)) == [0, 1, 2]


# Sampling


def pearson(counts: Any, law: Any) -> float:
    """The χ² statistic of counts against probabilities."""
    want = law * counts.sum()
    return float(((counts - want) ** 2 / want).sum())


def test_a_sample_is_the_largest_logit_plus_gumbel_noise(xp: Any) -> None:
    logits = Rng(0).normal((5, 7), dtype="float64")
    noise = Rng(1).gumbel((5, 7), dtype="float64")
    assert_close(sample(logits, Rng(1)), (logits + noise).argmax(axis=-1), 0, 0)


def test_texts_are_drawn_by_the_product_of_the_filtered_laws(xp: Any) -> None:
    model = lively(2, vocab_size=4, initializer_range=0.3)
    options = {"temperature": 0.8, "top_k": 3, "top_p": 0.95, "min_p": 0.05}
    prompt = [1, 2]

    def law_of(texts: list[list[int]], **filters: Any) -> Any:
        logits = host(filter_logits(model(texts)[:, -1], **filters))
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def joint(**filters: Any) -> Any:
        first = law_of([prompt], **filters)[0]
        second = law_of([[*prompt, token] for token in range(4)], **filters)
        return first[:, None] * second

    draws = 20_000
    texts = host(model.generate([prompt] * draws, 2, rng=Rng(0), **options))
    counts = np.zeros((4, 4))
    np.add.at(counts, (texts[:, 2], texts[:, 3]), 1)
    law = joint(**options)
    assert counts[law == 0].sum() == 0 and (law == 0).any()
    bound = chi2.isf(1e-6, (law > 0).sum() - 1)  # the rate of false alarms
    assert pearson(counts[law > 0], law[law > 0]) < bound
    warm = joint(**options | {"temperature": 1.0})  # the twin: the temperature forgotten
    both = (law > 0) & (warm > 0)
    assert pearson(counts[both], warm[both] / warm[both].sum()) > 5 * bound


def test_temperature_0_is_the_limit_and_draws_nothing(xp: Any) -> None:
    model, ids = lively(4), prompts(4, 3, 4)
    greedy = model.generate(ids, 6, temperature=0)
    assert_close(model.generate(ids, 6, temperature=1e-6, rng=Rng(0)), greedy, 0, 0)
    rng = Rng(5)
    before = rng.state_dict()
    model.generate(ids, 6, temperature=0, top_k=3, rng=rng)
    assert rng.state_dict() == before
    assert_close(model.generate(ids, 6, temperature=5.0, top_k=1, rng=rng), greedy, 0, 0)


def test_one_seed_gives_one_text(xp: Any) -> None:
    model, ids = lively(6), prompts(6, 8, 2)
    texts = [host(model.generate(ids, 8, rng=Rng(seed))).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    state = default_rng().state_dict()
    first = model.generate(ids, 8)
    default_rng().load_state_dict(state)
    assert_close(model.generate(ids, 8), first, 0, 0)
    product_of_rows = {tuple(row) for row in texts[0]}
    assert len(product_of_rows) == 8  # rows draw independently


# Drafts


class Repeat:
    """The last token again: a draft of any backend, which is right now and then."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def propose(self, text: Any, count: int, warper: Any, source: Any) -> Proposal:
        self.asked.append(count)
        return Proposal([text[-1]] * count, None)


@given(seed=st.integers(0, 10_000), data=st.data())
def test_greedy_texts_with_a_draft_are_those_without(xp: Any, seed: int, data: Any) -> None:
    pads = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    model = lively(seed)
    ids, mask = left_padded(xp, prompts(seed, len(pads), 5), pads)
    ends = data.draw(st.lists(st.integers(0, 12), max_size=3))
    options: dict[str, Any] = {
        "temperature": 0,
        "eos_token_id": ends,
        "pad_token_id": data.draw(st.sampled_from([None, -1, 3])),
        "attention_mask": mask,
    }
    new, count = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 4))
    wanted = model.generate(ids, new, **options)
    for draft in (PromptLookup(2), [Repeat() for _ in pads]):
        found = model.generate(ids, new, draft=draft, draft_tokens=count, **options)
        assert found.dtype == "int64"
        assert_close(found, wanted, 0, 0)


def test_drafts_leave_the_law_of_sampled_texts(xp: Any) -> None:
    model = lively(2, vocab_size=4, initializer_range=0.3)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 3, "min_p": 0.05}
    logits = host(filter_logits(model([[1, 2]])[:, -1], 0.8, 3, None, 0.05))[0]
    first = np.exp(logits - logits.max())
    rest = host(filter_logits(model([[1, 2, x] for x in range(4)])[:, -1], 0.8, 3, None, 0.05))
    second = np.exp(rest - rest.max(axis=-1, keepdims=True))
    wanted = (first / first.sum())[:, None] * second / second.sum(axis=-1, keepdims=True)
    texts = host(model.generate([[1, 2]] * 2000, 2, rng=Rng(0), draft=Repeat(), **options))
    counts = np.zeros((4, 4))
    np.add.at(counts, (texts[:, 2], texts[:, 3]), 1)
    assert counts[wanted == 0].sum() == 0
    bound = chi2.isf(1e-6, (wanted > 0).sum() - 1)  # the rate of false alarms
    assert pearson(counts[wanted > 0], wanted[wanted > 0]) < bound


def test_a_draft_is_asked_for_as_many_as_are_wanted(xp: Any) -> None:
    draft = Repeat()
    lively(0).generate([[1, 2]], 6, temperature=0, draft=draft, draft_tokens=2)
    assert draft.asked and max(draft.asked) == 2
    with pytest.raises(ValueError, match="2 texts have a draft each"):
        lively(0).generate([[1], [2]], 6, draft=[draft])


# The door


def test_the_prompt_comes_first_and_is_left_alone(xp: Any) -> None:
    model = lively(0)
    ids = xp.asarray([[1, 2, 3]], dtype="uint8")
    texts = model.generate(ids, 4, temperature=0)
    assert isinstance(texts, Tensor) and texts.dtype == "int64" and texts.shape == (1, 7)
    assert ids.tolist() == [[1, 2, 3]] == host(texts)[:, :3].tolist()
    for same in ([[1, 2, 3]], Tensor([[1, 2, 3]])):
        assert_close(model.generate(same, 4, temperature=0), texts, 0, 0)
    assert host(model.generate(ids, 0)).tolist() == [[1, 2, 3]]
    assert model.generate(ids, 9).shape == (1, 12)  # as many as there are positions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 10}, "3 tokens and 10 new ones do not fit into the 12 positions"),
        ({"max_new_tokens": -1}, "max_new_tokens between 0 and 9"),
        ({"temperature": -0.5}, "temperature is at least 0"),
        ({"top_k": 0}, "top_k keeps at least 1"),
        ({"top_p": 2.0}, "top_p is between 0 and 1"),
        ({"min_p": -1.0}, "min_p is between 0 and 1"),
        ({"ids": [1, 2, 3]}, r"shape \(3,\)"),
        ({"ids": [[]]}, "at least 1 token"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"ids": [[1, 2, 3]], "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        lively(0).generate(**request)


def test_all_texts_of_two_tokens_are_reached(xp: Any) -> None:
    model = lively(0, vocab_size=3, initializer_range=0.02)  # close to uniform: 1/9 each
    texts = host(model.generate([[0]] * 400, 2, rng=Rng(0)))[:, 1:]
    # the chance that one of 9 texts is missing among 400: 9 (8/9)^400 < 1e-19
    assert {tuple(text) for text in texts.tolist()} == {*product(range(3), repeat=2)}
