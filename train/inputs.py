"""What an iteration trains on, decided once: shards, advantages and settings, frozen in `train/plan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shards.config import TrainConfig
from shards.errors import UserError
from shards.process.progress import counted
from shards.records.kinds import read_summary, read_train_plan
from shards.records.reading import CHECKSUM, sealed
from shards.sidecar import advantaged, read_advantages, specifications
from shards.store.urls import in_shell
from train.data import Inputs, Rollouts
from train.objectives.selection import Advantages, select_samples

if TYPE_CHECKING:
    from shards.config import RunConfig
    from shards.run import Run, Stage

SCHEMA = 1
FREE = {"save_every", "replay_samples", "replay_limit", "gradient_checkpointing", "max_policy_lag", "keep_checkpoints",
        "async_checkpoints", "ulysses", "replicate", "experts_at_once"}  # fmt: skip
"""Settings of [train] that may change between a kill and a resume: they do not change the result."""


def freeze(run: Run, stage: Stage, advantage: str = "") -> Inputs:
    """Choose the inputs of an iteration, write them to `train/plan.json`, and open them; the first call decides.

    `advantage` names the specification to train on, 8 hexadecimal digits; without it the one that can be meant.
    Raises UserError when a shard or its advantages are missing, when two advantage specifications could be meant, and
    when the run was frozen with other inputs or settings, naming them.
    """
    rollouts = Rollouts.open(stage)
    path = stage.train_plan_path
    frozen = read_train_plan(path) if path.exists() else None
    specification = advantage or (frozen.advantage if frozen else choose_specification(stage, run.config))
    _check_named(stage, advantage)
    _check_advantages(stage, rollouts, specification)
    selected = select_samples(_advantages(stage, specification), run.config.train)  # told before anything is written
    ours = _plan(run.config, stage, rollouts, specification)
    stage.files.publish_new(path, sealed(ours, path))
    differing = _differences(ours, asdict(read_train_plan(path)))
    if differing:
        raise UserError(
            f"{path}: training began with other {', '.join(differing)}",
            "restore them, or delete the iteration's train/ and policy/ folders to train it anew",
        )
    alone = run.config.train.objective in ("dpo", "sft")
    return Inputs(rollouts, specification, selected.advantages, selected.pairs, alone)


def _advantages(stage: Stage, specification: str) -> Advantages:
    frame = read_advantages(stage, specification)
    pairs = zip(frame["advantage"].tolist(), frame["weight"].tolist(), strict=True)
    return dict(zip(frame["key"].tolist(), pairs, strict=True))


def choose_specification(stage: Stage, config: RunConfig) -> str:
    """The advantage specification to train on: the only one there is, or the one made with the run's [score].

    UserError when there is none, or when that leaves a choice.
    """
    found = specifications(stage)
    if not found:
        raise UserError(f"{stage.path} has no advantages", f"run `{_score_again(stage)}` first")
    if len(found) == 1:
        return found[0]
    wanted = config.score.specification()
    matching = [name for name in found if _specification(stage, name) == wanted]
    if len(matching) != 1:
        raise UserError(
            f"{stage.advantages_dir} holds {len(found)} specifications ({', '.join(found)}) and "
            f"{len(matching)} of them fit [score] in run.toml",
            "name the one that is meant with --advantage",
        )
    return matching[0]


def check_policy(rollouts: Rollouts, fingerprint: str, settings: TrainConfig) -> int:
    """Policies between the one that sampled the shards and the one to be trained, `fingerprint`: 0 for the same.

    Raises UserError, naming the shards, when they were sampled by another one and the lag that the plan admits is more
    than `max_policy_lag`; likewise when shards disagree with the plan.
    """
    stale = {
        number: found
        for number, shard in rollouts.shards.items()
        if (found := {shard.meta(key)["policy"] for key in shard.keys}) != {fingerprint}
    }
    if not stale:
        return 0
    planned = rollouts.plan.policy
    lag = rollouts.stage.iteration - planned.lag_of
    agree = all(found == {planned.fingerprint} for found in stale.values()) and len(stale) == len(rollouts.shards)
    if agree and 0 < lag <= settings.max_policy_lag:
        return lag
    names = ", ".join(rollouts.stage.shard_path(number).name for number in sorted(stale)[:8])
    others = ", ".join(sorted({str(one)[:12] for found in stale.values() for one in found}))
    raise UserError(
        f"{rollouts.stage.rollout_dir}: {names} came from policy {others}, "
        f"but the policy to train is {fingerprint[:12]}",
        "restore the policy folder of the iteration before, or sample this iteration again; shards of an older policy "
        "are accepted up to train.max_policy_lag",
    )


def _plan(config: RunConfig, stage: Stage, rollouts: Rollouts, specification: str) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "iteration": stage.iteration,
        "plan_sha256": stage.plan_sha256(),
        "policy": rollouts.plan.policy.fingerprint,
        "shards": {str(number): shard.manifest.tar.sha256 for number, shard in rollouts.shards.items()},
        "advantage": specification,
        "order_seed": rollouts.plan.seed,
        "train": {name: value for name, value in config.train.model_dump(mode="json").items() if name not in FREE},
    }


def _check_named(stage: Stage, advantage: str) -> None:
    """UserError for a specification that was asked for and is not there."""
    found = specifications(stage)
    if advantage and advantage not in found:
        raise UserError(
            f"{stage.advantages_dir} holds no specification {advantage!r}",
            f"there are: {', '.join(found) or 'none; run `rushes score` first'}",
        )


def _check_advantages(stage: Stage, rollouts: Rollouts, specification: str) -> None:
    missing = [number for number in rollouts.shards if not advantaged(stage, number, specification)]
    if missing:
        names = ", ".join(stage.advantage_path(specification, number).name for number in missing[:8])
        raise UserError(
            f"{stage.advantage_dir(specification)} lacks the advantages of {counted(len(missing), 'shard')}, or has "
            f"them for another tar: {names}",
            f"run `{_score_again(stage)}`",
        )


def _score_again(stage: Stage) -> str:
    return f"rushes score {in_shell(stage.run_path)} --iteration {stage.iteration}"


def _specification(stage: Stage, name: str) -> dict[str, object] | None:
    """What the advantages of that name were made by; None where their summary is not written yet."""
    path = stage.summary_path(name)
    return read_summary(path).specification if path.exists() else None


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of what differs, `train.learning_rate` or `shards`.

    A setting of [train] that the file does not have, because it was written before there was one, had its default.
    """
    theirs = {name: value for name, value in theirs.items() if name != CHECKSUM}
    if isinstance(theirs.get("train"), dict):
        before = {name: default for name, default in _defaults().items() if name in ours["train"]}
        theirs = {**theirs, "train": before | theirs["train"]}
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if "train" not in names or not isinstance(theirs.get("train"), dict):
        return names
    settings = ours["train"].keys() | theirs["train"].keys()
    inner = [f"train.{name}" for name in sorted(settings) if ours["train"].get(name) != theirs["train"].get(name)]
    return [name for name in names if name != "train"] + inner


def _defaults() -> dict[str, object]:
    """Settings of [train] as a run.toml without them has them."""
    return TrainConfig().model_dump(mode="json")
