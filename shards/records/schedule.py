"""The schedule of a sampler as a record: what it does at each step, checked wherever it is made or read."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from shards.errors import UserError

if TYPE_CHECKING:
    from pydantic import ConfigDict

HIGH_NOISE, LOW_NOISE = 0, 1  # numbers of experts; a model with one has the first

Law = Literal["ode", "flow-sde", "dance-sde", "wan-sde", "cps", "cps-unnormalised", "dpm-sde", "dpm-sde-2m"]
Form = Literal["exact", "euler-maruyama"]
Solver = Literal["euler", "dpm-2m"]

STRICT: ConfigDict = {"strict": True, "extra": "forbid", "allow_inf_nan": False}  # for pydantic, at reading alone


@dataclass(frozen=True)
class Schedule:
    """What the sampler does at each step, computed once, stored with the shard and never derived again.

    Step i goes from sigmas[i] to sigmas[i+1]. sigmas [N+1] fall strictly and end with 0; timesteps [N] are what the
    model is conditioned on, in 0..1000; experts [N] are 0 (high noise, or the only one) or 1 (low noise); guidance
    [N]. All of these are fp32 values, so nothing is lost in a shard. law, form and eta are those of the window steps,
    solver that of the others. Raises UserError when the parts do not fit together.
    """

    __pydantic_config__ = STRICT

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    experts: tuple[int, ...]
    guidance: tuple[float, ...]
    law: Law
    form: Form
    eta: float
    solver: Solver

    def __post_init__(self) -> None:
        """Refuse what no schedule can be."""
        for problem in _problems(self):
            raise UserError(f"bad sampler plan: {problem}", "a plan is made by `rushes rollout` and must not be edited")

    @property
    def steps(self) -> int:
        """N, the number of denoising steps."""
        return len(self.timesteps)


def _problems(schedule: Schedule) -> Iterable[str]:
    """What is wrong with a schedule, in the order in which it is best mended."""
    n, sigmas = schedule.steps, schedule.sigmas
    if len(sigmas) != n + 1 or len(schedule.experts) != n or len(schedule.guidance) != n or n < 1:
        counts = f"{len(sigmas)} sigmas, {len(schedule.experts)} experts, {len(schedule.guidance)} guidances"
        yield f"{n} timesteps, {counts}"
    falling = all(a > b for a, b in pairwise(sigmas))
    if not falling or not sigmas or sigmas[0] > 1 + 1e-6 or sigmas[-1] != 0:
        yield "sigmas must fall strictly, from at most 1 down to 0"
    if not all(map(_is_single, (*sigmas, *schedule.timesteps, *schedule.guidance))):
        yield "sigmas, timesteps and guidance must be finite fp32 values"
    if not set(schedule.experts) <= {HIGH_NOISE, LOW_NOISE}:
        yield "experts must be 0 or 1"
    for key, allowed in (("law", Law), ("form", Form), ("solver", Solver)):
        if getattr(schedule, key) not in get_args(allowed):
            yield f"unknown {key} {getattr(schedule, key)!r}"


def _is_single(value: float) -> bool:
    """Whether a number is finite and the same in fp32."""
    try:
        return math.isfinite(value) and struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        return False
