"""The command line as a user meets it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli
from shards import sidecar
from shards.inspect import table
from shards.reader import open_shard
from shards.run import Run
from tests.support import forks
from tests.support.cost import seconds_of_processor

ROOT = Path(__file__).parents[2]
Result = subprocess.CompletedProcess[str]


def python(*arguments: str | Path, **more: str) -> Result:
    """Run the command line from a shell's point of view: a Python that starts from nothing."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", **more}  # compiled code is kept
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def rushes(*arguments: str | Path, **environment: str) -> Result:
    """Run the command line in a fork of this process, which has torch already."""
    with tempfile.TemporaryDirectory() as folder:
        child = forks.Fork(Path(folder) / "fork", forks.rushes(*arguments), **environment)
        return Result(arguments, child.wait(), child.out, child.said)


def refused(*arguments: str | Path, run: Callable[..., Result] = rushes) -> str:
    """Run a command that must be refused as bad input: exit code 2, one line on stderr, nothing on stdout."""
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("rushes: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("rushes: ")


@pytest.fixture(scope="module")
def small(tiny_t2v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny two-expert model that has been through one loop of one iteration."""
    folder = tmp_path_factory.mktemp("cli")
    prompts = folder / "prompts.txt"
    prompts.write_text('"FILM" on blue\n"REEL" on red\n"CUT" on black\n', encoding="utf-8")
    run = folder / "run"
    assert make(run, tiny_t2v2, prompts).returncode == 0
    result = rushes("loop", run, "--iterations", "1", "--set", 'track.to=["tensorboard"]')
    assert result.returncode == 0, result.stderr
    return run


def make(run: Path, model: Path, prompts: Path, *sets: str) -> Result:
    """`rushes init` of a run small enough for a test."""
    values = [
        f"model.path={model}", "model.text_length=24", f"rollout.prompts={prompts}", f"eval.prompts={prompts}",
        "rollout.prompts_per_iteration=2", "rollout.group_size=3", "rollout.batch_size=2", "rollout.steps=6",
        "rollout.groups_per_shard=1", "rollout.first_step=0", "rollout.low_steps=1", "eval.steps=4", "eval.limit=2",
        "score.rewards={contrast=1.0}", "score.min_spread=0.0", "rollout.workers=1", "score.workers=1",
        "train.updates_per_rollout=1", *sets,
    ]  # fmt: skip
    options = [part for value in values for part in ("--set", value)]
    return rushes("init", run, "--preset", "words", *options)


@pytest.mark.parametrize(
    "command",
    [
        "init",
        "rollout",
        "score",
        "train",
        "loop",
        "eval",
        "inspect",
        "judge",
        "rewards",
        "report",
        "status",
        "verify",
        "regenerate",
        "audit",
        "trust",
        "export",
        "plan-memory",
        "doctor",
        "compare",
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = rushes(command, "--help")
    assert result.returncode == 0
    assert f"rushes {command}" in result.stdout.split("Example:")[1]


def test_a_shell_completes_commands_and_presets() -> None:
    def completed(words: str) -> list[str]:
        count = str(words.count(" "))
        return python(_RUSHES_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count).stdout.split()

    assert completed("rushes plan") == ["plan-memory"]
    assert completed("rushes init runs/first --preset wan21-1") == ["wan21-1.3b", "wan21-14b"]


def test_help_takes_less_than_four_tenths_of_a_second_of_processor() -> None:
    plain = {"COVERAGE_PROCESS_CONFIG": ""}  # as a user starts it
    assert python("--help", **plain).returncode == 0
    assert seconds_of_processor(lambda: python("--help", **plain), 0.4) < 0.4


def test_a_loop_leaves_everything_it_promises(small: Path) -> None:
    iteration = small / "iter-0000"
    assert (iteration / "rollout" / "shard-000001.tar").exists()
    for expert in ("high_noise", "low_noise"):
        assert (iteration / "policy" / expert / "pytorch_lora_weights.safetensors").exists()
    metrics = [json.loads(line) for line in (iteration / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert {row["expert"] for row in metrics} == {"high_noise", "low_noise"}
    assert list((iteration / "policy" / "tensorboard").iterdir())
    [events] = (small / "report" / "live" / "run").iterdir()
    assert b"training/reward" in events.read_bytes()  # told while the loop went on
    assert b"low_noise/loss" in events.read_bytes()


def test_a_second_loop_does_nothing_and_says_so(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()}
    result = rushes("loop", small, "--iterations", "1")
    assert result.returncode == 0
    assert "iter-0000 rollout: nothing to do: 6 videos are there" in result.stderr
    assert "iter-0000 score: nothing to do" in result.stderr
    assert "iter-0000 train: nothing to do" in result.stderr
    assert re.search(r"^iter-0000 reward 0\.\d{3} ± 0\.\d{3}, 2 of 2 groups used$", result.stderr, re.MULTILINE)
    # what to do next is commands that can be given as they stand
    commands = [line.removeprefix("next:").split("#")[0].split() for line in result.stderr.splitlines()[-3:]]
    assert [command[:3] for command in commands] == [
        ["rushes", name, str(small)] for name in ("eval", "report", "export")
    ]
    assert commands[2][3] == "--out"
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()} == before


def test_eval_prints_a_table_on_stdout(small: Path) -> None:
    result = rushes("eval", small)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["iteration", "videos", "reward", "±", "s.e.", "change", "±", "s.e.", "wins", "losses", "ties"]
    assert [row[0] for row in rows[1:3]] == ["0", "1"]
    assert len(rows[1]) == 4  # there is nothing to compare the first one with


def test_eval_compares_policies_prompt_by_prompt(small: Path, tmp_path: Path) -> None:
    printed = rushes("eval", small, "--json")
    assert printed.returncode == 0, printed.stderr
    base, last = json.loads(printed.stdout)["policies"]
    rewards = [
        sidecar.read_advantages(stage, sidecar.specifications(stage)[0])
        .groupby("prompt_id")["reward"]
        .mean()
        .to_numpy()
        for stage in (Run(small).evaluation(0), Run(small).evaluation(1))
    ]  # of two prompts
    change = rewards[1] - rewards[0]
    assert base["mean_reward"] == pytest.approx(rewards[0].mean())
    assert (base["paired"], base["unlike"], last["unlike"]) == (None, [], [])
    assert last["paired"]["difference"] == pytest.approx(change.mean())
    assert last["paired"]["standard_error"] == pytest.approx(change.std(ddof=1) / 2**0.5)
    assert (last["paired"]["wins"], last["paired"]["losses"]) == ((change > 0).sum(), (change < 0).sum())
    table = rushes("eval", small).stdout.splitlines()
    assert table[2].split()[4] == f"{change.mean():+.4f}"
    assert table[3].startswith("change: against iteration 0, same prompts and noise")
    assert max(map(len, table)) <= 80
    other = tmp_path / "run"
    shutil.copytree(small, other)
    shutil.rmtree(other / "eval" / "iter-0001")
    changed = rushes("eval", other, "--set", "eval.seed=7", "--set", "eval.steps=3").stdout.splitlines()
    assert changed[2].endswith("not paired")
    assert changed[3].startswith("iteration 1 was planned with another ")
    assert "seed" in changed[3]


def test_json_is_the_only_thing_on_stdout(small: Path, tmp_path: Path) -> None:
    verified = rushes("verify", small, "--replay", "--json")
    found = json.loads(verified.stdout)
    steps = found.pop("replay_steps")["0"]
    assert found == {"path": str(small), "problems": [], "replay": {"0": 0.0}}
    assert {step["expert"] for step in steps} == {"high_noise", "low_noise"}
    assert all(step["largest"] == step["mean"] == 0.0 for step in steps)
    needs = json.loads(rushes("plan-memory", small, "--json").stdout)["stages"]
    assert needs[0]["device"] == sum(needs[0]["parts"].values())
    exported = json.loads(rushes("export", small, "--out", tmp_path / "export", "--json").stdout)
    assert exported["path"] == str(tmp_path / "export")
    assert (exported["skipped"], exported["iterations"]) == (False, 1)
    copy = tmp_path / "run"
    shutil.copytree(small, copy)
    tar = copy / "iter-0000" / "rollout" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    damaged = rushes("verify", copy, "--json")
    assert damaged.returncode == 1
    kinds = [problem["kind"] for problem in json.loads(damaged.stdout)["problems"]]
    assert kinds.count("damaged") == 2


def test_inspect_gives_csv_on_stdout(small: Path) -> None:
    result = rushes(
        "inspect", small, "--iteration", "0", "--format", "csv", "--columns", "key,reward", "--sort", "-reward"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "key,reward"
    rewards = [float(line.split(",")[1]) for line in lines[1:]]
    assert len(rewards) == 6
    assert rewards == sorted(rewards, reverse=True)


def test_a_sample_is_shown_though_its_frames_cannot_be_written(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # the tests may run as root, who may write anywhere but below a file
    key = rushes("inspect", small, "--columns", "key", "--format", "csv").stdout.split()[1]
    result = rushes("inspect", small, key, "--frames", tmp_path / "file" / "folder")
    assert result.returncode == 1
    assert key in result.stdout
    assert result.stderr.endswith("(hint: --frames FOLDER writes them elsewhere)\n")


def test_verify_finds_nothing_in_a_whole_run_and_replays_it(small: Path) -> None:
    result = rushes("verify", small, "--replay")
    assert result.returncode == 0, result.stderr
    assert "iter-0000 replay: largest |log-ratio| 0" in result.stderr


def test_verify_names_what_is_damaged(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small, copy)
    tar = copy / "iter-0000" / "rollout" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    result = rushes("verify", copy)
    assert result.returncode == 1
    damaged = next(line for line in result.stdout.splitlines() if "shard-000000.tar" in line)
    assert damaged.startswith("damaged: ")
    assert damaged.endswith(")")
    assert " (hint: " in damaged
    assert result.stderr == f"rushes: {copy}: 2 faults (hint: each line says what to do about it)\n"
    together = subprocess.run(
        [sys.executable, ROOT / "cli.py", "verify", copy],
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # as Python buffers where nobody asks for something else
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert [line.split(":")[0] for line in together.stdout.splitlines()] == ["damaged", "damaged", "rushes"]
    assert rushes("train", copy, "--iteration", "0").returncode == 0  # done already: nothing is read
    shutil.rmtree(copy / "iter-0000" / "policy")
    assert "shard-000000.tar" in refused("train", copy, "--iteration", "0")


def test_init_says_what_it_found(tmp_path: Path) -> None:
    first, second = (rushes("init", tmp_path / "run") for _ in range(2))
    assert "run.toml: written from preset words" in first.stderr
    assert "run.toml: is there already, with the same values" in second.stderr
    other = refused("init", tmp_path / "run", "--set", "rollout.seed=1")
    assert other == (
        f"{tmp_path}/run/run.toml exists already, with another rollout.seed"
        " (hint: choose another folder, or edit that file)"
    )
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "runs" / "a"):
        assert refused("init", path) == f"{tmp_path}/file is a file (hint: choose another folder)"
    assert refused("init", tmp_path / ("a" * 300)).endswith("a: File name too long (hint: choose another folder)")
    presets = {path.stem for path in (ROOT / "shards" / "presets").glob("*.toml")}
    assert presets <= set(rushes("init", "--help").stdout.replace(",", " ").split())


def test_relative_paths_hold_from_another_directory(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny_t2v2, here / "model")
    (here / "prompts.txt").write_text('"FILM" on blue\n"REEL" on red\n', encoding="utf-8")
    monkeypatch.chdir(here)
    made = make(Path("run"), Path("model"), Path("prompts.txt"))
    assert made.returncode == 0
    assert f"model.path: {here}/model, written in full" in made.stderr
    assert f"rollout.prompts: {here}/prompts.txt, written in full" in made.stderr
    again = make(Path("run"), Path("model"), Path("prompts.txt"))
    assert "is there already, with the same values" in again.stderr
    monkeypatch.chdir(elsewhere)
    assert rushes("rollout", "../here/run", "--dry-run").returncode == 0
    message = refused("eval", "../here/run", "--set", "eval.prompts=later.txt")
    assert message == (
        f"later.txt: no such file (hint: a relative path counts from where the command is given, here from {elsewhere})"
    )
    (elsewhere / "later.txt").write_text('"REEL" on green\n', encoding="utf-8")
    assert (
        "no such file"
        not in rushes("eval", "../here/run", "--set", "eval.prompts=later.txt", "--set", "eval.steps=1").stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollot"], "no such command 'rollot'. Did you mean 'rollout'? (hint: `rushes --help` shows what there is)"),
        (["rollout"], "missing argument 'RUN' (hint: `rushes rollout --help` shows what there is)"),
        (["export", "run"], "missing option '--out' (hint: `rushes export --help` shows what there is)"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(arguments: list[str], message: str) -> None:
    result = rushes(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"rushes: {message}\n")


def test_debug_shows_the_traceback_and_changes_nothing_else(tmp_path: Path) -> None:
    """A job that runs with it must still be told from a job that is to be queued again."""
    plain, shown = (rushes(*options, "status", tmp_path) for options in ((), ("--debug",)))
    assert plain.returncode == shown.returncode == 2
    assert shown.stderr.startswith("Traceback (most recent call last):\n")
    assert shown.stderr.endswith(f"\n{plain.stderr}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "RUN", "--format", "csv"),
        ("inspect", "RUN", "--where", "reward <"),
        ("--debug", "status", "nowhere"),
        pytest.param(("rollout", "RUN", "--iteration", "0", "--worker", "0/1"), marks=pytest.mark.long),  # loads torch
        ("rollot",),
        ("--help",),
        (),
    ],
)
def test_a_rank_says_and_returns_what_a_process_alone_does(small: Path, arguments: tuple[str, ...]) -> None:
    """All the way from the shell, into pipes, although it ends without taking Python apart."""
    given = [str(small) if argument == "RUN" else argument for argument in arguments]
    alone, rank = python(*given), python(*given, WORLD_SIZE="1", RANK="0")
    assert (rank.returncode, rank.stdout) == (alone.returncode, alone.stdout)
    assert _without_frames(rank.stderr) == _without_frames(alone.stderr)
    assert rank.stdout or rank.stderr


def _without_frames(text: str) -> list[str]:
    """Lines, those of a traceback but for its places in the code."""
    return [line for line in text.splitlines() if not line.startswith("  ")]


def test_without_a_command_there_is_help() -> None:
    result = rushes()
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: rushes [OPTIONS] COMMAND")
    assert "--debug" in result.stderr
    assert "plan-memory" in result.stderr


def test_hints_can_be_followed_to_the_letter(small: Path) -> None:
    """Each names a command that is complete, and that there is something to do for."""
    assert f"(hint: run `rushes rollout {small} --iteration 4` first)" in refused("train", small, "--iteration", "4")
    assert f"(hint: `rushes rollout {small} --iteration 1` comes first)" in refused("score", small)
    loop = f"(hint: rushes loop {small} --iterations 4)"
    assert refused("eval", small, "--iteration", "4").endswith(loop)
    assert refused("rollout", small, "--iteration", "4").endswith(loop)
    assert refused("export", small, "--iteration", "4", "--out", small / "export").endswith(loop)
    assert refused("verify", small / "iter-0000", "--replay").endswith(f"(hint: the run is {small})")
    assert rushes("verify", small / "iter-0000").returncode == 0


def test_bad_input_is_named(tiny_t2v2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('"FILM" on blue\n')
    assert refused("rollout", tmp_path / "nowhere", run=python) == (
        f"{tmp_path}/nowhere is not a run: it has no run.toml"
        f" (hint: `rushes init {tmp_path}/nowhere --preset words` makes one)"
    )
    assert refused("init", tmp_path / "a", "--preset", "wrods").startswith("unknown preset 'wrods' (hint: did you mean")
    assert refused("loop", tmp_path / "a", "--iterations", "0") == (
        "--iterations 0: nothing to do (hint: ask for at least one)"
    )
    assert refused("score", tmp_path / "a", "--reward", "ocr", "--reward", "ocr=2") == (
        "--reward ocr=2: ocr is given twice (hint: give each reward, and its options, once)"
    )
    assert refused("score", tmp_path / "a", "--reward", "ocr=much").startswith(
        "--reward ocr=much: the weight is not a number"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("score.rewards={orc=1.0}", "no reward is called 'orc' (hint: did you mean 'ocr'?"),
        ("score.rewards={ocr.exakt=1.0}", "reward 'ocr' has no component 'exakt' (hint: did you mean 'exact'?"),
        ('score.options.contrast={"siez"=2}', "reward 'contrast' has no option 'siez'"),
        ("score.rewards={'no.such:Reward'=1.0}", "reward 'no.such:Reward': cannot import no.such"),
    ],
)
def test_a_wrong_reward_is_refused_by_init_and_by_rollout(
    small: Path, tiny_t2v2: Path, tmp_path: Path, setting: str, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('"FILM" on blue\n"REEL" on red\n', encoding="utf-8")
    made = make(tmp_path / "run", tiny_t2v2, prompts, setting)
    assert made.returncode == 2
    assert message in made.stderr
    assert not (tmp_path / "run").exists()
    for command in (("rollout", small, "--iteration", "7", "--dry-run"), ("rollout", small, "--iteration", "7")):
        assert message in refused(*command, "--set", setting)
    assert not (small / "iter-0007").exists()


def test_a_sample_is_made_again_from_its_seeds(small: Path, tmp_path: Path) -> None:
    key = json.loads(rushes("inspect", small, "--columns", "key", "--format", "json").stdout)[0]["key"]
    again = tmp_path / "again.mp4"
    same = rushes("regenerate", small, key, "--video", again, "--json")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout) == {"key": key, "differences": {}, "within": 0.0}
    assert f"{key}: the same, bit for bit" in same.stderr
    assert again.read_bytes() == open_shard(Run(small).iteration(0), 0).video(key)
    assert "hold no sample i000000-p000099-s00" in refused("regenerate", small, "i000000-p000099-s00")


@pytest.mark.long
def test_a_sample_in_another_precision_is_another_one(small: Path, tmp_path: Path) -> None:
    key = json.loads(rushes("inspect", small, "--columns", "key", "--format", "json").stdout)[0]["key"]
    other = tmp_path / "other"
    shutil.copytree(small, other)
    toml = (other / "run.toml").read_text()
    (other / "run.toml").write_text(toml.replace('dtype = "float32"', 'dtype = "bfloat16"', 1))
    differs = python("regenerate", other, key, "--json")  # a fork would share its threads for bfloat16
    assert differs.returncode == 1, differs.stderr
    differences = json.loads(differs.stdout)["differences"]
    assert 0 < differences["latents"] < 1
    assert differences["video"] is None
    assert f"rushes: {key}: differs in latents by" in differs.stderr


@pytest.mark.parametrize("stage", ["rollout", "score", "train"])
def test_a_signal_counts_from_the_first_moment(stage: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the command still reads the run, so that a batch system queues the job again by its exit code."""
    opened = cli.open_run

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return opened(*arguments)

    monkeypatch.setattr(cli, "open_run", signalled)
    result = rushes(stage, small, "--iteration", "0")
    assert result.returncode == 75, result.stderr
    assert f"rushes: stopped by SIGTERM before iter-0000 {stage}" in result.stderr


def test_a_mean_reward_is_followed_back_to_the_base_model(small: Path) -> None:
    text = rushes("audit", small, "--number", "iter-0000")
    assert text.returncode == 0, text.stderr
    words = [line.split()[0] for line in text.stdout.splitlines()]
    assert words == ["reward", "advantages", "scores", "videos", "seeds", "sigmas", "code", "policy", "model", "chain"]
    found = json.loads(rushes("audit", small, "--number", "iter-0000", "--json").stdout)
    assert text.stdout.split()[-1] == found["sha256"]
    facts = {link["what"]: link["facts"] for link in found["links"]}
    assert facts["reward"]["mean_reward"] == pytest.approx(
        table.samples(small / "iter-0000")["reward"].mean(), abs=1e-12
    )
    assert facts["policy"]["base"] == facts["model"]["base"] == json.loads((small / "model.json").read_text())["base"]
    assert "this run has no such stage" in refused("audit", small, "--number", "iter-0009")


def test_an_audit_names_what_was_edited(small: Path, tmp_path: Path) -> None:
    """Also what no checksum of one file can tell: a consistent table that does not follow from the scores."""
    run = tmp_path / "run"
    shutil.copytree(small, run)
    assert rushes("rollout", run, "--iteration", "1").returncode == 0
    assert rushes("score", run, "--iteration", "1").returncode == 0
    whole = rushes("audit", run, "--number", "iter-0001")
    assert whole.returncode == 0, whole.stderr
    assert [line.split()[0] for line in whole.stdout.splitlines()][7:] == [
        "policy", "training", "policy", "model", "chain"
    ]  # fmt: skip
    weights = next((run / "iter-0000" / "policy" / "low_noise").glob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "its files are not the policy" in failed(run)
    weights.unlink()
    assert "its files are not the policy" in failed(run)
    weights.write_bytes(kept)
    stage = Run(run).iteration(1)
    [name] = sidecar.specifications(stage)
    frame = sidecar.read_advantages(stage, name, [0])
    frame.loc[0, "advantage"] += 1e-3
    sidecar.write_advantages(stage, 0, name, frame, {})
    assert f"advantage of {frame.loc[0, 'key']} does not follow from its scores" in failed(run)
    before = Run(run).iteration(0)  # what an earlier policy was trained on
    frame = sidecar.read_advantages(before, name, [0])
    frame.loc[0, "advantage"] += 1e-3
    sidecar.write_advantages(before, 0, name, frame, {})
    assert f"advantage of {frame.loc[0, 'key']} does not follow from its scores" in failed(run)


def failed(run: Path) -> str:
    """What an audit that must fail finds."""
    result = rushes("audit", run, "--number", "iter-0001")
    assert result.returncode == 1
    assert "in this chain" in result.stderr
    return "\n".join(line for line in result.stdout.splitlines() if "WRONG" in line)


TINT = """from score.reward import Scored


class Tint:
    name, version, components = "tint", "1", ("value",)

    def __call__(self, videos):
        return [Scored({"value": float(video.frames.mean())}) for video in videos]
"""


def test_a_run_cannot_name_code_that_nobody_named_here(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run.toml of somebody else names a file that is there; it runs once the person at the keyboard has named it."""
    monkeypatch.setenv("RUSHES_TRUSTED", str(tmp_path / "trusted"))
    run, source, ran = tmp_path / "run", tmp_path / "tint.py", tmp_path / "ran"
    shutil.copytree(small, run)
    source.write_text(f"open({str(ran)!r}, 'a').close()\n{TINT}", encoding="utf-8")
    toml = (run / "run.toml").read_text()
    (run / "run.toml").write_text(toml.replace("{ contrast = 1.0 }", f'{{ "{source}:Tint" = 1.0 }}'))
    for command in (["rollout"], ["rollout", "--dry-run"], ["score"], ["loop", "--iterations", "2"], ["eval"]):
        words = refused(command[0], run, *command[1:])
        assert f"{source} is not trusted" in words
        assert f"`rushes trust {source}`" in words
    assert not ran.exists()
    assert rushes("score", run, "--iteration", "0", "--reward", f"{source}:Tint").returncode == 0  # named in this call
    assert rushes("trust", source).returncode == 0
    again = rushes("score", run, "--iteration", "0")
    assert again.returncode == 0, again.stderr
    source.write_text(f"{TINT}\n# edited\n", encoding="utf-8")
    assert f"{source} has changed since it was trusted" in refused("score", run, "--iteration", "0")


def test_an_edited_reward_scores_again_and_its_source_is_kept(small: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", tmp_path / "tint.py"
    shutil.copytree(small, run)
    argument = ("score", run, "--iteration", "0", "--reward", f"{source}:Tint")
    source.write_text(TINT, encoding="utf-8")
    assert rushes(*argument).returncode == 0
    assert "nothing to do" in rushes(*argument).stderr
    [first] = (run / "iter-0000" / "score").glob("tint-Tint-*")
    source.write_text(TINT.replace("mean())", "mean()) / 2"), encoding="utf-8")
    second = rushes(*argument)
    assert second.returncode == 0, second.stderr
    assert f"{source}:Tint has changed since {first.name}, which is kept" in second.stderr
    kept = {path.parent.name: path.read_text() for path in (run / "iter-0000" / "score").glob("tint-*/_source.py")}
    assert len(kept) == 2
    assert kept[first.name] == TINT
    assert set(kept.values()) == {TINT, source.read_text()}
    assert rushes("verify", run).returncode == 0


def test_an_own_reward_is_found_from_every_directory(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_TRUSTED", str(tmp_path / "trusted"))
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "own_helper.py").write_text("HALF = 0.5\n", encoding="utf-8")
    (here / "own_taste.py").write_text(
        "from own_helper import HALF\nfrom score.reward import Scored\n\n\nclass Taste:\n"
        '    name, version, components = "taste", "1", ("value",)\n\n'
        "    def __init__(self, scale: float = 1.0):\n        self.scale = scale\n\n"
        "    def __call__(self, videos):\n"
        '        return [Scored({"value": self.scale * HALF * float(v.frames.mean())}) for v in videos]\n',
        encoding="utf-8",
    )
    (here / "prompts.txt").write_text('"FILM" on blue\n"REEL" on red\n', encoding="utf-8")
    monkeypatch.chdir(here)
    run = tmp_path / "run"
    made = make(run, tiny_t2v2, here / "prompts.txt", "score.rewards={'own_taste:Taste'=1.0}")
    assert made.returncode == 0, made.stderr
    assert f"score.rewards: {here}/own_taste.py:Taste, written in full" in made.stderr
    assert f"trusted: {here}/own_taste.py (sha256 " in made.stderr
    monkeypatch.chdir(elsewhere)
    looped = rushes("loop", run, "--iterations", "1")
    assert looped.returncode == 0, looped.stderr
    [scorer] = [path.name for path in (run / "iter-0000" / "score").iterdir() if not path.name.startswith("guards")]
    assert scorer.startswith("own_taste-Taste-")
    # named in the folder where it lies, and with an option, it is the same reward and another one
    monkeypatch.chdir(here)
    for argument, count in (("own_taste:Taste", 1), ("own_taste.py:Taste=2:scale=3", 2)):
        scored = rushes("score", run, "--iteration", "0", "--reward", argument)
        assert scored.returncode == 0, scored.stderr
        assert len(list((run / "iter-0000" / "score").glob("own_taste-Taste-*"))) == count


def test_an_unknown_reward_is_refused_before_anything_is_written(small: Path) -> None:
    before = sorted(small.rglob("*"))
    message = refused("score", small, "--iteration", "0", "--reward", "orc")
    assert "'orc'" in message
    assert "ocr" in message
    assert sorted(small.rglob("*")) == before
    message = refused("loop", small, "--iterations", "2", "--set", "score.rewards={ orc = 1.0 }")
    assert message.startswith("no reward is called 'orc'")  # before the first video, not after the last
    assert sorted(small.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n", "holds no prompt"),
        (b'"FILM" \xff\n', "UTF-8"),
        (b'"FI\x00LM"\n', "NUL"),
        (b'"' + b"A" * 1_000_000 + b'"\n', "line 1"),
    ],
)
def test_bad_prompts_are_refused_before_sampling(tiny_t2v2: Path, tmp_path: Path, content: bytes, part: str) -> None:
    """By `init`, and by `rollout` where the file became bad after that."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('"FILM"\n"CAT"\n')
    run = tmp_path / "run"
    assert make(run, tiny_t2v2, prompts).returncode == 0
    prompts.write_bytes(content)
    made = make(tmp_path / "other", tiny_t2v2, prompts)
    assert made.returncode == 2
    for message in (made.stderr, refused("rollout", run)):
        assert str(prompts) in message
        assert part in message
    assert not (tmp_path / "other").exists()
    assert not (run / "iter-0000" / "rollout").exists()


def test_prompts_without_quotes_are_refused_when_the_reward_reads(tiny_t2v2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    made = make(tmp_path / "run", tiny_t2v2, prompts, "score.rewards={ocr=1.0}")
    assert made.returncode == 2
    assert f"{prompts}, line 1" in made.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_or_foreign_model_is_refused(tiny_t2v2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('"FILM"\n"CAT"\n')
    run = tmp_path / "run"
    make(run, tmp_path / "no-model", prompts)
    assert "no-model" in refused("rollout", run)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    other = tmp_path / "other"
    make(other, tmp_path / "foreign", prompts)
    assert "FluxPipeline" in refused("rollout", other)


def test_a_run_with_another_model_than_its_plan_is_refused(small: Path, tiny_t2v: Path) -> None:
    message = refused("rollout", small, "--iteration", "1", "--set", f"model.path={tiny_t2v}")
    assert message.startswith(f"{tiny_t2v} is not the model this run began with")
    assert not (small / "iter-0001" / "plan.json").exists()


def test_array_tasks_share_the_work(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small, copy, ignore=shutil.ignore_patterns("iter-*", "eval"))
    result = rushes("rollout", copy, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="2", SLURM_ARRAY_TASK_MIN="0")
    assert result.returncode == 0, result.stderr
    assert "--worker 5/2" in refused("rollout", copy, "--worker", "5/2")


def test_a_file_that_may_not_be_touched_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever library met it: the tests may run as root, who may touch everything, so the error is raised here."""
    import cli

    def forbidden(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/a/iter-0000/plan.json")

    monkeypatch.setattr(cli, "app", forbidden)
    monkeypatch.setattr(sys, "argv", ["rushes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = "runs/a/iter-0000/plan.json: Permission denied (hint: look at its permissions)"
    assert capsys.readouterr().err == f"rushes: {told}\n"
    monkeypatch.setattr(sys, "argv", ["rushes", "--debug"])
    with pytest.raises(PermissionError):
        cli.main()
