"""Every objective and estimator on real shards of a tiny model: losses and gradients from the formulas, what is
selected, what is refused."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.policy import Policy
from rollout.schedule import step_kernel
from rollout.transitions import noise, noise_seed
from shards.config import TrainConfig
from shards.errors import UserError
from shards.plan import sample_key
from shards.run import Run
from tests.support import training
from train.data import Inputs, keys_of
from train.inputs import freeze
from train.objectives.estimators import gaussian_factor
from train.objectives.selection import select_samples
from train.order import Slot, Unit, minibatches
from train.run import train
from train.trainer import ExpertTrainer

SIZE = 4  # in batches of 2: partners of a pair are in different batches
MERIT = (0.9, -1.4, 0.1, 0.4)


def advantage_of(key: str) -> tuple[float, float]:
    """Two groups with the same merits in another order."""
    sample = int(key[-2:])
    return MERIT[sample if "p000000" in key else SIZE - 1 - sample], 1.0


@pytest.fixture(scope="module")
def rolled(tiny_t2v2: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Iteration 0 sampled and scored, not trained."""
    run = training.make_run(tmp_path_factory.mktemp("train") / "run", tiny_t2v2, group_size=SIZE)
    training.advise(training.roll(run, 0, policy), advantage_of)
    return run


class Independent:
    """The losses of one expert again, from what the shards hold and the formulas of docs/objectives.md."""

    def __init__(self, inputs: Inputs, config: TrainConfig, new: Policy, old: Policy) -> None:
        self.inputs, self.config, self.new, self.old = inputs, config, new, old
        self.schedule, self.plan = inputs.rollouts.schedule, inputs.rollouts.plan

    def state(self, unit: Unit, number: int) -> Tensor:
        """State `number` of each sample of a unit."""
        shard = self.inputs.rollouts.shards[unit.shard]
        return torch.cat([shard.latents(key, [number]) for key in keys_of(unit)]).float()

    def fresh(self, unit: Unit, shared: bool) -> Tensor:
        prompt = self.inputs.rollouts.groups[unit.group].prompt_id
        numbers = [0 if shared else sample for sample in unit.samples]
        seeds = [noise_seed(self.plan.seed, 0, prompt, number, 1_000_000 + unit.step) for number in numbers]
        return torch.stack([noise(self.state(unit, self.schedule.steps).shape[1:], seed=seed) for seed in seeds])

    def velocity(self, policy: Policy, unit: Unit, x: Tensor) -> Tensor:
        text = self.inputs.rollouts.shards[unit.shard].group(unit.group)
        prompt, negative = (policy.text.pad(text[name], unit.size) for name in ("prompt", "negative"))
        step = unit.step
        return policy.velocity(
            unit.expert, x, self.schedule.timesteps[step], prompt, negative, self.schedule.guidance[step]
        )

    def error(self, policy: Policy, unit: Unit, shared: bool) -> Tensor:
        """Mean squared error [B] of the velocity of final latents with fresh noise."""
        sigma, x0, eps = (
            self.schedule.sigmas[unit.step],
            self.state(unit, self.schedule.steps),
            self.fresh(unit, shared),
        )
        velocity = self.velocity(policy, unit, (1 - sigma) * x0 + sigma * eps)
        return (velocity - (eps - x0)).square().flatten(1).mean(1)

    def policy_gradient(self, unit: Unit) -> Tensor:
        """Loss [B] of the estimators, with the hold."""
        config, step = self.config, unit.step
        sigma, x0 = self.schedule.sigmas[step], self.state(unit, self.schedule.steps)
        on_x, on_velocity, std = step_kernel(self.schedule, step)
        if config.estimator == "fresh":
            eps = self.fresh(unit, shared=False)
            x = (1 - sigma) * x0 + sigma * eps
        else:
            x = self.state(unit, step)
        new = self.velocity(self.new, unit, x)
        with torch.no_grad():
            old = self.velocity(self.old, unit, x)
        if config.estimator == "noise":
            asked = (self.state(unit, step + 1) - on_x * x - on_velocity * old) / std
            moved = on_velocity * (new - old) / std
        else:
            clean, error = x - sigma * old, 0.0
            moved, asked = sigma * (old - new), x0 - clean
            kappa = -on_velocity / sigma
            if config.error_weight in ("derived", "calibrated"):
                window = self.inputs.rollouts.window(unit.group)
                factor = gaussian_factor(self.schedule, step, window) if config.error_weight == "calibrated" else 1.0
                error = math.sqrt(factor) * kappa / std
            elif config.error_weight == "velocity":
                error = 1.0 / sigma
            else:
                error = asked.abs().flatten(1).mean(1).rsqrt().view(-1, 1, 1, 1, 1)
            moved, asked = error * moved, error * asked
        pull, square = ((one * moved).flatten(1).mean(1) for one in (asked, moved))
        advantage = torch.tensor([self.inputs.advantages[key][0] for key in keys_of(unit)])
        hold = config.proximal_2 if unit.expert == 1 and config.proximal_2 is not None else config.proximal
        if hold:
            return -advantage * pull.clamp(-config.clip_range, config.clip_range) + hold / 2 * square
        ratio = (pull - square / 2).exp()
        limited = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * limited)

    def pairs(self, units: list[Unit], chosen: list[tuple[str, str]]) -> Tensor:
        """Sum of the losses of pairs of sample keys at each step of `units`, with the supervised term."""
        total = torch.zeros(())
        for step in sorted({unit.step for unit in units}):
            errors = {}
            for unit in (unit for unit in units if unit.step == step):
                with torch.no_grad():
                    before = self.error(self.old, unit, shared=True)
                now = self.error(self.new, unit, shared=True)
                errors |= {key: (now[index], before[index]) for index, key in enumerate(keys_of(unit))}
            for winner, loser in chosen:
                if winner in errors:
                    gain = (errors[winner][0] - errors[winner][1]) - (errors[loser][0] - errors[loser][1])
                    total = total - torch.nn.functional.logsigmoid(-self.config.dpo_beta / 2 * gain)
                    total = total + self.config.dpo_sft * errors[winner][0]
        return total


