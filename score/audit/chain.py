"""Where a number comes from: from the mean reward of a stage back to videos, seeds, policies and the base model.

Each link states facts that a stranger can recompute from the files it names, and what is wrong with them. Nothing is
taken from `run.toml`, which may have been edited since: only from what each stage wrote down for itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from score.advantages import Specification, advantages
from score.reward import split_name
from score.tables import side_by_side
from shards import sidecar
from shards.errors import UserError
from shards.files import canonical_sha256, sha256_file
from shards.plan import RolloutPlan
from shards.reader import open_shard, read_manifest
from shards.records.kinds import read_model_record, read_policy, read_summary, read_train_plan
from shards.run import AVERAGE, Run, Stage
from shards.verify.problems import result
from shards.verify.shards import verify

if TYPE_CHECKING:
    import pandas as pd

CLOSE = 1e-9  # of rewards and advantages recomputed, relative to 1 or to the larger number


@dataclass(frozen=True)
class Link:
    """One step of the way back."""

    what: str
    """reward, advantages, scores, videos, seeds, sigmas, code, policy, training or model."""
    where: str
    """The file or folder that holds it, relative to the run."""
    facts: Mapping[str, Any]
    """What the file says, values of JSON."""
    faults: tuple[str, ...] = field(default=())


def chain_of(run: Run, stage: Stage, specification: str = "", step: Callable[[str], None] | None = None) -> list[Link]:
    """The links behind the mean reward of a stage, down to the base model; every file on the way is read.

    `specification` names a folder of advantages where a stage has several. `step` hears the name of each stage whose
    files are checked. Raises UserError for a stage without a plan or without that folder.
    """
    plan = stage.plan()
    if plan is None:
        raise UserError(
            f"{stage.path} has no plan.json, so there is no number to explain", "rollout and score it first"
        )
    step = step or (lambda name: None)
    step(stage.name)
    links = [*_numbers(stage, _chosen(stage, specification)), _videos(stage), _seeds(stage, plan), _sigmas(stage, plan)]
    return [*links, _code(stage), *_policies(run, stage, plan, step), _model(run, plan)]


def chain_sha256(links: list[Link]) -> str:
    """One hash of all facts of a chain: two people who audit the same run get the same."""
    return canonical_sha256([[link.what, link.where, dict(link.facts)] for link in links])


def _chosen(stage: Stage, specification: str) -> str:
    found = sidecar.specifications(stage)
    if not found:
        raise UserError(f"{stage.path} has no advantages, so it has no mean reward", "run `rushes score` on it")
    if specification and specification not in found:
        raise UserError(f"{stage.path} has no advantages {specification}", f"there are {', '.join(found)}")
    if not specification and len(found) > 1:
        raise UserError(f"{stage.path} has several advantages: {', '.join(found)}", "choose one with --advantage")
    return specification or found[0]


def _numbers(stage: Stage, name: str) -> Iterator[Link]:
    """The mean, the advantages it is the mean of, and the scores they follow from, each computed again."""
    summary = read_summary(stage.summary_path(name))
    table = sidecar.read_advantages(stage, name)
    mean = _mean(table["reward"])
    stated = summary.mean_reward
    faults = [] if _close(mean, stated) else [f"_summary.json states {stated}, the tables give {mean}"]
    facts = {"mean_reward": mean, "videos": int(table["reward"].notna().sum())}
    where = stage.advantage_dir(name).relative_to(stage.run_path)
    yield Link("reward", str(where), facts, tuple(faults))
    yield Link("advantages", str(where), {"specification": summary.specification}, tuple(_unfounded(stage, name)))
    yield from (_scores(stage, reward, one.scorer) for reward, one in summary.rewards.items())


def _scores(stage: Stage, reward: str, folder: str) -> Link:
    """Which reward gave the scores, as every one of their tables says."""
    kept = [sidecar.score_metadata(stage, shard, folder) for shard in stage.shards()]
    names = ("scorer", "class", "version", "options", "source_sha256")
    facts = {name: kept[0][name] for name in names if name in kept[0]}
    same = all(one.get(name) == value for one in kept for name, value in facts.items())
    wrong = () if same else (f"the tables of {folder} name different scorers",)
    where = stage.scores_dir.relative_to(stage.run_path) / folder
    return Link("scores", str(where), {"reward": split_name(reward)[0]} | facts, wrong)


def _unfounded(stage: Stage, name: str) -> list[str]:
    """Columns of stored advantages that are not those which follow from the scores."""
    summary = read_summary(stage.summary_path(name))
    scores = {reward: sidecar.read_scores(stage, one.scorer) for reward, one in summary.rewards.items()}
    specification, table = Specification(**summary.specification), sidecar.read_advantages(stage, name)
    rewards = side_by_side({name: frame.assign(shard=0) for name, frame in scores.items()}, specification.weights)
    again = advantages(rewards, specification).set_index("key").loc[table["key"]].reset_index()
    wrong = []
    for column in ("advantage", "weight", "reward"):
        pairs = zip(table["key"], table[column], again[column], strict=True)
        key = next((key for key, stored, found in pairs if not _close(stored, found)), None)
        if key is not None:
            wrong.append(f"{column} of {key} does not follow from its scores")
    return wrong


def _videos(stage: Stage) -> Link:
    sums = {str(shard): read_manifest(stage, shard).tar.sha256 for shard in stage.shards()}
    damaged = [problem.problem for problem in verify(stage.path) if problem.kind == "damaged"]
    return Link("videos", str(stage.rollout_dir.relative_to(stage.run_path)), {"sha256": sums}, tuple(damaged))


def _seeds(stage: Stage, plan: RolloutPlan) -> Link:
    """The seed of the run, and the noise seeds of one sample as an example."""
    facts: dict[str, object] = {"seed": plan.seed}
    if shards := stage.shards():
        with open_shard(stage, shards[0]) as opened:
            facts |= {"key": opened.keys[0], "noise_seeds": opened.meta(opened.keys[0]).get("noise_seeds")}
    return Link("seeds", str(stage.plan_path.relative_to(stage.run_path)), facts)


def _sigmas(stage: Stage, plan: RolloutPlan) -> Link:
    schedule = plan.schedule
    names = ("sigmas", "law", "form", "eta", "solver", "guidance", "experts")
    facts = {name: getattr(schedule, name) for name in names}
    return Link("sigmas", str(stage.plan_path.relative_to(stage.run_path)), facts)


def _code(stage: Stage) -> Link:
    found = {json.dumps(read_manifest(stage, shard).info.get("versions", {}), sort_keys=True)
             for shard in stage.shards()}  # fmt: skip
    facts = {"versions": [json.loads(one) for one in sorted(found)]}
    return Link("code", str(stage.rollout_dir.relative_to(stage.run_path) / "manifest"), facts)


def _policies(run: Run, stage: Stage, plan: RolloutPlan, step: Callable[[str], None]) -> Iterator[Link]:
    """The policy that sampled, the training that made it, the policy that had sampled for that, back to iteration 0."""
    while stage.iteration > 0:
        before = run.iteration(stage.iteration - 1)
        step(before.name)
        yield _policy(before, plan)
        yield _training(before)
        earlier = before.plan()
        if earlier is None:
            yield Link("policy", before.name, {}, (f"{before.plan_path} is missing: the chain ends here",))
            return
        stage, plan = before, earlier
    yield Link("policy", stage.name, {"fingerprint": plan.policy.fingerprint, "base": plan.policy.base})


def _policy(trained: Stage, plan: RolloutPlan) -> Link:
    """The weights that a plan names, hashed again."""
    folder = trained.fetched_policy()
    record = read_policy(trained.policy_record_path)
    adapters, below = record.adapters, ""
    if record.fingerprint != plan.policy.fingerprint and record.average:
        adapters, below = record.average.adapters, AVERAGE
    places = {name: folder / below / name for name in adapters}
    files = {name: sha256_file(place) if place.is_file() else "missing" for name, place in places.items()}
    found = canonical_sha256({"base": record.base, "adapters": files})
    facts = {"fingerprint": found, "base": record.base, "files": files, "average": bool(below)}
    wrong = () if found == plan.policy.fingerprint else (f"its files are not the policy {plan.policy.fingerprint}",)
    return Link("policy", str(trained.policy_dir.relative_to(trained.run_path)), facts, wrong)


def _training(trained: Stage) -> Link:
    """What a training took: that it is there as it was, and that its advantages follow from scores."""
    frozen = read_train_plan(trained.train_plan_path)
    faults = [problem.problem for problem in verify(trained.path) if problem.kind == "damaged"]
    unfounded, problems = result(_unfounded, trained, frozen.advantage)
    faults += [one.problem for one in problems if one.problem not in faults] + (unfounded or [])
    facts = {name: getattr(frozen, name) for name in ("shards", "advantage", "policy", "train")}
    plan = trained.plan()
    if plan is not None and frozen.policy != plan.policy.fingerprint:
        faults.append(f"{trained.train_plan_path} names another policy than {trained.plan_path}")
    return Link("training", trained.name, facts, tuple(faults))


def _model(run: Run, plan: RolloutPlan) -> Link:
    record = read_model_record(run.model_path)
    wrong = () if record.base == plan.policy.base else (f"{run.model_path} names another base than the plan",)
    return Link("model", run.model_path.name, {"path": record.path, "base": record.base}, wrong)


def _mean(column: pd.Series) -> float | None:
    known = [float(value) for value in column if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _close(one: float | None, other: float | None) -> bool:
    """Whether two numbers are the same but for rounding; two that are missing are."""
    if one is None or other is None or math.isnan(one) or math.isnan(other):
        return (one is None or math.isnan(one)) and (other is None or math.isnan(other))
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)
