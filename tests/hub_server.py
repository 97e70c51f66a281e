"""A stand-in of the hub's HTTP interface: a dataset's files from a folder, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as one dataset. `gated`, `absent`, `cut` (bytes after which a connection breaks, once a file) and `lies` (bytes that
    are not those of the checksum) are set by tests; `asked` counts what was fetched and `ranges` keeps the ranges asked for."""

    daemon_threads = True

    def __init__(self, folder: Path, dataset: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.dataset = folder, dataset
        self.gated = self.absent = False
        self.cut: dict[str, int] = {}
        self.lies: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> dict[str, Path]:
        return {str(f.relative_to(self.folder)): f for f in sorted(self.folder.rglob("*")) if f.is_file()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if hub.absent:
            return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body=body)
        if hub.gated and not path.startswith("/api/"):
            return self.send(401, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"}, body=body)
        if re.fullmatch(rf"/api/datasets/{hub.dataset}(/revision/[^/]+)?", path):
            return self.send(200, json.dumps(self.info()).encode(), {"Content-Type": "application/json"}, body=body)
        if path.startswith(f"/api/datasets/{hub.dataset}/tree/"):
            return self.send(200, json.dumps(self.tree()).encode(), {"Content-Type": "application/json"}, body=body)
        if found := re.fullmatch(rf"/datasets/{hub.dataset}/resolve/[^/]+/(.+)", path):
            return self.file(found[1], body=body)
        self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)

    def info(self) -> dict:
        siblings = []
        for name, file in self.server.files().items():
            sha = hashlib.sha256(file.read_bytes()).hexdigest()
            lfs = {"lfs": {"sha256": sha, "size": file.stat().st_size, "pointerSize": 130}} if self.large(name) else {}
            siblings.append({"rfilename": name, "size": file.stat().st_size, "blobId": sha[:40]} | lfs)
        return {
            "id": self.server.dataset,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]}
            | ({"lfs": {"oid": s["lfs"]["sha256"], "size": s["size"], "pointerSize": 130}} if "lfs" in s else {})
            for s in self.info()["siblings"]
        ]

    @staticmethod
    def large(name: str) -> bool:
        return not name.endswith(".json")

    def file(self, name: str, *, body: bool) -> None:
        hub = self.server
        file = hub.files().get(name)
        if file is None:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)
        data = hub.lies.get(name, file.read_bytes())
        tag = hashlib.sha256(file.read_bytes()).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if self.large(name):
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        status, wanted = 200, self.headers.get("Range")
        if body:
            hub.asked[name] += 1
        if body and wanted and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)):
            hub.ranges.append(wanted)
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self.send(status, data, headers, body=body, cut=hub.cut.pop(name, None) if body else None, name=name)

    def send(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool, cut: int | None = None, name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        part = data if cut is None else data[:cut]
        self.server.sent[name] += len(part)
        self.wfile.write(part)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
