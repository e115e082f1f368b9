"""A stand-in for the Hugging Face Hub on loopback: as much of it as its client asks for."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow
import pyarrow.parquet

COMMIT = "0" * 40


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)

    return buffer.getvalue()


@contextmanager
def serve(repository: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve one dataset repository; give the endpoint, and the requests as they come."""
    requests: list[str] = []
    handler = type("Handler", (Hub,), {"name": repository, "files": files, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
    files: dict[str, bytes]
    requests: list[str]

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self.requests.append(f"{self.command} {self.path}")
        url = urlparse(self.path)
        path = unquote(url.path)
        prefix = re.escape(self.name)

        if re.fullmatch(rf"/api/datasets/{prefix}(/revision/\w+)?", path):
            self.answer_json({"id": self.name, "sha": COMMIT, "siblings": [], "tags": []})
        elif match := re.fullmatch(rf"/api/datasets/{prefix}/tree/\w+/?(.*)", path):
            self.answer_tree(match[1], "true" in parse_qs(url.query).get("recursive", []))
        elif match := re.fullmatch(rf"/datasets/{prefix}/resolve/\w+/(.*)", path):
            self.answer_file(match[1])
        else:
            self.answer_missing()

    do_HEAD = do_GET  # noqa: N815

    def answer_tree(self, folder: str, is_recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        entries = {}

        for path in self.files:
            if path.startswith(prefix):
                head, *rest = path.removeprefix(prefix).split("/")
                is_file = is_recursive or not rest
                name = path if is_file else prefix + head
                entries[name] = {
                    "type": "file" if is_file else "directory",
                    "path": name,
                    "oid": COMMIT,
                    "size": len(self.files[path]) if is_file else 0,
                }

        if entries:
            self.answer_json(list(entries.values()))
        else:
            self.answer_missing()

    def answer_file(self, path: str) -> None:
        if path not in self.files:
            self.answer_missing()
            return

        content = self.files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }

        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], headers)
        else:
            self.answer(200, content, headers)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer_missing(self) -> None:
        self.answer(404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)

        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)

        self.end_headers()

        if self.command != "HEAD":
            self.wfile.write(content)
