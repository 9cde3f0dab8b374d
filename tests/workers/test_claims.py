"""Claims: who counts lives, who is silent for too long is dead, and nobody compares two clocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.errors import RunFailed, UserError
from shards.process.versions import our_version
from shards.run import Run, Stage
from shards.workers import claims, owners
from shards.workers.claims import claim
from shards.workers.owners import claims_of, life, sweep
from shards.workers.worker import order
from tests.support.clock import Clock

ROOT = Path(__file__).parents[2]
SECONDS = 0.25  # an owner then counts as often as one can, every 0.02 s
PATIENCE = 120.0  # a loaded machine may let nobody count for a while
HOUR = 3600.0

# A worker of its own: claims shard 0 and holds it until it is ended; says what it finds when it is woken by a line.
OWNER = """
import sys
from pathlib import Path
from shards.workers import claims
from shards.run import Run
if sys.argv[2] == "no locks":
    def flock(*arguments): raise OSError(37, "no locks available")
    claims.fcntl.flock = flock
with claims.claim(Run(sys.argv[1]).iteration(0), 0, "rollout", float(sys.argv[3]), (1, 2)) as held:
    print(bool(held), flush=True)
    sys.stdin.readline()
    held.beat()
    print(held.lost, flush=True)
print("released", flush=True)
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A stage without a plan: claims need none."""
    return Run(tmp_path).iteration(0)


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one without."""
    if request.param == "no locks":
        monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    return str(request.param)


def no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock by which claims become void; owners, in processes of their own, count on as they do."""
    made = Clock()
    monkeypatch.setattr(owners, "time", made)
    return made


class Owner:
    """A worker in a process of its own that holds the claim of shard 0."""

    def __init__(self, stage: Stage, locks: str = "locks", seconds: float = SECONDS) -> None:
        command = [sys.executable, "-c", OWNER, str(stage.run_path), locks, str(seconds)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.says() == "True"

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def wake(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Return when it does nothing any more."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        """Take a stop back."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def make_owner() -> Iterator[Callable[..., Owner]]:
    """Makes owners, and ends those that are left."""
    made: list[Owner] = []

    def make(stage: Stage, locks: str = "locks", seconds: float = SECONDS) -> Owner:
        made.append(Owner(stage, locks, seconds))
        return made[-1]

    yield make
    for owner in made:
        if owner.process.poll() is None:
            owner.go_on()
            owner.kill()


def only(stage: Stage) -> Path:
    """The one claim file of a stage."""
    [found] = claims_of(stage)
    return found.path


def seconds_until_taken(stage: Stage, clock: Clock) -> float:
    """Try again and again, as a waiting worker does; the seconds that have passed for it."""
    began = clock.now
    while clock.now - began < 4 * SECONDS:
        with claim(stage, 0, "rollout", SECONDS) as held:
            if held:
                return clock.now - began
        clock.now += SECONDS / 8
    raise AssertionError("never taken")


def next_count(path: Path, before: bytes) -> bytes:
    """The content of a claim once its owner has counted on."""
    deadline = time.monotonic() + PATIENCE
    while (content := path.read_bytes()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return content


def test_who_counts_keeps_the_claim(stage: Stage, locks: str, clock: Clock, make_owner: Callable[..., Owner]) -> None:
    """Also when its file looks an hour old or an hour young: no time stamp is read.

    It is stopped for the two looks of each turn, which must not see it count in between.
    """
    owner = make_owner(stage, locks)
    states = []
    content = b""
    for _ in range(2 * claims.BEATS):
        next_count(only(stage), content)
        owner.stop()
        content = only(stage).read_bytes()
        now = time.time()
        os.utime(only(stage), (now - HOUR, now - HOUR) if len(states) % 2 else (now + HOUR, now + HOUR))
        with claim(stage, 0, "rollout", SECONDS) as held:
            assert held is None
        states.append(life(claims_of(stage)[0], SECONDS))
        owner.go_on()
        clock.now += SECONDS / claims.BEATS
    assert states[0] == ("alive" if locks == "locks" else "silent")
    assert set(states[1:]) == {"alive"}
    owner.wake()
    assert owner.says() == "False"
    assert owner.says() == "released"
    assert not (stage.path / "work").exists()


def test_a_killed_owner_without_locks_is_dead_after_its_time(
    stage: Stage, clock: Clock, make_owner: Callable[..., Owner]
) -> None:
    """Its file has a time an hour ahead: a clock that is wrong does not make it live longer."""
    make_owner(stage, "no locks").kill()
    os.utime(only(stage), (time.time() + HOUR,) * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims.fcntl, "flock", no_locks)
        assert seconds_until_taken(stage, clock) == SECONDS
    assert not (stage.path / "work").exists()


def test_the_kernel_tells_at_once_of_a_death_on_this_machine(
    stage: Stage, clock: Clock, make_owner: Callable[..., Owner]
) -> None:
    make_owner(stage, seconds=600.0).kill()
    with claim(stage, 0, "rollout", 600.0) as held:
        assert held
        assert held.path.name.endswith("claim-0002")


def test_a_free_lock_says_nothing_of_another_machine(
    stage: Stage, clock: Clock, make_owner: Callable[..., Owner]
) -> None:
    """Some network file systems keep locks to the machine that took them."""
    make_owner(stage).kill()
    path = only(stage)
    head, _, count = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(head) | {"host": "elsewhere"}).encode() + b"\n" + count)
    assert seconds_until_taken(stage, clock) == SECONDS


