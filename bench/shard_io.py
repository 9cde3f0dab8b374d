"""Shards against plain files and stock WebDataset: the same bytes written and read, in turn.

    python bench/shard_io.py --page docs/benchmarks.md     about a minute; needs a free gigabyte
    python bench/shard_io.py --small                       a few seconds: does it run?

Samples have the size of Wan2.2-A14B's at 480x832 and 81 frames: latents of the states that the preset stores, and a
video. Each round writes and reads them in all ways, one after another:

- shards: spool and seal, as a rollout does (a file for each sample, then tar, index and manifest; sha256, crc32 and
  fsync); then pairs of neighbouring states, checksums verified, as training reads them.
- plain: the same bytes in one file, written and synced once; then the same pairs by offset, nothing verified.
- webdataset: its `TarWriter` (not synced); then all samples in order, since it has no other way to reach a state.

Shares of a rollout and of an update are upper limits: the model is counted at the peak of a GPU's data sheet, which no
program reaches.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.learn import replace_section
from bench.plans import bare_plan, bare_sample
from shards.plan import group_key
from shards.reader import open_shard
from shards.run import Stage
from shards.run_toml import parse_config, read_preset
from shards.spool import write_group, write_samples
from shards.tensors import encode
from shards.writer import seal

LATENTS = (16, 21, 60, 104)  # A14B at 480x832, 81 frames
VIDEO = 2_500_000  # bytes
PEAK = 989.4e12  # FLOP/s: H100 SXM, bfloat16 without sparsity, NVIDIA's data sheet
WAYS = ("shards", "plain", "webdataset")
Seconds = dict[str, dict[str, float]]


def forward_flop() -> float:
    """FLOP of one forward of A14B on a video of that size: its linear layers and attention, by hand."""
    tokens, width, wide, layers, text = 21 * 30 * 52, 5120, 13824, 40, 512
    linear = 2 * tokens * (6 * width**2 + 2 * width * wide) + 2 * text * 2 * width**2
    return float(layers * (linear + 4 * tokens * (tokens + text) * width))


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Work:
    """The samples of one shard, and how each way writes and reads them below a folder."""

    def __init__(self, folder: Path, samples: int, states: int, shape: tuple[int, ...], video: int) -> None:
        self.folder, self.count, self.states, self.group = folder, samples, states, group_key(0, 0)
        self.latents = np.random.default_rng(0).standard_normal((states, *shape), dtype=np.float32).astype(np.float16)
        self.video = os.urandom(video)
        self.stage = Stage(folder, "iter-0000", 0, "rollout")
        self.stage.publish_plan(bare_plan(0, 1, samples))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(sample, first state) of every transition that training reads."""
        return [(sample, state) for sample in range(self.count) for state in range(self.states - 1)]

    @property
    def bytes(self) -> int:
        """Of all latents and videos."""
        return self.count * (self.latents.nbytes + len(self.video))

    def write_shards(self) -> None:
        """As a rollout."""
        write_group(self.stage, 0, self.group, {"prompt": self.latents[0, 0], "negative": self.latents[0, 1]})
        for number in range(self.count):
            write_samples(self.stage, 0, bare_sample(self.stage, self.group, number, self.latents, self.video))
        seal(self.stage, 0, {})

    def read_shards(self) -> None:
        """As training."""
        with open_shard(self.stage, 0) as shard:
            keys = self.stage.keys(0)
            for sample, state in self.pairs:
                shard.latents(keys[sample], [state, state + 1])

    def write_plain(self) -> None:
        """One file, one fsync."""
        with (self.folder / "plain").open("wb") as file:
            for _ in range(self.count):
                file.write(self.latents.data)
                file.write(self.video)
            file.flush()
            os.fsync(file.fileno())

    def read_plain(self) -> None:
        """By offset."""
        size, state_size = self.bytes // self.count, self.latents.nbytes // self.states
        descriptor = os.open(self.folder / "plain", os.O_RDONLY)
        for sample, state in self.pairs:
            os.pread(descriptor, 2 * state_size, sample * size + state * state_size)
        os.close(descriptor)

    def write_webdataset(self) -> None:
        """Its own writer, the latents as the safetensors file that our shards hold."""
        data = b"".join(bytes(part) for part in encode({"latents": self.latents}))
        with webdataset.TarWriter(str(self.folder / "web.tar")) as sink:
            for number in range(self.count):
                sink.write({"__key__": f"{number:06d}", "traj.safetensors": data, "mp4": self.video})

    def read_webdataset(self) -> None:
        """All samples, from the first to the last."""
        with (self.folder / "web.tar").open("rb") as file:
            found = list(webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander([
                {"url": "web.tar", "stream": io.BufferedReader(file)}  # type: ignore[arg-type]
            ])))  # fmt: skip
        assert len(found) == self.count


