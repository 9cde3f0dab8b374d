"""Cheap measurements of pixels: alarms for reward hacking, and two trivial rewards to try the pipeline with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from score.reward import Scored, Video

REC709 = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
SIGNATURE = 16  # sides of the thumbnail that stands for a video when a group is compared
EDGE = 0.1  # a step of luma between neighbours, in shares of the full range, that counts as an edge


def luma(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Luma (Rec. 709 weights) of frames [T, H, W, 3] uint8 as [T, H, W] in [0, 1]."""
    grey: NDArray[np.float32] = frames.astype(np.float32) @ REC709
    return grey / np.float32(255.0)


class Guards:
    """What a hacked reward changes first: light, contrast, colour, edges, motion and the variety of a group.

    luma: mean in [0, 1]. clipped: share of pixels at 0 or 255 in all channels. dark: share with luma < 0.1.
    saturation: mean of (max - min) / max over channels. edges: share of pixels with a luma step over 0.1.
    entropy: of the luma histogram, in bits (0 to 8). motion: mean squared luma difference of successive frames.
    diversity: mean absolute luma difference from the mean video of the group, on 16 x 16 thumbnails.
    """

    name = "guards"
    version = "1"
    components = ("luma", "clipped", "dark", "saturation", "edges", "entropy", "motion", "diversity")

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Measure each video; `diversity` is 0 until `after_group`."""
        return [Scored(components=measure(video.frames), state=signature(video.frames)) for video in videos]

    @staticmethod
    def after_group(scored: Sequence[Scored]) -> list[Scored]:
        """Fill in `diversity` from the thumbnails of all videos of one prompt."""
        thumbnails = [one.state for one in scored if one.state is not None]
        centre = np.mean(thumbnails, axis=0) if thumbnails else None
        return [_with_diversity(one, centre) for one in scored]


def _with_diversity(scored: Scored, centre: NDArray[np.float32] | None) -> Scored:
    if scored.state is None or centre is None:
        return scored
    difference = float(np.abs(scored.state - centre).mean())
    return replace(scored, components={**scored.components, "diversity": difference}, state=None)


def measure(frames: NDArray[np.uint8]) -> dict[str, float]:
    """All guards of one video but the diversity of its group; frames [T, H, W, 3] uint8."""
    rows: list[tuple[float, ...]] = []
    motion: list[float] = []
    before: NDArray[np.float32] | None = None
    for frame in frames:  # frame by frame: a 720p video in float32 is gigabytes
        grey = luma(frame[None])[0]
        rows.append(_measure_frame(frame, grey))
        if before is not None:
            motion.append(float(np.square(grey - before).mean()))
        before = grey
    means = np.mean(rows, axis=0)
    values = [*means.tolist(), float(np.mean(motion)) if motion else 0.0, 0.0]
    return dict(zip(Guards.components, values, strict=True))


def _measure_frame(frame: NDArray[np.uint8], grey: NDArray[np.float32]) -> tuple[float, ...]:
    high, low = frame.max(axis=2).astype(np.float32), frame.min(axis=2).astype(np.float32)
    edges = np.zeros(grey.shape, dtype=bool)
    edges[:, 1:] |= np.abs(np.diff(grey, axis=1)) > EDGE
    edges[1:, :] |= np.abs(np.diff(grey, axis=0)) > EDGE
    counts = np.bincount((grey * 255.0 + 0.5).astype(np.int64).ravel(), minlength=256)
    shares = counts[counts > 0] / grey.size
    return (
        float(grey.mean()),
        float(((high == 0) | (low == 255)).mean()),
        float((grey < 0.1).mean()),
        float(((high - low) / np.maximum(high, 1.0)).mean()),
        float(edges.mean()),
        float(-(shares * np.log2(shares)).sum()) + 0.0,
    )


def signature(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails [3, 16, 16] of the luma of the first, middle and last frame: means over a grid of blocks."""
    picked = luma(frames[[0, len(frames) // 2, len(frames) - 1]])
    rows = np.linspace(0, picked.shape[1], SIGNATURE, endpoint=False).astype(int)
    columns = np.linspace(0, picked.shape[2], SIGNATURE, endpoint=False).astype(int)
    sums = np.add.reduceat(np.add.reduceat(picked, rows, axis=1), columns, axis=2)
    counts = np.add.reduceat(np.add.reduceat(np.ones_like(picked), rows, axis=1), columns, axis=2)
    return np.asarray(sums / counts, dtype=np.float32)


class Brightness:
    """Mean luma in [0, 1]: a reward to try the pipeline with, no model needed."""

    name = "brightness"
    version = "1"
    components = ("brightness",)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Mean luma of every video."""
        return [Scored(components={"brightness": float(luma(video.frames).mean())}) for video in videos]


class Contrast:
    """Standard deviation of luma within a frame, averaged over frames, in [0, 0.5]: likewise."""

    name = "contrast"
    version = "1"
    components = ("contrast",)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Contrast of every video."""
        return [Scored(components={"contrast": float(luma(v.frames).std(axis=(1, 2)).mean())}) for v in videos]
