"""Strings of the OCR reward: the text a prompt asks for, how two are compared, the definitions of other systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shards.text.letters import Normaliser, normaliser, plain_normaliser
from shards.text.quotes import quoted


class NoTarget(ValueError):
    """The prompt does not say which text should be drawn; the message says why."""


def quotations(prompt: str) -> list[str]:
    """The texts between quotation marks of a prompt without blank ones (shards.text.quotes.quoted). Raises NoTarget."""
    try:
        spans = quoted(prompt)
    except ValueError as error:
        raise NoTarget(f"in the prompt, {error}") from None
    if not spans:
        raise NoTarget("the prompt has no quoted text")
    if not any(spans):
        raise NoTarget("the quoted text of the prompt is empty")
    return [span for span in spans if span]


def target_of(prompt: str, target: str | None = None) -> str:
    """The text a video should show: `target` when the prompts file gave one, else all quoted texts, joined by a space.

    Raises NoTarget when there is none, or nothing of it is left after normalisation.
    """
    wanted = target if target is not None and target.strip() else " ".join(quotations(prompt))
    if not normaliser(wanted)(wanted):
        raise NoTarget("the target text has no visible character")
    return wanted


def levenshtein(left: str, right: str) -> int:
    """Edit distance: the fewest insertions, deletions and replacements of a character that turn one into the other."""
    previous = list(range(len(right) + 1))
    for row, a in enumerate(left, 1):
        current = [row]
        for column, b in enumerate(right, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (a != b)))
        previous = current
    return previous[-1]


def similarity(text: str, target: str) -> float:
    """1 - min(distance, L) / L with L = len(target) > 0; both sides already normalised."""
    length = len(target)
    if abs(len(text) - length) >= length:  # the distance is never below the difference of the lengths
        return 0.0
    return 1.0 - min(levenshtein(text, target), length) / length


def _similarity_or_substring(text: str, target: str) -> float:
    return 1.0 if target in text else similarity(text, target)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_of_positive(values: Sequence[float]) -> float:
    return _mean([value for value in values if value > 0])


def _first_quoted(prompt: str, target: str | None) -> str:
    """flow_grpo's target: between the first two ASCII quotes (`split('"')[1]`); it fails where flow_grpo raises."""
    parts = prompt.split('"')
    text = parts[1] if len(parts) > 1 else target
    if text is None:
        raise NoTarget('the prompt has no text between "')
    if not plain_normaliser(text)(text):
        raise NoTarget("the quoted text of the prompt is empty")
    return text


def _first_quoted_or_prompt(prompt: str, target: str | None) -> str:
    """FastVideo's target: the same, but the whole prompt where nothing is quoted; an empty one scores 0."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 1 else target or prompt


@dataclass(frozen=True)
class Definition:
    """How a reward follows from the texts read in the frames of one video."""

    target: Callable[[str, str | None], str]
    normaliser: Callable[[str, bool], Normaliser]
    similarity: Callable[[str, str], float]
    combine: Callable[[Sequence[float]], float]
    first_frame_only: bool = False
    reading_order: bool = False


DEFINITIONS: dict[str, Definition] = {
    "default": Definition(target_of, normaliser, similarity, _mean, reading_order=True),
    "flow_grpo_video": Definition(_first_quoted, plain_normaliser, similarity, _mean_of_positive),
    "flow_grpo_image": Definition(
        _first_quoted, plain_normaliser, _similarity_or_substring, _mean, first_frame_only=True
    ),
    "fastvideo": Definition(_first_quoted_or_prompt, plain_normaliser, _similarity_or_substring, _mean_of_positive),
}


@dataclass(frozen=True)
class Judgement:
    """The OCR reward of one video and what it is made of; all shares are of the frames that were read."""

    reward: float
    exact: float
    positive: float
    empty: float
    length_ratio: float


def judge(
    texts: Sequence[str],
    prompt: str,
    target: str | None = None,
    *,
    mode: str = "default",
    fold_confusables: bool = False,
) -> Judgement:
    """Compare the texts read in the frames of one video with what its prompt asks for. Raises NoTarget."""
    definition = DEFINITIONS[mode]
    wanted = definition.target(prompt, target)
    normalise = definition.normaliser(wanted, fold_confusables)
    goal = normalise(wanted)
    read = [normalise(text) for text in (texts[:1] if definition.first_frame_only else texts)]
    if not goal:
        return Judgement(0.0, 0.0, 0.0, _mean([float(not text) for text in read]), 0.0)
    scores = [definition.similarity(text, goal) for text in read]
    return Judgement(
        reward=definition.combine(scores),
        exact=_mean([float(text == goal) for text in read]),
        positive=_mean([float(score > 0) for score in scores]),
        empty=_mean([float(not text) for text in read]),
        length_ratio=_mean([len(text) / len(goal) for text in read]),
    )
