"""What VideoAlign sees of a video: the frames it takes, their size, normalisation, and the patches they are cut into.

Source: the reference's `vision_process.py` and the Qwen2-VL processor it calls (KwaiVGI/VideoAlign, git 219ab9d).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from shards.errors import UserError

PATCH = 14  # pixels, the side of a patch
PAIR = 2  # frames in one patch
MERGE = 2  # patches that become one token, along each side
FACTOR = PATCH * MERGE  # sides are multiples of this
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS = 128 * FACTOR * FACTOR  # smaller frames are enlarged to this
PROCESSOR_PIXELS = (3136, 12845056)  # outside these the Qwen2-VL processor would resize a second time
MAX_RATIO = 200
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Request:
    """How a video is sampled: `fps` frames a second, or `num_frames` in all when that is set; `max_pixels` a frame."""

    fps: float
    num_frames: float | None
    max_pixels: int


@dataclass(frozen=True)
class Clip:
    """A video ready for the network."""

    patches: torch.Tensor
    """[t*h*w, 1176] float32, normalised."""
    grid: tuple[int, int, int]
    """t, h, w: frame pairs, and patches along height and width."""
    digest: bytes
    """sha256 of the sampled frames and the size they are given: equal digests, equal patches."""

    @property
    def tokens(self) -> int:
        """Tokens the video takes in the text."""
        return self.grid[0] * self.grid[1] * self.grid[2] // MERGE**2


def frame_count(total: int, source_fps: float, request: Request, name: str = "the video") -> int:
    """How many of `total` frames are taken: even, at least 2. Rounding is to the nearest pair, a tie to the even one.

    Raises UserError for a video of one frame, and for a request that gives an odd number or none.
    """
    if request.num_frames is not None:
        count = round(request.num_frames / PAIR) * PAIR
    else:
        most = min(MAX_FRAMES, total) // PAIR * PAIR
        count = round(min(max(total / source_fps * request.fps, MIN_FRAMES), most) / PAIR) * PAIR
    count = min(count, total)
    if total < PAIR:
        raise UserError(f"{name} has {total} frame, VideoAlign needs at least {PAIR}", "score videos, not images")
    if count < PAIR:
        raise UserError(f"num_frames = {request.num_frames:g} takes fewer than {PAIR} frames", "ask for 2 or more")
    if count % PAIR:
        raise UserError(
            f"{name} has {total} frames and num_frames = {request.num_frames:g} would take all of them, an odd number",
            f"ask for num_frames = {total - 1} or fewer",
        )
    return count


def frame_indices(total: int, count: int) -> list[int]:
    """Frames taken: evenly spread in float32, the first and the last always among them."""
    indices: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
    return indices


def resized_shape(height: int, width: int, max_pixels: int, name: str = "the video") -> tuple[int, int]:
    """Height and width after resizing: multiples of 28, about the same shape, MIN_PIXELS to `max_pixels` in area.

    When `max_pixels` is below MIN_PIXELS, only frames above it shrink, and only frames not above it grow, as in the
    reference. Raises UserError where the reference fails: a side ratio above 200, or a side that shrinks to nothing.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"{name} is {width}x{height}: one side is more than {MAX_RATIO} times the other", "crop it")
    high, wide = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if high * wide > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        high, wide = (math.floor(side / scale / FACTOR) * FACTOR for side in (height, width))
    elif high * wide < MIN_PIXELS:
        scale = math.sqrt(MIN_PIXELS / (height * width))
        high, wide = (math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    if not PROCESSOR_PIXELS[0] <= high * wide <= PROCESSOR_PIXELS[1]:
        raise UserError(
            f"{name} is {width}x{height} and max_pixels = {max_pixels} would make it {wide}x{high}",
            "leave max_pixels at the checkpoint's own value",
        )
    return high, wide


def resize(frames: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Frames [T,3,H,W] uint8 to [T,3,*shape] float32 holding whole numbers from 0 to 255.

    Float32 bicubic with antialiasing, clamped and rounded: bit for bit torchvision's first-generation resize of uint8.
    """
    resized = F.interpolate(frames.float(), shape, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round()


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """Frames [T,3,h,w] of whole numbers 0..255 to CLIP's range, bit for bit what the reference's processor gives."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (frames / 255 - mean) / std


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Frames [2t,3,14h,14w] to patches [t*h*w, 3*2*14*14]; the four patches of a token lie next to each other."""
    count, channels, height, width = frames.shape
    rows, columns = height // FACTOR, width // FACTOR
    cut = frames.view(count // PAIR, PAIR, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * PAIR * PATCH * PATCH)


def prepare(
    frames: NDArray[np.uint8] | torch.Tensor, source_fps: float | None, request: Request, name: str = "the video"
) -> Clip:
    """Frames [T,H,W,3] uint8 (array or tensor) at `source_fps` frames per second, as the network takes them.

    Raises UserError for frames of another shape or type, a missing rate, or a size or length VideoAlign cannot take.
    """
    video = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        found = f"{video.dtype} {list(video.shape)}"
        raise UserError(f"{name}: frames are {found}, not uint8 [T, H, W, 3]", "give RGB frames from 0 to 255")
    if source_fps is None or not (math.isfinite(source_fps) and source_fps > 0):
        raise UserError(f"{name} has no frame rate", "give the true frames per second of the video")
    total, height, width, _ = video.shape
    chosen = frame_indices(total, frame_count(total, source_fps, request, name))
    shape = resized_shape(height, width, request.max_pixels, name)
    taken = video[chosen]  # a copy
    digest = hashlib.sha256(repr((taken.shape, shape)).encode() + taken.tobytes()).digest()
    patches = patchify(normalise(resize(torch.from_numpy(taken).permute(0, 3, 1, 2), shape)))
    return Clip(patches, (len(chosen) // PAIR, shape[0] // PATCH, shape[1] // PATCH), digest)
