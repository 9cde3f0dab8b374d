"""A run directory: its paths, its configuration and its plans."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shards.errors import UserError
from shards.files import publish_new, read_json, sha256_file, to_json
from shards.store import mirror
from shards.store.urls import shown, url_of, working_copy

if TYPE_CHECKING:
    from shards.config import RunConfig

SCHEMA = 1  # of plan, manifest, member and index; README.md has its history
GROUP_KEY = re.compile(r"i(\d{6})-p(\d{6})")
SAMPLE_KEY = re.compile(r"i(\d{6})-p(\d{6})-s(\d{2,3})")
EXPERT_NAMES = ("high_noise", "low_noise")  # by number; a model with one expert has the first
AVERAGE = "ema"  # folder of the averaged weights, in that of the policy
COMMIT = "commit.json"  # written last of a checkpoint, which docs/checkpoints.md describes

PLAN_NEEDS = {"shards": list, "groups": list, "group_size": int}  # what this package itself reads of a plan

Kind = Literal["rollout", "eval"]


def group_key(iteration: int, prompt_id: int) -> str:
    """Key of all samples of one prompt in one iteration: `i000003-p000017`."""
    return f"i{iteration:06d}-p{prompt_id:06d}"


def sample_key(group: str, sample: int) -> str:
    """Key of one sample of a group: `i000003-p000017-s05`."""
    return f"{group}-s{sample:02d}"


def group_of(key: str) -> str:
    """The group of a sample: its key without the sample number."""
    return key.rpartition("-s")[0]


def sample_of(key: str) -> int:
    """The number of a sample in its group."""
    return int(key.rpartition("-s")[2])


class Run:
    """One run directory. Making the object touches no disk; `open` and `create` do.

    A run at a URL (s3://bucket/runs/first) has a working copy in the local cache, and `path` is that.
    """

    def __init__(self, path: str | Path, sets: Sequence[str] = ()) -> None:
        self.path = working_copy(path)
        self.sets = tuple(sets)
        self.is_new = False  # whether `create` wrote its run.toml

    @classmethod
    def open(cls, path: str | Path, sets: Sequence[str] = ()) -> Run:
        """A run that exists, with `section.key=value` settings laid over its run.toml for this call alone.

        Raises UserError when `path` is not a run directory. A run at a URL is brought up to date here.
        """
        run = cls(path, sets)
        mirror.pull(run.path)
        if not run.config_path.is_file():
            above = next((folder for folder in run.path.parents if (folder / "run.toml").is_file()), None)
            make = f"`rushes init {shown(str(run.path))} --preset words` makes one"
            raise UserError(
                f"{shown(str(run.path))} is not a run: it has no run.toml", f"the run is {above}" if above else make
            )
        return run

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> Run:
        """A run with `config` as its run.toml. Raises UserError when there is one already that says something else."""
        from shards.run_toml import dump_config

        run = cls(path)
        try:
            in_the_way = next((one for one in (run.path, *run.path.parents) if one.is_file()), None)
        except OSError as error:  # a name that is too long, or a folder that we may not look into
            raise UserError(f"{run.path}: {error.strerror}", "choose another folder") from None
        if in_the_way:
            raise UserError(f"{in_the_way} is a file", "choose another folder")
        if url_of(run.path):
            mirror.agree(run.config_path)  # else a run that was deleted in the store would still be there for us
        run.is_new = publish_new(run.config_path, dump_config(config).encode())
        if not run.is_new and run.config != config:
            names = ", ".join(differences(config.model_dump(), run.config.model_dump())[:8])
            raise UserError(
                f"{run.config_path} exists already, with another {names}", "choose another folder, or edit that file"
            )
        return run

    @property
    def config_path(self) -> Path:
        """run.toml, the whole configuration."""
        return self.path / "run.toml"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration in run.toml. Raises UserError for a wrong one."""
        from shards.run_toml import load_config

        return load_config(self.config_path, self.sets)

    def iteration(self, number: int) -> Stage:
        """The stage directory `iter-0003`."""
        return Stage(self.path, f"iter-{number:04d}", number, "rollout")

    def evaluation(self, number: int) -> Stage:
        """The stage directory `eval/iter-0003`: an evaluation of the policy that iteration 3 rolls out with."""
        return Stage(self.path, f"eval/iter-{number:04d}", number, "eval")

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have a directory, ascending."""
        return _numbers(self.path, r"iter-(\d{4,})")

    def next_iteration(self) -> int:
        """The first iteration that is not trained."""
        number = 0
        while self.iteration(number).trained():
            number += 1
        return number

    def way_to_policy(self, iteration: int) -> str:
        """For hints: the command that trains an iteration, or where its rollouts are missing, all up to it."""
        if self.iteration(iteration).is_complete():
            return f"rushes train {self.path} --iteration {iteration}"
        return f"rushes loop {self.path} --iterations {iteration + 1}"

    def evaluations(self) -> list[int]:
        """Numbers of the evaluations that have a directory, ascending."""
        return _numbers(self.path / "eval", r"iter-(\d{4,})")


@dataclass(frozen=True)
class Stage:
    """One directory of shards: an iteration or an evaluation of a run."""

    run_path: Path
    name: str  # relative to the run: iter-0003 or eval/iter-0003
    iteration: int
    kind: Kind

    @property
    def path(self) -> Path:
        """The stage directory."""
        return self.run_path / self.name

    @property
    def plan_path(self) -> Path:
        """plan.json: what is to be sampled, written once before the first sample."""
        return self.path / "plan.json"

    @property
    def policy_dir(self) -> Path:
        """Where training puts the next policy."""
        return self.path / "policy"

    @property
    def train_dir(self) -> Path:
        """Where training freezes its input."""
        return self.path / "train"

    def trained(self) -> bool:
        """Whether training of this iteration has ended, which policy/policy.json decides."""
        return mirror.look(self.policy_dir / "policy.json")

    def fetched_policy(self) -> Path:
        """policy_dir; the weights of a run at a URL are on this machine then. What training keeps for itself is not."""
        mirror.fetch(self.policy_dir, lambda name: not mirror.ASIDE.search(name))
        return self.policy_dir

    def shard_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / "rollout" / f"shard-{shard:06d}.tar"

    def index_path(self, shard: int) -> Path:
        """The Parquet index of a shard, one row per sample."""
        return self.path / "rollout" / "index" / f"shard-{shard:06d}.parquet"

    def manifest_path(self, shard: int) -> Path:
        """The commit record of a shard: the shard exists if and only if this file does."""
        return self.path / "rollout" / "manifest" / f"shard-{shard:06d}.json"

    def work_path(self, shard: int) -> Path:
        """The spool of a shard: finished samples that wait for the rest."""
        return self.path / "work" / f"shard-{shard:06d}"

    def score_path(self, scorer: str, shard: int) -> Path:
        """The scores of one scorer for one shard; `scorer` is its directory name, like ocr-1a2b3c4d."""
        return self.path / "score" / scorer / f"shard-{shard:06d}.parquet"

    def advantage_dir(self, specification: str) -> Path:
        """The advantages of one specification (8 hexadecimal digits)."""
        return self.path / "advantage" / specification

    def summary_path(self, specification: str) -> Path:
        """Counts and means of one specification. Readers of a whole folder of tables skip names with a `_` first."""
        return self.advantage_dir(specification) / "_summary.json"

    def advantage_path(self, specification: str, shard: int) -> Path:
        """The advantages of one specification for one shard."""
        return self.advantage_dir(specification) / f"shard-{shard:06d}.parquet"

    def plan(self) -> dict[str, Any] | None:
        """The plan on disk, or None before there is one. Raises UserError when it is damaged or of another version.

        All callers share one object as long as the file stays the same, so nobody may change what it holds.
        """
        stamp = _stamp(self.plan_path) if mirror.look(self.plan_path) else None
        return _read_plan(self.plan_path, stamp) if stamp else None

    def plan_sha256(self) -> str:
        """sha256 of plan.json, which every sample and manifest carries."""
        return sha256_file(self.plan_path)

    def publish_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Write the plan unless there is one; returns what is on disk. Raises UserError when that differs from ours."""
        data = to_json(plan, self.plan_path)
        publish_new(self.plan_path, data)
        found = self.plan()
        assert found is not None
        differing = differences(json.loads(data), found)
        if differing:
            raise UserError(
                f"{self.plan_path} was made with other settings: {', '.join(differing[:8])}",
                "restore them in run.toml, or start a new run: samples of two plans cannot be mixed",
            )
        return found

    def shards(self) -> list[int]:
        """Numbers of the committed shards, ascending; for a run at a URL those of all machines."""
        mirror.refresh(self.path / "rollout")
        return _numbers(self.path / "rollout" / "manifest", r"shard-(\d{6})\.json")

    def is_committed(self, shard: int) -> bool:
        """Whether the shard exists, which its manifest decides."""
        path = self.manifest_path(shard)
        if not path.exists():
            mirror.refresh(self.path / "rollout")
        return path.exists()

    def is_complete(self) -> bool:
        """Whether there is a plan and every shard it asks for exists."""
        plan = self.plan()
        return plan is not None and len(self.shards()) == len(plan["shards"])

    def expected(self) -> int:
        """Number of shards the plan asks for; 0 before there is a plan."""
        plan = self.plan()
        return len(plan["shards"]) if plan else 0

    def groups(self, shard: int) -> list[str]:
        """Group keys of a shard in the order of the plan. Raises UserError when the plan has no such shard."""
        plan = self.plan()
        if plan is None:
            raise UserError(f"{self.plan_path} does not exist", "`rushes rollout` writes the plan first")
        if not 0 <= shard < len(plan["shards"]):
            raise UserError(f"{self.plan_path} has no shard {shard}", f"its shards are 0 to {len(plan['shards']) - 1}")
        return list(plan["shards"][shard])

    def keys(self, shard: int) -> list[str]:
        """Sample keys of a shard in the order of the plan."""
        groups, plan = self.groups(shard), self.plan()
        assert plan is not None
        return [sample_key(group, sample) for group in groups for sample in range(plan["group_size"])]


@lru_cache(maxsize=16)
def _read_plan(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    """A plan, parsed and checked once for each state of its file, which `stamp` tells apart."""
    plan = read_json(path)
    if plan.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {plan.get('schema')!r}; this version reads {SCHEMA}",
            "use the version of rushes that wrote it",
        )
    for name, kind in PLAN_NEEDS.items():
        if not isinstance(plan.get(name), kind):
            raise UserError(f"{path} is damaged: it has no {name}", "restore it from a copy")
    return plan


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file does; None when there is none. The time is that of its last change of any kind,
    which nobody can set."""
    with suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_ctime_ns, found.st_size
    return None


def _numbers(directory: Path, pattern: str) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (re.fullmatch(pattern, entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Dotted names of the values that differ between two JSON values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        parts = (differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [difference for part in parts for difference in part]
    return [] if ours == theirs else [name]
