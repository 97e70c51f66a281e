"""A stand-in of the hub's HTTP interface: a dataset's files from a folder, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

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


class ModelHub(ThreadingHTTPServer):
    """A hub that takes pushes of models: `repos` by name, `tokens` with the owners that each may write for, `asked` what was called.

    `fault` (a status) is the answer to every commit while it is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ModelHandler)
        self.repos: dict[str, dict] = {}
        self.tokens = {"hf_good": {"me"}, "hf_reader": set()}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fault: int | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class ModelHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelHub

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            return self.say(401, {"error": "Invalid username or password."})
        may = hub.tokens.get(token, set())
        if path == "/api/repos/create":
            return self.create(json.loads(body), may)
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            sound = re.fullmatch(r"[\w.-]+/[\w.-]+", head.get("base_model", "a/b"))
            errors = [] if sound else [{"message": '"base_model" with value is not valid'}]
            return self.say(400 if errors else 200, {"errors": errors, "warnings": []})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.objects[found[1]] = body
            return self.say(200, {})
        for pattern, reading in (
            (r"/api/models/([^/]+/[^/]+?)(/revision/[^/]+)?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.tree),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.file),
        ):
            if found := re.fullmatch(pattern, path):
                repo = hub.repos.get(found[1])
                if repo is None or (repo["private"] and found[1].split("/")[0] not in may):
                    return self.say(404, {"error": "Repository not found"}, code="RepoNotFound")
                return reading(found[1], repo, found[2] if found.re.groups > 1 else None)
        if found := re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/.]+)(?:/preupload/main|/commit/main|\.git/.*/batch)", path
        ):
            if found[1].split("/")[0] not in may:
                return self.say(403, {"error": "Forbidden"})
            return self.write(found[1], path, body)
        return self.say(404, {}, code="EntryNotFound")

    def say(self, status: int, answer: dict | list | bytes, code: str = "", **headers: str) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in (({"X-Error-Code": code} if code else {}) | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, wanted: dict, may: set[str]) -> None:
        if wanted["organization"] not in may:
            return self.say(403, {"error": "You don't have the rights to create a model under this namespace"})
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repos[name] = {"private": bool(private), "files": {}, "commits": []}
        self.say(200, {"url": f"{self.server.url}/{name}", "id": name})

    def info(self, name: str, repo: dict, revision: str | None) -> None:
        siblings = [{"rfilename": file} for file in repo["files"]]
        self.say(
            200,
            {"id": name, "sha": COMMIT, "private": repo["private"], "siblings": siblings, "tags": [], "downloads": 0},
        )

    def tree(self, name: str, repo: dict, revision: str | None) -> None:
        digests = {file: hashlib.sha256(data).hexdigest()[:40] for file, data in repo["files"].items()}
        self.say(
            200, [{"type": "file", "path": f, "size": len(repo["files"][f]), "oid": d} for f, d in digests.items()]
        )

    def file(self, name: str, repo: dict, path: str | None) -> None:
        data = repo["files"].get(path or "")
        if data is None:
            return self.say(404, {}, code="EntryNotFound")
        self.say(200, data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    def write(self, name: str, path: str, body: bytes) -> None:
        hub = self.server
        if path.endswith("/preupload/main"):
            kinds = [
                (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular")
                for f in json.loads(body)["files"]
            ]
            return self.say(200, {"files": [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds]})
        if path.endswith("/batch"):
            wanted = json.loads(body)["objects"]
            actions = [o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in wanted]
            return self.say(200, {"objects": actions, "transfer": "basic"})
        if hub.fault:
            return self.say(hub.fault, {"error": "not now"})
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                hub.repos[name]["files"][part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            elif part["key"] == "lfsFile":
                hub.repos[name]["files"][part["value"]["path"]] = hub.objects[part["value"]["oid"]]
        hub.repos[name]["commits"].append(json.loads(body.splitlines()[0])["value"]["summary"])
        self.say(200, {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
