"""What the stages cost beside the model calls that they cannot do without, and the section of docs/benchmarks.md on it.

    OMP_NUM_THREADS=1 python bench/overhead.py --page docs/benchmarks.md
    OMP_NUM_THREADS=1 python bench/overhead.py --small       # a minute, tiny models: does it run?

Stages and bare model calls take turns in one process, round by round, on `words` and on a model of two experts of about
53 M parameters each with random weights. Every ratio is the median over the rounds of the stage's seconds over those of
the bare calls of the same round. What else the machine does makes parts of a round slower, on either side. So the page
also has the ratio of quiet parts: each batch of forwards, each decoding and each update counts with the lower quartile
of its seconds over the rounds.

- rollout: the stage, from prompts to sealed shards, over the guided forwards of all steps and the decoding.
- updates: the seconds of all updates as metrics.jsonl has them, over forward, backward and AdamW on the same batches,
  with the forwards of the old policy where the objective asks for them after the first update.
- train stage: all of `train` but the replay gate, over the same bare calls. The gate is given as a share of rollout
  and training together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu.iteration import advise, sync
from bench.gpu.models import SMALL_LAYERS, SMALL_VAE
from bench.learn import replace_section
from rollout.policy import Policy
from rollout.policy.folder import DTYPES
from rollout.run import rollout
from rollout.sampler import Sampler
from shards.run import Run
from shards.run_toml import Setting, apply_sets, parse_config, read_preset
from train import run as train_run
from train.data import Rollouts
from train.order import plan_ranks

MIDDLE = {"patch_size": (1, 2, 2), "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 16,
          "out_channels": 16, "text_dim": 64, "freq_dim": 256, "ffn_dim": 2048, "num_layers": 12,
          "cross_attn_norm": True, "rope_max_seq_len": 64}  # fmt: skip
PUBLISHED = {"train.estimator": "noise", "train.error_weight": "derived", "train.proximal": 0.0,
             "train.clip_range": 1e-3}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {"GRPO as published": PUBLISHED, "GRPO, `fresh` with a hold": {}}
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Round:
    """Seconds of one round, in parts that are the same in every round."""

    rollout: list[float]
    bare_rollout: list[float]
    updates: list[float]
    bare_updates: list[float]
    rest: float
    """Of the training stage beside updates and gate."""
    gate: float

    @property
    def pairs(self) -> dict[str, tuple[list[float], list[float]]]:
        """Parts of what the page compares, and of what it is compared with."""
        return {
            "rollout": (self.rollout, self.bare_rollout),
            "updates": (self.updates, self.bare_updates),
            "train stage": ([*self.updates, self.rest], self.bare_updates),
            "gate": ([self.gate], [*self.rollout, *self.updates, self.rest, self.gate]),
        }

    @property
    def ratios(self) -> dict[str, float]:
        """The first over the second of each pair."""
        return {name: sum(one) / sum(other) for name, (one, other) in self.pairs.items()}


def quiet_ratio(name: str, rounds: list[Round]) -> float:
    """The same ratio, each part with the lower quartile of its seconds over the rounds."""
    ours, bare = (np.quantile([one.pairs[name][side] for one in rounds], 0.25, axis=0).sum() for side in (0, 1))
    return float(ours / bare)


def settings_of(model: str, objective: str, small: bool, folder: Path) -> list[Setting]:
    """What is laid over the preset `words`: model and shape, and little enough work for a median of rounds."""
    values: dict[str, Any] = {"score.min_spread": 0.0, "train.experts_at_once": False, "rollout.workers": 1,
                              "train.kl_beta": 0.0, **OBJECTIVES[objective]}  # fmt: skip
    if model != "words":
        values |= {"model.path": str(folder), "model.text_length": 64, "rollout.height": 128, "rollout.width": 208,
                   "rollout.frames": 9, "rollout.prompts_per_iteration": 2, "rollout.group_size": 4,
                   "rollout.batch_size": 4, "rollout.groups_per_shard": 2, "train.updates_per_rollout": 2,
                   "train.save_every": 2}  # fmt: skip
    if small:
        values |= {"rollout.prompts_per_iteration": 1, "rollout.group_size": 2, "rollout.batch_size": 2,
                   "rollout.groups_per_shard": 1, "rollout.steps": 6, "rollout.height": 32, "rollout.width": 32,
                   "rollout.frames": 5, "rollout.high_steps": 1, "rollout.low_steps": 1,
                   "train.updates_per_rollout": 2}  # fmt: skip
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def build(folder: Path, small: bool) -> Path:
    """Save a pipeline of two experts with random weights."""
    config = MIDDLE | (SMALL_LAYERS if small else {})
    experts = {}
    for seed, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        experts[name] = WanTransformer3DModel(**config)
    text = UMT5Config(vocab_size=384, d_model=config["text_dim"], d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    WanPipeline(
        **experts, tokenizer=ByT5Tokenizer(), text_encoder=UMT5EncoderModel(text), vae=AutoencoderKLWan(**SMALL_VAE),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.875,
    ).save_pretrained(folder)  # fmt: skip
    return folder


# --- The bare calls --------------------------------------------------------------------------------------------------


def inputs_of(policy: Policy, expert: int, size: int, run: Run) -> Inputs:
    """What a forward of a batch of that size takes."""
    video, module = run.config.rollout, policy.experts.module(expert)
    dtype, config = DTYPES[policy.dtype], module.config
    shape = policy.layout.latent_shape(video.height, video.width, video.frames)
    x = torch.randn(size, *shape, device=policy.device).to(dtype)
    text = torch.randn(size, policy.text.length, config.text_dim, device=policy.device).to(dtype)  # type: ignore[union-attr, arg-type]
    return x, torch.full((size,), 500.0, device=policy.device), text


def velocity(policy: Policy, expert: int, inputs: Inputs, guidance: float) -> Tensor:
    """One forward, or two and what guidance makes of them."""
    module = policy.experts.module(expert)
    found: Tensor = module(*inputs, return_dict=False)[0].float()
    if guidance > 1:
        other = module(*inputs, return_dict=False)[0].float()
        found = other + guidance * (found - other)
    return found


@torch.no_grad()
def bare_rollout(policy: Policy, rollouts: Rollouts, run: Run) -> list[float]:
    """Seconds of the forwards of each chunk of a rollout and of the decoding of its videos, and of nothing else."""
    plan, schedule = rollouts.plan, rollouts.schedule
    found: list[float] = []
    chunks = [chunk for groups in plan.shards for chunk in plan.chunks(groups)]
    latents = torch.randn(1, *policy.layout.latent_shape(*plan.video.size))
    for expert in policy.layout.expert_ids:
        policy.experts.use(expert)
        steps = [step for step in range(schedule.steps) if schedule.experts[step] == expert]
        for chunk in chunks:
            with timed(found, policy):
                inputs = inputs_of(policy, expert, chunk.count, run)
                for step in steps:
                    velocity(policy, expert, inputs, schedule.guidance[step])
    for chunk in chunks:
        with timed(found, policy):
            policy.vae.decode(latents.expand(chunk.count, -1, -1, -1, -1), plan.arithmetic.decode_batch)
    return found


def bare_updates(policy: Policy, rollouts: Rollouts, run: Run) -> list[float]:
    """Seconds of forward, backward and AdamW of each update of an iteration, on its batches, and of nothing else."""
    train = run.config.train
    found: list[float] = []
    for expert in policy.layout.expert_ids:
        policy.experts.use(expert)
        parameters = [parameter for _, parameter in policy.experts.trainable(expert)]
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        plan = plan_ranks(rollouts.units(), 1, seed=rollouts.plan.seed, iteration=0, expert=expert,
                          updates=train.updates_per_rollout)  # fmt: skip
        ready = {unit.size: inputs_of(policy, expert, unit.size, run) for batch in plan.batches for unit in batch}
        for number, batch in enumerate(plan.batches):
            with timed(found, policy):
                for unit in batch:
                    guidance = rollouts.schedule.guidance[unit.step]
                    if number and not train.is_published:  # what the old policy says at this state
                        with torch.no_grad():
                            velocity(policy, expert, ready[unit.size], guidance)
                    velocity(policy, expert, ready[unit.size], guidance).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return found


# --- One round -------------------------------------------------------------------------------------------------------


@contextmanager
def timed(found: list[float], policy: Policy) -> Iterator[None]:
    """Add the seconds of the block, until the device is done."""
    sync(policy.device)
    began = time.monotonic()
    yield
    sync(policy.device)
    found.append(time.monotonic() - began)


@contextmanager
def timing(owner: Any, name: str, found: list[float], policy: Policy) -> Iterator[None]:
    """Inside, the seconds of every call of a function are added."""
    before = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with timed(found, policy):
            return before(*arguments, **named)

    with mock.patch.object(owner, name, call):
        yield


def one_round(run: Run, policy: Policy) -> Round:
    """The stages of iteration 0 and the bare calls, in turn; the run is a new one."""
    gate: list[float] = []
    whole: list[float] = []
    sampled: list[float] = []
    stage, parts = run.iteration(0), (sampled, policy)
    with timing(Sampler, "advance", *parts), timing(Sampler, "decode", *parts), timed(whole, policy):
        rollout(run, stage, policy)
    sampled.append(whole.pop() - sum(sampled))
    rollouts = Rollouts.open(stage)
    bare_sampling = bare_rollout(policy, rollouts, run)
    advise(stage)
    with timing(train_run, "prove", gate, policy), timed(whole, policy):
        train_run.train(run, 0, policy)
    records = [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]
    updates = [record["seconds"] for record in records]
    bare = bare_updates(policy, rollouts, run)
    return Round(sampled, bare_sampling, updates, bare, whole.pop() - sum(gate) - sum(updates), sum(gate))


def rounds_of(model: str, objective: str, small: bool, count: int, out: Path) -> Iterator[Round]:
    """One round to warm up, then those that count."""
    folder = out / f"{model}-model"
    if model != "words" and not folder.exists():
        build(folder, small)
    sets = settings_of(model, objective, small, folder)
    config = parse_config(apply_sets(read_preset("words"), sets), "preset words")
    policy = Policy.of(config.model)
    for number in range(count + 1):
        path = out / "run"
        found = one_round(Run.create(path, config), policy)
        policy.experts.become(None)
        shutil.rmtree(path)
        ratios = ", ".join(f"{name} {value:.3f}" for name, value in found.ratios.items())
        print(f"{model}, {objective}, round {number} of {count}: {ratios}", file=sys.stderr, flush=True)
        if number:
            yield found


# --- The page --------------------------------------------------------------------------------------------------------


def section(command: str, rows: Mapping[tuple[str, str], list[Round]]) -> str:
    """The section of the page: a row for each model and objective, medians with the range in brackets."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    count = min(len(rounds) for rounds in rows.values())
    names = ("rollout", "updates", "train stage", "gate")
    lines = [
        f"`{command}` on {cores} cores ({device}), {torch.get_num_threads()} thread, torch {torch.__version__}, load "
        f"average {load:.1f} at the end; medians of {count} rounds, stages and bare model calls in turn, the range in "
        "brackets; then the ratio of quiet parts.",
        "",
        "| model, objective | rollout ÷ forwards and decode | updates ÷ forward, backward, AdamW | train stage without "
        "the gate ÷ the same | gate, share of the iteration |",
        "|-|-|-|-|-|",
    ]
    for (model, objective), rounds in rows.items():
        lines.append(f"| {model}, {objective} | {' | '.join(cell(name, rounds) for name in names)} |")
    return "\n".join(lines) + "\n"


