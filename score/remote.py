"""A reward that lives behind an HTTP endpoint: one POST a video, JSON both ways.

Request, Content-Type application/json, with `Authorization: Bearer …` when `token_env` names a variable:

    {"schema": 1, "key": "i000003-p000017-s05", "prompt": "…", "target": "FILM" or null, "fps": 16.0,
     "components": ["score"], "height": 480, "width": 832, "frames": [0, 1, 2, …],   numbers of the frames sent
     "format": "mp4", "video": "<base64 of an H.264 mp4 with these frames>"}         format = "mp4"
     "format": "png", "images": ["<base64 of a PNG>", …]}                            format = "png", lossless

Answer, status 200: `{"scores": {"score": 0.73}}` with a finite number for every component, or `{"reason": "…"}` when
this video has no score. Status 408, 425, 429 and 5xx, a timeout and a broken connection are tried again after a pause
that doubles each time (or after `Retry-After` seconds); anything else is final. After the last failure the score is
missing and its reason says why. Redirects are not followed: they could lead away from http or turn a POST into a GET.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from score.frames import positive, spread
from score.reward import Scored, Video
from shards.errors import UserError
from shards.video import encode_mp4

if TYPE_CHECKING:
    from http.client import HTTPMessage

AGAIN = {408, 425, 429, *range(500, 600)}
LONGEST_PAUSE = 60.0  # seconds
LARGEST_ANSWER = 2**20  # bytes
QUALITY = 12  # x264's crf, the default of stored videos


class Remote:
    """Scores videos by asking a service; the module says what is sent and what it must answer."""

    name = "remote"
    version = "1"
    components = ("score",)
    neutral = ("timeout", "attempts", "pause", "parallel", "token_env")

    def __init__(
        self,
        url: str,
        names: str = "score",
        format: str = "mp4",
        frames: int = 0,
        label: str = "",
        timeout: float = 60.0,
        attempts: int = 4,
        pause: float = 1.0,
        parallel: int = 4,
        token_env: str = "",
    ) -> None:
        """names: components of the answer, separated by spaces; the first is the reward. format: `mp4` or `png`.
        frames: at most so many are sent, evenly spread (0: all). label: what answers there, for example a version:
        another label means that videos are scored again. timeout: seconds of one
        request as a whole. pause: seconds. parallel: requests at once.
        """
        given = {"url": url, "format": format, "timeout": timeout, "pause": pause, "frames": frames}
        self.check_options(given | {"attempts": attempts, "parallel": parallel, "token_env": token_env})
        if token_env and token_env not in os.environ:
            raise UserError(f"reward 'remote': there is no environment variable {token_env}", "put the token there")
        self.url, self.format, self.frames = url, format, frames
        self.names = self.components_for({"names": names})
        self.attempts, self.parallel = attempts, parallel
        self.timeout, self.pause, self.token_env = timeout, pause, token_env

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises UserError for values that cannot be; whether the token is there only the machine that scores knows."""
        url, format = options["url"], options["format"]
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(
                f"reward 'remote': {url!r} is not an http or https address", "for example http://host:8000/score"
            )
        place = urlsplit(url)
        if place.username is not None or place.password is not None:
            raise UserError(
                f"reward 'remote': the address of {place.hostname} holds a name or a password",
                "addresses are written into the run: put the secret into an environment variable and name it in "
                "token_env",
            )
        if options.get("token_env") and place.scheme == "http" and not _is_loopback(str(place.hostname)):
            raise UserError(
                f"reward 'remote': {url} would carry the token over plain http",
                "use https, or a service on this machine",
            )
        if format not in ("mp4", "png"):
            raise UserError(f"reward 'remote' has no format {format!r}", "there are mp4 and png")
        if options["timeout"] <= 0 or options["pause"] < 0 or options["frames"] < 0:
            raise UserError("reward 'remote': timeout, pause and frames cannot be negative", "leave them out")
        for name in ("attempts", "parallel"):
            positive("remote", name, options[name])

    @staticmethod
    def components_for(options: Mapping[str, Any]) -> tuple[str, ...]:
        """The components that the option `names` lists."""
        names = tuple(str(options["names"]).replace(",", " ").split())
        if not names or len(set(names)) < len(names):
            raise UserError(f"reward 'remote': names = {options['names']!r}", "give each component a name of its own")
        return names

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Ask for all videos, `parallel` at a time."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.judge, videos))

    def judge(self, video: Video) -> Scored:
        """Ask for one video until there is an answer or no attempt is left."""
        numbers = spread(len(video.frames), self.frames or len(video.frames))
        try:
            body = json.dumps(self.request(video, numbers)).encode()
        except UserError as error:  # frames that cannot be encoded
            return Scored(reason=error.problem)
        for attempt in range(self.attempts):
            try:
                return self._scored(self._ask(body), numbers)
            except _Failed as failure:
                last = failure
            if not last.again:
                return Scored(reason=str(last))
            if attempt + 1 < self.attempts:
                time.sleep(min(LONGEST_PAUSE, self.pause * 2**attempt if last.wait is None else last.wait))
        return Scored(reason=f"{last}, {self.attempts} times")

    def request(self, video: Video, numbers: Sequence[int]) -> dict[str, object]:
        """The body for the frames with these numbers. Raises UserError for frames that mp4 cannot hold."""
        frames = video.frames[list(numbers)]
        body = {
            "schema": 1,
            "key": video.key,
            "prompt": video.prompt,
            "target": video.target,
            "fps": video.fps,
            "components": list(self.names),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "frames": list(numbers),
            "format": self.format,
        }
        if self.format == "png":
            return body | {"images": [_text(png(frame)) for frame in frames]}
        return body | {"video": _text(encode_mp4(frames, max(1, round(video.fps)), QUALITY))}

    def _ask(self, body: bytes) -> object:
        """The parsed answer. Raises _Failed."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_env:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        request = urllib.request.Request(self.url, body, headers)
        deadline = _Deadline(self.timeout)
        try:
            with deadline, deadline.opener().open(request, timeout=self.timeout) as response:
                data = response.read(LARGEST_ANSWER + 1)
                if deadline.passed:  # the rest was cut off, which `read` takes for the end
                    raise TimeoutError
                if response.status != 200 or len(data) > LARGEST_ANSWER:
                    raise _Failed(f"status {response.status} with {len(data)} bytes from {self.url}")
        except urllib.error.HTTPError as error:
            with error:
                wait = error.headers.get("Retry-After", "")
            raise _Failed(
                f"status {error.code} from {self.url}", error.code in AGAIN, float(wait) if wait.isdigit() else None
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            late = deadline.passed or isinstance(reason, TimeoutError)
            what = "no answer in time" if late else str(reason) or type(reason).__name__
            raise _Failed(f"{what} from {self.url}", again=True) from None
        try:
            return json.loads(data)
        except ValueError:
            raise _Failed(f"the answer of {self.url} is not JSON") from None

    def _without_token(self, text: str) -> str:
        """What a service says, without the token that it may repeat: reasons are stored."""
        token = os.environ.get(self.token_env, "") if self.token_env else ""
        return text.replace(token, "…") if token else text

    def _scored(self, answer: object, numbers: Sequence[int]) -> Scored:
        """The score that an answer holds. Raises _Failed when it holds none."""
        answer = answer if isinstance(answer, dict) else {}
        if isinstance(answer.get("reason"), str) and answer["reason"]:
            return Scored(reason=self._without_token(answer["reason"])[:500])
        scores = answer.get("scores")
        found = scores if isinstance(scores, dict) else {}
        for name in self.names:
            if not isinstance(found.get(name), int | float) or isinstance(found[name], bool):
                raise _Failed(f'the answer of {self.url} has no number {name!r} under "scores"')
        return Scored({name: float(found[name]) for name in self.names}, frames=numbers)


class _Failed(Exception):
    """Why a request gave no score; whether to try again, after `wait` seconds if the service said so."""

    def __init__(self, problem: str, again: bool = False, wait: float | None = None) -> None:
        super().__init__(problem)
        self.again, self.wait = again, wait


class _Deadline:
    """A time limit for one request as a whole: connecting, sending, and every byte of the answer.

    The timeout of a socket starts anew with each byte that arrives, so that a slow drip never ends it. When the time is
    over, another thread shuts the connection down, and whoever reads from it gets an error.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def opener(self) -> urllib.request.OpenerDirector:
        """Makes requests that follow no redirect and end in time."""
        return urllib.request.build_opener(_Stay(), _handler(self, secure=False), _handler(self, secure=True))

    def watch(self, connection: socket.socket) -> None:
        """Shut this connection down, too, when the time is over."""
        with self._lock:
            self._sockets.append(connection)
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # closed by now
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # that of TLS would say goodbye first


def _handler(deadline: _Deadline, secure: bool) -> urllib.request.BaseHandler:
    """urllib's handler of http or https, whose connections end with the deadline."""
    parent = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    class Watched(parent):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Watched, request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Watched, request, context=ssl.create_default_context())

    return Https() if secure else Http()


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect; the status 3xx comes out as the error that it is."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """No further request."""


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, so that nobody else can listen."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def png(frame: NDArray[np.uint8]) -> bytes:
    """A frame [H, W, 3] uint8 RGB as PNG."""
    import cv2

    return bytes(cv2.imencode(".png", frame[..., ::-1])[1])


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
