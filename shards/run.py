"""A run directory: its paths, its configuration and its plans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.files import Files, LocalFiles, sha256_file, stamp_of, to_json
from shards.plan import LARGEST, Kind, RolloutPlan
from shards.records.opening import read_plain
from shards.store.files import files_at, of_policy
from shards.store.urls import in_shell, shown

if TYPE_CHECKING:
    from shards.config import RunConfig
    from shards.run_toml import Setting

EXPERT_NAMES = ("high_noise", "low_noise")  # by number; a model with one expert has the first
AVERAGE = "ema"  # folder of the averaged weights, in that of the policy
POLICY_RECORD = "policy.json"  # in the folder of a policy, written last: it commits the weights
METRICS = "metrics.jsonl"  # one line an update, in the folder of a policy
COMMIT = "commit.json"  # written last of a checkpoint, which docs/checkpoints.md describes


class Run:
    """One run directory. Making the object touches no disk; `open` and `create` do.

    A run at a URL (s3://bucket/runs/first) has a working copy in the local cache, and `path` is that. `files`, chosen
    here once and handed down to its stages, is how its files are looked at and published; a test may give its own.
    """

    def __init__(self, path: str | Path, sets: Sequence[Setting] = (), files: Files | None = None) -> None:
        chosen, self.path = files_at(path)
        self.files = files or chosen
        self.sets = tuple(sets)
        self.is_new = False  # whether `create` wrote its run.toml

    @classmethod
    def open(cls, path: str | Path, sets: Sequence[Setting] = (), files: Files | None = None) -> Run:
        """A run that exists, with `section.key=value` settings laid over its run.toml for this call alone.

        Raises UserError when `path` is not a run directory. A run at a URL is brought up to date here.
        """
        run = cls(path, sets, files)
        run.files.pull(run.path)
        if not run.config_path.is_file():
            above = next((folder for folder in run.path.parents if (folder / "run.toml").is_file()), None)
            make = f"`rushes init {in_shell(run.path)} --preset words` makes one"
            raise UserError(
                f"{shown(str(run.path))} is not a run: it has no run.toml", f"the run is {above}" if above else make
            )
        return run

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, files: Files | None = None) -> Run:
        """A run with `config` as its run.toml. Raises UserError when there is one already that says something else."""
        from shards.run_toml import dump_config

        run = cls(path, files=files)
        try:
            in_the_way = next((one for one in (run.path, *run.path.parents) if one.is_file()), None)
        except OSError as error:  # a name that is too long, or a folder that we may not look into
            raise UserError(f"{run.path}: {error.strerror}", "choose another folder") from None
        if in_the_way:
            raise UserError(f"{in_the_way} is a file", "choose another folder")
        run.files.agree(run.config_path)  # else a run that was deleted in the store would still be there for us
        run.is_new = run.files.publish_new(run.config_path, dump_config(config).encode())
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

    @property
    def model_path(self) -> Path:
        """model.json: the base model that the run began with."""
        return self.path / "model.json"

    @property
    def report_dir(self) -> Path:
        """What `rushes report` writes."""
        return self.path / "report"

    @property
    def report_path(self) -> Path:
        """The page of the report."""
        return self.report_dir / "index.html"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration in run.toml. Raises UserError for a wrong one."""
        from shards.run_toml import load_config

        return load_config(self.config_path, self.sets)

    def iteration(self, number: int) -> Stage:
        """The stage directory `iter-0003`."""
        return Stage(self.path, f"iter-{number:04d}", number, "rollout", self.files)

    def evaluation(self, number: int) -> Stage:
        """The stage directory `eval/iter-0003`: an evaluation of the policy that iteration 3 rolls out with."""
        return Stage(self.path, f"eval/iter-{number:04d}", number, "eval", self.files)

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
            return f"rushes train {in_shell(self.path)} --iteration {iteration}"
        return f"rushes loop {in_shell(self.path)} --iterations {iteration + 1}"

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
    files: Files = field(default_factory=LocalFiles, repr=False, compare=False)
    """Those of the run."""
    _read: dict[tuple[int, ...], RolloutPlan] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The plan that was read last, by what its file was then."""

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
    def policy_record_path(self) -> Path:
        """policy/policy.json: the next policy exists if and only if this file does."""
        return self.policy_dir / POLICY_RECORD

    @property
    def metrics_path(self) -> Path:
        """policy/metrics.jsonl: one line an update."""
        return self.policy_dir / METRICS

    def trainer_dir(self, expert: str) -> Path:
        """The trainer checkpoints of an expert."""
        return trainer_dir(self.policy_dir, expert)

    def expert_metrics_path(self, expert: str) -> Path:
        """The lines of an expert that a process trains by itself, until they join those of the other one."""
        return self.policy_dir / f"metrics.{expert}.jsonl"

    def expert_record_path(self, expert: str) -> Path:
        """Says that an expert is trained and its weights are whole, until policy/policy.json says it of both."""
        return self.policy_dir / f"{expert}.json"

    @property
    def train_dir(self) -> Path:
        """Where training freezes its input."""
        return self.path / "train"

    @property
    def train_plan_path(self) -> Path:
        """train/plan.json: what training froze as its input."""
        return self.train_dir / "plan.json"

    @property
    def rollout_dir(self) -> Path:
        """The shards, their indices and their manifests."""
        return self.path / "rollout"

    def trained(self) -> bool:
        """Whether training of this iteration has ended, which policy/policy.json decides."""
        return self.files.look(self.policy_record_path)

    def fetched_policy(self) -> Path:
        """policy_dir; the weights of a run at a URL are on this machine then. What training keeps for itself is not."""
        self.files.fetch(self.policy_dir, of_policy)
        return self.policy_dir

    def shard_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.rollout_dir / f"shard-{shard:06d}.tar"

    def index_path(self, shard: int) -> Path:
        """The Parquet index of a shard, one row per sample."""
        return self.rollout_dir / "index" / f"shard-{shard:06d}.parquet"

    def manifest_path(self, shard: int) -> Path:
        """The commit record of a shard: the shard exists if and only if this file does."""
        return self.rollout_dir / "manifest" / f"shard-{shard:06d}.json"

    def work_path(self, shard: int) -> Path:
        """The spool of a shard: finished samples that wait for the rest."""
        return self.path / "work" / f"shard-{shard:06d}"

    @property
    def scores_dir(self) -> Path:
        """The scores, a folder for each scorer."""
        return self.path / "score"

    def score_path(self, scorer: str, shard: int) -> Path:
        """The scores of one scorer for one shard; `scorer` is its directory name, like ocr-1a2b3c4d."""
        return self.scores_dir / scorer / f"shard-{shard:06d}.parquet"

    @property
    def advantages_dir(self) -> Path:
        """The advantages, a folder for each specification."""
        return self.path / "advantage"

    def advantage_dir(self, specification: str) -> Path:
        """The advantages of one specification (8 hexadecimal digits)."""
        return self.advantages_dir / specification

    def summary_path(self, specification: str) -> Path:
        """Counts and means of one specification. Readers of a whole folder of tables skip names with a `_` first."""
        return self.advantage_dir(specification) / "_summary.json"

    def advantage_path(self, specification: str, shard: int) -> Path:
        """The advantages of one specification for one shard."""
        return self.advantage_dir(specification) / f"shard-{shard:06d}.parquet"

    def plan(self) -> RolloutPlan | None:
        """The plan on disk, or None before there is one. Raises UserError when it is damaged or of another version.

        It is parsed again only when the file is another one than the last time.
        """
        stamp = stamp_of(self.plan_path) if self.files.look(self.plan_path) else None
        if stamp is None:
            return None
        found = self._read.get(stamp)
        if found is None:
            found = _read_plan(self.plan_path)
            self._read.clear()
            self._read[stamp] = found
        return found

    def plan_sha256(self) -> str:
        """sha256 of plan.json, which every sample and manifest carries."""
        return sha256_file(self.plan_path)

    def publish_plan(self, plan: RolloutPlan) -> RolloutPlan:
        """Write the plan unless there is one; returns what is on disk. Raises UserError when that differs from ours."""
        self.files.publish_new(self.plan_path, to_json(plan.to_dict(), self.plan_path))
        found = self.plan()
        assert found is not None
        differing = differences(plan.to_dict(), found.to_dict())
        if differing:
            raise UserError(
                f"{self.plan_path} was made with other settings: {', '.join(differing[:8])}",
                "restore them in run.toml, or start a new run: samples of two plans cannot be mixed",
            )
        return found

    def shards(self) -> list[int]:
        """Numbers of the committed shards, ascending; for a run at a URL those of all machines."""
        self.files.refresh(self.rollout_dir)
        return _numbers(self.rollout_dir / "manifest", r"shard-(\d{6})\.json")

    def is_committed(self, shard: int) -> bool:
        """Whether the shard exists, which its manifest decides."""
        path = self.manifest_path(shard)
        if not path.exists():
            self.files.refresh(self.rollout_dir)
        return path.exists()

    def is_complete(self) -> bool:
        """Whether there is a plan and every shard it asks for exists."""
        plan = self.plan()
        return plan is not None and len(self.shards()) == len(plan.shards)

    def expected(self) -> int:
        """Number of shards the plan asks for; 0 before there is a plan."""
        plan = self.plan()
        return len(plan.shards) if plan else 0

    def groups(self, shard: int) -> list[str]:
        """Group keys of a shard in the order of the plan. Raises UserError when the plan has no such shard."""
        return list(self._plan_with(shard).shards[shard])

    def keys(self, shard: int) -> list[str]:
        """Sample keys of a shard in the order of the plan. Raises as `groups`."""
        return self._plan_with(shard).keys(shard)

    def _plan_with(self, shard: int) -> RolloutPlan:
        plan = self.plan()
        if plan is None:
            raise UserError(f"{self.plan_path} does not exist", "`rushes rollout` writes the plan first")
        if not 0 <= shard < len(plan.shards):
            raise UserError(f"{self.plan_path} has no shard {shard}", f"its shards are 0 to {len(plan.shards) - 1}")
        return plan


def trainer_dir(policy_dir: Path, expert: str) -> Path:
    """The trainer checkpoints of an expert in the folder of a policy."""
    return policy_dir / "trainer" / expert


def _read_plan(path: Path) -> RolloutPlan:
    try:
        data = read_plain(path, LARGEST)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "restore it from a copy") from error
    return RolloutPlan.from_json(data, path)


def _numbers(directory: Path, pattern: str) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (re.fullmatch(pattern, entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def differences(ours: object, theirs: object, name: str = "") -> list[str]:
    """Dotted names of the values that differ between two JSON values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        parts = (differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [difference for part in parts for difference in part]
    return [] if ours == theirs else [name]
