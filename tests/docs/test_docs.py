"""The documentation is true: its code runs, its command lines parse, its settings exist, its links lead somewhere.

Three marks before a code block, none of which a reader sees:
`<!-- test: run -->` runs it in a folder that holds a tiny run, `runs/demo`; `<!-- test: file PATH -->` is a script
that a test writes to PATH and runs; `<!-- test: figures -->` is a table that a test computes again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import cli
from score.catalogue.argument import reward_settings
from shards.config import RunConfig, Section
from shards.errors import NothingLeft, StillBusy
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset
from shards.sidecar import write_advantages, write_scores
from tests.support.shard_fixtures import committed_stage, score_frame
from tests.support.tiny_models import TEXT_LENGTH

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "shards" / "README.md"])
FENCE = re.compile(
    r"(?:^<!-- test: (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)
PROSE = re.compile(r"rushes ([a-z-]+) {2,}[a-z]+ [a-z]+ [^/\n]*$")  # a list of commands, each with what it does
INLINE = re.compile(r"`(rushes [^`\n]+)`")
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(cli.app), "commands")  # noqa: B009 (typer's own click)
METRIC = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page in their order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["mark"] or "", match["language"], match["text"]) for match in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.mark == "run"]
FILES = {block.mark.removeprefix("file "): block.text for block in BLOCKS if block.mark.startswith("file ")}


# --- Command lines ---------------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[str]:
    """Lines of a page on which `rushes` is called: in fenced and indented code, and between backquotes."""
    fenced = "\n".join(match["text"] for match in FENCE.finditer(text) if match["language"] in ("sh", "bash", ""))
    indented = "\n".join(re.findall(r"^(?: {4}|\t)(.+)$", FENCE.sub("", text), re.M))
    code = [line for part in (fenced, indented) for line in part.replace("\\\n", " ").splitlines()]
    return [line for line in [*code, *INLINE.findall(text)] if re.search(r"(?:^|[\s(])rushes\s+[a-z…-]", line)]


def calls(line: str) -> list[list[str]]:
    """The arguments of every `rushes` on a shell line; the name alone where the line explains a command."""
    if explained := PROSE.match(line):
        return [[explained[1]]]
    known = re.sub(r"\$\w+", "0", line.replace("…", ""))
    lexer = shlex.shlex(known, posix=True, punctuation_chars="();&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = []
    inside = False
    for token in lexer:
        if token == "rushes":
            inside = True
            found.append([])
        elif set(token) <= set("();&|"):
            inside = False
        elif inside:
            found[-1].append(token)
    return found


def check(arguments: list[str]) -> None:
    """Fail unless the command line takes these arguments; presets and settings must exist too."""
    name, *rest = [argument for argument in arguments if argument != "--debug"] or [""]
    if name in ("--help", "--install-completion"):
        return
    assert name in COMMANDS, f"there is no command {name!r}"
    if not rest:
        return
    context = COMMANDS[name].make_context(name, list(rest), resilient_parsing=False)
    base = read_preset(context.params["preset"]) if "preset" in context.params else {}
    parse_config(apply_sets(base, context.params.get("sets") or []), "a page")
    reward_settings(context.params.get("reward") or []) if name == "score" else None


LINES = [(page, line) for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_command_line_parses(page: Path, line: str) -> None:
    assert calls(line), f"{page.name}: nothing was found to check"
    for arguments in calls(line):
        check(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "rushes rol runs/a",
        "rushes rollout runs/a --iterations 3",
        "rushes loop runs/a",
        "rushes init runs/a --preset wan",
        "rushes init runs/a --set rollout.stepz=3",
        "srun rushes score runs/a --reward ocr=high && true",
    ],
)
def test_a_wrong_command_line_is_seen(line: str) -> None:
    (arguments,) = [found for found in calls(line) if found]
    with pytest.raises(Exception, match=r"rol|iterations|wan|stepz|weight"):
        check(arguments)


def test_enough_is_checked() -> None:
    """Every command of the program is shown with arguments somewhere, and the pages named here are read."""
    shown = {arguments[0] for _, line in LINES for arguments in calls(line) if len(arguments) > 1}
    assert shown == set(COMMANDS)
    assert {"README.md", "guide.md", "index.md", "metrics.md", "inspect.md"} <= {page.name for page, _ in LINES}


def test_settings_in_tables_exist() -> None:
    """`train.kl_beta` and the like between backquotes are keys of run.toml; TOML blocks are read by the program."""
    sections = {name: set(type(value).model_fields) for name, value in RunConfig() if isinstance(value, Section)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for section, key in re.findall(r"`(model|rollout|score|train|eval)\.(\w+)\b(?!\.py)[^`(]*`", text):
            assert key in sections[section] or (ROOT / section / f"{key}.py").exists(), f"{page.name}: {section}.{key}"
    for block in BLOCKS:
        if block.language == "toml" and (values := tomllib.loads(block.text)).keys() <= sections.keys():
            parse_config(values, block.page.name)


# --- Code that runs --------------------------------------------------------------------------------------------------

# one line of metrics.jsonl, as training writes it
METRICS: dict[str, Any] = {"clip_fraction": 0.1, "gradient_norm": 0.002, "kl": 0.0, "ratio_min": 0.9999}
OCR = {"i000000-p000000": [1.0, 1.0, 1.0], "i000000-p000001": [0.2, 0.4, 0.9]}
VIDEOALIGN = {"i000000-p000000": [0.0, 0.0, 0.0], "i000000-p000001": [0.5, 0.3, -0.7]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo: one prompt that never varies, one on which two rewards say the opposite."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "demo"
    stage = committed_stage(run)
    for shard in stage.shards():
        write_scores(stage, shard, "ocr-1a2b3c4d", scored(stage, shard, OCR), {})
        write_scores(stage, shard, "videoalign-5e6f7a8b", scored(stage, shard, VIDEOALIGN), {})
        write_advantages(stage, shard, "0123abcd", advised(stage, shard), {})
    (run / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    update = {"iteration": 0, "update": 1, "total_updates": 1, **METRICS}
    lines = [update | {"expert": name} for name in ("high_noise", "low_noise")]
    stage.policy_dir.mkdir()
    (stage.policy_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shim = folder / "bin" / "rushes"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "cli.py"}" "$@"\n')
    shim.chmod(0o755)
    return folder


def scored(stage: Stage, shard: int, rewards: dict[str, list[float]]) -> Any:
    """Scores of a shard from the rewards of each group."""
    frame = score_frame(stage, shard)
    frame["reward"] = [rewards[key[:15]][sample] for key, sample in zip(frame["key"], frame["sample"], strict=True)]
    return frame.assign(accuracy=frame["reward"])


def advised(stage: Stage, shard: int) -> Any:
    """Advantages from the OCR reward of a shard with one group."""
    frame = scored(stage, shard, OCR)[["key", "prompt_id", "sample", "reward"]]
    centred = frame["reward"] - frame["reward"].mean()
    spread = bool(centred.abs().max() > 0)
    return frame.assign(advantage=centred, weight=float(spread), reason="" if spread else "no spread")


def named(block: Block) -> str:
    """What a failing test is called."""
    return f"{block.page.name}-{block.language}-{BLOCKS.index(block)}"


@pytest.mark.parametrize("block", RUNNABLE, ids=named)
def test_a_block_runs(block: Block, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    if block.language == "python":
        exec(compile(block.text, block.page.name, "exec"), {})
        return
    assert block.language == "bash"
    path = {**os.environ, "PATH": f"{demo / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-euc", block.text], env=path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def query(heading: str) -> dict[str, Any]:
    """The names that the Python block under a heading of inspect.md leaves behind."""
    text = (DOCS / "inspect.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    values: dict[str, Any] = {}
    match = FENCE.search(text)
    assert match
    exec(match["text"], values)
    return values


def test_the_queries_answer_their_questions(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    assert list(query("Which prompts never vary?")["never"].index) == ["a cat 0"]
    apart = query("Where does one reward disagree with another?")["apart"]
    assert set(apart["key"].iloc[:2]) == {"i000000-p000001-s00", "i000000-p000001-s02"}
    steps = query("Which step carries the gradient?")["steps"]
    # steps 1 (high noise) and 2 (low noise) of the one group that has advantages
    assert steps.index.tolist() == [("high_noise", 1), ("low_noise", 2)]
    assert steps["share"].tolist() == [1.0, 1.0]
    assert steps["size"].tolist() == [3, 3]
    assert steps["sum"].nunique() == 2


def test_the_blocks_are_there() -> None:
    languages = [block.language for block in RUNNABLE]
    assert languages.count("python") >= 4
    assert "bash" in languages
    assert set(FILES) == {f"slurm/{name}" for name in ("sample.sbatch", "train.sbatch", "experts.sbatch", "submit.sh")}
    marks = {block.mark for block in BLOCKS}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert text.count("<!-- test: ") == len(RUNNABLE) + len(FILES) + text.count("<!-- test: figures -->"), marks


# --- The SLURM scripts, on a tiny model ------------------------------------------------------------------------------

SBATCH = """#!/usr/bin/env bash
# Does at once what it is asked to queue: one task after another.
set -euo pipefail
echo "$@" >> submitted
while [[ $1 == --* ]]; do shift; done
range=$(sed -n 's/^#SBATCH --array=0-//p' "$1")
export SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_GPUS_ON_NODE=1 SLURM_CPUS_PER_TASK=1 SLURM_JOB_ID=7
for ((task = 0; task <= ${range:-0}; task++)); do
  if [ -n "$range" ]; then export SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((range + 1)); fi
  bash "$@" >&2
