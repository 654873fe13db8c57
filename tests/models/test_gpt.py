"""GPT-2 against Hugging Face's own numbers, and the laws of a causal language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mini_nn
from mini_nn import Rng, nn, ops
from mini_nn.nn import functional as F
from mini_nn.nn.residual import pre_norm
from mini_nn.optim import AdamW
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

FOLDER = Path(__file__).parents[1] / "golden" / "gpt2"
WANTED = load_file(FOLDER / "expected.safetensors")
TINY = GPTConfig(vocab_size=17, n_positions=12, n_embd=8, n_layer=2, n_head=2)
RELEASED = {  # config.json of the four checkpoints, and what their papers and cards count
    (12, 768, 12): 124_439_808,
    (24, 1024, 16): 354_823_168,
    (36, 1280, 20): 774_030_080,
    (48, 1600, 25): 1_557_611_200,
}


def tiny(seed: int = 0, dtype: str = "float64", scale: float = 8.0, **parts: Any) -> GPT:
    """An untrained model with weights large enough that every part matters."""
    model = GPT(TINY, Rng(seed), **parts).astype(dtype)
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= scale
    return model.eval()


def tokens(seed: int, batch: int, count: int) -> Any:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, count))


# Hugging Face's numbers


def test_logits_and_gradients_are_hugging_faces(xp: Any) -> None:
    model = GPT.from_pretrained(FOLDER, dtype="float64")
    logits = model(WANTED["ids"])
    assert_close(logits, WANTED["logits"], rtol=1e-9, atol=1e-10)
    targets = WANTED["ids"][:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, 61), targets)
    assert_close(loss, WANTED["loss"], rtol=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            assert_close(parameter.grad, WANTED[f"grad.{name}"], rtol=1e-8, atol=1e-11)


def test_float32_logits_are_hugging_faces(xp: Any) -> None:
    logits = GPT.from_pretrained(FOLDER)(WANTED["ids"])
    assert logits.dtype == "float32"
    assert_close(logits, WANTED["logits32"], rtol=1e-3, atol=1e-4)


def test_left_padding_is_hugging_faces(xp: Any) -> None:
    model = GPT.from_pretrained(FOLDER, dtype="float64")
    real = WANTED["padded.mask"].astype(bool)
    logits = host(model(WANTED["padded.ids"], xp.asarray(WANTED["padded.mask"])))
    assert_close(logits[real], WANTED["padded.logits"][real], rtol=1e-9, atol=1e-10)


def test_the_state_dict_has_the_names_of_the_released_checkpoints(xp: Any) -> None:
    stored = load_file(FOLDER / "model.safetensors")
    state = GPT.from_pretrained(FOLDER).state_dict()
    assert state.keys() - {"lm_head.weight"} == stored.keys()
    for name, array in stored.items():
        assert_close(state[name], array, rtol=0, atol=0)


def test_shards_and_the_first_releases_names_load_alike(xp: Any, tmp_path: Path) -> None:
    whole = GPT.from_pretrained(FOLDER).state_dict()
    old = {
        name.removeprefix("transformer."): value
        for name, value in load_file(FOLDER / "model.safetensors").items()
    }
    mask = np.tril(np.ones((1, 1, 24, 24), np.float32))
    old |= {f"h.{i}.attn.bias": mask for i in range(2)}
    save_file(old, tmp_path / "model.safetensors")
    shutil.copy(FOLDER / "config.json", tmp_path)
    for folder in (FOLDER / "sharded", tmp_path):
        for name, array in GPT.from_pretrained(folder).state_dict().items():
            assert_close(array, whole[name], rtol=0, atol=0)


def test_saved_models_come_back_bit_for_bit(xp: Any, tmp_path: Path) -> None:
    model = tiny(dtype="float32")
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == TINY
    assert again.lm_head.weight is again.transformer.wte.weight
    for name, array in model.state_dict().items():
        assert_close(again.state_dict()[name], array, rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["model_type"] == "gpt2" and config["n_embd"] == 8


def test_what_cannot_be_loaded_is_named(xp: Any, tmp_path: Path) -> None:
    shutil.copy(FOLDER / "config.json", tmp_path)
    stored = load_file(FOLDER / "model.safetensors")
    stored["transformer.h.0.extra"] = stored.pop("transformer.ln_f.weight")
    stored["transformer.wpe.weight"] = np.zeros((3, 16), np.float32)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    for name in ("transformer.h.0.extra", "transformer.ln_f.weight", "transformer.wpe.weight"):
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_an_option_that_is_not_supported_is_refused() -> None:
    options = {**TINY.to_dict(), "scale_attn_by_inverse_layer_idx": True}
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        GPTConfig.from_dict(options)
    with pytest.raises(ValueError, match="no multiple"):
        GPTConfig(n_embd=10, n_head=4)
    assert GPTConfig.from_dict({**TINY.to_dict(), "unheard_of": 3}) == TINY


@pytest.mark.parametrize("sizes", RELEASED)
def test_the_count_of_parameters_is_that_of_the_released_models(sizes: Any) -> None:
    layers, width, heads = sizes
    config = GPTConfig(50257, 1024, width, layers, heads)
    assert config.num_parameters == RELEASED[sizes]


def test_the_count_of_parameters_is_the_number_that_there_are(xp: Any) -> None:
    for tied in (True, False):
        config = GPTConfig(17, 12, 8, 2, 2, tie_word_embeddings=tied)
        model = GPT(config, Rng(0))
        assert sum(p.size for p in model.parameters()) == config.num_parameters


# Initialisation (Radford et al. 2019, section 2.3)


def test_initial_weights_follow_the_paper(xp: Any) -> None:
    layers = 8
    model = GPT(GPTConfig(400, 64, 64, layers, 4), Rng(0))
    for name, parameter in model.named_parameters():
        values = host(parameter)
        if name.endswith(".bias"):
            assert (values == 0).all()
        elif ".ln_" in name:
            assert (values == 1).all()
        else:
            std = 0.02 / np.sqrt(2 * layers) if "c_proj" in name else 0.02
            error = std / np.sqrt(2 * values.size)  # of a sample's standard deviation
            assert abs(values.std() - std) < 6 * error and abs(values.mean()) < 6 * std / np.sqrt(
                values.size
            )


# Laws


def test_no_token_sees_a_later_one(xp: Any) -> None:
    model, ids = tiny(), tokens(0, 1, 9)
    before = host(model(ids))
    for j in range(9):
        other = ids.copy()
        other[0, j] = (other[0, j] + 1) % TINY.vocab_size
        change = np.abs(host(model(other)) - before).max(axis=(0, 2))
        assert (change[:j] < 1e-12).all()
        assert (change[j:] > 1e-9).all()  # and all later ones do see it


def test_attention_that_sees_the_future_is_caught(xp: Any) -> None:
    def both_ways(query: Any, key: Any, value: Any, is_causal: bool = False) -> Any:
        return ops.scaled_dot_product_attention(query, key, value)

    blocks = [Block(TINY, Rng(i), attention=both_ways) for i in range(2)]
    model, ids = tiny(blocks=blocks), tokens(0, 1, 9)
    other = ids.copy()
    other[0, 8] = (other[0, 8] + 1) % TINY.vocab_size
    assert np.abs(host(model(other)) - host(model(ids)))[:, :8].max() > 1e-9


def test_tied_weights_share_their_gradient(xp: Any) -> None:
    ids = tokens(1, 2, 6)
    tied = tiny()
    loose = GPT(GPTConfig(**{**TINY.__dict__, "tie_word_embeddings": False}), Rng(0)).astype(
        "float64"
    )
    loose.load_state_dict(tied.state_dict())
    for model in (tied, loose):
        F.cross_entropy(model(ids[:, :-1]).reshape(-1, 17), ids[:, 1:].reshape(-1)).backward()
    apart = loose.transformer.wte.weight.grad + loose.lm_head.weight.grad
    assert_close(tied.transformer.wte.weight.grad, apart)
    assert len([*loose.parameters()]) == len([*tied.parameters()]) + 1


def test_blocks_take_other_parts(xp: Any) -> None:
    """A branch that is switched off leaves the residual stream as it is."""

    def off(x: Any, norm: Any, branch: Any, *context: Any) -> Any:
        return x

    plain = tiny(blocks=[Block(TINY, Rng(0), residuals=(off, off)) for _ in range(2)])
    ids = tokens(2, 1, 5)
    stream = plain.transformer.wte(ids) + plain.transformer.wpe.weight[:5]
    assert_close(plain(ids), plain.lm_head(plain.transformer.ln_f(stream)))
    same = tiny(blocks=[Block(TINY, Rng(0), residuals=(pre_norm, pre_norm)) for _ in range(2)])
    assert np.abs(host(same(ids)) - host(plain(ids))).max() > 1e-6
    with pytest.raises(ValueError, match="n_layer is 2, got 1"):
        GPT(TINY, Rng(0), [Block(TINY, Rng(0))])


def test_norms_are_replaced_or_left_out(xp: Any) -> None:
    """Norms of ones and zeros after a branch-free stream; without them, the bare stream."""

    def off(x: Any, norm: Any, branch: Any, *context: Any) -> Any:
        return norm(x)

    def build(norm: Any) -> GPT:
        blocks = [Block(TINY, Rng(i), residuals=(off, off), norm=norm) for i in range(2)]
        return tiny(blocks=blocks, norm=norm)

    ids = tokens(5, 1, 5)
    bare = build(nn.Identity)
    stream = bare.transformer.wte(ids) + bare.transformer.wpe.weight[:5]
    assert_close(bare(ids), bare.lm_head(stream))
    assert not [name for name in bare.state_dict() if ".ln_" in name]
    rms = build(lambda: nn.RMSNorm(8, elementwise_affine=False))
    x = host(stream) / np.sqrt((host(stream) ** 2).mean(axis=-1, keepdims=True))
    assert_close(rms(ids), rms.lm_head(xp.asarray(x)), rtol=1e-9)
    assert len([name for name in tiny().state_dict() if ".ln_" in name]) == 2 * 5


def test_dropped_attention_is_attention_in_the_mean(xp: Any) -> None:
    config = GPTConfig(17, 12, 8, 2, 2, attn_pdrop=0.5)
    model = GPT(config, Rng(0)).astype("float64")
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 8.0
    ids = tokens(3, 1, 6)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    assert_close(model.eval()(ids), plain(ids))
    assert np.abs(host(model.train()(ids)) - host(plain(ids))).max() > 1e-6
    assert isinstance(model.transformer.h[0].attn.attention.dropout, nn.Dropout)


def test_it_learns_a_text_by_heart(xp: Any) -> None:
    model = GPT(TINY, Rng(0))
    ids = tokens(4, 4, 12)
    optimizer = AdamW(model.parameters(), lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).reshape(-1, 17), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(17), rel=0.05)  # it starts without an opinion
    assert losses[-1] < 0.35


def test_mistakes_are_named(xp: Any) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="13 tokens do not fit into the 12 positions"):
        model(tokens(0, 1, 13))
    with pytest.raises(ValueError, match="shape"):
        model([1, 2, 3])
    with pytest.raises(TypeError, match="integers"):
        model([[1.0, 2.0]])
    with pytest.raises(ValueError, match="attention_mask"):
        model([[1, 2]], xp.ones((1, 3)))


def test_it_runs_without_a_tape_on_request(xp: Any) -> None:
    with mini_nn.no_grad():
        assert tiny()(tokens(0, 1, 4)).node is None
