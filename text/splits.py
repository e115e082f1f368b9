"""Decides which documents are tested on: by a hash of their places alone."""

import hashlib

# The share of the documents to test on: the first that gives 64 windows of GPT-2's context.
TEST_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)


def place_hash(name: str, row: int) -> float:
    """Map the place of a document to [0, 1): its split depends on nothing else."""
    place = f"{name} {row}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(place, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
