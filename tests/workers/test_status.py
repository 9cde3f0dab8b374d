"""`rushes status`: shards, rates and workers from files alone, also while others write and kill each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cli
from shards import sidecar
from shards.errors import UserError
from shards.process.versions import our_version
from shards.run import Run, Stage
from shards.spool import write_group, write_samples
from shards.workers import owners
from shards.workers.claims import claim
from shards.workers.status import Part, Status, Worker, render, status
from shards.writer import seal
from tests.support.clock import Clock
from tests.support.cost import loaded_by
from tests.support.shard_fixtures import advantage_frame, fill, make_group, make_sample, planned_stage, score_frame

SCORER = "ocr-00000000"
NOON = 1_700_000_000.0
EVERY_MINUTE = 60.0


class Enough(Exception):
    """Ends a loop that would not end."""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Four shards of two samples: two committed, one begun, one untouched; the first one scored."""
    made = planned_stage(tmp_path, groups=4, group_size=2)
    (tmp_path / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    for shard in (0, 1):
        fill(made, shard)
        seal(made, shard, {})
    group = made.groups(2)[0]
    write_group(made, 2, group, make_group(group))
    write_samples(made, 2, make_sample(made, group, 0))
    sidecar.write_scores(made, 0, SCORER, score_frame(made, 0), {})
    return made


def part(stage: Stage, what: str, **more: Any) -> Part:
    """One line of the table."""
    found = status(Run(stage.run_path), **more)
    [one] = [one for one in found.parts if one.what == what and one.stage == stage.name]
    return one


def test_what_is_done_claimed_and_left(stage: Stage) -> None:
    with claim(stage, 2, "rollout"), claim(stage, 1, "score"):
        rollout, scored = part(stage, "rollout"), part(stage, "score")
    assert (rollout.done, rollout.claimed, rollout.left, rollout.total) == (2, 1, 1, 4)
    assert (rollout.samples, rollout.samples_total) == (5, 8)
    assert (scored.name, scored.done, scored.claimed, scored.left) == (SCORER, 1, 1, 2)
    rollout = part(stage, "rollout")
    assert (rollout.done, rollout.claimed, rollout.left) == (2, 0, 2)
    assert rollout.seconds_left is None  # nobody works on it
    assert part(stage, "advantage").done == 0
    sidecar.write_advantages(stage, 0, "00000000", advantage_frame(stage, 0), {})
    assert (part(stage, "advantage").name, part(stage, "advantage").done) == ("00000000", 1)


def test_rates_come_from_the_clock_of_the_file_system_alone(stage: Stage) -> None:
    """Nothing changes when that clock is years away from ours, as it is here, or when ours is wrong."""
    times = {stage.plan_path: 0.0, stage.manifest_path(0): 4.0, stage.manifest_path(1): 8.0}
    times[next(stage.work_path(2).glob("*.tar"))] = 9.0
    for path, minutes in times.items():
        os.utime(path, (NOON + minutes * EVERY_MINUTE,) * 2)
    with claim(stage, 2, "rollout", 600.0) as held:
        assert held
        with held.guard:  # no beat writes the file, with the time of today, between these two
            os.utime(held.path, (NOON + 10 * EVERY_MINUTE,) * 2)
            rollout = part(stage, "rollout")
    assert rollout.per_hour == pytest.approx(5 * 6)  # five samples in ten minutes
    assert rollout.seconds_left == pytest.approx(3 / 30 * 3600)
    os.utime(stage.plan_path, (NOON - 50 * 3600,) * 2)  # it was left alone for two days: only the last hour counts
    os.utime(stage.manifest_path(0), (NOON - 49 * 3600,) * 2)
    assert part(stage, "rollout").per_hour == pytest.approx(3)
    for number, path in enumerate(times):  # copied without its times
        os.utime(path, (NOON + 0.01 * number,) * 2)
    assert part(stage, "rollout").per_hour is None


def test_updates_of_the_training_are_counted(stage: Stage) -> None:
    stage.policy_dir.mkdir()
    log = stage.policy_dir / "metrics.jsonl"
    rows = [{"iteration": 0, "expert": "high_noise", "update": one, "total_updates": one} for one in (1, 2)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"expert": "hi')
    stage.train_dir.mkdir()
    stage.train_plan_path.write_text("{}")
    os.utime(stage.train_plan_path, (NOON,) * 2)
    os.utime(log, (NOON + 60,) * 2)
    with claim(stage, 0, "train"), claim(stage, 1, "train"):  # one process trains both
        high, low = trainings(stage)
    assert (high.name, high.done, high.claimed, high.left, high.total) == ("high_noise", 2, 0, 0, 2)
    assert (low.name, low.done, low.claimed, low.left, low.total) == ("low_noise", 0, 1, 2, 2)
    assert high.unit == low.unit == "updates"
    assert low.per_hour == pytest.approx(120)
    assert low.seconds_left == pytest.approx(60)
    own = stage.expert_metrics_path("low_noise")  # a process trains the other one
    own.write_text(json.dumps(rows[0] | {"expert": "low_noise"}) + "\n")
    os.utime(own, (NOON + 90,) * 2)
    with claim(stage, 1, "train"):
        high, low = trainings(stage)
        text = render(status(Run(stage.run_path)))
    assert (high.done, high.claimed, low.done, low.claimed, low.left) == (2, 0, 1, 1, 1)
    assert low.per_hour == pytest.approx(40)
    assert low.seconds_left == pytest.approx(90)
    assert "iter-0000 train low_noise, alive" in text


def trainings(stage: Stage) -> list[Part]:
    """What `status` says of the training of each expert."""
    return [one for one in status(Run(stage.run_path)).parts if one.what == "train"]


def test_workers_are_told_alive_from_dead(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts elsewhere, one whose lock is held, one that does not count, and one that was killed here."""
    run = Run(stage.run_path)
    code = (
        "import sys, time\nfrom shards.workers import claims\nfrom shards.run import Run\n"
        "with claims.claim(Run(sys.argv[1]).iteration(0), 3, 'rollout'):\n    print(flush=True)\n    time.sleep(600)\n"
    )
    with claim(stage, 0, "score"), claim(stage, 1, "score", 3.0) as elsewhere:
        assert elsewhere
        elsewhere.head = pretend(elsewhere.head, host="far", locked=False)
        write_foreign(stage, 2, host="gone", every=0.25)
        killed = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
        assert killed.stdout
        killed.stdout.readline()
        clock = Clock(meanwhile=elsewhere.beat)
        monkeypatch.setattr(owners, "time", clock)
        monkeypatch.setattr("shards.workers.status.time", clock)
        assert states(run) == {0: "alive", 1: "alive", 2: "silent", 3: "alive"}
        killed.kill()
        killed.communicate()
        elsewhere.beat()
        found = status(run, quick=True)
        assert {one.shard: one.state for one in found.workers}[3] == "dead"
        assert [one.sure for one in found.workers if one.shard == 2] == [False]
        text = render(found)
    assert "workers: 2 alive; claims: 2 of theirs, 1 silent (perhaps alive), 1 dead (void)" in text
    assert found.as_dict()["workers_alive"] == 2


def states(run: Run) -> dict[int, str]:
    """State of the worker of each shard."""
    return {one.shard: one.state for one in status(run).workers}


def pretend(head: bytes, **values: Any) -> bytes:
    """The first line of a claim, with other values."""
    return json.dumps(json.loads(head) | values).encode() + b"\n"


def write_foreign(stage: Stage, shard: int, **values: Any) -> None:
    """A claim that nobody counts on."""
    record = {"owner": "x", "host": "far", "boot": "", "pid": 7, "worker": "0/1", "every": 1.0, "locked": False}
    head = pretend(json.dumps(record | {"version": our_version()}).encode(), **values)
    (stage.path / "work" / f"shard-{shard:06d}.rollout.claim-0001").write_bytes(head + b"000000000001\n")


def test_only_what_is_in_work_is_shown(stage: Stage) -> None:
    run = Run(stage.run_path)
    assert {one.stage for one in status(run).parts} == {"iter-0000"}
    stage.policy_dir.mkdir()
    (stage.policy_dir / "policy.json").write_text("{}")
    assert {one.stage for one in status(run).parts} == {"iter-0000"}  # the last one, when all are finished
    planned_stage(stage.run_path, 1)
    found = status(run)
    assert found.trained == 1
    assert {one.stage for one in found.parts} == {"iter-0001"}
    assert {one.stage for one in status(run, 0).parts} == {"iter-0000"}
    assert status(run, 7).parts == []
    assert "nothing is planned yet" in render(status(run, 7))
    run.iteration(2).path.mkdir()  # by a rollout that ended before it had a plan
    assert {one.stage for one in status(run).parts} == {"iter-0001"}


def test_the_table_fits_a_terminal_of_80_columns(stage: Stage) -> None:
    """Also with a long run: names of rewards are cut in the middle, times from 100 hours on are days."""
    counts = 128, 100, 16, 12, 1600, 2048, 1234.5
    parts = [
        Part("eval/iter-0012", "score", name, "shards", *counts, seconds)
        for name, seconds in (("videoalign-1a2b3c4d", 359_999.0), ("videoalign-ffff0000", 360_000.0), ("", None))
    ]
    workers = [Worker("eval/iter-0012", "rollout", 7, "node-" * 12 + "1", 123456, "17/64", "alive", True)]
    lines = render(Status("run", 12, parts, workers)).splitlines()
    assert max(map(len, lines)) == 80
    assert "score vid…-1a2b3c4d" in lines[2]
    assert lines[2].endswith("99:59:59")
    assert "score vid…-ffff0000" in lines[3]
    assert lines[3].endswith("4 days")
    assert lines[2].split()[-6:] == ["100/128", "16", "12", "1600/2048", "1234", "99:59:59"]
    assert " ".join(" ".join(lines[6:]).split()) == (
        f"{'node-' * 12}1 process 123456, worker 17/64: eval/iter-0012 rollout 7, alive"
    )


def test_rewards_are_shown_by_the_weights_of_the_run(stage: Stage) -> None:
    run = Run(stage.run_path)
    assert status(run).rewards == []
    for iteration, mean, weights in ((0, 0.25, {"ocr": 1.0}), (1, 0.375, {"ocr": 1.0}), (2, 0.9, {"motion": 1.0})):
        record = {
            "schema": 1, "specification": {"weights": weights}, "samples": 17, "missing": 1, "groups": 4,
            "used_groups": 3, "mean_reward": mean, "std_reward": 0.2,
        }  # fmt: skip
        for of in (run.iteration, run.evaluation):
            path = of(iteration).summary_path("00000000")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(record))
    found = status(run)
    assert [str(one) for one in found.rewards] == [
        "reward 0.375 ± 0.050 (+0.125 since iteration 0), 3 of 4 groups used",
        "reward 0.375 ± 0.050 (+0.125 since iteration 0)",
    ]
    assert "\niter-0001 reward 0.375 ± 0.050 (+0.125 since iteration 0), 3 of 4 groups used\n" in render(found)
    assert [one["now"]["mean"] for one in found.as_dict()["rewards"]] == [0.375, 0.375]
    assert next(str(one) for one in status(run, 0).rewards) == "reward 0.250 ± 0.050, 3 of 4 groups used"
    assert status(run, 2).rewards == []


def test_the_command_prints_a_table_or_json_and_loads_nothing_heavy(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(stage.run_path)
    before = sorted(stage.run_path.rglob("*"))
    cli.app(["status", path], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 0 iterations are trained"
    assert lines[1].split()[:5] == ["stage", "part", "done", "claimed", "left"]
    assert lines[2].split()[:5] == ["iter-0000", "rollout", "2/4", "0", "2"]
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise Enough

    monkeypatch.setattr(cli.time, "sleep", pause)
    with pytest.raises(Enough):
        cli.app(["status", path, "--json", "--watch", "5"], standalone_mode=False)
    assert pauses == [5, 5]
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    assert records[0]["parts"][0]["done"] == 2
    assert records[0]["workers_alive"] == 0
    assert sorted(stage.run_path.rglob("*")) == before
    assert loaded_by("status", path) == set()
    with pytest.raises(UserError, match=rf"is not a run: it has no run.toml \(hint: the run is {path}\)"):
        cli.app(["status", str(stage.path)], standalone_mode=False)


@pytest.mark.parametrize("pause", ["-1", "nan", "inf", "1e10"])
def test_a_pause_that_no_clock_can_wait_is_refused(
    stage: Stage, capsys: pytest.CaptureFixture[str], pause: str
) -> None:
    with pytest.raises(UserError, match=r"^--watch .*: no pause in seconds \(hint: for example --watch 10"):
        cli.app(["status", str(stage.run_path), "--watch", pause], standalone_mode=False)
    assert not capsys.readouterr().out


def test_a_very_long_pause_is_waited(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep

    def enough(*_: object) -> None:
        raise Enough

    def pause(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # not before: who knows how long the first look takes
        sleep(seconds)

    monkeypatch.setattr(cli.time, "sleep", pause)
    before = signal.signal(signal.SIGALRM, enough)
    try:
        with pytest.raises(Enough):
            cli.app(["status", str(stage.run_path), "--watch", "1e9"], standalone_mode=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "iter-0000" in capsys.readouterr().out


def test_it_works_while_everything_runs(stage: Stage) -> None:
    """Workers commit, sweep and die under its eyes; it only ever sees more done."""
    code = (
        "import sys, time\nfrom tests.support.shard_fixtures import fill\nfrom shards.workers import claims\n"
        "from shards.run import Run\nfrom shards.writer import seal\nstage = Run(sys.argv[1]).iteration(0)\n"
        "for shard in range(4):\n    with claims.claim(stage, shard, 'rollout') as held:\n"
        "        if held:\n            time.sleep(0.05); fill(stage, shard); time.sleep(0.05); seal(stage, shard, {})\n"
    )
    root = Path(__file__).parents[2]
    workers = [subprocess.Popen([sys.executable, "-c", code, str(stage.run_path)], cwd=root) for _ in range(2)]
    seen = []
    until = time.monotonic() + 120
    while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
        seen.append(part(stage, "rollout", quick=True))
    assert [worker.wait() for worker in workers] == [0, 0]
    seen.append(part(stage, "rollout"))
    assert sorted(one.done for one in seen) == [one.done for one in seen]
    assert all(one.done + one.claimed + one.left == 4 for one in seen)
    assert (seen[-1].done, seen[-1].claimed, seen[-1].samples) == (4, 0, 8)
