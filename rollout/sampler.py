"""Chunks: the samples of a group that go through the model in one batch, from noise to finished samples."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.policy import Policy
from rollout.policy.folder import DTYPES
from rollout.step import StepInputs, looks_back, take_step
from rollout.transitions import noise_seed, noises
from shards.plan import SCHEMA, Chunk, RolloutPlan, sample_key
from shards.spool import Sample
from shards.video import encode_mp4

INITIAL = -1  # the step number of the initial noise in a seed
EVALUATION = -1  # the iteration number in the seeds of an evaluation: the same noise for every policy

Tensors = dict[str, Tensor]


@dataclass
class State:
    """A chunk on its way, in host memory but for the time that `Sampler.advance` takes."""

    x: Tensor
    """[B,C,F,H,W] fp32, rounded to the storage dtype"""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Latents [B,C,F,H,W] to be stored, in the storage dtype, by step number"""
    log_prob: dict[int, Tensor] = field(default_factory=dict)
    """[B] fp32 by window step"""
    clean: Tensor | None = None
    """[B,C,F,H,W] fp32, the clean estimate of the last step, where the solver looks back at it"""
    x0_prev: dict[int, Tensor] = field(default_factory=dict)
    """[B,C,F,H,W] fp32 by window step: the clean estimate of the step before"""
    seconds: float = 0.0

    def blank_broken(self) -> list[bool]:
        """Put zeros in the place of samples that are not finite, in all that is stored; which are whole, [B].

        A NaN would make the log-probs and gradients of a whole batch NaN, and JSON has none.
        """
        parts = [self.x, *self.kept.values(), *self.log_prob.values(), *self.x0_prev.values()]
        whole = torch.stack([torch.isfinite(part).reshape(len(part), -1).all(1) for part in parts]).all(0)
        for part in parts:
            part[~whole] = 0
        return whole.tolist()

    def to_host(self) -> None:
        """Bring everything to the host: once a phase, so that no step waits for the one before."""
        self.x, self.clean = self.x.cpu(), None if self.clean is None else self.clean.cpu()
        for part in (self.kept, self.log_prob, self.x0_prev):
            part.update({step: value.cpu() for step, value in part.items()})

    def to_tensors(self) -> Tensors:
        """The chunk as named tensors [B,...], for the spool."""
        tensors = {"x": self.x, "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        if self.clean is not None:
            tensors["clean"] = self.clean
        for name in ("kept", "log_prob", "x0_prev"):
            tensors |= {f"{name}.{step}": value for step, value in getattr(self, name).items()}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], count: int) -> State | None:
        """The chunk of `count` samples that `to_tensors` gave; None for what an older version kept of one sample."""
        if tensors["x"].dim() != 5 or len(tensors["x"]) != count:
            return None
        state = cls(tensors["x"], clean=tensors.get("clean"), seconds=float(tensors["seconds"]))
        for name, value in tensors.items():
            kind, _, step = name.partition(".")
            if step:
                getattr(state, kind)[int(step)] = value
        return state


class Decoded(NamedTuple):
    """The videos of a chunk, before they are encoded."""

    frames: NDArray[np.uint8]
    """[B,F,H,W,3]"""
    whole: list[bool]
    """[B] whether latents and log-probs are finite"""
    seconds: float


