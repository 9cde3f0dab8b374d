"""What rewards on single frames share: which frames they look at, and that every video is judged alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from score.reward import Scored, Video
from shards.errors import UserError


class FrameReward:
    """A judge of frames spread evenly over the video. A subclass says in `values` what they are worth."""

    name: str
    frames: int

    def look_at(self, frames: int) -> None:
        """Set how many frames are looked at, the first and the last among them. Raises UserError below 1."""
        self.frames = positive(self.name, "frames", frames)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Components of every video, one at a time: its numbers must not depend on its neighbours."""
        return [self.judge(video) for video in videos]

    def judge(self, video: Video) -> Scored:
        """Components of one video."""
        numbers = spread(len(video.frames), self.frames)
        return Scored(self.values(video.frames[numbers], video.prompt), frames=numbers)

    def values(self, frames: NDArray[np.uint8], prompt: str) -> Mapping[str, float]:
        """Components that follow from frames [T, H, W, 3] and the prompt."""
        raise NotImplementedError


def spread(count: int, wanted: int) -> list[int]:
    """Numbers of at most `wanted` of `count` frames, evenly spread, the first and the last among them."""
    if wanted == 1:
        return [(count - 1) // 2]
    return sorted({round(i) for i in np.linspace(0, count - 1, min(wanted, count)).tolist()})


def positive(reward: str, option: str, value: int) -> int:
    """`value`, a count of at least 1. Raises UserError."""
    if value < 1:
        raise UserError(f"reward {reward!r}: {option} is {value}", "give 1 or more")
    return value
