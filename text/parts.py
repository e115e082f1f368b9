"""Writes parts of a dataset, lists them in a journal, and joins them: a kill costs little.

A part is written whole, then listed in the journal. Once the share of documents to test on is
known, parts are appended to the two token files in order, and deleted.
"""

import bisect
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from system.files import write_whole
from text import blocks
from text.blocks import Documents
from text.damage import Damage
from text.errors import DataError
from text.splits import TEST_SHARES, place_hash
from text.token_files import FORMAT_VERSION, SPLITS
from text.tokenizer import TOKEN_TYPE, Tokenizer

# So many windows of GPT-2's context, 64, are enough to test on.
MIN_TEST_TOKENS = 65_536
# The share of the documents that tiktoken tokenizes, too: gigatoken has to give the same ids.
SAMPLE_SHARE = 0.001


class PartWriter:
    """Writes documents, as they come, into parts of about a chunk each.

    A part holds its documents by the smallest of TEST_SHARES that would test on them, so that what
    is tested on, once all parts are known and the share is chosen, stands at its beginning.
    """

    def __init__(self, folder: Path, key: str, tokenizer: Tokenizer):
        self.folder = folder
        self.key = key
        self.tokenizer = tokenizer
        self.records: list[dict] = []
        self.damage = Damage()
        self.clear()

    def clear(self) -> None:
        self.texts: list = []
        self.hashes: list[float] = []
        self.size = 0

    def add(self, file, documents: Documents) -> None:
        """Add documents of a file."""
        import pyarrow.compute

        lengths = pyarrow.compute.utf8_length(documents.texts).to_numpy()
        ends = np.cumsum(lengths + blocks.ROW_SIZE)  # (documents)
        hashes = [place_hash(file.name, number) for number in documents.numbers.tolist()]
        first = before = 0
        while first < len(hashes):
            # The document that fills the part is its last one.
            last = int(np.searchsorted(ends, before + blocks.CHUNK_SIZE - self.size)) + 1
            last = min(last, len(hashes))
            self.texts.append(documents.texts[first:last])
            self.hashes += hashes[first:last]
            self.size += int(ends[last - 1]) - before
            if self.size >= blocks.CHUNK_SIZE:
                self.flush()

            first, before = last, int(ends[last - 1])

    def flush(self) -> None:
        """Write what has come since the last part, if anything; a kill leaves no half of it.

        Raises:
            DataError: when gigatoken gives other ids than tiktoken.
        """
        import pyarrow

        if not self.texts:
            return

        texts = pyarrow.concat_arrays(self.texts)
        documents = self.tokenizer.encode_documents(texts)
        self.check_sample(texts, documents)

        places = [bisect.bisect(TEST_SHARES, place) for place in self.hashes]
        order = np.argsort(places, kind="stable")
        end = np.array([self.tokenizer.end_of_text], dtype=TOKEN_TYPE)
        name = f"{self.key}-{len(self.records):06d}.part"
        content = np.concatenate([each for i in order for each in (documents[i], end)]).tobytes()
        write_whole(self.folder / name, content, is_forced=False)

        num_places = len(TEST_SHARES) + 1
        lengths = [len(document) + 1 for document in documents]
        self.records.append(
            {
                "name": name,
                "crc32": zlib.crc32(content),
                "first": lengths[order[0]],
                "documents": np.bincount(places, minlength=num_places).tolist(),
                "tokens": np.bincount(places, lengths, num_places).astype(int).tolist(),
            }
        )
        self.clear()

    def check_sample(self, texts, documents: list[np.ndarray]) -> None:
        """Raise DataError unless tiktoken gives the same ids on one in a thousand documents."""
        if self.tokenizer.gigatoken is None:
            return

        sample = {i for i, place in enumerate(self.hashes) if place < SAMPLE_SHARE}
        # Of every source at least its first document.
        sample |= {0} if not self.records and set(self.key) <= {"0", "-"} else set()
        for i in sample:
            if not np.array_equal(documents[i], self.tokenizer.encode(texts[i].as_py())):
                raise DataError(
                    "gigatoken and tiktoken give different tokens here; pip uninstall gigatoken,"
                    " or install another version of it, and start the same command again."
                )


