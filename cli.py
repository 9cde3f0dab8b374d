"""The command line: parses, calls one function, prints the result. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from shards.errors import RunFailed, StillBusy, UserError
from shards.process.progress import counted, show
from shards.process.signals import INTERRUPTED, check, stoppable
from shards.process.torchrun import is_first, rank, run_to_end, world_size
from shards.store.urls import in_shell, shown
from shards.text.visible import visible
from shards.workers.assignment import ALL, Assignment

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.run import RolloutReport
    from score.run import ScoreReport
    from shards.run import Run, Stage
    from shards.run_toml import Setting
    from train.replay import Replayed

UNLIKELY = 2.0  # seconds after which torchrun has ended all ranks, if the first one failed
LONGEST_PAUSE = 1e9  # seconds; the system's sleep takes no number much larger
Misuse: type[Exception] = typer.BadParameter.__mro__[1]  # the usage error of whichever click this typer was built on

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Offline GRPO post-training for Wan video models: rollout, score, train, with immutable files in between.",
    epilog="Begin with:  rushes init runs/first --preset words && rushes loop runs/first --iterations 2",
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory", show_default=False)]
Iteration = Annotated[int | None, typer.Option(min=0, help="iteration to work on; the first unfinished one if absent")]
Sets = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="another value than run.toml has")]
REWARD = "NAME[=WEIGHT][:OPTION=VALUE,…]"
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else there")]
WorkerOf = Annotated[
    str,
    typer.Option(
        "--worker", metavar="I/N", help="begin with part I of N (0-based) of the shards; exit code 3: nothing was left"
    ),
]
Barrier = Callable[[], None]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="stay until others have finished their shards, instead of ending with exit code 75"),
]


def say(text: str) -> None:
    """Talk goes to stderr; stdout is data. Of several ranks only the first one talks."""
    if is_first():
        print(visible(shown(text)), file=sys.stderr, flush=True)


def version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from shards.process.versions import our_version

        print(f"rushes {our_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="print it")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; anywhere")] = False,
) -> None:
    """Options before the command."""


# --- Commands --------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  rushes init runs/signs --preset words --set rollout.seed=1")
def init(
    run: RunPath,
    preset: Annotated[
        str,
        typer.Option(
            help="words, wan21-1.3b, wan21-14b, wan22-a14b, wan22-i2v or wan22-ti2v-5b",
            autocompletion=lambda incomplete: beginning(incomplete),
        ),
    ] = "words",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Make a run directory with its run.toml, from a preset."""
    from rollout.prompts.chosen import check_files
    from score.tables import select
    from shards.absolute_paths import in_full
    from shards.presets.evidence import EVIDENCE
    from shards.run import Run
    from shards.run_toml import apply_sets, parse_config, read_preset
    from shards.settings.trust import named_by, own_files, trust
    from train.objectives.settings import check_settings

    values, said = in_full(apply_sets(read_preset(preset), sets))
    config = parse_config(values, f"preset {preset}")
    check_settings(config)
    select(config.score, content=False)  # files that its options name may lie on another machine
    if config.model.attention != "auto":  # what has no such name needs no look at diffusers
        from rollout.policy.kernels.arithmetic import arithmetic_of

        arithmetic_of(config)
    check_files(config)
    created = Run.create(run, config)
    said += [f"trusted: {file} (sha256 {trust(file)[:12]}…)" for file in own_files(named_by(sets))]
    done = f"written from preset {preset}" if created.is_new else "is there already, with the same values"
    say(f"{created.config_path}: {done}; read it, change what you like")
    say(f"preset {preset}: {EVIDENCE[preset]}")
    for sentence in said:
        say(sentence)
    say(f"next: rushes loop {in_shell(run)} --iterations 10")


