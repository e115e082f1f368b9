"""Finds and downloads datasets and models of the Hugging Face Hub, over poor networks.

A file of a dataset is downloaded beside the token files, and removed when it has been read. The
files of a model are kept in the cache that all of the Hub's clients share.
"""

import contextlib
import functools
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from text.errors import DataError, is_full_disk, one_line
from text.local_files import Listing, LocalFile
from text.readers import READERS

T = TypeVar("T")

# Seconds to wait before trying again: a server that is busy is back soon, or in a minute, or not.
RETRY_PAUSES = (1, 2, 4, 8, 16, 32)
# At the start somebody is waiting for an answer.
FIRST_RETRY_PAUSES = (1, 2, 4)
TIMEOUT = 60

PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}

# Larger files, in bytes, are not served over plain HTTP.
MAX_HTTP_SIZE = 50 * 10**9

PARQUET_REVISION = "refs/convert/parquet"


class DamagedDownloadError(Exception):
    """A downloaded file is not the one that the Hub has."""


class UnreachableError(Exception):
    """The Hub cannot be reached at the moment."""


@dataclass(frozen=True)
class HubDataset:
    """The column `text` of the split `train` of a dataset."""

    repository: str
    config: str | None = None
    name: str = ""
    is_hub = True

    @property
    def description(self) -> str:
        return f"{self.repository}:{self.config}" if self.config else self.repository

    def listing(self, revision: str | None = None) -> Listing:
        """Ask the Hub for the files of the dataset.

        Args:
            revision: a commit; None takes the newest.

        Raises:
            DataError: when there is no such dataset, its format is none that is read here, or the
                network fails again and again.
        """
        with hub_errors(self.description):
            if revision and revision.startswith(f"{PARQUET_REVISION}@"):
                return self.converted_listing(revision.partition("@")[2])

            info = self.info(revision)
            if f"{self.repository.split('/')[1]}.py" in (file.rfilename for file in info.siblings):
                return self.converted_listing()

            kind, paths = self.data_files(info.sha)
            return Listing(tuple(self.files(kind, paths, info.sha)), info.sha)

    @classmethod
    def parse(cls, value: str) -> "HubDataset | None":
        """Read owner/name or owner/name:config; None where that is no such name."""
        # The Hub allows no two dashes in a row, so they can stand for what file names do not have.
        match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", value)
        if not match or "--" in match[1]:
            return None

        return cls(match[1], match[2], name=re.sub("[/:]", "--", value))

    def rows(self, columns: Sequence[str]) -> Iterator[dict]:
        """Yield the rows of the split `train`, kept by `datasets` in its cache on the disk.

        Args:
            columns: the names of the columns to read; some may be missing.

        Raises:
            DataError: as listing.
        """
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()

        def load(revision: str | None = None):
            try:
                return load_dataset(self.repository, self.config, revision=revision, split="train")
            except ConnectionError as error:
                # This very type is raised when the client itself has tried for half a minute.
                if type(error) is ConnectionError:
                    raise UnreachableError(str(error)) from error

                raise

        with hub_errors(self.description):
            try:
                dataset = insist(load, self.description, FIRST_RETRY_PAUSES)
            except RuntimeError as error:
                if "script" not in str(error):
                    raise

                dataset = insist(lambda: load(PARQUET_REVISION), self.description)

            # Other columns, such as pictures, are not decoded.
            yield from dataset.select_columns([c for c in dataset.column_names if c in columns])

    def info(self, revision: str | None):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise DataError("HF_HUB_OFFLINE is set")

        return insist(
            lambda: HfApi().dataset_info(self.repository, revision=revision, timeout=TIMEOUT),
            self.description,
            FIRST_RETRY_PAUSES,
        )

    def data_files(self, revision: str) -> tuple[str, list[str]]:
        """Return the format and the paths of the split `train`, as `datasets` resolves them."""
        from datasets import load_dataset_builder

        builder = insist(
            lambda: load_dataset_builder(self.repository, self.config, revision=revision),
            self.description,
        )
        kind = type(builder).__module__.split(".")[-1]
        splits = builder.config.data_files or {}
        if kind not in READERS:
            raise DataError(f"its format is {kind}, read are {', '.join(READERS)}")

        if "train" not in splits:
            raise DataError(f"it has no split train, it has {', '.join(map(str, splits))}")

        return kind, [re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", url) for url in splits["train"]]

    def converted_listing(self, revision: str | None = None) -> Listing:
        """List the parquet files that the Hub makes of a dataset with a loading script."""
        from huggingface_hub import HfApi, RepoFile

        info = self.info(revision or PARQUET_REVISION)
        tree = insist(
            lambda: list(
                HfApi().list_repo_tree(
                    self.repository, repo_type="dataset", revision=info.sha, recursive=True
                )
            ),
            self.description,
        )
        places = {
            file.path: re.fullmatch(r"([^/]+)/(partial-)?train/[^/]+\.parquet", file.path)
            for file in tree
            if isinstance(file, RepoFile)
        }
        configs = sorted({place[1] for place in places.values() if place})
        config = self.config or (configs[0] if len(configs) == 1 else "default")
        if config not in configs:
            raise DataError(
                f"its configurations are {', '.join(configs) or 'none'}; choose one by"
                f" --dataset={self.repository}:NAME"
            )

        chosen = {path: place for path, place in places.items() if place and place[1] == config}
        print(
            f"Note:   {self.repository} holds a loading script, which is not run; its automatic"
            f" conversion to parquet is taken ({PARQUET_REVISION})"
        )
        if any(place[2] for place in chosen.values()):
            print(f"Note:   that conversion is partial: the Hub has not converted all of {config}")

        files = self.files("parquet", sorted(chosen), info.sha)
        return Listing(tuple(files), f"{PARQUET_REVISION}@{info.sha}")

    def files(self, kind: str, paths: Sequence[str], revision: str) -> Iterator["HubFile"]:
        """Yield files with their sizes and digests."""
        from huggingface_hub import HfApi

        for first in range(0, len(paths), 256):
            some = list(paths[first : first + 256])
            ask = functools.partial(
                HfApi().get_paths_info,
                self.repository,
                some,
                revision=revision,
                repo_type="dataset",
            )
            infos = {info.path: info for info in insist(ask, self.description)}
            for path in some:
                info = infos[path]
                yield HubFile(self.repository, revision, path, info.size, kind, digest_of(info))


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset, which is on the disk only while it is read.

    Args:
        name, size, kind, is_cut, is_divisible: as LocalFile has them.
        digest: of the whole file, `sha256:` or `git:` (a blob's SHA-1) and hexadecimal digits.
    """

    repository: str
    revision: str
    name: str
    size: int
    kind: str
    digest: str
    is_cut = True
    # What one process has downloaded is of no use to another.
    is_divisible = False

    @property
    def description(self) -> str:
        return f"{self.repository}/{self.name}"

    @contextlib.contextmanager
    def on_disk(self, folder: Path) -> Iterator[LocalFile]:
        """Download the file into a folder of its own, which is removed afterwards.

        Raises:
            DataError: when the network fails, or gives another file, again and again.
            OSError: when the disk is full.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        # hf_xet buffers gigabytes in every process, and may fill the user's cache.
        constants.HF_HUB_DISABLE_XET = self.size <= MAX_HTTP_SIZE
        try:
            with hub_errors(self.description):
                path = download(
                    self.repository,
                    self.name,
                    self.revision,
                    self.digest,
                    repo_type="dataset",
                    local_dir=folder,
                    # Not the cache that other programs use.
                    cache_dir=folder,
                    # The client then raises a failure at once, and insist tries again.
                    force_download=True,
                )

            yield LocalFile(
                path, self.name, self.size, self.kind, self.is_cut, origin=self.description
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def download_model(repository: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Download files of a model, and compare them with the checksums of the Hub.

    Args:
        choose: is given the names of all files, and returns those to download; none is in a folder.

    Returns:
        The folder that they are in.

    Raises:
        DataError: when there is no such model, choose raises, or the network fails again and again.
    """
    from huggingface_hub import HfApi, constants

    with hub_errors(repository, "A folder that holds the model needs no network."):
        if constants.HF_HUB_OFFLINE:
            raise DataError("HF_HUB_OFFLINE is set")

        model = insist(
            lambda: HfApi().model_info(repository, timeout=TIMEOUT), repository, FIRST_RETRY_PAUSES
        )
        names = choose([file.rfilename for file in model.siblings])
        infos = insist(
            lambda: HfApi().get_paths_info(model.id, names, revision=model.sha), repository
        )
        for info in infos:
            path = download(model.id, info.path, str(model.sha), digest_of(info))

    return path.parent


def download(repository: str, name: str, revision: str, digest: str, **options) -> Path:
    """Download a file, and compare it with its digest: the client compares the size alone.

    Args:
        options: as for hf_hub_download.
    """
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision, **options))
        except (ValueError, FileNotFoundError) as error:
            # The reason is behind a sentence about the client's own cache.
            raise (error.__cause__ or error) from None

        check_download(path, digest)
        return path

    return insist(fetch, f"{repository}/{name}")


def check_download(path: Path, digest: str) -> None:
    """Compare a file with its digest; remove it, and what it is a link to, if it is another one."""
    is_git = digest.startswith("git:")
    found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode()) if is_git else hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            found.update(chunk)

    if found.hexdigest() != digest.partition(":")[2]:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DamagedDownloadError(
            f"{path.name} does not have the checksum that the Hub gives for it, and is removed"
        )


def digest_of(info) -> str:
    """Return the digest that the Hub gives for a file, in the form of HubFile."""
    return f"sha256:{info.lfs.sha256}" if info.lfs else f"git:{info.blob_id}"


def insist(action: Callable[[], T], what: str, pauses: Sequence[float] | None = None) -> T:
    """Call action until it succeeds, with growing pauses; print a line for each failure.

    The last failure is raised, and at once one that another try cannot cure.
    """
    from huggingface_hub.utils import logging

    # The client's own remarks would stand beside those below.
    logging.set_verbosity_error()
    for pause in RETRY_PAUSES if pauses is None else pauses:
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise

            tqdm.write(f"{what}: {one_line(error)}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)

    return action()


def is_passing(error: Exception) -> bool:
    """Whether another try may succeed: a busy server or a broken connection, no wrong request."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in PASSING_STATUSES

    # The client raises a bare OSError when a file ends too early.
    is_short = type(error) is OSError and error.errno is None
    package = type(error).__module__.split(".")[0]
    return (
        isinstance(error, ConnectionError | TimeoutError | DamagedDownloadError)
        or is_short
        or package in NETWORK_PACKAGES
    )


@contextlib.contextmanager
def hub_errors(
    what: str, way_out: str = "--dataset=stdlib or a folder of your own needs no network."
) -> Iterator[None]:
    """Turn whatever the client raises, dozens of types, into a DataError of one line."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise

        is_for_now = is_passing(error) or isinstance(error, UnreachableError)
        again = " The same command goes on where this one stopped." if is_for_now else ""
        raise DataError(
            f"{what} cannot be read from the Hub: {one_line(error)}.{again} {way_out}"
        ) from error