class Journal:
    """Which units of work are done, in order, and with which parts; a line of JSON for each.

    Args:
        path: a file that a kill may have cut at any byte.
    """

    def __init__(self, path: Path):
        self.path = path
        self.head: dict = {}
        self.units: dict[str, dict] = {}
        self.is_complete = False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            head, *lines = path.read_text().split("\n")
            self.head = dict(json.loads(head))
            for line in lines[:-1]:
                unit = json.loads(line)
                self.is_complete = unit == COMPLETE
                if not self.is_complete:
                    self.units[unit["unit"]] = unit

        # In the order of the text.
        self.parts = [part for unit in self.units.values() for part in unit["parts"]]

    @property
    def revision(self) -> str | None:
        return self.head.get("revision")

    def is_of(self, description: str, revision: str | None) -> bool:
        """Tell whether these are the parts of just this text."""
        return self.head == self.head_of(description, revision)

    @staticmethod
    def head_of(description: str, revision: str | None) -> dict:
        return {"format_version": FORMAT_VERSION, "source": description, "revision": revision}

    def open(self, description: str, revision: str) -> None:
        """Go on with the parts of just this text, or begin anew."""
        head = self.head_of(description, revision)
        if self.head != head:
            shutil.rmtree(self.path.parent)
            self.path.parent.mkdir()
            self.units, self.parts, self.head, self.is_complete = {}, [], head, False
        elif self.units:
            print(f"Note:   going on with {len(self.parts):,} parts that are done")

        self.rewrite()

    def rewrite(self) -> None:
        lines = [self.head, *self.units.values(), *([COMPLETE] if self.is_complete else [])]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def keep(self, num_parts: int) -> None:
        """Forget the units from the one on that has more than the first num_parts parts."""
        kept, self.units, self.parts, self.is_complete = self.units, {}, [], False
        for key, unit in kept.items():
            if len(self.parts) + len(unit["parts"]) > num_parts:
                break

            self.units[key] = unit
            self.parts += unit["parts"]

        self.rewrite()

    def add(self, unit: dict) -> None:
        self.units[unit["unit"]] = unit
        self.parts += unit["parts"]
        self.append(unit)

    def complete(self) -> None:
        """Note that there are no more units."""
        self.is_complete = True
        self.append(COMPLETE)

    def append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


COMPLETE = {"unit": None}


