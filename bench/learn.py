"""Does it learn? The `words` run over several seeds, and a control with shuffled advantages; writes docs/benchmarks.md.

    OMP_NUM_THREADS=1 python bench/learn.py --seeds 5 --first-seed 10 --iterations 24 --jobs 2 --out runs/learn

Each seed is one whole run: the iterations, then the evaluation of the base and of the last policy (and of others, with
`--evaluate`), on held-out prompts and seeds. Differences are paired: both policies draw the same prompts from the same
noise. The control is the same run, except that advantages are permuted among all samples of an iteration before
training. `--set` changes settings, and with them the model. Finished runs are kept and not repeated, and a run that was
stopped continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import cli
from shards import sidecar
from shards.inspect import table
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset

if TYPE_CHECKING:
    from rollout.policy import Policy

GAIN = 0.15  # what a run has to reach


def shuffle_advantages(stage: Stage, seed: int) -> None:
    """Permute the advantages of an iteration among all its samples, keeping their distribution."""
    for spec in sorted(path.name for path in stage.advantages_dir.iterdir()):
        frame = sidecar.read_advantages(stage, spec)
        order = np.random.default_rng(seed).permutation(len(frame))
        frame[["advantage", "weight"]] = frame[["advantage", "weight"]].to_numpy()[order]
        for shard in stage.shards():
            rows = frame[frame["key"].isin(stage.keys(shard))].reset_index(drop=True)
            sidecar.write_advantages(stage, shard, spec, rows, {"control": "shuffled"})


def rewards_of(run: Run, k: int) -> pd.Series:
    """Reward of each evaluation video of the policy after k iterations, by prompt number and sample number."""
    frame = table.samples(run.path).query("kind == 'eval' and iteration == @k")
    return frame.set_index(["prompt_id", "sample"])["reward"].sort_index()


def difference(run: Run, first: int, last: int) -> dict[str, float]:
    """Rewards of two policies on the same prompts and noise: means, mean difference and its standard error."""
    before, after = rewards_of(run, first), rewards_of(run, last)
    gain = (after - before).dropna()
    error = float(gain.std(ddof=1) / len(gain) ** 0.5)
    return {"before": float(before.mean()), "after": float(after.mean()), "gain": float(gain.mean()), "error": error}


def train_run(run: Run, policy: Policy, iterations: int, control: bool) -> float:
    """Bring a run to so many iterations, and return the seconds it took; what is there is not done again."""
    start = time.monotonic()
    for k in range(iterations):
        stage = run.iteration(k)
        if stage.trained():
            continue
        cli.do_rollout(run, stage, policy)
        cli.do_score(run, stage)
        if control:
            shuffle_advantages(stage, 1000 * run.config.rollout.seed + k)
        cli.do_train(run, k, policy)
    return time.monotonic() - start


def one_run(path: Path, sets: Sequence[str], marks: Sequence[int], control: bool) -> dict[str, Any]:
    """One run up to the last of `marks` (iterations), evaluated at 0 and at each of them.

    Its result is stored beside it and read when it exists. `sets` are settings laid over the preset.
    """
    stored = path / "learn.json"
    if stored.exists():
        return dict(json.loads(stored.read_text()))
    run = Run.create(path, parse_config(apply_sets(read_preset("words"), sets), "preset words"))
    policy = cli.load_policy(run)
    seconds = train_run(run, policy, marks[-1], control)
    for k in (0, *marks):
        cli.do_rollout(run, run.evaluation(k), policy)
        cli.do_score(run, run.evaluation(k))
    seed = run.config.rollout.seed
    curve = {str(k): difference(run, 0, k) for k in marks}
    videos = int(rewards_of(run, 0).count())
    result = {"seed": seed, "control": control, "videos": videos, "seconds": seconds, "curve": curve,
              **curve[str(marks[-1])]}  # fmt: skip
    stored.write_text(json.dumps(result, indent=1))
    return result


def in_a_process(arguments: argparse.Namespace, seed: int, control: bool) -> dict[str, Any]:
    """The result of one run, done by another process of this script unless it was done before."""
    path = arguments.out / f"{'control' if control else 'seed'}-{seed}"
    if not (path / "learn.json").exists():
        command = [sys.executable, __file__, "--one", str(path), "--first-seed", str(seed)]
        command += ["--iterations", str(arguments.iterations), "--controls", str(int(control))]
        command += [part for setting in arguments.sets for part in ("--set", setting)]
        command += [part for mark in arguments.evaluate for part in ("--evaluate", str(mark))]
        subprocess.run(command, check=True)
    row = dict(json.loads((path / "learn.json").read_text()))
    print(json.dumps(row), flush=True)
    return row


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The section of docs/benchmarks.md: a table of runs and whether they did what they have to."""
    frame = pd.DataFrame(rows)
    runs, controls = frame[~frame["control"]], frame[frame["control"]]
    lines = [
        f"`python bench/learn.py --seeds {arguments.seeds} --first-seed {arguments.first_seed} --iterations "
        f"{arguments.iterations} --jobs {arguments.jobs}{''.join(f' --set {one}' for one in arguments.sets)}`: OCR "
        f"reward on {rows[0]['videos']} held-out videos, deterministic sampler.",
        "",
        "| run seed | advantages | before | after | gain | its standard error | minutes |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        kind = "shuffled" if row["control"] else "true"
        numbers = f"{row['before']:.3f} | {row['after']:.3f} | {row['gain']:+.3f} | {row['error']:.3f}"
        lines.append(f"| {row['seed']} | {kind} | {numbers} | {row['seconds'] / 60:.1f} |")
    reached = int((runs["gain"] >= GAIN).sum())
    lines += ["", f"{reached} of {len(runs)} runs gained {GAIN} or more; mean gain {runs['gain'].mean():+.3f}."]
    if len(runs) > 1:
        lines[-1] += f" Standard error of that mean over seeds: {runs['gain'].std(ddof=1) / len(runs) ** 0.5:.3f}."
    if len(controls):
        lines.append(f"Control with shuffled advantages: mean gain {controls['gain'].mean():+.3f}.")
    return "\n".join(lines) + "\n"


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of a section of a page, and leave the rest of the page alone."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Benchmarks\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{begin}\n{text}{end}{tail}", encoding="utf-8")


def marks_of(arguments: argparse.Namespace) -> list[int]:
    """Iterations after which a run is evaluated, the last of them included."""
    return sorted({*(mark for mark in arguments.evaluate if mark < arguments.iterations), arguments.iterations})


def main() -> None:
    """Run what is missing, print the table, write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--controls", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--evaluate", type=int, action="append", default=[], help="also after so many iterations")
    parser.add_argument("--section", default="learn", help="section of the page that is replaced")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # only this run: how the script calls itself
    arguments = parser.parse_args()
    if arguments.one:
        sets = [f"rollout.seed={arguments.first_seed}", *arguments.sets]
        one_run(arguments.one, sets, marks_of(arguments), bool(arguments.controls))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    plan = [(seed, False) for seed in seeds] + [(seed, True) for seed in seeds[: arguments.controls]]
    with ThreadPoolExecutor(arguments.jobs) as pool:  # each thread waits for a process of its own
        rows = list(pool.map(lambda one: in_a_process(arguments, *one), plan))
    text = report(rows, arguments)
    print(text)
    replace_section(arguments.page, arguments.section, text)


if __name__ == "__main__":
    main()
