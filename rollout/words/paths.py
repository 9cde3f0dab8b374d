"""Where the embedded model `words` lies."""

from __future__ import annotations

from pathlib import Path


def words_folder() -> Path:
    """Where the embedded model `words` and its prompts lie: model/, prompts/train.txt, prompts/eval.txt."""
    return Path(__file__).parent