@app.command(epilog="Example:  rushes rollout runs/signs --iteration 0")
@stoppable()
def rollout(
    run: RunPath,
    iteration: Iteration = None,
    dry_run: Annotated[bool, typer.Option(help="print the plan as a table; load and write nothing")] = False,
    worker: WorkerOf = "",
    wait: Wait = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Sample the shards of an iteration that do not exist yet."""
    from score.tables import select
    from train.objectives.settings import check_settings

    opened = open_run(run, sets)
    stage = stage_of(opened, iteration)
    # what cannot be trained, or not be scored, is better refused before it is sampled
    check_settings(opened.config)
    check_rewards(opened)
    select(opened.config.score, content=False)
    if not dry_run:
        warn(opened, stage, "rollout")
        assignment = Assignment.of(worker, wait)
        import_for_helpers(opened, sampling=not stage.is_complete())
        with ranks(opened):
            report = do_rollout(opened, stage, None, assignment)
        return assignment.end(report.done == 0, f"{stage.name} rollout")
    from rollout.preview import preview

    print(preview(opened, stage))


@app.command(epilog="Example:  rushes score runs/signs --iteration 0 --reward ocr=1.0")
@stoppable()
def score(
    run: RunPath,
    iteration: Iteration = None,
    reward: Annotated[list[str], typer.Option(metavar=REWARD, help="instead of the rewards in run.toml; many")] = [],  # noqa: B006
    advantages_only: Annotated[bool, typer.Option(help="combine stored rewards again; load no model")] = False,
    worker: WorkerOf = "",
    wait: Wait = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Watch the videos, write rewards, then group advantages."""
    from score.catalogue.argument import reward_settings

    opened = open_run(run, [*sets, *reward_settings(reward)])
    stage = stage_of(opened, iteration)
    assignment = Assignment.of(worker, wait)
    warn(opened, stage, "score", advantages_only)
    import_for_helpers(opened, scoring=not advantages_only)
    with ranks(opened) as barrier:
        report = do_score(opened, stage, assignment, barrier, advantages_only)
    assignment.end(report.nothing_done, f"{stage.name} score")


@app.command(epilog="Example:  rushes train runs/signs --iteration 0")
@stoppable()
def train(
    run: RunPath,
    iteration: Iteration = None,
    advantage: Annotated[
        str, typer.Option(metavar="NAME", help="a folder in iter-*/advantage, when there are several")
    ] = "",
    expert: Annotated[
        str, typer.Option(metavar="NAME", help="high_noise or low_noise alone; the last to finish publishes")
    ] = "",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Prove that the shards replay exactly, then update the policy."""
    opened = open_run(run, sets)
    stage = stage_of(opened, iteration)
    warn(opened, stage, "train")
    import_for_helpers(opened, sampling=not stage.trained() and not expert)
    with ranks(opened):
        do_train(opened, stage.iteration, None, advantage, expert)


@app.command(
    short_help="Rollout, score and train in turn, N iterations.",
    epilog="Example:  rushes loop runs/signs --iterations 10",
)
@stoppable()
def loop(
    run: RunPath,
    iterations: Annotated[int, typer.Option(help="number of iterations in the run when this ends", show_default=False)],
    wait: Wait = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Rollout, score and train in turn, with the models kept in memory and the same files in between.

    Under torchrun all ranks sample and score together, and train one policy.
    """
    if iterations < 1:
        raise UserError(f"--iterations {iterations}: nothing to do", "ask for at least one")
    opened = open_run(run, sets)
    with ranks(opened) as barrier:
        first = stage_of(opened)
        warn(opened, first, "loop")
        policy = None
        if first.iteration < iterations:
            import_for_helpers(opened, sampling=True, scoring=True)
            policy = load_policy(opened, first)
        for k in range(iterations):
            stage = opened.iteration(k)
            do_rollout(opened, stage, policy, Assignment.of("", wait))
            do_score(opened, stage, Assignment.of("", wait), barrier)
            do_train(opened, k, policy)
            barrier()
    say(what_next(opened))


@app.command(
    short_help="Fixed prompts and seeds: the number that counts.",
    name="eval",
    epilog="Example:  rushes eval runs/signs --iteration 0 --iteration 10",
)
@stoppable()
def evaluate(
    run: RunPath,
    iteration: Annotated[
        list[int],
        typer.Option(min=0, help="0 is the base, K the policy after K iterations; first and last if absent"),
    ] = [],  # noqa: B006
    wait: Wait = False,
    as_json: AsJson = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Fixed prompts and seeds through a deterministic sampler: the number that counts."""
    opened = open_run(run, sets)
    chosen = sorted(set(iteration)) or sorted({0, opened.next_iteration()})
    stages = [opened.evaluation(k) for k in chosen]
    with ranks(opened) as barrier:
        complete = all(stage.is_complete() for stage in stages)
        import_for_helpers(opened, sampling=not complete, scoring=True)
        policy = None if complete else load_policy(opened, stages[0])
        for stage in stages:
            warn(opened, stage, "eval")
            do_rollout(opened, stage, policy, Assignment.of("", wait))
            scored = do_score(opened, stage, Assignment.of("", wait), barrier)
    if is_first():
        from shards.report.paired import evaluated, evaluation_table

        rows = evaluated(stages, scored.advantages)
        if as_json:
            print_json({"run": shown(str(opened.path)), "policies": [asdict(row) for row in rows]})
        else:
            print(evaluation_table(rows))


@app.command(
    short_help="Score video files outside a run, as JSON lines.",
    epilog="Example:  rushes judge clip.mp4 --prompt 'a sign that says \"OPEN\"' --reward ocr --reward motion",
)
def judge(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO…", help="video files", show_default=False)],
    reward: Annotated[
        list[str],
        typer.Option(metavar=REWARD, help="a reward, without a weight here; as many as you like", show_default=False),
    ],
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="once for all videos, or once for each", show_default=False)
    ],
    target: Annotated[
        list[str], typer.Option(metavar="TEXT", help="text that the video should show, likewise; else the quoted one")
    ] = [],  # noqa: B006
    max_frames: Annotated[int, typer.Option(min=1, help="the most frames of a video")] = 1000,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="the most megapixels of all its frames; of one frame a 32nd of that")
    ] = 128,
) -> None:
    """Score video files outside a run: one JSON line a video on stdout, with all a reward says of it."""
    from score.judge import json_line
    from score.judge import judge as judge_files
    from shards.video import VideoLimits

    missing = 0
    for record in judge_files(videos, prompt, reward, target, VideoLimits.of_foreign(max_frames, max_megapixels)):
        print(json_line(record, sys.stdout.encoding), flush=True)
        missing += sum(verdict["status"] != "ok" for verdict in record["rewards"])
    if missing:
        raise RunFailed(f"{missing} score{'s are' if missing > 1 else ' is'} missing", "`status` in the lines says why")


@app.command(
    short_help="What rewards there are, with options and defaults.",
    epilog="Example:  rushes rewards ocr  or  rushes rewards colour.py:Colourful",
)
def rewards(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="one reward, with all that its source says")] = "",
    as_json: AsJson = False,
) -> None:
    """List the rewards with their components, options and defaults. Nothing of them is loaded."""
    from score.catalogue.listing import describe_reward, every_reward, render_listing

    found = [describe_reward(name)] if name else every_reward()
    if as_json:
        print_json([asdict(entry) for entry in found])
    else:
        print(render_listing(found, whole=bool(name)))


@app.command(
    short_help="Samples, scores and advantages as a table; one sample in full.",
    epilog="Example:  rushes inspect runs/signs --where 'reward < 0.5' --sort reward --format csv  or  "
    "rushes inspect runs/signs i000003-p000017-s05",
)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run, a stage or one shard", show_default=False)],
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="one sample in full, its frames as PNG files")] = "",
    iteration: Annotated[int | None, typer.Option(min=0, help="only this iteration")] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="the evaluations instead of the rollouts")] = False,
    where: Annotated[str, typer.Option(help="pandas query, for example 'reward < 0.5 and ocr.exact > 0'")] = "",
    sort: Annotated[str, typer.Option(help="columns to sort by; -column for descending")] = "",
    columns: Annotated[str, typer.Option(help="columns to show, separated by commas")] = "",
    group_by: Annotated[str, typer.Option(help="columns to group by, for example prompt: count, mean, spread")] = "",
    format: Annotated[
        str,
        typer.Option(
            help="table, csv, json, jsonl or parquet (the last needs --out); csv has texts as they are, also those "
            "that a spreadsheet takes for a formula: import them as text"
        ),
    ] = "table",
    out: Annotated[Path | None, typer.Option(help="write here instead of to the terminal")] = None,
    frames: Annotated[Path | None, typer.Option(help="with KEY: folder of the frames, else RUN/frames/KEY")] = None,
    video: Annotated[Path | None, typer.Option(help="with KEY: write its mp4 here; frames only with --frames")] = None,
) -> None:
    """Show samples, scores and advantages as one table, or one sample in full."""
    from shards.inspect import query, sample, table

    if key:
        if where or sort or columns or group_by or out or format not in ("table", "json"):
            raise UserError(
                f"{key} is one sample, not a table", "with KEY there are --eval, --frames, --video and --format json"
            )
        print(sample.show(path, key, format, evaluation), end="", flush=True)
        if video:
            query.write_out(video, sample.read_video(path, key, evaluation))
            say(f"{video}: {video.stat().st_size} bytes" if video.is_file() else f"{video}: written")
            if not frames:
                return
        try:
            written = sample.write_frames(path, key, frames, evaluation)
        except RunFailed as error:  # a run that may only be read, above all
            raise RunFailed(error.problem, "--frames FOLDER writes them elsewhere") from error
        say(f"{written[0].parent}: {len(written)} frames")
        return
    if frames or video:
        option = "--frames" if frames else "--video"
        raise UserError(f"{option} needs the KEY of a sample", "`rushes inspect RUN --columns key` lists the keys")
    found = query.of_kind(table.samples(path, iteration), evaluation)
    query.emit(query.select(found, where, sort, columns, group_by), format, out, sys.stdout, fit=not columns)


@app.command(
    short_help="What is done, claimed and left, and who is at work.",
    epilog="Example:  rushes status runs/signs --watch 10",
)
def status(
    run: RunPath,
    iteration: Annotated[int | None, typer.Option(min=0, help="only this iteration; else what is not finished")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="look at the claims of workers only once")] = False,
    watch: Annotated[float, typer.Option(metavar="SECONDS", help="again and again, with this pause; 0: once")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show what is done, claimed and left of each stage, how fast it goes, and which workers are alive."""
    import json

    from shards.process.progress import in_place, terminal_width
    from shards.workers.status import render
    from shards.workers.status import status as look

    if not 0 <= watch <= LONGEST_PAUSE:  # nor a NaN
        raise UserError(f"--watch {watch:g}: no pause in seconds", "for example --watch 10; 0 looks once")
    opened = open_run(run, [])
    redraw = bool(watch) and not as_json and sys.stdout.isatty()
    while True:
        found = look(opened, iteration, quick)
        text = json.dumps(found.as_dict()) if as_json else render(found, width=terminal_width())
        text = visible(text)
        print(in_place(text, watch) if redraw else text, flush=True)
        if not watch:
            return
        time.sleep(watch)


@app.command(
    short_help="One HTML page: curves, clips, guards and costs.",
    epilog="Example:  rushes report runs/signs && xdg-open runs/signs/report/index.html",
)
def report(
    run: RunPath,
    watch: Annotated[
        bool, typer.Option("--watch", help="write nothing, but serve a page that follows the run, for this machine")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="with --watch: of 127.0.0.1; 0: any that is free")] = 0,
    megabytes: Annotated[float, typer.Option(help="most that clips may take; the page says what was left out")] = 48.0,
    tensorboard: Annotated[bool, typer.Option(help="also write rewards, guards and clips for TensorBoard")] = False,
    wandb: Annotated[bool, typer.Option(help="also log them to Weights & Biases, where that is installed")] = False,
) -> None:
    """Make RUN/report/index.html: curves, clips, guards and costs in one file that needs no network."""
    from shards.report.page import write_report

    opened = open_run(run, [])
    if watch:
        return follow(opened, megabytes, port)
    path = write_report(opened, megabytes)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if tensorboard:
        from shards.report.trackers import write_board

        write_board(opened)
        say(f"show them with: tensorboard --logdir {in_shell(run)}")
    if wandb:
        from shards.report.trackers import send_wandb

        say(f"Weights & Biases: {send_wandb(opened)}")


@app.command(
    short_help="Runs side by side: settings that differ, curves.",
    epilog="Example:  rushes compare runs/signs runs/other --page compared.html",
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="two to six runs", show_default=False)],
    page: Annotated[Path | None, typer.Option(help="also write an HTML page, with the same clips of each")] = None,
    megabytes: Annotated[float, typer.Option(min=0, help="most that clips may take in the page")] = 48.0,
    as_json: AsJson = False,
) -> None:
    """Show the settings that differ and the rewards of some runs, paired where they evaluated alike."""
    from shards.compare.runs import compare_runs
    from shards.compare.terminal import text_of
    from shards.process.progress import terminal_width

    found = compare_runs(runs)
    if page is not None:
        from shards.compare.page import write_comparison

        say(f"{write_comparison(found, page, megabytes)}: open it in a browser")
    if as_json:
        print_json(found.as_dict())
    else:
        print(visible(text_of(found, terminal_width())))


