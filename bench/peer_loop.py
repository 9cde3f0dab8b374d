"""rushes against one loop in one process: iterations an hour, and minutes to +0.15 of held-out reward.

    OMP_NUM_THREADS=1 python bench/peer_loop.py --out runs/peer --page docs/benchmarks.md

The peer is the loop that most trainers have, written here from the papers' formulas on diffusers, peft and EasyOCR: one
process samples a group with log-probs (Flow-GRPO, arXiv 2505.05470), decodes it, reads frame by frame with `readtext`,
normalises the rewards of the group, and trains on final latents that are noised afresh (AWM, arXiv 2509.25050) with
the old policy as a second adapter and a hold on it. It writes nothing and proves nothing. Both sides have the embedded
model, the preset's settings, and the prompts, stochastic steps and noise of rushes' plans, so that the base policy
draws the same videos; they take turns, some iterations each, and neither computes while the other does. The start of
each command and that of the peer count; evaluation is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import easyocr
import easyocr_en_models
import numpy as np
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.learn import GAIN, replace_section, rewards_of
from rollout.transitions import noise, noise_seed
from rollout.words.paths import words_folder
from shards.plan import Group, RolloutPlan
from shards.records.schedule import Schedule
from shards.run import Run

POLICY, OLD = "policy", "old"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
FRESH = 1_000_000  # added to a step's number for the seed of noise that no rollout has seen


class Sampled(NamedTuple):
    """The videos of one prompt."""

    group: Group
    latents: Tensor
    """[B,C,F,H,W] final latents."""
    prompt: Tensor
    """[1,L,D] embedding."""
    log_prob: Tensor
    """[B,S] of the stochastic steps."""
    advantage: Tensor
    """[B]"""


class Mark(NamedTuple):
    """Where both sides are after a block: seconds so far, and the reward on held-out prompts."""

    iteration: int
    rushes_seconds: float
    peer_seconds: float
    rushes: float
    peer: float


class Peer:
    """The loop of one process: two experts with adapters, their optimizers, and a reader of text."""

    def __init__(self, run: Run) -> None:
        self.config, self.iteration = run.config, 0
        self.pipe = WanPipeline.from_pretrained(words_folder() / "model")
        self.pipe.set_progress_bar_config(disable=True)
        self.experts = [self.pipe.transformer, self.pipe.transformer_2]
        train = self.config.train
        for seed, expert in enumerate(self.experts):
            expert.requires_grad_(False)
            torch.manual_seed(seed)
            for name in (OLD, POLICY):
                lora = LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=TARGETS,
                                  init_lora_weights="gaussian")  # fmt: skip
                expert.add_adapter(lora, adapter_name=name)
        self.weights = [self._adapter(expert, POLICY) for expert in self.experts]
        self.old = [self._adapter(expert, OLD) for expert in self.experts]
        self.average = [[weight.detach().clone() for weight in weights] for weights in self.weights]
        self.optimizers = [
            torch.optim.AdamW(weights, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.epsilon,
                              weight_decay=train.weight_decay)
            for weights in self.weights
        ]  # fmt: skip
        self.negative = self.embed("")
        self.reader = easyocr.Reader(["en"], gpu=False, verbose=False, download_enabled=False,
                                     model_storage_directory=easyocr_en_models.model_dir())  # fmt: skip

    @staticmethod
    def _adapter(expert: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
        """The weights of one adapter, in the module's order."""
        return [weight for key, weight in expert.named_parameters() if f".{name}." in key]

    def use(self, name: str) -> None:
        """Put one adapter of both experts in force."""
        for expert in self.experts:
            expert.set_adapter(name)
            for key, weight in expert.named_parameters():
                weight.requires_grad_("lora_" in key and f".{POLICY}." in key)

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Embedding [1,L,D] of a prompt."""
        found: Tensor = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.config.model.text_length
        )[0]
        return found

    def velocity(self, schedule: Schedule, step: int, x: Tensor, prompt: Tensor) -> Tensor:
        """Guided velocity [B,C,F,H,W] of a step."""
        expert, guidance = self.experts[schedule.experts[step]], schedule.guidance[step]
        t = torch.full((len(x),), schedule.timesteps[step])
        with_text = expert(x, t, prompt.expand(len(x), -1, -1), return_dict=False)[0]
        without = expert(x, t, self.negative.expand(len(x), -1, -1), return_dict=False)[0]
        return without + guidance * (with_text - without)

    # --- Sampling and scoring ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, plan: RolloutPlan, group: Group, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Final latents [B,C,F,H,W] of a group by Euler steps and Flow-GRPO's law, and its log-probs [B,S]."""
        schedule, shape = plan.schedule, self.shape(plan)
        iteration = -1 if plan.kind == "eval" else plan.iteration

        def drawn(step: int) -> Tensor:
            seeds = [noise_seed(plan.seed, iteration, group.prompt_id, i, step) for i in range(plan.group_size)]
            return torch.stack([noise(shape, seed=seed) for seed in seeds])

        x, log_probs = drawn(-1), []
        for step in range(schedule.steps):
            v = self.velocity(schedule, step, x, prompt)
            sigma, following = schedule.sigmas[step], schedule.sigmas[step + 1]
            if step not in group.window:
                x = x + (following - sigma) * v
                continue
            # the exact form of the law: the noise estimate keeps a share c, the rest is drawn
            kept = ((1 - sigma) * following / (sigma * (1 - following))) ** (schedule.eta**2 / 2)
            std = following * math.sqrt(1 - kept**2)
            mean = (1 - following) * (x - sigma * v) + following * kept * (x + (1 - sigma) * v)
            x = mean + std * drawn(step)
            log_prob = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
            log_probs.append(log_prob.mean(dim=(1, 2, 3, 4)))
        return x, torch.stack(log_probs, dim=1) if log_probs else torch.zeros(len(x), 0)

    def shape(self, plan: RolloutPlan) -> tuple[int, ...]:
        """[C,F,H,W] of the latents of a video."""
        video, vae = plan.video, self.pipe.vae.config
        frames = (video.frames - 1) // vae.scale_factor_temporal + 1
        space = vae.scale_factor_spatial
        return vae.z_dim, frames, video.height // space, video.width // space

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Frames [B,T,H,W,3] uint8, as WanPipeline decodes."""
        vae = self.pipe.vae
        mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (vae.config.latents_mean,
                                                                           vae.config.latents_std))  # fmt: skip
        video = vae.decode(latents * std + mean, return_dict=False)[0]
        video = (video.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        found: np.ndarray = video.permute(0, 2, 3, 4, 1).contiguous().numpy()
        return found

    def rewards(self, frames: np.ndarray, target: str) -> list[float]:
        """Mean edit similarity of what stands in every fourth frame, for each video."""
        options, found = self.config.score.options["ocr"], []
        for video in frames:
            texts = []
            for frame in video[:: options["interval"]]:
                boxes = self.reader.readtext(frame, min_size=options["min_size"])
                texts.append("".join(text for _, text, _ in boxes))
            found.append(float(np.mean([similarity(text, target) for text in texts])))
        return found

    def rollout(self, plan: RolloutPlan) -> tuple[list[Sampled], list[float]]:
        """The groups of an iteration with their advantages, and all rewards."""
        sampled, rewards, limit = [], [], self.config.train.advantage_clip
        for group in plan.groups:
            prompt = self.embed(group.prompt)
            latents, log_prob = self.sample(plan, group, prompt)
            found = np.array(self.rewards(self.decode(latents), str(group.target or quoted(group.prompt))))
            rewards += found.tolist()
            if found.std() > 0:
                advantage = torch.tensor((found - found.mean()) / found.std(), dtype=torch.float32)
                sampled.append(Sampled(group, latents, prompt, log_prob, advantage.clamp(-limit, limit)))
        return sampled, rewards

    # --- Training ----------------------------------------------------------------------------------------------------

    def train(self, plan: RolloutPlan, sampled: Sequence[Sampled]) -> None:
        """The updates of both experts on the videos of an iteration."""
        for old, weights in zip(self.old, self.weights, strict=True):
            for mine, theirs in zip(old, weights, strict=True):
                mine.data.copy_(theirs)
        order = np.random.default_rng([plan.seed, plan.iteration])
        for expert in range(len(self.experts)):
            units = [
                (one, step) for one in sampled for step in one.group.window if plan.schedule.experts[step] == expert
            ]
            parts = np.array_split(order.permutation(len(units)), self.config.train.updates_per_rollout)
            for part in parts:
                self.update(plan, expert, [units[i] for i in part])

    def update(self, plan: RolloutPlan, expert: int, units: Sequence[tuple[Sampled, int]]) -> None:
        """One step of AdamW on some groups at some steps."""
        count = sum(len(one.advantage) for one, _ in units)
        for one, step in units:
            (self.losses(plan, one, step).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(self.weights[expert], self.config.train.max_grad_norm)
        self.optimizers[expert].step()
        self.optimizers[expert].zero_grad(set_to_none=True)
        for mean, weight in zip(self.average[expert], self.weights[expert], strict=True):
            mean.lerp_(weight.detach(), 1 - self.config.train.ema)

    def losses(self, plan: RolloutPlan, one: Sampled, step: int) -> Tensor:
        """-A <e, q> + lambda/2 |q|² of each video [B], at its final latents noised afresh to the sigma of a step."""
        sigma, dims = plan.schedule.sigmas[step], (1, 2, 3, 4)
        seeds = [noise_seed(plan.seed, plan.iteration, one.group.prompt_id, i, FRESH + step)
                 for i in range(plan.group_size)]  # fmt: skip
        epsilon = torch.stack([noise(one.latents.shape[1:], seed=seed) for seed in seeds])
        x, target = (1 - sigma) * one.latents + sigma * epsilon, epsilon - one.latents
        with torch.no_grad():
            self.use(OLD)
            old = self.velocity(plan.schedule, step, x, one.prompt)
            self.use(POLICY)
        v = self.velocity(plan.schedule, step, x, one.prompt)
        weight = sigma / (target - old).abs().mean(dim=dims).clamp_min(1e-5)
        pull = weight * ((v - old) * (target - old)).mean(dim=dims)
        limit = self.config.train.clip_range
        gain = torch.minimum(one.advantage * pull, one.advantage * pull.clamp(-limit, limit))
        return -gain + 0.5 * self.config.train.proximal * weight * (v - old).square().mean(dim=dims)

    def evaluate(self, plan: RolloutPlan) -> list[float]:
        """Rewards of the averaged weights on the held-out prompts, in the order of prompts and samples."""
        kept = [[weight.detach().clone() for weight in weights] for weights in self.weights]
        self._put(self.average)
        found = self.rollout(plan)[1]
        self._put(kept)
        return found

    def _put(self, values: Sequence[Sequence[Tensor]]) -> None:
        for weights, new in zip(self.weights, values, strict=True):
            for weight, value in zip(weights, new, strict=True):
                weight.data.copy_(value)


def quoted(prompt: str) -> str:
    """What a prompt quotes."""
    return prompt.split('"')[1]


def similarity(text: str, target: str) -> float:
    """1 - edit distance / length of the target, at least 0; case and everything but letters and digits left out."""
    text, target = ("".join(c for c in one.lower() if c.isalnum()) for one in (text, target))
    row = list(range(len(target) + 1))
    for i, a in enumerate(text, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(target, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return 1 - min(row[-1], len(target)) / len(target)


def plan_of(path: Path) -> RolloutPlan:
    """The plan of a stage of rushes."""
    return RolloutPlan.from_json(path.read_bytes(), path)


def serve(path: Path, threads: int) -> None:
    """Be the peer: read commands from standard input, `train K` or `evaluate`, and answer each with a line of JSON."""
    torch.set_num_threads(threads)
    run = Run.open(path)
    peer = Peer(run)
    peer.use(POLICY)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        began, (word, *rest) = time.monotonic(), line.split()
        if word == "evaluate":
            answer: object = peer.evaluate(plan_of(run.evaluation(0).plan_path))
        else:
            while peer.iteration < int(rest[0]):
                plan = plan_of(run.iteration(peer.iteration).plan_path)
                sampled, rewards = peer.rollout(plan)
                peer.train(plan, sampled)
                peer.iteration += 1
            answer = [time.monotonic() - began, float(np.mean(rewards))]
        print(json.dumps(answer), flush=True)


# --- Both in turn ----------------------------------------------------------------------------------------------------


class Remote:
    """The peer in its process."""

    def __init__(self, path: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", str(path), "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip
        began = time.monotonic()
        self._answer()
        self.started = time.monotonic() - began
        """Seconds until it had imported and loaded all it needs."""

    def ask(self, line: str) -> list[float]:
        """What the peer answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[float]:
        assert self.process.stdout is not None
        return read_line(self.process.stdout)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def read_line(stream: IO[str]) -> list[float]:
    """The next line of JSON; EasyOCR and torch may say other things before."""
    for line in stream:
        if line[:1] in '["':
            found: list[float] = json.loads(line)
            return found
    raise SystemExit("the peer has ended: see its error above")


