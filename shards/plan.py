"""plan.json as records: all that is decided before the first sample of a stage, checked whenever it is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Literal

from shards.errors import UserError
from shards.records.reading import first_fault, reader, short
from shards.records.schedule import STRICT, Schedule
from shards.records.strict_json import parse_object

LARGEST = 64 * 2**20  # bytes of plan.json that are read: a hundred thousand groups
SCHEMA: Literal[1] = 1  # of plan, manifest, member and index; README.md has its history
GROUP_KEY = re.compile(r"i(\d{6})-p(\d{6})")
SAMPLE_KEY = re.compile(r"i(\d{6})-p(\d{6})-s(\d{2,3})")

Kind = Literal["rollout", "eval"]
Dtype = Literal["float32", "bfloat16", "float16"]
Compile = Literal[False, "blocks"]
Adapters = Literal["float32", "model", "merged"]
VideoPreset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]

_IN_FILE = {"schedule": "sampler"}  # names of fields in plan.json, where they are others
_COPY = "restore it from a copy"


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


def spans(group_size: int, batch_size: int) -> list[tuple[int, int]]:
    """(first sample, number of samples) of each forward batch of a group; the last one may be smaller."""
    return [(first, min(batch_size, group_size - first)) for first in range(0, group_size, batch_size)]


@dataclass(frozen=True)
class PolicyIdentity:
    """The policy that samples."""

    __pydantic_config__ = STRICT

    fingerprint: str
    """Of the base model and the weights laid over it."""
    base: str
    """Of the base model alone."""
    adapters: dict[str, str]
    """sha256 of each file of weights, by its path in the folder of the policy."""
    lag_of: int
    """The iteration that the plan was made for."""


@dataclass(frozen=True)
class VideoShape:
    """The videos of a stage as they are sampled and encoded."""

    __pydantic_config__ = STRICT

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    frames: int
    fps: int
    """Frames per second written into the video."""
    crf: int
    """H.264 quality, 0 to 51."""
    preset: VideoPreset = "medium"
    """Of x264. A plan has it only where it is another one."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and frames."""
        return self.height, self.width, self.frames


@dataclass(frozen=True)
class Group:
    """The videos of one prompt."""

    __pydantic_config__ = STRICT

    key: str
    """i000003-p000017"""
    prompt_id: int
    prompt: str
    target: str | None
    """What a reward looks for."""
    image: str | None
    """The file of the first frame."""
    window: tuple[int, ...]
    """The stochastic steps, rising; empty for a rollout without noise."""
    negative_prompt: str | None = None
    """The prompt's own; None where that of the plan is taken."""


