"""Steps 2 to 4: tiny models through rollout and training, every objective and layout, and FSDP on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from bench.gpu.found import Finding, Place
from bench.gpu.iteration import first_ratios, records_of
from rollout.policy import Policy
from rollout.policy.experts import ExpertWeights
from rollout.ranks.world import World
from shards.run import Run
from tests.support import training
from tests.support.tiny_models import TEXT_LENGTH, save
from train.run import TrainReport, train

if TYPE_CHECKING:
    from rollout.lora.merged import BaseLora
    from rollout.policy.folder import Layout

PUBLISHED: dict[str, Any] = {"estimator": "noise", "error_weight": "derived", "proximal": 0.0, "clip_range": 1e-3}
HELD: dict[str, Any] = {"estimator": "fresh", "error_weight": "adaptive", "proximal": 1.0, "clip_range": 1.0}
SMALL: dict[str, Any] = {"prompts_per_iteration": 1, "group_size": 2, "steps": 4, "shift": 5.0}
ONE: dict[str, Any] = {**SMALL, "high_steps": 2, "low_steps": 0}
TWO: dict[str, Any] = {**SMALL, "high_steps": 1, "low_steps": 1}
MATRIX: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clipped ratio": ("t2v", ONE, PUBLISHED),
    "gradient checkpointing": ("t2v", ONE, {**PUBLISHED, "gradient_checkpointing": True}),
    "KL of the velocity": ("t2v", ONE, {**PUBLISHED, "kl": "velocity", "kl_beta": 0.1}),
    "KL of the transition": ("t2v", ONE, {**PUBLISHED, "kl": "transition", "kl_beta": 0.1}),
    "RatioNorm": ("t2v", ONE, {**PUBLISHED, "ratio_norm": True}),
    "fresh with a hold": ("t2v", ONE, HELD),
    "endpoint with a hold": ("t2v", ONE, {**HELD, "estimator": "endpoint"}),
    "nft": ("t2v", ONE, {"objective": "nft"}),
    "dpo": ("t2v", ONE, {"objective": "dpo", "pair_margin": 0.0}),
    "sft": ("t2v", ONE, {"objective": "sft"}),
    "all weights": ("t2v", ONE, {**PUBLISHED, "full": True}),
    "all weights, KL": ("t2v", ONE, {**PUBLISHED, "full": True, "kl_beta": 0.1}),
    "2M law": ("t2v", {**ONE, "law": "dpm-sde-2m", "solver": "dpm-2m"}, PUBLISHED),
    "image to video, two experts": ("i2v2", {**TWO, "image": True}, PUBLISHED),
    "a given first frame": ("ti2v", {**ONE, "height": 32, "width": 32, "image": True}, PUBLISHED),
}
"""Layout, settings of [rollout] and of [train]."""


class _Killed(Exception):
    """Raised in the middle of a training, which then has to be resumed."""


class _Runs:
    """Sampled runs of tiny models; those with equal rollouts are sampled once and copied."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.policies: dict[str, Policy] = {}
        self.sampled: dict[str, Run] = {}
        self.copies = 0

    @property
    def model(self) -> dict[str, Any]:
        return {"device": str(self.place.device), "dtype": "float32" if self.place.small else "bfloat16"}

    def policy(self, layout: str) -> Policy:
        if layout not in self.policies:
            folder = self.place.out / f"tiny-{layout}"
            if not folder.is_dir():
                save(layout, folder)
            self.policies[layout] = Policy.load(folder, **self.model, text_length=TEXT_LENGTH)
        return self.policies[layout]

    def run(self, layout: str, rollout: dict[str, Any], settings: dict[str, Any]) -> Run:
        """A run that is sampled and has advantages, with these settings of [train]."""
        policy = self.policy(layout)
        key = f"{layout} {sorted(rollout.items())}"
        if key not in self.sampled:
            path = self.place.out / f"{self.name}-{len(self.sampled)}"
            limits = {"replay_samples": 10**6, "replay_limit": 1e6}
            run = training.make_run(path, policy.layout.folder, limits, model=self.model, **rollout)
            training.advise(training.roll(run, 0, policy))
            self.sampled[key] = run
        self.copies += 1
        base = self.sampled[key]
        return training.fork(base, base.path.with_name(f"{base.path.name}-train-{self.copies}"), **settings)


