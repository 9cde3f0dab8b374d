"""The record of a sample, and whether it says what its key, its plan and its trajectory say."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired, TypedDict

from annotated_types import Ge, Le

from shards.plan import GROUP_KEY, SAMPLE_KEY, RolloutPlan, group_of, sample_of
from shards.records.reading import first_fault, reader, short

if TYPE_CHECKING:
    from pydantic import ConfigDict

_STRICT: ConfigDict = {"strict": True, "extra": "ignore", "allow_inf_nan": False}  # fields may be added
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
Number = Annotated[int, Ge(0), Le(999_999)]


@dataclass(frozen=True)
class SampleRecord:
    """The JSON member of a sample; README.md says what each field means."""

    __pydantic_config__ = _STRICT

    schema: Literal[1]
    key: str
    group: str
    text: str
    iteration: Number
    prompt_id: Number
    sample: Number
    prompt: str
    chunk: tuple[Number, Size]
    seed: Seed
    noise_seeds: dict[str, Seed]
    policy: str
    plan_sha256: str
    law: str
    form: str
    eta: float
    solver: str
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    experts: tuple[Annotated[int, Ge(0), Le(1)], ...]
    guidance: tuple[float, ...]
    window: tuple[Number, ...]
    log_prob: tuple[float, ...]
    states: tuple[Number, ...]
    height: Size
    width: Size
    frames: Size
    fps: Size
    negative_prompt: str | None = None
    target: str | None = None
    image: str | None = None
    status: str = "ok"
    seconds: float | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        """Refuse lists that do not fit together."""
        steps = len(self.timesteps)
        if (len(self.sigmas), len(self.experts), len(self.guidance)) != (steps + 1, steps, steps):
            raise ValueError("sigmas, timesteps, experts and guidance are not of one length")
        if len(self.log_prob) != len(self.window) or any(step >= steps for step in self.window):
            raise ValueError("window and log_prob do not fit the steps")


class SampleValues(TypedDict):
    """A `SampleRecord` as plain values, of which older versions did not write the last six."""

    schema: int
    key: str
    group: str
    text: str
    iteration: int
    prompt_id: int
    sample: int
    prompt: str
    chunk: list[int]
    seed: int
    noise_seeds: dict[str, int]
    policy: str
    plan_sha256: str
    law: str
    form: str
    eta: float
    solver: str
    sigmas: Sequence[float]
    timesteps: Sequence[float]
    experts: Sequence[int]
    guidance: Sequence[float]
    window: Sequence[int]
    log_prob: Sequence[float]
    states: Sequence[int]
    height: int
    width: int
    frames: int
    fps: int
    negative_prompt: NotRequired[str | None]
    target: NotRequired[str | None]
    image: NotRequired[str | None]
    status: NotRequired[str]
    seconds: NotRequired[float | None]
    host: NotRequired[str | None]


def check_sample(data: bytes) -> SampleRecord:
    """The record in a JSON member. Raises ValueError, naming the field, for a damaged one."""
    from pydantic import ValidationError

    try:
        return reader(SampleRecord).validate_json(data)
    except ValidationError as error:
        raise ValueError(first_fault(error, "").problem.partition("is damaged: ")[2] or "another schema") from error


def contradictions(record: SampleRecord, plan: RolloutPlan, plan_sha256: str) -> Iterator[str]:
    """Names of fields that are not what the key or the plan says."""
    matched = SAMPLE_KEY.fullmatch(record.key)
    numbers = record.iteration, record.prompt_id, record.sample
    if not matched or numbers != tuple(map(int, matched.groups())):
        yield "iteration, prompt_id, sample"
    group = plan.by_key.get(group_of(record.key))
    if group is None or record.group != group.key or not GROUP_KEY.fullmatch(record.text):
        yield "group"
        return
    video, schedule = plan.video, plan.schedule
    planned: dict[str, object] = {
        "prompt": group.prompt, "target": group.target, "window": group.window, "prompt_id": group.prompt_id,
        "iteration": plan.iteration, "seed": plan.seed, "policy": plan.policy.fingerprint, "plan_sha256": plan_sha256,
        **{name: getattr(video, name) for name in ("height", "width", "frames", "fps")},
        **{name: getattr(schedule, name) for name in ("law", "form", "eta", "solver")},
        **{name: getattr(schedule, name) for name in ("sigmas", "timesteps", "experts", "guidance")},
    }  # fmt: skip
    yield from (name for name, value in planned.items() if getattr(record, name) != value)
    if record.image not in (None, group.image):
        yield "image"
    if record.negative_prompt not in (None, plan.negative_of(group.key)):
        yield "negative_prompt"
    first, count = record.chunk
    place, size = plan.place(group.key, sample_of(record.key))
    if not first <= place < first + count <= size:
        yield "chunk"
    if record.noise_seeds.keys() != {"initial", *map(str, record.window)}:
        yield "noise_seeds"
    wanted = {state for step in record.window for state in (step, step + 1)} | {schedule.steps}
    if list(record.states) != sorted(wanted) and record.window:
        yield "states"
    if any(one >= other for one, other in pairwise(record.states)):
        yield "states"


def unlike_trajectory(record: SampleRecord, trajectory: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Names of fields that are not what the trajectory beside the record holds, by its small tensors."""
    named = {"window": "step_index", "states": "states", "experts": "experts"}
    for name, tensor in named.items():
        if list(getattr(record, name)) != trajectory.get(tensor):
            yield f"{name} {short(list(getattr(record, name)))}"
    for name in ("log_prob", "sigmas", "timesteps", "guidance"):
        if _singles(getattr(record, name)) != trajectory.get(name):
            yield name


def _singles(values: tuple[float, ...]) -> list[float] | None:
    """Numbers rounded to fp32, as tensors hold them."""
    try:
        return list(struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *values)))
    except OverflowError:
        return None