def test_a_stopped_owner_loses_the_claim_and_does_no_harm(
    stage: Stage, clock: Clock, make_owner: Callable[..., Owner]
) -> None:
    owner = make_owner(stage)
    owner.stop()
    first = only(stage)
    for passed in (0.0, 0.75 * SECONDS):
        clock.now += passed
        with claim(stage, 0, "rollout", SECONDS) as held:
            assert held is None
    clock.now += 0.25 * SECONDS
    with claim(stage, 0, "rollout", SECONDS) as held:
        assert held
        assert not first.exists()
        mine = held.path.read_bytes()
        owner.go_on()
        owner.wake()
        assert owner.says() == "True"
        assert owner.says() == "released"
        assert held.path.read_bytes().partition(b"\n")[0] == mine.partition(b"\n")[0]
        held.require()


def test_work_that_must_not_be_done_twice_asks(stage: Stage) -> None:
    with claim(stage, 0, "train", SECONDS) as held:
        assert held
        held.require()
        held.path.rename(held.path.with_name("gone"))
        with pytest.raises(RunFailed, match=r"train\.claim-0001 was taken over"):
            held.require()
        held.path.write_text("of another owner")
    assert held.path.read_text() == "of another owner"  # what is not ours is not removed


def test_of_many_who_find_a_dead_owner_one_gets_the_claim(stage: Stage, locks: str, clock: Clock) -> None:
    for turn in range(20):
        folder = stage.path / "work"
        folder.mkdir(parents=True, exist_ok=True)
        dead = folder / f"shard-000000.rollout.claim-{2 * turn + 1:04d}"
        record = {"owner": str(turn), "host": "elsewhere", "boot": "", "pid": 1, "worker": "0/1", "every": 0.01}
        dead.write_text(json.dumps(record | {"locked": False, "version": our_version()}) + "\n000000000001\n")
        assert life(claims_of(stage)[0], 0.05) == "silent"
        clock.now += 0.06
        assert race(stage) == [f"shard-000000.rollout.claim-{2 * turn + 2:04d}"]
        assert not dead.exists()


def race(stage: Stage) -> list[str]:
    """Six threads that claim shard 0 at the same moment; the names of the claims that they got, and have given up."""
    gate, over, won = threading.Barrier(6), threading.Barrier(6), []

    def run() -> None:
        gate.wait()
        with claim(stage, 0, "rollout", 0.05) as held:
            won.extend([held.path.name] if held else [])
            over.wait(PATIENCE)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_an_owner_of_another_version_is_refused(
    stage: Stage, make_owner: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_owner(stage)
    monkeypatch.setattr(claims, "our_version", lambda: "99.0")
    refused = pytest.raises(UserError, match=r"was claimed by rushes .* on .*, this is 99\.0")
    with refused as error, claim(stage, 0, "rollout", SECONDS):
        pass
    assert "one version for all workers" in error.value.hint


def test_a_file_that_is_no_claim_is_waited_for_and_then_taken(stage: Stage, clock: Clock) -> None:
    folder = stage.path / "work"
    folder.mkdir(parents=True)
    (folder / "shard-000000.rollout.claim-0001").write_bytes(b'{"owner": "x"')
    assert seconds_until_taken(stage, clock) == SECONDS


def test_claims_that_are_off_are_given_to_everybody(stage: Stage) -> None:
    with claim(stage, 0, "rollout", 0) as one, claim(stage, 0, "rollout", 0) as other:
        assert one
        assert other
        one.require()
        assert not (stage.path / "work").exists()


def test_claims_of_the_dead_are_swept_and_those_of_the_living_kept(
    stage: Stage, make_owner: Callable[..., Owner]
) -> None:
    make_owner(stage).kill()
    with claim(stage, 1, "rollout") as held:
        assert held
        sweep(stage, "rollout")
        assert [found.shard for found in claims_of(stage)] == [1]
    assert claims_of(stage) == []


def test_a_claim_counts_while_the_owner_works(stage: Stage) -> None:
    with claim(stage, 3, "score", SECONDS, (2, 5)) as held:
        assert held
        before = held.path.read_bytes()
        after = next_count(held.path, before)
        assert len(before) == len(after)
        assert before.partition(b"\n")[0] == after.partition(b"\n")[0]
        [found] = claims_of(stage)
        assert found.owner
        assert (found.owner.worker, found.owner.pid, found.shard, found.what) == ("2/5", os.getpid(), 3, "score")
    assert fcntl.flock is not no_locks


def test_a_worker_begins_with_its_share_and_goes_on_with_that_of_the_next() -> None:
    assert order(range(6), (1, 3)) == [1, 4, 2, 5, 0, 3]
    assert order([0, 3, 4], (0, 1)) == [0, 3, 4]
    with pytest.raises(UserError, match="worker 3/3 does not exist"):
        order(range(6), (3, 3))
