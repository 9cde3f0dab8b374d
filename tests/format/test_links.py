"""File systems without hard links: the first writer still wins, and a file is still whole or not there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards import locks
from shards.errors import RunFailed
from shards.files import publish_new
from shards.verify.shards import verify
from tests.support.shard_fixtures import committed_stage

ROOT = Path(__file__).parents[2]
WRITERS = 4
ROUNDS = 25


@pytest.fixture(params=["rename", "lock"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No hard links; with `lock` no rename that replaces nothing either."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    if request.param == "lock":
        monkeypatch.setattr(locks, "_rename_new", lambda *_: None)
    return str(request.param)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_every_answer_that_means_no_links(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: _raise(code))
    assert publish_new(tmp_path / "a", b"first")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_other_errors_stay_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: _raise(errno.EDQUOT))
    with pytest.raises(RunFailed, match="disk full"):
        publish_new(tmp_path / "a", b"first")
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_replaced(no_links: str, tmp_path: Path) -> None:
    path = tmp_path / "a"

    def late() -> object:
        path.write_bytes(b"first")  # another writer is done while ours still writes
        yield b"second"

    assert not publish_new(path, late())  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_one_of_several_threads_wins(no_links: str, tmp_path: Path) -> None:
    for number in range(ROUNDS):
        path, barrier, won = tmp_path / str(number), threading.Barrier(WRITERS), []

        def write(name: int, path: Path = path, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            def content() -> object:
                barrier.wait()
                yield bytes([name]) * 1000

            if publish_new(path, content()):  # type: ignore[arg-type]
                won.append(name)

        threads = [threading.Thread(target=write, args=(name,)) for name in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert path.read_bytes() == bytes(won) * 1000
    assert sorted(os.listdir(tmp_path)) == sorted(str(number) for number in range(ROUNDS))


PROCESS = """
import errno, os, sys
from pathlib import Path
from shards import files, locks
def refuse(*_): raise OSError(errno.ENOTSUP, "no links")
os.link = refuse
if sys.argv[3] == "lock":
    locks._rename_new = lambda *_: None
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(40) if files.publish_new(Path(sys.argv[1]) / str(n), sys.argv[2].encode() * 5000)]
print(*won)
"""


@pytest.mark.parametrize("way", ["rename", "lock"])
def test_one_of_several_processes_wins(way: str, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), name, way], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for name in "ab"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        assert writer.stdin
    for writer in writers:
        writer.stdin.write("go\n")  # type: ignore[union-attr]
        writer.stdin.flush()  # type: ignore[union-attr]
    won = [set(writer.communicate()[0].split()) for writer in writers]
    assert won[0] | won[1] == {str(number) for number in range(40)}
    assert not won[0] & won[1]
    for name, numbers in zip("ab", won, strict=True):
        assert all((tmp_path / number).read_text() == name * 5000 for number in numbers)


def test_a_run_without_hard_links_is_a_run(no_links: str, tmp_path: Path) -> None:
    committed_stage(tmp_path / "run")
    assert verify(tmp_path / "run") == []


def _raise(code: int) -> None:
    raise OSError(code, os.strerror(code))
