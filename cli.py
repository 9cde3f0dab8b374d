"""The command line: parses, calls one function, prints the result. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shards.errors import RunFailed, StillBusy, UserError

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
def rollout(
    run: RunPath,
    iteration: Iteration = None,
    dry_run: Annotated[bool, typer.Option(help="print the plan as a table; load and write nothing")] = False,
    worker: WorkerOf = "",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Sample the shards of an iteration that do not exist yet."""
    opened = open_run(run, sets)
    stage = opened.iteration(next_iteration(opened) if iteration is None else iteration)
    if not dry_run:
        return do_rollout(opened, stage, None, worker)
    from rollout.preview import preview

    print(preview(opened, stage))


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
def train(
    run: RunPath,
    iteration: Iteration = None,
    advantage: Annotated[
        str, typer.Option(metavar="SPEC8", help="advantages to train on, when several specifications were computed")
    ] = "",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Prove that the shards replay exactly, then update the policy."""
    opened = open_run(run, sets)
    do_train(opened, next_iteration(opened) if iteration is None else iteration, None, advantage)


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
    policy = load_policy(opened) if next_iteration(opened) < iterations else None
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


@app.command(epilog="Example:  rushes judge clip.mp4 --prompt 'a sign that says \"OPEN\"' --reward ocr --reward motion")
def judge(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO…", help="video files", show_default=False)],
    reward: Annotated[
        list[str],
        typer.Option(metavar="NAME[:OPTION=VALUE,…]", help="a reward; as many as you like", show_default=False),
    ],
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="once for all videos, or once for each", show_default=False)
    ],
    target: Annotated[
        list[str], typer.Option(metavar="TEXT", help="text that the video should show, likewise; else the quoted one")
    ] = [],  # noqa: B006
) -> None:
    """Score video files outside a run: one JSON line a video on stdout, with all a reward says of it."""
    import json

    from score.judge import judge as judge_files

    missing = 0
    for record in judge_files(videos, prompt, reward, target):
        print(json.dumps(record, ensure_ascii=False), flush=True)
        missing += sum(verdict["status"] != "ok" for verdict in record["rewards"])
    if missing:
        raise RunFailed(f"{missing} scores are missing", "`status` on their lines says why")


@app.command(
    epilog="Example:  rushes inspect runs/signs --where 'reward < 0.5' --sort reward --format csv  or  "
    "rushes inspect runs/signs i000003-p000017-s05"
)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run directory", show_default=False)],
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="one sample in full, its frames as PNG files")] = "",
    iteration: Annotated[int | None, typer.Option(help="only this iteration")] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="the evaluations instead of the rollouts")] = False,
    where: Annotated[str, typer.Option(help="pandas query, for example 'reward < 0.5 and ocr.exact > 0'")] = "",
    sort: Annotated[str, typer.Option(help="columns to sort by; -column for descending")] = "",
    columns: Annotated[str, typer.Option(help="columns to show, separated by commas")] = "",
    group_by: Annotated[str, typer.Option(help="columns to group by, for example prompt: count, mean, spread")] = "",
    format: Annotated[str, typer.Option(help="table, csv, json, jsonl or parquet (the last needs --out)")] = "table",
    out: Annotated[Path | None, typer.Option(help="write here instead of to the terminal")] = None,
    frames: Annotated[Path | None, typer.Option(help="with KEY: folder of the frames, else RUN/frames/KEY")] = None,
) -> None:
    """Show samples, scores and advantages as one table, or one sample in full."""
    from shards import query, sample, table

    if key:
        if where or sort or columns or group_by or out or format not in ("table", "json"):
            raise UserError(
                f"{key} is one sample, not a table", "with KEY there are --eval, --frames and --format json"
            )
        text = sample.show(path, key, format, evaluation)
        written = sample.write_frames(path, key, frames, evaluation)
        print(text, end="")
        say(f"{written[0].parent}: {len(written)} frames")
        return
    if frames:
        raise UserError("--frames needs the KEY of a sample", "`rushes inspect RUN --columns key` lists the keys")
    found = query.of_kind(table.samples(path, iteration), evaluation)
    query.emit(query.select(found, where, sort, columns, group_by), format, out, sys.stdout)


@app.command(epilog="Example:  rushes report runs/signs && xdg-open runs/signs/report/index.html")
def report(
    run: RunPath,
    megabytes: Annotated[float, typer.Option(help="most that clips may take; the page says what was left out")] = 48.0,
    tensorboard: Annotated[bool, typer.Option(help="also write rewards and guards for TensorBoard")] = False,
) -> None:
    """Make RUN/report/index.html: curves, clips, guards and costs in one file that needs no network."""
    from shards.report import write_report

    opened = open_run(run, [])
    path = write_report(opened, megabytes)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if tensorboard:
        from shards.board import write_board

        write_board(opened)
        say(f"show them with: tensorboard --logdir {run}")


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
    damaged = sum(problem.kind == "damaged" for problem in problems)
    if damaged:
        raise RunFailed(f"{path}: {damaged} damaged files", "delete what is damaged and run its stage again")
    say(f"{path}: everything published is whole")
    if replay:
        prove(path)


@app.command(epilog="Example:  rushes export runs/signs --out exports/signs")
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder to be made, with a model card in it", show_default=False)],
    iteration: Annotated[int | None, typer.Option(help="export the policy this iteration trained; the last")] = None,
    average: Annotated[bool, typer.Option(help="the averaged weights, where training kept them")] = True,
    fuse: Annotated[bool, typer.Option(help="whole weights as a plain pipeline folder, instead of LoRA")] = False,
) -> None:
    """Write the policy as plain diffusers loads it, and prove it by loading it back."""
    from rollout.export import export as run_export

    opened = open_run(run, [])
    last = max(next_iteration(opened) - 1, 0)
    say(f"export: {run_export(opened, last if iteration is None else iteration, out, average=average, fuse=fuse)}")


@app.command(name="plan-memory", epilog="Example:  rushes plan-memory runs/signs --set rollout.frames=81")
def plan_memory(run: RunPath, sets: Sets = []) -> None:  # noqa: B006
    """Print what each stage will need for this model and shape, from configuration files alone."""
    from rollout.memory import plan_memory as needs
    from rollout.memory import render

    opened = open_run(run, sets)
    print(render(opened, needs(opened)))


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

    return Policy.of(run.config.model)


def do_rollout(run: Run, stage: Stage, policy: Policy | None, worker: str) -> None:
    """Sample what is missing of one stage and say what happened."""
    from rollout.generate import rollout as run_rollout

    with progress(f"{stage.name} rollout") as report:
        result = run_rollout(run, stage, policy, report, worker_of(worker))
    say(f"{stage.name} rollout: {result}")
    if result.busy:
        raise StillBusy(f"{stage.name}: other workers still hold {result.busy} shards", "nothing is left to claim")


def do_score(run: Run, stage: Stage, worker: str, advantages_only: bool) -> dict[str, Any]:
    """Score what is missing of one stage, say what happened, and give the summary of its rewards, if all are there."""
    from score.run import score as run_score

    with progress(f"{stage.name} score") as report:
        result = run_score(run, stage, advantages_only=advantages_only, progress=report, worker=worker_of(worker))
    say(f"{stage.name} score: {result}")
    return result.summary or {}


def do_train(run: Run, iteration: int, policy: Policy | None, advantage: str = "") -> None:
    """Train one iteration and say what happened."""
    from train.run import train as run_train

    with progress(f"iter-{iteration:04d} train") as report:
        result = run_train(run, iteration, policy, report, advantage)
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
