"""Speed of scoring: OCR against plain `readtext` frame by frame, and advantages of 10,000 samples with other weights.

    python bench/scoring.py                      480x832 and 32x64 frames on all cores; writes docs/benchmarks.md
    python bench/scoring.py --sizes 64x160 --workers 1 --rounds 5 --samples 0 --page ''

The plain side is EasyOCR as it comes, frame by frame in one process, with one torch thread and with one a core: the
faster one counts. Ours is one process a core with one thread each, as `rushes score` runs them. Loading is not timed.
Every round times all of them on the same new frames, so that a busy machine slows both; ratios are of the medians. The
texts must be equal. No two frames are, so reading equal frames once does not help; what it saves is measured apart, on
half of the frames, every one twice in a row. Seconds of the processor are given beside those of the clock: they tell
less of what else the machine did. (Not `score.py`: as a script it would hide the package of that name.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.reweigh import measure as reweigh
from score import process

WORDS = ("FILM", "OPEN", "GATE", "SALE", "MOON", "BIRD", "LAMP", "RAIN", "COLD", "EAST", "PARK", "WIND")
HEAD = """| frames | side | ms a frame | processor ms a frame | times faster | by processor | equal texts |
|-|-|-|-|-|-|-|
"""
COPIES = 2  # of every frame, where reading equal frames once is measured
Found = list[tuple[NDArray[np.float64], str, float]]
_kept: dict[str, Any] = {}


@dataclass
class Side:
    """One way to read the frames: seconds of each round by the clock and of the processor, and what was read."""

    name: str
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    read: list[Found] = field(default_factory=list)


def draw(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A frame with one word of a third of the height on grey noise: red = green = blue, on which both sides agree."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    noise = rng.integers(20, 70, (height, width), dtype=np.uint8)
    image = Image.fromarray(noise)
    size = max(14, min(height // 3, width // 5))
    place = (int(rng.integers(2, max(3, width // 10))), int(rng.integers(2, max(3, height - 2 * size))))
    ImageDraw.Draw(image).text(place, WORDS[seed % len(WORDS)], font=ImageFont.load_default(size), fill=235)
    return np.repeat(np.asarray(image)[..., None], 3, axis=2)


def plain(frames: list[NDArray[np.uint8]], threads: int) -> tuple[list[Found], float]:
    """`readtext` frame by frame; what it found, and seconds of the processor. The reader is kept between calls."""
    import torch

    warnings.filterwarnings("ignore", message=".*quantiz.*|.*pin_memory.*|.*migrat.*")
    if "reader" not in _kept:
        import easyocr

        from score.ocr.networks import weights_folder

        _kept["folder"] = tempfile.TemporaryDirectory()
        _kept["reader"] = easyocr.Reader(
            ["en"],
            gpu=False,
            verbose=False,
            download_enabled=False,
            model_storage_directory=str(weights_folder()),
            user_network_directory=_kept["folder"].name,
        )
    torch.set_num_threads(threads)
    smallest, start = 5 if min(frames[0].shape[:2]) < 128 else 20, time.process_time()
    found = [_kept["reader"].readtext(frame, min_size=smallest) for frame in frames]
    seconds = time.process_time() - start
    return [[(np.asarray(box, dtype=float), text, float(sure)) for box, text, sure in one] for one in found], seconds


def ours(frames: list[NDArray[np.uint8]], bf16: bool) -> tuple[list[Found], float]:
    """The reader of the OCR reward in a scoring process; as `plain`."""
    from score.ocr.reading import TextReader

    start = time.process_time()
    found = TextReader(detector_bf16=bf16).read(frames)
    seconds = time.process_time() - start
    return [[(box.corners, box.text, box.confidence) for box in boxes] for boxes in found], seconds


def measure(pool: Executor, parts: list[tuple[Any, ...]], side: Side) -> None:
    """Call one function on several parts of the frames at once; adds a round to `side`."""
    start = time.perf_counter()
    jobs = [pool.submit(*part) for part in parts]
    done = [job.result() for job in jobs]
    side.clock.append(time.perf_counter() - start)
    side.processor.append(sum(seconds for _, seconds in done))
    side.read += [found for part, _ in done for found in part]


def compare(height: int, width: int, options: argparse.Namespace, pools: tuple[Executor, Executor]) -> str:
    """Rows of the table for one size of frames; the first round warms up and is not counted."""
    share = COPIES * max(1, -(-_frames(height, width, options) // (COPIES * options.workers)))
    count = share * options.workers
    threads = sorted({1, options.workers})
    sides = [Side(f"readtext, {number} threads" if number > 1 else "readtext, 1 thread") for number in threads]
    fast = Side(f"rushes, {options.workers} processes" if options.workers > 1 else "rushes, 1 process")
    still = Side(f"{fast.name}, every frame twice")
    for turn in range(options.rounds + 1):
        frames = [draw(1000 * turn + number, height, width) for number in range(count)]
        for side, number in zip(sides, threads, strict=True):
            measure(pools[0], [(plain, frames, number)], side)
        for side, given in ((fast, frames), (still, twice(frames))):
            measure(
                pools[1], [(ours, given[first : first + share], options.bf16) for first in range(0, count, share)], side
            )
    best, size = min(sides, key=_clock), f"{height}×{width}"
    rounds = (best.read[first : first + count] for first in range(0, len(best.read), count))
    again = [found for one in rounds for found in twice(one)]
    rows = [row(side, best, size, count, best.read) for side in (*sides, fast)]
    return "".join([*rows, row(still, best, size, count, again)])


def _frames(height: int, width: int, options: argparse.Namespace) -> int:
    return int(options.frames or max(2 * options.workers, min(96, 1_600_000 // (height * width))))


def twice(items: list[Any]) -> list[Any]:
    """The first of some items, COPIES times each in a row: as many as there were."""
    return [item for item in items[: len(items) // COPIES] for _ in range(COPIES)]


def row(side: Side, best: Side, size: str, count: int, expected: list[Found]) -> str:
    """One line of the table, compared with the times of `best`, the faster plain side, and the texts `expected`."""
    times = f"{_clock(best) / _clock(side):.2f}", f"{_processor(best) / _processor(side):.2f}"
    numbers = f"{1e3 * _clock(side) / count:.1f} | {1e3 * _processor(side) / count:.1f}"
    return f"| {size} | {side.name} | {numbers} | {' | '.join(times)} | {agreement(side.read, expected)} |\n"


def agreement(found: list[Found], expected: list[Found]) -> str:
    """How many frames have the same texts, and how far the corners and confidences of those boxes lie apart."""
    alike = [
        (one, other)
        for one, other in zip(found, expected, strict=True)
        if [text for _, text, _ in one] == [text for _, text, _ in other]
    ]
    pairs = [both for one, other in alike for both in zip(one, other, strict=True)]
    apart = max((float(np.abs(a[0] - b[0]).max()) for a, b in pairs), default=0.0)
    unsure = max((abs(a[2] - b[2]) for a, b in pairs), default=0.0)
    return f"{len(alike)} of {len(found)}; boxes within {apart:g} px, confidence within {unsure:.1g}"


def _clock(side: Side) -> float:
    return statistics.median(side.clock[1:])


def _processor(side: Side) -> float:
    return statistics.median(side.processor[1:])


def section(arguments: list[str], rows: str, again: tuple[float, float] | None, samples: int) -> str:
    """What goes into the page."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"`{shlex.join(['python', 'bench/scoring.py', *arguments])}` on {os.cpu_count()} cores ({_processor_name()}), "
        f"load average {load} at the end: OCR against EasyOCR's `readtext`. No two frames are equal but in the rows "
        "that say so, where equal ones are read once. Factors are those to the faster setting of `readtext`, by the "
        "clock and by seconds of the processor.",
        "",
        HEAD + rows,
    ]
    if again:
        lines += [
            f"`rushes score RUN --advantages-only` with other weights for {samples:,} samples in one iteration: "
            f"{again[0]:.1f} s by the clock, {again[1]:.1f} s of the processor, the start of Python included.",
            "",
        ]
    return "\n".join(lines)


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse(words: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="480x832,32x64", help="HEIGHTxWIDTH, separated by commas; '' for none")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; threads on the plain side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=0, help="frames of a round (0: by size)")
    parser.add_argument("--bf16", action="store_true", help="detector in bfloat16")
    parser.add_argument("--samples", type=int, default=10_000, help="of the iteration that is weighted again; 0: none")
    parser.add_argument("--page", default="docs/benchmarks.md", help="'': only print")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write the section into the page."""
    arguments = sys.argv[1:] if words is None else words
    options = parse(arguments)
    context, rows = multiprocessing.get_context("spawn"), ""
    with (
        ProcessPoolExecutor(1, mp_context=context) as slow,
        ProcessPoolExecutor(options.workers, mp_context=context, initializer=process.start_worker) as fast,
    ):
        for size in filter(None, options.sizes.split(",")):
            height, width = map(int, size.split("x"))
            rows += compare(height, width, options, (slow, fast))
    with tempfile.TemporaryDirectory() as folder:
        again = reweigh(Path(folder), options.samples) if options.samples else None
    text = section(arguments, rows, again, options.samples)
    print(text)
    if options.page:
        from bench.learn import replace_section

        replace_section(Path(options.page), "score", text)


if __name__ == "__main__":
    main()
