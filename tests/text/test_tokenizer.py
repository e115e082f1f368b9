"""The tokenizer against tiktoken's own definition, and the fast way against the plain one."""

import socket

import numpy as np
import pytest
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from text import tokenizer
from text.errors import DataError
from text.tokenizer import END_OF_TEXT, encode, encode_documents


def test_tokenizer_is_the_published_one(monkeypatch):
    monkeypatch.setattr(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda url, expected_hash: load_tiktoken_bpe(str(tokenizer.RANKS_PATH), expected_hash),
    )
    published = tiktoken_ext.openai_public.r50k_base()
    ours = tokenizer.load_encoding()

    assert ours._mergeable_ranks == published["mergeable_ranks"]
    assert ours._pat_str == published["pat_str"]
    assert ours._special_tokens == published["special_tokens"]
    assert ours.n_vocab == published["explicit_n_vocab"] == tokenizer.VOCABULARY_SIZE
    assert encode("Hello world").tolist() == [15496, 995]


def test_tokenizer_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the tokenizer asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    tokenizer.load_encoding.cache_clear()

    assert tokenizer.load_encoding().decode([15496, 995]) == "Hello world"


def test_cache_of_tiktoken_is_not_needed(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    tokenizer.load_encoding.cache_clear()

    assert encode("Hello world").tolist() == [15496, 995]


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"])
def test_damaged_ranks_are_refused(monkeypatch, tmp_path, content):
    path = tmp_path / "ranks"
    monkeypatch.setattr(tokenizer, "RANKS_PATH", path)
    tokenizer.load_encoding.cache_clear()

    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError, match="ranks is missing or damaged"):
        tokenizer.load_encoding()

    monkeypatch.undo()
    tokenizer.load_encoding.cache_clear()


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("a <|endoftext|> b", "a <|endoftext|> b"),
        ("naïve 日本語 👩‍🚀\r\n\t", "naïve 日本語 👩‍🚀\r\n\t"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("", ""),
    ],
)
def test_any_text_is_text(text, decoded):
    tokens = encode(text)

    assert tokens.dtype == np.dtype("<u2")
    assert END_OF_TEXT not in tokens
    assert tokenizer.load_encoding().decode(tokens.tolist()) == decoded


# What the cuts between pieces depend on, often, and anything else.
CHARACTERS = st.one_of(
    st.sampled_from(list("  \n\t\r\x0b\x85\xa0\u2003\u3000\x1c\u200b''stdmlvreSTDa019.,!_-")),
    st.sampled_from(["'s", "'ll", "'ve", "'re", " 's", "\n't", "''d", "é", "日", "٣", "½", "👩‍🚀"]),
    st.sampled_from(["<|endoftext|>", "\ud800", "\U0010ffff", "\u0378", "\U00031350", "\u0300"]),
    st.characters(),
)
DOCUMENTS = st.lists(
    st.lists(CHARACTERS, min_size=1, max_size=40).map("".join), min_size=1, max_size=8
)


def tokens_of_tiktoken(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (*encode(text).tolist(), END_OF_TEXT)]


@settings(max_examples=1000, deadline=None)
@given(DOCUMENTS)
def test_documents_become_the_tokens_of_tiktoken(texts):
    tokens = encode_documents(texts)

    assert tokens.dtype == np.dtype("<u2")
    assert tokens.tolist() == tokens_of_tiktoken(texts)


def test_every_character_is_of_the_kind_that_tiktoken_sees():
    # Between letters and digits a mistake in the kind of a character moves a cut.
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = [
        "".join(f"a{chr(point)}a 1{chr(point)}" for point in points[first : first + 4096])
        for first in range(0, len(points), 4096)
        if first < 0x20000 or first % (8 * 4096) == 0
    ]

    assert encode_documents(texts).tolist() == tokens_of_tiktoken(texts)


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6, "word " * (2 * 10**6), "\n'" * 10**5, "é" * 10**5]
)
def test_long_documents(text):
    assert encode_documents([text]).tolist() == tokens_of_tiktoken([text])