done
echo "$((100 + $(wc -l < submitted)));cluster"
"""
RECORD = """#!/usr/bin/env bash
echo "${SLURM_ARRAY_TASK_ID:--} ${SLURM_ARRAY_TASK_COUNT:--} $*" >> called
[ "${SLURM_ARRAY_TASK_ID:-}" != 1 ] || exit 75  # as a worker whose shards others hold
[ "${SLURM_ARRAY_TASK_ID:-}" != 2 ] || exit 3  # as a worker that came too late
"""
OTHERS = {  # commands of SLURM and PyTorch that only start what follows their options
    "bin/srun": '#!/usr/bin/env bash\nshift\nexec "$@"\n',
    "bin/torchrun": '#!/usr/bin/env bash\nwhile [ "$1" != --no-python ]; do shift; done\nexec "${@:2}"\n',
    "bin/scontrol": "#!/usr/bin/env bash\necho here\n",
}


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's scripts were submitted for iterations 0 and 1; `called` holds what they gave."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in {**FILES, **OTHERS, "bin/sbatch": SBATCH, "bin/rushes": RECORD}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "slurm/submit.sh", "run", "0", "1"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_guide_has_the_scripts_of_the_examples() -> None:
    for name, text in FILES.items():
        assert (ROOT / "examples" / name).read_text(encoding="utf-8") == text


def test_jobs_wait_for_what_they_need(submitted: Path) -> None:
    queued = (line.replace("--parsable --kill-on-invalid-dep=yes ", "") for line in read_lines(submitted / "submitted"))
    lines = [line.replace(f"{submitted}/", "") for line in queued]
    assert lines == [
        "slurm/sample.sbatch run 0",
        "--dependency=afterany:101 slurm/train.sbatch run 0",
        "--dependency=afterok:102 slurm/sample.sbatch run 1",
        "--dependency=afterany:103 slurm/train.sbatch run 1",
    ]


def test_each_task_of_an_array_trains_an_expert(submitted: Path, tmp_path: Path) -> None:
    shutil.copytree(submitted / "slurm", tmp_path / "slurm")
    environment = {**os.environ, "PATH": f"{submitted / 'bin'}:{os.environ['PATH']}", "JOB": "experts.sbatch"}
    command = ["bash", "slurm/submit.sh", "run", "3", "3"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 75, result.stderr  # of the second task: the stand-in of sbatch runs what it queues
    assert read_lines(tmp_path / "called")[-2:] == [
        "0 2 train run --iteration 3 --expert high_noise", "1 2 train run --iteration 3 --expert low_noise",
    ]  # fmt: skip


def test_the_scripts_train_an_iteration(
    submitted: Path, tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", tiny_t2v2)
    seen = []
    for line in read_lines(submitted / "called"):
        task, count, *arguments = line.split()
        if arguments[-1] == ("2" if arguments[0] == "loop" else "1"):  # the second iteration is the same again
            continue
        seen.append((task, arguments[0]))
        for name, value in (("SLURM_ARRAY_TASK_ID", task), ("SLURM_ARRAY_TASK_COUNT", count)):
            monkeypatch.delenv(name, raising=False) if value == "-" else monkeypatch.setenv(name, value)
        call([str(run.path) if argument == "run" else argument for argument in arguments])
    assert seen[:4] == [("0", "rollout"), ("0", "score"), ("1", "rollout"), ("1", "score")]
    assert len(seen) == 2 * 8 + 1
    assert run.iteration(0).trained()
    records = [json.loads(line) for line in read_lines(run.iteration(0).policy_dir / "metrics.jsonl")]
    fields = {name for record in records for name in record}
    table = (DOCS / "metrics.md").read_text(encoding="utf-8").partition("## Every field")[2].partition("## Healthy")[0]
    documented = {name for cell in METRIC.findall(table) for name in re.findall(r"\w+", cell)}
    assert fields == documented


def tiny_run(path: Path, model: Path) -> Run:
    """A run on the tiny two-expert model with three shards."""
    prompts = path.parent / "prompts.txt"
    prompts.write_text("".join(f'a sign "{word}"\n' for word in ("FILM", "CAT", "DOG")), encoding="utf-8")
    sets = [
        f"model.path={model}", f"model.text_length={TEXT_LENGTH}", f"rollout.prompts={prompts}", "train.lora_rank=2",
        "rollout.prompts_per_iteration=3", "rollout.group_size=2", "rollout.batch_size=2", "rollout.steps=6",
        "rollout.height=16", "rollout.width=16", "rollout.groups_per_shard=1", "rollout.high_steps=1",
        "rollout.low_steps=1", "rollout.first_step=0",
        "score.rewards={contrast=1.0}", "score.min_spread=0.0", "score.workers=1", "rollout.workers=1",
        "train.objective=grpo", "train.updates_per_rollout=1",
    ]  # fmt: skip
    return Run.create(path, parse_config(apply_sets(read_preset("words"), sets), "preset words"))


def call(arguments: list[str]) -> None:
    """One command in this process; only `others hold it` and `nothing left` may end it early."""
    with suppress(StillBusy, NothingLeft):
        cli.app(arguments, standalone_mode=False)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file."""
    return path.read_text(encoding="utf-8").splitlines()


