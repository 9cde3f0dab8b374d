"""Motion smoothness: how little the optical flow changes from one frame to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from score.reward import Scored, Video
from shards.errors import UserError

STILL = 0.05  # pixels per frame of the shrunk video; below it the flow is noise
Flow = NDArray[np.float32]


class Motion:
    """Whether things keep moving the way they move, whatever the prompt says.

    smoothness   1 - sum |a| / sum (|u| + |w|), in [0, 1]: u is the dense optical flow from frame t to t+1, w that from
                 t+1 to t+2 read where u has carried the pixel, and a = w - u. Steady motion gives 1, motion that turns
                 back at every frame 0, and so does a video in which nothing moves (a flow below 0.05 pixels): otherwise
                 not moving would be the smoothest motion
    amplitude    mean |u| as a share of the diagonal, per second: what must not sink while smoothness rises
    flicker      mean absolute second difference of the mean luma of frames, in [0, 1]

    Limits: the flow is Farneback's polynomial expansion (OpenCV) of the luma, on frames shrunk to `size`; it fails on
    flat areas, on motion of more than about an eighth of the frame, on cuts, and where things come out from behind
    others. It knows nothing of physics or bodies. Compare only videos of one size and one frame rate.
    """

    name = "motion"
    version = "1"
    components = ("smoothness", "amplitude", "flicker")

    def __init__(self, size: int = 256) -> None:
        """size: larger side, in pixels, of the frames the flow is computed on; smaller frames are not enlarged."""
        if size < 16:
            raise UserError(f"reward 'motion': size is {size}", "give 16 pixels or more")
        self.size = size

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Measure each video; one of fewer than three frames has no score."""
        return [self.judge(video) for video in videos]

    def judge(self, video: Video) -> Scored:
        """The components of one video."""
        if len(video.frames) < 3:
            return Scored(reason=f"motion needs 3 frames, the video has {len(video.frames)}")
        greys = [shrunk(frame, self.size) for frame in video.frames]
        flows = [flow(left, right) for left, right in pairwise(greys)]
        moved = float(np.mean([np.hypot(*_parts(one)).mean() for one in flows]))
        light = np.array([grey.mean() for grey in greys]) / 255.0
        values = {
            "smoothness": smoothness(flows) if moved >= STILL else 0.0,
            "amplitude": moved * video.fps / float(np.hypot(*greys[0].shape)),
            "flicker": float(np.abs(np.diff(light, n=2)).mean()),
        }
        return Scored(values)


def shrunk(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Luma [h, w] uint8 of a frame [H, W, 3], the larger side at most `size` pixels."""
    import cv2

    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = size / max(grey.shape)
    if scale >= 1:
        return np.asarray(grey)
    shape = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return np.asarray(cv2.resize(grey, shape, interpolation=cv2.INTER_AREA))


def flow(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Flow:
    """Displacement [h, w, 2] in pixels (x, y) that carries `left` to `right`, grey images [h, w]."""
    import cv2

    if np.array_equal(left, right):  # there the method gives noise
        return np.zeros((*left.shape, 2), np.float32)
    found = cv2.calcOpticalFlowFarneback(
        left, right, None, pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )
    return np.asarray(found, dtype=np.float32)


def smoothness(flows: Sequence[Flow]) -> float:
    """1 - sum |w - u| / sum (|u| + |w|) over successive flows u, w, with w read where u has carried the pixel."""
    changed = total = 0.0
    for u, later in pairwise(flows):
        w = _carried(later, u)
        changed += float(np.hypot(*_parts(w - u)).sum())
        total += float((np.hypot(*_parts(u)) + np.hypot(*_parts(w))).sum())
    return 1.0 - changed / total if total else 0.0


def _carried(values: Flow, u: Flow) -> Flow:
    """`values` [h, w, 2] at x + u(x), between pixels by interpolation, beyond the border the nearest inside."""
    import cv2

    rows, columns = np.mgrid[: u.shape[0], : u.shape[1]].astype(np.float32)
    at = (columns + u[..., 0], rows + u[..., 1])
    return np.asarray(cv2.remap(values, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), dtype=np.float32)


def _parts(vectors: Flow) -> tuple[Flow, Flow]:
    return vectors[..., 0], vectors[..., 1]
