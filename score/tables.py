"""Tables of the scoring stage: scores of a shard, the rewards of a stage side by side, advantages, the summary."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from score.advantages import MISSING, NO_SPREAD, NOT_CHOSEN, Specification, advantages
from score.reward import Chosen, Scored, choose, split_name
from shards import sidecar
from shards.absolute_paths import class_file
from shards.errors import RunFailed, UserError, nearest
from shards.files import sha256_file
from shards.plan import SAMPLE_KEY, group_of
from shards.records.reading import sealed
from shards.run import Stage

if TYPE_CHECKING:
    import pandas as pd

    from shards.config import ScoreConfig
    from shards.records.kinds import RewardValues, SummaryValues

GUARDS = "guards"


@dataclass(frozen=True)
class Selection:
    """The rewards of a stage, and how advantages follow from them."""

    rewards: Mapping[str, Chosen]
    specification: Specification

    @property
    def digest(self) -> str:
        """8 hex digits that stand for all the advantages follow from, versions and options of the scorers included."""
        identity = {
            "specification": asdict(self.specification),
            "scorers": {name: chosen.directory for name, chosen in self.rewards.items()},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def scorers(self) -> list[Chosen]:
        """Every reward once, and the guards, which watch always."""
        chosen = {one.directory: one for one in (*self.rewards.values(), choose(GUARDS))}
        return list(chosen.values())


def select(config: ScoreConfig, rewards: Mapping[str, float] | None = None, content: bool = True) -> Selection:
    """Resolve the names of [score].rewards, or of `rewards` when given. Raises UserError for a wrong one.

    Without `content` the files that options name are not looked at, as for `choose`.
    """
    weights = dict(config.rewards if rewards is None else rewards)
    if not weights:
        raise UserError("no reward is given", "name at least one, like rewards = { ocr = 1.0 } under [score]")
    chosen: dict[str, Chosen] = {}
    for name, weight in weights.items():
        base, component = split_name(name)
        chosen[base] = chosen.get(base) or choose(base, config.options.get(base), content)
        if component and component not in chosen[base].components:
            known = chosen[base].components
            near = nearest(component, known)
            hint = f"did you mean {near!r}? " if near else ""
            raise UserError(f"reward {base!r} has no component {component!r}", f"{hint}it has {', '.join(known)}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} is {weight}", "weights are finite numbers")
    folders = {one.directory: one for one in chosen.values()}
    if same := next((one for one in chosen.values() if folders[one.directory] is not one), None):
        problem = f"rewards {same.name!r} and {folders[same.directory].name!r} have one file name, class and version"
        raise UserError(problem, "their scores would lie in one folder: rename a file, or give one another version")
    specification = Specification(weights, config.combine, config.spread, config.min_spread, config.best_of_n)
    return Selection(chosen, specification)


def score_table(chosen: Chosen, keys: Sequence[str], scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per sample: the columns of shards/README.md, NaN and a reason where there is no score."""
    import pandas as pd

    final = dict(zip(keys, scored, strict=True))
    for group in dict.fromkeys(map(group_of, keys)):
        members = [key for key in keys if group_of(key) == group]
        final.update(zip(members, chosen.after_group([final[key] for key in members]), strict=True))
    rows = [_row(chosen, key, final[key]) for key in keys]
    columns = ["key", "prompt_id", "sample", "reward", "status", *chosen.components]
    return pd.DataFrame(rows, columns=[*columns, "text"] if chosen.keeps_text else columns)


def _row(chosen: Chosen, key: str, scored: Scored) -> dict[str, object]:
    matched = SAMPLE_KEY.fullmatch(key)
    assert matched
    values = {name: math.nan if scored.reason else float(scored.components[name]) for name in chosen.components}
    row = {
        "key": key,
        "prompt_id": int(matched[2]),
        "sample": int(matched[3]),
        "reward": values[chosen.components[0]],
        "status": scored.reason or "ok",
        **values,
    }
    if chosen.keeps_text:
        readings = scored.readings()
        row["text"] = None if readings is None else json.dumps(readings, ensure_ascii=False)
    return row


def provenance(chosen: Chosen) -> dict[str, str]:
    """What a score file says about where its numbers come from."""
    return {
        "scorer": chosen.name,
        "class": chosen.target,
        "version": chosen.version,
        "options": json.dumps(dict(chosen.options), sort_keys=True),
        "content": json.dumps(dict(chosen.content), sort_keys=True),
        **({"source_sha256": chosen.source} if chosen.source else {}),
    }


def keep_source(stage: Stage, chosen: Chosen) -> None:
    """Put the source of a reward of one's own beside its scores, so that the run says how they were made.

    A file that was edited after it was chosen is not kept: it is not what gave the scores.
    """
    file = class_file(chosen.target) if chosen.source else None
    if file is not None and sha256_file(file) == chosen.source:
        stage.files.publish_new(stage.scores_dir / chosen.directory / sidecar.SOURCE, file.read_bytes())


def edited(stage: Stage, chosen: Chosen) -> list[str]:
    """Folders with scores of this stage by another source, version or options of a reward of one's own."""
    others = [name for name in sidecar.scorers(stage) if name.rpartition("-")[0] == chosen.stem]
    return [name for name in others if name != chosen.directory] if chosen.source else []


