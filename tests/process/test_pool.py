"""Processes that stay from stage to stage: begun once, deaf to the signals that are their parent's, ended with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from shards.process.pool import Pool

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; a loaded machine starts Python slowly


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes start fresh, whatever a command that ran before in this one has begun."""
    monkeypatch.setattr("shards.process.pool.context_of_helpers", lambda: multiprocessing.get_context("spawn"))


def begin(word: str) -> None:
    """What each process does first."""
    os.environ["BEGUN"] = os.environ.get("BEGUN", "") + word


def begun() -> tuple[int, str]:
    """Which process answers, and what it began with."""
    return os.getpid(), os.environ["BEGUN"]


def parent() -> None:
    """For every line of stdin, say which process of a pool answers."""
    pool = Pool(begin)
    for _ in sys.stdin:
        print(pool.of(1, "").submit(os.getpid).result(), flush=True)


def only(pool: Pool) -> list[BaseProcess]:
    """The processes of its executors."""
    return [process for executor in pool.executors.values() for process in executor._processes.values()]


def exit_code(process: BaseProcess) -> int:
    """That of a process, once it has ended: unlike `join`, also when the executor's thread hears of it first."""
    deadline = time.monotonic() + PATIENCE
    while process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process.exitcode


def test_a_process_begins_once_and_is_kept_until_it_is_discarded() -> None:
    pool = Pool(begin)
    first = pool.of(1, "one").submit(begun).result()
    assert pool.of(1, "two").submit(begun).result() == first
    pool.discard()
    second = pool.of(1, "two").submit(begun).result()
    pool.discard()
    assert (first[1], second[1]) == ("one", "two")
    assert first[0] != second[0]


def test_a_process_that_is_at_work_or_dead_is_no_obstacle() -> None:
    pool = Pool(begin)
    first = pool.of(1, "").submit(os.getpid).result()
    (process,) = only(pool)
    pool.of(1, "").submit(time.sleep, 1e6)
    pool.discard()
    assert exit_code(process) == -signal.SIGTERM
    second = pool.of(1, "").submit(os.getpid).result()
    (process,) = only(pool)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    third = pool.of(1, "").submit(os.getpid).result()
    pool.discard()
    assert len({first, second, third}) == 3


def test_a_dead_process_is_seen_before_its_executor_has_noted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has told the executor's thread, and tells nobody else; the thread waits for its turn to run."""
    pool, told, noted, waitpid = Pool(begin), threading.Event(), threading.Event(), os.waitpid
    first = pool.of(1, "").submit(os.getpid).result()

    def slow(pid: int, options: int) -> tuple[int, int]:
        result = waitpid(pid, options)
        if threading.current_thread() is not threading.main_thread():
            told.set()
            noted.wait(PATIENCE)
        return result

    monkeypatch.setattr(os, "waitpid", slow)
    only(pool)[0].kill()
    assert told.wait(PATIENCE)
    second = pool.of(1, "").submit(os.getpid)
    noted.set()
    assert second.result() != first
    pool.discard()


def test_the_parent_ends_it_and_no_signal_but_its_own() -> None:
    command = [sys.executable, "-c", "from tests.process.test_pool import parent; parent()"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout

    def answers() -> int:
        print(file=process.stdin, flush=True)
        return int(process.stdout.readline())

    child = answers()
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(child, number)
    assert answers() == child
    process.kill()
    assert process.communicate(timeout=PATIENCE) == ("", None)  # nobody holds the other end any more
