"""Small runs of three layouts, and the sha256 of every file they leave: what a reorganisation must not change.

    python -m tests.house.golden_run --write FILE      # the lines `sha256 path`, kept in FILE
    python -m tests.house.golden_run --compare FILE    # exit code 1 and the paths that differ from FILE

Each layout makes two iterations by the command line (rollout, score, train), an evaluation, a table, a report and an
export. Clocks, host, process number, peak memory and the version of this package are fixed while they run; what else
depends on the machine stays in (torch rounds alike on one machine alone), so hashes are compared on one machine and
with the same libraries. The runs lie in a fixed folder, because a plan names the images of its prompts in full.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import re
import resource
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from PIL import Image

FOLDER = Path(tempfile.gettempdir()) / "rushes-golden"
NOW = 1_700_000_000.0  # seconds since 1970
PUBLISHED: dict[str, Any] = {
    "train.objective": "grpo", "train.estimator": "noise", "train.error_weight": "derived", "train.proximal": 0.0,
    "train.clip_range": 1e-3,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "t2v2": {"rollout.high_steps": 1, "rollout.low_steps": 2, **PUBLISHED, "train.kl_beta": 0.1},
    "i2v2": {"rollout.high_steps": 1, "rollout.low_steps": 1, **PUBLISHED, "train.ratio_norm": True},
    "ti2v": {"rollout.high_steps": 2, "rollout.low_steps": 0, "train.objective": "nft", "rollout.width": 32,
             "rollout.height": 32},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "model.text_length": 24, "rollout.prompts_per_iteration": 2, "rollout.group_size": 3, "rollout.batch_size": 2,
    "rollout.steps": 6, "rollout.height": 16, "rollout.width": 16, "rollout.frames": 5, "rollout.groups_per_shard": 1,
    "rollout.first_step": 0, "rollout.workers": 1, "score.workers": 1, "score.min_spread": 0.0, "train.lora_rank": 2,
    "train.updates_per_rollout": 2, "train.save_every": 1, "train.ema": 0.5, "eval.steps": 3, "eval.limit": 2,
}  # fmt: skip
REWARDS = "score.rewards={ contrast = 1.0, motion = 0.2, brightness = 0.1 }"


def hashes(layouts: list[str]) -> dict[str, str]:
    """Make the runs; the sha256 of all their files by path, those of the models left out. One process at a time."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(FOLDER, ignore_errors=True)
        found: dict[str, str] = {}
        for layout in layouts:
            for path in make(layout):
                found[path.relative_to(FOLDER).as_posix()] = sha256(path)
        shutil.rmtree(FOLDER)
    return named(found)


