"""Training a tiny two-expert model on real rollouts: what moves, what does not, what survives, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.plan import stage_plan
from rollout.policy import Policy
from rollout.sampler import Sampler
from rollout.schedule import step_scale, step_std
from rollout.transitions import noise, noise_seed
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import Buffer, LocalFiles
from shards.process.signals import stoppable
from shards.reader import open_shard
from shards.records.updates import read_updates
from shards.run import Run
from shards.spool import write_group, write_samples
from shards.workers.claims import claim
from shards.writer import seal
from tests.support import training
from train import run as train_run
from train.data import Inputs, Rollouts, Stored, keys_of, read_batch, read_step
from train.inputs import check_policy, freeze
from train.objectives.losses import nft_loss
from train.order import Slot, Unit
from train.prefetch import Ahead
from train.replay import log_probs
from train.run import train
from train.trainer import ExpertTrainer


@pytest.fixture(scope="module")
def trained(rolled: Run, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, trained without a disturbance."""
    run = training.fork(rolled, tmp_path_factory.mktemp("train") / "trained")
    report = train(run, 0, policy)
    assert not report.skipped
    assert report.replay == 0.0
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    return run


def metrics(run: Run, iteration: int = 0) -> list[dict[str, Any]]:
    return read_updates(run.iteration(iteration).metrics_path)


def initial(run: Run, policy: Policy, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter weights training begins with."""
    policy.experts.become(None)
    policy.experts.add_lora(run.config.train.lora_rank, run.config.train.lora_alpha, run.config.rollout.seed)
    policy.experts.save_lora(folder / "iter-0000" / "policy")
    policy.experts.become(None)
    return training.weights(Run(folder), 0)


def test_a_training_whose_claim_was_taken_over_publishes_nothing(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")

    def take_over(done: int, total: int, unit: str, note: str = "") -> None:
        for path in (run.iteration(0).path / "work").glob("*.train.claim-*"):
            path.unlink()

    with pytest.raises(RunFailed, match="was taken over"):
        train(run, 0, policy, take_over)
    assert not run.iteration(0).trained()
    assert not train(run, 0, policy).skipped  # and whoever has the work goes on


def test_a_training_that_was_taken_over_touches_nothing_of_the_one_in_its_place(
    rolled: Run, trained: Run, policy: Policy, tmp_path: Path
) -> None:
    run, then = training.fork(rolled, tmp_path / "run"), {}

    def take_over(done: int, total: int, unit: str, note: str = "") -> None:
        if unit == "updates" and not then:
            for path in (run.iteration(0).path / "work").glob("*.train.claim-*"):
                path.unlink()
            train(run, 0, Policy.of(run.config.model))
            then.update(contents(run.iteration(0).policy_dir))

    with pytest.raises(RunFailed, match="was taken over"):
        train(run, 0, policy, take_over)
    assert contents(run.iteration(0).policy_dir) == then
    assert len(metrics(run)) == len(metrics(trained))


def test_what_was_published_between_the_first_look_and_the_claim_is_left_alone(
    rolled: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, meet, then = training.fork(rolled, tmp_path / "run"), train_run.agree_on_run, {}

    def slow(*arguments: Any) -> Any:
        monkeypatch.undo()
        train(run, 0, Policy.of(run.config.model))
        then.update(contents(run.iteration(0).policy_dir))
        return meet(*arguments)

    monkeypatch.setattr(train_run, "agree_on_run", slow)
    assert train(run, 0, policy).skipped
    assert contents(run.iteration(0).policy_dir) == then


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """When every file below a folder was written, and which file it is."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


# --- What training does ----------------------------------------------------------------------------------------------


def test_both_experts_move_and_the_policy_is_published(trained: Run, policy: Policy, tmp_path: Path) -> None:
    before, after = initial(trained, policy, tmp_path), training.weights(trained, 0)
    for expert in ("high_noise", "low_noise"):
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(expert))
    record = json.loads((trained.iteration(0).policy_dir / "policy.json").read_text())
    assert record["fingerprint"] == policy.experts.fingerprint(trained.iteration(0).policy_dir)["fingerprint"]
    assert set(record["adapters"]) == {f"{expert}/pytorch_lora_weights.safetensors"
                                       for expert in ("high_noise", "low_noise")}  # fmt: skip
    average = policy.experts.fingerprint(trained.iteration(0).policy_dir / "ema")
    assert record["average"] == {name: average[name] for name in ("fingerprint", "adapters")}
    assert record["average"]["fingerprint"] != record["fingerprint"]
    averaged = training.weights(trained, 0, "ema")
    assert not training.equal(averaged, after)
    assert not training.equal(averaged, before)


