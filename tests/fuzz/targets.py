"""Every kind of reader as a function of bytes: it returns, or raises a UserError with a place and a hint.

Nothing heavy is imported here: `__main__` asks for what it imports to be instrumented, and libraries are not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rollout.prompts.files import Column, read_rows
from shards import index, sidecar, tensors, video
from shards.errors import UserError
from shards.files import read_json
from shards.plan import RolloutPlan, VideoShape
from shards.records import kinds
from shards.records.updates import read_updates, update_faults
from shards.run_toml import load_config
from shards.workers import owners

FOLDER = Path(tempfile.gettempdir()) / f"rushes-fuzz-{os.getpid()}"
SHAPE = VideoShape(32, 64, 5, 16, 12)
SMALL = video.VideoLimits(frames=16, pixels=2**14, all_pixels=2**17)
SAMPLE = "i000000-p000000-s00"
Reader = Callable[[Path], object]


def plan_file(path: Path) -> object:
    """A plan."""
    return RolloutPlan.from_json(path.read_bytes(), path)


def log_file(path: Path) -> object:
    """A log of updates."""
    return [*update_faults(path, 0, ended=True), *read_updates(path)]


def claim_file(path: Path) -> object:
    """A claim on a shard."""
    return owners.read(path, 0, "rollout")


def _sample(path: Path) -> object:
    return index.parse_meta(memoryview(path.read_bytes()), SAMPLE, str(path))


def _index(path: Path) -> object:
    table, _ = index.read(path, rows=2)
    return index.check_rows(table.to_pylist(), 10**6, str(path))


def _tensors(path: Path) -> object:
    data = memoryview(bytearray(path.read_bytes()))
    entries, _ = tensors.parse(data, str(path))
    return tensors.check(data, entries, str(path))


def _tar(path: Path) -> object:
    return index.scan(memoryview(path.read_bytes()), str(path))


def _header(path: Path) -> object:
    return video.check_mp4(path.read_bytes(), SHAPE, str(path))


def _video(path: Path) -> object:
    return video.load_video(path, SMALL)


def _prompts(path: Path) -> object:
    return [*read_rows(path, Column())]


READERS: dict[str, tuple[str, Reader]] = {
    "json": ("a.json", read_json), "manifest": ("manifest.json", kinds.read_manifest_file),
    "plan": ("plan.json", plan_file), "frozen": ("plan.json", kinds.read_train_plan),
    "policy": ("policy.json", kinds.read_policy),
    "expert": ("expert.json", kinds.read_expert), "summary": ("_summary.json", kinds.read_summary),
    "commit": ("commit.json", kinds.read_checkpoint), "model": ("model.json", kinds.read_model_record),
    "metrics": ("metrics.jsonl", log_file), "claim": ("a.claim", claim_file), "sample": ("sample.json", _sample),
    "index": ("index.parquet", _index), "table": ("table.parquet", sidecar.read_table),
    "tensors": ("a.safetensors", _tensors), "tar": ("shard.tar", _tar), "header": ("a.mp4", _header),
    "video": ("b.mp4", _video), "toml": ("run.toml", load_config), "text": ("p.txt", _prompts),
    "csv": ("p.csv", _prompts), "jsonl": ("p.jsonl", _prompts), "parquet": ("p.parquet", _prompts),
}  # fmt: skip
"""The name of the file that each kind of reader is given, and the reader."""


def read(kind: str, data: bytes) -> UserError | None:
    """Give a file with this content to a reader. The refusal, if it is one; raises whatever else the reader raises.

    AssertionError for a refusal that does not name the file, has several lines, or does not say what to do.
    """
    name, reader = READERS[kind]
    path = FOLDER / kind / name  # by kind: several are fuzzed at a time
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    refused: UserError | None = None
    try:
        reader(path)
    except UserError as error:
        refused = error
    if refused is not None:
        assert str(path) in refused.problem, f"does not name the file: {refused.problem}"
        assert "\n" not in str(refused), f"several lines: {refused.problem!r}"
        assert refused.hint, f"no hint: {refused.problem}"
    return refused


TARGETS: dict[str, Callable[[bytes], object]] = {kind: partial(read, kind) for kind in READERS}
