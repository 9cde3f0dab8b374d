"""Writers that are killed, restarted and raced: no reader ever sees half a shard, nothing is lost or left behind."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import index
from shards.errors import Damaged
from shards.files import sha256_file
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.tar import Member, members
from shards.verify.shards import verify
from tests.support.shard_fixtures import planned_stage

ROOT = Path(__file__).parents[2]
KILLS = 12  # of either kind
CALLS = "open writev fsync link unlink rmdir"
SHAPE = {"groups": 4, "group_size": 4, "groups_per_shard": 2}

# The writer as a process of its own. With `fatal` > 0 it sends itself `signum` inside that one of the system calls
# `names` of a publication, half of the bytes written when it is a write. `salt` stands for kernels that are not
# deterministic across machines: it goes into record, video and tensors of a sample, which must never be mixed.
WRITER = """
import os, signal, sys
import numpy as np
from tests.support.shard_fixtures import make_group, make_sample
from shards.run import Run
from shards.writer import seal
from shards.spool import Sample, spooled, write_group, write_sample

run, names, (salt, start, fatal, signum) = sys.argv[1], sys.argv[2].split(), map(int, sys.argv[3:])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
calls = 0

def deadly(name, real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal and name == "writev":
            data = b"".join(arguments[1])
            os.write(arguments[0], data[: len(data) // 2])
        if calls == fatal:
            os.kill(os.getpid(), signum)
        return real(*arguments, **options)
    return call

for name in names:
    setattr(os, name, deadly(name, getattr(os, name)))
stage = Run(run).iteration(0)
print("ready", flush=True)
for turn in range(stage.expected()):
    shard = (turn + start) % stage.expected()
    done = spooled(stage, shard)
    for group in stage.groups(shard):
        write_group(stage, shard, group, make_group(group))
        for number in range(stage.plan().group_size):
            sample = make_sample(stage, group, number)
            box = (80_008).to_bytes(4, "big") + b"free" + salt.to_bytes(4, "big") * 20_000  # players skip it
            if sample.key in done or stage.is_committed(shard):
                continue
            tensors = dict(sample.tensors) | {"x0_prev": np.full(20_000, salt, np.float32)}
            write_sample(stage, shard, Sample(sample.key, sample.meta | {"salt": salt}, sample.video + box, tensors))
    seal(stage, shard, {"salt": salt})
"""


def start_writer(
    stage: Stage, salt: int = 0, start: int = 0, fatal: int = 0, names: str = CALLS, number: int = signal.SIGKILL
) -> subprocess.Popen[str]:
    """A writer that is past its imports."""
    command = [sys.executable, "-c", WRITER, str(stage.run_path), names, *map(str, (salt, start, fatal, int(number)))]
    writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n", writer.communicate()[1]
    return writer


def finish(writer: subprocess.Popen[str]) -> None:
    """Wait for a writer that must succeed."""
    _, talk = writer.communicate(timeout=600)
    assert writer.returncode == 0, talk


def damage(stage: Stage) -> list[str]:
    """What a reader, or the next writer, could trip over now. Work in progress and leftovers of the dead are not."""
    found = [problem.problem for problem in verify(stage.run_path) if problem.kind == "damaged"]
    for path in stage.path.glob("work/*/i*.tar"):
        buffer = memoryview(path.read_bytes())
        found += catch(lambda: index.sample_row(buffer, list(members(buffer, "spool")), "spool"))  # noqa: B023
    for path in stage.path.glob("work/*/i*.safetensors"):
        buffer = memoryview(path.read_bytes())
        found += catch(lambda: index.group_columns(buffer, Member("spool", 0, len(buffer)), "spool"))  # noqa: B023
    return found


def catch(check: Callable[[], object]) -> list[str]:
    """The damage a check finds."""
    try:
        check()
    except Damaged as error:
        return [str(error)]
    return []


def files(stage: Stage) -> dict[str, str]:
    """Hash of every file of a run, leftovers and locks included, by relative name."""
    paths = (path for path in stage.run_path.rglob("*") if path.is_file())
    return {str(path.relative_to(stage.run_path)): sha256_file(path) for path in paths}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Files of a run that nobody disturbed, and the seconds its writing took."""
    stage = planned_stage(tmp_path_factory.mktemp("quiet"), **SHAPE)
    writer = start_writer(stage)
    began = time.monotonic()
    finish(writer)
    seconds = time.monotonic() - began
    assert verify(stage.run_path) == []
    return files(stage), seconds


@pytest.mark.parametrize("inside_a_call", [False, True], ids=["any time", "any system call"])
def test_killed_writers_lose_nothing(
    tmp_path: Path, undisturbed: tuple[dict[str, str], float], inside_a_call: bool
) -> None:
    expected, seconds = undisturbed
    rng = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        stage = planned_stage(tmp_path / f"run{runs}", **SHAPE)
        runs += 1
        while kills < KILLS and len(stage.shards()) < stage.expected():
            known = finished_samples(stage)
            writer = start_writer(stage, fatal=rng.randrange(1, 70) if inside_a_call else 0)
            if not inside_a_call:
                time.sleep(rng.random() * seconds / 2)
                writer.kill()
            writer.communicate()
            assert writer.returncode in (0, -signal.SIGKILL)
            kills += writer.returncode != 0
            seconds *= 1 if writer.returncode else 0.5  # the machine was busier when nobody disturbed it
            assert damage(stage) == []
            assert known <= finished_samples(stage)
        finish(start_writer(stage))
        assert verify(stage.run_path) == []
        assert files(stage) == expected


def finished_samples(stage: Stage) -> set[str]:
    """Samples that survive whatever happens next: in a committed shard or in the spool."""
    committed = {key for shard in stage.shards() for key in stage.keys(shard)}
    return committed | {path.stem for path in stage.path.glob("work/*/i*-s*.tar")}


@pytest.mark.parametrize("name", ["open", "writev", "fsync", "link"])
def test_an_interrupted_writer_leaves_no_private_file(tmp_path: Path, name: str) -> None:
    """Wherever it is but in the removal of that file."""
    stage = planned_stage(tmp_path, **SHAPE)
    writer = start_writer(stage, fatal=3, names=name, number=signal.SIGINT)
    writer.communicate()
    assert writer.returncode == -signal.SIGINT
    assert damage(stage) == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_racing_writers_commit_one_consistent_run(tmp_path: Path) -> None:
    for round_number in range(3):
        stage = planned_stage(tmp_path / f"run{round_number}", **SHAPE)
        writers = [start_writer(stage, salt, start=salt * round_number % 2) for salt in (1, 2)]
        for writer in writers:
            finish(writer)
        assert verify(stage.run_path) == []
        for number in Run(stage.run_path).iteration(0).shards():
            with open_shard(stage, number) as shard:
                for key in shard.keys:
                    salt = shard.meta(key)["salt"]
                    assert shard.video(key).endswith(b"free" + salt.to_bytes(4, "big") * 20_000)
                    assert shard.trajectory(key)["x0_prev"].eq(salt).all()
        left = [
            path
            for path in stage.run_path.rglob("*")
            if path.is_file() and ("work" in path.parts or path.name[0] == ".")
        ]
        assert [path for path in left if path.name[0] == "."] == []
        late_workers_are_swept(stage, left)


def late_workers_are_swept(stage: Stage, left: list[Path]) -> None:
    """A slow worker may bring a sample after the sweep; the next worker that passes removes it."""
    finish(start_writer(stage, salt=3))
    assert not any(path.exists() for path in left)
    assert not stage.path.joinpath("work").exists()
