"""The remote reward against a real local server: what is sent, what is believed, and what happens when it fails."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import av
import numpy as np
import pytest

from score.remote import Remote
from score.reward import Scored, choose
from shards.errors import UserError
from shards.video import decode_mp4
from tests.support.clip_models import moving_video, noise_video

Answer = tuple[int, dict[str, str], bytes]
GOOD = json.dumps({"scores": {"score": 0.25}}).encode()


class Server:
    """A service on this machine: keeps what it was sent; gives its `answers` in turn, the last one for ever."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.times: list[float] = []
        self.answers: list[Answer] = [(200, {}, GOOD)]
        self.delay = self.drip = 0.0
        self.piece = 2**30
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.answer(self, body)

            def do_GET(self) -> None:
                outer.answer(self, None)

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def wait(self, count: int) -> None:
        """Until so many requests were read: a client that gave up may have been faster than this."""
        deadline = time.monotonic() + 120
        while len(self.requests) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        """Keep the request and give the next answer; status 0 hangs up without one."""
        with self.lock:
            self.requests.append((handler.command, dict(handler.headers), body))
            self.times.append(time.monotonic())
            status, headers, data = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        time.sleep(self.delay)
        if not status:
            handler.close_connection = True
            return
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        try:
            for first in range(0, len(data), self.piece):
                handler.wfile.write(data[first : first + self.piece])
                time.sleep(self.drip)
        except OSError:  # the client has gone
            handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A fresh service, asked without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def ask(server: Server) -> Callable[..., Scored]:
    """Score one small video with the given options."""

    def asked(**options: Any) -> Scored:
        return Remote(server.url, **{"pause": 0.01, "timeout": 60.0} | options)([noise_video("key", 3)])[0]

    return asked


def test_the_request_holds_what_the_page_says(server: Server) -> None:
    video = moving_video([0, 1, 2, 3, 4], key="i000000-p000001-s02")
    assert Remote(server.url)([video]) == [Scored({"score": 0.25}, frames=[0, 1, 2, 3, 4])]
    method, headers, body = server.requests[0]
    assert (method, headers["Content-Type"]) == ("POST", "application/json")
    assert "Authorization" not in headers
    data = base64.b64decode(body.pop("video"))
    assert body == {
        "schema": 1, "key": "i000000-p000001-s02", "prompt": "", "target": None, "fps": 16.0, "components": ["score"],
        "height": 48, "width": 64, "frames": [0, 1, 2, 3, 4], "format": "mp4",
    }  # fmt: skip
    frames = decode_mp4(data)
    assert frames.shape == video.frames.shape
    assert np.abs(frames.astype(int) - video.frames).mean() < 3
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 16


def test_png_frames_are_lossless_and_chosen(server: Server) -> None:
    video = noise_video(frames=9)
    scored = Remote(server.url, format="png", frames=3)([video])[0]
    body = server.requests[0][2]
    assert body["frames"] == scored.frames == [0, 4, 8]
    for number, text in zip(body["frames"], body["images"], strict=True):
        with av.open(io.BytesIO(base64.b64decode(text))) as container:
            picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
        np.testing.assert_array_equal(picture, video.frames[number])


def test_answers_stay_with_their_videos(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_by_key(handler: BaseHTTPRequestHandler, body: Any) -> None:
        number = int(body["key"])
        time.sleep(0.03 * (3 - number % 4))  # later ones answer first
        data = json.dumps({"scores": {"a": number, "b": -number}}).encode()
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)

    monkeypatch.setattr(server, "answer", answer_by_key)
    scored = Remote(server.url, names="a b", format="png", frames=1)([noise_video(str(n), 2) for n in range(8)])
    assert [one.components for one in scored] == [{"a": n, "b": -n} for n in range(8)]


@pytest.mark.parametrize("status", [500, 503, 429, 408, 0])
def test_a_passing_failure_is_tried_again(server: Server, ask: Callable[..., Scored], status: int) -> None:
    server.answers = [(status, {}, b"busy"), (status, {}, b""), (200, {}, GOOD)]
    assert ask().components == {"score": 0.25}
    assert len(server.requests) == 3


def test_pauses_double_and_retry_after_counts(server: Server, ask: Callable[..., Scored]) -> None:
    server.answers = [(503, {}, b"")]
    assert ask(pause=0.1, attempts=3).reason == f"status 503 from {server.url}, 3 times"
    first, second = np.diff(server.times)
    assert first >= 0.1
    assert second >= 0.2
    server.answers, server.times = [(503, {"Retry-After": "1"}, b""), (200, {}, GOOD)], []
    assert not ask(pause=0.0).reason
    assert server.times[1] - server.times[0] >= 1.0


