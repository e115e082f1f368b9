"""The tokenizers that tests use: GPT-2's, and small ones of their own."""

import functools

from text.tokenizer import Tokenizer, format_ranks, gpt2_tokenizer
from text.vocabulary import merge

GPT2_TOKENIZER = gpt2_tokenizer()
END_OF_TEXT = GPT2_TOKENIZER.end_of_text
encode = GPT2_TOKENIZER.encode
decode = GPT2_TOKENIZER.decode


@functools.cache
def own_tokenizer(size: int = 300) -> Tokenizer:
    """Return a tokenizer with a vocabulary of its own."""
    text = "a small vocabulary of its own, \n\n  of words that\r\n  come again: its own words, its"
    return Tokenizer(format_ranks(merge(iter([text]), size - 1)))
