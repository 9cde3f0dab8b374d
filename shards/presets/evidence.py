"""What is known of each preset: how far it was tried, at which commit, and what that does not prove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["proven", "runs", "assembled"]
MEANING: dict[Level, str] = {
    "proven": "proven end to end here",
    "runs": "runs on tiny layouts",
    "assembled": "assembled from recipes",
}


@dataclass(frozen=True)
class Evidence:
    """How far a preset was tried."""

    level: Level
    commit: str
    """The commit at which it was tried, as short as git prints it."""
    shown: str
    not_shown: str

    def __str__(self) -> str:
        return f"{MEANING[self.level]} (commit {self.commit}); not shown: {self.not_shown}"


UNTRIED = "anything about the released weights, a GPU, or what it learns"
EVIDENCE: dict[str, Evidence] = {
    "words": Evidence(
        "proven",
        "1df939d",
        "`bench/learn.py`: five fresh seeds of five gain, shuffled advantages do not",
        "anything about released models, real videos, or a GPU",
    ),
    "wan21-1.3b": Evidence(
        "runs", "3685ed7", "its two scripts in `examples/` run to their end, under torchrun with two ranks too", UNTRIED
    ),
    "wan21-14b": Evidence(
        "assembled", "3685ed7", "its plan: steps, sigmas, window", f"a run of its own, and {UNTRIED}"
    ),
    "wan22-a14b": Evidence(
        "runs", "3685ed7", "the scripts in `examples/` and the SLURM jobs run to their end; both experts train", UNTRIED
    ),
    "wan22-i2v": Evidence("runs", "3685ed7", "its script in `examples/` runs to its end, with images", UNTRIED),
    "wan22-ti2v-5b": Evidence(
        "runs", "3685ed7", "its script in `examples/` runs to its end, with and without images", UNTRIED
    ),
}
"""By preset. A change that could alter what was shown needs it shown again, at a new commit."""


def evidence_table() -> str:
    """The table of README.md and docs/presets.md."""
    lines = ["| preset | evidence | commit | what was shown | what was not |", "|-|-|-|-|-|"]
    for name, found in EVIDENCE.items():
        lines.append(f"| `{name}` | {MEANING[found.level]} | {found.commit} | {found.shown} | {found.not_shown} |")
    return "\n".join(lines) + "\n"
