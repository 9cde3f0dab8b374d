"""The first minutes on a GPU: whether everything works there, what it costs, and how that compares with the plan.

    python bench/first_gpu.py --page docs/benchmarks.md      all seven steps, at most 8 minutes, about 6 of an H200
    python bench/first_gpu.py --steps 5 6 --minutes 4        some of them
    python bench/first_gpu.py --steps 6 7 --shape a14b:480x832x13 --shape i2v-a14b:480x832x13
    python bench/first_gpu.py --small                        the same script with tiny models, on a CPU, in seconds

    1  versions, the device, its attention kernels
    2  two tiny experts: replay 0, first ratios 1, the idle expert on the host, a killed training resumed
    3  every objective, estimator, KL, layout and law on tiny models, LoRA and all weights
    4  FSDP on one rank of NCCL
    5  the velocity of Wan2.1-1.3B, bit for bit: without and with gradient, after a swap, in another process
    6  memory alive and reserved against `rushes plan-memory`, 1.3B and eight blocks of A14B
    7  rollout and updates against bare calls of model and VAE, and against WanPipeline

Weights are random, and nothing is fetched. Each finding is printed as it is made, and the page is written after every
step, so that nothing is lost when the script is stopped. A step that fails is recorded with its error, and the next one
runs. When the minutes are spent, what is missing is recorded as not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers.utils import logging as diffusers_logging

from bench.gpu.environment import describe, environment
from bench.gpu.figures import memory, throughput
from bench.gpu.found import Finding, OutOfTime, Place
from bench.gpu.models import MODELS, Case
from bench.gpu.tiny import matrix, one_rank, two_experts
from bench.gpu.velocity import velocities
from bench.learn import replace_section

LOW, HIGH = Case("1.3b", 240, 416, 33, steps=10, prompts=2), Case("1.3b", 480, 832, 81)
BLOCKS = Case("a14b", 480, 832, 81, layers=8)
TINY = {"height": 32, "width": 32, "frames": 5, "steps": 4, "text_length": 24, "rank": 4, "prompts": 1,
        "dtype": "float32", "small": True}  # fmt: skip
SHAPE = re.compile(r"([a-z0-9.-]+):(\d+)x(\d+)x(\d+)(?::(\d+))?")

Step = Callable[[Place], Iterator[Finding]]


def steps(arguments: argparse.Namespace) -> dict[int, Step]:
    """The seven steps, on the models and shapes that were asked for."""
    chosen: list[Case] = arguments.shape or [BLOCKS, LOW, HIGH]
    if arguments.small:
        chosen = [replace(case, layers=1, **TINY) for case in arguments.shape or [LOW]]
    timed = [case for case in chosen if arguments.small or not case.layers]
    return {
        1: environment,
        2: two_experts,
        3: matrix,
        4: one_rank,
        5: lambda place: velocities(place, chosen[-1] if arguments.small else LOW),
        6: lambda place: memory(place, chosen),
        7: lambda place: throughput(place, timed),
    }


def run_all(place: Place, chosen: dict[int, Step], told: Callable[[list[Finding]], None]) -> list[Finding]:
    """Every step in turn; `told` gets all that is known after each of them."""
    found: list[Finding] = []
    for number, step in chosen.items():
        began = time.monotonic()
        try:
            with alarm(place.left):
                for one in step(place):
                    found.append(one)
                    show(one)
        except OutOfTime:
            found.append(Finding(number, "not finished", "the minutes are spent"))
            show(found[-1])
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:300]
            found.append(Finding(number, "failed", f"{type(error).__name__}: {first}", False))
            show(found[-1])
        print(f"step {number}: {time.monotonic() - began:.1f} s, {max(0.0, place.left):.0f} s left", flush=True)
        told(found)
    return found


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside once so many seconds have passed."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def show(one: Finding) -> None:
    """A finding as it is made."""
    print(f"  {one.step}  {one.what}: {one.found}{VERDICTS[one.ok]}", flush=True)


VERDICTS = {True: "  [as it should be]", False: "  [NOT AS IT SHOULD BE]", None: ""}


def render(arguments: argparse.Namespace, device: torch.device, found: list[Finding], minutes: float) -> str:
    """The section of the page."""
    wrong = sum(one.ok is False for one in found)
    lines = [
        f"`python bench/first_gpu.py {' '.join(arguments.command)}`, {minutes:.1f} minutes: {describe(device)}, torch "
        f"{torch.__version__}, random weights. Not as they should be: {wrong} of {len(found)} findings.",
        "",
    ]
    if device.type == "cpu":
        lines += ["Not taken on a GPU: this only shows that the script runs; its times say nothing about a GPU.", ""]
    lines += ["| step | what | found | as it should be |", "|-|-|-|-|"]
    verdict = {True: "yes", False: "**no**", None: ""}
    for one in found:
        text = one.found.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {one.step} | {one.what} | {text} | {verdict[one.ok]} |")
    return "\n".join(lines) + "\n"


def shape(text: str) -> Case:
    """MODEL:HEIGHTxWIDTHxFRAMES[:BLOCKS]."""
    match = SHAPE.fullmatch(text)
    if match is None or match[1] not in MODELS:
        raise argparse.ArgumentTypeError(f"{text!r}: MODEL:HxWxFRAMES[:BLOCKS], MODEL one of {', '.join(MODELS)}")
    return Case(match[1], int(match[2]), int(match[3]), int(match[4]), layers=int(match[5] or 0))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--steps", type=int, nargs="+", choices=range(1, 8), default=list(range(1, 8)))
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not done by then is left out")
    parser.add_argument("--shape", type=shape, action="append", default=[], help="of steps 6 and 7, instead of theirs")
    parser.add_argument("--out", type=Path, help="keep models and runs in this folder, which must not exist")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    arguments = parser.parse_args(words)
    arguments.command = words
    return arguments


def main(words: list[str] | None = None) -> list[Finding]:
    """Run the steps, print the table, and write it into the page if one is named."""
    arguments = parse(sys.argv[1:] if words is None else words)
    if not arguments.small and not torch.cuda.is_available():
        sys.exit("no CUDA device here: --small runs the same script on a CPU")
    diffusers_logging.disable_progress_bar()
    began = time.monotonic()
    device = torch.device("cpu" if arguments.small else "cuda")
    if arguments.small:
        torch.set_num_threads(1)  # a fork does not survive threads of OpenMP
    out = arguments.out or Path(tempfile.mkdtemp(prefix="rushes-first-gpu-"))
    out.mkdir(parents=True, exist_ok=arguments.out is None)

    def told(found: list[Finding]) -> None:
        if arguments.page is not None:
            replace_section(arguments.page, "gpu", render(arguments, device, found, (time.monotonic() - began) / 60))

    try:
        place = Place(out, device, arguments.small, arguments.minutes)
        chosen = {number: step for number, step in steps(arguments).items() if number in arguments.steps}
        found = run_all(place, chosen, told)
    finally:
        if arguments.out is None:
            shutil.rmtree(out, ignore_errors=True)
    print("\n" + render(arguments, device, found, (time.monotonic() - began) / 60))
    return found


if __name__ == "__main__":
    main()
