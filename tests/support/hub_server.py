"""A hub on loopback that speaks what the client of the Hugging Face hub asks for, with faults to order.

Repositories are kept in memory as lists of commits. Files come inline with the commit ("regular" uploads); large ones
are listed as LFS files are, by the sha256 of their content. Xet, buckets and pull requests are not here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 1000  # entries of a listing in one answer; a twentieth of it with the last commit of each
API = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MOVED = "A commit has happened since. Please refresh and try again."
QUOTA = "You have exceeded our hourly quotas for action: commit. We invite you to retry later."
LOCKED = "The branch is locked by another commit."
COUNTING = threading.Lock()  # each request has a thread of its own
STATUS = {"500": "", "503": "", "403": "You have read access but not the required permissions", "409": LOCKED}


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    Kinds: "500", "503", "409", "403", "429" (with a Retry-After of `seconds`), "reset" (the connection closed before
    the answer), "lost" (closed after the hub did what was asked), "cut" (half of the body, then the connection ends),
    "flip" (one bit of the body).
    """

    kind: str
    method: str = "GET"
    path: str = ".*"
    times: int = 1
    seconds: int = 0
    seen: int = 0

    def hits(self, method: str, path: str) -> bool:
        """Whether this request is one of them; counts it."""
        if method != self.method or not re.search(self.path, path):
            return False
        with COUNTING:
            hit = self.seen < self.times
            self.seen += hit
        return hit


@dataclass
class Commit:
    """A state of a repository: all its files."""

    oid: str
    title: str
    date: str
    files: dict[str, bytes] = field(default_factory=dict)