# --- Figures, warnings, links ----------------------------------------------------------------------------------------


def test_the_figures_of_sampling_are_computed() -> None:
    from rollout.sigmas import grid
    from rollout.transitions import gradient_scale, kernel

    sigmas, _ = grid("shifted", 20, 3.0, {})
    table = (DOCS / "sampling.md").read_text(encoding="utf-8").partition("<!-- test: figures -->\n")[2]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in table.split("\n\n")[0].splitlines()]
    assert len(rows) == 8
    for law, form, eta, *printed in rows[2:]:
        steps = [(law, form, sigmas[i], sigmas[i + 1], float(eta), sigmas[1]) for i in range(1, 19)]
        shares = [kernel(*step).std / step[3] for step in steps]  # type: ignore[arg-type]
        first, last = (gradient_scale(*step) for step in (steps[0], steps[-1]))  # type: ignore[arg-type]
        assert printed == [f"{min(shares):.2f}", f"{max(shares):.2f}", f"{last / first:.0f}"], law


def test_the_notes_are_those_of_the_program() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8").partition("## The notes in plain language")[2]
    notes = [cell.strip("`") for cell in re.findall(r"^\| (`.+?`) \|", text, re.M)]
    names = ("train/diagnosis.py", "train/run.py", "shards/diagnosis.py")
    source = "".join((ROOT / name).read_text("utf-8") for name in names)
    source = re.sub(r'"\s+f?"', "", source)
    assert len(notes) == 10
    for note in notes:
        assert note in source, note


def test_every_law_and_form_is_in_the_table() -> None:
    from typing import get_args

    from shards import config
    from shards.records import schedule

    text = (DOCS / "sampling.md").read_text(encoding="utf-8")
    for kind in (schedule.Law, schedule.Form, schedule.Solver, config.SigmaGrid, config.Window):
        assert all(f"`{name}`" in text for name in get_args(kind))


def test_links_of_the_readme_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "shards" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_benchmarks_page_can_be_written_into() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert text.index("<!-- begin learn -->") < text.index("<!-- end learn -->")


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The site of a copy of the repository's documentation; with --quiet a warning would not count."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_and_a_broken_link_does_not(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "shards").mkdir()
    shutil.copy(ROOT / "shards" / "README.md", tmp_path / "shards")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert "traj.safetensors" in (tmp_path / "site" / "format.html").read_text(encoding="utf-8")
    assert "fonts.googleapis.com" not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write("\n[nowhere](metrics.md#no-such-heading)\n")
    assert build(tmp_path, tmp_path / "site2").returncode != 0
