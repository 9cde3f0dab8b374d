"""How rushes scales on one machine: stages with 1 and 2 processes, files of real size, the order for many ranks.

    python bench/scale.py                              the measured section of docs/scaling.md, in about 15 minutes
    python bench/scale.py --rounds 1 --out runs/scale  keep what was measured in that folder; a second call reads it

The embedded model is sampled and trained by the product's own commands with a stopwatch on their parts
(bench/scale_probe.py). The order of training is planned for 512 ranks by the product's own function. No GPU was at
hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.learn import replace_section
from bench.scale_measure import KINDS, Measured, Size, Timed, dump, measure, middle, restore, time_files, time_order

RANKS, TRANSITIONS = 512, 100_000
GOAL = 0.02  # share of an update that may be spent waiting for data
NAMES = {"rollout": "rollout", "nft": "updates, DiffusionNFT", "grpo": "updates, GRPO"}
HEADS = {"model": "model", "video": "H.264", "read": "reading", "write": "writing", "wait": "waiting", "rest": "rest"}


def machine() -> dict[str, Any]:
    """What this was measured on, and how busy it was before."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def take(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All measurements, or those that a call before left in `out`."""
    stored = out / "measured.json"
    if stored.exists():
        return dict(json.loads(stored.read_text(encoding="utf-8")))
    size = Size(arguments.prompts, arguments.group, arguments.updates)
    busy = machine()
    runs = measure(out, size, arguments.rounds, (1, 2))
    files, parts = time_files(out / "files", arguments.samples, 200)
    shutil.rmtree(out / "files")
    found = {
        "machine": busy, "load_after": os.getloadavg()[0], "size": asdict(size), "rounds": arguments.rounds,
        "runs": dump(runs), "files": asdict(files), "parts": parts, "order": time_order(RANKS, TRANSITIONS),
    }  # fmt: skip
    stored.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def measured_section(command: str, found: dict[str, Any]) -> str:
    """The measured part of the page."""
    runs, size, here = restore(found["runs"]), Size(**found["size"]), found["machine"]
    lines = [
        f"`{command}` on {here['cores']} cores of {here['cpu']}, torch {here['torch']}. The machine was shared: its "
        f"load was {here['load']:.1f} before and {found['load_after']:.1f} after the measurement. One torch thread a "
        f"process; {size.prompts} shards of {size.group} videos; rounds of all kinds in turn: {found['rounds']}. "
        "Rates are the median with the range in brackets, shares those of the median round; imports and the loading of "
        "the model are not counted.",
        "",
        "| stage | processes | a second | processor, ms each | " + " | ".join(HEADS[kind] for kind in KINDS) + " |",
        "|-" * (len(KINDS) + 4) + "|",
    ]
    for name, rounds in runs.items():
        lines.append(stage_row(name, rounds))
    return "\n".join([*lines, "", *speed_lines(runs), "", *commit_lines(runs, size), "", *file_lines(found),
                      "", *order_lines(found["order"])]) + "\n"  # fmt: skip


def stage_row(name: str, rounds: Sequence[Timed]) -> str:
    """One line of the table of stages."""
    one, rates = middle(rounds), [timed.rate for timed in rounds]
    kind, _, count = name.partition(" ")
    shares = " | ".join(f"{100 * one.shares[key]:.1f} %" for key in KINDS)
    unit = "videos" if kind == "rollout" else "transitions"
    rate = f"{one.rate:.2f} {unit} ({min(rates):.2f}–{max(rates):.2f})"
    cpu = statistics.median(timed.cpu for timed in rounds)
    return f"| {NAMES[kind]} | {count} | {rate} | {1e3 * cpu:.0f} | {shares} |"