def make(layout: str) -> list[Path]:
    """One layout's run with all that is made from it; returns its files."""
    from tests.support import tiny_models

    folder = FOLDER / layout
    model = tiny_models.save(layout, FOLDER / "models" / layout)
    settings = {**SETTINGS, **LAYOUTS[layout], "model.path": str(model)}
    settings["rollout.prompts"] = settings["eval.prompts"] = str(prompts(folder, layout, settings))
    texts = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    sets = [part for text in (*texts, REWARDS) for part in ("--set", text)]
    run = folder / "run"
    with frozen():
        outputs = [
            rushes("init", run, "--preset", "words", *sets),
            rushes("rollout", run, "--dry-run"),
            rushes("rollout", run),
            rushes("score", run),
            rushes("train", run),
            rushes("loop", run, "--iterations", 2),
            rushes("eval", run),
            rushes("verify", run, "--replay"),
            rushes("inspect", run, "--format", "csv"),
            rushes("inspect", run, "--eval", "--group-by", "prompt"),
            rushes("status", run),
            rushes("plan-memory", run),
            rushes("report", run, "--tensorboard"),
            rushes("export", run, "--out", folder / "export"),
        ]
    (folder / "stdout.txt").write_text("\n".join(outputs), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def prompts(folder: Path, layout: str, settings: dict[str, Any]) -> Path:
    """A prompts file of three lines; where the layout starts from an image, each line has one."""
    folder.mkdir(parents=True)
    rows: list[dict[str, str]] = [{"prompt": f'a sign "{word}"'} for word in ("FILM", "CAT", "DOG")]
    if layout != "t2v2":
        size = settings["rollout.width"], settings["rollout.height"]
        image = Image.new("RGB", size)
        image.putdata([(at * 7 % 251, at * 13 % 251, at % 251) for at in range(size[0] * size[1])])
        image.save(folder / "first.png")
        rows = [{**row, "image": "first.png"} for row in rows]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rushes(*arguments: object) -> str:
    """One command in this process; returns its stdout. Raises RuntimeError when it does not end well."""
    import cli

    out, said = io.StringIO(), io.StringIO()
    command = ["rushes", *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{out.getvalue()}{said.getvalue()}")
    return f"$ {' '.join(command[:2])}\n{out.getvalue()}{said.getvalue()}"


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside, no clock moves, and host, process number, peak memory and the version of this package are fixed."""
    true_version = importlib.metadata.version
    usage = SimpleNamespace(ru_maxrss=1, ru_utime=0.0, ru_stime=0.0)

    def version(name: str) -> str:
        return "0" if name == "rushes" else true_version(name)

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_: value

    fixed: list[tuple[Any, str, Callable[..., Any]]] = [
        (time, "time", always(NOW)), (time, "monotonic", always(NOW)), (time, "perf_counter", always(NOW)),
        (socket, "gethostname", always("host")), (os, "getpid", always(1)), (resource, "getrusage", always(usage)),
        (importlib.metadata, "version", version),
    ]  # fmt: skip
    with contextlib.ExitStack() as patches:
        for module, name, function in fixed:
            patches.enter_context(mock.patch.object(module, name, function))
        yield


def sha256(path: Path) -> str:
    """sha256 of what a file says: of a TensorBoard log without times, of a checkpoint without the order of its header.

    torch writes the header of a checkpoint's tensors in a random order, so its commit.json counts without its hashes.
    """
    data = path.read_bytes()
    if "tfevents" in path.name:
        data = events(path)
    elif "trainer" in path.parts and path.suffix == ".safetensors":
        (length,) = struct.unpack_from("<Q", data)
        data = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
    elif "trainer" in path.parts and path.name == "commit.json":
        record = json.loads(data)
        record.pop("content_sha256", None)  # of these hashes, too
        data = json.dumps({**record, "sha256": sorted(record["sha256"])}, sort_keys=True).encode()
    elif path.name == "stdout.txt":
        # `status` shows rates by the times of files
        data = re.sub(rb"(?m)^(iter-\d+ .* \d+/\d+ +\d+ +\d+) .*$", rb"\1", data)
    return hashlib.sha256(data).hexdigest()


def events(path: Path) -> bytes:
    """The records of a TensorBoard log without their times."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    records = []
    for event in EventFileLoader(str(path)).Load():
        event.wall_time = 0.0
        records.append(event.SerializeToString(deterministic=True))
    return b"\0".join(records)


def named(found: dict[str, str]) -> dict[str, str]:
    """The hashes with the names of TensorBoard logs cut to what says which they are."""
    return {path.partition(".tfevents")[0]: value for path, value in sorted(found.items())}


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """One line for each path whose hash is another one, or that only one of both has."""
    lines = []
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in ours or path not in theirs:
            lines.append(f"{path}: only in {'this run' if path in ours else 'the file'}")
        elif ours[path] != theirs[path]:
            lines.append(f"{path}: another sha256")
    return lines


def main() -> int:
    """Make the runs, print or keep their hashes, or compare them with those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this one; all if absent")
    parser.add_argument("--write", type=Path, help="keep the hashes in this file")
    parser.add_argument("--compare", type=Path, help="compare with the hashes of this file")
    arguments = parser.parse_args()
    layouts = arguments.layout or list(LAYOUTS)
    found = hashes(layouts)
    text = "".join(f"{value} {path}\n" for path, value in found.items())
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    if not arguments.compare:
        sys.stdout.write(text)
        return 0
    lines = (line.split(" ", 1) for line in arguments.compare.read_text(encoding="utf-8").splitlines())
    known = {path: value for value, path in lines if path.partition("/")[0] in layouts}
    changed = differences(found, known)
    print("\n".join(changed) if changed else f"{len(found)} files, all as in {arguments.compare}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
