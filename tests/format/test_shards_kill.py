"""Writers that are killed, restarted and raced: no reader ever sees half a shard, nothing is lost or left behind."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import index
from shards.errors import Damaged
from shards.files import sha256_file
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.spool import Sample, spooled, write_group, write_samples
from shards.tar import Member
from shards.verify.shards import verify
from shards.writer import seal
from tests.support.forks import Fork, finish
from tests.support.shard_fixtures import make_group, make_sample, planned_stage

KILLS = 12  # of either kind
CALLS = "open writev fsync link unlink rmdir"
SHAPE = {"groups": 4, "group_size": 4, "groups_per_shard": 2}
NUMBERS = itertools.count()  # of the writers


def write(
    stage: Stage, salt: int = 0, start: int = 0, fatal: int = 0, names: str = CALLS, number: int = signal.SIGKILL
) -> None:
    """A whole stage. With `fatal` > 0 it sends itself a signal inside that one of the system calls `names`, half of the
    bytes written when it is a write.

    `salt` stands for kernels that are not deterministic across machines: it goes into record, video and tensors of a
    sample, which must never be mixed.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    calls = 0

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal and name == "writev":
                data = b"".join(arguments[1])
                os.write(arguments[0], data[: len(data) // 2])
            if calls == fatal:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)

        return call

    for name in names.split():
        setattr(os, name, deadly(name, getattr(os, name)))
    plan = stage.plan()
    assert plan is not None
    for turn in range(stage.expected()):
        shard = (turn + start) % stage.expected()
        done = spooled(stage, shard)
        for group in stage.groups(shard):
            write_group(stage, shard, group, make_group(group))
            ready = []
            for one in range(plan.group_size):
                sample = make_sample(stage, group, one)
                box = (80_008).to_bytes(4, "big") + b"free" + salt.to_bytes(4, "big") * 20_000  # players skip it
                if sample.key in done or stage.is_committed(shard):
                    continue
                tensors = dict(sample.tensors) | {"x0_prev": np.full(20_000, salt, np.float32)}
                record = sample.meta | {"salt": salt}
                ready.append(Sample(sample.key, record, sample.video + box, tensors))
                if one % 2:  # two chunks in a group
                    write_samples(stage, shard, *ready)
                    ready = []
        seal(stage, shard, {"salt": salt})


def start_writer(stage: Stage, **options: Any) -> Fork:
    """A writer in a process of its own; `options` are those of `write`."""
    folder = stage.run_path.with_name(f"{stage.run_path.name}-writer-{next(NUMBERS)}")
    return Fork(folder, lambda: write(Run(stage.run_path).iteration(0), **options))


def damage(stage: Stage) -> list[str]:
    """What a reader, or the next writer, could trip over now. Work in progress and leftovers of the dead are not."""
    found = [problem.problem for problem in verify(stage.run_path) if problem.kind == "damaged"]
    for path in stage.path.glob("work/*/i*.tar"):
        buffer = memoryview(path.read_bytes())
        found += catch(lambda: index.sample_rows(buffer, "spool"))  # noqa: B023
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
                writer.send(signal.SIGKILL)
            code = writer.wait()
            assert code in (0, -signal.SIGKILL), writer.said
            kills += code != 0
            seconds *= 1 if code else 0.5  # the machine was busier when nobody disturbed it
            assert damage(stage) == []
            assert known <= finished_samples(stage)
        finish(start_writer(stage))
        assert verify(stage.run_path) == []
        assert files(stage) == expected


def finished_samples(stage: Stage) -> set[str]:
    """Samples that survive whatever happens next: in a committed shard or in the spool."""
    committed = {key for shard in stage.shards() for key in stage.keys(shard)}
    return committed.union(*(spooled(stage, shard) for shard in range(stage.expected())))


@pytest.mark.parametrize("name", ["open", "writev", "fsync", "link"])
def test_an_interrupted_writer_leaves_no_private_file(tmp_path: Path, name: str) -> None:
    """Wherever it is but in the removal of that file."""
    stage = planned_stage(tmp_path, **SHAPE)
    writer = start_writer(stage, fatal=3, names=name, number=signal.SIGINT)
    assert writer.wait() != 0
    assert "KeyboardInterrupt" in writer.said
    assert damage(stage) == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_racing_writers_commit_one_consistent_run(tmp_path: Path) -> None:
    for round_number in range(3):
        stage = planned_stage(tmp_path / f"run{round_number}", **SHAPE)
        writers = [start_writer(stage, salt=salt, start=salt * round_number % 2) for salt in (1, 2)]
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