def speed_lines(runs: dict[str, list[Timed]]) -> list[str]:
    """What a second process brings, and whether data keeps an update waiting."""
    lines = []
    for kind, name in NAMES.items():
        one, two = (middle(runs[f"{kind} {count}"]) for count in (1, 2))
        each = [statistics.median(timed.cpu for timed in runs[f"{kind} {count}"]) for count in (1, 2)]
        lines.append(
            f"- {name}: two processes do {two.rate / one.rate:.2f} times what one does, and take "
            f"{each[1] / each[0]:.2f} times the processor time for each."
        )
    worst = max(
        timed.shares["read"] for name, rounds in runs.items() if not name.startswith("rollout") for timed in rounds
    )
    verdict = "kept" if worst < GOAL else "missed"
    lines.append(
        f"- Waiting for data takes at most {100 * worst:.2f} % of the updates in any round; the goal, under "
        f"{100 * GOAL:.0f} %, is {verdict}."
    )
    return lines


def commit_lines(runs: dict[str, list[Timed]], size: Size) -> list[str]:
    """What claims and commits cost for one shard of the embedded model."""
    lines = [
        "Claims and commits for one shard of the embedded model, in milliseconds and as a share of the time a worker "
        "spends on a shard:",
        "",
        "| | 1 worker | 2 workers |",
        "|-|-|-|",
    ]
    both = [middle(runs[f"rollout {count}"]) for count in (1, 2)]
    parts = {
        "claim and release": ("claim",),
        "unfinished and finished samples, texts, to the spool": ("sample", "phase", "text"),
        "seal: tar, index, manifest, sweep": ("seal",),
        "of these two: waiting for the disk (fsync)": ("fsync",),
        "of these two: hard links": ("link",),
    }
    for name, labels in parts.items():
        cells = []
        for timed in both:
            a_shard = timed.seconds * timed.processes / size.prompts
            spent = sum(timed.parts.get(label, 0.0) for label in labels) / size.prompts
            cells.append(f"{1e3 * spent:.1f} ms, {100 * spent / a_shard:.2f} %")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    published = both[0].calls["publish"] / size.videos
    expected = 2 + (1 + 3) / size.group
    lines += ["", f"A video took {published:.2f} published files; by arithmetic it takes {expected:.2f}."]
    return lines


def file_lines(found: dict[str, Any]) -> list[str]:
    """The cost of files of real size."""
    files, parts = Measured(**found["files"]), found["parts"]
    return [
        f"A shard of {parts['samples']:.0f} videos as large as A14B's at 480x832 and 81 frames, "
        f"{parts['tar'] / 1e6:.0f} MB: {parts['spooling']:.2f} s into the spool, {parts['sealing']:.2f} s to seal, "
        f"{files.write / 1e6:.0f} MB/s over the {parts['written'] / 1e6:.0f} MB that are written for it; states are "
        f"read back, checksums verified, at {files.read / 1e6:.0f} MB/s from the page cache. A small file is published "
        f"in {1e3 * files.publish:.2f} ms, a claim taken and released in {1e3 * parts['claim']:.2f} ms (medians).",
    ]


def order_lines(order: dict[str, float]) -> list[str]:
    """The order of training for many ranks."""
    return [
        f"Order of training for {RANKS} ranks and {TRANSITIONS:,} transitions, planned by one process in "
        f"{order['planning']:.1f} s and read for all ranks in {order['reading']:.1f} s: every transition exactly once, "
        f"{order['slots']:.0f} passes on every rank, {100 * order['padding']:.2f} % of them padding; the busiest rank "
        f"has {100 * order['imbalance']:.1f} % more samples than the mean.",
    ]


def main(words: list[str] | None = None) -> None:
    """Measure, print the section, and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"rounds": 3, "prompts": 8, "group": 8, "updates": 4, "samples": 8}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="keep the measurements in this folder, and read them when they exist")
    parser.add_argument("--page", type=Path, default=Path("docs/scaling.md"))
    arguments = parser.parse_args(words)
    changed = [f"--{name} {getattr(arguments, name)}" for name, value in numbers.items()
               if getattr(arguments, name) != value]  # fmt: skip
    out = arguments.out or Path(tempfile.mkdtemp(prefix="rushes-scale-"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        found = take(arguments, out)
    finally:
        if arguments.out is None:
            shutil.rmtree(out)
    text = measured_section(" ".join(["python bench/scale.py", *changed]), found)
    print(text)
    replace_section(arguments.page, "measured", text)


if __name__ == "__main__":
    main()
