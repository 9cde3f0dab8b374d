"""Speed of the OCR reward against plain `readtext` frame by frame, both measured in turn in one run.

    python bench/scoring.py                            480x832 and 32x64 frames, all cores on both sides
    python bench/scoring.py --sizes 64x160 --workers 1 --rounds 5
    python bench/scoring.py --bf16                     with the detector in bfloat16, where the CPU has it

The plain side is one process with one torch thread per core, EasyOCR's own defaults, and its order of boxes. Ours is
one process per core with one thread, as `rushes score` runs them. Loading is not timed. Every round times both sides on
the same new frames, so that a busy machine slows both; ratios are of the medians. The texts must be equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from score import work

WORDS = ("FILM", "OPEN", "GATE", "SALE", "MOON", "BIRD", "LAMP", "RAIN", "COLD", "EAST", "PARK", "WIND")
_kept: dict[str, Any] = {}


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


def plain(frames: list[NDArray[np.uint8]], threads: int) -> list[str]:
    """`readtext` frame by frame, boxes joined by a space; the reader is kept between calls."""
    warnings.filterwarnings("ignore", message=".*quantiz.*|.*pin_memory.*|.*migrat.*")
    if "reader" not in _kept:
        import easyocr
        import torch

        from score.networks import weights_folder

        torch.set_num_threads(threads)
        _kept["folder"] = tempfile.TemporaryDirectory()
        _kept["reader"] = easyocr.Reader(
            ["en"],
            gpu=False,
            verbose=False,
            download_enabled=False,
            model_storage_directory=str(weights_folder()),
            user_network_directory=_kept["folder"].name,
        )
    smallest = 5 if min(frames[0].shape[:2]) < 128 else 20
    return [" ".join(text for _, text, _ in _kept["reader"].readtext(frame, min_size=smallest)) for frame in frames]


def ours(frames: list[NDArray[np.uint8]], bf16: bool) -> list[str]:
    """The reader of the OCR reward, in a scoring process."""
    from score.reading import TextReader

    return TextReader(detector_bf16=bf16).lines(frames, ordered=False)


def measure_ours(pool: Executor, frames: list[NDArray[np.uint8]], workers: int, bf16: bool) -> tuple[float, list[str]]:
    """Wall seconds and texts; frames are dealt out in equal consecutive parts."""
    size = -(-len(frames) // workers)
    start = time.perf_counter()
    parts = [pool.submit(ours, frames[first : first + size], bf16) for first in range(0, len(frames), size)]
    texts = [text for part in parts for text in part.result()]
    return time.perf_counter() - start, texts


def measure_plain(pool: Executor, frames: list[NDArray[np.uint8]], threads: int) -> tuple[float, list[str]]:
    """Wall seconds and texts of the plain side."""
    start = time.perf_counter()
    texts = pool.submit(plain, frames, threads).result()
    return time.perf_counter() - start, texts


def compare(height: int, width: int, options: argparse.Namespace, pools: tuple[Executor, Executor]) -> dict[str, Any]:
    """Both sides on the same frames, round by round; the first round warms up and is not counted."""
    count = options.frames or max(2 * options.workers, min(96, 1_600_000 // (height * width)))
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    equal = total = 0
    for turn in range(options.rounds + 1):
        frames = [draw(1000 * turn + n, height, width) for n in range(count)]
        slow, expected = measure_plain(pools[0], frames, options.plain_threads or options.workers)
        fast, found = measure_ours(pools[1], frames, options.workers, options.bf16)
        if turn:
            seconds["plain"].append(slow)
            seconds["ours"].append(fast)
            equal += sum(a == b for a, b in zip(expected, found, strict=True))
            total += count
    middle = {name: statistics.median(values) / count for name, values in seconds.items()}
    return {
        "size": f"{height}x{width}",
        "frames_per_round": count,
        "plain_ms_per_frame": round(1e3 * middle["plain"], 2),
        "ours_ms_per_frame": round(1e3 * middle["ours"], 2),
        "times_faster": round(middle["plain"] / middle["ours"], 2),
        "equal_texts": f"{equal}/{total}",
    }


def main() -> None:
    """Print one JSON line per frame size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="480x832,32x64", help="HEIGHTxWIDTH, separated by commas")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, or threads on the plain side"
    )
    parser.add_argument("--plain-threads", type=int, default=0, help="threads of the plain side (0: one per core)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=0, help="frames of a round (0: by size)")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as slow,
        ProcessPoolExecutor(options.workers, mp_context=context, initializer=work.start_worker) as fast,
    ):
        for size in options.sizes.split(","):
            height, width = map(int, size.split("x"))
            print(
                json.dumps(
                    compare(height, width, options, (slow, fast))
                    | {"workers": options.workers, "plain_threads": options.plain_threads or options.workers}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
