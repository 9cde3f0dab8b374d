"""Frames to mp4 and back with PyAV: the same frames always give the same bytes; and any video file as frames."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import REPAIR, Damaged, UserError

if TYPE_CHECKING:
    from fractions import Fraction

    import numpy
    from numpy.typing import NDArray

    Frames = NDArray[numpy.uint8]

# One thread, and no macroblock tree: x264 decides differently with several threads, and its tree differs now and then
# from run to run with one. bitexact keeps library versions and times out of the file.
ENCODER = {"preset": "medium", "threads": "1", "x264-params": "threads=1:lookahead-threads=1:mbtree=0"}
CONTAINER = {"fflags": "+bitexact"}


def encode_mp4(frames: Frames, fps: int, crf: int = 12) -> bytes:
    """H.264 in mp4, yuv420p BT.709, of uint8 RGB frames [T, H, W, 3] at `fps` frames per second.

    `crf` is x264's quality, 0 (lossless) to 51. Raises UserError for odd sizes, which yuv420p cannot hold.
    """
    import av
    from av.video.reformatter import Colorspace

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != "uint8" or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}", "they must be uint8 [T, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(
            f"frames of {frames.shape[2]}x{frames.shape[1]} cannot be encoded", "use an even width and height"
        )
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4", options=CONTAINER) as container:
        stream: Any = container.add_stream("libx264", rate=fps, options=ENCODER | {"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = int(Colorspace.ITU709)
        stream.codec_context.color_primaries = stream.codec_context.color_trc = int(Colorspace.ITU709)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return sink.getvalue()


def decode_mp4(data: bytes, where: str = "video") -> Frames:
    """uint8 RGB frames [T, H, W, 3] of an mp4 file. Raises Damaged, naming `where`, when it cannot be decoded."""
    import av
    import numpy
    from av.video.reformatter import Colorspace

    try:
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].thread_count = 1
            pictures = container.decode(video=0)
            frames = [p.reformat(format="rgb24", src_colorspace=Colorspace.ITU709).to_ndarray() for p in pictures]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise Damaged(f"{where}: the video cannot be decoded: {error}", REPAIR) from error
    if not frames:
        raise Damaged(f"{where}: the video has no frames", REPAIR)
    return numpy.stack(frames)


def load_video(path: str | Path) -> tuple[Frames, float]:
    """All frames [T,H,W,3] uint8 RGB of a video file, and the frames per second its container states.

    Raises UserError for a file that is missing, holds no video, cannot be decoded or states no frame rate.
    """
    import av
    import numpy

    if not Path(path).is_file():
        raise UserError(f"no video file at {path}", "give the path of an existing file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream", "give a video file")
            rate: Fraction | None = container.streams.video[0].average_rate
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{path} cannot be decoded as a video: {error}", "write the file again") from None
    if not frames:
        raise UserError(f"{path} holds no frames", "write the file again")
    if not rate:
        raise UserError(f"{path} states no frame rate", "write the video with its true frames per second")
    return numpy.stack(frames), float(rate)
