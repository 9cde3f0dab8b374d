"""The replay gate: exactly 0 through disk, and a clear refusal once a weight has moved."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from rollout.policy import Policy
from shards.diagnosis import note_replay
from shards.errors import RunFailed
from shards.run import EXPERT_NAMES, Run
from tests.support import training
from train.data import Rollouts, read_batch
from train.replay import log_probs, prove, prove_iteration, render_ratios, replay_limit, sample_units
from train.run import train


@pytest.fixture(scope="module")
def run(tiny_t2v2: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = training.make_run(tmp_path_factory.mktemp("replay") / "run", tiny_t2v2)
    training.roll(run, 0, policy)
    return run


def test_every_transition_replays_to_exactly_zero(run: Run, policy: Policy) -> None:
    rollouts = Rollouts.open(run.iteration(0))
    replayed = prove(policy, rollouts, samples=10**6, limit=0.0)
    assert replayed.largest == 0.0
    assert replayed.transitions == 2 * training.GROUP * 3  # groups, samples, window steps
    assert replayed.per_expert == {"high_noise": 0.0, "low_noise": 0.0}


def test_ratios_are_told_by_expert_and_step(run: Run, policy: Policy) -> None:
    """A low-noise expert that is another one: its steps differ, those of the other expert do not."""
    rollouts = Rollouts.open(run.iteration(0))
    parameter = policy.experts.module(1).proj_out.bias  # type: ignore[union-attr]
    with torch.no_grad():
        parameter += 1e-3
    try:
        replayed = prove(policy, rollouts, samples=10**6, limit=math.inf)
    finally:
        with torch.no_grad():
            parameter -= 1e-3
    steps = {(unit.expert, unit.step) for unit in rollouts.units()}
    assert [(one.expert, one.step) for one in replayed.per_step] == [
        (EXPERT_NAMES[expert], step) for expert, step in sorted(steps)
    ]
    assert sum(one.transitions for one in replayed.per_step) == replayed.transitions
    for one in replayed.per_step:
        assert sum(one.histogram) == one.transitions
        if one.expert == "high_noise":
            assert (one.largest, one.mean, one.histogram[0]) == (0.0, 0.0, one.transitions)
        else:
            assert 0 < one.mean <= one.largest <= replayed.per_expert["low_noise"] == replayed.largest
    table = render_ratios(replayed).splitlines()
    assert len(table) == 1 + len(steps)
    assert max(map(len, table)) <= 80


def test_a_changed_weight_is_named_by_its_file(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2)
    training.advise(training.roll(run, 0, policy))
    train(run, 0, policy)
    training.roll(run, 1, policy)
    policy.experts.become(None)
    path = run.iteration(0).policy_dir / "low_noise" / "pytorch_lora_weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunFailed, match=r"not those its policy\.json names: low_noise/pytorch_lora_weights"):
        prove_iteration(run, 1, policy)


def test_a_fresh_adapter_changes_nothing(run: Run, policy: Policy) -> None:
    policy.experts.add_lora(2, 4.0, seed=0)
    try:
        assert prove(policy, Rollouts.open(run.iteration(0)), samples=4, limit=0.0).largest == 0.0
    finally:
        policy.experts.become(None)


def test_one_lora_weight_that_moved_by_a_thousandth_is_seen_without_a_limit(run: Run, policy: Policy) -> None:
    """Nothing but the bits tells: the weight moves log-probs by far less than a clip range. What a limit lets through,
    training tells in a warning."""
    rollouts = Rollouts.open(run.iteration(0))
    policy.experts.add_lora(2, 4.0, seed=0)
    try:
        weight = next(value for name, value in policy.experts.trainable(1) if "lora_B" in name)
        with torch.no_grad():
            weight[0, 0] += 1e-3
        with pytest.raises(RunFailed, match=r"above 0 for .* low_noise expert"):
            prove(policy, rollouts, samples=10**6, limit=replay_limit(policy, 1e-5))
        let_through = prove(policy, rollouts, samples=10**6, limit=1e-3)
        assert let_through.per_expert["high_noise"] == 0.0 < let_through.per_expert["low_noise"] < 1e-3
        assert note_replay(0.0) == note_replay(None) == []
        (note,) = note_replay(let_through.largest)
        assert f"{let_through.largest:.2g}, within train.replay_limit" in note
    finally:
        policy.experts.become(None)


@pytest.mark.parametrize("settings", [
    {"storage_dtype": "bfloat16"}, {"law": "dpm-sde-2m", "form": "exact", "eta": 1.0}, {"law": "cps", "form": "exact"},
])  # fmt: skip
def test_rounded_states_and_other_laws_replay_too(
    settings: dict[str, object], tiny_t2v2: Path, policy: Policy, tmp_path: Path
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2, **settings)
    stage = training.roll(run, 0, policy)
    assert prove(policy, Rollouts.open(stage), samples=10**6, limit=0.0).largest == 0.0


def test_the_gate_names_value_sample_step_expert_and_shard(run: Run, policy: Policy) -> None:
    rollouts = Rollouts.open(run.iteration(0))
    parameter = policy.experts.module(1).proj_out.bias  # type: ignore[union-attr]
    with torch.no_grad():
        parameter += 1e-3
    try:
        with pytest.raises(RunFailed) as caught:
            prove(policy, rollouts, samples=4, limit=0.0)
    finally:
        with torch.no_grad():
            parameter -= 1e-3
    shard = re.escape(str(run.iteration(0).path / "rollout"))
    assert re.fullmatch(
        r"replay failed: \|log-ratio\| (\S+) is above 0 for i000000-p00000\d-s0\d, step [234], low_noise expert, "
        + shard
        + r"/shard-00000\d\.tar",
        caught.value.problem,
    )
    value = float(caught.value.problem.split()[3])
    assert 0 < value < 1
    assert "train.recompute_log_probs" in caught.value.hint
    assert caught.value.exit_code == 1


def test_a_log_prob_that_is_no_number_fails_the_gate(run: Run, policy: Policy) -> None:
    parameter = policy.experts.module(1).proj_out.bias  # type: ignore[union-attr]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    try:
        with pytest.raises(RunFailed, match=r"\|log-ratio\| nan is above 0\.1 for"):
            prove(policy, Rollouts.open(run.iteration(0)), samples=4, limit=0.1)
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def test_a_wrong_batch_shape_is_what_the_chunks_avoid(run: Run, policy: Policy) -> None:
    """The gate's log-probs are those of the stored chunk, row by row."""
    rollouts = Rollouts.open(run.iteration(0))
    unit = next(unit for unit in rollouts.units() if unit.size == 2)
    policy.experts.use(unit.expert)
    chunk = read_batch(rollouts, policy, unit)
    assert chunk.x.shape[0] == 2
    assert chunk.prompt.shape[:2] == (2, training.TEXT_LENGTH)
    assert torch.equal(log_probs(policy, rollouts, chunk), chunk.log_prob)
    assert not torch.equal(chunk.log_prob[0], chunk.log_prob[1])


def test_the_sample_covers_every_shard_and_expert_and_repeats(run: Run) -> None:
    rollouts = Rollouts.open(run.iteration(0))
    chosen = sample_units(rollouts, 3)
    assert {(unit.shard, unit.expert) for unit in chosen} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert chosen == sample_units(rollouts, 3)
    for shard, expert in {(unit.shard, unit.expert) for unit in chosen}:
        assert 3 <= sum(unit.size for unit in chosen if (unit.shard, unit.expert) == (shard, expert)) <= 4


def test_the_limit_is_zero_on_a_cpu_whatever_the_setting(policy: Policy) -> None:
    assert replay_limit(policy, 1e-3) == 0.0


def test_a_copied_run_replays(run: Run, policy: Policy, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    assert prove(policy, Rollouts.open(Run.open(tmp_path / "copy").iteration(0)), samples=4, limit=0.0).largest == 0.0


def test_a_whole_iteration_is_proven_for_verify(run: Run, policy: Policy) -> None:
    assert prove_iteration(run, 0, policy).largest == 0.0
