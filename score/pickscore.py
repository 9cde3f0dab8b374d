"""PickScore: a CLIP model trained on which of two images people prefer for a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from score.clip import ClipReward

SCALE = 26.0  # what flow_grpo divides by, so that usual images lie somewhat below 1


class PickScore(ClipReward):
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

    def values(self, frames: NDArray[np.uint8], prompt: str) -> Mapping[str, float]:
        """Preference of the frames [T, H, W, 3] for the prompt."""
        scores = self.embedder.scale * self.cosines(frames, prompt)
        mean = float(scores.mean())
        return {"score": mean, "normalised": mean / SCALE, "lowest": float(scores.min())}
