"""examples/slurm on a real SLURM: an array with a cancelled worker, iterations in a chain, a job that is requeued."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cli
from shards.run import Stage
from shards.workers.owners import claims_of
from tests.rollout.test_rollout import contents, differences
from tests.support.slurm_cluster import Cluster, cluster, why_not
from tests.support.workers import same_tables, small_run

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm"
WEIGHTS = "pytorch_lora_weights.safetensors"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
PATIENCE = 400.0  # seconds; a loaded machine starts Python slowly

# `rushes` as jobs find it. Until the file GATE is there, work is held where the test wants to meet it, by signals too:
# array task 2 after its first sample, before the others begin, and training after its second update.
PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
import cli
from rollout import worker
from shards.process.signals import stopping
from train.metrics import MetricsLog

def held(until):
    while not os.path.exists(os.environ.get("GATE", "/")) and not until():
        time.sleep(0.05)

def write(*arguments, before=worker.write_samples):
    done = before(*arguments)
    held(until=lambda: "SLURM_ARRAY_TASK_ID" not in os.environ or stopping())
    return done

def add(self, record, before=MetricsLog.add):
    before(self, record)
    held(until=lambda: len(self.records) < 2 or stopping())

worker.write_samples, MetricsLog.add = write, add
held(until=lambda: os.environ.get("SLURM_ARRAY_TASK_ID", "2") == "2")
cli.start()
"""
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose jobs find our `rushes` and PyTorch's `torchrun`."""
    folder = tmp_path_factory.mktemp("slurm")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "rushes.py").write_text(PROGRAM.format(root=str(ROOT)))
    for name, command in {
        "rushes": [sys.executable, str(programs / "rushes.py")],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (programs / name).chmod(0o755)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as logs,  # torchrun would leave them in /tmp
        cluster(folder / "cluster", programs, TMPDIR=logs) as made,
    ):
        yield made


def until(ready: Callable[[], bool], slurm: Cluster) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def test_an_array_and_a_chain_make_what_one_process_makes(slurm: Cluster, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2, "workers.claim_seconds=6.0")
    slurm.call(
        SLURM / "submit.sh", run.path, "0", "1",
        SAMPLE="--array=0-3", TRAIN="--nodes=1 --gpus-per-node=1", OMP_NUM_THREADS="1", GATE=str(tmp_path / "gate"),
    )  # fmt: skip
    stage = run.iteration(0)
    until(lambda: any(one.owner and one.owner.worker == "2/4" for one in claims_of(stage)), slurm)
    first = min(int(job.partition("_")[0]) for job in slurm.states())
    slurm.call("scancel", f"{first}_2")
    (tmp_path / "gate").touch()
    alone = small_run(tmp_path / "alone", tiny_t2v2)
    cli.app(["loop", str(alone.path), "--iterations", "2"], standalone_mode=False)
    until(lambda: set(slurm.states().values()) <= ENDED, slurm)
    states = slurm.states()
    assert states.pop(f"{first}_2") == "CANCELLED", slurm.logs()
    assert set(states.values()) == {"COMPLETED"}, slurm.logs()
    assert len(states) == 3 + 4 + 2
    for k in (0, 1):
        same(run.iteration(k), alone.iteration(k))
    assert not stage.path.joinpath("work").exists()


def same(one: Stage, other: Stage) -> None:
    """The same videos, trajectories, scores, advantages and weights, bit for bit."""
    assert differences(contents(one), contents(other)) == []
    same_tables(one, other)
    paths = sorted(path.relative_to(one.policy_dir) for path in one.policy_dir.glob("*_noise/*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        assert (one.policy_dir / path).read_bytes() == (other.policy_dir / path).read_bytes()


def test_a_train_job_on_two_nodes_that_is_asked_to_end_is_queued_again(
    slurm: Cluster, tiny_t2v2: Path, tmp_path: Path
) -> None:
    settings = "train.updates_per_rollout=12", "rollout.prompts_per_iteration=4"
    run, alone = small_run(tmp_path / "run", tiny_t2v2, *settings), small_run(tmp_path / "alone", tiny_t2v2, *settings)
    options = ["--parsable", "--nodes=2", "--gpus-per-node=1"]
    more = {"OMP_NUM_THREADS": "1", "GATE": str(tmp_path / "gate")}
    job = slurm.call("sbatch", *options, SLURM / "train.sbatch", run.path, "0", **more).strip()
    log = run.iteration(0).policy_dir / "metrics.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") >= 2, slurm)
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # as SLURM itself does before the time is up
    until(lambda: "Restarts=1" in slurm.call("scontrol", "show", "job", job), slurm)
    (tmp_path / "gate").touch()
    kept = log.read_text()
    assert not run.iteration(0).trained()
    until(lambda: slurm.states()[job] in ENDED, slurm)
    assert slurm.states()[job] == "COMPLETED", slurm.logs()
    assert run.iteration(0).trained()
    assert log.read_text().startswith(kept)
    assert "stopped by SIGUSR1" in (slurm.folder / f"slurm-{job}.out").read_text()
    assert "NumNodes=2" in slurm.call("scontrol", "show", "job", job)
    cli.app(["loop", str(alone.path), "--iterations", "1"], standalone_mode=False)
    for name in ("high_noise", "low_noise"):
        ours, theirs = (load_file(one.iteration(0).policy_dir / name / WEIGHTS) for one in (run, alone))
        for key in theirs:  # two ranks add gradients up in another order
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5, msg=key)