@contextlib.contextmanager
def moved_trainer(run: Run, policy: Policy, expert: int) -> Any:
    """A trainer whose weights have moved from those of the rollout, and the formulas beside it."""
    inputs, old = freeze(run, run.iteration(0)), Policy.of(run.config.model)
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    old.experts.use(expert)
    with contextlib.closing(ExpertTrainer(policy, inputs, run.config.train, expert)) as trainer:
        for number, weight in enumerate(trainer.state.parameters.values()):
            weight.data += 0.05 * noise(tuple(weight.shape), seed=number)
        trainer.moved = True
        yield trainer, Independent(inputs, run.config.train, policy, old)
    policy.experts.become(None)


GRADIENTS: dict[str, dict[str, Any]] = {
    "noise held": {"estimator": "noise", "proximal": 0.7, "clip_range": 10.0},
    "endpoint derived": {"estimator": "endpoint", "proximal": 1.3, "clip_range": 10.0},
    "endpoint calibrated": {"estimator": "endpoint", "error_weight": "calibrated", "proximal": 0.2, "clip_range": 10.0},
    "endpoint clipped": {"estimator": "endpoint", "error_weight": "adaptive", "clip_range": 1e-3},
    "fresh adaptive": {"estimator": "fresh", "error_weight": "adaptive", "proximal": 1.0, "clip_range": 10.0},
    "fresh velocity": {"estimator": "fresh", "error_weight": "velocity", "proximal": 5.0, "clip_range": 10.0},
    "fresh derived": {"estimator": "fresh", "error_weight": "derived", "proximal": 1.0, "clip_range": 10.0},
    "a hold each": {
        "estimator": "fresh",
        "error_weight": "velocity",
        "proximal": 2.0,
        "proximal_2": 0.3,
        "clip_range": 10.0,
    },
}


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("name", GRADIENTS)
def test_losses_and_gradients_of_estimators_are_those_of_the_formulas(
    name: str, expert: int, rolled: Run, policy: Policy, tmp_path: Path
) -> None:
    run = training.fork(rolled, tmp_path / "run", kl_beta=0.0, **GRADIENTS[name])
    with moved_trainer(run, policy, expert) as (trainer, independent):
        units = [unit for unit in trainer.inputs.units() if unit.expert == expert]
        expected = torch.cat([independent.policy_gradient(unit) for unit in units])
        gradients = torch.autograd.grad(expected.sum(), list(trainer.state.parameters.values()), allow_unused=True)
        found = torch.cat([trainer.backward(unit, 1.0)["loss"] for unit in units])
        torch.testing.assert_close(found, expected.detach(), rtol=2e-4, atol=1e-6)
        compare(trainer, gradients)


