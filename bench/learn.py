"""Does it learn? The `words` run over several seeds, and a control with shuffled advantages; writes docs/benchmarks.md.

    OMP_NUM_THREADS=1 python bench/learn.py --seeds 5 --first-seed 5 --iterations 24 --jobs 2 --out runs/learn

Each seed is one whole run: base evaluation, the iterations, final evaluation, on held-out prompts and seeds. The
control is the same run, except that advantages are permuted among all samples of an iteration before training.
Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import cli
from shards import sidecar
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset

GAIN = 0.15  # what a run has to reach


def shuffle_advantages(stage: Stage, seed: int) -> None:
    """Permute the advantages of an iteration among all its samples, keeping their distribution."""
    for spec in sorted(path.name for path in (stage.path / "advantage").iterdir()):
        frame = sidecar.read_advantages(stage, spec)
        order = np.random.default_rng(seed).permutation(len(frame))
        frame[["advantage", "weight"]] = frame[["advantage", "weight"]].to_numpy()[order]
        for shard in stage.shards():
            rows = frame[frame["key"].isin(stage.keys(shard))].reset_index(drop=True)
            sidecar.write_advantages(stage, shard, spec, rows, {"control": "shuffled"})


def one_run(path: Path, seed: int, iterations: int, control: bool) -> dict[str, Any]:
    """One run from its base evaluation to its final one; its result is stored beside it and read when it exists."""
    stored = path / "learn.json"
    if stored.exists():
        return dict(json.loads(stored.read_text()))
    values = apply_sets(read_preset("words"), [f"rollout.seed={seed}"])
    run = Run.create(path, parse_config(values, "preset words"))
    policy = cli.load_policy(run)
    start = time.monotonic()
    for k in range(iterations):
        stage = run.iteration(k)
        cli.do_rollout(run, stage, policy)
        cli.do_score(run, stage)
        if control:
            shuffle_advantages(stage, 1000 * seed + k)
        cli.do_train(run, k, policy)
    seconds = time.monotonic() - start
    ends = []
    for k in (0, iterations):
        cli.do_rollout(run, run.evaluation(k), policy)
        ends.append(cli.do_score(run, run.evaluation(k)).summary or {})
    before, after = (float(end["mean_reward"]) for end in ends)
    result = {
        "seed": seed, "control": control, "before": before, "after": after, "gain": after - before,
        "error": ends[1]["std_reward"] / ends[1]["samples"] ** 0.5, "videos": ends[1]["samples"], "seconds": seconds,
    }  # fmt: skip
    stored.write_text(json.dumps(result, indent=1))
    return result


def in_a_process(arguments: argparse.Namespace, seed: int, control: bool) -> dict[str, Any]:
    """The result of one run, done by another process of this script unless it was done before."""
    path = arguments.out / f"{'control' if control else 'seed'}-{seed}"
    if not (path / "learn.json").exists():
        command = [sys.executable, __file__, "--one", str(path), "--first-seed", str(seed)]
        command += ["--iterations", str(arguments.iterations), "--controls", str(int(control))]
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
        f"{arguments.iterations} --jobs {arguments.jobs}`: OCR reward on {rows[0]['videos']} held-out videos, "
        "deterministic sampler.",
        "",
        "| run seed | advantages | before | after | gain | standard error after | minutes |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        kind = "shuffled" if row["control"] else "true"
        numbers = f"{row['before']:.3f} | {row['after']:.3f} | {row['gain']:+.3f} | {row['error']:.3f}"
        lines.append(f"| {row['seed']} | {kind} | {numbers} | {row['seconds'] / 60:.1f} |")
    reached = int((runs["gain"] >= GAIN).sum())
    lines += ["", f"{reached} of {len(runs)} runs gained {GAIN} or more; mean gain {runs['gain'].mean():+.3f}."]
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


def main() -> None:
    """Run what is missing, print the table, write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--controls", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # only this run: how the script calls itself
    arguments = parser.parse_args()
    if arguments.one:
        one_run(arguments.one, arguments.first_seed, arguments.iterations, bool(arguments.controls))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    plan = [(seed, False) for seed in seeds] + [(seed, True) for seed in seeds[: arguments.controls]]
    with ThreadPoolExecutor(arguments.jobs) as pool:  # each thread waits for a process of its own
        rows = list(pool.map(lambda one: in_a_process(arguments, *one), plan))
    text = report(rows, arguments)
    print(text)
    replace_section(arguments.page, "learn", text)


if __name__ == "__main__":
    main()
