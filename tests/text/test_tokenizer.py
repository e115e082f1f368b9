"""The tokenizers against tiktoken's own definition, and gigatoken's ids against tiktoken's."""

import functools
import pickle
import re
import socket
import sys

import numpy as np
import pytest
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from vocabularies import END_OF_TEXT, encode, own_tokenizer

from text import tokenizer
from text.blocks import arrow_strings
from text.errors import DataError
from text.tokenizer import MAX_SIZE, Tokenizer, format_ranks, gpt2_tokenizer, load_tokenizer
from text.vocabulary import merge


def test_tokenizer_is_the_published_one(monkeypatch):
    monkeypatch.setattr(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda url, expected_hash: load_tiktoken_bpe(str(tokenizer.RANKS_PATH), expected_hash),
    )
    published = tiktoken_ext.openai_public.r50k_base()
    ours = gpt2_tokenizer()

    assert ours.tokens == published["mergeable_ranks"]
    assert ours.tiktoken._pat_str == published["pat_str"]
    assert {"<|endoftext|>": ours.end_of_text} == published["special_tokens"]
    assert ours.vocabulary_size == published["explicit_n_vocab"] == tokenizer.GPT2_SIZE
    assert ours.encoding == published["name"]
    assert encode("Hello world").tolist() == [15496, 995]


def test_tokenizer_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the tokenizer asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    gpt2_tokenizer.cache_clear()

    assert gpt2_tokenizer().decode([15496, 995]) == "Hello world"


def test_cache_of_tiktoken_is_not_needed(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    gpt2_tokenizer.cache_clear()

    assert gpt2_tokenizer().encode("Hello world").tolist() == [15496, 995]


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"])
def test_damaged_ranks_are_refused(monkeypatch, tmp_path, content):
    path = tmp_path / "ranks"
    monkeypatch.setattr(tokenizer, "RANKS_PATH", path)
    gpt2_tokenizer.cache_clear()

    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError, match="ranks is missing or damaged"):
        gpt2_tokenizer()

    monkeypatch.undo()
    gpt2_tokenizer.cache_clear()


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
    assert gpt2_tokenizer().decode(tokens) == decoded


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


@functools.cache
def tokenizer_of_cuts() -> Tokenizer:
    """Return a vocabulary in which a cut at a wrong place gives other tokens."""
    blanks = [" " * n + "\n" * m + "\t" * n for n in range(4) for m in range(4)]
    words = ["a", "A1", "123456", "'LL", "'s", "!!\r\n", "é", "日本", "\u3000", "._.\n\n"]
    text = "".join(first + word + second for first in blanks for word in words for second in blanks)
    return Tokenizer(format_ranks(merge(iter([text, *blanks]), 500)))


TOKENIZERS = pytest.mark.parametrize("make", [gpt2_tokenizer, tokenizer_of_cuts])


def assert_same_as_tiktoken(ours: Tokenizer, texts: list[str]) -> None:
    documents = ours.encode_documents(arrow_strings(texts))

    assert ours.gigatoken is not None
    assert [document.dtype for document in documents] == [np.dtype("<u2")] * len(texts)
    assert [document.tolist() for document in documents] == [
        ours.encode(text).tolist() for text in texts
    ]


@TOKENIZERS
@settings(max_examples=1000, deadline=None)
@given(texts=DOCUMENTS)
def test_documents_become_the_tokens_of_tiktoken(make, texts):
    assert_same_as_tiktoken(make(), texts)


@TOKENIZERS
def test_every_character_gives_the_tokens_of_tiktoken(make):
    # Between letters, digits and blanks a mistake in the kind of a character moves a cut.
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]

    for first in range(0, len(characters), 1 << 16):
        some = characters[first : first + (1 << 16)]
        assert_same_as_tiktoken(make(), [f"a{c}b {c}{c}'s 1{c}2\n{c}'s" for c in some])


LONG = {
    "letters": "a" * 10**6,
    "blanks": " " * 10**6,
    "blanks in front of a word": " " * 10**6 + "x\n\n  y",
    "line ends": "\n" * 10**6,
    "digits": "7" * 10**6,
    "words": "word " * (2 * 10**6),
    "apostrophes": "\n'" * 10**5,
    "accents": "é" * 10**5,
}


@TOKENIZERS
@pytest.mark.parametrize("name", LONG)
def test_long_documents(make, name):
    assert_same_as_tiktoken(make(), [LONG[name], "", "the next"])


@TOKENIZERS
@settings(max_examples=300, deadline=None)
@given(text=st.text(CHARACTERS.filter(lambda c: len(c) == 1 and not "\ud800" <= c < "\ue000")))
def test_pieces_are_found_without_tiktokens_pattern(make, text):
    assert make().encode_pieces(text + "x").tolist() == make().encode(text + "x").tolist()


def test_no_documents_are_none():
    assert own_tokenizer().encode_documents(arrow_strings([])) == []


def test_without_gigatoken_tiktoken_tokenizes(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    ours = Tokenizer(own_tokenizer().ranks)

    [tokens] = ours.encode_documents(arrow_strings(["its own\n\nwords"]))

    assert ours.gigatoken is None
    assert tokens.tolist() == own_tokenizer().encode("its own\n\nwords").tolist()


def test_a_vocabulary_is_known_by_its_ranks():
    own = own_tokenizer()
    again = pickle.loads(pickle.dumps(own))

    assert re.fullmatch(r"bpe-300-[0-9a-f]{12}", own.encoding)
    assert (own.vocabulary_size, own.end_of_text, own.token_sizes[-1]) == (300, 299, 0)
    assert load_tokenizer(own.encoding, own.ranks).tokens == again.tokens == own.tokens
    assert again.encoding == own.encoding
    assert sum(own.token_sizes[own.encode("é of its own")]) == len("é of its own".encode())


def damaged_rank(ranks: str) -> str:
    return ranks.replace(" 270\n", " 271\n")


@pytest.mark.parametrize(
    ("encoding", "damage", "message"),
    [
        ("cl100k_base", str, "its vocabulary is cl100k_base, r50k_base or one of this project"),
        (7, str, "its vocabulary is 7"),
        (None, lambda _: None, "bpe-300-.* is missing"),
        (None, lambda _: b"IQ== 0", "bpe-300-.* is missing"),
        (None, lambda _: "IQ== 0\n", "tokens are missing"),
        (None, lambda _: "", "tokens are missing"),
        (None, lambda ranks: ranks[:-3], "tokens are missing|a token and a rank a line"),
        (None, lambda ranks: "?" + ranks, "not a token and a rank a line"),
        (None, damaged_rank, "tokens are missing"),
        (None, lambda ranks: ranks + "YWJjZGVm 299\n", "its digest is another one"),
        (
            None,
            lambda _: format_ranks(
                {n.to_bytes(2, "big"): n + 256 for n in range(MAX_SIZE)}
                | {bytes([n]): n for n in range(256)}
            ),
            "65,536 at most",
        ),
    ],
)
def test_a_damaged_vocabulary_is_refused(encoding, damage, message):
    own = own_tokenizer()

    with pytest.raises(DataError, match=message):
        load_tokenizer(encoding or own.encoding, damage(own.ranks))
