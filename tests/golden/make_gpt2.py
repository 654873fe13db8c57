"""Makes tests/golden/gpt2: a tiny random GPT-2 as Hugging Face writes it, and what it computes.

    pip install torch transformers safetensors
    python tests/golden/make_gpt2.py

``config.json``, ``model.safetensors`` and ``sharded/`` are the work of ``save_pretrained``.
``expected.safetensors`` holds logits, gradients, greedy continuations and filtered logits; its
metadata names the versions that made it.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

FOLDER = Path(__file__).parent / "gpt2"
NEW_TOKENS = 12


def make_model() -> Any:
    """Weights far larger than those of training, so that greedy texts differ and do not loop."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "bias" in name:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise if "ln_" in name else noise / 2)
    return model


def left_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows shifted right by their number of pads (token 0), and the mask of what is not a pad."""
    width = ids.shape[1]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, pad in enumerate(pads):
        padded[row, pad:] = ids[row, : width - pad]
        mask[row, pad:] = 1
    return padded, mask


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def filtered() -> dict[str, torch.Tensor]:
    """Logits through each of the filters alone and through all of them in generate's order."""
    logits = 2 * torch.randn(5, 23, dtype=torch.float64)
    logits[0, 3] = logits[0, 4] = logits[0].max() + 1  # a tie at the top
    logits[1] = torch.where(torch.arange(23) == 7, 30.0, logits[1])  # one token has all the mass
    warpers = {
        "temperature": TemperatureLogitsWarper(0.7),
        "top_k": TopKLogitsWarper(4),
        "top_p": TopPLogitsWarper(0.6),
        "min_p": MinPLogitsWarper(0.2),
    }
    chain = logits
    for warper in warpers.values():
        chain = warper(None, chain)
    alone = {f"filter.{name}": warper(None, logits) for name, warper in warpers.items()}
    return {"filter.logits": logits, **alone, "filter.all": chain}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = make_model()
    model.save_pretrained(FOLDER)
    model.save_pretrained(FOLDER / "sharded", max_shard_size="16KB")
    for extra in FOLDER.rglob("generation_config.json"):
        extra.unlink()

    ids = torch.randint(1, 61, (3, 9))
    padded, mask = left_padded(ids, [0, 2, 5])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits32 = model(ids).logits.detach()
    model.double()
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 61), ids[:, 1:].reshape(-1))
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        tokens = greedy(model, ids, torch.ones_like(ids))
        padded_logits = model(padded, attention_mask=mask, position_ids=positions).logits
        padded_tokens = greedy(model, padded, mask)
        eos = int(padded_tokens[1, 9 + 4])
        eos_tokens = greedy(model, padded, mask, eos_token_id=eos)
    expected = {
        "ids": ids,
        "logits": logits.detach(),
        "logits32": logits32,
        "loss": loss.detach(),
        "tokens": tokens,
        "padded.ids": padded,
        "padded.mask": mask,
        "padded.logits": padded_logits,
        "padded.tokens": padded_tokens,
        "eos": torch.tensor(eos),
        "eos.tokens": eos_tokens,
        **gradients,
        **filtered(),
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "made_by": "tests/golden/make_gpt2.py",
    }
    plain = {name: value.contiguous() for name, value in expected.items()}
    save_file(plain, FOLDER / "expected.safetensors", metadata=versions)
    for written in FOLDER.rglob("*.safetensors"):
        written.chmod(0o644)


if __name__ == "__main__":
    main()
