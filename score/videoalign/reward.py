"""VideoAlign as a reward: checkpoint, prompt and frames to scores, with what was scored lately kept."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from score.digests import digest, digest_folder
from score.options import device_named
from score.reward import Scored, Video
from score.videoalign.checkpoint import DIMENSIONS, find_checkpoint
from score.videoalign.network import Network, Tokens, load_network, mode_named, pad
from score.videoalign.text import chat, check_prompt, load_tokenizer, read_template
from score.videoalign.video import Clip, Request, frame_count, frame_indices, prepare
from shards.errors import UserError
from shards.video import load_video

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Frames = NDArray[np.uint8] | torch.Tensor
    Source = str | Path | tuple[Frames, float]

REMEMBERED_SCORES = 10_000  # VQ and MQ of this many videos
REMEMBERED_CLIPS = 2  # about 25 MB each
REMEMBERED_EMBEDDINGS = 8  # about 8 MB each for five seconds of video at the released size
Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The last `limit` values by key."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value kept for `key`, if any."""
        if key in self.values:
            self.values.move_to_end(key)
        return self.values.get(key)

    def keep(self, key: Hashable, value: Value) -> Value:
        """Keep `value` and forget what is older than the last `limit`."""
        self.values[key] = value
        self.values.move_to_end(key)
        if len(self.values) > self.limit:
            self.values.popitem(last=False)
        return value


