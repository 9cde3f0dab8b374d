"""Frames to mp4 and back with PyAV: the same frames always give the same bytes; and any video file as frames."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shards.errors import REPAIR, Damaged, UserError
from shards.plan import VideoPreset, VideoShape
from shards.records.opening import open_file

if TYPE_CHECKING:
    from fractions import Fraction

    import av
    import numpy
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    Frames = NDArray[numpy.uint8]

# One thread, and no macroblock tree: x264 decides differently with several threads, and its tree differs now and then
# from run to run with one. bitexact keeps library versions and times out of the file.
ENCODER = {"threads": "1", "x264-params": "threads=1:lookahead-threads=1:mbtree=0"}
CONTAINER = {"fflags": "+bitexact"}
COLOUR_THREADS = 1
"""Threads that convert colours. By default a picture gets as many as there are cores, and starts them anew."""


@dataclass(frozen=True)
class VideoLimits:
    """The most that is decoded of a video."""

    frames: int
    pixels: int
    """Of one frame."""
    all_pixels: int
    """Of all frames together; each takes 3 bytes, twice while they are put together."""

    @classmethod
    def of(cls, shape: VideoShape) -> VideoLimits:
        """What a plan says of its videos."""
        return cls(shape.frames, shape.height * shape.width, shape.height * shape.width * shape.frames)

    @classmethod
    def of_foreign(cls, frames: int, megapixels: int) -> VideoLimits:
        """For files of which no plan says anything: `megapixels` of all frames, and no frame above a 32nd of them."""
        return cls(frames, megapixels * 2**15, megapixels * 2**20)

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.pixels} pixels, {self.all_pixels} pixels in all"


MOST_FRAMES, MOST_MEGAPIXELS = 1000, 128  # 128 MiB pixels are 140 frames of 1280x720
LIMITS = VideoLimits.of_foreign(MOST_FRAMES, MOST_MEGAPIXELS)


def encode_mp4(frames: Frames, fps: int, crf: int = 12, preset: VideoPreset = "medium") -> bytes:
    """H.264 in mp4, yuv420p BT.709, of uint8 RGB frames [T, H, W, 3] at `fps` frames per second.

    `crf` is x264's quality, 0 (lossless) to 51, `preset` its balance of time and size. Raises UserError for odd sizes,
    which yuv420p cannot hold.
    """
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != "uint8" or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}", "they must be uint8 [T, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(
            f"frames of {frames.shape[2]}x{frames.shape[1]} cannot be encoded", "use an even width and height"
        )
    sink, converter, options = io.BytesIO(), VideoReformatter(), {"preset": preset, "crf": str(crf)}
    with av.open(sink, "w", format="mp4", options=CONTAINER) as container:
        stream: av.VideoStream = container.add_stream("libx264", rate=fps, options=ENCODER | options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = int(Colorspace.ITU709)
        stream.codec_context.color_primaries = stream.codec_context.color_trc = int(Colorspace.ITU709)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            planes = converter.reformat(
                picture, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=COLOUR_THREADS
            )
            container.mux(stream.encode(planes))
        container.mux(stream.encode(None))
    return sink.getvalue()


def check_mp4(data: bytes, shape: VideoShape, where: str) -> None:
    """Compare what the header of an mp4 file says with the plan; no frame is decoded. Raises Damaged."""
    import av

    try:
        with _opened(data, VideoLimits.of(shape), "mp4") as container:
            _check_header(container, VideoLimits.of(shape), shape)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise Damaged(f"{where}: the video is not one of the plan: {error}", REPAIR) from error


def decode_mp4(data: bytes, where: str = "video", shape: VideoShape | None = None) -> Frames:
    """uint8 RGB frames [T, H, W, 3] of an mp4 file.

    `shape` is what the plan says of it: size, count and frames per second are compared with the header before anything
    is decoded, and the first frame too many ends it. Without a plan LIMITS hold. Raises Damaged, naming `where`.
    """
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    limits, converter = VideoLimits.of(shape) if shape else LIMITS, VideoReformatter()
    try:
        with _opened(data, limits, "mp4") as container:
            _check_header(container, limits, shape)
            pictures = _decoded(container, limits)
            frames = [
                converter.reformat(
                    picture, format="rgb24", src_colorspace=Colorspace.ITU709, threads=COLOUR_THREADS
                ).to_ndarray()
                for picture in pictures
            ]
        if shape and len(frames) != shape.frames:
            raise ValueError(f"it has {len(frames)} frames; the plan has {shape.frames}")
        return _stacked(frames)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise Damaged(f"{where}: the video cannot be decoded: {error}", REPAIR) from error


def load_video(path: str | Path, limits: VideoLimits = LIMITS) -> tuple[Frames, float]:
    """All frames [T,H,W,3] uint8 RGB of a video file, and the frames per second its container states.

    Raises UserError for a file that is missing, is not a plain file, holds no video, is beyond the `limits`, cannot be
    decoded or states no frame rate. Playlists that name other files are not followed.
    """
    import av

    try:
        source = os.fdopen(open_file(path, "give the path of a video file"), "rb")
    except FileNotFoundError:
        raise UserError(f"no video file at {path}", "give the path of an existing file") from None
    try:
        with source, _opened(source, limits) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream", "give a video file")
            rate: Fraction | None = container.streams.video[0].average_rate
            _check_header(container, limits)
            frames = [
                picture.to_ndarray(format="rgb24", threads=COLOUR_THREADS) for picture in _decoded(container, limits)
            ]
        if not frames:
            raise UserError(f"{path} holds no frames", "write the file again")
        if not rate:
            raise UserError(f"{path} states no frame rate", "write the video with its true frames per second")
        return _stacked(frames), float(rate)
    except TooLarge as error:
        raise UserError(
            f"{path}: {error}", "cut or scale it; `rushes judge` takes --max-frames and --max-megapixels"
        ) from None
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{path} cannot be decoded as a video: {error}", "write the file again") from None


class TooLarge(ValueError):
    """A video beyond what is decoded."""


def _opened(source: bytes | BinaryIO, limits: VideoLimits, format: str | None = None) -> InputContainer:
    """A container whose decoders refuse larger pictures from the first byte on, and which opens no other file."""
    import av

    return av.open(
        io.BytesIO(source) if isinstance(source, bytes) else source,
        format=format,
        options={"protocol_whitelist": "none"},
        stream_options=[{"max_pixels": _most(limits)}],
    )


def _most(limits: VideoLimits) -> str:
    """Pixels for the decoder, which counts whole macroblocks and some rows more."""
    return str(2 * limits.pixels + 2**14)


def _check_header(container: InputContainer, limits: VideoLimits, shape: VideoShape | None = None) -> None:
    """ValueError for a video whose header does not say what the plan does, or more than is decoded."""
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("its codec is unknown")
    width, height, rate = stream.codec_context.width, stream.codec_context.height, stream.average_rate
    seen = f"{width}x{height}, {stream.frames} frames, {float(rate or 0):g} a second"
    if shape and ((height, width, stream.frames) != shape.size or rate != shape.fps):
        planned = f"{shape.width}x{shape.height}, {shape.frames} frames, {shape.fps} a second"
        raise TooLarge(f"it is {seen}; the plan has {planned}")
    if stream.frames > limits.frames or width * height > limits.pixels:
        raise TooLarge(f"it is {seen}; at most {limits} are decoded")
    if width * height * stream.frames > limits.all_pixels:
        raise TooLarge(f"it is {seen}; at most {limits} are decoded")


def _decoded(container: InputContainer, limits: VideoLimits) -> Iterator[VideoFrame]:
    """The pictures of a video within the limits, on one thread."""
    stream = container.streams.video[0]
    stream.thread_count = 1
    stream.codec_context.options = {"max_pixels": _most(limits)}
    pixels = 0
    for number, picture in enumerate(container.decode(video=0), start=1):
        size = picture.width * picture.height
        pixels += size
        if number > limits.frames or size > limits.pixels or pixels > limits.all_pixels:
            raise TooLarge(f"frame {number} is {picture.width}x{picture.height}; at most {limits} are decoded")
        yield picture


def _stacked(frames: Sequence[NDArray[Any]]) -> Frames:
    """The frames as one array. ValueError where there are none, or several sizes."""
    import numpy

    if not frames:
        raise ValueError("it has no frames")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError("its frames are of several sizes")
    return numpy.stack(frames)
