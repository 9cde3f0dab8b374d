"""The scaling benchmark: its stopwatch, its arithmetic recomputed by hand, and what the page says."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import scale, scale_limits, scale_measure, scale_probe, scale_tables
from bench.scale_probe import Account, Probe, install, kinds
from bench.scale_simulation import Assumed, Iteration, Measured, Scene, Units
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


# --- The simulation, by hand -----------------------------------------------------------------------------------------

UNITS = Units(forward=1000.0, trained=12_000.0, decode=400.0, tokens=100, width=10, layers=3, weights=8000, lora=50,
              text=2000, vae=1000, state=100, working=9000)  # fmt: skip
ASSUMED = Assumed(flops=100.0, tf32=80.0, mfu=0.5, gpus=8, memory=15_000, host=1e6, pcie=400.0, nvlink=1000.0,
                  network=500.0, fs_read=4000.0, fs_write=2000.0, fs_files=10.0, machine_io=1000.0, video=300.0,
                  failures=2, detect=5, requeue=7)  # fmt: skip
MEASURED = Measured(publish=0.5, write=50.0, read=20.0)
WORK = Iteration(prompts=6, group=4, groups_per_shard=2, steps=5, high=2, low=1, updates=2, replay=3)


def scene(gpus: int, **changes: Any) -> Scene:
    """The little cluster."""
    return Scene(gpus, UNITS, replace(WORK, **changes), MEASURED, ASSUMED)


def test_a_sample_by_hand() -> None:
    one = scene(2)
    assert (WORK.videos, WORK.shards, WORK.samples, WORK.states) == (24, 3, 8, 7)
    assert (one.rollout_degree, one.workers) == (1, 2)
    assert one.sample_bytes == 7 * 100 + 300
    assert one.written_bytes == 2 * 100 + 2 * 2 * 100 + 2 * 1000
    assert one.files == 2 + (2 + 3) / 8
    assert one.sample_seconds() == {
        "forwards of the rollout": 2 * 5 * 1000 / (100 * 0.5),  # 200 s
        "Ulysses in the rollout": 0.0,
        "decoding": 400 / (80 * 0.5),  # 10 s
        "writing shards": 2600 / 50 + 2.625 * 0.5,
        "swapping experts": 2 * 8000 / 400 / 8,  # 5 s
    }
    assert one.rollout_seconds() == 2 * 8 * (200 + 10 + 52 + 1.3125 + 5)  # three shards on two workers: two rounds


def test_ulysses_takes_as_many_gpus_as_find_a_shard() -> None:
    assert [scene(gpus).rollout_degree for gpus in (2, 3, 6, 12, 24, 100)] == [1, 1, 2, 4, 8, 8]
    one = scene(12)
    assert one.ulysses_bytes(4) == 4 * 3 * (100 / 4) * 10 * 2 * 3 / 4
    assert one.sample_seconds()["forwards of the rollout"] == 50.0
    assert one.sample_seconds()["Ulysses in the rollout"] == 10 * one.ulysses_bytes(4) / 1000
    assert scene(100).breakdown()["no shard left"] == pytest.approx(scene(100).rollout_seconds() * (1 - 24 / 100))


def test_an_update_by_hand() -> None:
    one = scene(16)
    assert one.train_degree == 2  # see below
    assert one.ranks == 8
    assert one.gather_bytes(8) == 6 * 8000 * 7 / 8
    parts = one.pass_seconds()
    assert parts["updates"] == 12_000 / (2 * 100 * 0.5)
    assert parts["gathering weights"] == 0.0  # 42 s hide behind 120
    assert parts["Ulysses in training"] == 8 * (4 * 3 * 50 * 10 * 2 / 2) / 1000
    assert parts["summing gradients"] == 200 * 7 / 8 / 1000 + 2 * (1 / 2) * 200 / 8 / 500
    assert parts["reading shards"] == 2 * 100 / 20
    slow = replace(ASSUMED, nvlink=100.0)
    assert Scene(16, UNITS, WORK, MEASURED, slow).pass_seconds()["gathering weights"] == 420 - 120


def test_ulysses_in_training_begins_where_memory_ends() -> None:
    # of 15,000 bytes a tenth stays free; 1,000 go to weights, 125 to the adapter, 16,000 / 3 to two whole blocks
    left = 13_500 - 1000 - 125 - 16_000 / 3
    for working, degree in ((left - 1, 1), (left + 1, 2), (2 * left - 1, 2), (2 * left + 1, 4)):
        assert Scene(16, replace(UNITS, working=int(working)), WORK, MEASURED, ASSUMED).train_degree == degree


def test_ranks_wait_for_the_padded_pass() -> None:
    one = scene(10)  # five ranks; updates of 24 and 24 transitions, then of 12 and 12
    assert (one.passes(2), one.passes(1)) == (5 + 5, 3 + 3)
    assert one.padding == pytest.approx(1 - 72 / 80)
    assert one.replay_seconds() == math.ceil(2 * 3 * 3 / 5) * 2 * 1000 / 100
    assert one.update_seconds() == pytest.approx(16 * sum(one.pass_seconds().values()) / 4 + one.checkpoint_seconds())
    assert one.checkpoint_seconds() == 16 * 50 / 2000 + 3 * 0.5  # two machines, the last one not full


@pytest.mark.parametrize(("ranks", "updates"), [(1, 1), (3, 2), (7, 4), (64, 3)])
def test_the_simulated_passes_are_those_of_the_products_order(ranks: int, updates: int) -> None:
    one = Scene(2 * ranks, UNITS, replace(WORK, updates=updates), MEASURED, ASSUMED)
    units = [Unit(0, 0, "i000000-p000000", (sample,), step) for sample in range(24) for step in range(2)]
    plan = plan_ranks(units, one.ranks, seed=0, iteration=0, expert=0, updates=updates)
    assert one.passes(2) == sum(len(plan.of_rank(update, 0)) for update in range(updates))


@pytest.mark.parametrize("gpus", [2, 10, 16, 64, 100])
def test_the_parts_of_an_iteration_add_up(gpus: int) -> None:
    one = scene(gpus)
    parts = one.breakdown()
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(one.seconds())
    useful = 24 * (200 + 10 + 3 * 240) / gpus  # seconds, had every GPU computed all the time
    assert one.efficiency() == pytest.approx(useful / one.seconds())


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
        spool.write_sample(stage, 0, sample)
    writer.seal(stage, 0, {})
    assert len(published) / 8 == scene(2).files


# --- Limits and failures ---------------------------------------------------------------------------------------------


def test_loads_by_hand() -> None:
    one = scene(2)
    seconds = 268.3125
    found = scale_limits.loads(one)
    assert found["file system, bytes written"] == pytest.approx(2 * 2600 / seconds / 2000)
    assert found["file system, files created"] == pytest.approx(2 * (2.625 / seconds + 1 / 5) / 10)
    assert found["a machine's link to the file system"] == pytest.approx(8 * 2600 / seconds / 1000)
    assert found["PCIe (experts swapped)"] == pytest.approx(5 / seconds)
    assert found["NVLink (weights gathered in training)"] == pytest.approx(42 / 120)
    assert found["host memory"] == pytest.approx(8 * (2 * (8000 + 200) + 2000 + 1000 + 8 * 9 * 100) / 1e6)
    assert scale_limits.first(one) == ("NVLink (weights gathered in training)", pytest.approx(0.35))
    assert scale_limits.flat_gather(scene(16)) == pytest.approx(6 * 8000 * 15 / 16 / 500 / 120)


def test_the_shared_resource_is_full_where_it_is_said_to_be() -> None:
    name, gpus = scale_limits.full_at(scene(2, prompts=1000))
    assert name == "file system, files created"
    assert scale_limits.loads(scene(gpus, prompts=1000))[name] == pytest.approx(1.0, rel=0.05)


def test_loading_is_limited_by_the_machine_and_then_by_the_file_system() -> None:
    assert scale_limits.load_seconds(scene(8), 1) == 19_000 / 1000 + 19_000 / 400
    assert scale_limits.load_seconds(scene(8), 10) == 19_000 / 400 + 19_000 / 400


def test_checkpoint_intervals_by_hand() -> None:
    assert scale_limits.young(50, 3600) == 600
    assert scale_limits.daly(50, 3600) == pytest.approx(600 * (1 + 1 / 36 + 1 / 1296) - 50)
    assert scale_limits.daly(7200, 3600) == 3600
    assert scale_limits.lost_share(600, 50, 100, 3600) == pytest.approx(50 / 600 + 400 / 3600)
    shares = [scale_limits.lost_share(interval, 50, 100, 3600) for interval in (590, 600, 610)]
    assert min(shares) == shares[1]  # Young's interval is the best one of this formula


def test_a_death_by_hand() -> None:
    one = scene(16)
    load = 19_000 / 1000 + 19_000 / 400
    half = sum(one.sample_seconds().values()) / 2
    assert scale_limits.between_failures(one) == 43_200
    assert scale_limits.rollout_loss(one) == 8 * (half + 7 + load)
    assert scale_limits.train_restart(one) == 5 + 7 + load
    assert scale_limits.train_loss(one) == 16 * (one.update_seconds() / 2 + 12 + load)
    assert scale_limits.full_checkpoint_seconds(one) == 16 * 4000 / 2000


# --- What is measured ------------------------------------------------------------------------------------------------


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


def test_the_simulated_section_says_what_the_arithmetic_says() -> None:
    text = scale_tables.simulated_section({"480p": UNITS, "720p": UNITS}, MEASURED)
    one = Scene(512, UNITS, scale_tables.large_iteration(), MEASURED)
    assert f"{100 * one.efficiency():.1f} % |" in text
    assert "16 prompts of 16 videos" in text
    assert "### 720x1280, 81 frames: 2,048 videos an iteration" in text
    assert text.count("| | 8 GPUs | 64 GPUs | 512 GPUs |") == 4


def test_the_page_has_both_sections_and_the_assumptions_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("measured", "simulated"):
        section = page.partition(f"<!-- begin {name} -->\n")[2].partition(f"<!-- end {name} -->")[0]
        assert "|" in section, f"the section {name} is empty: run bench/scale.py"
    for line in scale_tables.assumption_lines():
        assert line in page, f"docs/scaling.md is older than the code: {line}"
    assert "no GPU" in page


@pytest.mark.slow
def test_the_flop_of_a_forward_by_hand() -> None:
    from bench.scale_units import A14B, flop, latent_shape, pass_flop
    from rollout.policy.sizes import Pass

    shape = latent_shape(480, 832, 81)
    assert shape == (16, 21, 60, 104)
    tokens, width, wide, layers, text = 21 * 30 * 52, 5120, 13824, 40, 512
    linear = 2 * tokens * (6 * width**2 + 2 * width * wide)  # q, k, v, o; q, o of the cross attention; feed-forward
    cross = 2 * text * 2 * width**2  # k, v of the text
    attention = 4 * tokens * (tokens + text) * width
    counted = pass_flop(A14B, Pass(shape, 1, text, "bfloat16", guided=False))
    assert counted == pytest.approx(layers * (linear + cross + attention), rel=1e-3)
    assert counted == pytest.approx(1.80e15, rel=0.08)  # 2 · parameters · tokens + attention, a little too much
    import torch

    assert flop(lambda: torch.zeros(3, 4, device="meta") @ torch.zeros(4, 5, device="meta")) == 2 * 3 * 4 * 5
