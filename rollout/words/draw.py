"""Draw the clips that the embedded model `words` is trained on: a short word, two colours, a slow drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES, HEIGHT, WIDTH = 5, 32, 64

# Capitals of 3 to 5 letters that EasyOCR reads without error when they are drawn clean.
WORDS = ("FILM", "REEL", "TAKE", "SHOT", "LENS", "ZOOM", "CUT", "PAN", "EDIT", "CAST", "ROLL", "FADE")
INKS = {"white": (240, 240, 240), "yellow": (250, 220, 60), "cyan": (90, 230, 240)}
PAPERS = {"black": (16, 16, 20), "blue": (24, 36, 120), "red": (120, 20, 28), "green": (16, 84, 40)}


@dataclass(frozen=True)
class Scene:
    """What one prompt asks for: a word, the colour of its ink and of the paper behind it."""

    word: str
    ink: str
    paper: str

    @property
    def prompt(self) -> str:
        """The prompt as a user would write it, with the word in quotes."""
        return f'"{self.word}" in {self.ink} on {self.paper}'


def scenes(words: Sequence[str] = WORDS) -> list[Scene]:
    """Every combination of word, ink and paper, in a fixed order."""
    return [Scene(word, ink, paper) for word in words for ink in INKS for paper in PAPERS]


def split(words: Sequence[str] = WORDS) -> tuple[list[Scene], list[Scene]]:
    """Scenes for post-training and the held-out ones for evaluation: every word, ink and paper is in both."""
    train: list[Scene] = []
    held_out: list[Scene] = []
    for scene in scenes(words):
        code = list(words).index(scene.word) + list(INKS).index(scene.ink) + 2 * list(PAPERS).index(scene.paper)
        (held_out if code % 4 == 0 else train).append(scene)
    return train, held_out


def draw_clip(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip of a scene, uint8 [FRAMES, HEIGHT, WIDTH, 3]; place, size and drift come from `rng`."""
    font = ImageFont.load_default(int(rng.integers(19, 21)))
    left, top, right, bottom = font.getbbox(scene.word)
    x = (WIDTH - left - right) / 2 + rng.uniform(-2.0, 2.0)
    y = (HEIGHT - top - bottom) / 2 + rng.uniform(-1.5, 1.5)
    drift_x, drift_y = rng.uniform(-0.6, 0.6), rng.uniform(-0.4, 0.4)
    frames = []
    for step in range(-(FRAMES // 2), FRAMES // 2 + 1):
        image = Image.new("RGB", (WIDTH, HEIGHT), PAPERS[scene.paper])
        place = (x + drift_x * step, y + drift_y * step)
        ImageDraw.Draw(image).text(place, scene.word, font=font, fill=INKS[scene.ink])
        frames.append(np.asarray(image))
    return np.stack(frames)


def draw_batch(count: int, rng: np.random.Generator, words: Sequence[str] = WORDS) -> tuple[list[Scene], np.ndarray]:
    """Draw `count` random scenes; the clips are float32 [count, 3, FRAMES, HEIGHT, WIDTH] in [-1, 1]."""
    every = scenes(words)
    chosen = [every[i] for i in rng.integers(0, len(every), count)]
    clips = np.stack([draw_clip(scene, rng) for scene in chosen])
    return chosen, clips.transpose(0, 4, 1, 2, 3).astype(np.float32) / 127.5 - 1.0