def cell(name: str, rounds: list[Round]) -> str:
    """Median and range of a ratio, and that of quiet parts; of the gate, a share, without the last."""
    values = [one.ratios[name] for one in rounds]
    if name == "gate":
        return f"{100 * statistics.median(values):.1f} % ({100 * min(values):.1f}–{100 * max(values):.1f})"
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f}); {quiet_ratio(name, rounds):.3f}"


def main(words: list[str] | None = None) -> None:
    """Measure, print the section, and write it into the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes and models: does it run?")
    parser.add_argument("--model", action="append", choices=("words", "53M"), help="only this one; both if absent")
    parser.add_argument("--page", type=Path, help="write the section into this page after every row")
    arguments = parser.parse_args(words)
    more = ["--small"] if arguments.small else []
    more += [f"--rounds {arguments.rounds}"] if arguments.rounds != 5 else []
    more += [f"--model {model}" for model in arguments.model or ()]
    rows, text = {}, ""
    with tempfile.TemporaryDirectory(prefix="rushes-overhead-") as out:
        for model in arguments.model or ("words", "53M"):
            for objective in OBJECTIVES:
                kind = arguments.small, arguments.rounds, Path(out)
                rows[model, objective] = list(rounds_of(model, objective, *kind))
                text = section(" ".join(["python bench/overhead.py", *more]), rows)
                if arguments.page:
                    replace_section(arguments.page, "overhead", text)
    print(text)


if __name__ == "__main__":
    main()
