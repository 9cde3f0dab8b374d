"""Which videos TensorBoard and Weights & Biases show for each iteration, and a video as an animated GIF."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.reader import open_shard
from shards.report.facts import Facts, by_iteration

if TYPE_CHECKING:
    import pandas

COMPARED = 2  # evaluated videos that are followed over the iterations
SIDE, FRAMES = 320, 40  # most pixels of the larger side, and most frames, of a GIF: the format hardly compresses


@dataclass(frozen=True)
class Clip:
    """One video as it lies in a shard; `tag` stays the same over the iterations."""

    tag: str
    iteration: int
    caption: str
    video: bytes


def clips(facts: Facts) -> Iterator[Clip]:
    """Best and worst sample of every iteration, and the same held-out prompts and seeds through all evaluations."""
    for iteration, rows in by_iteration(facts.of("rollout")):
        ordered = rows.dropna(subset=["reward"]).sort_values(["reward", "key"])
        if len(ordered):
            yield _clip(facts, "training/worst", iteration, ordered.iloc[0])
            yield _clip(facts, "training/best", iteration, ordered.iloc[-1])
    for iteration, rows in by_iteration(facts.of("eval")):
        for place, (_, row) in enumerate(rows.sort_values(["sample", "prompt_id"]).head(COMPARED).iterrows()):
            yield _clip(facts, f"held out/{place}", iteration, row)


def _clip(facts: Facts, tag: str, iteration: int, row: pandas.Series[Any]) -> Clip:
    stage = facts.stage(str(row["kind"]), iteration)
    with open_shard(stage, int(row["shard"])) as shard:
        video = shard.video(str(row["key"]))
    reward = "" if math.isnan(row["reward"]) else f" · reward {row['reward']:.3f}"
    return Clip(tag, iteration, f"{row['prompt']}{reward} · {row['key']}", video)


def gif(video: bytes, fps: float) -> tuple[bytes, int, int]:
    """An mp4 as an animated GIF that repeats, its width and height; made smaller and sparser where it is large."""
    from PIL import Image

    from shards.video import decode_mp4

    frames = decode_mp4(video)
    step = -(-len(frames) // FRAMES)
    scale = min(1.0, SIDE / max(frames.shape[1:3]))
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    first, *others = (Image.fromarray(frame).resize(size) for frame in frames[::step])
    sink = io.BytesIO()
    first.save(sink, "gif", save_all=True, append_images=others, duration=round(1000 * step / fps), loop=0)
    return sink.getvalue(), *size
