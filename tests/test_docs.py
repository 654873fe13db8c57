"""Prose is code: every fence of the documentation runs, and prints what it says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import mini_nn
from models.gpt import GPT
from models.studies import (
    Study,
    deformable,
    gpt,
    initialization,
    linear_attention,
    performer,
    speculative,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = ELLIPSIS | NORMALIZE_WHITESPACE
RUNNABLE = {"python": "run here", "bash": "run by .ci/run", "text": "a drawing"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_fence_runs(page: Path) -> None:
    parser = PythonCodeBlockParser(doctest_optionflags=OPTIONS)
    with mini_nn.using("numpy"):  # the pages speak of NumPy, whatever the backend under test
        for example in Sybil([parser]).parse(page).examples():
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_of_a_kind_that_something_runs(page: Path) -> None:
    fences = re.findall(r"^\s*```(\w*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= RUNNABLE.keys()


def test_a_wrong_result_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n", encoding="utf-8")
    parser = PythonCodeBlockParser(doctest_optionflags=OPTIONS)
    (example,) = Sybil([parser]).parse(page).examples()
    with pytest.raises(Exception, match="Expected"):
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_numbers_of_the_gpt_page_are_those_of_the_run_that_made_its_figure() -> None:
    page = (ROOT / "docs" / "gpt.md").read_text(encoding="utf-8")
    made = json.loads((ROOT / "docs" / "figures" / "gpt.json").read_text(encoding="utf-8"))
    assert made["config"] == asdict(gpt.STUDY.full) and made["budget"] == "full"
    metrics = made["metrics"]
    model = GPT(gpt.STUDY.full.sizes(), mini_nn.Rng(0))
    assert metrics["parameters"] == model.num_parameters() and f"{metrics['parameters']:,}" in page
    quoted = {"validation": "**{:.2f}**", "gzip": "gzip ({:.2f})", "LZMA": "LZMA ({:.2f})"}
    for name, text in {**quoted, "bzip2": "bzip2 ({:.2f})"}.items():
        assert text.format(metrics[f"{name}_bits_per_character"]) in page


@pytest.mark.parametrize(
    ("page", "study", "quoted", "places"),
    [
        (
            "01-initialization.md",
            initialization.STUDY,
            ["post_norm", "unigram", "post_norm_warm_up", "pre_norm", "deepnorm", "rezero"],
            "{}_bits_per_character",
        ),
        (
            "03-linear-attention.md",
            linear_attention.STUDY,
            [
                *(f"{kind}_time_exponent" for kind in ("softmax_in_blocks", "linear_in_chunks")),
                *(
                    f"{kind}_milliseconds_at_16384:,.0f"
                    for kind in ("softmax_in_blocks", "linear_in_chunks")
                ),
                *(
                    f"{kind}_mebibytes_at_16384:.0f"
                    for kind in ("softmax_in_blocks", "linear_in_chunks")
                ),
                *(f"linear_error_of_{n}_written_pairs" for n in (32, 128)),
                *(f"theory_linear_error_of_{n}_pairs" for n in (32, 128)),
                *(f"delta_rule_error_of_{n}_written_pairs" for n in (32, 128)),
                "mesa_error_of_128_written_pairs",
                "elu_plus_1_error_of_32_written_pairs",
                "softmax_error_of_32_written_pairs",
                "delta_rule_error_of_32_rewritten_pairs",
                "mesa_error_of_32_rewritten_pairs",
                *(
                    f"{kind}_bits_per_character"
                    for kind in ("softmax", "elu_plus_1", "performer", "gated_delta", "bigram")
                ),
                *(
                    f"{kind}_milliseconds_of_a_token_after_4096:.1f"
                    for kind in ("softmax", "elu_plus_1", "performer", "gated_delta")
                ),
            ],
            "{}",
        ),
        (
            "07-performer.md",
            performer.STUDY,
            [
                *(
                    f"{kind}_median_measured_over_theory"
                    for kind in ("trigonometric", "positive", "hyperbolic", "positive_orthogonal")
                ),
                "positive_independent_exponent_at_0_25",
                "positive_orthogonal_exponent_at_0_25",
                "positive_orthogonal_exponent_at_1",
                "positive_orthogonal_error_of_64_at_1:.1f",
                "positive_orthogonal_error_of_1024_at_1:.1f",
                "trigonometric_orthogonal_error_of_64_at_0_25",
                "positive_orthogonal_error_of_64_at_0_25",
                "trigonometric_orthogonal_error_of_64_at_1:.0f",
                "orthogonal_at_8",
                "raw_qr_u_positive_at_8",
                "raw_qr_u_negative_at_8",
                "raw_qr_u_positive_at_64",
                "raw_qr_u_negative_at_64",
                *(
                    f"{law}_at_8"
                    for law in ("all_of_length_root_d", "quantiles", "midpoints", "jittered")
                ),
                "one_maximum_of_all_keys_leak",
                "tokens_from_which_it_is_faster:,.0f",
                "tokens_from_which_it_is_faster_causal:,.0f",
            ],
            "{}",
        ),
        (
            "09-speculative-decoding.md",
            speculative.STUDY,
            [
                "acceptance",
                "largest_error_of_the_formula",
                "small_model_times_as_fast",
                "small_model_tokens_per_call",
                "prompt_lookup_times_as_fast",
                "small_model_tree_tokens_per_call",
                "early_exit_times_as_fast",
                "skipped_layers_times_as_fast",
            ],
            "{}",
        ),
        (
            "12-deformable-convolution.md",
            deformable.STUDY,
            [
                "conv_disc_accuracy",
                "conv_disc_accuracy_at_6",
                *(f"{kind}_disc_accuracy" for kind in ("dcn_v1", "dcn_v2", "attention")),
                *(
                    f"{kind}_rank_correlation_of_dilation_and_radius"
                    for kind in ("dcn_v1", "dcn_v2")
                ),
                *(
                    f"{kind}_{what}"
                    for what in ("nucleus_overlap", "edge_overlap")
                    for kind in ("conv", "dcn_v1", "dcn_v2")
                ),
            ],
            "{}",
        ),
    ],
)
def test_the_numbers_of_an_article_are_those_of_the_run_that_made_its_figure(
    page: str, study: Study, quoted: list[str], places: str
) -> None:
    """They stand in the section on the study in this order, to two places if nothing is said."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition("## What came out")[2].partition("\n## ")[0]
    made = json.loads((ROOT / "docs" / "figures" / f"{study.name}.json").read_text("utf-8"))
    assert made["config"] == asdict(study.full) and made["budget"] == "full"
    start = 0
    for metric in quoted:
        name, _, digits = metric.partition(":")
        number = format(made["metrics"][places.format(name)], digits or ".2f")
        start = section.find(number, start) + 1
        assert start, f"{name}: {number} is not where it should be"


