"""Random bits flipped in every published file of a run: `verify` must notice each of them.

    python -m tests.faults.bit_flips --flips 2000 --seed 1          # makes a run, and says how many passed in silence
    python -m tests.faults.bit_flips --run runs/signs --flips 500   # of a copy of a run that is there

The run it makes has GRPO, scores, averages and checkpoints. run.toml is the user's to edit, and what can be made again
at any time (TensorBoard, report, frames) is not published: these files are left out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.run import Run
from shards.verify.shards import verify

UNPUBLISHED = {"run.toml", "tensorboard", "report", "frames", "work"}


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    path: Path
    byte: int
    bit: int


def published(run: Path) -> list[Path]:
    """The files of a run that nobody may change, sorted."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size)
    return [path for path in files if not UNPUBLISHED & set(path.relative_to(run).parts)]


def flips(run: Path, count: int, seed: int) -> Iterator[Flip]:
    """Bits to flip. Every file is taken equally often, so that small records get as many as large tars."""
    draw, files = random.Random(seed), published(run)
    order = [files[number % len(files)] for number in range(count)]
    draw.shuffle(order)
    for path in order:
        yield Flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))


def silent(run: Path, flip: Flip) -> bool:
    """Whether `verify` says the same with one bit flipped; the file is as before afterwards."""
    data = bytearray(flip.path.read_bytes())
    mode = flip.path.stat().st_mode
    flip.path.chmod(0o644)
    before = bytes(data)
    data[flip.byte] ^= 1 << flip.bit
    try:
        flip.path.write_bytes(data)
        return not any(problem.kind == "damaged" for problem in verify(run))
    finally:
        flip.path.write_bytes(before)
        flip.path.chmod(mode)


def make(folder: Path) -> Path:
    """A run of one iteration with everything that is published: GRPO, two rewards, averages and checkpoints."""
    from rollout.policy import Policy
    from score.run import score
    from tests.support import tiny_models, training
    from train.run import train

    model = tiny_models.save("t2v2", folder / "model")
    settings = {"ema": 0.5, "save_every": 1, "updates_per_rollout": 2, "clip_range": 1e-3, **training.TRAIN}
    rewards = {"rewards": {"contrast": 1.0, "motion": 0.5}, "min_spread": 0.0, "workers": 1}
    small = {"low_steps": 1, "prompts_per_iteration": 2, "groups_per_shard": 1}
    run = training.make_run(folder / "run", model, settings, score=rewards, **small)
    policy = Policy.load(model, device="cpu", text_length=training.TEXT_LENGTH)
    stage = training.roll(run, 0, policy)
    score(run, stage)
    train(run, 0, policy)
    assert verify(run.path) == []
    return run.path


def passed(run: Path, count: int, seed: int) -> list[Flip]:
    """The flips that nobody noticed."""
    return [flip for flip in flips(run, count, seed) if silent(run, flip)]


def main() -> int:
    """Flip bits in a run, and print a line for each that passed and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a run to be copied; one is made if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        run = Path(shutil.copytree(arguments.run, run)) if arguments.run else make(Path(folder))
        files = published(run)
        found = passed(run, arguments.flips, arguments.seed)
        for flip in found:
            print(f"silent: {flip.path.relative_to(run)}, byte {flip.byte}, bit {flip.bit}")
        kinds = Counter(path.suffix or path.name for path in files)
        named = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        print(f"{arguments.flips} flips over {len(files)} files ({named}) of {Run(run).path.name}: {len(found)} silent")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