def compare(trainer: ExpertTrainer, gradients: tuple[Tensor | None, ...]) -> None:
    """The gradients a trainer has added up against others of the same weights, up to rounding."""
    size = max(float(one.abs().max()) for one in gradients if one is not None)
    assert size > 0
    for (name, weight), expected in zip(trainer.state.parameters.items(), gradients, strict=True):
        if expected is not None:
            assert weight.grad is not None, name
            torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("settings", [
    {"pairs": "margin", "pair_margin": 0.45, "dpo_sft": 0.5}, {"pairs": "best-worst"}], ids=str)  # fmt: skip
def test_dpo_gives_the_gradient_of_its_pairs_across_batches(
    settings: dict[str, Any], expert: int, rolled: Run, policy: Policy, tmp_path: Path
) -> None:
    """The pairs are written out here: each loss counts half for either sample, as docs/objectives.md says."""
    run = training.fork(rolled, tmp_path / "run", objective="dpo", dpo_beta=30.0, kl_beta=0.0, **settings)
    order = {"p000000": (0, 3, 2, 1), "other": (3, 0, 1, 2)}  # samples from the best to the worst
    with moved_trainer(run, policy, expert) as (trainer, independent):
        chosen = []
        for group in trainer.inputs.rollouts.groups:
            ranked = order["p000000" if "p000000" in group else "other"]
            numbers = [(0, 3)] if settings["pairs"] == "best-worst" else [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
            chosen += [(sample_key(group, ranked[a]), sample_key(group, ranked[b])) for a, b in numbers]
        units = [unit for unit in trainer.inputs.units() if unit.expert == expert]
        total = independent.pairs(units, chosen)
        gradients = torch.autograd.grad(total, list(trainer.state.parameters.values()), allow_unused=True)
        trainer.losses.prepare(units, moved=True)
        rows = [trainer.backward(unit, 1.0) for unit in units]
        value = sum(float((row["loss"] * row["weight"]).sum()) for row in rows)
        assert value == pytest.approx(total.item(), rel=1e-4)
        assert 0 < float(torch.cat([row["pairs_right"] for row in rows]).mean()) < 1
        compare(trainer, gradients)


@pytest.mark.parametrize("weight", ["equal", "advantage"])
def test_sft_matches_the_best_of_each_group(weight: str, rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", objective="sft", sft_best=2, sft_weight=weight, kl_beta=0.0)
    with moved_trainer(run, policy, 1) as (trainer, independent):
        units = [unit for unit in trainer.inputs.units() if unit.expert == 1]
        assert {unit.samples for unit in units} == {(0, 3)}
        expected = [independent.error(policy, unit, shared=False) for unit in units]
        merits = [torch.tensor([advantage_of(key)[0] if weight == "advantage" else 1.0 for key in keys_of(unit)])
                  for unit in units]  # fmt: skip
        total = sum((error * merit).sum() for error, merit in zip(expected, merits, strict=True))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, list(trainer.state.parameters.values()), allow_unused=True)
        found = torch.cat([trainer.backward(unit, 1.0)["loss"] for unit in units])
        torch.testing.assert_close(found, torch.cat(expected).detach(), rtol=1e-4, atol=1e-6)
        compare(trainer, gradients)


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {**settings, "clip_range": 10.0} for name, settings in GRADIENTS.items()},
    "two holds": {"estimator": "endpoint", "proximal": 1.0, "proximal_2": 0.0, "learning_rate_2": 3e-4},
    "with kl": {"estimator": "fresh", "error_weight": "velocity", "proximal": 1.0, "kl_beta": 0.1},
    "dpo": {"objective": "dpo", "pair_margin": 0.0},
    "dpo best": {"objective": "dpo", "pairs": "best-worst", "kl_beta": 0.1, "dpo_sft": 1.0},
    "sft": {"objective": "sft", "sft_best": 3},
}


