"""Turns text into token ids and back, by GPT-2's vocabulary or by one of your own.

Both are byte-level BPE: a pattern cuts text into pieces, and within a piece the pair of tokens
whose union has the lowest rank is merged first (Sennrich et al. 2016). End-of-text has the last id.
"""

import base64
import binascii
import contextlib
import functools
import hashlib
import re
import resource
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tiktoken

from text.errors import DataError, without_surrogates

TOKEN_TYPE = np.dtype("<u2")

# GPT-2's vocabulary, and its size with end-of-text.
GPT2 = "r50k_base"
GPT2_SIZE = 50257
RANKS_PATH = Path(__file__).parent.parent / "assets" / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# gigatoken remembers words without end: a process that grows by so many bytes begins anew.
MAX_GROWTH = 300 << 20

# Token files have ids of 16 bits.
MAX_SIZE = 65_536
# The encoding of such a vocabulary: its size, and a digest of its ranks.
OWN_ENCODING = r"bpe-(\d+)-[0-9a-f]{12}"

# GPT-2's pattern (Radford et al. 2019), as tiktoken writes it. A line end and the indentation
# behind it are one piece, and brackets stand apart from names.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Letters and numbers that came with Unicode 17: gigatoken 0.10 knows them, tiktoken 0.14 does not.
NEW_LETTERS = (
    r"["
    r"\x{88F}\x{C5C}\x{CDC}\x{A7CE}-\x{A7CF}\x{A7D2}\x{A7D4}\x{A7F1}\x{10940}-\x{10959}"
    r"\x{10EC5}-\x{10EC7}\x{11DB0}-\x{11DDB}\x{11DE0}-\x{11DE9}\x{16EA0}-\x{16EB8}"
    r"\x{16EBB}-\x{16ED3}\x{16FF2}-\x{16FF6}\x{187F8}-\x{187FF}\x{18D09}-\x{18D1E}"
    r"\x{18D80}-\x{18DF2}\x{1E6C0}-\x{1E6DE}\x{1E6E0}-\x{1E6E2}\x{1E6E4}-\x{1E6E5}"
    r"\x{1E6E7}-\x{1E6ED}\x{1E6F0}-\x{1E6F4}\x{1E6FE}-\x{1E6FF}\x{2B73A}-\x{2B73F}"
    r"\x{2CEA2}-\x{2CEAD}\x{323B0}-\x{33479}"
    r"]"
)
# The bytes that they begin with in UTF-8.
NEW_LETTERS_LEADS = (0xE0, 0xEA, 0xF0)


class Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        ranks: the tokens but end-of-text, a line each: the bytes in base 64, a space, the rank.

    Attributes:
        encoding: the name of the vocabulary; token files and checkpoints are told apart by it.
        vocabulary_size: the number of tokens, end-of-text included.
        end_of_text: the id of the token behind every document, the last one.

    Raises:
        DataError: when the ranks are not those of a vocabulary.
    """

    def __init__(self, ranks: str):
        self.ranks = ranks
        self.tokens = parse_ranks(ranks)
        digest = hashlib.sha256(ranks.encode()).hexdigest()
        self.end_of_text = len(self.tokens)
        self.vocabulary_size = len(self.tokens) + 1
        self.is_own = digest != RANKS_SHA256
        self.encoding = f"bpe-{self.vocabulary_size}-{digest[:12]}" if self.is_own else GPT2

    def __reduce__(self):
        return Tokenizer, (self.ranks,)

    @functools.cached_property
    def tiktoken(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.encoding,
            pat_str=PIECES,
            mergeable_ranks=self.tokens,
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    @functools.cached_property
    def gigatoken(self):
        """The same tokenizer in gigatoken, many times as fast; None where it is not installed."""
        try:
            import gigatoken
        except ImportError:
            return None

        self.memory_before = memory_in_use()
        # It reads nothing but files.
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(self.ranks)
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, "r50k", {})

    @functools.cached_property
    def token_sizes(self) -> np.ndarray:
        """How many bytes of text each token stands for, int64 (V); end-of-text for none."""
        return np.array([*map(len, sorted(self.tokens, key=self.tokens.__getitem__)), 0])

    def encode(self, text: str) -> np.ndarray:
        """Tokenize text as it stands: a literal <|endoftext|> in it is text like any other.

        Returns:
            Token ids, uint16 (T).
        """
        try:
            tokens = self.tiktoken.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        except ValueError:
            return self.encode_pieces(text)

        return tokens.astype(TOKEN_TYPE)

    def encode_pieces(self, text: str) -> np.ndarray:
        """Tokenize text whose pieces tiktoken fails to find, as behind half a million blanks."""
        import regex

        # As in tiktoken, \s is exactly what Unicode calls white space.
        pattern = PIECES.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        pieces = regex.findall(pattern, text)
        tokens = [self.tiktoken._encode_single_piece(piece) for piece in pieces]
        return np.concatenate(tokens).astype(TOKEN_TYPE)

    def encode_documents(self, texts) -> list[np.ndarray]:
        """Tokenize documents by gigatoken, or by tiktoken where there is none.

        Args:
            texts: pyarrow.LargeStringArray without nulls.

        Returns:
            The token ids of each document, uint16 (T), without end-of-text.
        """
        if self.gigatoken is None:
            return [self.encode(text) for text in texts.to_pylist()]

        import awkward

        ragged = self.gigatoken.encode_batch(as_awkward(texts), parallel=False)
        ends = np.cumsum(np.asarray(awkward.num(ragged)))
        tokens = np.asarray(awkward.flatten(ragged)).astype(TOKEN_TYPE)
        documents = np.split(tokens, ends)[:-1]
        if memory_in_use() > self.memory_before + MAX_GROWTH:
            del self.gigatoken

        for number in with_new_letters(texts):
            documents[number] = self.encode(texts[number].as_py())

        return documents

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn token ids back into text; bytes that are no character become U+FFFD."""
        return self.tiktoken.decode([int(token) for token in tokens])

    def decode_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, which may be a part of a character."""
        return self.tiktoken.decode_single_token_bytes(token)


def parse_ranks(ranks: str) -> dict[bytes, int]:
    """Return the tokens with their ranks.

    Raises:
        DataError: unless every byte is a token, and the ranks are 0, 1, 2 and so on.
    """
    try:
        pairs = map(str.split, ranks.splitlines())
        tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise DataError("the vocabulary is damaged: not a token and a rank a line") from error

    is_whole = len(tokens) == ranks.count("\n") and [*tokens.values()] == [*range(len(tokens))]
    if not is_whole or not all(bytes([value]) in tokens for value in range(256)):
        raise DataError("the vocabulary is damaged: tokens are missing")

    if len(tokens) >= MAX_SIZE:
        raise DataError(f"the vocabulary has {len(tokens) + 1:,} tokens, {MAX_SIZE:,} at most fit")

    return tokens


def format_ranks(tokens: Mapping[bytes, int]) -> str:
    """Return tokens and their ranks as Tokenizer reads them."""
    ordered = sorted(tokens, key=tokens.__getitem__)
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(ordered))


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """Load the tokenizer of GPT-2 from the ranks that this repository carries; nothing is fetched.

    Raises:
        DataError: when the file of ranks is missing or is not the published one.
    """
    content = RANKS_PATH.read_bytes() if RANKS_PATH.is_file() else b""
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise DataError(f"{RANKS_PATH} is missing or damaged; restore it with git.")

    return Tokenizer(content.decode())


def load_tokenizer(encoding: object, ranks: object) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    Args:
        encoding: its name there.
        ranks: what it carries of its vocabulary; None for GPT-2's.

    Raises:
        DataError: when the two do not belong together, or the name is none of this project.
    """
    if encoding == GPT2:
        return gpt2_tokenizer()

    if not isinstance(encoding, str) or not re.fullmatch(OWN_ENCODING, encoding):
        raise DataError(f"its vocabulary is {encoding}, {GPT2} or one of this project is needed")

    if not isinstance(ranks, str):
        raise DataError(f"its vocabulary, {encoding}, is missing")

    tokenizer = Tokenizer(ranks)
    if tokenizer.encoding != encoding:
        raise DataError("the vocabulary is damaged: its digest is another one")

    return tokenizer


def memory_in_use() -> int:
    """Return the bytes that this process has in memory; its peak where only that is known."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    # In kilobytes but on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def with_new_letters(texts) -> list[int]:
    """Return which texts hold NEW_LETTERS.

    Args:
        texts: pyarrow.LargeStringArray.
    """
    import pyarrow.compute

    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    # Nearly always this is enough, and twice as fast.
    if not any((content == lead).any() for lead in NEW_LETTERS_LEADS):
        return []

    found = pyarrow.compute.match_substring_regex(texts, NEW_LETTERS)
    return np.flatnonzero(found.to_numpy(zero_copy_only=False)).tolist()


def as_awkward(texts):
    """Hand the buffers of a pyarrow.LargeStringArray over to awkward, without a copy."""
    from awkward import Array, contents, index

    _, offsets, content = texts.buffers()
    places = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset)
    characters = np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8)
    return Array(
        contents.ListOffsetArray(
            index.Index64(places),
            contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
    )
