"""How long `rushes score --advantages-only` takes: shards and scores of a whole iteration, then the call itself.

The run is written by the product's own writers: groups of 16 samples with small files, OCR scores with their text and
guard metrics. Then the command runs in a process of its own, with other weights than before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.plans import bare_plan, bare_sample
from score import tables
from score.reward import Chosen, Scored
from shards import sidecar
from shards.run import Run, Stage
from shards.run_toml import parse_config, read_preset
from shards.spool import write_group, write_samples
from shards.writer import seal

GROUP, GROUPS_A_SHARD = 16, 25
WEIGHTS = ("ocr=0.7", "ocr.exact=0.2", "guards.saturation=0.1")


def measure(folder: Path, samples: int) -> tuple[float, float]:
    """Seconds of the command: by the clock, and of the processor."""
    run = Run.create(folder / "run", parse_config(read_preset("words"), "preset words"))
    stage = fill(run.iteration(0), samples)
    for chosen in tables.select(run.config.score).scorers:
        for shard in stage.shards():
            keys = stage.keys(shard)
            found = [invented(chosen, shard * len(keys) + number) for number in range(len(keys))]
            table = tables.score_table(chosen, keys, found)
            sidecar.write_scores(stage, shard, chosen.directory, table, tables.provenance(chosen))
    words = [word for weight in WEIGHTS for word in ("--reward", weight)]
    program = [sys.executable, "-c", "import cli; cli.main()"]
    before, began = os.times(), time.perf_counter()
    subprocess.run([*program, "score", str(run.path), "--iteration", "0", *words, "--advantages-only"], check=True)
    seconds, after = time.perf_counter() - began, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, processor


def fill(stage: Stage, samples: int) -> Stage:
    """A sampled stage: `samples` of them, rounded up to whole groups, with tensors and videos of a few bytes."""
    plan = stage.publish_plan(bare_plan(stage.iteration, -(-samples // GROUP), GROUP, GROUPS_A_SHARD))
    latents = np.zeros((1, 1, 1, 1, 1), np.float16)
    for shard, members in enumerate(plan.shards):
        for group in members:
            write_group(stage, shard, group, {"prompt": np.zeros((1, 1), np.float16)})
            for number in range(GROUP):
                write_samples(stage, shard, bare_sample(stage, group, number, latents, b"video"))
        seal(stage, shard, {})
    return stage


def invented(chosen: Chosen, seed: int) -> Scored:
    """Some score of a reward."""
    rng = np.random.default_rng(seed)
    values: Mapping[str, Any] = {name: float(rng.uniform()) for name in chosen.components}
    return Scored(values, text=["FILM"] * 3, confidence=[0.9] * 3) if chosen.keeps_text else Scored(values)