@pytest.mark.parametrize(
    ("name", "full"),
    [
        *((name, False) for name in VARIANTS),
        *((name, True) for name in ("endpoint clipped", "with kl", "dpo best", "sft")),
    ],
)
def test_every_objective_trains_both_experts_and_logs_what_decides(
    name: str, full: bool, rolled: Run, policy: Policy, tmp_path: Path
) -> None:
    learning_rate = {"learning_rate": 1e-4} if full else {}
    run = training.fork(rolled, tmp_path / "run", full=full, **{**learning_rate, **VARIANTS[name]})
    report = train(run, 0, policy)
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    assert report.replay == 0.0
    records = [json.loads(line) for line in (run.iteration(0).policy_dir / "metrics.jsonl").open()]
    objective = run.config.train.objective
    for record in records:
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert record["gradient_norm"] > 0
        assert 0 < record["effective_rows"] <= record["rows"]
        if record["update"] == 1:
            assert record["ratio_min"] == record["ratio_max"] == 1.0
        if objective != "sft":
            assert (record["movement"] > 0) == (record["update"] > 1)
            assert (record["mean_shift"] > 0) == (record["update"] > 1)
        if objective == "dpo":
            assert record["pairs_right"] == 0.5 if record["update"] == 1 else 0 <= record["pairs_right"] <= 1
        if not full and record["expert"] == "low_noise":
            assert -1 <= record["signal"] <= 1
        assert ("signal" in record) <= (not full)
    policy.experts.become(None)