def test_the_claims_of_the_studies_hold_in_the_runs_that_made_their_figures() -> None:
    metrics = {
        name: json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text("utf-8"))["metrics"]
        for name in ("deformable", "initialization", "linear_attention", "performer")
    }
    discs = metrics["deformable"]
    for kind in ("dcn_v1", "dcn_v2", "attention"):
        assert discs[f"{kind}_disc_accuracy"] > discs["conv_disc_accuracy"] + 0.1
        assert discs[f"{kind}_parameters"] <= discs["conv_parameters"]
    bits = metrics["initialization"]
    unigram = bits["unigram_bits_per_character"]
    assert bits["post_norm_bits_per_character"] > unigram - 0.1
    for arm in ("post_norm_warm_up", "pre_norm", "deepnorm", "rezero"):
        assert bits[f"{arm}_bits_per_character"] < unigram - 0.5
    linear = metrics["linear_attention"]
    assert linear["linear_in_chunks_time_exponent"] <= 1.1
    assert linear["softmax_in_blocks_time_exponent"] > 1.7
    assert linear["softmax_dense_memory_exponent"] > 1.7
    for n in (32, 128):
        error = linear[f"linear_error_of_{n}_written_pairs"]
        assert abs(error / linear[f"theory_linear_error_of_{n}_pairs"] - 1) < 0.05
        assert linear[f"delta_rule_error_of_{n}_written_pairs"] < error
    rewritten = [linear[f"{k}_error_of_32_rewritten_pairs"] for k in ("delta_rule", "mesa")]
    assert rewritten[0] < rewritten[1] < linear["linear_error_of_32_rewritten_pairs"]
    assert linear["mesa_error_of_64_written_pairs"] < 0.02
    assert linear["softmax_16_error_of_128_written_pairs"] < 0.001
    later = [linear[f"{k}_error_of_64_rewritten_pairs"] for k in ("softmax_16", "mesa")]
    assert max(later) < linear["delta_rule_error_of_64_rewritten_pairs"]
    assert linear["softmax_rank"] == linear["elu_plus_1_causal_rank"] == 200
    assert linear["elu_plus_1_rank"] == linear["double_softmax_rank"] == 8
    assert linear["1_plus_cosine_rank"] == 9
    extra = linear["gated_delta_parameters"] / linear["softmax_parameters"] - 1
    assert 0.07 < extra < 0.09
    random = metrics["performer"]
    for kind in ("trigonometric", "positive", "hyperbolic", "positive_orthogonal"):
        assert abs(random[f"{kind}_median_measured_over_theory"] - 1) < 0.1
    assert random["running_maximum_leak"] == 0.0 < 0.5 < random["one_maximum_of_all_keys_leak"]
    assert abs(random["orthogonal_at_8"] - 1) < 0.03