class Refused(Exception):
    """An answer that is an error, in the words and with the headers of the hub."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Hub:
    """The repositories, who may write, the faults to come, and a log of what was asked for."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.repos: dict[str, list[Commit]] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str]] = []  # (method, path, Range header or "")
        self.tokens: dict[str, str] = {}  # token -> "read" or "write"; without any, everybody may do everything
        self.page, self.lfs_from, self.xet = PAGE, 1 << 40, False
        self.rivals: list[tuple[str, str, bytes]] = []  # what others put right before the next commits, one each
        self.guard = threading.RLock()

    def create(self, name: str) -> list[Commit]:
        """A repository, `owner/name` or `datasets/owner/name`, with the file that every new one has."""
        self.repos[name] = []
        self._add(name, "initial commit", {".gitattributes": b"*.tar filter=lfs diff=lfs merge=lfs -text\n"}, [])
        return self.repos[name]

    def commits(self, name: str) -> list[str]:
        """Titles of the commits after the first one."""
        return [commit.title for commit in self.repos[name][1:]]

    def asked(self, method: str, path: str) -> list[str]:
        """Range headers of the requests that match."""
        return [span for verb, where, span in self.log if verb == method and re.search(path, where)]

    def put(self, name: str, path: str, content: bytes) -> None:
        """Somebody else commits a file."""
        self._add(name, f"put {path}", {path: content}, [])

    def at(self, name: str, revision: str) -> Commit:
        """A state of a repository by branch or commit. Raises Refused."""
        if name not in self.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        found = self.repos[name][-1:] if revision == "main" else []
        found = found or [commit for commit in self.repos[name] if commit.oid == revision]
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def commit(self, name: str, lines: list[dict[str, Any]]) -> Commit:
        """Add a commit as the client sends it, a JSON object a line. Raises Refused."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        removed = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        with self.guard:
            if self.rivals:
                self.put(*self.rivals.pop(0))
            newest = self.at(name, "main")
            if header.get("parentCommit", newest.oid) != newest.oid:
                raise Refused(412, MOVED)
            if not set(removed) <= newest.files.keys():
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            return self._add(name, header["summary"], added, removed)

    def entry(self, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
        """A file or a folder as listings show it."""
        content = commit.files.get(path)
        if content is None:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if len(content) >= self.lfs_from:
            digest = hashlib.sha256(content).hexdigest()
            found["oid"] = blob(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\n".encode())
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            found |= {"xetHash": digest} if self.xet else {}
        if expand:
            found["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        return found

    def _add(self, name: str, title: str, added: dict[str, bytes], removed: list[str]) -> Commit:
        with self.guard:
            commits = self.repos[name]
            files = {**(commits[-1].files if commits else {}), **added}
            files = {path: content for path, content in files.items() if path not in removed}
            oid = hashlib.sha1(f"{name} {len(commits)} {title}".encode()).hexdigest()
            date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            commits.append(Commit(oid, title, date, files))
            return commits[-1]


def blob(content: bytes) -> str:
    """The name that git has for a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers a request, with one fault at most."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is in Hub."""

    def _serve(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append((self.command, self.path, self.headers.get("Range", "")))
        fault = next((one for one in hub.faults if one.hits(self.command, self.path)), None)
        kind = fault.kind if fault else ""
        try:
            if kind == "429" and fault:
                raise Refused(429, QUOTA, **{"Retry-After": str(fault.seconds)})
            if kind in STATUS:
                raise Refused(int(kind), STATUS[kind])
            if kind == "reset":
                return self._hang_up()
            self._allow(hub)
            status, headers, content = self._answer(hub, body)
        except Refused as refused:
            status, content = refused.status, json.dumps({"error": str(refused)}).encode()
            headers = {"X-Error-Message": str(refused), "X-Error-Code": refused.code, **refused.headers}
        if kind == "lost":
            return self._hang_up()
        if kind == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send(status, headers, content, cut=kind == "cut")

    do_GET = do_HEAD = do_POST = _serve

    def _allow(self, hub: Hub) -> None:
        if not hub.tokens:
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:  # the hub does not tell who has no token from what is not there
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if token not in hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        if re.search("/(commit|preupload)/", self.path) and hub.tokens[token] != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")

    def _answer(self, hub: Hub, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Raises Refused."""
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if match := API.fullmatch(parts.path):
            kind, name, verb, *rest = match.groups()
            name = name if kind == "model" else f"{kind}s/{name}"
            revision, path = unquote(rest[0] or "main"), unquote(rest[1] or "")
            return self._api(hub, name, verb or "revision", revision, path, query, body)
        if match := FILE.fullmatch(parts.path):
            kind, name, revision, path = match.groups()
            commit = hub.at(f"{kind}s/{name}" if kind else name, unquote(revision))
            return self._file(hub, commit, unquote(path))
        raise Refused(404, f"no such page here: {self.command} {self.path}")

    def _api(
        self, hub: Hub, name: str, verb: str, revision: str, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        commit = hub.at(name, revision)
        if verb == "revision":
            return _json({"id": name.removeprefix("datasets/"), "sha": commit.oid, "private": False})
        if verb == "tree":
            return self._tree(hub, commit, path, query)
        if verb == "paths-info":
            form = parse_qs(body.decode())
            found = [one for one in form["paths"] if one in commit.files or _below(commit, one)]
            return _json([hub.entry(commit, one, expand=form["expand"] == ["true"]) for one in found])
        if verb == "preupload":
            files = json.loads(body)["files"]
            return _json({"files": [_mode(commit, one["path"]) for one in files], "commitOid": commit.oid})
        if verb == "commit":
            made = hub.commit(name, [json.loads(line) for line in body.splitlines()])
            url = f"{hub.url}/{name}/commit/{made.oid}"
            return _json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})
        raise Refused(404, f"no such request here: {verb}")

    def _tree(self, hub: Hub, commit: Commit, path: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        below = _below(commit, path)
        if path and not below:
            raise Refused(404, f"{path} does not exist on main", "EntryNotFound")
        top = path + "/" if path else ""
        folders = {top + "/".join(name[len(top) :].split("/")[:-1][:n]) for name in below for n in range(1, 20)}
        names = sorted({*below, *folders} - {top, path})
        if query.get("recursive") != "true":
            names = [name for name in names if "/" not in name[len(top) :]]
        expand = query.get("expand") == "true"
        first, page = int(query.get("cursor", 0)), hub.page // 20 if expand else hub.page
        headers = {}
        if first + page < len(names):
            others = "&".join(f"{key}={quote(value)}" for key, value in query.items() if key != "cursor")
            address = f"{hub.url}{urlsplit(self.path).path}?{others}&cursor={first + page}"
            headers["Link"] = f'<{address}>; rel="next"'
        status, types, content = _json([hub.entry(commit, one, expand=expand) for one in names[first : first + page]])
        return status, types | headers, content

    def _file(self, hub: Hub, commit: Commit, path: str) -> tuple[int, dict[str, str], bytes]:
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        entry = hub.entry(commit, path, expand=False)
        tag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, headers, content
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        if first >= len(content):
            raise Refused(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return 206, headers, part

    def _send(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _below(commit: Commit, path: str) -> list[str]:
    return [name for name in commit.files if not path or name.startswith(path + "/")]


def _mode(commit: Commit, path: str) -> dict[str, Any]:
    ignored = commit.files.get(".gitignore", b"").decode().split()
    found = {"path": path, "uploadMode": "regular", "shouldIgnore": any(fnmatch(path, one) for one in ignored)}
    return found | ({"oid": blob(commit.files[path])} if path in commit.files else {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are part of the tests."""


@contextmanager
def served() -> Iterator[Hub]:
    """A hub without repositories, until the end of the block."""
    server = _Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(server.server_address[1])  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
