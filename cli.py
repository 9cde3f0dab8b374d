"""The command line: parses, calls one function, prints the result. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shards.errors import UserError

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.progress import Progress
    from shards.run import Run, Stage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Offline GRPO post-training for Wan video models: rollout, score, train, with immutable files in between.",
    epilog="Begin with:  rushes init runs/first --preset words && rushes loop runs/first --iterations 2",
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory", show_default=False)]
Iteration = Annotated[int | None, typer.Option(help="iteration to work on; the first unfinished one when absent")]
Sets = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change a value of run.toml")]
WorkerOf = Annotated[str, typer.Option("--worker", metavar="I/N", help="take part I of N (0-based) of the shards")]


def say(text: str) -> None:
    """Talk goes to stderr; stdout is data."""
    print(text, file=sys.stderr, flush=True)


# --- Commands --------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  rushes init runs/signs --preset words --set rollout.seed=1")
def init(
    run: RunPath,
    preset: Annotated[str, typer.Option(help="what to begin from; see the README for the list")] = "words",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Make a run directory with its run.toml, from a preset."""
    from shards.config import apply_sets, parse_config, read_preset
    from shards.run import Run

    values = apply_sets(read_preset(preset), sets)
    created = Run.create(run, parse_config(values, f"preset {preset}"))
    say(f"{created.path / 'run.toml'}: written from preset {preset}; read it, change what you like")
    say(f"next: rushes loop {run} --iterations 10")


@app.command(epilog="Example:  rushes rollout runs/signs --iteration 0")
def rollout(run: RunPath, iteration: Iteration = None, worker: WorkerOf = "", sets: Sets = []) -> None:  # noqa: B006
    """Sample the shards of an iteration that do not exist yet."""
    opened = open_run(run, sets)
    do_rollout(opened, opened.iteration(next_iteration(opened) if iteration is None else iteration), None, worker)


