"""Small runs, and workers on them as processes of their own: commands, and ranks of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shards.config import apply_sets, parse_config, read_preset
from shards.run import Run
from tests.tiny_models import TEXT_LENGTH

ROOT = Path(__file__).parents[1]
WORDS = ("FILM", "CAT", "DOG", "SUN", "REEL", "CUT")


def small_run(path: Path, model: Path, *sets: str) -> Run:
    """A run on the tiny two-expert model: six shards of two samples in an iteration."""
    prompts = path.parent / "prompts.txt"
    prompts.write_text("".join(f'a sign "{word}"\n' for word in WORDS), encoding="utf-8")
    settings = [
        f"model.path={model}", "model.device=cpu", f"model.text_length={TEXT_LENGTH}", f"rollout.prompts={prompts}",
        f"eval.prompts={prompts}", "rollout.prompts_per_iteration=6", "rollout.group_size=2", "rollout.batch_size=1",
        "rollout.steps=4", "rollout.height=16", "rollout.width=16", "rollout.groups_per_shard=1",
        "rollout.high_steps=1", "rollout.low_steps=1", "rollout.first_step=0", "eval.steps=3", "eval.limit=4",
        "score.rewards={contrast=1.0}", "score.min_spread=0.0", "score.workers=2", "train.objective=grpo",
        "train.lora_rank=2", "train.updates_per_rollout=1",
    ]  # fmt: skip
    return Run.create(path, parse_config(apply_sets(read_preset("words"), [*settings, *sets]), "preset words"))


def start(*arguments: str | Path, ranks: int = 0, **environment: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, or in `ranks` processes under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(ROOT / "cli.py"), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], *codes: int) -> str:
    """Wait for it and return what it said; fails unless its exit code is one of `codes` (0 when none is given)."""
    out, talk = process.communicate(timeout=400)
    assert process.returncode in (codes or (0,)), talk
    return out + talk
