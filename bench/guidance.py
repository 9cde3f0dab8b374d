r"""Guidance in one batch of twice the size against two forwards: how long a velocity takes, and how far the two differ.

    OMP_NUM_THREADS=1 python bench/guidance.py --page docs/benchmarks.md            `words`, seconds
    python bench/guidance.py --path MODEL --device cuda --dtype bfloat16 --text-length 512 \
        --height 240 --width 416 --frames 33

Both ways in turn in one process, as the rollout computes them. Ratios, never seconds: below 1 one batch is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.learn import replace_section
from rollout.policy import Policy

ROUNDS = 7


def measured(policy: Policy, size: tuple[int, int, int], batch: int) -> tuple[list[float], float]:
    """Seconds of one batch over those of two forwards, for each round but the first, and the largest difference of the
    two velocities, as a share of the largest velocity."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *policy.layout.latent_shape(*size), generator=generator).to(policy.device)
    texts = (policy.text.pad(one, batch) for one in policy.text.encode(['a sign "FILM"', "blurry"]))
    prompt, negative = (text.to(policy.device) for text in texts)
    ratios, found = [], {}
    for _ in range(ROUNDS + 1):
        seconds = {}
        for together in (False, True):
            policy.experts.compute_as(replace(policy.experts.arithmetic, batch_guidance=together))
            began = time.perf_counter()
            with torch.no_grad():
                found[together] = policy.velocity(0, x, 700.0, prompt, negative, 4.5).cpu()
            seconds[together] = time.perf_counter() - began
        ratios.append(seconds[True] / seconds[False])
    difference = (found[True] - found[False]).abs().max() / found[False].abs().max()
    return ratios[1:], float(difference)


def main(words: list[str] | None = None) -> None:
    """Measure, print the section, and write it into the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="words", help="model folder, hub id, or words")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, action="append", help="videos; may be repeated (1, 4 and 16)")
    for name, value in {"height": 32, "width": 64, "frames": 5, "text-length": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--page", type=Path, help="write the section into this page")
    arguments = parser.parse_args(words)
    named = {"dtype": arguments.dtype, "device": arguments.device, "text_length": arguments.text_length}
    policy = Policy.load(arguments.path, **named)
    policy.experts.use(0)
    size = arguments.height, arguments.width, arguments.frames
    on_gpu = policy.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} thread of a CPU"
    command = f"python bench/guidance.py{'' if arguments.path == 'words' else f' --path {arguments.path}'}"
    lines = [
        f"`{command}`, {arguments.dtype}, {device}, torch {torch.__version__}; medians of {ROUNDS} rounds, range in "
        "brackets.",
        "",
        "| videos, tokens each | one batch ÷ two forwards | difference |",
        "|-|-|-|",
    ]
    for batch in arguments.batch or (1, 4, 16):
        ratios, difference = measured(policy, size, batch)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(f"| {batch}, {policy.layout.tokens(*size)} | {spread} | {difference:.1g} |")
        print(lines[-1], flush=True)
    if arguments.page:
        replace_section(arguments.page, "guidance", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