def test_a_slow_answer_is_missing_after_the_last_attempt(server: Server, ask: Callable[..., Scored]) -> None:
    server.delay = 0.3
    assert ask(timeout=0.05, attempts=2).reason == f"no answer in time from {server.url}, 2 times"
    server.wait(2)
    assert len(server.requests) == 2


def test_an_answer_that_drips_is_missing_when_its_time_is_over(server: Server, ask: Callable[..., Scored]) -> None:
    """Every byte comes soon after the one before, and the whole would take minutes."""
    server.piece, server.drip, server.answers = 1, 0.05, [(200, {}, GOOD + b" " * 10_000)]
    assert ask(timeout=0.3, attempts=1).reason == f"no answer in time from {server.url}, 1 times"


def test_a_token_that_a_service_repeats_is_not_stored(
    server: Server, ask: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_TEST_TOKEN", "secret")
    server.answers = [(200, {}, b'{"reason": "Bearer secret is not known"}')]
    assert ask(token_env="RUSHES_TEST_TOKEN").reason == "Bearer … is not known"


def test_nobody_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    scored = Remote("http://127.0.0.1:9/score", pause=0.0, attempts=2)([noise_video(frames=2)])[0]
    assert "Connection refused" in scored.reason
    assert scored.reason.endswith("from http://127.0.0.1:9/score, 2 times")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}, b""), "status 404"),
        ((200, {}, b"<html>"), "is not JSON"),
        ((200, {}, b'{"scores": {"other": 1}}'), "has no number 'score'"),
        ((200, {}, b'{"scores": {"score": true}}'), "has no number 'score'"),
        ((200, {}, b"[1]"), "has no number 'score'"),
        ((200, {}, b'"' + b"x" * 2**20 + b'"'), "status 200 with 1048577 bytes"),
        ((204, {}, b""), "status 204"),
        ((200, {}, b'{"reason": "not a sign"}'), "not a sign"),
    ],
)
def test_a_final_failure_is_missing_at_once(
    server: Server, ask: Callable[..., Scored], answer: Answer, words: str
) -> None:
    server.answers = [answer]
    scored = ask()
    assert words in scored.reason
    assert not scored.components
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["file:///etc/hostname", "ftp://127.0.0.1/x", "/elsewhere"])
def test_redirects_are_not_followed(server: Server, ask: Callable[..., Scored], code: int, where: str) -> None:
    server.answers = [(code, {"Location": where}, b""), (200, {}, GOOD)]
    assert ask().reason == f"status {code} from {server.url}"
    assert len(server.requests) == 1


def test_the_token_comes_from_the_environment(
    server: Server, ask: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no environment variable RUSHES_TEST_TOKEN"):
        ask(token_env="RUSHES_TEST_TOKEN")
    monkeypatch.setenv("RUSHES_TEST_TOKEN", "secret")
    ask(token_env="RUSHES_TEST_TOKEN")
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


def test_frames_that_mp4_cannot_hold_are_missing(server: Server) -> None:
    video = noise_video(frames=3)
    odd = type(video)("odd", video.frames[:, :-1], "p")
    reward = Remote(server.url)
    scored = reward([odd, video])
    assert "24x19 cannot be encoded" in scored[0].reason
    assert scored[1].components == {"score": 0.25}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "file:///etc/passwd"}, "not an http or https address"),
        ({"url": "ftp://host/x"}, "not an http or https address"),
        ({"url": "http://"}, "not an http or https address"),
        ({"url": "http://h", "format": "gif"}, "no format 'gif'"),
        ({"url": "http://h", "names": " "}, "a name of its own"),
        ({"url": "http://h", "names": "a a"}, "a name of its own"),
        ({"url": "http://h", "attempts": 0}, "attempts is 0"),
        ({"url": "https://me:secret@h/score"}, "the address of h holds a name or a password"),
        ({"url": "http://h", "token_env": "HOME"}, "would carry the token over plain http"),
        ({"url": "http://127.0.0.1.evil.org", "token_env": "HOME"}, "would carry the token over plain http"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose("remote", options).build()


def test_names_are_components_and_the_way_there_is_no_part_of_the_fingerprint() -> None:
    plain = choose("remote", {"url": "http://h/score", "names": "quality, motion"})
    assert plain.components == ("quality", "motion")
    assert plain.directory == choose("remote", {**plain.options, "timeout": 5, "attempts": 9}).directory
    assert plain.directory != choose("remote", {**plain.options, "label": "2"}).directory
    with pytest.raises(UserError, match="cannot be called 'reward'"):
        choose("remote", {"url": "http://h", "names": "reward"})
