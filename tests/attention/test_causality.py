"""One perturbation test for every attention: what can be causal passes it, what cannot fails it.

A token's key, value and query are changed.  In a causal attention no output before it moves, and
no gradient of an output before it reaches it; in one that looks at the whole sequence they do.
"""

from __future__ import annotations

from typing import Any

import pytest

from mini_nn import Rng, Tensor, grad
from tests.attention.methods import CAUSAL, NEED_ALL_TOKENS, WHOLE, D, perturbed
from tests.support import assert_close, host

PLACES = (1, 8, 16)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("t", PLACES)
def test_no_output_before_a_changed_token_moves(xp: Any, name: str, t: int) -> None:
    earlier, later = perturbed(CAUSAL[name], True, t)
    assert earlier.max() < 1e-12
    assert later[0] > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_no_gradient_reaches_a_later_token(xp: Any, name: str) -> None:
    arrays = [x * 0.7 for x in Rng(56).normal((3, 17, D), dtype="float64")]
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = CAUSAL[name](*leaves, is_causal=True)
    found = grad(y[:9].sum(), leaves, materialize_grads=True)
    for part in found:
        assert (host(part)[9:] == 0).all()
    assert max(abs(host(part)[:9]).max() for part in found) > 0


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("t", PLACES)
def test_what_looks_at_everything_is_seen_to(xp: Any, name: str, t: int) -> None:
    """The negative twins: the same test, which they fail; so they refuse to be called causal."""
    earlier, _ = perturbed(WHOLE[name], False, t)
    assert earlier.max() > 1e-6
    with pytest.raises(ValueError, match="causal"):
        perturbed(WHOLE[name], True, t)


@pytest.mark.parametrize("name", ["softmax", "linear, ELU + 1", "FAVOR+", "local", "top-k"])
def test_without_the_mask_the_same_attention_fails(xp: Any, name: str) -> None:
    """So the test can tell: what passes it passes because of ``is_causal``."""
    earlier, _ = perturbed(CAUSAL[name], False, 8)
    assert earlier.max() > 1e-3


@pytest.mark.parametrize("name", sorted({*CAUSAL} - NEED_ALL_TOKENS))
def test_the_last_token_alone_is_the_last_row(xp: Any, name: str) -> None:
    """What a decoder with a cache of keys and values asks: one query, all keys, no mask."""
    arrays = [x * 0.7 for x in Rng(57).normal((3, 17, D), dtype="float64")]
    whole = CAUSAL[name](*arrays, is_causal=True)
    last = CAUSAL[name](arrays[0][-1:], arrays[1], arrays[2], is_causal=False)
    assert_close(last, whole[-1:], rtol=1e-8, atol=1e-9)
