"""The records of a run but its plans: manifest, policy, frozen inputs of training, checkpoint, summary, model, claims.

README.md says what each field means. A field with a default is one that older versions did not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, cast

from annotated_types import Ge, Le, Predicate

from shards.errors import ANEW, REPAIR
from shards.plan import Kind, PolicyIdentity
from shards.records.opening import COPY, inside
from shards.records.reading import CHECKSUM, read_record

if TYPE_CHECKING:
    from pydantic import ConfigDict

_STRICT: ConfigDict = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
_HEX = re.compile("[0-9a-f]{64}")


def a_sha256(text: str) -> bool:
    """Whether a text is a hexadecimal sha256."""
    return _HEX.fullmatch(text) is not None


def a_shard(text: str) -> bool:
    """Whether a text is the number of a shard."""
    return re.fullmatch(r"0|[1-9]\d{0,5}", text) is not None


def a_name_in_this_folder(text: str) -> bool:
    """Whether a name stays in the folder of the record."""
    return inside(text)


# read by pydantic, whose error says which of the predicates does not hold
Sha256 = Annotated[str, Predicate(a_sha256)]
Inside = Annotated[str, Predicate(a_name_in_this_folder)]
Count = Annotated[int, Ge(0), Le(2**53)]
Hashes = dict[Inside, Sha256]
"""sha256 of files, by their path in a folder."""


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a file of a shard."""

    __pydantic_config__ = _STRICT

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """The commit record of a shard."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    stage: str
    kind: Kind
    iteration: Count
    shard: Count
    samples: Count
    groups: tuple[str, ...]
    group_size: Count
    keys_sha256: Sha256
    tar: FileFacts
    index: FileFacts
    plan_sha256: Sha256
    policy: PolicyIdentity
    info: dict[str, object] = field(default_factory=dict)
    content_sha256: str | None = None

    @property
    def version(self) -> str:
        """The version of rushes that made the shard; empty where it is not told."""
        versions = self.info.get("versions")
        found = versions.get("rushes") if isinstance(versions, dict) else None
        return found if isinstance(found, str) else ""


@dataclass(frozen=True)
class AverageRecord:
    """The averaged weights beside those of a policy."""

    __pydantic_config__ = _STRICT

    fingerprint: Sha256
    adapters: Hashes
    base: Sha256 | None = None


@dataclass(frozen=True)
class PolicyRecord:
    """policy.json, the commit record of a trained policy."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    iteration: Count
    fingerprint: Sha256
    base: Sha256
    adapters: Hashes
    average: AverageRecord | None = None
    content_sha256: str | None = None


@dataclass(frozen=True)
class ExpertRecord:
    """policy/high_noise.json, the commit record of an expert that a process trained by itself."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    iteration: Count
    expert: str
    train_plan: Sha256
    """Of train/plan.json."""
    adapters: Hashes
    average: Hashes
    unmoved: list[str]
    replay: float | None
    content_sha256: str | None = None


@dataclass(frozen=True)
class TrainPlan:
    """train/plan.json, what an iteration is trained on."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    iteration: Count
    plan_sha256: Sha256
    policy: Sha256
    shards: dict[Annotated[str, Predicate(a_shard)], Sha256]
    """sha256 of the tar, by the number of its shard."""
    advantage: str
    order_seed: Annotated[int, Ge(0), Le(2**63 - 1)]
    train: dict[str, object]
    content_sha256: str | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """commit.json, the commit record of a checkpoint of the trainer."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    update: Count
    ranks: Annotated[int, Ge(1), Le(2**20)]
    files: dict[Inside, Count]
    """Bytes of each file."""
    tensors: dict[str, tuple[Count, ...]]
    """Shape of each tensor."""
    sha256: Hashes = field(default_factory=dict)
    content_sha256: str | None = None


@dataclass(frozen=True)
class RewardSummary:
    """One reward of a stage."""

    __pydantic_config__ = _STRICT

    scorer: str
    mean: float | None
    missing: Count
    components: dict[str, float | None]


class RewardValues(TypedDict):
    """A `RewardSummary` as plain values."""

    scorer: str
    mean: float | None
    missing: int
    components: dict[str, float | None]


class SummaryValues(TypedDict):
    """A `Summary` as plain values, without its checksum."""

    schema: int
    specification: dict[str, object]
    samples: int
    mean_reward: float | None
    std_reward: float | None
    groups: int
    used_groups: int
    missing: int
    dropped_no_spread: int
    missing_reasons: dict[str, int]
    not_chosen: int
    mean_group_std: float | None
    exact_share: float | None
    rewards: dict[str, RewardValues]
    guards: dict[str, float | None] | None


@dataclass(frozen=True)
class Summary:
    """_summary.json: the advantages of a stage in numbers."""

    __pydantic_config__ = _STRICT

    specification: dict[str, Any]
    samples: Count
    mean_reward: float | None
    schema: Literal[1] = 1
    std_reward: float | None = None
    groups: Count = 0
    used_groups: Count = 0
    missing: Count = 0
    dropped_no_spread: Count = 0
    missing_reasons: dict[str, Count] = field(default_factory=dict)
    not_chosen: Count = 0
    mean_group_std: float | None = None
    exact_share: float | None = None
    rewards: dict[str, RewardSummary] = field(default_factory=dict)
    guards: dict[str, float | None] | None = None
    content_sha256: str | None = None

    def to_dict(self) -> SummaryValues:
        """What `score` wrote, without the checksum."""
        return cast(SummaryValues, {name: value for name, value in asdict(self).items() if name != CHECKSUM})

    @property
    def weights(self) -> Mapping[str, object]:
        """The weights of the rewards, by name."""
        found = self.specification.get("weights")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class ModelRecord:
    """model.json, the base model that a run began with."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    base: Sha256
    path: str
    model: Sha256 | None = None
    """Of the model folder alone, where a LoRA is merged into it."""
    base_lora: dict[str, object] | None = None
    content_sha256: str | None = None


def read_manifest_file(path: Path) -> Manifest:
    """The manifest in a file. Raises UserError when there is none, and Damaged, as all readers here."""
    return read_record(Manifest, path, REPAIR)


def read_policy(path: Path) -> PolicyRecord:
    """policy.json of a trained policy."""
    return read_record(PolicyRecord, path, ANEW)


def read_expert(path: Path) -> ExpertRecord:
    """policy/high_noise.json or policy/low_noise.json of a training that two processes share."""
    return read_record(ExpertRecord, path, ANEW)


def read_train_plan(path: Path) -> TrainPlan:
    """train/plan.json of an iteration."""
    return read_record(TrainPlan, path, ANEW)


def read_checkpoint(path: Path, hint: str = COPY) -> CheckpointRecord:
    """commit.json of a checkpoint."""
    return read_record(CheckpointRecord, path, hint)


def read_summary(path: Path) -> Summary:
    """_summary.json of a specification of advantages."""
    return read_record(Summary, path, "delete it; `rushes score` writes it again")


def read_model_record(path: Path) -> ModelRecord:
    """model.json of a run."""
    return read_record(ModelRecord, path, root=path.parent)
