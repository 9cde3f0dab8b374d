"""`rushes report --watch`: the report as a page that follows its run, from a server for this machine alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import cast

from shards.errors import UserError
from shards.report.page import page
from shards.report.shell import escape, shell
from shards.run import Run
from shards.text.visible import visible
from shards.workers.status import render, status

LOOPBACK = "127.0.0.1"
WATCHED = (  # patterns within a stage; each of these files appears or grows when the page becomes another one
    "plan.json", "rollout/manifest/*.json", "score/*/*.parquet", "advantage/*/*", "train/plan.json",
    "policy/metrics*.jsonl", "policy/policy.json",
)  # fmt: skip
REST = 10  # times as long as it takes to make a page, none is made: the run has better to do
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip


@dataclass
class Follower:
    """The page of a run, made again when it is asked for and files have changed. Used by several threads."""

    path: Path
    megabytes: float
    _version: str = ""
    _page: str = ""
    _lock: Lock = field(default_factory=Lock)
    _again: float = 0.0
    """When, by the monotonic clock, the next page may be made."""

    def state(self) -> dict[str, str]:
        """`version`, which is another one when the page would be, and `text`: what `rushes status` says now."""
        run = Run.open(self.path)
        try:
            text = render(status(run, quick=True))
        except UserError as error:  # of a file in the middle of its writing, too
            text = str(error)
        rests = self._version and time.monotonic() < self._again
        return {"version": self._version if rests else version_of_page(run), "text": visible(text)}

    def page(self) -> str:
        """The newest page; where it cannot be made now, the last one, or a page that says why."""
        with self._lock:
            run = Run.open(self.path)
            version = version_of_page(run)
            if version != self._version:
                began = time.monotonic()
                try:
                    self._page = page(run, self.megabytes, version)
                    self._version = version
                    self._again = began + REST * (time.monotonic() - began)
                except (UserError, OSError) as error:
                    return self._page or _waiting(run, version, str(error))
            return self._page


def version_of_page(run: Run) -> str:
    """A short text that is another one whenever a file that the report reads is."""
    run.files.refresh(run.path)
    stages = [run.iteration(k) for k in run.iterations()] + [run.evaluation(k) for k in run.evaluations()]
    paths = [run.config_path, *(path for stage in stages for name in WATCHED for path in sorted(stage.path.glob(name)))]
    return sha256("\n".join(_stamp(path) for path in paths).encode()).hexdigest()[:16]


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # gone meanwhile
        return str(path)
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def _waiting(run: Run, version: str, reason: str) -> str:
    head = f'<div class="alarms unsure"><b>Nothing to show yet.</b> {escape(reason)}</div>'
    # another version than that of the files: the page is asked for again until there is one
    return shell(run.path.resolve().name, "", {}, head, version=f"{version}-waiting")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that disconnects; report any other fault in one line."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"rushes: the live report failed: {type(error).__name__}: {visible(str(error))}", file=sys.stderr)


@contextmanager
def served(run: Run, megabytes: float, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server on the loopback address that shows a run; `serve_forever` works, and the block ends it.

    Port 0 takes any that is free. Raises UserError where the port is taken.
    """
    follower = Follower(run.path, megabytes)
    try:
        server = _Server((LOOPBACK, port), _handler(follower))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port}: {reason}", "choose another one; 0 takes any that is free") from error
    try:
        yield server
    finally:
        server.server_close()


def _handler(follower: Follower) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Two answers: the page, and the state of the run."""

        def do_GET(self) -> None:
            """Answer whoever names this server as this machine: a page elsewhere that was led here by DNS does not."""
            answers: dict[str, tuple[str, Callable[[], str]]] = {
                "/": ("text/html; charset=utf-8", follower.page),
                "/state": ("application/json", lambda: json.dumps(follower.state())),
            }
            _, port = cast(tuple[str, int], self.server.server_address)
            if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
                return self.send_error(421)
            if self.path not in answers:
                return self.send_error(404)
            kind, make = answers[self.path]
            try:
                body = make().encode()
            except (UserError, OSError) as error:
                return self.send_error(500, explain=visible(str(error)))
            self.send_response(200)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the terminal is for the user."""

    return Handler
