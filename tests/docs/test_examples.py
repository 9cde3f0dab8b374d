"""Every script of examples/ runs from its first line to its last, on tiny models in place of the real folders.

Bash runs the scripts. The `rushes` they call hands its arguments to this process through two pipes and waits, which
saves the seconds that a Python with torch takes to start. Ranks of torchrun are processes of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

import cli
from shards.errors import UserError
from shards.run import Run
from tests.support.tiny_models import TEXT_LENGTH
from tests.support.videoalign_fixtures import DATA
from tests.support.videoalign_fixtures import template_fixture as template_fixture

EXAMPLES = Path(__file__).parents[2] / "examples"
RUSHES = """#!/usr/bin/env bash
if [ -n "${{RANK:-}}" ]; then echo "$RANK/$WORLD_SIZE $*" >> {ranks}; exec {python} {cli} "$@"; fi
exec 9>{lock} && flock 9
printf '%s\\0' "$@" > {request}
read -r code < {response}
exit "$code"
"""
SMALL = [
    "model.dtype=float32", "model.device=cpu", f"model.text_length={TEXT_LENGTH}", "rollout.prompts_per_iteration=2",
    "rollout.group_size=2", "rollout.batch_size=2", "rollout.frames=5", "rollout.groups_per_shard=1",
    "train.lora_rank=2", "eval.limit=1", "eval.steps=4",
]  # fmt: skip
BUILT_IN = ["score.rewards={contrast=1.0}", "score.min_spread=0.0"]
CASES: dict[str, tuple[str, int]] = {
    "wan21-1.3b-ocr": ("t2v", 16),
    "wan21-1.3b-ocr-4gpu": ("t2v", 16),
    "wan22-a14b-videoalign": ("t2v2", 64),
    "wan22-i2v": ("i2v2", 16),
    "wan22-ti2v-5b": ("ti2v", 32),
}
LONG = ("wan21-1.3b-ocr-4gpu", "wan22-i2v", "wan22-ti2v-5b")


def run_script(folder: Path, name: str, environment: dict[str, str], only: str = "") -> list[list[str]]:
    """Run a script of FOLDER/examples; returns the commands it gave. Fails unless it and all of them ended well.

    With `only` all other commands do nothing.
    """
    pipes = {key: folder / key for key in ("lock", "request", "response", "ranks")}
    for key in ("request", "response"):
        os.mkfifo(pipes[key])
    shim = folder / "bin" / "rushes"
    shim.parent.mkdir(parents=True)
    paths = {**pipes, "python": Path(sys.executable), "cli": EXAMPLES.parent / "cli.py"}
    shim.write_text(RUSHES.format(**{key: shlex.quote(str(path)) for key, path in paths.items()}))
    shim.chmod(0o755)
    found = f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun lies beside python
    variables = {**os.environ, "PATH": found, "OMP_NUM_THREADS": "1", **environment}
    commands: list[list[str]] = []
    script = ["bash", folder / "examples" / f"{name}.sh"]
    with (folder / "said").open("wb") as said:  # a pipe that nobody reads would be full one day
        process = subprocess.Popen(script, env=variables, cwd=folder, stderr=said)
    # the last reader of the pipe is released when the script is over
    watcher = threading.Thread(target=lambda: (process.wait(), pipes["request"].write_bytes(b"")), daemon=True)
    watcher.start()
    while request := pipes["request"].read_bytes():
        commands.append(request.decode().split("\0")[:-1])
        code = call(commands[-1]) if only in ("", commands[-1][0]) else 0
        pipes["response"].write_text(f"{code}\n")
    watcher.join()
    assert process.returncode == 0, f"{(folder / 'said').read_text()}\n{commands}"
    return commands


def call(arguments: list[str]) -> int:
    """One command in this process; its exit code."""
    try:
        cli.app(arguments, standalone_mode=False)
    except UserError as error:
        print(error)
        return error.exit_code
    return 0


def copied(folder: Path, size: int) -> None:
    """The examples, their images brought to the size of the tiny videos."""
    shutil.copytree(EXAMPLES, folder / "examples")
    for path in (folder / "examples" / "prompts" / "images").glob("*.png"):
        Image.open(path).convert("RGB").resize((size, size)).save(path)


def test_every_script_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.sh")} - {"common"} == set(CASES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in CASES]
)
def test_a_script_runs_to_its_end(name: str, tmp_path: Path, request: pytest.FixtureRequest, template: str) -> None:
    layout, size = CASES[name]
    copied(tmp_path, size)
    sets = [*SMALL, f"rollout.height={size}", f"rollout.width={size}"]
    environment = {
        "MODEL": str(request.getfixturevalue(f"tiny_{layout}")),
        "RUN": str(tmp_path / "run"),
        "ITERATIONS": "1",
        "GPUS": "2" if "4gpu" in name else "1",
    }
    if name == "wan22-a14b-videoalign":
        environment |= videoalign(template) | {"FULL": "1"}  # the other scripts train LoRA, i2v on two experts
        sets += [
            "score.options.videoalign.fps=16",
            "score.options.videoalign.device=cpu",
            "rollout.prompts_per_iteration=1",
        ]
    else:
        sets += BUILT_IN
    commands = run_script(tmp_path, name, environment | {"SETS": " ".join(sets)})
    run = Run.open(tmp_path / "run")
    assert commands[0][0] == "init"
    assert ("4gpu" in name) == (commands[-1][0] != "eval")
    assert run.iteration(0).trained()
    assert len(run.evaluation(1).shards()) == run.evaluation(1).expected() > 0
    if "4gpu" in name:
        ranks = [line.split()[:2] for line in (tmp_path / "ranks").read_text().splitlines()]
        assert sorted(ranks) == [["0/2", "eval"], ["0/2", "loop"], ["1/2", "eval"], ["1/2", "loop"]]
    check(run, name)


def check(run: Run, name: str) -> None:
    """What a script says about itself in words, read off the run."""
    config = run.config
    plan = run.iteration(0).plan()
    assert plan is not None
    if name == "wan22-a14b-videoalign":
        summary = json.loads(next(run.iteration(0).path.glob("advantage/*/_summary.json")).read_text())
        assert summary["rewards"]["videoalign"]["missing"] == 0
        assert all(len(group.window) == plan.schedule.steps // 2 for group in plan.groups)
        train = config.train
        assert (train.clip_range, train.advantage_clip, train.warmup) == (1e-4, 5.0, 10)
        assert (train.objective, train.estimator, train.proximal) == ("grpo", "noise", 0.0)
        assert (train.full, train.learning_rate) == (True, 8e-6)
        assert (train.beta1, train.beta2, train.weight_decay, config.score.best_of_n) == (0.9, 0.999, 1e-4, 8)
    if name in ("wan22-i2v", "wan22-ti2v-5b"):
        images = [group.image is not None for group in plan.groups]
        assert any(images)


def videoalign(template: str) -> dict[str, str]:
    """The folders that the script with VideoAlign asks for, tiny ones."""
    return {"CHECKPOINT": str(DATA / "checkpoint"), "BASE": str(DATA / "base_model"), "TEMPLATE": template}


def test_the_videoalign_script_has_its_recipe_without_full_too(tmp_path: Path, tiny_t2v2: Path, template: str) -> None:
    copied(tmp_path, 64)
    environment = {"MODEL": str(tiny_t2v2), "RUN": str(tmp_path / "run"), "GPUS": "1", **videoalign(template)}
    run_script(tmp_path, "wan22-a14b-videoalign", environment | {"GROUP": "8", "BEST": "4"}, only="init")
    config = Run.open(tmp_path / "run").config
    assert (config.train.full, config.train.learning_rate, config.train.lora_rank) == (False, 1e-4, 64)
    assert (config.rollout.group_size, config.score.best_of_n) == (8, 4)
    assert config.score.rewards == {"videoalign.VQ": 1.0, "videoalign.MQ": 0.0, "videoalign.TA": 0.0}


def test_the_real_sizes_fit_the_images_and_prompts_suffice() -> None:
    """What the tiny runs replace: prompts enough for an iteration of the preset, images of the size of its video."""
    from rollout.prompts.load import load_prompts
    from shards.run_toml import parse_config, read_preset

    for name, preset, prompts in (
        ("wan21-1.3b-ocr", "wan21-1.3b", "ocr.txt"),
        ("wan22-a14b-videoalign", "wan22-a14b", "scenes.txt"),
        ("wan22-i2v", "wan22-i2v", "i2v.jsonl"),
        ("wan22-ti2v-5b", "wan22-ti2v-5b", "ti2v.jsonl"),
    ):
        assert f"begin {preset}" in (EXAMPLES / f"{name}.sh").read_text()
        rollout = parse_config(read_preset(preset), preset).rollout
        stem, suffix = prompts.split(".")
        loaded = [
            load_prompts(EXAMPLES / "prompts" / one, suffix != "txt") for one in (prompts, f"{stem}-eval.{suffix}")
        ]
        assert len(loaded[0]) >= rollout.prompts_per_iteration
        for prompt in (*loaded[0], *loaded[1]):
            if prompt.image:
                assert Image.open(prompt.image).size == (rollout.width, rollout.height)


def test_a_script_that_fails_is_seen(tmp_path: Path, tiny_t2v: Path) -> None:
    copied(tmp_path, 16)
    environment = {"MODEL": str(tiny_t2v), "RUN": str(tmp_path / "run"), "SETS": "rollout.stepz=3"}
    with pytest.raises(AssertionError):
        run_script(tmp_path, "wan21-1.3b-ocr", environment)
