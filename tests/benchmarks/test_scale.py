"""The scaling benchmark: its stopwatch, what it measures, and what the page says."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import scale, scale_measure, scale_probe
from bench.scale_probe import Account, Probe, install, kinds
from shards import files
from shards.errors import RunFailed
from train.order import Unit, plan_ranks

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


# --- The stopwatch ---------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def test_every_moment_belongs_to_the_innermost_call_of_its_phase() -> None:
    clock, processor = Clock(), Clock()
    account = Account(clock, processor)
    with account.timed("train"):
        clock.wait(1)
        processor.wait(0.5)
        with account.timed("update"):
            clock.wait(2)
            with account.timed("chunk"):
                clock.wait(4)
                with account.timed("fsync"):
                    clock.wait(8)
            with account.timed("backward"):
                clock.wait(16)
                processor.wait(9)
        clock.wait(32)
        with account.timed("chunk"):
            clock.wait(64)
    assert account.own == {
        "train": {"train": 33.0, "chunk": 64.0},
        "update": {"update": 2.0, "chunk": 4.0, "fsync": 8.0, "backward": 16.0},
    }
    assert account.total == {"train": 127.0, "update": 30.0, "chunk": 76.0, "fsync": 8.0, "backward": 16.0}
    assert account.cpu == {"train": 9.5, "update": 9.0, "backward": 9.0, "chunk": 0.0, "fsync": 0.0}
    assert account.calls["chunk"] == 2
    assert (account.first["chunk"], account.last["chunk"]) == (115.0, 227.0)
    assert kinds(account.own["update"]) == {"rest": 2.0, "read": 4.0, "write": 8.0, "model": 16.0}


def test_a_call_within_itself_and_a_call_that_fails_are_counted_once() -> None:
    clock = Clock()
    account = Account(clock)

    def fail() -> None:
        with account.timed("seal"), account.timed("seal"):
            clock.wait(3)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert (account.total["seal"], account.calls["seal"], account.own[""]["seal"]) == (3.0, 1, 3.0)


def test_other_threads_are_counted_aside() -> None:
    clock = Clock()
    account = Account(clock)

    def read() -> None:
        with account.timed("chunk"):
            clock.wait(5)

    with account.timed("update"):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert account.aside == {"chunk": 5.0}
    assert account.own["update"] == {"update": 5.0}  # whoever waited for it
    assert account.calls == {"chunk": 1, "update": 1}
    assert "chunk" not in account.total


def test_probes_reach_functions_imported_by_name_and_the_ends_of_context_managers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, home, user = Clock(), ModuleType("shards.a_home"), ModuleType("rollout.a_user")

    def write() -> str:
        clock.wait(2)
        return "done"

    @contextmanager
    def held() -> Iterator[str]:
        clock.wait(4)
        yield "ours"
        clock.wait(8)

    class Thing:
        @classmethod
        def make(cls) -> Thing:
            clock.wait(16)
            return cls()

    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(write=write, held=held)
    vars(home)["Thing"] = Thing
    account = Account(clock)
    probes = (
        Probe("publish", "write", "shards.a_home:write"),
        Probe("claim", "wait", "shards.a_home:held", context=True),
        Probe("load", "phase", "shards.a_home:Thing.make"),
    )
    install(account, probes)
    assert vars(user)["write"]() == "done"
    with vars(user)["held"]() as value:
        assert value == "ours"
        clock.wait(32)
    with pytest.raises(KeyError), vars(home)["held"]():
        raise KeyError
    assert isinstance(Thing.make(), Thing)
    assert account.total == {"publish": 2.0, "claim": 16.0, "load": 16.0}
    assert account.calls == {"publish": 1, "claim": 4, "load": 1}


HOMES = {"shards.files": "write", "os:": "write", "train.checkpoint": "write", "train.data": "read",
         "torch.distributed": "wait", "shards.workers.claims": "wait", "torch.optim": "model"}  # fmt: skip


@pytest.mark.slow
def test_every_probe_of_the_benchmark_is_there() -> None:
    import importlib

    for probe in scale_probe.PROBES:
        found: Any = importlib.import_module(probe.target.partition(":")[0])
        for name in probe.target.partition(":")[2].split("."):
            found = getattr(found, name)
        assert callable(found), probe
    for home, kind in HOMES.items():
        assert {probe.kind for probe in scale_probe.PROBES if probe.target.startswith(home)} == {kind}, home


def record(rank: int, began: float, done: float, own: dict[str, float], phase: str = "rollout") -> dict[str, Any]:
    """What a probe leaves."""
    return {"rank": rank, "began": began, "ended": done + 1, "own": {phase: own}, "total": {phase: done - began},
            "cpu": {phase: 6.0, "load": 1.5}, "calls": {"publish": 3}, "first": {"load": began + 1},
            "last": {phase: done}, "aside": {},
            "bytes": {"read": 0, "written": 50}}  # fmt: skip


def test_a_worker_that_is_done_waits_for_the_last_one() -> None:
    records = [record(0, 10, 20, {"rollout": 1.0, "velocity": 8.0}), record(1, 12, 16, {"rollout": 1.0, "seal": 2.0})]
    timed = scale_measure.of_rollout(records, 18)
    assert (timed.processes, timed.rate, timed.seconds, timed.written) == (2, 2.0, 9.0, 100)  # from 11 to 20
    assert timed.shares == {"model": 0.5, "video": 0.0, "read": 0.0, "write": 0.125, "wait": 0.25, "rest": 0.125}
    assert timed.calls == {"publish": 6}
    assert timed.cpu == 2 * (6.0 - 1.5) / 18


def test_training_counts_its_updates_alone() -> None:
    records = [record(rank, 0, 5, {"update": 1.0, "chunk": 1.0, "barrier": 2.0}, "update") for rank in (0, 1)]
    timed = scale_measure.of_training(records, 40)
    assert (timed.rate, timed.cpu) == (8.0, 12.0 / 40)
    assert timed.shares["read"] == 0.25
    assert timed.shares["wait"] == 0.5


# --- What is measured ------------------------------------------------------------------------------------------------


def test_the_files_of_a_sample_are_counted_right(tmp_path: Path) -> None:
    from shards import spool, writer
    from shards.run import Stage
    from tests.support.shard_fixtures import make_group, make_plan, make_sample, plan_of

    class Counting(files.LocalFiles):
        def publish_new(self, path: Path, data: Any) -> bool:
            published.append(path)
            return super().publish_new(path, data)

    published: list[Path] = []
    stage = Stage(tmp_path, "iter-0000", 0, "rollout", Counting())
    stage.publish_plan(plan_of(make_plan(groups=2, group_size=4, groups_per_shard=2)))
    published.clear()
    for group in stage.groups(0):
        spool.write_group(stage, 0, group, make_group(group))
    for key in stage.keys(0):
        sample = make_sample(stage, key.rpartition("-")[0], int(key[-2:]))
        spool.write_phase(stage, 0, key, {"x": sample.tensors["latents"]})
        spool.write_samples(stage, 0, sample)
    writer.seal(stage, 0, {})
    assert len(published) / 8 == 2 + (2 + 3) / 8  # of each group its texts, of each shard tar, index and manifest


def test_the_order_is_checked_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scale_measure.time_order(7, 1000)
    assert found["slots"] == 4 * math.ceil(150 / 7) + 4 * math.ceil(100 / 7)
    assert found["padding"] == pytest.approx(1 - 1000 / (7 * found["slots"]))

    def forgetful(units: list[Unit], *arguments: Any, **options: Any) -> Any:
        return plan_ranks(units[1:], *arguments, **options)

    monkeypatch.setattr(scale_measure, "plan_ranks", forgetful)
    with pytest.raises(RunFailed, match="exactly once"):
        scale_measure.time_order(7, 1000)


def test_files_of_real_size_are_really_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_measure, "STATE", (16, 2, 8, 16))
    monkeypatch.setattr(scale_measure, "VIDEO", 10_000)
    measured, parts = scale_measure.time_files(tmp_path, 2, 3)
    state = 16 * 2 * 8 * 16 * 2
    tar = tmp_path / "iter-0000" / "rollout" / "shard-000000.tar"
    assert parts["tar"] == tar.stat().st_size > 2 * (7 * state + 10_000)
    assert parts["written"] > 2 * parts["tar"] + 2 * 6 * state  # the spool, the tar, x and four states in between
    assert min(measured.publish, measured.write, measured.read) > 0


def test_the_embedded_run_has_a_shard_a_prompt(tmp_path: Path) -> None:
    run = scale_measure.make_run(tmp_path / "run", scale_measure.Size(3, 4, 2), "grpo")
    rollout = run.config.rollout
    assert (rollout.prompts_per_iteration, rollout.group_size, rollout.groups_per_shard) == (3, 4, 1)
    assert run.config.train.objective == "grpo"
    assert scale_measure.Size(3, 4, 2).transitions == 3 * 4 * (rollout.high_steps + rollout.low_steps)


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="ended with 7: no luck"):
        scale_measure.launch(
            tmp_path, [(sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(7)")]
        )


# --- The page --------------------------------------------------------------------------------------------------------


def timed(rate: float, **shares: float) -> scale_measure.Timed:
    """A measurement."""
    whole = dict.fromkeys(scale_measure.KINDS, 0.0) | shares
    parts = {"claim": 0.2, "sample": 0.4, "seal": 0.6, "fsync": 0.5, "link": 0.1}
    return scale_measure.Timed(1, rate, whole, rate / 10, 8.0, parts, {"publish": 160}, 1000)


FOUND = {
    "machine": {"cpu": "Abacus", "cores": 2, "load": 1.5, "torch": "9.9"}, "load_after": 2.5, "rounds": 3,
    "size": {"prompts": 8, "group": 8, "updates": 4, "high": 2, "low": 2},
    "files": {"publish": 0.001, "write": 3e8, "read": 2e9},
    "parts": {"sealing": 1.0, "spooling": 2.0, "claim": 0.003, "tar": 2e8, "written": 6e8, "samples": 8},
    "order": {"planning": 1.0, "reading": 2.0, "padding": 0.02, "imbalance": 0.03, "slots": 200},
}  # fmt: skip


def measured_text(read: float) -> str:
    """The measured section for a share of waiting for data."""
    runs = {f"{kind} {count}": [timed(rate * count, model=0.9 - read, read=read) for rate in (1.0, 2.0, 4.0)]
            for kind in ("rollout", "nft", "grpo") for count in (1, 2)}  # fmt: skip
    return scale.measured_section("python bench/scale.py", FOUND | {"runs": scale_measure.dump(runs)})


def test_the_measured_section_says_what_was_found() -> None:
    text = measured_text(0.01)
    assert "on 2 cores of Abacus, torch 9.9. The machine was shared: its load was 1.5 before and 2.5 after" in text
    assert "| updates, GRPO | 2 | 4.00 transitions (2.00–8.00) | 400 | 89.0 % | 0.0 % | 1.0 % |" in text
    assert (
        "rollout: two processes do 2.00 times what one does, and take 2.00 times the processor time for each." in text
    )
    assert "at most 1.00 % of the updates in any round; the goal, under 2 %, is kept" in text
    assert "| claim and release | 25.0 ms, 2.50 % | 25.0 ms, 2.50 % |" in text
    assert "A video took 2.50 published files; by arithmetic it takes 2.50." in text
    assert "is missed" in measured_text(0.03)


def test_the_page_has_the_section() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("<!-- begin measured -->\n")[2].partition("<!-- end measured -->")[0]
    assert "|" in section, "the section is empty: run bench/scale.py"
    assert "no GPU" in page
