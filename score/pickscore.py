"""PickScore: a CLIP model trained on which of two images people prefer for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from score.clip import load_embedder, model_identity, positive, spread
from score.reward import Scored, Video

SCALE = 26.0  # what flow_grpo divides by, so that usual images lie somewhat below 1


class PickScore:
    """Preference of frames for a prompt: learned scale times cosine of the embeddings (Kirstain et al., 2023).

    score        mean over frames spread evenly over the video; about 18 to 23 with the released model
    normalised   score / 26, the number flow_grpo shows in its curves
    lowest       the score of the worst of these frames
    Any CLIP model trained this way fits. PickScore_v1 comes without a processor: give that of
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K. It judges single frames: motion does not count.
    """

    name = "pickscore"
    version = "1"
    components = ("score", "normalised", "lowest")
    neutral = ("device",)

    def __init__(self, model: str, processor: str = "", frames: int = 4, device: str = "auto") -> None:
        """Options as those of the reward `clip`."""
        self.frames = positive("pickscore", "frames", frames)
        self.embedder = load_embedder(model, processor or model, device)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """Preferences of every video for its prompt."""
        return [self.judge(video) for video in videos]

    def judge(self, video: Video) -> Scored:
        """One video at a time: its numbers must not depend on its neighbours."""
        numbers = spread(len(video.frames), self.frames)
        cosines = self.embedder.images(video.frames[numbers]) @ self.embedder.text(video.prompt)
        scores = self.embedder.scale * cosines
        mean = float(scores.mean())
        return Scored({"score": mean, "normalised": mean / SCALE, "lowest": float(scores.min())}, frames=numbers)

    @staticmethod
    def identity(options: Mapping[str, Any]) -> dict[str, str]:
        """Digests of model and processor. Raises UserError for folders that hold none."""
        return model_identity(options)
