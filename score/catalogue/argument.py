"""The option --reward: NAME, NAME=WEIGHT or NAME:OPTION=VALUE,…, the same in `score` and in `judge`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from score.reward import known, split_name
from shards.absolute_paths import reward_in_full
from shards.errors import UserError, nearest

EXAMPLE = "for example ocr, ocr=0.5, ocr:interval=2 or ocr=0.5:mode=flow_grpo_video,interval=2"
_OWN = re.compile(r"([A-Za-z_]\w*(?:\.\w+)?)(?:=([^:]*))?(?::(.*))?", re.DOTALL)  # what follows `module:`


@dataclass(frozen=True)
class RewardArgument:
    """What one --reward says."""

    name: str
    """A registered name, `module:Class` or `/path/file.py:Class`, perhaps with `.component` behind."""
    weight: float | None
    """None where none is given."""
    options: Mapping[str, str]


def parse_argument(text: str) -> RewardArgument:
    """Read NAME[=WEIGHT][:OPTION=VALUE,…]; a value may hold commas and colons, and a file may be relative.

    Raises UserError for another form, a weight that is not a finite number, an option given twice, a missing file.
    """
    wrong = UserError(f"--reward {text}: not of the form NAME:option=value,…", EXAMPLE)
    head, colon, rest = text.partition(":")
    name, equals, weight = head.partition("=")
    tail: str | None = rest if colon else None
    if colon and not equals and split_name(name)[0] not in known():
        matched = _OWN.fullmatch(rest)
        if not matched:
            raise wrong
        name, weight, tail = f"{head}:{matched[1]}", matched[2] or "", matched[3]
        equals = "=" if matched[2] is not None else ""
    if not name or (tail is not None and not re.match(r"[A-Za-z_]\w*=", tail)):
        raise wrong
    number = _weight(text, head, weight) if equals else None
    return RewardArgument(reward_in_full(name), number, _options(text, tail or ""))


def reward_settings(texts: Sequence[str]) -> list[str]:
    """Settings, as --set has them, that stand for the --reward options of a call; a missing weight is 1.

    Raises UserError as parse_argument does, and for a reward or an option of one that is given twice.
    """
    weights: dict[str, float] = {}
    options: dict[str, Mapping[str, str]] = {}
    for text in texts:
        one = parse_argument(text)
        base = split_name(one.name)[0]
        if one.name in weights or (one.options and options.get(base, one.options) != one.options):
            raise UserError(f"--reward {text}: {one.name} is given twice", "give each reward, and its options, once")
        weights[one.name] = 1.0 if one.weight is None else one.weight
        if one.options:
            options[base] = one.options
    if not weights:
        return []
    pairs = ", ".join(f"{json.dumps(name)} = {weight!r}" for name, weight in weights.items())
    settings = [f"score.rewards={{ {pairs} }}"]
    for base, given in options.items():  # quoted, so that each is what the reward's own annotations make of the text
        settings += [f"score.options.{json.dumps(base)}.{key}={json.dumps(value)}" for key, value in given.items()]
    return settings


def _weight(text: str, head: str, weight: str) -> float:
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    near = nearest(head, known())
    if ":" in text and near and "=" not in head:  # ocrr:interval=2 reads like module:Class=WEIGHT
        raise UserError(f"no reward is called {head!r}", f"did you mean {near!r}?")
    raise UserError(f"--reward {text}: the weight is not a number", "for example --reward ocr=0.5")


def _options(text: str, tail: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in re.split(r",(?=[A-Za-z_]\w*=)", tail) if tail else []:
        option, _, value = part.partition("=")
        if option in options:
            raise UserError(f"--reward {text}: option {option!r} is given twice", "give it once")
        options[option] = value
    return options
