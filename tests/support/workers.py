"""Small runs, what makes two of them the same, and ranks of torchrun on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from shards import sidecar
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset
from tests.support.tiny_models import TEXT_LENGTH

WORDS = ("FILM", "CAT", "DOG", "SUN", "REEL", "CUT")


def small_run(path: Path | str, model: Path, *sets: str, prompts_in: Path | None = None) -> Run:
    """A run on the tiny two-expert model: six shards of two samples in an iteration. Its prompts lie beside it, or in
    the folder that is given."""
    prompts = (prompts_in or Path(path).parent) / "prompts.txt"
    prompts.write_text("".join(f'a sign "{word}"\n' for word in WORDS), encoding="utf-8")
    settings = [
        f"model.path={model}", "model.device=cpu", f"model.text_length={TEXT_LENGTH}", f"rollout.prompts={prompts}",
        f"eval.prompts={prompts}", "rollout.prompts_per_iteration=6", "rollout.group_size=2", "rollout.batch_size=1",
        "rollout.steps=4", "rollout.height=16", "rollout.width=16", "rollout.groups_per_shard=1",
        "rollout.high_steps=1", "rollout.low_steps=1", "rollout.first_step=0", "eval.steps=3", "eval.limit=4",
        "score.rewards={contrast=1.0}", "score.min_spread=0.0", "score.workers=1", "rollout.workers=1",
        "train.objective=grpo", "train.lora_rank=2", "train.updates_per_rollout=1",
    ]  # fmt: skip
    return Run.create(path, parse_config(apply_sets(read_preset("words"), [*settings, *sets]), "preset words"))


def same_tables(one: Stage, other: Stage) -> None:
    """Fails unless both have the same scores and advantages, bit for bit."""
    assert sidecar.scorers(one) == sidecar.scorers(other)
    for scorer in sidecar.scorers(one):
        frames = [sidecar.read_scores(stage, scorer) for stage in (one, other)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert sidecar.specifications(one) == sidecar.specifications(other)
    for name in sidecar.specifications(one):
        frames = [sidecar.read_advantages(stage, name) for stage in (one, other)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)


def torchrun(logs: Path, *arguments: object) -> str:
    """The command line in two ranks of torchrun, as the documentation starts it; what both of them said.

    Fails unless it ends well. torchrun's own files go to `logs`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    rushes = str(Path(sys.executable).with_name("rushes"))
    logs.mkdir()
    result = subprocess.run(
        [*command, "--no-python", rushes, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(logs)}, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr
