"""The OCR reward: how much of the text a prompt quotes can be read in the frames of its video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from score.ocr.similarity import DEFINITIONS, NoTarget, judge
from score.reward import Scored, Video
from shards.errors import UserError
from shards.text.recognisers import Recogniser, recogniser_of, unreadable_text


class OCR:
    """Edit similarity of read and wanted text, averaged over every fourth frame, frames without text included.

    Modes other than `default` repeat the definitions of other systems, loopholes included, to compare with them.
    """

    name = "ocr"
    version = "2"
    components = ("similarity", "exact", "positive", "empty", "length_ratio")
    neutral = ("device", "batch_pixels", "model_storage_directory", "user_network_directory")
    keeps_text = True

    def __init__(
        self,
        mode: str = "default",
        interval: int = 4,
        max_frames: int = 0,
        min_size: int = 0,
        canvas_size: int = 2560,
        detector_bf16: bool = False,
        fold_confusables: bool = False,
        min_confidence: float = 0.0,
        device: str = "cpu",
        batch_pixels: int = 100_000,
        languages: list[str] = ["en"],  # noqa: B006
        recog_network: str = "standard",
        model_storage_directory: str = "",
        user_network_directory: str = "",
    ) -> None:
        """interval: every n-th frame is read. max_frames: at most so many of those, evenly spread (0: all).
        min_size: smallest box in pixels (0: by frame size). canvas_size: larger side the detector sees (416: 3 times
        faster, for text over 28 px). detector_bf16: for GPUs, and CPUs with AMX; boxes may differ.
        fold_confusables: 0/o, 1/i/l, 5/s count as equal. min_confidence: boxes not above it are ignored.
        languages: as EasyOCR calls them (["ch_sim", "en"]); others than ["en"] need the file of their model in
        model_storage_directory (else where EasyOCR keeps it, ~/.EasyOCR/model). recog_network: a model of EasyOCR's by
        name, or one of your own, whose .yaml and .py lie in user_network_directory (~/.EasyOCR/user_network).
        """
        given = {"interval": interval, "batch_pixels": batch_pixels, "max_frames": max_frames, "min_size": min_size}
        self.check_options({**given, "canvas_size": canvas_size, "mode": mode, "min_confidence": min_confidence})
        self.mode, self.interval, self.max_frames = mode, interval, max_frames
        self.fold_confusables, self.min_confidence = fold_confusables, min_confidence
        self.recogniser = recogniser_of(
            {
                "languages": languages,
                "recog_network": recog_network,
                "model_storage_directory": model_storage_directory,
                "user_network_directory": user_network_directory,
            }
        )
        self._reading: dict[str, Any] = {
            "min_size": min_size,
            "canvas_size": canvas_size,
            "detector_bf16": detector_bf16,
            "device": device,
            "batch_pixels": batch_pixels,
            "recogniser": self.recogniser,
        }

    @staticmethod
    def identity(options: Mapping[str, Any]) -> dict[str, str]:
        """The recognition model, where it is not the English one, in place of the options that name it."""
        found = recogniser_of(options)
        return {} if found.weights is None else {"languages": found.identity, "recog_network": found.name}

    @staticmethod
    def check_files(options: Mapping[str, Any]) -> None:
        """UserError when the file of the recognition model is not there."""
        recogniser_of(options).check_weights()

    @staticmethod
    def unscorable(options: Mapping[str, Any], prompt: str, target: str | None) -> UserError | None:
        """Why no video of a prompt can have a score: characters of its target that the recogniser does not know."""
        try:
            return _refusal(recogniser_of(options), options["mode"], options["fold_confusables"], prompt, target)
        except NoTarget:
            return None

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises UserError for values out of range."""
        if (mode := options["mode"]) not in DEFINITIONS:
            raise UserError(f"reward 'ocr' has no mode {mode!r}", f"there are {', '.join(DEFINITIONS)}")
        least = {"interval": 1, "batch_pixels": 1, "max_frames": 0, "min_size": 0, "canvas_size": 32}
        for option, lowest in least.items():
            if options[option] < lowest:
                raise UserError(f"reward 'ocr': {option} is {options[option]}", f"give {lowest} or more")
        if not 0.0 <= (confidence := options["min_confidence"]) < 1.0:
            raise UserError(f"reward 'ocr': min_confidence is {confidence:g}", "give 0 or more and less than 1")

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Read all chosen frames of all videos together and compare. A video without a target has no score."""
        from score.ocr.reading import TextReader, confidence, joined  # imports torch and EasyOCR

        reader, ordered = TextReader(**self._reading), DEFINITIONS[self.mode].reading_order
        style = {"ordered": ordered, "right_to_left": self.recogniser.right_to_left}
        picked = [self.pick(len(video.frames)) for video in videos]
        chosen = [as_uint8(video.frames)[numbers] for video, numbers in zip(videos, picked, strict=True)]
        found = iter(reader.read([frame for frames in chosen for frame in frames]))
        scored = []
        for video, numbers in zip(videos, picked, strict=True):
            frames = [next(found) for _ in numbers]
            texts = [joined(boxes, min_confidence=self.min_confidence, **style) for boxes in frames]
            sure = [confidence(boxes, self.min_confidence) for boxes in frames]
            scored.append(replace(self.judge(video, texts), text=texts, confidence=sure, frames=numbers))
        return scored

    def pick(self, count: int) -> list[int]:
        """Which of `count` frames are read: 0, interval, 2 interval, … (of 4k+1 frames also the last)."""
        if DEFINITIONS[self.mode].first_frame_only:
            return [0]
        chosen = list(range(0, count, self.interval))
        if 0 < self.max_frames < len(chosen):
            chosen = [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, self.max_frames)]
        return chosen

    def judge(self, video: Video, texts: Sequence[str]) -> Scored:
        """The score that follows from the texts of the chosen frames; no model is needed."""
        try:
            refusal = _refusal(self.recogniser, self.mode, self.fold_confusables, video.prompt, video.target)
            if refusal is not None:
                return Scored(reason=refusal.problem)
            judgement = judge(texts, video.prompt, video.target, mode=self.mode, fold_confusables=self.fold_confusables)
        except NoTarget as error:
            return Scored(reason=str(error))
        values = (
            judgement.reward,
            judgement.exact,
            judgement.positive,
            judgement.empty,
            judgement.length_ratio,
        )
        return Scored(components=dict(zip(self.components, values, strict=True)), text=list(texts))


def _refusal(recogniser: Recogniser, mode: str, fold: bool, prompt: str, target: str | None) -> UserError | None:
    """The characters of what the mode looks for that the recogniser does not know, as an error; None for none."""
    wanted = DEFINITIONS[mode].target(prompt, target)
    return unreadable_text(wanted, recogniser, DEFINITIONS[mode].normaliser(wanted, fold))


def as_uint8(frames: NDArray[np.number]) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] uint8 of frames [T, H, W, 3] or [T, 3, H, W], uint8 or floating in [0, 1].

    Floating frames are rounded and clipped: a decoder's 1.0001 is white, not an overflow. Raises ValueError for others.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise ValueError(f"frames have shape {frames.shape}, not [T, H, W, 3]")
    if frames.shape[3] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.dtype == np.uint8:
        return np.ascontiguousarray(frames)
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames are {frames.dtype}, not uint8 or floating")
    low, high = float(frames.min()), float(frames.max())
    if not (low >= -0.5 and high <= 1.5):  # also false for NaN
        raise ValueError(f"floating frames span {low:g} to {high:g}, not 0 to 1")
    return np.ascontiguousarray(np.clip(np.rint(frames * 255.0), 0, 255).astype(np.uint8))
