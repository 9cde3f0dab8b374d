"""The first hour of a user, step by step, as README and guide tell it: from a fresh clone to an exported policy.

Everything is a process that the installed `rushes` starts. One of two workers is killed while it samples, and training
under torchrun is killed after a checkpoint. `make first-hour` shows the time of each step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas
import psutil
import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds; a busy machine is slow
PROMPTS = ('"FILM" in cyan on blue', '"CUT" in white on red', '"REEL" in yellow on black', '"TAKE" in white on green')
SETS = (
    "rollout.prompts=prompts.txt", "eval.prompts=prompts.txt", "eval.limit=2", "eval.videos_per_prompt=1",
    "eval.steps=4", "rollout.prompts_per_iteration=4", "rollout.group_size=4", "rollout.batch_size=1",
    "rollout.groups_per_shard=2", "rollout.workers=1", "score.workers=1", "score.min_spread=0.0",
    'score.rewards={"colour.py:Colourful"=1.0}', "workers.claim_seconds=2", "train.updates_per_rollout=4",
    "train.save_every=1",
)  # fmt: skip


class Walk:
    """A folder, a clone of this repository in it, and what was done there so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clone = folder, folder / "rushes"
        self.bin = self.clone / ".venv" / "bin"
        self.run = folder / "runs" / "mine"
        self.times: list[tuple[str, float]] = []
        self.started: list[subprocess.Popen[str]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of a step."""
        begin = time.monotonic()
        yield
        self.times.append((name, time.monotonic() - begin))
        print(f"{self.times[-1][1]:7.1f} s  {name}", flush=True)

    def start(self, *command: object) -> subprocess.Popen[str]:
        """Start a command of the environment, in a process group of its own; its messages go to a file."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with (self.folder / "said").open("a") as said:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=self.folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=said, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def ends(self, process: subprocess.Popen[str], code: int = 0) -> str:
        """What a command printed. Fails unless it ends with this exit code."""
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, f"{process.args}\n{self.said()[-4000:]}"
        return out

    def do(self, *command: object) -> str:
        """Start a command and wait for its end."""
        return self.ends(self.start(*command))

    def said(self) -> str:
        """All messages so far."""
        return (self.folder / "said").read_text()

    def table(self, *arguments: object) -> pandas.DataFrame:
        """What `rushes inspect` prints of the run."""
        return pandas.DataFrame(json.loads(self.do("rushes", "inspect", self.run, "--format", "json", *arguments)))


def until(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `found` gives once it gives something; fails when the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def send(process: subprocess.Popen[str], number: int) -> None:
    """A signal to a command and everything that it started: torchrun gives each rank a session of its own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    found = Walk(tmp_path)
    yield found
    for process in found.started:
        if process.poll() is None:  # the test failed
            send(process, signal.SIGKILL)
    print(f"{sum(seconds for _, seconds in found.times):7.1f} s  all of it")


@pytest.mark.long
def test_the_first_hour(walk: Walk) -> None:
    with walk.step("clone and install"):
        install(walk)
    with walk.step("a reward and prompts of one's own"):
        prepare(walk)
    with walk.step("init and the plan"):
        sets = [word for setting in SETS for word in ("--set", setting)]
        walk.do("rushes", "init", walk.run, "--preset", "words", *sets)
        assert "low_noise" in walk.do("rushes", "rollout", walk.run, "--dry-run")
    with walk.step("two workers, one killed while it samples"):
        finished = two_workers(walk)
    with walk.step("score and look"):
        walk.do("rushes", "score", walk.run)
        table = walk.table()
        assert len(table) == 16
        assert set(table["status"]) == {"ok"}
        assert finished <= {*table["key"]}  # what the killed worker had finished is used
    with walk.step("training under torchrun, killed after a checkpoint"):
        kept = killed_training(walk)
    with walk.step("training resumed"):
        walk.do("rushes", "train", walk.run, "--iteration", "0")
        assert (walk.run / "iter-0000" / "policy" / "policy.json").exists()
        updates = [json.loads(line) for line in (walk.run / "iter-0000/policy/metrics.jsonl").read_text().splitlines()]
        assert [one["update"] for one in updates] == [1, 2, 3, 4] * 2  # none lost, none done twice
        assert updates[: len(kept)] == kept  # with the seconds that it took then: it was not done again
    with walk.step("another iteration, evaluation, report, export, verify"):
        walk.do("rushes", "loop", walk.run, "--iterations", "2")
        evaluated = json.loads(walk.do("rushes", "eval", walk.run, "--json"))
        assert [policy["iteration"] for policy in evaluated["policies"]] == [0, 2]
        walk.do("rushes", "report", walk.run)
        assert (walk.run / "report" / "index.html").stat().st_size > 10_000
        walk.do("rushes", "export", walk.run, "--out", walk.folder / "export")
        assert [*(walk.folder / "export").rglob("*.safetensors")]
        walk.do("rushes", "verify", walk.run, "--replay")


def install(walk: Walk) -> None:
    """`git clone` and `pip install -e .`, without the network: packages come from the environment of this test."""
    walk.folder.mkdir(exist_ok=True)
    source = ["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", walk.clone]
    subprocess.run(source, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", walk.clone / ".venv"], check=True)
    (packages,) = (walk.clone / ".venv" / "lib").glob("python3*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "here.pth").write_text(here + "\n")
    shutil.copy(Path(sys.executable).with_name("torchrun"), walk.bin / "torchrun")
    (walk.bin / "torchrun").write_text(
        re.sub(r"\A#!.*", f"#!{walk.bin / 'python'}", (walk.bin / "torchrun").read_text())
    )
    pip = [walk.bin / "python", "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    walk.do(*pip, "--editable", walk.clone)
    assert walk.do("python", "-c", "import cli; print(cli.__file__)").strip() == str(walk.clone / "cli.py")
    assert walk.do("rushes", "--version").startswith("rushes ")


def prepare(walk: Walk) -> None:
    """The prompts file, and the ten lines of docs/rewards.md."""
    (walk.folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    page = (walk.clone / "docs" / "rewards.md").read_text(encoding="utf-8").partition("## Your own")[2]
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code
    (walk.folder / "colour.py").write_text(code[1])
    assert "spread" in walk.do("rushes", "rewards", "colour.py:Colourful")


def two_workers(walk: Walk) -> set[str]:
    """Two workers sample; the second one is killed with a shard half done. Keys that it had finished by then."""
    stage = walk.run / "iter-0000"
    mine = stage / "work" / "shard-000001"  # the part of worker 1 of 2

    def half_done() -> set[str]:
        keys = {path.name.partition(".")[0] for path in mine.glob("i*-s*.tar")}
        return keys if 0 < len(keys) < 8 else set()

    second = walk.start("rushes", "rollout", walk.run, "--iteration", "0", "--worker", "1/2")
    until(half_done, second)
    send(second, signal.SIGSTOP)  # so that what is looked at is what is killed
    finished = half_done()
    assert finished, "it was faster than this test looked"
    assert not (stage / "rollout" / "manifest" / "shard-000001.json").exists()
    first = walk.start("rushes", "rollout", walk.run, "--iteration", "0", "--worker", "0/2", "--wait")
    send(second, signal.SIGKILL)
    second.communicate()
    walk.ends(first)
    assert sorted(path.name for path in (stage / "rollout" / "manifest").iterdir()) == [
        "shard-000000.json", "shard-000001.json"
    ]  # fmt: skip
    return finished


def killed_training(walk: Walk) -> list[dict[str, Any]]:
    """Two ranks train, and are killed after the first checkpoint; the updates that it holds."""
    policy = walk.run / "iter-0000" / "policy"
    ranks = ("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "rushes")
    process = walk.start(*ranks, "loop", walk.run, "--iterations", "1")
    until(lambda: [*policy.glob("trainer/*/*/commit.json")], process)
    send(process, signal.SIGKILL)
    process.communicate()
    assert not (policy / "policy.json").exists()
    lines = (policy / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:1]]