def side_by_side(scores: Mapping[str, pd.DataFrame], weights: Mapping[str, float]) -> pd.DataFrame:
    """Columns key, prompt_id, sample, shard, group, status and one per reward in `weights`.

    `scores` has a table per reward name. `status` is the first reason for a missing reward, "" when none is missing.
    """
    import pandas as pd

    frame: pd.DataFrame | None = None
    for base, table in scores.items():
        if frame is None:
            frame = table[["key", "prompt_id", "sample", "shard"]].copy()
            frame["group"], frame["status"] = frame["key"].map(group_of), ""
        for name, weight in weights.items():
            if split_name(name)[0] == base:
                column = (table[split_name(name)[1] or "reward"]).to_numpy()
                frame[name] = column
                absent = (frame["status"] == "") & pd.isna(column) & (weight != 0.0)
                frame.loc[absent, "status"] = table.loc[absent, "status"]
    assert frame is not None
    return frame


def read_scores(stage: Stage, chosen: Chosen) -> pd.DataFrame:
    """All scores of one reward with the column `shard`. Raises UserError when a shard has none."""
    import pandas as pd

    tables = []
    for shard in stage.shards():
        if not sidecar.scored(stage, shard, chosen.directory):
            raise UserError(
                f"shard {shard} of {stage.path} has no scores of {chosen.name!r} ({chosen.directory})",
                "run `rushes score` without --advantages-only",
            )
        tables.append(sidecar.read_scores(stage, chosen.directory, [shard]).assign(shard=shard))
    return pd.concat(tables, ignore_index=True)


def write_advantages(stage: Stage, selection: Selection, max_missing: float) -> SummaryValues:
    """Compute and write the advantages of a fully scored stage; returns the summary, which is written last.

    Raises RunFailed when more than the share `max_missing` of the rewards is missing, and UserError for a stage that is
    not scored. The same scores and configuration always give the same files.
    """
    scores = {name: read_scores(stage, chosen) for name, chosen in selection.rewards.items()}
    rewards = side_by_side(scores, selection.specification.weights)
    check_missing(rewards.loc[rewards["status"] != "", "status"].tolist(), len(rewards), max_missing, stage)
    table = advantages(rewards, selection.specification)
    kv = {"specification": json.dumps(asdict(selection.specification), sort_keys=True)}
    for shard in sorted(set(rewards["shard"])):
        part = table[rewards["shard"] == shard].reset_index(drop=True)
        sidecar.write_advantages(stage, int(shard), selection.digest, part, kv)
    summary = summarise(selection, scores, _read_guards(stage), rewards, table)
    path = stage.summary_path(selection.digest)
    stage.files.publish_replace(path, sealed(summary, path))
    return summary


def check_missing(reasons: Sequence[str], samples: int, max_missing: float, stage: Stage) -> None:
    """Raises RunFailed, naming the commonest reason, when more than a share `max_missing` of the rewards is missing."""
    if len(reasons) <= max_missing * samples:
        return
    reason, count = Counter(reasons).most_common(1)[0]
    raise RunFailed(
        f"{stage.path}: {len(reasons)} of {samples} samples have no reward, {count} of them because: {reason}",
        f"fix that and score again; [score].max_missing = {max_missing:g} is the accepted share",
    )


def _read_guards(stage: Stage) -> pd.DataFrame | None:
    guards = choose(GUARDS)
    watched = all(sidecar.scored(stage, shard, guards.directory) for shard in stage.shards())
    return read_scores(stage, guards) if watched else None


def summarise(
    selection: Selection,
    scores: Mapping[str, pd.DataFrame],
    guards: pd.DataFrame | None,
    rewards: pd.DataFrame,
    table: pd.DataFrame,
) -> SummaryValues:
    """Counts and means of a stage, as plain JSON values; None where nothing was scored.

    `scores` and `guards` are tables of read_scores, `rewards` is side_by_side of them, `table` their advantages.
    """
    reasons = table["reason"]
    used = rewards.loc[table["weight"] > 0, "group"].nunique()
    scorers = {name: _means(chosen, scores[name]) for name, chosen in selection.rewards.items()}
    exact = [one["components"]["exact"] for one in scorers.values() if "exact" in one["components"]]
    no_spread = rewards.loc[reasons == NO_SPREAD, "group"].nunique()
    return {
        "schema": 1,
        "specification": asdict(selection.specification),
        "samples": len(table),
        "groups": int(rewards["group"].nunique()),
        "used_groups": int(used),
        "dropped_no_spread": int(no_spread),
        "missing": int((reasons == MISSING).sum()),
        "missing_reasons": dict(Counter(rewards.loc[reasons == MISSING, "status"]).most_common(8)),
        "not_chosen": int((reasons == NOT_CHOSEN).sum()),
        "mean_reward": _number(table["reward"].mean()),
        "std_reward": _number(table["reward"].std(ddof=0)),
        "mean_group_std": _number(table.groupby(rewards["group"])["reward"].std(ddof=0).mean()),
        "exact_share": exact[0] if exact else None,
        "rewards": scorers,
        "guards": None if guards is None else _means(choose(GUARDS), guards)["components"],
    }


def _means(chosen: Chosen, table: pd.DataFrame) -> RewardValues:
    return {
        "scorer": chosen.directory,
        "mean": _number(table["reward"].mean()),
        "missing": int(table["reward"].isna().sum()),
        "components": {name: _number(table[name].mean()) for name in chosen.components},
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