@app.command(
    short_help="Check every file; --replay proves the log-probs.", epilog="Example:  rushes verify runs/signs --replay"
)
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run, a stage or one shard", show_default=False)],
    replay: Annotated[
        bool, typer.Option(help="of a run: also prove that its policies give the stored log-probs")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every published file; with --replay prove the shards against the policy that made them."""
    from shards.verify.shards import verify as verify_files

    run = open_run(path, []) if replay else None
    problems = verify_files(path)
    record: dict[str, object] = {"path": shown(str(path)), "problems": [asdict(problem) for problem in problems]}
    for problem in problems if not as_json else ():
        print(problem, flush=True)  # before what is said on stderr, wherever the two come together
    try:
        damaged = sum(problem.kind == "damaged" for problem in problems)
        if damaged:
            raise RunFailed(f"{path}: {counted(damaged, 'fault')}", "each line says what to do about it")
        say(f"{path}: everything published is whole")
        if run is not None:
            found = prove(run)
            record["replay"] = {k: one.largest for k, one in found.items()}
            record["replay_steps"] = {k: [asdict(step) for step in one.per_step] for k, one in found.items()}
    finally:
        if as_json:
            print_json(record)


@app.command(
    short_help="From a mean reward back to its videos, seeds and weights.",
    epilog="Example:  rushes audit runs/signs --number eval/iter-0024",
)
def audit(
    run: RunPath,
    number: Annotated[
        str, typer.Option(metavar="STAGE", help="whose mean reward, like iter-0003; the last evaluation if absent")
    ] = "",
    advantage: Annotated[
        str, typer.Option(metavar="NAME", help="a folder in STAGE/advantage, when there are several")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Follow a mean reward back through advantages, scores, videos, seeds and policies to the base model.

    Means, advantages and hashes are computed again, and every file on the way is read. Exit code 1 when something does
    not fit.
    """
    from score.audit.chain import chain_of, chain_sha256
    from score.audit.show import render_chain

    opened = open_run(run, [])
    links = chain_of(opened, named_stage(opened, number), advantage, lambda name: say(f"{name}: reading its files"))
    faults = [fault for link in links for fault in link.faults]
    if as_json:
        print_json({"links": [asdict(link) for link in links], "sha256": chain_sha256(links)})
    else:
        print(render_chain(links), flush=True)
    if faults:
        raise RunFailed(f"{shown(str(opened.path))}: {counted(len(faults), 'fault')} in this chain", faults[0])


@app.command(
    short_help="Let runs use a reward or tracker in a file of your own.",
    epilog="Example:  rushes trust colour.py",
)
def trust(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Python files of rewards or trackers", show_default=False)
    ],
) -> None:
    """Trust Python files as they are now, so that a run.toml that names a class in them may run it.

    Trust ends when the file changes. `rushes init` trusts the files that its own --set names.
    """
    from shards.settings.trust import trust as trust_file

    for file in files:
        say(f"trusted: {file.resolve()} (sha256 {trust_file(file)[:12]}…)")