def two_experts(place: Place) -> Iterator[Finding]:
    """Step 2: the gate finds 0, the first ratios are 1, the idle expert is away, and a killed training is resumed."""
    runs, rollout = _Runs(place, "two"), {**TWO, "prompts_per_iteration": 2}
    run, again = (runs.run("t2v2", rollout, PUBLISHED) for _ in range(2))
    policy = runs.policy("t2v2")
    yield from _checked(2, "two experts", run, train(run, 0, policy))
    policy.experts.use(0)
    where = [
        {value.device.type for value in policy.experts.module(expert).parameters()}
        for expert in policy.layout.expert_ids
    ]
    text = f"at work on {', '.join(where[0])}, idle on {', '.join(where[1])}"
    yield Finding(2, "the idle expert is on the host", text, where == [{place.device.type}, {"cpu"}])
    policy.experts.use(None)

    def kill(done: int, total: int, unit: str, note: str = "") -> None:
        if unit == "updates" and note.startswith("low_noise"):
            raise _Killed

    try:
        train(again, 0, policy, kill)
    except _Killed:
        train(again, 0, policy)
    found, equal = _apart(run, again)
    text = "killed after an update and resumed, against undisturbed: weights"
    yield Finding(2, text, found, equal if place.device.type == "cpu" else None)


def matrix(place: Place) -> Iterator[Finding]:
    """Step 3: every objective, estimator and layout, trained once."""
    runs = _Runs(place, "matrix")
    for name, (layout, rollout, settings) in MATRIX.items():
        try:
            run = runs.run(layout, rollout, {"updates_per_rollout": 1 if place.small else 2, **settings})
            yield from _checked(3, name, run, train(run, 0, runs.policy(layout)), settings == PUBLISHED)
        except Exception as error:
            yield Finding(3, name, f"{type(error).__name__}: {error}", False)


def _checked(step: int, name: str, run: Run, report: TrainReport, ratios: bool = True) -> Iterator[Finding]:
    """Whether the gate found 0, every number is finite and, where the objective has ratios, the first are 1."""
    records = records_of(run.iteration(0))
    finite = all(math.isfinite(record[key]) for record in records for key in ("loss", "gradient_norm"))
    low, high = first_ratios(records)
    updates = sum(report.updates.values())
    text = f"{updates} updates, largest log-ratio of the replay {report.replay:.3g}, first ratios {low!r} to {high!r}"
    yield Finding(step, name, text, finite and report.replay == 0.0 and (not ratios or low == high == 1.0))


# --- FSDP on one rank -------------------------------------------------------------------------------------------------


class _Sharded(Policy):
    """A policy that FSDP shards even though one rank is alone: what enters and leaves the device is then FSDP's."""

    def __init__(
        self, layout: Layout, dtype: str, device: torch.device, text_length: int, base_lora: BaseLora | None = None
    ) -> None:
        experts = _ShardedExperts(layout, dtype, device, base_lora)
        super().__init__(layout, dtype, device, text_length, experts=experts)


class _ShardedExperts(ExpertWeights):
    def distribute(self, world: World) -> None:
        mesh = init_device_mesh(self.device.type, (1,), mesh_dim_names=("fsdp",))
        super().distribute(World(fsdp_mesh=mesh))


def one_rank(place: Place) -> Iterator[Finding]:
    """Step 4: a training whose experts FSDP holds, by one rank of NCCL (gloo on a CPU), against a plain one."""
    runs, pairs = _Runs(place, "fsdp"), {}
    for name, settings in (("LoRA", {}), ("all weights", {"full": True, "epsilon": 1e-4})):
        settings = {**PUBLISHED, **settings, "updates_per_rollout": 1 if place.small else 2}
        plain, sharded = pairs[name] = tuple(runs.run("t2v2", TWO, settings) for _ in range(2))
        train(plain, 0, runs.policy("t2v2"))
    runs.policy("t2v2").release()
    yield from place.in_a_process(_train_sharded, {name: str(sharded.path) for name, (_, sharded) in pairs.items()})
    for name, (plain, sharded) in pairs.items():
        # FSDP takes the norm that clips gradients in another order: measured 1.5e-8 in fp32; bfloat16 rounds to 2^-8
        limit = 1e-5 if place.small else 2**-7
        yield Finding(4, f"{name}: FSDP on one rank against none, weights", *_apart(plain, sharded, limit))


def _apart(one: Run, other: Run, limit: float = 0.0) -> tuple[str, bool]:
    """How far the weights that two runs have published are apart."""
    ours, theirs = (_published(run) for run in (one, other))
    if training.equal(ours, theirs):
        return "equal", True
    if ours.keys() != theirs.keys():
        return "have other names", False
    largest = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
    return f"differ by {largest:.3g} at most", largest <= limit


def _published(run: Run) -> dict[str, torch.Tensor]:
    """All weights of the policy that an iteration trained, by expert and name."""
    folder = run.iteration(0).policy_dir
    files = sorted(folder.glob("*_noise/*.safetensors"))
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def _train_sharded(paths: dict[str, str]) -> list[Finding]:
    """In a process of its own: the training of each run by experts that FSDP holds."""
    runs = {name: Run.open(Path(path)) for name, path in paths.items()}
    cuda = any(torch.device(run.config.model.device).type == "cuda" for run in runs.values())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        found: list[Finding] = []
        for name, run in runs.items():
            found += _checked(4, f"{name}, sharded", run, train(run, 0, _Sharded.of(run.config.model)))
        return found
    finally:
        dist.destroy_process_group()
