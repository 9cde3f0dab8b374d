"""A real S3 server (moto) in a process of its own on loopback, and a proxy in front of it that injects faults.

The server works one request at a time, so that its conditional puts are atomic, as those of a real store are. As a
script this file is that server: `python tests/support/s3_server.py` prints its port.
"""

from __future__ import annotations

import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
}
SLOW = """<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"""
DENIED = """<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""
SKEWED = """<?xml version="1.0"?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request \
time and the current time is too large.</Message></Error>"""
NO_HEADER = """<?xml version="1.0"?><Error><Code>NotImplemented</Code><Message>a header you provided implies \
functionality that is not implemented</Message></Error>"""
COUNTING = threading.Lock()  # each request has a thread of its own


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    Kinds: "503", "403", "skewed" (the 403 of a clock that is wrong), "501" (only with If-None-Match), "reset" (the
    connection closed before the answer), "lost" (closed after the server did what was asked), "cut" (half of the body,
    then the connection ends), "short" (half of the body and a length that says so), "flip" (one bit of the body),
    "slow" (pauses inside the body), "deaf" (If-None-Match is dropped on the way, as old servers do).
    """

    kind: str
    method: str = "GET"
    path: str = ".*"
    times: int = 1
    seen: int = 0

    def hits(self, method: str, path: str, headers: Any) -> bool:
        """Whether this request is one of them; counts it."""
        if method != self.method or not re.search(self.path, path):
            return False
        if self.kind == "501" and "If-None-Match" not in headers:
            return False
        with COUNTING:
            hit = self.seen < self.times
            self.seen += hit
        return hit


@dataclass
class Proxy:
    """The address clients are given, the faults to come, and a log of what was asked for."""

    port: int
    backend: int
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header or "")"""

    @property
    def url(self) -> str:
        """For AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self.port}"

    def asked(self, method: str, path: str) -> list[str]:
        """Range headers of the requests that match."""
        return [span for verb, where, span in self.log if verb == method and re.search(path, where)]


class Handler(BaseHTTPRequestHandler):
    """Passes a request on and its answer back, with one fault at most."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is in Proxy."""

    def _pass(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        body = self._body()
        proxy.log.append((self.command, self.path, self.headers.get("Range", "")))
        fault = next((one for one in proxy.faults if one.hits(self.command, self.path, self.headers)), None)
        kind = fault.kind if fault else ""
        if kind == "503":
            return self._answer(503, [], SLOW.encode())
        if kind == "501":
            return self._answer(501, [], NO_HEADER.encode())
        if kind == "403":
            return self._answer(403, [], DENIED.encode())
        if kind == "skewed":
            return self._answer(403, [], SKEWED.encode())
        if kind == "reset":
            return self._hang_up()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        if kind == "deaf":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        status, found, content = _ask(proxy.backend, self.command, self.path, headers, body)
        if kind == "lost":
            return self._hang_up()
        if kind == "short":
            content = content[: len(content) // 2]
        if kind == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(status, found, content, kind)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, kind: str = "") -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if self.command == "HEAD" and name.lower() == "content-length":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if kind == "cut":
            return self._hang_up()
        if kind == "slow":
            self.wfile.flush()
            time.sleep(2.5)
        self.wfile.write(content[half:])

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _ask(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    headers = {name: value for name, value in headers.items() if name.lower() != "transfer-encoding"}
    headers["Content-Length"] = str(len(body))
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers)
        response: HTTPResponse = connection.getresponse()
        return response.status, response.getheaders(), response.read()
    finally:
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are part of the tests."""


@contextmanager
def proxied(backend: int, *, to_the_end: bool = False) -> Iterator[Proxy]:
    """A proxy in front of the server at port `backend`.

    With `to_the_end` all that its clients, which have ended, had asked for has been done when the block is left.
    """
    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = not to_the_end  # `server_close` waits for the others
    server.proxy = Proxy(server.server_address[1], backend)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.proxy  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served() -> Iterator[int]:
    """The server in its own process; gives its port."""
    process = subprocess.Popen([sys.executable, str(Path(__file__))], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Serve until killed."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    socketserver.TCPServer.request_queue_size = 128
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