@dataclass(frozen=True)
class Chunk:
    """Neighbours in a shard, one batch of the model. Training runs the same chunks in the same shape.

    Those of a rollout are samples of one group; those of an evaluation reach over groups.
    """

    members: tuple[tuple[str, int], ...]
    """(group, number of the sample in it)"""

    @property
    def keys(self) -> list[str]:
        """Sample keys, in the order of the batch."""
        return [sample_key(group, sample) for group, sample in self.members]

    @property
    def count(self) -> int:
        """The size of the batch."""
        return len(self.members)

    @property
    def group(self) -> str:
        """The group, of the first sample where there are several."""
        return self.members[0][0]

    @property
    def samples(self) -> tuple[int, ...]:
        """Sample numbers within their groups."""
        return tuple(sample for _, sample in self.members)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(group, number of its samples), in the order of the batch."""
        return list(Counter(group for group, _ in self.members).items())


@dataclass(frozen=True)
class Arithmetic:
    """How networks are called, as far as it changes the last bits: the same in rollout and training.

    A plan has only what differs from these values, which are those of all plans from before there was a choice.
    """

    __pydantic_config__ = STRICT

    attention: str = "auto"
    """A backend of diffusers, or the one that PyTorch chooses."""
    compile: Compile = False
    """What torch.compile takes: nothing, or the blocks of the transformer."""
    batch_guidance: bool = False
    """Both forwards of guidance in one batch."""
    decode_batch: int = 1
    """Videos that the VAE decodes at once."""
    adapters: Adapters = "float32"
    """The dtype of products with LoRA: its own, or that of the model, to which its fp32 weights are then rounded; or
    LoRA is added to the weights of an fp32 model at every forward."""


@dataclass(frozen=True)
class RolloutPlan:
    """All that is decided of a stage before its first sample: the content of plan.json, described in README.md."""

    __pydantic_config__ = {**STRICT, "alias_generator": lambda name: _IN_FILE.get(name, name)}  # noqa: RUF012

    schema: Literal[1]
    kind: Kind
    iteration: int
    seed: int
    """Of the run, or of the evaluation."""
    policy: PolicyIdentity
    schedule: Schedule
    video: VideoShape
    storage_dtype: Dtype
    """Of stored latents."""
    group_size: int
    """Videos of one prompt."""
    batch_size: int
    """Videos in one forward pass."""
    negative_prompt: str
    groups: tuple[Group, ...]
    shards: tuple[tuple[str, ...], ...]
    """The group keys that each shard holds, in their order."""
    same_initial_noise: bool
    arithmetic: Arithmetic = Arithmetic()
    batch_across_groups: bool = False
    """Whether a batch holds samples of several groups, as in an evaluation. A plan has it only where it does."""

    @classmethod
    def from_json(cls, data: bytes, where: object) -> RolloutPlan:
        """The plan in a file, whose path errors name.

        Raises UserError for another schema, for a field that is missing, unknown or of another type, and for values
        that do not fit together.
        """
        from pydantic import ValidationError

        try:
            plan = reader(cls).validate_json(data)
            parse_object(data, most=LARGEST)  # a name that is given twice; fields of other types are reported above
        except ValidationError as error:
            raise first_fault(error, where) from error
        except UserError as error:  # of the schedule, which knows no file
            raise UserError(f"{where}: {error.problem}", error.hint) from error
        except ValueError as error:
            raise UserError(f"{where} is damaged: {error}", _COPY) from error
        for problem in _contradictions(plan):
            raise UserError(f"{where}: {problem}", _COPY)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds. A prompt's own negative prompt is written down only where there is one, and of the
        arithmetic and of x264's preset what is not as it was before there was a choice."""
        found, before = asdict(self), asdict(Arithmetic())
        arithmetic = {name: value for name, value in found.pop("arithmetic").items() if value != before[name]}
        if arithmetic:
            found["arithmetic"] = arithmetic
        if self.video.preset == VideoShape.preset:
            del found["video"]["preset"]
        found["sampler"] = found.pop("schedule")
        if not self.batch_across_groups:
            del found["batch_across_groups"]
        for group in found["groups"]:
            if group["negative_prompt"] is None:
                del group["negative_prompt"]
        return found

    @cached_property
    def by_key(self) -> dict[str, Group]:
        """The groups by their keys."""
        return {group.key: group for group in self.groups}

    @property
    def samples(self) -> int:
        """Videos of the whole stage."""
        return len(self.groups) * self.group_size

    @property
    def shard_sizes(self) -> dict[int, int]:
        """Number of samples of each shard."""
        return {shard: len(groups) * self.group_size for shard, groups in enumerate(self.shards)}

    def keys(self, shard: int) -> list[str]:
        """Sample keys of a shard, in order."""
        return [sample_key(group, sample) for group in self.shards[shard] for sample in range(self.group_size)]

    def chunks(self, groups: Iterable[str]) -> list[Chunk]:
        """The chunks of groups, in order: of each by itself, or, with `batch_across_groups`, of those of a whole shard.

        Groups with an image and without one are never in the same chunk: only a whole batch can have conditions.
        """
        runs = [[group] for group in groups]
        if self.batch_across_groups:
            runs = [list(run) for _, run in groupby(groups, lambda group: self.by_key[group].image is None)]
        found = []
        for run in runs:
            samples = tuple((group, sample) for group in run for sample in range(self.group_size))
            cut = spans(len(samples), self.batch_size)
            found += [Chunk(samples[first : first + count]) for first, count in cut]
        return found

    def place(self, group: str, sample: int) -> tuple[int, int]:
        """Where a sample stands in what chunks are cut from, its group or its shard, and how many samples that has."""
        if not self.batch_across_groups:
            return sample, self.group_size
        before, groups = self._places[group]
        return before * self.group_size + sample, groups * self.group_size

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each group stands in its shard, and how many groups that has."""
        return {group: (number, len(shard)) for shard in self.shards for number, group in enumerate(shard)}

    def negative_of(self, group: str) -> str:
        """The negative prompt of a group: its own, or that of the plan."""
        own = self.by_key[group].negative_prompt
        return self.negative_prompt if own is None else own


def _contradictions(plan: RolloutPlan) -> Iterable[str]:
    """Values that cannot be in a plan whose fields are all there, and those that do not fit together."""
    for field, (value, least, most) in _ranges(plan).items():
        if not least <= value <= most:
            yield f"{field} is {value}, not from {least} to {most}"
    for field in ("fingerprint", "base"):
        if not re.fullmatch("[0-9a-f]{64}", getattr(plan.policy, field)):
            yield f"policy.{field} is {short(getattr(plan.policy, field))}, not a sha256"
    promised = [group for shard in plan.shards for group in shard]
    if len(set(promised)) != len(promised) or sorted(promised) != sorted(group.key for group in plan.groups):
        yield "its shards do not hold each of its groups once"
    if plan.kind == "rollout" and plan.batch_across_groups:
        yield "batch_across_groups is true, but it is a rollout, whose batches are those of training"
    for number, group in enumerate(plan.groups):
        if not GROUP_KEY.fullmatch(group.key) or group.key != group_key(plan.iteration, group.prompt_id):
            yield f"groups.{number}.key is {group.key!r}, but its prompt_id is {group.prompt_id}"
        rising = all(one < other for one, other in pairwise((-1, *group.window, plan.schedule.steps - 1)))
        if group.window and not rising:
            yield f"groups.{number}.window is {list(group.window)}, but the sampler has {plan.schedule.steps} steps"


def _ranges(plan: RolloutPlan) -> dict[str, tuple[int, int, int]]:
    """Value, least and most of the numbers in a plan that have limits of their own."""
    video, most = plan.video, 2**31 - 1
    found = {"iteration": (plan.iteration, 0, most), "seed": (plan.seed, 0, 2**63 - 1)}
    found |= {name: (getattr(plan, name), 1, most) for name in ("group_size", "batch_size")}
    found |= {f"video.{name}": (getattr(video, name), 1, most) for name in ("height", "width", "frames", "fps")}
    found["arithmetic.decode_batch"] = (plan.arithmetic.decode_batch, 1, most)
    return found | {"video.crf": (video.crf, 0, 51)}
