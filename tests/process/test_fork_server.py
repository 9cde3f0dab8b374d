"""Helpers that are forks of a process with the imports: what they have, what they have not, and how all of it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from shards.process.fork_server import has_gpus, import_ahead
from shards.process.pool import Pool

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds
SLOW = 60.0  # seconds of an import
pytestmark = pytest.mark.skipif(has_gpus(), reason="helpers start fresh on a machine with GPUs")


def nothing() -> None:
    """What each process does first."""


def seen() -> tuple[int, list[str], str | None]:
    """Of a helper: its process, what was imported before it began, and what it has of the environment."""
    imported = [name for name in ("first", "raising", "last") if name in sys.modules]
    return os.getpid(), imported, os.environ.get("SINCE")


def parents() -> list[int]:
    """Of a helper: the process that it is a fork of, and itself."""
    return [os.getppid(), os.getpid()]


def command() -> None:
    """A command: imports ahead, then a pool that is asked by every line of stdin."""
    import_ahead(["first", "no_such_module", "raising", "last"])
    import_ahead(["slow"])  # too late, and no harm
    os.environ["SINCE"] = "set later"
    pool = Pool(nothing)
    for line in sys.stdin:
        work = {"seen": seen, "parents": parents}[line.strip()]
        try:
            found = pool.of(1).submit(work).result()
        except BrokenProcessPool:  # it is dead, but the process that it is a fork of had not said so yet
            pool.discard()
            found = pool.of(1).submit(work).result()
        print(*found, sep="|", flush=True)


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder of modules that nobody else imports."""
    for name, code in {"first": "", "raising": "1 / 0", "last": "", "slow": f"import time; time.sleep({SLOW})"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


def running(
    modules: Path, code: str = "from tests.process.test_fork_server import command; command()"
) -> subprocess.Popen[str]:
    """That command in a process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(modules), str(ROOT)])}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], word: str) -> list[str]:
    """What a helper of the command answers."""
    assert process.stdin
    assert process.stdout
    print(word, file=process.stdin, flush=True)
    return process.stdout.readline().strip().split("|")


def alive(number: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_helper_has_the_imports_and_the_environment_of_its_parent(modules: Path) -> None:
    process = running(modules)
    first, imported, since = ask(process, "seen")
    assert ask(process, "seen")[0] == first
    assert imported == "['first', 'last']"
    assert since == "set later"
    out, _ = process.communicate(timeout=PATIENCE)
    assert (out, process.returncode) == ("", 0)


def test_signals_that_reach_all_are_for_the_command(modules: Path) -> None:
    process = running(modules)
    server, helper = map(int, ask(process, "parents"))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(server, number)
    assert ask(process, "parents") == [str(server), str(helper)]
    os.kill(helper, signal.SIGTERM)  # which a fork does not ignore
    deadline = time.monotonic() + PATIENCE
    while alive(helper):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask(process, "parents")[0] == str(server)
    process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "at its end"])
def test_nothing_is_left_of_a_command(end: signal.Signals | None, modules: Path) -> None:
    process = running(modules)
    numbers = [int(number) for number in ask(process, "parents")]
    if end is not None:
        process.send_signal(end)
    assert process.communicate(timeout=PATIENCE)[0] == ""  # nobody holds the other end of the pipe any more
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_a_command_that_ends_early_does_not_wait_for_the_imports(pause: float, modules: Path) -> None:
    code = f"import time, shards.process.fork_server as one; one.import_ahead(['slow']); time.sleep({pause})"
    process, began = running(modules, code), time.monotonic()
    assert process.communicate(timeout=PATIENCE)[0] == ""
    assert time.monotonic() - began < SLOW


def test_helpers_start_fresh_where_there_are_gpus(modules: Path) -> None:
    code = (
        "import pathlib, shards.process.fork_server as one; one.GPUS = (pathlib.Path('/none'), pathlib.Path('/'));"
        "one.import_ahead(['first']); print(one.context_of_helpers().get_start_method())"
    )
    assert running(modules, code).communicate(timeout=PATIENCE)[0] == "spawn\n"