class Sampler:
    """Samples the chunks of a stage as its plan says. What it computes depends on the plan and the policy alone."""

    def __init__(self, policy: Policy, plan: RolloutPlan, plan_sha256: str) -> None:
        self.policy, self.plan, self.plan_sha256 = policy, plan, plan_sha256
        self.schedule, self.groups = plan.schedule, plan.by_key
        self.storage = DTYPES[plan.storage_dtype]
        self.shape = policy.layout.latent_shape(*plan.video.size)
        self.looks_back = looks_back(self.schedule)
        self._schedule_record = asdict(self.schedule)
        self._schedule_tensors = {
            name: torch.tensor(getattr(self.schedule, name), dtype=torch.float32)
            for name in ("sigmas", "timesteps", "guidance")
        } | {"experts": torch.tensor(self.schedule.experts, dtype=torch.uint8)}

    @property
    def phases(self) -> list[tuple[int, list[int]]]:
        """(expert, its steps): first those of the high-noise expert. Timesteps fall, so each expert has one phase."""
        experts = self.schedule.experts
        return [(e, [i for i, expert in enumerate(experts) if expert == e]) for e in sorted(set(experts))]

    def group_tensors(self, groups: Sequence[str]) -> dict[str, Tensors]:
        """What the samples of each group share: embeddings "prompt" and "negative" [L,D], an image's "condition"."""
        negatives = [self.plan.negative_of(group) for group in groups]
        prompts = [self.groups[group].prompt for group in groups]
        texts = list(dict.fromkeys([*prompts, *negatives]))
        embeds = dict(zip(texts, self.policy.text.encode(texts, cleaned=True), strict=True))
        result = {}
        for group, prompt, negative in zip(groups, prompts, negatives, strict=True):
            result[group] = {"prompt": embeds[prompt], "negative": embeds[negative]}
            image = self.groups[group].image
            if image is not None:
                result[group]["condition"] = self.policy.vae.encode_image(image, *self.plan.video.size)
        return result

    def stay(self) -> None:
        """Called now and then while there is nothing to do."""

    def end(self) -> None:
        """Called when there is nothing more to do."""

    def start(self, chunk: Chunk) -> State:
        """The chunk as noise, rounded to the storage dtype."""
        state = State(self._drawn(chunk, INITIAL).to(self.storage).float())
        self._keep(chunk, state, 0, state.x)
        return state

    @torch.no_grad()
    def advance(self, chunk: Chunk, state: State, shared: Mapping[str, Tensors], steps: Sequence[int]) -> None:
        """Take the chunk through some steps, all of one expert, which must be in use.

        `shared` has what `group_tensors` gave for its groups.
        """
        began, device = time.monotonic(), self.policy.device
        prompt, negative = (self._texts(chunk, shared, name) for name in ("prompt", "negative"))
        condition = _condition(chunk, shared, device)
        x, clean = state.x.to(device), None if state.clean is None else state.clean.to(device)
        for step in steps:
            drawn = self._noise(chunk, step, device)
            inputs = StepInputs(x, prompt, negative, condition, clean)
            taken = take_step(self.policy, self.schedule, step, inputs, drawn, self.storage)
            if taken.log_prob is not None:
                state.log_prob[step] = taken.log_prob
                if self.schedule.law == "dpm-sde-2m":
                    state.x0_prev[step] = torch.zeros_like(x) if clean is None else clean
            x, clean = taken.x, taken.clean if self.looks_back else None
            if step == self.schedule.steps - 1:
                x = self.policy.impose(x, condition).to(self.storage).float()
            self._keep(chunk, state, step + 1, x)
        state.x, state.clean = x, clean
        state.to_host()
        state.seconds += time.monotonic() - began

    def finish(self, chunk: Chunk, state: State) -> list[Sample]:
        """Decode a chunk that took all its steps, and put its samples together."""
        return self.put_together(chunk, state, self.decode(state))

    def decode(self, state: State) -> Decoded:
        """The videos of a chunk that took all its steps.

        A sample that is not finite, as when numbers outgrow float16, becomes zeros.
        """
        began, whole, batch = time.monotonic(), state.blank_broken(), self.plan.arithmetic.decode_batch
        return Decoded(self.policy.vae.decode(state.x, batch), whole, time.monotonic() - began)

    def put_together(self, chunk: Chunk, state: State, decoded: Decoded) -> list[Sample]:
        """The samples of a chunk, their videos encoded, a broken one with its status. Safe in any thread."""
        began, video = time.monotonic(), self.plan.video
        videos = [encode_mp4(rows, video.fps, video.crf, video.preset) for rows in decoded.frames]
        seconds = round((state.seconds + decoded.seconds + time.monotonic() - began) / chunk.count, 3)
        samples = [self._sample(chunk, state, index, videos[index], seconds) for index in range(chunk.count)]
        for sample, ok in zip(samples, decoded.whole, strict=True):
            sample.meta["status"] = "ok" if ok else "its latents or log-probs are not finite"
        return samples

    def _texts(self, chunk: Chunk, shared: Mapping[str, Tensors], name: str) -> Tensor:
        """Padded embeddings of the prompts or negative prompts of a chunk, [B,L,D]."""
        padded = [self.policy.text.pad(shared[group][name], count) for group, count in chunk.parts]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    def _keep(self, chunk: Chunk, state: State, number: int, x: Tensor) -> None:
        """Keep state `number`, x, if it is stored: before and after every window step, and the last."""
        window = self.groups[chunk.group].window  # chunks of several groups are those of an evaluation, which has none
        if number in window or number - 1 in window or number == self.schedule.steps:
            state.kept[number] = x.to(self.storage)

    def _noise(self, chunk: Chunk, step: int, device: torch.device) -> Tensor | None:
        """Fresh noise of a window step [B,C,F,H,W]; None for the other steps."""
        if step not in self.groups[chunk.group].window:
            return None
        return self._drawn(chunk, step).to(device)

    def _drawn(self, chunk: Chunk, step: int) -> Tensor:
        """Noise [B,C,F,H,W] from the seeds of a step, on the host."""
        return noises(self.shape, (self._seed(group, sample, step) for group, sample in chunk.members))

    def _seed(self, group: str, sample: int, step: int) -> int:
        """Seed of one noise tensor; with `same_initial_noise` a group begins from the noise of its first sample."""
        plan = self.plan
        iteration = EVALUATION if plan.kind == "eval" else plan.iteration
        if step == INITIAL and plan.same_initial_noise:
            sample = 0
        return noise_seed(plan.seed, iteration, self.groups[group].prompt_id, sample, step)

    def _sample(self, chunk: Chunk, state: State, index: int, video: bytes, seconds: float) -> Sample:
        key = chunk.keys[index]
        log_prob = [value[index] for _, value in sorted(state.log_prob.items())]
        steps = {
            "states": torch.tensor(sorted(state.kept), dtype=torch.int32),
            "step_index": torch.tensor(sorted(state.log_prob), dtype=torch.int32),
            "log_prob": torch.stack(log_prob) if log_prob else torch.empty(0),
        }
        latents = torch.stack([state.kept[number][index] for number in sorted(state.kept)])
        tensors = {"latents": latents, **steps, **self._schedule_tensors}
        if state.x0_prev:
            tensors["x0_prev"] = torch.stack([value[index] for _, value in sorted(state.x0_prev.items())])
        meta = self._meta(chunk, *chunk.members[index]) | {name: value.tolist() for name, value in steps.items()}
        del meta["step_index"]  # the same as `window`
        return Sample(key, meta | {"seconds": seconds}, video, tensors)

    def _meta(self, chunk: Chunk, key: str, sample: int) -> dict[str, object]:
        """The record of a sample of the group `key`, but for what came out of it."""
        group, plan = self.groups[key], self.plan
        seeds = {"initial": INITIAL} | {str(step): step for step in group.window}
        return {
            "schema": SCHEMA,
            "key": sample_key(key, sample),
            "iteration": plan.iteration,
            "prompt_id": group.prompt_id,
            "group": key,
            "sample": sample,
            "prompt": group.prompt,
            "target": group.target,
            "image": group.image,
            "negative_prompt": plan.negative_of(key),
            "chunk": [plan.place(*chunk.members[0])[0], chunk.count],
            "seed": plan.seed,
            "noise_seeds": {name: self._seed(key, sample, step) for name, step in seeds.items()},
            "policy": plan.policy.fingerprint,
            "plan_sha256": self.plan_sha256,
            **self._schedule_record,
            "window": group.window,
            **{name: getattr(plan.video, name) for name in ("height", "width", "frames", "fps")},
            "text": key,
            "host": socket.gethostname(),
        }


def _condition(chunk: Chunk, shared: Mapping[str, Tensors], device: torch.device) -> Tensor | None:
    """What the images of a chunk give the model, [1,C,F,H,W] for one group and [B,C,F,H,W] for several."""
    if "condition" not in shared[chunk.group]:
        return None
    found = [(shared[group]["condition"], count) for group, count in chunk.parts]
    one = found[0][0] if len(found) == 1 else torch.cat([part.repeat_interleave(count, 0) for part, count in found])
    return one.to(device)