class VideoAlign:
    """Scores videos with a VideoReward checkpoint. The network is loaded at the first score.

    checkpoint   folder of the download, or one checkpoint-STEP in it
    base_model   folder with config.json and tokenizer of Qwen2-VL-2B-Instruct (and its weights for the split layout)
    template     a VideoAlign checkout, its prompt_template.py, or a text file with the prompt template
    mode         float32, bfloat16_weights_float32_math, official_rope_float32_math or bfloat16
    step         which checkpoint-STEP; the newest when absent or -1
    use_norm     normalise with the checkpoint's constants, when it has any
    fps          frames sampled per second of video; num_frames: frames in all instead; max_pixels: largest frame.
                 The checkpoint's own values when absent.
    """

    name = "videoalign"
    version = "1"
    components = ("Overall", *DIMENSIONS, *(f"{name}_raw" for name in (*DIMENSIONS, "Overall")))
    neutral = ("device", "batch_size")

    def __init__(
        self,
        checkpoint: str,
        base_model: str,
        template: str,
        mode: str = "official_rope_float32_math",
        device: str = "auto",
        batch_size: int = 8,
        step: int | None = None,
        use_norm: bool = True,
        fps: float | None = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.mode = mode_named(mode)
        self.device = device_named(device)
        self.batch_size = _positive("batch_size", batch_size)
        self.checkpoint = find_checkpoint(checkpoint, _step(step))
        self.base_model = Path(base_model)
        self.request = self._request(fps, num_frames, max_pixels)
        use_norm = _flag("use_norm", use_norm)
        self.norm = self.checkpoint.norm if use_norm else {}
        self.template = read_template(template)
        self._scores: Recent[tuple[float, float]] = Recent(REMEMBERED_SCORES)
        self._embeddings: Recent[torch.Tensor] = Recent(REMEMBERED_EMBEDDINGS)
        if use_norm and not self.norm:
            logging.getLogger(__name__).warning(
                "%s has no inference_config: scores are not normalised", self.checkpoint.config_file
            )

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Components of every video at its own frame rate; a score that is not finite is missing, with the reason."""
        clips = (prepare(video.frames, video.fps, self.request, video.key) for video in videos)
        raw = self._raw(clips, [video.prompt for video in videos], [video.key for video in videos])
        return [
            Scored(self._components(scores), frames=self._frames(video))
            if all(map(math.isfinite, scores))
            else Scored(reason="score is not finite")
            for video, scores in zip(videos, raw, strict=True)
        ]

    def _frames(self, video: Video) -> list[int]:
        """Numbers of the frames of a video that are looked at."""
        total = len(video.frames)
        return frame_indices(total, frame_count(total, video.fps, self.request, video.key))

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises UserError for values that cannot be."""
        mode_named(options["mode"])
        _positive("batch_size", options["batch_size"])
        _step(options["step"])

    @staticmethod
    def identity(options: Mapping[str, Any]) -> dict[str, str]:
        """Digests of the checkpoint, of what is used of the base model, and of the template. Raises UserError."""
        checkpoint = find_checkpoint(options["checkpoint"], _step(options["step"]))
        weights = [path for path in checkpoint.folder.iterdir() if path.suffix in (".pth", ".safetensors")]
        tokenizer = (checkpoint.folder / "tokenizer").glob("*.*")
        whole = (checkpoint.folder / "model.pth").is_file()  # then the base model's own weights are not used
        base = (".json", ".txt") if whole else (".json", ".txt", ".safetensors")
        return {
            "checkpoint": digest(checkpoint.config_file.parent, [checkpoint.config_file, *weights, *tokenizer]),
            "base_model": digest_folder(options["base_model"], base),
            "template": hashlib.sha256(read_template(options["template"]).encode()).hexdigest(),
        }

    def score_videos(self, videos: Sequence[Source], prompts: Sequence[str]) -> list[dict[str, float]]:
        """The components of each video with the prompt at its place.

        A video is the path of a file, whose container states the frame rate, or a pair of frames [T,H,W,3] uint8 and
        their true frames per second.
        Raises UserError for inputs VideoAlign cannot take, and for a score that is not finite.
        """
        if isinstance(prompts, str) or len(videos) != len(prompts):
            count = 1 if isinstance(prompts, str) else len(prompts)
            raise UserError(f"there are {len(videos)} videos and {count} prompts", "give one prompt for each video")
        names = [str(v) if isinstance(v, str | Path) else f"video {place}" for place, v in enumerate(videos)]
        results = self._raw(self._clips(videos, names), prompts, names)
        for name, scores in zip(names, results, strict=True):
            if not all(map(math.isfinite, scores)):
                raise UserError(f"{name}: a score is not finite: {scores}", "try mode float32; check the checkpoint")
        return [self._components(scores) for scores in results]

    def _request(self, fps: float | None, num_frames: int | None, max_pixels: int | None) -> Request:
        """The sampling asked for, else the checkpoint's own. `fps` and `num_frames` exclude each other."""
        own = self.checkpoint.data
        own_frames = own.get("num_frames")
        if fps is not None and (num_frames is not None or own_frames is not None):
            raise UserError(
                "videoalign takes fps or num_frames, not both", f"drop one; the checkpoint says {own_frames}"
            )
        frames = own_frames if num_frames is None else num_frames
        return Request(
            fps=_positive("fps", (own.get("fps") or 2.0) if fps is None else fps, float),  # null beside num_frames
            num_frames=None if frames is None else _positive("num_frames", frames, float),
            max_pixels=_positive("max_pixels", own["max_frame_pixels"] if max_pixels is None else max_pixels),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint, else of the base model. Raises UserError where neither has one."""
        return load_tokenizer(self.base_model, self.checkpoint.folder)

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens.of(self.tokenizer)

    @cached_property
    def network(self) -> Network:
        """The network with the weights of the checkpoint. Raises UserError for files that do not fit it."""
        return load_network(self.checkpoint, self.base_model, len(self.tokenizer), self.mode, self.device)

    def _clips(self, videos: Sequence[Source], names: Sequence[str]) -> Iterator[Clip]:
        """Each video prepared, one at a time; a file named several times in a row is decoded once."""
        files: Recent[Clip] = Recent(REMEMBERED_CLIPS)
        for video, name in zip(videos, names, strict=True):
            if isinstance(video, str | Path):
                yield files.get(name) or files.keep(name, prepare(*load_video(video), self.request, name))
            elif isinstance(video, tuple) and len(video) == 2:
                yield prepare(*video, self.request, name)
            else:
                raise UserError(f"{name} is neither a file nor frames with a frame rate", "give (frames, fps)")

    def _raw(self, clips: Iterator[Clip], prompts: Sequence[str], names: Sequence[str]) -> list[list[float]]:
        """Raw VQ, MQ, TA of each clip, `batch_size` at a time. Prompts are checked before anything is computed."""
        for prompt, name in zip(prompts, names, strict=True):
            check_prompt(prompt, self.tokenizer, name)
        scores = []
        for first in range(0, len(prompts), self.batch_size):
            asked = prompts[first : first + self.batch_size]
            scores += self._batch(list(islice(clips, len(asked))), asked)
        return scores

    @torch.no_grad()
    def _batch(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[list[float]]:
        """Raw VQ, MQ, TA of one batch. VQ and MQ of a video already seen are those of its first time."""
        videos = torch.cat([self._embedding(clip) for clip in clips])
        texts = [chat(self.template, prompt, clip.tokens) for clip, prompt in zip(clips, prompts, strict=True)]
        encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        rows = self.network.read(*pad(encoded, self._tokens, self.device), videos, self._tokens).tolist()
        known = [
            self._scores.get(c.digest) or self._scores.keep(c.digest, (r[0], r[1]))
            for c, r in zip(clips, rows, strict=True)
        ]
        return [[*seen, row[2]] for seen, row in zip(known, rows, strict=True)]

    def _embedding(self, clip: Clip) -> torch.Tensor:
        kept = self._embeddings.get(clip.digest)
        return self._embeddings.keep(clip.digest, self.network.see(clip)) if kept is None else kept

    def _components(self, raw: Sequence[float]) -> dict[str, float]:
        """Every component from raw VQ, MQ, TA. Overall is a sum, of the normalised values when there are any."""
        values = {}
        for dimension, score in zip(DIMENSIONS, raw, strict=True):
            mean, std = self.norm.get(dimension, (0.0, 1.0))
            values[dimension] = (score - mean) / std
        values["Overall"] = sum(values.values())
        values |= {f"{dimension}_raw": score for dimension, score in zip(DIMENSIONS, raw, strict=True)}
        return values | {"Overall_raw": sum(raw)}


def score_videos(videos: Sequence[Source], prompts: Sequence[str], **options: Any) -> list[dict[str, float]]:
    """The components of each video with the prompt at its place; `options` are those of VideoAlign.

    Keep a VideoAlign and call its `score_videos` to score more than once: this loads the network anew.
    """
    return VideoAlign(**options).score_videos(videos, prompts)


def _positive(option: str, value: Any, kind: Callable[[Any], Any] = int) -> Any:
    """A positive number, also from the text a command line gives; UserError otherwise."""
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0 and number == float(value)):
        raise UserError(f"videoalign: {option} is {value!r}, not a positive number", f"give {option} a number above 0")
    return number


def _flag(option: str, value: object) -> bool:
    """A truth value, also from the text a command line gives; UserError otherwise."""
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"videoalign: {option} is {value!r}, neither true nor false", f"write {option} = true or false")
    return str(value).lower() == "true"


def _step(value: Any) -> int | None:
    """The step asked for, None for the newest; UserError for what is not a whole number."""
    if value is None or re.fullmatch(r"-1|\d+", str(value)):
        return None if value is None else int(value)
    raise UserError(f"videoalign: step is {value!r}, not the number of a checkpoint", "leave it out for the newest")
