"""The report that follows its run: a server for this machine alone, and a page that takes in what is new."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.report.live import served
from shards.run import Run
from tests.support import chromium
from tests.views.test_report import make_run


@contextmanager
def serving(run: Run) -> Iterator[str]:
    with served(run, 48) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def get(url: str, **headers: str) -> tuple[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read().decode(), answer.headers


def test_the_page_follows_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", iterations=1)
    with serving(run) as url:
        text, headers = get(url)
        assert headers["Cache-Control"] == "no-store"
        assert "connect-src 'self'" in text
        before = json.loads(get(f"{url}state")[0])
        assert f'data-version="{before["version"]}"' in text
        assert "iter-0000" in before["text"]
        make_run(run.path, first=1, iterations=2)
        deadline = time.monotonic() + 120  # it rests for a while after a page was made
        while json.loads(get(f"{url}state")[0])["version"] == before["version"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        text, _ = get(url)
        assert "after 1 iteration" in text
        assert not run.report_dir.exists()  # nothing is written


def test_only_this_machine_by_its_own_name_is_answered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", iterations=1)
    with serving(run) as url:
        for wrong, headers, code in ((url, {"Host": "example.org"}, 421), (f"{url}../run.toml", {}, 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(wrong, **headers)
            assert caught.value.code == code
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"), served(run, 48, port):
            raise AssertionError("it is taken")


def test_a_browser_that_leaves_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(make_run(tmp_path / "signs", iterations=1), 48) as server:
        for error in (ConnectionResetError(104, "Connection reset by peer"), ValueError("odd \x1b[2J")):
            try:
                raise error
            except (OSError, ValueError):
                server.handle_error(None, ("127.0.0.1", 1))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "rushes: the live report failed: ValueError: odd \\x1b[2J\n"


def test_a_run_without_shards_waits_for_them(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    with serving(Run.open(tmp_path)) as url:
        text, _ = get(url)
        assert "Nothing to show yet." in text
        assert json.loads(get(f"{url}state")[0])["version"] not in text.partition("-waiting")[2]


def test_a_browser_takes_in_what_is_new(tmp_path: Path) -> None:
    if not chromium.BROWSER or not chromium.DRIVER:
        pytest.skip(chromium.MISSING)
    (tmp_path / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    with serving(Run.open(tmp_path)) as url, chromium.browser() as tab:
        tab.request("/url", {"url": url})
        assert tab.run("return document.querySelectorAll('section').length") == 0
        make_run(tmp_path, iterations=1)
        wait_for(tab, "return document.querySelectorAll('#reward .hit').length > 0")
        tab.run("document.body.dataset.kept = 1; document.querySelector('#settings details').open = true")
        make_run(tmp_path, first=1, iterations=2)
        wait_for(tab, "return document.querySelectorAll('#groups details').length === 2")
        kept = "return [document.body.dataset.kept, document.querySelector('#settings details').open]"
        assert tab.run(kept) == ["1", True]  # it was not loaded anew
        assert "workers:" in tab.run("return document.getElementById('now').textContent")
        assert tab.console() == []


def wait_for(tab: Any, script: str) -> None:
    """Until a script of the page gives true."""
    deadline = time.monotonic() + 120
    while not tab.run(script):
        assert time.monotonic() < deadline, script
        time.sleep(0.2)
