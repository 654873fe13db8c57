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
from models.studies import Study, deformable, gpt, initialization, speculative

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
    """They stand in the section on the study in this order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition("## What came out")[2].partition("\n## ")[0]
    made = json.loads((ROOT / "docs" / "figures" / f"{study.name}.json").read_text("utf-8"))
    assert made["config"] == asdict(study.full) and made["budget"] == "full"
    start = 0
    for name in quoted:
        number = f"{made['metrics'][places.format(name)]:.2f}"
        start = section.find(number, start) + 1
        assert start, f"{name}: {number} is not where it should be"


def test_the_claims_of_the_studies_hold_in_the_runs_that_made_their_figures() -> None:
    metrics = {
        name: json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text("utf-8"))["metrics"]
        for name in ("deformable", "initialization")
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