def one_round(samples: int, states: int, shape: tuple[int, ...], video: int) -> tuple[Seconds, int]:
    """Seconds of writing and reading by every way, and the bytes of the samples."""
    with tempfile.TemporaryDirectory(prefix="rushes-io-") as folder:
        work = Work(Path(folder), samples, states, shape, video)
        found: Seconds = {}
        for way in WAYS:
            os.sync()  # what the way before left to the disk is not this one's
            write, read = getattr(work, f"write_{way}"), getattr(work, f"read_{way}")
            found[way] = {"write": timed(write), "read": timed(read)}
        size = work.bytes
        shutil.rmtree(work.stage.path)
    return found, size


def section(command: str, rounds: list[tuple[Seconds, int]], samples: int, states: int) -> str:
    """The section of the page."""
    size = rounds[0][1]
    seconds = {way: {kind: statistics.median(found[way][kind] for found, _ in rounds) for kind in ("write", "read")}
               for way in WAYS}  # fmt: skip
    config = parse_config(read_preset("wan22-a14b"), "preset wan22-a14b")
    forward = forward_flop() / PEAK
    rollout, update = 2 * config.rollout.steps * forward, 2 * 4 * forward  # guided; forward, backward, recomputation
    written = seconds["shards"]["write"] / samples / rollout
    read = seconds["shards"]["read"] / (samples * (states - 1)) / update
    lines = [
        f"`{command}`: {samples} samples, {size / 1e6:.0f} MB; medians of {len(rounds)} rounds, all ways in turn.",
        "",
        "| | written, s | ÷ plain | read, s | ÷ plain |",
        "|-|-|-|-|-|",
    ]
    for way in WAYS:
        cells = [f"{seconds[way][kind]:.2f} | {seconds[way][kind] / seconds['plain'][kind]:.2f}"
                 for kind in ("write", "read")]  # fmt: skip
        lines.append(f"| {way} | {' | '.join(cells)} |")
    if size < samples * VIDEO:
        return "\n".join(lines) + "\n"
    lines += ["", f"At A14B's size writing takes at most {100 * written:.2f} % of a rollout of {config.rollout.steps} "
              f"guided steps, and reading at most {100 * read:.2f} % of an update, with the model at the peak of an "
              "H100's data sheet."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Measure, print the section, and write it into the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--states", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny samples: does it run?")
    parser.add_argument("--page", type=Path, help="write the section into this page")
    arguments = parser.parse_args(words)
    shape, video = ((16, 2, 8, 8), 10_000) if arguments.small else (LATENTS, VIDEO)
    rounds = [one_round(arguments.samples, arguments.states, shape, video) for _ in range(arguments.rounds)]
    command = ["python bench/shard_io.py", *["--small"] * arguments.small]
    command += [f"--{name} {value}" for name in ("rounds", "samples", "states")
                if (value := getattr(arguments, name)) != parser.get_default(name)]  # fmt: skip
    text = section(" ".join(command), rounds, arguments.samples, arguments.states)
    print(text)
    if arguments.page:
        replace_section(arguments.page, "shard-io", text)


if __name__ == "__main__":
    main()
