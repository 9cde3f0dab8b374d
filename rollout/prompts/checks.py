"""What prompts must be for a model and for the rewards: short enough for its text encoder, readable for the OCR reward.

Found out when a stage is planned, because later it only shows as videos that miss what was asked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.prompts.load import Prompt
from shards.errors import UserError
from shards.process.progress import counted
from shards.text.cleaning import clean
from shards.text.letters import normaliser, plain_normaliser
from shards.text.quotes import quoted_spans
from shards.text.recognisers import recogniser_of, unreadable_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shards.config import RunConfig, ScoreConfig

SPARE = 4  # tokens that a tokenizer may put around a text
NAMED = 5  # texts that a warning names


def reads(score: ScoreConfig) -> bool:
    """Whether the OCR reward is among the rewards, so that every prompt needs a text to be read."""
    return any(name.split(".")[0] == "ocr" for name in score.rewards)


def check_readable(prompts: Sequence[Prompt], score: ScoreConfig) -> None:
    """UserError for a target that the OCR reward could never read whole, with its line and characters."""
    if not reads(score):
        return
    options = score.options.get("ocr", {})
    recogniser, fold = recogniser_of(options), options.get("fold_confusables") is True
    rule = normaliser if options.get("mode", "default") == "default" else plain_normaliser
    for prompt in prompts:
        target = prompt.target or ""
        error = unreadable_text(target, recogniser, rule(target, fold))
        if error is not None:
            raise UserError(f"{prompt.where}: {error.problem}", error.hint)


def check_lengths(every: Sequence[Prompt], taken: Sequence[Prompt], config: RunConfig, folder: Path) -> list[str]:
    """A sentence for each kind of text that is longer than what the text encoder reads, `model.text_length` tokens.

    `taken` are the prompts of the stage. The tokenizer is that of the model `folder`; it is loaded where a text may be
    too long. Raises UserError, naming line and tokens, where the OCR reward looks for a text behind the cut of any of
    `every` prompt, or where the tokenizer cannot be loaded.
    """
    limit = config.model.text_length
    if not (folder / "tokenizer").is_dir():  # only where configurations alone are read
        texts = [prompt.text for prompt in taken] + [prompt.negative or "" for prompt in taken]
        unknown = any(_may_exceed(text, limit) for text in (*texts, config.rollout.negative_prompt))
        return [f"{folder} has no tokenizer here, so the tokens of the prompts were not counted"] if unknown else []
    for prompt in every if reads(config.score) else ():
        _check_target(prompt, folder, limit)
    named = [(prompt.where, prompt.text) for prompt in taken]
    negatives = [(prompt.where, prompt.negative) for prompt in taken if prompt.negative is not None]
    negatives.append(("rollout.negative_prompt", clean(config.rollout.negative_prompt)))
    return [
        sentence
        for kind, texts in (("prompt", named), ("negative prompt", negatives))
        if (sentence := _too_long(kind, texts, folder, limit))
    ]


def _check_target(prompt: Prompt, folder: Path, limit: int) -> None:
    if prompt.target is None or not _may_exceed(prompt.text, limit):
        return
    tokens = _tokens(folder, prompt.text)
    ends = _target_ends(prompt.text, prompt.target) if tokens > limit else []
    if any(_tokens(folder, prompt.text[:end]) > limit for end in ends):
        problem = f"{prompt.where}: the text to be read, {prompt.target[:60]!r}, is cut off"
        cut = f"the prompt has {tokens} tokens, and the model reads {limit} (model.text_length)"
        raise UserError(f"{problem}: {cut}", "say it earlier, or shorten the prompt")


def _target_ends(text: str, target: str) -> list[int]:
    """Where in a prompt the parts of its target end; none where it does not say them."""
    try:
        quoted = [(start, end) for start, end in quoted_spans(text) if text[start:end].strip()]
    except ValueError:
        quoted = []
    if quoted and " ".join(text[start:end].strip() for start, end in quoted) == target:
        return [end for _, end in quoted]
    whole = re.search(re.escape(target), text, re.IGNORECASE)
    if whole:
        return [whole.end()]
    words = (re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in target.split())
    return [word.end() for word in words if word]


def _too_long(kind: str, texts: Sequence[tuple[str, str]], folder: Path, limit: int) -> str:
    """A warning that names the first texts beyond the limit and counts the others; "" where there are none."""
    long = [(where, tokens) for where, text in texts if (tokens := _beyond(folder, text, limit))]
    if not long:
        return ""
    shown = ", ".join(f"{where} ({tokens} tokens)" for where, tokens in long[:NAMED])
    more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
    subject, verb = counted(len(long), kind), "is" if len(long) == 1 else "are"
    return f"{subject} {verb} longer than the {limit} tokens the model reads (model.text_length): {shown}{more}"


def _beyond(folder: Path, text: str, limit: int) -> int:
    """The tokens of a text where they are more than the limit, else 0."""
    tokens = _tokens(folder, text) if _may_exceed(text, limit) else 0
    return tokens if tokens > limit else 0


def _may_exceed(text: str, limit: int) -> bool:
    """Whether a text may have more tokens than that: a token stands for a byte or more of it, once normalised."""
    return max(len(text.encode()), len(unicodedata.normalize("NFKC", text).encode())) + SPARE > limit


@lru_cache(maxsize=2**16)
def _tokens(folder: Path, text: str) -> int:
    """How many tokens the text encoder would get of a cleaned text without a limit."""
    return len(_tokenizer(folder)(text, verbose=False).input_ids)


@lru_cache(maxsize=2)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from rollout.policy.folder import load_text_tokenizer

    return load_text_tokenizer(folder)