@app.command(epilog="Example:  rushes score runs/signs --iteration 0 --reward ocr=1.0")
def score(
    run: RunPath,
    iteration: Iteration = None,
    reward: Annotated[list[str], typer.Option(metavar="NAME[=WEIGHT]", help="instead of the rewards in run.toml")] = [],  # noqa: B006
    advantages_only: Annotated[bool, typer.Option(help="combine stored rewards again; load no model")] = False,
    worker: WorkerOf = "",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Watch the videos, write rewards, then group advantages."""
    opened = open_run(run, [*sets, *reward_settings(reward)])
    stage = opened.iteration(next_iteration(opened) if iteration is None else iteration)
    do_score(opened, stage, worker, advantages_only)


@app.command(epilog="Example:  rushes train runs/signs --iteration 0")
def train(run: RunPath, iteration: Iteration = None, sets: Sets = []) -> None:  # noqa: B006
    """Prove that the shards replay exactly, then update the policy."""
    opened = open_run(run, sets)
    do_train(opened, next_iteration(opened) if iteration is None else iteration, None)


@app.command(epilog="Example:  rushes loop runs/signs --iterations 10")
def loop(
    run: RunPath,
    iterations: Annotated[int, typer.Option(help="iterations the run shall have when this ends", show_default=False)],
    sets: Sets = [],  # noqa: B006
) -> None:
    """Rollout, score and train in turn, with the models kept in memory and the same files in between."""
    if iterations < 1:
        raise UserError(f"--iterations {iterations}: nothing to do", "ask for at least one")
    opened = open_run(run, sets)
    policy = load_policy(opened)
    for k in range(iterations):
        stage = opened.iteration(k)
        do_rollout(opened, stage, policy, "")
        do_score(opened, stage, "", False)
        do_train(opened, k, policy)


@app.command(name="eval", epilog="Example:  rushes eval runs/signs --iteration 0 --iteration 10")
def evaluate(
    run: RunPath,
    iteration: Annotated[
        list[int],
        typer.Option(help="policies to evaluate: 0 is the base, K the one after K iterations; first and last"),
    ] = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
) -> None:
    """Fixed prompts and seeds through a deterministic sampler: the number that counts."""
    opened = open_run(run, sets)
    chosen = sorted(set(iteration)) or sorted({0, next_iteration(opened)})
    policy = None if evaluated(opened, chosen) else load_policy(opened)
    rows = []
    for k in chosen:
        stage = opened.evaluation(k)
        do_rollout(opened, stage, policy, "")
        rows.append({"iteration": k, **do_score(opened, stage, "", False)})
    print_evaluation(rows)


@app.command(epilog="Example:  rushes inspect runs/signs --where 'reward < 0.5' --sort reward --format csv")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run directory", show_default=False)],
    iteration: Annotated[int | None, typer.Option(help="only this iteration")] = None,
    where: Annotated[str, typer.Option(help="pandas query, for example 'reward < 0.5'")] = "",
    sort: Annotated[str, typer.Option(help="column to sort by; -column for descending")] = "",
    columns: Annotated[str, typer.Option(help="columns to show, separated by commas")] = "",
    group_by: Annotated[str, typer.Option(help="column to group by, for example prompt: count, mean, spread")] = "",
    format: Annotated[str, typer.Option(help="table, csv, json or parquet (the last needs --out)")] = "table",
    out: Annotated[Path | None, typer.Option(help="write here instead of to the terminal")] = None,
) -> None:
    """Show samples, scores and advantages as one table."""
    from shards import table

    frame = table.select(table.samples(path, iteration), where, sort, columns, group_by)
    table.emit(frame, format, out, sys.stdout)


@app.command(epilog="Example:  rushes verify runs/signs --replay")
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run, a stage or one shard", show_default=False)],
    replay: Annotated[bool, typer.Option(help="also prove that the policy gives the stored log-probs")] = False,
) -> None:
    """Check every published file; with --replay prove the shards against the policy that made them."""
    from shards.verify import verify as verify_files

    problems = verify_files(path)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{path}: {len(problems)} problems", "delete what is damaged and run the stage again")
    say(f"{path}: everything published is whole")
    if replay:
        prove(path)


# --- What the commands share -----------------------------------------------------------------------------------------


def open_run(path: Path, sets: list[str]) -> Run:
    """Open a run directory, with the values of this call laid over its run.toml."""
    from shards.run import Run

    return Run.open(path, sets)


def next_iteration(run: Run) -> int:
    """The first iteration that has no finished policy."""
    k = 0
    while run.iteration(k).trained():
        k += 1
    return k


def load_policy(run: Run) -> Policy:
    """The model of a run, to be kept over several stages."""
    from rollout.policy import Policy

    model = run.config.model
    return Policy.load(
        model.path, dtype=model.dtype, device=model.device, text_length=model.text_length, lora=model.lora
    )


def do_rollout(run: Run, stage: Stage, policy: Policy | None, worker: str) -> None:
    """Sample what is missing of one stage and say what happened."""
    from rollout.generate import rollout as run_rollout

    with progress(f"{stage.name} rollout") as report:
        result = run_rollout(run, stage, policy, report, worker_of(worker))
    say(f"{stage.name} rollout: {result}")


def do_score(run: Run, stage: Stage, worker: str, advantages_only: bool) -> dict[str, Any]:
    """Score what is missing of one stage, say what happened, and give the summary of its rewards, if all are there."""
    from score.run import score as run_score

    with progress(f"{stage.name} score") as report:
        result = run_score(run, stage, advantages_only=advantages_only, progress=report, worker=worker_of(worker))
    say(f"{stage.name} score: {result}")
    return result.summary or {}


def do_train(run: Run, iteration: int, policy: Policy | None) -> None:
    """Train one iteration and say what happened."""
    from train.run import train as run_train

    with progress(f"iter-{iteration:04d} train") as report:
        result = run_train(run, iteration, policy, report)
    say(f"iter-{iteration:04d} train: {result}")


def reward_settings(rewards: list[str]) -> list[str]:
    """Settings that stand for the --reward options of a call."""
    if not rewards:
        return []
    weights = []
    for reward in rewards:
        name, _, weight = reward.partition("=")
        try:
            weights.append(f'"{name}" = {float(weight or 1.0)}')
        except ValueError:
            raise UserError(f"--reward {reward}: the weight is no number", "for example --reward ocr=0.5") from None
    return [f"score.rewards={{ {', '.join(weights)} }}"]


def worker_of(text: str) -> tuple[int, int]:
    """The part of the work to take: --worker, else the array task of SLURM, else all of it."""
    if not text and "SLURM_ARRAY_TASK_ID" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        text = f"{int(os.environ['SLURM_ARRAY_TASK_ID']) - first}/{os.environ.get('SLURM_ARRAY_TASK_COUNT', '1')}"
    try:
        part, count = (int(piece) for piece in (text or "0/1").split("/"))
    except ValueError:
        raise UserError(f"--worker {text}: not of the form I/N", "for example --worker 0/4") from None
    if not 0 <= part < count:
        raise UserError(f"--worker {text}: {part} is not between 0 and {count - 1}", "workers count from 0")
    return part, count


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A progress bar on a terminal, a line now and then in a log."""
    from shards.progress import show

    with show(label) as report:
        yield report


def evaluated(run: Run, iterations: list[int]) -> bool:
    """Whether every one of these evaluations has all its videos, so that no model needs to be loaded."""
    stages = [run.evaluation(k) for k in iterations]
    return all(stage.plan() and len(stage.shards()) == stage.expected() for stage in stages)


def print_evaluation(rows: list[dict[str, Any]]) -> None:
    """One line a policy on stdout: the mean reward with its standard error, and the change against the first."""
    print(f"{'iteration':>9}  {'videos':>6}  {'reward':>7}  {'± s.e.':>7}  {'change':>7}")
    for row in rows:
        mean, error = row["mean_reward"], row["std_reward"] / row["samples"] ** 0.5
        numbers = f"{mean:7.4f}  {error:7.4f}  {mean - rows[0]['mean_reward']:+7.4f}"
        print(f"{row['iteration']:>9}  {row['samples']:>6}  {numbers}")


def prove(path: Path) -> None:
    """Replay every finished iteration of a run with the policy that made it; raises RunFailed where one differs."""
    from train.run import prove_iteration

    run = open_run(path, [])
    policy = load_policy(run)
    for k in run.iterations():
        with progress(f"iter-{k:04d} replay") as report:
            worst = prove_iteration(run, k, policy, report)
        say(f"iter-{k:04d} replay: largest |log-ratio| {worst:.3g}")


def main() -> None:
    """Run the command line; one line and an exit code for everything that goes wrong."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except UserError as error:
        if debug:
            raise
        say(f"rushes: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
