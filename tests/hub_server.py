"""A stand-in for the Hugging Face Hub on loopback: as much of it as its client asks for."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow
import pyarrow.parquet

COMMIT = "0" * 40
CONVERTED_COMMIT = "1" * 40
CONVERTED = "refs/convert/parquet"


def parquet(texts: list[str | None], column: str = "text", **options) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), buffer, **options)

    return buffer.getvalue()


def parquet_rows(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)

    return buffer.getvalue()


@contextmanager
def serve(
    repository: str,
    files: dict[str, bytes],
    converted: dict[str, bytes] | None = None,
    fault: Callable[[str, int], str | None] = lambda path, number: None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository, as a dataset and as a model.

    Gives the endpoint, and the requests as they come.

    Args:
        converted: the files of the revision refs/convert/parquet.
        fault: of the path of a file and how often it has been asked for, returns `500`, `cut` or
            `damage` for what goes wrong with the answer, or None.
    """
    requests: list[str] = []
    values = {
        "name": repository,
        "revisions": {COMMIT: files, CONVERTED_COMMIT: converted or {}},
        "fault": staticmethod(fault),
        "requests": requests,
        "counts": {},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), values))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name: str
    revisions: dict[str, dict[str, bytes]]
    requests: list[str]
    counts: dict[str, int]

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self.requests.append(f"{self.command} {self.path}")
        url = urlparse(self.path)
        path = unquote(url.path)
        prefix = re.escape(self.name)
        kind = "(?:datasets|models)"
        revision = r"(refs/convert/parquet|\w+)"

        if match := re.fullmatch(rf"/api/{kind}/{prefix}(?:/revision/{revision})?", path):
            self.answer_info(self.commit(match[1]))
        elif match := re.fullmatch(rf"/api/{kind}/{prefix}/tree/{revision}/?(.*)", path):
            is_recursive = "true" in str(parse_qs(url.query).get("recursive", [])).lower()
            self.answer_tree(self.commit(match[1]), match[2], is_recursive)
        elif match := re.fullmatch(rf"/api/{kind}/{prefix}/paths-info/{revision}", path):
            self.answer_paths(self.commit(match[1]))
        elif match := re.fullmatch(rf"(?:/datasets)?/{prefix}/resolve/{revision}/(.*)", path):
            self.answer_file(self.commit(match[1]), match[2])
        else:
            self.answer_missing()

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815

    @staticmethod
    def commit(revision: str | None) -> str:
        return {None: COMMIT, "main": COMMIT, CONVERTED: CONVERTED_COMMIT}.get(revision, revision)

    def answer_info(self, commit: str) -> None:
        siblings = [{"rfilename": path} for path in self.revisions[commit]]

        if siblings:
            self.answer_json({"id": self.name, "sha": commit, "siblings": siblings, "tags": []})
        else:
            self.answer_missing("RevisionNotFound")

    def entry(self, commit: str, path: str) -> dict:
        content = self.revisions[commit][path]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "path": path, "oid": blob, "size": len(content)}

        if path.endswith((".parquet", ".safetensors", ".bin")):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 1}

        return entry

    def answer_tree(self, commit: str, folder: str, is_recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        entries = {}

        for path in self.revisions[commit]:
            if path.startswith(prefix):
                head, *rest = path.removeprefix(prefix).split("/")

                if is_recursive or not rest:
                    entries[path] = self.entry(commit, path)
                else:
                    name = prefix + head
                    entries[name] = {"type": "directory", "path": name, "oid": COMMIT, "size": 0}

        if entries:
            self.answer_json(list(entries.values()))
        else:
            self.answer_missing()

    def answer_paths(self, commit: str) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(form)["paths"] if is_json else parse_qs(form)["paths"]

        self.answer_json([self.entry(commit, path) for path in paths])

    def answer_file(self, commit: str, path: str) -> None:
        content = self.revisions[commit].get(path)

        if content is None:
            self.answer_missing()
            return

        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, part = 200, content

        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, part = 206, content[first : last + 1]

        self.counts[path] = self.counts.get(path, 0) + 1
        fault = self.fault(path, self.counts[path])

        if fault == "500":
            self.answer(500, b"{}", {})
        elif fault == "cut":
            self.answer(status, part[: len(part) // 2], headers, len(part))
            self.close_connection = True
        elif fault == "damage":
            middle = len(part) // 2
            self.answer(status, part[:middle] + b"?" + part[middle + 1 :], headers)
        else:
            self.answer(status, part, headers)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer_missing(self, code: str = "EntryNotFound") -> None:
        self.answer(404, b'{"error": "Entry not found"}', {"X-Error-Code": code})

    def answer(
        self, status: int, content: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        length = len(content) if length is None else length

        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)

        self.end_headers()

        if self.command != "HEAD":
            self.wfile.write(content)