@app.command(
    short_help="Make a stored sample again from its seeds, and compare.",
    epilog="Example:  rushes regenerate runs/signs i000003-p000017-s05 --video again.mp4",
)
def regenerate(
    run: RunPath,
    key: Annotated[str, typer.Argument(metavar="KEY", help="of a stored sample", show_default=False)],
    evaluation: Annotated[bool, typer.Option("--eval", help="of an evaluation instead of a rollout")] = False,
    video: Annotated[Path | None, typer.Option(help="write the video made again to this mp4 file")] = None,
    within: Annotated[
        float, typer.Option(min=0.0, help="largest difference allowed; on another device numbers round otherwise")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make a stored sample again from its seeds alone, and compare record, tensors and video bit for bit.

    Exit code 1 when a part differs by more than --within. With --within the video is not compared: one pixel that
    rounds otherwise changes the file.
    """
    from rollout.run import compare_with_stored
    from rollout.run import regenerate as make_again
    from shards.inspect.query import write_out
    from shards.inspect.sample import find

    opened = open_run(run, [])
    stage, shard = find(opened.path, key, evaluation)
    sample = make_again(opened, stage, key, load_policy(opened))
    if video is not None:
        write_out(video, sample.video)
    found = compare_with_stored(stage, shard, sample, exact=within == 0.0)
    if as_json:
        numbers = {name: value if isfinite(value) else None for name, value in found.differences.items()}
        print_json({"key": key, "differences": numbers, "within": within})
    if found.largest > within:
        raise RunFailed(str(found), "another device, library or model: `rushes verify` checks files and fingerprints")
    say(str(found))


@app.command(
    short_help="Write the policy as plain diffusers loads it.",
    epilog="Example:  rushes export runs/signs --out exports/signs",
)
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder to be made, with a model card in it", show_default=False)],
    iteration: Annotated[
        int | None,
        typer.Option(min=0, help="the policy after that many iterations, as in `eval`; the last one if absent"),
    ] = None,
    average: Annotated[bool, typer.Option(help="the averaged weights, where training kept them")] = True,
    fuse: Annotated[bool, typer.Option(help="whole weights as a plain pipeline folder, instead of LoRA")] = False,
    format: Annotated[
        str, typer.Option(help="keys of a LoRA: diffusers, or comfyui (Wan's own names, one file an expert)")
    ] = "diffusers",
    as_json: AsJson = False,
) -> None:
    """Write the policy as plain diffusers loads it, and prove it by loading it back."""
    from rollout.export.export import export as run_export

    opened = open_run(run, [])
    wanted = max(opened.next_iteration(), 1) if iteration is None else iteration
    report = run_export(opened, wanted, out, average=average, fuse=fuse, format=format)
    say(f"export: {report}")
    if as_json:
        print_json({**asdict(report), "path": shown(str(report.path))})


@app.command(
    short_help="What each stage will need for this model and shape.",
    name="plan-memory",
    epilog="Example:  rushes plan-memory runs/signs --ranks 8 --set rollout.frames=81",
)
def plan_memory(
    run: RunPath,
    ranks: Annotated[int, typer.Option(help="processes that train together; 0: as few as run.toml allows")] = 0,
    as_json: AsJson = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Print what each stage will need for this model and shape, from configuration files alone."""
    from rollout.memory.needs import plan_memory as needs
    from rollout.memory.needs import render

    opened = open_run(run, sets)
    found = needs(opened, ranks)
    if as_json:
        print_json({"run": shown(str(opened.path)), "stages": [asdict(need) for need in found]})
    else:
        print(render(opened, found, ranks))


@app.command(
    short_help="What this machine has of all that is needed.",
    epilog="Example:  rushes doctor runs",
)
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="where runs will be kept")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Look at what a run needs on this machine, one line each; exit code 1 when something needed is missing."""
    from shards.doctor.checks import enough, examine

    found = examine(folder)
    if as_json:
        print_json({"folder": str(folder), "enough": enough(found), "checks": [asdict(check) for check in found]})
    else:
        print("\n".join(map(str, found)))
    if not enough(found):
        missing = ", ".join(check.name for check in found if check.needed and not check.ok)
        raise RunFailed(f"a plain run cannot work here: {missing}", "each line says what to do")


# --- What the commands share -----------------------------------------------------------------------------------------


def open_run(path: Path, sets: Sequence[Setting]) -> Run:
    """Open a run directory, with the values of this call laid over its run.toml."""
    from shards.run import Run

    return Run.open(path, sets)


def stage_of(run: Run, iteration: int | None = None) -> Stage:
    """The iteration that a command works on: the first unfinished one, when none is named."""
    return run.iteration(run.next_iteration() if iteration is None else iteration)


def named_stage(run: Run, name: str) -> Stage:
    """The stage that a name like `iter-0003` or `eval/iter-0024` means; the last evaluation when there is no name."""
    stages = {stage.name: stage for stage in map(run.iteration, run.iterations())}
    stages |= {stage.name: stage for stage in map(run.evaluation, run.evaluations())}
    if not stages:
        raise UserError(f"{shown(str(run.path))} has no stages yet", f"`rushes loop {in_shell(run.path)}` makes some")
    if name and name not in stages:
        raise UserError(f"--number {name}: this run has no such stage", f"it has {', '.join(stages)}")
    return stages[name or list(stages)[-1]]


def check_rewards(run: Run) -> None:
    """UserError where run.toml names a reward in a file that this person has not trusted."""
    from shards.settings.trust import check_trust

    check_trust(run, run.config.score.rewards)


def beginning(incomplete: str) -> list[str]:
    """Presets whose names begin so, for the completion of a shell."""
    from shards.run_toml import presets

    return [name for name in presets() if name.startswith(incomplete)]


def follow(run: Run, megabytes: float, port: int) -> None:
    """Serve the report of a run until Ctrl-C."""
    from shards.report.live import served

    with served(run, megabytes, port) as server:
        host, number = server.server_address[:2]
        say(f"http://{host!s}:{number}/ shows the run as it works; Ctrl-C ends it")
        server.serve_forever()


def what_next(run: Run) -> str:
    """What to do with a run that was trained: one command a line, with its path."""
    path = shlex.quote(shown(str(run.path)))
    out = shlex.quote(f"exports/{run.path.resolve().name}")
    commands = {f"eval {path}": "first policy against last", f"report {path}": "one HTML page"}
    commands[f"export {path} --out {out}"] = "for plain diffusers"
    width = max(map(len, commands))
    lines = [f"rushes {command:<{width}}  # {what}" for command, what in commands.items()]
    return "next: " + "\n      ".join(lines)


def warn(run: Run, stage: Stage, command: str, advantages_only: bool = False) -> None:
    """Say in one line which settings have no effect on a stage."""
    from shards.settings.without_effect import without_effect

    if sentence := without_effect(run, stage, command, advantages_only):
        say(sentence)


def load_policy(run: Run, stage: Stage | None = None) -> Policy:
    """The model of a run, to be kept over several stages; what `stage` cannot be is refused before it is loaded."""
    from rollout.plan import check_stage
    from rollout.policy import Policy
    from rollout.ranks.device import share_cores
    from score.tables import select
    from train.objectives.settings import check_settings

    if stage is not None:
        check_rewards(run)
        for reward in select(run.config.score).rewards.values():  # better told before hours of sampling
            reward.check_files()
        check_settings(run.config)
        check_stage(run, stage)
    share_cores(run.config)
    return Policy.of(run.config.model)


def import_for_helpers(run: Run, *, sampling: bool = False, scoring: bool = False) -> None:
    """Have the imports of the helper processes begin now, where a command will have some."""
    from score.reward import modules_of
    from shards.process.fork_server import import_ahead

    modules = ["rollout.processes", "train.experts.at_once"] if sampling and run.config.rollout.workers > 1 else []
    if scoring and run.config.score.workers > 1:
        modules += modules_of(run.config.score.rewards)
    if modules and world_size() == 1:
        import_ahead(modules)


@stoppable()
def do_rollout(run: Run, stage: Stage, policy: Policy | None, assignment: Assignment = ALL) -> RolloutReport:
    """Sample what is missing of one stage and say what happened."""
    from rollout.processes import rollout as run_rollout

    check(f"before {stage.name} rollout")
    with show(f"{stage.name} rollout") as report:
        result = run_rollout(run, stage, policy, report, assignment.part, assignment.wait, say)
    say(f"{stage.name} rollout: {result}")
    if result.busy:
        problem = f"{stage.name}: other workers still hold {counted(result.busy, 'shard')}"
        raise StillBusy(problem, "nothing is left to claim; --wait waits")
    return result


@stoppable()
def do_score(
    run: Run, stage: Stage, assignment: Assignment = ALL, barrier: Barrier = lambda: None, advantages_only: bool = False
) -> ScoreReport:
    """Score what is missing of one stage and say what happened. Its summary is there on the first rank alone."""
    from score.run import score as run_score
    from shards.trackers.live import track_reward

    check_rewards(run)
    check(f"before {stage.name} score")
    with show(f"{stage.name} score") as report:
        result = run_score(
            run,
            stage,
            advantages_only=advantages_only,
            progress=report,
            worker=assignment.part,
            wait=assignment.wait,
            advantages=is_first(),
        )
    barrier()
    say(f"{stage.name} score: {result}")
    if result.reward:
        say(f"{stage.name} {result.reward}")
        if result.advantages_written:
            track_reward(result.reward)
    if result.pending:
        raise StillBusy(
            f"{stage.name}: {counted(len(result.pending), 'shard')} not sampled or not scored yet", "run it again later"
        )
    return result


@stoppable()
def do_train(run: Run, iteration: int, policy: Policy | None, advantage: str = "", expert: str = "") -> None:
    """Train one iteration, or one of its experts, and say what happened."""
    from train.experts.at_once import train_at_once
    from train.run import train as run_train

    if world_size() == 1:  # ranks stop together, which training sees to
        check(f"before iter-{iteration:04d} train")
    with show(f"iter-{iteration:04d} train") as report:
        if expert:
            result = run_train(run, iteration, policy, report, advantage, expert)
        else:
            result = train_at_once(run, iteration, policy, report, advantage)
    say(f"iter-{iteration:04d} train: {result}")


@contextmanager
def ranks(run: Run) -> Iterator[Barrier]:
    """Join the other ranks that torchrun started, see that all mean the same run, and give their barrier.

    Without torchrun nothing is loaded, and the barrier does nothing. Meanwhile metrics go to the run's trackers.
    """
    from shards.trackers.live import tracking

    if world_size() == 1:
        with tracking(run):
            yield lambda: None
        return
    from rollout.ranks.agreement import agree_on_run
    from train.ranks import lost_ranks

    with lost_ranks(), tracking(run):
        world = agree_on_run(run)
        yield world.barrier
        world.close()


def print_json(value: object) -> None:
    """The one document that a command with --json leaves on stdout. Its values are finite, or None."""
    import json

    print(json.dumps(value, allow_nan=False), flush=True)


def prove(run: Run) -> dict[int, Replayed]:
    """Replay every finished iteration of a run with the policy that made it, and print a table of |log-ratios|.

    Raises RunFailed where one differs.
    """
    from train.replay import prove_iteration, render_ratios

    policy, found = load_policy(run), {}
    for k in run.iterations():
        with show(f"iter-{k:04d} replay") as report:
            found[k] = prove_iteration(run, k, policy, report)
        say(f"iter-{k:04d} replay: largest |log-ratio| {found[k].largest:.3g}")
        say(render_ratios(found[k]))
    return found


def tell(error: UserError) -> None:
    """Say what was wrong. Where all ranks fail alike, the first one does, and is the end of the others in time."""
    if is_first():
        return say(f"rushes: {error}")
    time.sleep(UNLIKELY)
    print(f"rushes: rank {rank()} of {world_size()}: {error}", file=sys.stderr, flush=True)


def misused(error: Any) -> UserError:
    """A command line that cannot be read, in one sentence like every other error."""
    text = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "rushes"
    return UserError(text[0].lower() + text[1:], f"`{command} --help` shows what there is")


def main() -> None:
    """Run the command line; one line and an exit code for everything that goes wrong."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    atexit.register(gc.freeze)  # else Python looks through all of torch at its end, for seconds
    try:
        sys.exit(app(prog_name="rushes", standalone_mode=False))
    except UserError as error:
        if debug:
            traceback.print_exc()
        if not error.told:
            tell(error)
        sys.exit(error.exit_code)
    except Misuse as error:
        if not sys.argv[1:]:  # no command: the help itself
            cast(Any, error).show()
        else:
            tell(misused(error))
        sys.exit(UserError.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say("rushes: interrupted (hint: run the same command again; what was finished is kept)")
        raise
    except Exception as error:
        from shards.files import out_of_room

        failed = None if debug else out_of_room(error)
        if not debug and failed is None and isinstance(error, OSError) and error.filename:
            hint = "look at its permissions" if isinstance(error, PermissionError) else "--debug says where"
            failed = RunFailed(f"{error.filename}: {error.strerror}", hint)
        if failed is None:
            raise
        tell(failed)
        sys.exit(failed.exit_code)


def start() -> None:
    """What a shell starts: `main`, which as one of several ranks ends its process without taking Python apart."""
    if "WORLD_SIZE" in os.environ:
        run_to_end(main)
    main()


if __name__ == "__main__":
    start()