def rushes(*words: str) -> float:
    """Seconds of one command of rushes."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "cli", *words], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def compare(out: Path, seed: int, iterations: int, block: int, threads: int, sets: Sequence[str]) -> list[Mark]:
    """Both loops in turn, `block` iterations each; a mark at the start and after each block."""
    path = out / f"rushes-{seed}"
    settings = [word for one in (f"rollout.seed={seed}", *sets) for word in ("--set", one)]
    rushes("init", str(path), "--preset", "words", *settings)
    rushes("eval", str(path), "--iteration", "0")
    run, peer = Run.open(path), Remote(path, threads)
    marks = [Mark(0, 0.0, peer.started, held_out(run, 0), float(np.mean(peer.ask("evaluate"))))]
    for end in [*range(block, iterations, block), iterations]:
        mine = marks[-1].rushes_seconds + rushes("loop", str(path), "--iterations", str(end))
        theirs = marks[-1].peer_seconds + peer.ask(f"train {end}")[0]
        rushes("eval", str(path), "--iteration", str(end))
        marks.append(Mark(end, mine, theirs, held_out(run, end), float(np.mean(peer.ask("evaluate")))))
        print(json.dumps(marks[-1]._asdict()), flush=True)
    peer.close()
    return marks


def held_out(run: Run, k: int) -> float:
    """Mean reward of the policy of rushes after k iterations on the held-out prompts."""
    return float(rewards_of(run, k).mean())


def minutes_to(curve: Sequence[tuple[float, float]], gain: float) -> str:
    """Minutes until an evaluation first shows the gain, of (seconds, reward), or that none does."""
    reached = [seconds for seconds, reward in curve if reward >= curve[0][1] + gain]
    return f"{reached[0] / 60:.1f}" if reached else "not reached"


def steady(run: Run, iterations: int, block: int) -> float:
    """Mean seconds of the iterations in which no process of rushes starts or ends; NaN if no block has one."""
    began = [run.iteration(k).plan_path.stat().st_mtime for k in range(iterations)]
    inner = [after - before for k, (before, after) in enumerate(itertools.pairwise(began))
             if k % block and (k + 1) % block]  # fmt: skip
    return float(np.mean(inner)) if inner else math.nan


def section(marks: Sequence[Mark], command: str, threads: int, inner: float) -> str:
    """The section of the page: the curve, and what it comes to; `inner` is what `steady` found."""
    last = marks[-1]
    lines = [f"`{command}` on {len(os.sched_getaffinity(0))} cores, the peer with {threads} threads, in turn.", "",
             "| iteration | rushes: minutes | held-out reward | one process: minutes | held-out reward |",
             "|-|-|-|-|-|"]  # fmt: skip
    lines += [
        f"| {one.iteration} | {one.rushes_seconds / 60:.1f} | {one.rushes:.3f} | {one.peer_seconds / 60:.1f} "
        f"| {one.peer:.3f} |"
        for one in marks
    ]
    alone = (last.peer_seconds - marks[0].peer_seconds) / last.iteration
    mine, theirs = (3600 * last.iteration / seconds for seconds in (last.rushes_seconds, last.peer_seconds))
    reached = [minutes_to(curve, GAIN) for curve in (
        [(one.rushes_seconds, one.rushes) for one in marks], [(one.peer_seconds, one.peer) for one in marks]
    )]  # fmt: skip
    return "\n".join([
        *lines, "",
        f"Iterations an hour: rushes {mine:.0f}, one process {theirs:.0f}, ratio {mine / theirs:.2f}. Minutes to "
        f"+{GAIN}: rushes {reached[0]}, one process {reached[1]}.", "",
        f"Each turn of rushes is a command, whose processes start anew; those of the peer start once, which counts. "
        f"An iteration of rushes in which none starts takes {inner:.1f} s, {3600 / inner:.0f} an hour; one of the peer "
        f"{alone:.1f} s: ratio {alone / inner:.2f}.", "",
    ])  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Run both, print the section, and write it into the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peer"))
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--block", type=int, default=12, help="iterations of each before the other's turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peer")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--page", type=Path, help="write the section into this page")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # be the peer: how the script calls itself
    arguments = parser.parse_args(words)
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    marks = compare(
        arguments.out, arguments.seed, arguments.iterations, arguments.block, arguments.threads, arguments.sets
    )
    more = "".join(f" --{name} {value}" for name in ("seed", "iterations", "block")
                   if (value := getattr(arguments, name)) != parser.get_default(name))  # fmt: skip
    inner = steady(Run.open(arguments.out / f"rushes-{arguments.seed}"), arguments.iterations, arguments.block)
    text = section(marks, f"python bench/peer_loop.py{more}", arguments.threads, inner)
    print(text)
    if arguments.page:
        replace_section(arguments.page, "peer", text)


if __name__ == "__main__":
    main()