class JoinedFiles:
    """The two token files, growing by the parts of a journal, also over several attempts.

    A part is deleted as soon as its copy is forced onto the disk: so the disk holds the tokens
    about once, and the parts that are missing are those that were joined.
    """

    # Parts wait for the disk until they are so many bytes, or this share of what is joined.
    MIN_WAITING = 1 << 20
    WAITING_SHARE = 1 / 32

    def __init__(self, folder: Path, journal: Journal):
        self.folder = folder
        self.journal = journal
        # How many classes of documents are tested on, once it is known.
        self.num_test_classes: int | None = None
        self.num_joined = 0
        self.num_bytes = 0
        self.waiting: list[Path] = []
        self.num_waiting = 0
        self.files = {split: open(folder / f"{split}.bin", "a+b") for split in SPLITS}  # noqa: SIM115
        self.digests = {split: hashlib.sha256() for split in SPLITS}

    def __enter__(self) -> "JoinedFiles":
        self.go_on()
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def go_on(self) -> None:
        """Go back to what an earlier attempt has surely joined, and check the parts it left."""
        parts = self.journal.parts
        is_left = [(self.folder / part["name"]).exists() for part in parts]
        self.num_joined = is_left.index(True) if True in is_left else len(parts)
        self.choose_share()
        if self.num_test_classes is None:
            self.num_joined = 0

        joined = parts[: self.num_joined]
        for split, file in self.files.items():
            size = sum(self.size(part, split) for part in joined)
            if os.fstat(file.fileno()).st_size < size:
                shutil.rmtree(self.folder)
                raise DataError(
                    f"{file.name} was damaged and is deleted; start the same command again."
                )

            file.truncate(size)
            file.seek(0)
            self.num_bytes += size
            while chunk := file.read(1 << 24):
                self.digests[split].update(chunk)

        for number in range(self.num_joined, len(parts)):
            if self.read(parts[number]) is None:
                self.journal.keep(number)
                break

    def read(self, part: dict) -> bytes | None:
        """Return the content of a part, None when it is not what the journal says."""
        with contextlib.suppress(FileNotFoundError):
            content = (self.folder / part["name"]).read_bytes()
            return content if zlib.crc32(content) == part["crc32"] else None

        return None

    def size(self, part: dict, split: str) -> int:
        """Return how many bytes of a part belong to a split; all to none while that is open."""
        if self.num_test_classes is None:
            return 0

        num_tokens = sum(part["tokens"][self.classes[split]])
        if self.is_first_tested:
            first = part["first"] if part is self.journal.parts[0] else 0
            num_tokens = first if split == "test" else num_tokens - first

        return num_tokens * TOKEN_TYPE.itemsize

    @property
    def is_first_tested(self) -> bool:
        """Whether the first document is all there is to test on: no share has given one."""
        if not self.journal.is_complete:
            return False

        documents = sum_lists(self.journal.parts, "documents")
        # Parts of earlier versions do not say how long their first document is.
        return not documents[:-1].any() and documents[-1] > 1 and "first" in self.journal.parts[0]

    @property
    def classes(self) -> dict[str, slice]:
        return {"train": slice(self.num_test_classes, None), "test": slice(self.num_test_classes)}

    @property
    def rule(self) -> str:
        """Say which documents are tested on."""
        if self.is_first_tested:
            return "test: the first document"

        return f"test: blake2b('file row') below {TEST_SHARES[self.num_test_classes - 1]}"

    def choose_share(self) -> None:
        """Choose the first share of the documents that is enough to test on, else the largest.

        More text only adds to what each share gives, so the first one may be sure early.
        """
        tokens = sum_lists(self.journal.parts, "tokens")
        is_enough = np.cumsum(tokens[:-1]) >= MIN_TEST_TOKENS
        if is_enough[0]:
            self.num_test_classes = 1
        elif self.journal.is_complete:
            found = np.append(np.flatnonzero(is_enough), len(TEST_SHARES) - 1)
            self.num_test_classes = int(found[0]) + 1

    def add_new_parts(self) -> None:
        """Append what the journal has more than the files, if the share to test on is known.

        Raises:
            DataError: when a part is damaged.
        """
        if self.num_test_classes is None:
            self.choose_share()

        if self.num_test_classes is None:
            return

        for part in self.journal.parts[self.num_joined :]:
            content = self.read(part)
            if content is None:
                raise DataError(
                    f"A part in {self.folder} was damaged; start the same command again."
                )

            num_test = self.size(part, "test")
            self.append("test", content[:num_test])
            self.append("train", content[num_test:])
            self.num_joined += 1
            self.num_bytes += len(content)
            self.num_waiting += len(content)
            self.waiting.append(self.folder / part["name"])
            if self.num_waiting > max(self.MIN_WAITING, self.WAITING_SHARE * self.num_bytes):
                self.force()

    def append(self, split: str, content: bytes) -> None:
        self.files[split].write(content)
        self.digests[split].update(content)

    def force(self) -> None:
        """Force the files onto the disk, and delete the parts that are in them."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

        for path in self.waiting:
            path.unlink()

        self.waiting, self.num_waiting = [], 0

    def finish(self) -> dict[str, dict]:
        """Append all that is left; return documents, tokens and sha256 of both files."""
        self.add_new_parts()
        self.force()
        sums = {key: sum_lists(self.journal.parts, key) for key in ("documents", "tokens")}
        counts = {
            split: {key: int(values[classes].sum()) for key, values in sums.items()}
            for split, classes in self.classes.items()
        }
        if self.is_first_tested:
            first = {"documents": 1, "tokens": self.journal.parts[0]["first"]}
            for key, number in first.items():
                counts["train"][key] -= number
                counts["test"][key] += number

        return {
            split: {**counts[split], "sha256": self.digests[split].hexdigest()} for split in SPLITS
        }


def sum_lists(parts: list[dict], key: str) -> np.ndarray:
    """Add up, by class, the documents or the tokens of all parts."""
    return np.sum([part[key] for part in parts], axis=0) + np.zeros(len(TEST_SHARES) + 1, dtype=int)
