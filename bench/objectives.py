"""One set of rollouts, every objective: what each learns from the same shards of `words`; writes docs/benchmarks.md.

    OMP_NUM_THREADS=1 python bench/objectives.py --seeds 3 --jobs 2 --out runs/objectives

`once` trains every objective from one and the same iteration: its shards and scores are made once and hard-linked into
a run for each objective, which then makes `--updates` updates. `chain` begins with the same iteration and continues for
`--iterations` of them, each objective on what its own policy samples. Both are evaluated on held-out prompts and noise.
`drift` is the root mean square distance of the evaluation's final latents from those of the base model, from the same
noise, over the root mean square of these: how far the policy has moved, whatever the reward says. `guards` are
measurements of the evaluation videos that a hacked reward changes, as shares of what they were. Differences are paired.
Minutes are processor time after the shared iteration; a run that was stopped and continued has none. The control is the
first objective with shuffled advantages. Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

import cli
from bench.learn import difference, replace_section, shuffle_advantages, train_run
from shards.reader import open_shard
from shards.records.kinds import read_summary
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset
from shards.sidecar import specifications

HELD = ["train.objective=grpo", "train.proximal=1.0", "train.clip_range=10.0", "train.error_weight=adaptive"]
OBJECTIVES: dict[str, list[str]] = {
    "grpo fresh, hold": [*HELD, "train.estimator=fresh"],
    "grpo endpoint, hold": [*HELD, "train.estimator=endpoint"],
    "grpo noise, hold": [*HELD, "train.estimator=noise", "train.error_weight=derived"],
    "grpo noise, clip": ["train.objective=grpo", "train.estimator=noise", "train.error_weight=derived",
                         "train.proximal=0.0", "train.clip_range=1e-3", "train.learning_rate_2=3e-4"],
    "nft": ["train.objective=nft"],
    "dpo": ["train.objective=dpo"],
    "sft": ["train.objective=sft"],
}  # fmt: skip
ROLLOUT = [
    "rollout.eta=0.5",
    "rollout.high_steps=2",
    "rollout.low_steps=2",
    "rollout.first_step=1",
    "rollout.last_step=8",
    "rollout.workers=1",
    "score.workers=1",
]
"""Noise enough for log-probs to carry information, and the same for all: `noise` needs it. One process a run, so that
its processor time is the cost of the objective."""
REWARDS = {"ocr": "{ ocr = 1.0 }", "ocr+motion": "{ ocr = 1.0, motion = 0.3 }"}
GUARDS = ("luma", "saturation", "edges", "entropy", "motion", "diversity")


def settings(name: str, rewards: str, seed: int, updates: int | None = None) -> list[str]:
    """Settings of one run, over those of the preset."""
    more = [] if updates is None else [f"train.updates_per_rollout={updates}"]
    return [f"rollout.seed={seed}", f"score.rewards={REWARDS[rewards]}", *ROLLOUT, *OBJECTIVES[name], *more]


def new_run(path: Path, sets: Sequence[str]) -> Run:
    """A run of the preset with settings; the one that is there, if it has the same."""
    return Run.create(path, parse_config(apply_sets(read_preset("words"), sets), "preset words"))


def sampled(folder: Path, rewards: str, seed: int) -> Run:
    """The run whose iteration 0 all objectives of a seed share: sampled and scored, not trained."""
    run = new_run(folder / f"shared-{rewards}-{seed}", settings("nft", rewards, seed))
    stage = run.iteration(0)
    if not specifications(stage):
        policy = cli.load_policy(run)
        cli.do_rollout(run, stage, policy)
        cli.do_score(run, stage)
        cli.do_rollout(run, run.evaluation(0), policy)
        cli.do_score(run, run.evaluation(0))
    return run


def link(shared: Run, run: Run) -> None:
    """Give a run the first iteration and the evaluation of the base model of another, as hard links."""
    shutil.copy(shared.model_path, run.model_path)
    for stage in (shared.iteration(0).path, shared.evaluation(0).path):
        target = run.path / stage.relative_to(shared.path)
        if not target.exists():
            shutil.copytree(stage, target, copy_function=os.link)


def one(folder: Path, name: str, rewards: str, seed: int, arguments: argparse.Namespace, control: bool) -> None:
    """Both parts for one objective and seed."""
    shared = sampled(folder, rewards, seed)
    chosen = arguments.parts
    for part in chosen:
        path = folder / f"{part}-{name.replace(', ', '-').replace(' ', '-')}-{rewards}-{seed}{'-control' * control}"
        if (path / "result.json").exists():
            continue
        run = new_run(path, settings(name, rewards, seed, arguments.updates if part == "once" else None))
        link(shared, run)
        if control and not run.iteration(0).trained():
            apart(run.iteration(0))
            shuffle_advantages(run.iteration(0), 1000 * seed)
        policy, last = cli.load_policy(run), 1 if part == "once" else arguments.iterations
        whole, before = not run.iteration(0).trained(), time.process_time()
        train_run(run, policy, last, control)
        minutes = (time.process_time() - before) / 60 if whole else None
        cli.do_rollout(run, run.evaluation(last), policy)
        cli.do_score(run, run.evaluation(last))
        row = {"part": part, "objective": name, "rewards": rewards, "seed": seed, "control": control,
               "minutes": minutes, "sampled": last * sampled_videos(run), "drift": drift(run, last),
               **difference(run, 0, last), **ocr_gain(run, last), "guards": guards(run, last)}  # fmt: skip
        (path / "result.json").write_text(json.dumps(row, indent=1))


def apart(stage: Stage) -> None:
    """Copies in the place of the hard links of advantages, which are about to be replaced."""
    for path in stage.advantages_dir.rglob("*.parquet"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)


def sampled_videos(run: Run) -> int:
    """Videos of one iteration."""
    return run.config.rollout.prompts_per_iteration * run.config.rollout.group_size


def final_latents(stage: Stage) -> dict[tuple[int, int], Any]:
    """Final latents of an evaluation by prompt number and sample number."""
    found = {}
    for number in stage.shards():
        shard = open_shard(stage, number)
        for key in shard.keys:
            meta = shard.meta(key)
            found[meta["prompt_id"], meta["sample"]] = shard.latents(key, [len(meta["timesteps"])])[0].float()
    return found


def drift(run: Run, k: int) -> float:
    """Distance of the policy after k iterations from the base model, in latents of the same noise."""
    before, after = final_latents(run.evaluation(0)), final_latents(run.evaluation(k))
    moved = sum(float((after[key] - before[key]).square().mean()) for key in before)
    return float((moved / sum(float(before[key].square().mean()) for key in before)) ** 0.5)


def ocr_gain(run: Run, k: int) -> dict[str, float]:
    """Gain of the OCR reward alone, whatever the run was trained on."""
    from shards.inspect import table

    frame = table.samples(run.path).query("kind == 'eval'").set_index(["prompt_id", "sample"])
    column = frame["ocr.reward"] if "ocr.reward" in frame else frame["reward"]
    gain = (column[frame["iteration"] == k] - column[frame["iteration"] == 0]).dropna()
    return {"ocr_gain": float(gain.mean()), "ocr_error": float(gain.std(ddof=1) / len(gain) ** 0.5)}


def guards(run: Run, k: int) -> dict[str, float]:
    """Mean measurements of the evaluation videos after k iterations, over those of the base model."""
    summaries = [
        read_summary(stage.summary_path(specifications(stage)[0])) for stage in (run.evaluation(0), run.evaluation(k))
    ]
    before, after = (
        {name: value for name, value in (summary.guards or {}).items() if value is not None} for summary in summaries
    )
    return {name: after[name] / before[name] for name in GUARDS if before.get(name)}


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of the page: mean over seeds, with the standard error over seeds where there are several."""
    frame = pd.DataFrame(ordered(rows))
    lines = []
    for (part, rewards), some in frame.groupby(["part", "rewards"], sort=False):
        lines += [f"**{'One iteration' if part == 'once' else 'A chain of iterations'}, reward {rewards}**", ""]
        lines += ["| objective | seeds | OCR gain | per 1,000 videos | processor minutes | drift | guards moved most |"]
        lines += ["|-|-|-|-|-|-|-|"]
        for (name, control), mine in some.groupby(["objective", "control"], sort=False):
            gain, n = mine["ocr_gain"].mean(), len(mine)
            error = mine["ocr_gain"].std(ddof=1) / n**0.5 if n > 1 else mine["ocr_error"].iloc[0]
            changes = pd.DataFrame(list(mine["guards"])).mean() - 1.0
            moved = changes.reindex(changes.abs().sort_values(ascending=False).index)[:2]
            words = ", ".join(f"{guard} {change:+.0%}" for guard, change in moved.items())
            title = f"{name}, shuffled" if control else name
            per = 1000 * gain / mine["sampled"].iloc[0]
            lines.append(f"| {title} | {n} | {gain:+.3f} ± {error:.3f} | {per:+.3f} | {mine['minutes'].mean():.1f} | "
                         f"{mine['drift'].mean():.2f} | {words} |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the tables, write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=24, help="of a chain")
    parser.add_argument("--updates", type=int, default=32, help="updates of each expert from the one iteration")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--parts", nargs="+", choices=("once", "chain"), default=["once", "chain"])
    parser.add_argument("--controls", type=int, default=1, help="seeds of the control")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--one", nargs=4, metavar=("NAME", "REWARDS", "SEED", "CONTROL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:  # only this run: how the script calls itself
        name, rewards, seed, control = arguments.one
        return one(arguments.out, name, rewards, int(seed), arguments, control == "1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for rewards in arguments.rewards:
        for seed in seeds:
            sampled(arguments.out, rewards, seed)
    jobs = [(name, rewards, str(seed), "0") for rewards in arguments.rewards for seed in seeds
            for name in arguments.objectives]  # fmt: skip
    jobs += [(arguments.objectives[0], arguments.rewards[0], str(seed), "1") for seed in seeds[: arguments.controls]]
    with ThreadPoolExecutor(arguments.jobs) as pool:  # each thread waits for a process of its own
        list(
            pool.map(
                lambda job: subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", *job], check=True), jobs
            )
        )
    text = report([json.loads(path.read_text()) for path in arguments.out.glob("*/result.json")])
    print(text)
    replace_section(arguments.page, "objectives", f"`python bench/objectives.py {' '.join(sys.argv[1:])}`\n\n{text}\n")


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs as the tables have them: by reward, part, control, objective, seed."""

    def place(row: dict[str, Any]) -> tuple[int, bool, bool, int, int]:
        objective = list(OBJECTIVES).index(row["objective"])
        return list(REWARDS).index(row["rewards"]), row["part"] != "once", row["control"], objective, row["seed"]

    return sorted(rows, key=place)


if __name__ == "__main__":
    main()
