"""Metrics reach trackers while a stage works, and a tracker that fails stops nothing."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.measures import Measure, StageReward
from shards.run import Run
from shards.settings.trust import trust
from shards.trackers import live
from train.metrics import MetricsLog

OWN = """
import json, pathlib
class Mine:
    requires_logging_directory = True
    def __init__(self, name, logging_dir):
        self.file = pathlib.Path(logging_dir) / f"{name}.jsonl"
    def log(self, values, step):
        with self.file.open("a") as file:
            file.write(json.dumps([step, values]) + "\\n")
    def finish(self):
        with self.file.open("a") as file:
            file.write('"end"\\n')
class Broken(Mine):
    def log(self, values, step):
        raise OSError("no route to\\nhost")
"""
REWARD = StageReward("iter-0003", "rollout", Measure(0.5, 0.02, 32, 8, 6), 0, 0.1)


def make_run(path: Path, *trackers: str) -> Run:
    path.mkdir()
    (path / "own.py").write_text(OWN, encoding="utf-8")
    trust(path / "own.py")
    names = json.dumps([name.replace("OWN", str(path / "own.py")) for name in trackers])
    (path / "run.toml").write_text(f"schema = 1\n[track]\nto = {names}\n", encoding="utf-8")
    return Run.open(path)


def record(update: int) -> dict[str, object]:
    names = {"iteration": 3, "expert": "high_noise", "update": update, "total_updates": update}
    return names | {"loss": update / 4, "kl": float("nan")}


def train(run: Run) -> None:
    """Two updates and a reward, as `rushes loop` reports them."""
    with live.tracking(run):
        log = MetricsLog(run.iteration(3), {})
        for update in (1, 2):
            log.add(record(update))
        log.close()
        live.track_reward(REWARD)


def test_a_tracker_of_ones_own_gets_updates_and_rewards(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", "OWN:Mine")
    train(run)
    lines = (run.report_dir / "live" / "signs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        [1, {"high_noise/loss": 0.25}],
        [2, {"high_noise/loss": 0.5}],
        [3, {"training/reward": 0.5, "training/reward_error": 0.02, "training/groups_used": 0.75}],
        "end",
    ]
    live.track_reward(REWARD)  # nobody is told afterwards
    assert len((run.report_dir / "live" / "signs.jsonl").read_text().splitlines()) == len(lines)


def test_a_tracker_that_nobody_named_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", "OWN:Mine")
    (tmp_path / "signs" / "own.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.py has changed since it was trusted"), live.tracking(run):
        pass
    named = Run(run.path, [f"track.to=['{run.path}/own.py:Mine']"])
    with pytest.raises(SystemExit), live.tracking(named):  # this call names it
        pass


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "signs", "OWN:Broken", "OWN:Mine")
    train(run)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{run.path}/own.py:Broken: OSError: no route to host (hint: it gets no more metrics" in said
    assert len((run.report_dir / "live" / "signs.jsonl").read_text().splitlines()) == 4
    assert len((run.iteration(3).metrics_path).read_text().splitlines()) == 2


def test_a_folder_of_a_tracker_that_leads_out_of_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "signs", "OWN:Mine")
    (tmp_path / "elsewhere").mkdir()
    run.report_dir.mkdir()
    (run.report_dir / "live").symlink_to(tmp_path / "elsewhere")
    train(run)
    assert f"{run.report_dir}/live: a link that leads out of the run" in capsys.readouterr().err
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    class Stuck:
        def __init__(self, name: str) -> None: ...

        def log(self, values: dict[str, float], step: int) -> None:
            go_on.wait()

    monkeypatch.setattr(live, "PATIENCE", 0.01)
    monkeypatch.setattr(live, "_class_of", lambda name: Stuck)
    train(make_run(tmp_path / "signs", "stuck:Stuck"))
    assert "tracker stuck:Stuck: it has not taken the last metrics within 0.01 s" in capsys.readouterr().err
    go_on.set()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wanbd", r"track\.to: no tracker 'wanbd' \(hint: did you mean wandb\? there are: aim, "),
        ("aim", r"track\.to: aim is not installed \(hint: pip install aim"),
        (
            "OWN:Nobody",
            r"tracker .*: module .*own\.py has no 'Nobody' \(hint: write it as `module:Class`",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything(tmp_path: Path, name: str, message: str) -> None:
    run = make_run(tmp_path / "signs", name)
    with pytest.raises(UserError, match=message), live.tracking(run):
        raise AssertionError("too late")


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path / "signs", "tensorboard")
    train(run)
    events = EventAccumulator(str(run.report_dir / "live" / "signs")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("high_noise/loss")] == [(1, 0.25), (2, 0.5)]
    assert [(one.step, one.value) for one in events.Scalars("training/reward")] == [(3, 0.5)]


def test_weights_and_biases_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path / "signs", "wandb")
    train(run)
    [log] = (run.report_dir / "live").glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 120  # a process of the package writes it, at times after the run has ended
    while missing := [name for name in (b"high_noise/loss", b"training/reward") if name not in log.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)