def test_averaged_weights_are_the_mean_of_the_path(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """After one update with decay 0.75 they are a quarter of the way from the start."""
    run = training.fork(rolled, tmp_path / "run", ema=0.75, updates_per_rollout=1)
    train(run, 0, policy)
    before, after = initial(run, policy, tmp_path / "start"), training.weights(run, 0)
    for name, value in training.weights(run, 0, "ema").items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name], rtol=0, atol=1e-7)


def test_metrics_begin_on_policy_and_name_everything(trained: Run) -> None:
    records = metrics(trained)
    assert [(record["expert"], record["update"]) for record in records] == [
        ("high_noise", 1), ("high_noise", 2), ("low_noise", 1), ("low_noise", 2)]  # fmt: skip
    for record in records:
        first = record["update"] == 1
        assert (record["ratio_min"] == record["ratio_max"] == 1.0) == first
        assert (record["mean_shift"] == 0.0) == first
        assert (record["kl"] == 0.0) == first
        assert record["gradient_norm"] > 0
        assert record["learning_rate"] == 1e-3
    assert sum(record["rows"] for record in records if record["expert"] == "low_noise") == 2 * training.GROUP * 2
    assert list((trained.iteration(0).policy_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_the_second_call_does_nothing(trained: Run, policy: Policy) -> None:
    files = {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")}
    report = train(trained, 0, policy)
    assert report.skipped
    assert {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")} == files


def test_training_again_gives_the_same_bits(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    again = training.fork(rolled, tmp_path / "run", gradient_checkpointing=True, save_every=2)
    train(again, 0, policy)
    assert training.equal(training.weights(again, 0), training.weights(trained, 0))
    assert training.equal(training.weights(again, 0, "ema"), training.weights(trained, 0, "ema"))


def test_the_next_iteration_continues_the_optimizer(trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(trained, tmp_path / "run", warmup=8)
    training.advise(training.roll(run, 1, policy))
    report = train(run, 1, policy)
    assert report.replay == 0.0
    assert [record["total_updates"] for record in metrics(run, 1)] == [3, 4, 3, 4]
    assert metrics(run, 1)[0]["learning_rate"] == pytest.approx(1e-3 * 3 / 8)
    assert not training.equal(training.weights(run, 1), training.weights(run, 0))


def test_an_optimizer_of_other_weights_is_refused(trained: Run, policy: Policy, tmp_path: Path) -> None:
    """The newest checkpoint of the iteration before is lost; the one before it is of an earlier policy."""
    run = training.fork(trained, tmp_path / "run")
    training.advise(training.roll(run, 1, policy))
    folder = run.iteration(0).policy_dir / "trainer"
    shutil.rmtree(folder / "low_noise" / "update-000002")
    with pytest.raises(UserError, match=r"low_noise/update-000001: its weights are not those of the policy"):
        train(run, 1, policy)
    shutil.rmtree(folder)  # as the hint says
    train(run, 1, policy)
    assert [record["total_updates"] for record in metrics(run, 1) if record["expert"] == "low_noise"] == [1, 2]


# --- What does not move ----------------------------------------------------------------------------------------------


def test_without_advantage_nothing_moves(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.advise(run.iteration(0), lambda key: (0.0, 1.0))
    report = train(run, 0, policy)
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    assert training.equal(training.weights(run, 0), initial(run, policy, tmp_path / "start"))
    assert any("no advantage" in sentence for sentence in report.warnings)


def test_a_sample_of_weight_0_has_no_say(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    results = []
    for number, odd in enumerate((0.0, 4.0)):
        run = training.fork(rolled, tmp_path / str(number))
        training.advise(run.iteration(0), lambda key, odd=odd: (odd, 0.0) if key.endswith("s01") else (
            training.advantage_of(key)))  # fmt: skip
        train(run, 0, policy)
        results.append(training.weights(run, 0))
        assert sum(record["rows"] for record in metrics(run)) == 2 * (training.GROUP - 1) * 3
    assert training.equal(*results)


def test_a_chunk_of_weight_0_is_not_even_read(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.advise(run.iteration(0), lambda key: (1.0, float(key.endswith("s02"))))
    inputs = freeze(run, run.iteration(0))
    assert {unit.samples for unit in inputs.units()} == {(2,)}


def test_all_groups_dropped_publishes_the_same_policy(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.advise(run.iteration(0), lambda key: (0.0, 0.0))
    report = train(run, 0, policy)
    assert report.updates == {"high_noise": 0, "low_noise": 0}
    assert training.equal(training.weights(run, 0), initial(run, policy, tmp_path / "start"))


def test_an_iteration_without_updates_hands_the_optimizer_on(trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(trained, tmp_path / "run")
    for iteration in (1, 2):
        training.advise(training.roll(run, iteration, policy), lambda key, last=iteration - 1: (1.0, float(last)))
        train(run, iteration, policy)
    assert metrics(run, 1) == []
    assert [record["total_updates"] for record in metrics(run, 2)] == [3, 4, 3, 4]


# --- The gradient ----------------------------------------------------------------------------------------------------


def gradient(policy: Policy, inputs: Inputs, run: Run, expert: int) -> dict[str, torch.Tensor]:
    trainer = ExpertTrainer(policy, inputs, run.config.train, expert)
    units = [unit for unit in inputs.units() if unit.expert == expert]
    total = inputs.weight(units)
    for unit in units:
        trainer.backward(unit, total)
    result = {name: value.grad.clone() for name, value in trainer.state.parameters.items() if value.grad is not None}
    trainer.close()
    return result


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_chunks_add_up_to_one_big_batch(objective: str, rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """Chunks of 2 and 1 and one of 3 give one gradient; fp32 sums differ in their order only."""
    run = training.fork(rolled, tmp_path / "run", objective=objective)
    training.advise(run.iteration(0), lambda key: (training.advantage_of(key)[0], float(not key.endswith("s00"))))
    inputs = freeze(run, run.iteration(0))
    plan = dataclasses.replace(inputs.rollouts.plan, batch_size=training.GROUP)
    whole = dataclasses.replace(inputs, rollouts=dataclasses.replace(inputs.rollouts, plan=plan))
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    for expert in policy.layout.expert_ids:
        small, big = gradient(policy, inputs, run, expert), gradient(policy, whole, run, expert)
        scale = max(value.abs().max().item() for value in big.values())
        assert scale > 0
        for name in big:
            torch.testing.assert_close(small[name], big[name], rtol=0, atol=1e-5 * scale)


def test_the_gradient_is_the_mean_over_rows_that_count(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """On policy and without KL it is -mean(advantage * d log_prob): taken here row by row from the step's own code."""
    from rollout.step import StepInputs, step_log_prob

    run = training.fork(rolled, tmp_path / "run", kl_beta=0.0)
    inputs = freeze(run, run.iteration(0))
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    found = gradient(policy, inputs, run, 1)
    rows = []
    for unit in (unit for unit in inputs.units() if unit.expert == 1):
        batch = read_batch(inputs.rollouts, policy, unit)
        start = StepInputs(batch.x, batch.prompt, batch.negative)
        scored = step_log_prob(policy, inputs.rollouts.schedule, unit.step, start, batch.x_next)
        rows += [training.advantage_of(key)[0] * value
                 for key, value in zip(keys_of(unit), scored.log_prob, strict=True)]  # fmt: skip
    assert len(rows) == 2 * training.GROUP * 2
    (-torch.stack(rows).mean()).backward()
    for name, parameter in policy.experts.trainable(1):
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-8)
            parameter.grad = None


def test_the_noise_of_a_step_gives_back_the_mean_it_was_sampled_by(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """For every unit of both experts: what a forward of the weights that sampled says, up to the rounding of x'."""
    run = training.fork(rolled, tmp_path / "run")
    inputs = freeze(run, run.iteration(0))
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    for expert in (0, 1):
        trainer = ExpertTrainer(policy, inputs, run.config.train, expert)
        for unit in (unit for unit in inputs.units() if unit.expert == expert):
            batch, forwards = read_batch(inputs.rollouts, policy, unit), trainer.losses.forwards
            torch.testing.assert_close(forwards.sampled_mean(batch), forwards.old_mean(batch), rtol=0, atol=1e-6)
        trainer.close()


def moved_rows(run: Run, policy: Policy) -> tuple[dict[str, torch.Tensor], int]:
    """Rows of the first batch of two after the weights have moved, and the forwards that they took."""
    inputs, calls = freeze(run, run.iteration(0)), []
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    trainer = ExpertTrainer(policy, inputs, run.config.train, 0)
    with torch.no_grad():
        for parameter in trainer.state.parameters.values():
            parameter += 0.05
    trainer.moved = True
    unit = next(unit for unit in inputs.units() if unit.samples == (0, 1))
    counting = policy.experts.module(0).register_forward_hook(lambda *_: calls.append(1))
    rows = trainer.backward(unit, 1.0, measure=True)
    counting.remove()
    trainer.close()
    return rows, len(calls)


def test_how_far_the_mean_has_moved_is_measured_without_a_forward(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """RatioNorm, which asks the weights that sampled, finds the same, in twice as many forwards."""
    plain, forwards = moved_rows(training.fork(rolled, tmp_path / "plain", kl_beta=0.0), policy)
    asked, more = moved_rows(training.fork(rolled, tmp_path / "asked", kl_beta=0.0, ratio_norm=True), policy)
    assert more == 2 * forwards
    assert len(plain["shift"]) == 2
    assert (plain["shift"] > 0).all()
    torch.testing.assert_close(plain["shift"], asked["shift"], rtol=1e-4, atol=0)


def test_the_shift_is_that_of_the_rows_that_count(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    everything, _ = moved_rows(training.fork(rolled, tmp_path / "all"), policy)
    run = training.fork(rolled, tmp_path / "second")
    training.advise(run.iteration(0), lambda key: (1.0, float(not key.endswith("s00"))))
    second, _ = moved_rows(run, policy)
    assert torch.equal(second["shift"], everything["shift"][1:])


def test_states_in_half_precision_are_too_coarse_to_tell_the_shift(
    tiny_t2v2: Path, policy: Policy, tmp_path: Path
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2, storage_dtype="float16")
    policy.experts.become(None)
    training.advise(training.roll(run, 0, policy))
    plain, forwards = moved_rows(training.fork(run, tmp_path / "plain"), policy)
    asked, same = moved_rows(training.fork(run, tmp_path / "asked", ratio_norm=True), policy)
    assert forwards == same
    assert torch.equal(plain["shift"], asked["shift"])


def test_the_gradient_is_cut_to_its_norm_over_all_weights(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", max_grad_norm=1e-3)
    inputs = freeze(run, run.iteration(0))
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    units = [unit for unit in inputs.units() if unit.expert == 1]
    whole = gradient(policy, inputs, run, 1)
    with contextlib.closing(ExpertTrainer(policy, inputs, run.config.train, 1)) as trainer:
        trainer.backward(units[0], 1.0)  # what an earlier chunk left is not of this update
        norm = trainer.update(units, [Slot(unit, True) for unit in units])["gradient_norm"]
        moments = [state["exp_avg"].flatten() for state in trainer.state.optimizer.state.values()]
    assert norm == pytest.approx(torch.cat([value.flatten() for value in whole.values()]).norm().item(), rel=1e-4)
    assert norm > 2e-3
    cut = torch.cat(moments).norm().item() / (1.0 - run.config.train.beta1)
    assert cut == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_no_number_moves_nothing(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    inputs = freeze(run, run.iteration(0))
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    units = [unit for unit in inputs.units() if unit.expert == 1]
    with contextlib.closing(ExpertTrainer(policy, inputs, run.config.train, 1)) as trainer:
        first, *others = trainer.state.parameters.values()
        first.data.fill_(torch.nan)
        before = [value.detach().clone() for value in others]
        with pytest.raises(RunFailed, match="low_noise expert, update 1: the gradient norm is nan"):
            trainer.update(units, [Slot(unit, True) for unit in units])
        assert all(torch.equal(now, then) for now, then in zip(others, before, strict=True))
        assert trainer.state.updates == 0


@pytest.mark.parametrize(("objective", "kl"), [("grpo", "velocity"), ("grpo", "transition"), ("nft", "transition")])
def test_the_loss_is_the_sum_of_its_parts(objective: str, kl: str, rolled: Run, policy: Policy, tmp_path: Path) -> None:
    """After a move of the weights: clipped advantages, step weights, KL and the old policy, from the formulas."""
    run = training.fork(
        rolled, tmp_path / "run", objective=objective, kl=kl, kl_beta=0.3, step_weight="std", advantage_clip=2.0
    )
    training.advise(run.iteration(0), lambda key: (9.0 if key.endswith("s01") else training.advantage_of(key)[0], 1.0))
    inputs, base = freeze(run, run.iteration(0)), Policy.of(run.config.model)
    schedule, plan = inputs.rollouts.schedule, inputs.rollouts.plan
    stds = {step: step_std(schedule, step) for step in inputs.rollouts.steps(1)}
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    with contextlib.closing(ExpertTrainer(policy, inputs, run.config.train, 1)) as trainer:
        for number, weight in enumerate(trainer.state.parameters.values()):
            weight.data += 0.05 * noise(tuple(weight.shape), seed=number)
        trainer.moved = True
        for unit in (unit for unit in inputs.units() if unit.expert == 1):
            found, chunk = trainer.backward(unit, 1.0), trainer.losses.read(unit)
            advantage = torch.tensor([inputs.advantages[key][0] for key in chunk.keys]).clamp(-2.0, 2.0)
            inner = (chunk.prompt, chunk.negative, schedule.guidance[unit.step])
            x = chunk.x0 if objective == "nft" else chunk.x
            sigma, t = schedule.sigmas[unit.step], schedule.timesteps[unit.step]
            if objective == "nft":
                prompt = inputs.rollouts.groups[unit.group].prompt_id
                fresh = chunk.states["noise"]
                for number, step in itertools.product(range(unit.size), range(schedule.steps + 1)):
                    seed = noise_seed(plan.seed, plan.iteration, prompt, unit.samples[number], step)
                    assert not torch.equal(fresh[number], noise(x.shape[1:], seed=seed))  # none of the rollout's own
                x = (1.0 - sigma) * x + sigma * fresh
            with torch.no_grad():
                new, old = (one.velocity(1, x, t, *inner) for one in (policy, base))
                moved = (new - old).square().flatten(1).mean(1)
                if objective == "nft":
                    error = nft_loss(new, old, x, chunk.x0, sigma, advantage / 4.0 + 0.5, run.config.train.nft_beta)
                    expected = 2.0 * error + 0.3 * moved
                else:
                    ratio = (log_probs(policy, inputs.rollouts, chunk) - chunk.log_prob).exp()
                    limited = ratio.clamp(1.0 - run.config.train.clip_range, 1.0 + run.config.train.clip_range)
                    part = torch.maximum(-advantage * ratio, -advantage * limited)
                    # the mean is linear in the velocity
                    far = moved if kl == "velocity" else moved * step_scale(schedule, unit.step) ** 2 / 2.0
                    expected = stds[unit.step] * len(stds) / sum(stds.values()) * part + 0.3 * far
            assert (moved > 1e-4).all()
            torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [
    {"kl": "transition", "kl_beta": 1.0, "step_weight": "inverse-gradient"},
    {"ratio_norm": True, "step_weight": "std"},
    {"objective": "nft", "kl_beta": 0.1},
    {"recompute_log_probs": True},
])  # fmt: skip
def test_every_variant_trains(settings: dict[str, Any], rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", **settings)
    report = train(run, 0, policy)
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    assert not training.equal(training.weights(run, 0), initial(run, policy, tmp_path / "start"))
    assert all(record["ratio_max"] == 1.0 for record in metrics(run) if record["update"] == 1)


def test_diffusion_nft_needs_no_log_probs_to_recompute(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    settings = {"objective": "nft", "recompute_log_probs": True}
    run = training.make_run(tmp_path / "run", tiny_t2v2, settings, law="ode", high_steps=0, low_steps=0)
    training.advise(training.roll(run, 0, policy))
    assert train(run, 0, policy).updates == {"high_noise": 2, "low_noise": 2}


def test_recomputed_log_probs_are_the_stored_ones(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", recompute_log_probs=True)
    assert train(run, 0, policy).replay is None
    assert training.equal(training.weights(run, 0), training.weights(trained, 0))


# --- What survives ---------------------------------------------------------------------------------------------------


def at_update(expert: str, update: int) -> Callable[..., None]:
    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if unit == "updates" and done == update and note.startswith(expert):
            training.kill_self()

    return progress


class DyingFiles(LocalFiles):
    """Files whose process is killed when the policy is committed."""

    def publish_new(self, path: Path, data: Buffer | Iterable[Buffer]) -> bool:
        if path.name == "policy.json":
            training.kill_self()
        return super().publish_new(path, data)


@pytest.mark.parametrize("where", [
    ("high_noise", 1), ("high_noise", 2), ("low_noise", 1), ("low_noise", 2), "in a checkpoint", "in the commit"],
    ids=str)  # fmt: skip
def test_kill_and_resume_end_in_the_same_bits(
    where: Any, rolled: Run, trained: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.fork(rolled, tmp_path / "run")
    with monkeypatch.context() as patch:
        progress = at_update(*where) if isinstance(where, tuple) else None
        if where == "in a checkpoint":
            patch.setattr("train.checkpoint_files.os.rename", training.kill_self)
        mortal = Run.open(run.path, files=DyingFiles()) if where == "in the commit" else run
        training.killed(lambda: train(mortal, 0, policy, progress))
    assert not (run.iteration(0).policy_dir / "policy.json").exists()
    train(run, 0, policy)
    assert training.equal(training.weights(run, 0), training.weights(trained, 0))
    assert training.equal(training.weights(run, 0, "ema"), training.weights(trained, 0, "ema"))
    cost = {"seconds", "peak_memory_bytes"}
    kept = [{name: value for name, value in record.items() if name not in cost} for record in metrics(run)]
    assert kept == [{name: value for name, value in record.items() if name not in cost} for record in metrics(trained)]


# --- Reading ahead ---------------------------------------------------------------------------------------------------


def test_reading_ahead_changes_no_bit(
    rolled: Run, trained: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.fork(rolled, tmp_path / "run")
    monkeypatch.setattr(Ahead, "take", lambda self, unit, following=None: self.read(unit))
    train(run, 0, policy)
    assert training.equal(training.weights(run, 0), training.weights(trained, 0))


def test_the_next_unit_and_no_other_is_read_in_the_meantime(rolled: Run) -> None:
    rollouts, seen = Rollouts.open(rolled.iteration(0)), []

    def read(unit: Unit) -> Stored:
        seen.append((unit, threading.current_thread() is threading.main_thread()))
        return read_step(rollouts, unit)

    units, deadline = rollouts.units()[:5], time.monotonic() + 60
    with contextlib.closing(Ahead(read)) as ahead:
        for unit, following in itertools.pairwise(units):
            assert torch.equal(ahead.take(unit, following).states["x"], read_step(rollouts, unit).states["x"])
            assert len(seen) == 1 + units.index(unit)
            ahead.begin()
            ahead.begin()  # as often as one likes
            while len(seen) < 1 + units.index(following):
                assert time.monotonic() < deadline, "nothing is read ahead"
                time.sleep(0.001)  # it comes without being asked for
        assert seen == [(unit, number == 0) for number, unit in enumerate(units)]
        assert ahead.take(units[0]).unit == units[0]  # another one than was announced
        assert seen[-1] == (units[0], True)
    assert not ahead_threads()


@pytest.mark.parametrize("what", ["damage", "signal"])
def test_what_ends_training_ends_reading_ahead(what: str, rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    stage = run.iteration(0)
    begun = []

    def disturb(done: int, total: int, unit: str, note: str = "") -> None:
        if unit != "updates":
            return
        begun.extend(ahead_threads())
        if what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        for number in stage.shards() if what == "damage" else ():
            with stage.shard_path(number).open("r+b") as file:
                for row in open_shard(stage, number).index.to_dict("records"):
                    file.seek(row["latents_offset"])
                    file.write(bytes(row["latent_bytes"] * len(row["states"])))

    says = r"shard-00000[01]\.tar: i000000-.* is damaged" if what == "damage" else "stopped by SIGTERM after update 1"
    with stoppable(), pytest.raises(UserError, match=says):
        train(run, 0, policy, disturb)
    assert len(begun) == 1
    assert not ahead_threads()
    assert not stage.trained()


def ahead_threads() -> list[threading.Thread]:
    """The threads that read ahead."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


# --- What is refused -------------------------------------------------------------------------------------------------


def test_shards_of_another_policy_are_refused_by_name(rolled: Run, tiny_t2v2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_t2v2, tmp_path / "model")
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    values = load_file(file)
    values["proj_out.bias"] = values["proj_out.bias"] + 1.0
    save_file(values, file)
    other = Policy.load(str(model), device="cpu", text_length=training.TEXT_LENGTH)
    run = training.fork(rolled, tmp_path / "run")
    with pytest.raises(UserError, match="is not the model this run began with"):
        train(run, 0, other)
    (run.path / "model.json").unlink()  # what the shards say counts all the same
    with pytest.raises(UserError, match=r"shard-000000\.tar, shard-000001\.tar came from policy") as caught:
        train(run, 0, other)
    assert other.experts.fingerprint(None)["fingerprint"][:12] in caught.value.problem
    assert not run.iteration(0).policy_dir.exists()


def test_a_known_lag_is_accepted_up_to_the_limit(rolled: Run) -> None:
    rollouts = Rollouts.open(rolled.iteration(0))
    lagging = dataclasses.replace(
        rollouts,
        plan=dataclasses.replace(rollouts.plan, policy=dataclasses.replace(rollouts.plan.policy, lag_of=-1)),
    )
    settings = rolled.config.train
    with pytest.raises(UserError, match="came from policy"):
        check_policy(lagging, "e" * 64, settings)
    assert check_policy(lagging, "e" * 64, settings.model_copy(update={"max_policy_lag": 1})) == 1
    with pytest.raises(UserError, match="came from policy"):
        check_policy(rollouts, "e" * 64, settings.model_copy(update={"max_policy_lag": 1}))


def test_a_missing_shard_is_refused_by_name(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    run.iteration(0).manifest_path(1).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards: shard-000001\.tar"):
        train(run, 0, policy)


def test_a_plan_that_was_changed_after_the_rollout_is_refused(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    path = run.iteration(0).plan_path
    path.write_text(path.read_text().replace('"seed":0', '"seed":1'))
    with pytest.raises(UserError, match=r"plan\.json was changed after shard-000000\.tar was sampled by it") as caught:
        train(run, 0, policy)
    assert caught.value.exit_code == 2
    assert not run.iteration(0).train_dir.exists()


def test_missing_advantages_are_refused(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    run.iteration(0).advantage_path(training.SPECIFICATION, 1).unlink()
    with pytest.raises(UserError, match=r"lacks the advantages of 1 shard, .*shard-000001\.parquet") as caught:
        train(run, 0, policy)
    assert caught.value.hint == f"run `rushes score {run.path} --iteration 0`"
    shutil.rmtree(run.iteration(0).path / "advantage")
    with pytest.raises(UserError, match="has no advantages") as caught:
        train(run, 0, policy)
    assert caught.value.hint == f"run `rushes score {run.path} --iteration 0` first"


def test_two_specifications_are_a_question(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.advise(run.iteration(0), name="ffffffff")
    with pytest.raises(UserError, match="holds 2 specifications"):
        train(run, 0, policy)


def test_a_specification_can_be_named(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.advise(run.iteration(0), lambda key: (0.0, 1.0), name="ffffffff")
    with pytest.raises(UserError, match="holds no specification '12345678'"):
        train(run, 0, policy, advantage="12345678")
    assert any("no advantage" in sentence for sentence in train(run, 0, policy, advantage="ffffffff").warnings)


def test_ratio_norm_cannot_take_older_shards_without_their_means(trained: Run, policy: Policy, tmp_path: Path) -> None:
    """Shards of iteration 1 that the policy of iteration 0 made: a lag of one."""
    run = training.fork(trained, tmp_path / "run", ratio_norm=True, max_policy_lag=1)
    stage = run.iteration(1)
    policy.experts.become(None)
    identity = policy.experts.fingerprint(None)
    plan = stage_plan(run, stage, policy.layout, identity)
    plan = stage.publish_plan(dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, lag_of=0)))
    sampler = Sampler(policy, plan, stage.plan_sha256())
    for shard in range(stage.expected()):
        shared = sampler.group_tensors(stage.groups(shard))
        for chunk in plan.chunks(stage.groups(shard)):
            write_group(stage, shard, chunk.group, shared[chunk.group])
            state = sampler.start(chunk)
            for _, steps in sampler.phases:
                sampler.advance(chunk, state, shared, steps)
            for sample in sampler.finish(chunk, state):
                write_samples(stage, shard, sample)
        seal(stage, shard, {})
    training.advise(stage)
    with pytest.raises(UserError) as caught:
        train(run, 1, policy)
    assert caught.value.problem == (
        "train.ratio_norm needs the means of the policy that sampled the shards, but that is 1 policies old"
    )
    again = training.fork(run, tmp_path / "again", recompute_log_probs=True)
    shutil.rmtree(again.iteration(1).train_dir)
    report = train(again, 1, policy)
    assert report.replay is None
    assert report.updates == {"high_noise": 2, "low_noise": 2}


def test_settings_are_frozen_by_the_first_call(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.killed(lambda: train(run, 0, policy, at_update("high_noise", 1)))
    other = training.fork(run, tmp_path / "other", learning_rate=2e-3)
    with pytest.raises(UserError, match=r"training began with other train\.learning_rate"):
        train(other, 0, policy)


def test_advantages_that_come_later_are_not_used(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    training.killed(lambda: train(run, 0, policy, at_update("high_noise", 1)))
    training.advise(run.iteration(0), lambda key: (-9.0, 1.0), name="00000000")
    train(run, 0, policy)
    assert training.equal(training.weights(run, 0), training.weights(trained, 0))


def test_two_trainers_do_not_share_an_iteration(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    with claim(run.iteration(0), 0, "train"), pytest.raises(StillBusy, match="being trained by another process"):
        train(run, 0, policy)


def test_an_untrained_iteration_before_is_named(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    os.rename(run.iteration(0).path, run.iteration(1).path)
    with pytest.raises(UserError):
        train(run, 1, policy)


# --- That it learns --------------------------------------------------------------------------------------------------


def test_good_samples_become_likelier_and_bad_ones_less(trained: Run, policy: Policy) -> None:
    """Over all transitions, the change of log-prob that training brought goes along with the advantage."""
    rollouts = Rollouts.open(trained.iteration(0))
    policy.experts.become(trained.iteration(0).policy_dir)
    gains: dict[int, float] = {0: 0.0, 1: 0.0}
    for unit in rollouts.units():
        policy.experts.use(unit.expert)
        chunk = read_batch(rollouts, policy, unit)
        change = log_probs(policy, rollouts, chunk) - chunk.log_prob
        advantages = torch.tensor([training.advantage_of(key)[0] for key in chunk.keys])
        gains[unit.expert] += float((advantages * change).sum())
    assert gains[0] > 0
    assert gains[1] > 0
