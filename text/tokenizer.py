"""The tokenizer of GPT-2, from the ranks that this repository carries."""

import base64
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from text.errors import DataError

ENCODING = "r50k_base"
VOCABULARY_SIZE = 50257
END_OF_TEXT = 50256
TOKEN_TYPE = np.dtype("<u2")

RANKS_PATH = Path(__file__).parent.parent / "assets" / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Pieces of text within which bytes are merged (Radford et al. 2019, as tiktoken writes it).
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


# Kinds of characters, as PIECES tells them apart.
SPACE, LETTER, NUMBER, OTHER, END, UNKNOWN = range(6)
KIND_PATTERNS = {SPACE: r"\s", LETTER: r"\p{L}", NUMBER: r"\p{N}"}
# No character of Unicode: the end of a document.
END_POINT = 0x110000

# More than so many characters are left to tiktoken, which is slower but takes less memory.
MAX_CHARACTERS = 1 << 23
# How many pieces are remembered with their tokens, and of how many characters at most.
MAX_KNOWN_PIECES = 1 << 18
MAX_KNOWN_PIECE = 24


@functools.cache
def load_encoding() -> tiktoken.Encoding:
    """Load the tokenizer of GPT-2 from the ranks that this repository carries; nothing is fetched.

    Raises:
        DataError: when the file of ranks is missing or is not the published one.
    """
    return tiktoken.Encoding(
        ENCODING,
        explicit_n_vocab=VOCABULARY_SIZE,
        pat_str=PIECES,
        mergeable_ranks=read_ranks(),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def read_ranks() -> dict[bytes, int]:
    """Read the tokens with their ranks.

    tiktoken's own reader copies the file into its cache folder, and fails where that is read-only.

    Raises:
        DataError: as load_encoding.
    """
    content = RANKS_PATH.read_bytes() if RANKS_PATH.is_file() else b""
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise DataError(f"{RANKS_PATH} is missing or damaged; restore it with git.")

    pairs = map(bytes.split, content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.cache
def token_sizes() -> np.ndarray:
    """Return how many bytes of text each token stands for, int64 (V); end-of-text for none."""
    decode = load_encoding().decode_single_token_bytes
    sizes = [len(decode(token)) for token in range(VOCABULARY_SIZE)]
    sizes[END_OF_TEXT] = 0
    return np.array(sizes, dtype=np.int64)


def encode(text: str) -> np.ndarray:
    """Tokenize text as it stands: a literal <|endoftext|> in it is text like any other.

    Returns:
        Token ids, uint16 (T).
    """
    try:
        tokens = load_encoding().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        return encode(without_surrogates(text))
    except ValueError:
        # Its pattern fails on half a million blanks in a row; ours does not.
        return encode_documents([text])[:-1]

    return tokens.astype(TOKEN_TYPE)


def decode(tokens: Iterable[int]) -> str:
    """Turn token ids back into text; bytes that are no character become U+FFFD."""
    return load_encoding().decode([int(token) for token in tokens])


def encode_documents(texts: Sequence[str]) -> np.ndarray:
    """Tokenize documents that are not empty, each followed by end-of-text; the ids are encode's.

    tiktoken cuts text into pieces one by one and looks each of them up. Here the cuts are found by
    arithmetic on all characters at once, and only the distinct pieces, one in fifteen or less, are
    given to tiktoken: three times as fast.

    Returns:
        Token ids, uint16 (tokens of all documents).
    """
    import pyarrow

    text = "".join(texts)
    if len(text) > MAX_CHARACTERS:
        ended = [part for text in texts for part in (encode(text), [END_OF_TEXT])]
        return np.concatenate(ended).astype(TOKEN_TYPE)

    try:
        content = text.encode()
    except UnicodeEncodeError:
        return encode_documents([without_surrogates(text) for text in texts])

    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    points = np.insert(points, np.cumsum([len(text) for text in texts]), END_POINT)  # (characters)
    starts = np.flatnonzero(piece_starts(points))  # (pieces)
    offsets = np.append(byte_offsets(points, starts), len(content)).astype(np.int32)
    buffers = pyarrow.py_buffer(offsets), pyarrow.py_buffer(content)
    pieces = pyarrow.StringArray.from_buffers(len(starts), *buffers).dictionary_encode()

    # One after the other, the tokens of distinct pieces; then where those of each piece are.
    distinct = tokens_of_pieces(pieces.dictionary.to_pylist())
    tokens = np.fromiter(itertools.chain.from_iterable(distinct), TOKEN_TYPE)
    lengths = np.fromiter(map(len, distinct), np.int32, len(distinct))
    firsts = np.cumsum(lengths, dtype=np.int32) - lengths

    numbers = pieces.indices.to_numpy()  # (pieces)
    lengths, firsts = lengths[numbers], firsts[numbers]
    ends = np.cumsum(lengths, dtype=np.int32)
    places = np.repeat(firsts - ends + lengths, lengths)  # (tokens)
    places += np.arange(len(places), dtype=np.int32)
    return tokens[places]


def piece_starts(points: np.ndarray) -> np.ndarray:
    """Tell at which characters the pieces of PIECES begin; the end of a document is one too.

    Args:
        points: code points, and END_POINT behind every document, uint32 (characters).

    Returns:
        bool (characters).
    """
    kinds = character_kinds(points)
    is_space = kinds == SPACE
    is_end = kinds == END

    # A piece is a row of one kind. A blank in front of a row belongs to it.
    starts = np.ones(len(points), dtype=bool)
    starts[1:] = (kinds[1:] != kinds[:-1]) & (points[:-1] != ord(" "))
    # So the last of several spaces is apart from the others, unless nothing comes behind.
    starts[:-1] |= is_space[:-1] & ~is_space[1:] & ~is_end[1:]
    starts |= is_end

    # An apostrophe that begins a piece takes the letters of a contraction, and only these.
    quotes = np.flatnonzero((points == ord("'")) & starts)
    first, second = points[quotes + 1], points[np.minimum(quotes + 2, len(points) - 1)]
    is_long = np.zeros(len(quotes), dtype=bool)
    for letters in ("ll", "ve", "re"):
        is_long |= (first == ord(letters[0])) & (second == ord(letters[1]))

    is_short = np.isin(first, [ord(letter) for letter in "sdmt"])
    starts[quotes[is_short | is_long] + 1] = False
    starts[quotes[is_short] + 2] = True
    starts[quotes[is_long] + 3] = True
    return starts


def character_kinds(points: np.ndarray) -> np.ndarray:
    """Return the kinds of characters, uint8, as tiktoken's own patterns see them."""
    table = known_kinds()
    kinds = table.take(points, mode="clip")
    if (kinds == UNKNOWN).any():
        unknown = np.unique(points[kinds == UNKNOWN])
        text = "".join(map(chr, unknown.tolist()))
        table[unknown] = OTHER
        for kind, encoding in kind_encodings().items():
            # Of a text, an encoding whose only pieces are letters keeps the letters.
            found = encoding.decode(encoding.encode_ordinary(text))
            table[[ord(character) for character in found]] = kind

        kinds = table.take(points)

    return kinds


@functools.cache
def known_kinds() -> np.ndarray:
    """Return the table of kinds by code point, which fills up as characters are met."""
    table = np.full(END_POINT + 1, UNKNOWN, dtype=np.uint8)
    table[END_POINT] = END
    return table


@functools.cache
def kind_encodings() -> dict[int, tiktoken.Encoding]:
    ranks = {bytes([value]): value for value in range(256)}
    return {
        kind: tiktoken.Encoding(
            f"kind {kind}", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        for kind, pattern in KIND_PATTERNS.items()
    }


def byte_offsets(points: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return where characters begin in UTF-8, in which the ends of documents have no bytes.

    Args:
        places: of the characters, in rising order.
    """
    wide = np.flatnonzero(points >= 0x80)
    found = points[wide]
    excess = 1 + (found >= 0x800).astype(np.int64) + (found >= 0x10000)
    excess[found == END_POINT] = -1
    sums = np.concatenate([[0], np.cumsum(excess)])
    return places + sums[np.searchsorted(wide, places)]


def tokens_of_pieces(pieces: list[str]) -> list[Sequence[int]]:
    """Return the tokens of each piece; the empty one is the end of a document."""
    known = known_pieces()
    if len(known) > MAX_KNOWN_PIECES:
        known.clear()

    return [known.get(piece) or learn(piece) for piece in pieces]


def learn(piece: str) -> Sequence[int]:
    if not piece:
        return (END_OF_TEXT,)

    try:
        tokens = tuple(load_encoding().encode_ordinary(piece))
    except ValueError:
        tokens = tuple(load_encoding()._encode_single_piece(piece))

    # Long pieces seldom come again.
    if len(piece) <= MAX_KNOWN_PIECE:
        known_pieces()[piece] = tokens

    return tokens


@functools.cache
def known_pieces() -> dict[str, Sequence[int]]:
    return {}


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot express, by question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
