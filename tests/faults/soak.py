"""Random faults in random stages of a tiny run: nothing is lost, and what is published is the same bit for bit.

    python -m tests.faults.soak --seconds 600 --seed 1              # all kinds of faults in turn
    python -m tests.faults.soak --seconds 60 --kind freeze --kind race

In each try a run is made, one call of `rollout`, `score` or `train` is disturbed, and then all stages are called until
they are done, as a user would. A try is lost when they do not get there, or when `verify` finds damage. It is wrong
when something published differs from an undisturbed run, or when a process ended in a traceback or without a word.
Exit code 1 if any is. `readonly` needs the right to mount, and is left out without it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from rollout.policy import Policy
from shards.run import Run
from shards.verify.shards import verify
from tests.faults.contents import contents_of, unlike
from tests.faults.disturbing import KINDS, Call, how, mounted
from tests.support import s3_server, tiny_models
from tests.support.forks import Fork, end_all, rushes
from tests.support.workers import small_run

STAGES = ("rollout", "score", "train")
SETTINGS = (
    "rollout.prompts_per_iteration=2", "train.updates_per_rollout=2", "train.save_every=1", "train.ema=0.5",
    "workers.claim_seconds=1.0",
)  # fmt: skip
MOST_CALLS = 5
"""Calls of a stage after which a try is lost."""
BUCKET = "soak"


@dataclass
class Row:
    """What came of the tries with one kind of fault."""

    tries: int = 0
    lost: int = 0
    wrong: int = 0
    noticed: Counter[str] = field(default_factory=Counter)
    """How the disturbed calls ended."""
    faults: list[str] = field(default_factory=list)


class Soak:
    """Tries, each with a run of its own, compared with one that nothing disturbs."""

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.folder, self.model, self.seed = folder, model, seed
        self.seconds: dict[str, float] = {}
        run = self.make(folder / "whole", folder / "whole" / "run")
        for stage in STAGES:
            began = time.monotonic()
            assert self.call(str(run.path), stage, folder / "whole" / stage) == "done"
            self.seconds[stage] = time.monotonic() - began
        self.expected = contents_of(run)

    def make(self, folder: Path, path: Path | str) -> Run:
        """A new run at a path or URL, whose prompts are in a folder."""
        folder.mkdir(exist_ok=True)
        return small_run(path, self.model, *SETTINGS, prompts_in=folder)

    def call(self, run: str, stage: str, folder: Path) -> str:
        """Do a stage in a process that nothing disturbs; how it ended."""
        return how(Fork(folder, rushes(stage, run, "--iteration", "0")))

    def attempt(self, kind: str, number: int, row: Row, server: s3_server.Proxy | None) -> None:
        """One try of one kind of fault."""
        draw = random.Random(f"{self.seed} {kind} {number}")
        disturbed = draw.choice(STAGES)
        with self.place(kind, number) as (folder, path):
            run = self.make(folder, path)
            ended = []
            for stage in STAGES:
                if stage == disturbed:
                    call = Call(str(path), stage, folder / "disturbed", self.seconds[stage], draw, server)
                    seen = KINDS[kind](call)
                    row.noticed[seen] += 1
                ended.append(self.finish(str(path), stage, folder))
            row.tries += 1
            says = f"{kind}, seed {self.seed}, try {number}, in {disturbed}"
            print(f"{says}: {seen}", file=sys.stderr, flush=True)
            damage = [str(one) for one in verify(run.path) if one.kind == "damaged"] if all(ended) else ["no end"]
            if damage:
                row.lost += 1
                row.faults.append(f"lost: {says}: {damage[0]}")
            elif differing := unlike(contents_of(run), self.expected):
                row.wrong += 1
                row.faults.append(f"wrong: {says}: {', '.join(differing[:5])}")

    def finish(self, run: str, stage: str, folder: Path) -> bool:
        """Call a stage until it is done, as often as a patient user would."""
        return any(self.call(run, stage, folder / f"{stage}-{again}") == "done" for again in range(MOST_CALLS))

    @contextlib.contextmanager
    def place(self, kind: str, number: int) -> Iterator[tuple[Path, Path | str]]:
        """A folder for a try, and the path or URL of its run."""
        folder = self.folder / f"{kind}-{number}"
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if kind == "readonly":
                stack.enter_context(mounted(folder / "disk"))
                yield folder, folder / "disk" / "run"
            elif kind == "store":
                environment = mock.patch.dict(os.environ, RUSHES_CACHE=str(folder / "cache"))
                stack.enter_context(environment)
                yield folder, f"s3://{BUCKET}/{kind}-{number}"
            else:
                yield folder, folder / "run"


def possible(kinds: list[str], folder: Path) -> list[str]:
    """Those of the kinds that can be tried here; the others are told."""
    found = list(kinds)
    if "readonly" in found:
        with mounted(folder / "probe") as can:
            if not can:
                found.remove("readonly")
                print("readonly is left out: no file system can be mounted here", file=sys.stderr)
    return found


@contextlib.contextmanager
def store_server() -> Iterator[s3_server.Proxy]:
    """A store with an empty bucket, and the environment that leads to it."""
    from tests.support.stores import client

    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(s3_server.proxied(stack.enter_context(s3_server.served())))
        stack.enter_context(mock.patch.dict(os.environ, {**s3_server.KEYS, "AWS_ENDPOINT_URL": proxy.url}))
        client(f"s3://{BUCKET}").mkdir(f"s3://{BUCKET}")
        yield proxy


def soak(folder: Path, model: Path, kinds: list[str], seconds: float, seed: int, tries: int = 0) -> dict[str, Row]:
    """Try the kinds of faults in turn for so many seconds, or for so many tries in all; a row for each kind."""
    rows = {kind: Row() for kind in kinds}
    policy = Policy.load(model, device="cpu", text_length=tiny_models.TEXT_LENGTH)
    with contextlib.ExitStack() as stack:
        stack.callback(end_all)
        stack.enter_context(mock.patch.object(Policy, "of", return_value=policy))  # each process has a copy of it
        server = stack.enter_context(store_server()) if "store" in kinds else None
        one = Soak(folder, model, seed)
        number, end = 0, time.monotonic() + seconds
        while number < tries or (not tries and time.monotonic() < end):
            one.attempt(kinds[number % len(kinds)], number, rows[kinds[number % len(kinds)]], server)
            number += 1
    for row in rows.values():
        said = {words: count for words, count in row.noticed.items() if "traceback" in words or "NOTHING" in words}
        row.wrong += sum(said.values())
        row.faults += [f"wrong: {count} times {words}" for words, count in said.items()]
    return rows


def table(rows: dict[str, Row]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| fault | tries | lost | wrong | how the disturbed call ended |", "|-|-|-|-|-|"]
    for kind, row in rows.items():
        ends = ", ".join(f"{count} {words}" for words, count in row.noticed.most_common())
        lines.append(f"| {kind} | {row.tries} | {row.lost} | {row.wrong} | {ends.replace('|', 'and')} |")
    return "\n".join(lines)


def main() -> int:
    """Soak, and print the table and every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only these; give it several times")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = possible(arguments.kind or list(KINDS), folder)
        model = tiny_models.save("t2v2", folder / "model")
        rows = soak(folder, model, kinds, arguments.seconds, arguments.seed)
    print(table(rows), *[fault for row in rows.values() for fault in row.faults], sep="\n")
    return int(any(row.faults for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