def test_the_signal_is_the_cosine_of_the_two_halves(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", estimator="fresh", error_weight="velocity", proximal=1.0)
    halves = []
    with moved_trainer(run, policy, 1) as (trainer, _):
        units = [unit for unit in trainer.inputs.units() if unit.expert == 1]
        total = trainer.inputs.weight(units)
        for half in (units[: len(units) // 2], units[len(units) // 2 :]):
            trainer.state.optimizer.zero_grad()
            for unit in half:
                trainer.backward(unit, total)
            halves.append(torch.cat([weight.grad.flatten() for weight in trainer.state.parameters.values()
                                     if weight.grad is not None]))  # fmt: skip
        expected = torch.nn.functional.cosine_similarity(*halves, dim=0).item()
        found = trainer.update(units, [Slot(unit, True) for unit in units])["signal"]
    assert found == pytest.approx(expected, abs=1e-4)


# --- What is selected ------------------------------------------------------------------------------------------------

GROUP = "i000000-p000000"


def table(*pairs: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {sample_key(GROUP, number): pair for number, pair in enumerate(pairs)}


def test_pairs_of_a_group() -> None:
    advantages = table((1.0, 1.0), (-1.0, 1.0), (0.2, 1.0), (9.0, 0.0), (0.1, 1.0))  # the best one is dropped
    margin = select_samples(advantages, TrainConfig(objective="dpo", pair_margin=0.8))
    assert margin.pairs == {GROUP: [(0, 2), (0, 4), (0, 1), (2, 1), (4, 1)]}
    assert [weight for _, weight in margin.advantages.values()] == [3.0, 3.0, 2.0, 0.0, 2.0]
    ends = select_samples(advantages, TrainConfig(objective="dpo", pairs="best-worst"))
    assert ends.pairs == {GROUP: [(0, 1)]}
    assert [weight for _, weight in ends.advantages.values()] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert select_samples(advantages, TrainConfig()).advantages == advantages


def test_the_best_of_a_group() -> None:
    advantages = table((1.0, 1.0), (-1.0, 1.0), (0.2, 1.0), (9.0, 0.0), (-0.1, 1.0))
    equal = select_samples(advantages, TrainConfig(objective="sft", sft_best=3, sft_weight="equal"))
    assert [weight for _, weight in equal.advantages.values()] == [1.0, 0.0, 1.0, 0.0, 1.0]
    merit = select_samples(advantages, TrainConfig(objective="sft", sft_best=3))
    assert [weight for _, weight in merit.advantages.values()] == [1.0, 0.0, 0.2, 0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [{"objective": "dpo", "pairs": "best-worst"}, {"objective": "sft", "sft_best": 2, "sft_weight": "equal"}],
)
def test_a_group_without_spread_gives_nothing(settings: dict[str, Any]) -> None:
    level = {sample_key("i000000-p000001", number): (0.0, 1.0) for number in range(3)}
    selected = select_samples({**table((1.0, 1.0), (-1.0, 1.0)), **level}, TrainConfig(**settings))
    assert selected.pairs.keys() <= {GROUP}
    assert all(selected.advantages[key][1] == 0.0 for key in level)
    assert any(weight for _, weight in selected.advantages.values())


def test_units_of_a_group_and_step_stay_in_one_minibatch_where_pairs_are_compared() -> None:
    units = [Unit(0, 0, f"g{group}", (first, first + 1), step)
             for group in range(3) for step in (1, 2) for first in (0, 2, 4)]  # fmt: skip
    batches = minibatches(units, seed=3, iteration=1, expert=0, updates=4, whole_groups=True)
    assert len(batches) == 4
    assert sorted(unit for batch in batches for unit in batch) == sorted(units)
    for batch in batches:
        for unit in batch:
            family = [one for one in units if (one.group, one.step) == (unit.group, unit.step)]
            assert set(family) <= set(batch)


# --- What is refused -------------------------------------------------------------------------------------------------


def without_spread(key: str) -> tuple[float, float]:
    return 0.0, 1.0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], Callable[[str], tuple[float, float]], str]] = [
    ({"objective": "dpo"}, {}, without_spread, "no group has two videos that make a pair"),
    ({"objective": "dpo", "pair_margin": 7.0}, {}, advantage_of, "train.pair_margin = 7"),
    ({"objective": "sft"}, {}, without_spread, "no group has a video above its mean"),
    ({"estimator": "endpoint"}, {"law": "ode", "high_steps": 0, "low_steps": 0}, advantage_of,
     "has no stochastic steps, which train.estimator = endpoint needs"),
    ({"estimator": "fresh"}, {"law": "ode", "high_steps": 0, "low_steps": 0}, advantage_of, "weighs steps by a law"),
    ({"error_weight": "adaptive"}, {}, advantage_of, "does not apply to train.estimator = noise"),
    ({"estimator": "fresh", "error_weight": "velocity", "step_weight": "std"}, {}, advantage_of, "both weigh steps"),
    ({"proximal": 1.0, "ratio_norm": True}, {}, advantage_of, "train.ratio_norm corrects the clipped ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sampling", "rule", "said"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    settings: dict[str, Any], sampling: dict[str, Any], rule: Any, said: str, tiny_t2v2: Path, policy: Policy,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = training.make_run(tmp_path / "run", tiny_t2v2, settings, group_size=SIZE, **sampling)
    training.advise(training.roll(run, 0, policy), rule)
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as caught:
        train(run, 0, policy)
    assert caught.value.hint
    assert not (run.iteration(0).path / "train").exists()
    assert not run.iteration(0).policy_dir.exists()


def test_fresh_noise_needs_no_stochastic_step(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    settings = {"estimator": "fresh", "error_weight": "adaptive", "proximal": 1.0}
    run = training.make_run(tmp_path / "run", tiny_t2v2, settings, law="ode", high_steps=0, low_steps=0)
    training.advise(training.roll(run, 0, policy))
    assert train(run, 0, policy).updates == {"high_noise": 2, "low_noise": 2}


def test_a_training_begun_before_a_setting_existed_had_its_default(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    freeze(run, run.iteration(0))
    path = run.iteration(0).train_plan_path
    plan = json.loads(path.read_text())
    for name in ("estimator", "proximal", "proximal_2", "error_weight"):
        del plan["train"][name]
    del plan["content_sha256"]
    path.chmod(0o644)
    path.write_text(json.dumps(plan))
    freeze(run, run.iteration(0))
    with pytest.raises(UserError, match=r"training began with other train\.proximal"):
        freeze(Run.open(run.path, ["train.proximal=1.0"]), run.iteration(0))
